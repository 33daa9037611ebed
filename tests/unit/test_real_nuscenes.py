"""The reader of nuScenes info files opens arrays and refuses calls; both layouts give the same boxes."""

import os
import pickle

import numpy as np
import pytest

from benchmarks.real_nuscenes import arrays_from, labelled_keyframes


class Calls:
    def __reduce__(self):
        return os.getcwd, ()


def test_an_info_file_that_calls_something_is_refused():
    with pytest.raises(pickle.UnpicklingError, match=r"may not call posix\.getcwd"):
        arrays_from(pickle.dumps({"infos": Calls()}))
    held = {"a": np.arange(3), "b": np.float64(2), "c": np.array(["car"])}
    found = arrays_from(pickle.dumps(held))
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"] == 2
    assert found["c"][0] == "car"


def test_older_and_newer_info_files_give_the_same_frame(tmp_path):
    np.tile(np.array([1.0, 2, 0.5, 9, 0], dtype=np.float32), (6, 1)).tofile(tmp_path / "one.pcd.bin")
    box = [1.0, 2.0, 0.5, 4.0, 2.0, 1.5, 0.3]
    older = [*box[:3], box[4], box[3], box[5], -box[6] - np.pi / 2]
    row = {"gt_boxes": np.array([older]), "gt_names": np.array(["car"]), "num_lidar_pts": np.array([6])}
    missing = {**row, "lidar_path": "samples/gone.pcd.bin"}
    first = {"infos": [{**row, "lidar_path": "samples/one.pcd.bin"}, missing], "metadata": {}}
    rows = [{"bbox_3d": box, "bbox_label_3d": 0, "num_lidar_pts": np.int64(6)}]
    second = {
        "metainfo": {"categories": {"car": 0}},
        "data_list": [{"lidar_points": {"lidar_path": "one.pcd.bin"}, "instances": rows}],
    }
    for name, content in (("a.pkl", first), ("b.pkl", second)):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    frames = list(labelled_keyframes(tmp_path))
    assert [frame.name for frame in frames] == ["one", "one"]
    for frame in frames:
        assert len(frame.cloud.points) == 6
        assert frame.labels.truth.types == ("car",)
        assert frame.labels.num_points.tolist() == [6]
        boxes = frame.labels.truth.boxes
        table = np.concatenate([boxes.centre, boxes.size, boxes.yaw[:, None]], axis=1)
        np.testing.assert_allclose(table, [box], atol=1e-6)
