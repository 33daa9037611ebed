"""Every frame format read back as it was written, and every refusal with its file, its place and its fix."""

import os
import struct

import numpy as np
import pytest
from frame_samples import FIVE, kitti, nuscenes, swept, written

from calib.readers import describe, list_frames, read_points
from dm3d_deploy.errors import FrameError, UsageError


# 21 and 22 points make byte counts that fit one width, 20 points (of 4 columns) and 20 (of 5) fit both.
@pytest.mark.parametrize("count", [20, 21, 22])
@pytest.mark.parametrize(
    ("make", "columns"),
    [(kitti, FIVE[:4]), (nuscenes, FIVE), (swept, (*FIVE[:4], "timestamp"))],
    ids=["kitti", "nuscenes", "swept"],
)
def test_bin_columns_are_told_from_bytes_and_values(tmp_path, make, columns, count):
    points = make(count)
    cloud = read_points(written(tmp_path / "frame.pcd.bin", points))
    assert cloud.columns == columns
    assert cloud.source == str(tmp_path / "frame.pcd.bin")
    np.testing.assert_array_equal(cloud.points, points)


def test_half_precision_frames_carry_a_timestamp(tmp_path):
    points = swept().astype(np.float16)
    cloud = read_points(written(tmp_path / "a.f16x5.bin", points))
    assert cloud.columns == (*FIVE[:4], "timestamp")
    np.testing.assert_array_equal(cloud.points, points.astype(np.float32))


def test_named_columns_are_taken_without_a_guess(tmp_path):
    points = nuscenes()
    points[:, 3] = -7.0
    path = written(tmp_path / "a.bin", points)
    with pytest.raises(FrameError, match=r"intensity = -7 \(byte 12\), which was taken for one of .* does not fit"):
        read_points(path)
    assert read_points(path, columns=FIVE).columns == FIVE
    with pytest.raises(UsageError, match="columns y, x, z do not start with x, y, z"):
        read_points(path, columns=("y", "x", "z"))
    with pytest.raises(FrameError, match=r"no whole number of points of 28 bytes: .* at byte 476"):
        read_points(path, columns=(*FIVE, "a", "b"))


def test_bytes_that_fit_two_widths_and_tell_nothing_are_refused(tmp_path):
    path = written(tmp_path / "a.bin", np.ones(80, dtype=np.float32))
    with pytest.raises(FrameError, match=r"320 bytes, which fit 4 columns and 5, .* Fix: name the columns"):
        read_points(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("width", [3, 4, 5, 6])
def test_npy_tables_of_three_to_six_columns(tmp_path, dtype, order, width):
    six = np.column_stack([nuscenes(), np.linspace(0, 0.4, 24)])[:, :width].astype(dtype)
    np.save(tmp_path / "a.npy", np.array(six, order=order))
    cloud = read_points(tmp_path / "a.npy")
    assert cloud.columns == (*FIVE, "timestamp")[:width]
    np.testing.assert_array_equal(cloud.points, six.astype(np.float32))


def test_npy_places_are_bytes_of_the_file_in_both_orders(tmp_path):
    points = kitti()
    points[5, 2] = np.inf
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.array(points, order=order))
        data = (tmp_path / "a.npy").read_bytes()
        at = data.index(struct.pack("<f", np.inf))
        with pytest.raises(FrameError, match=rf"point 5 of 24 has z = inf \(byte {at}\), which is not finite"):
            read_points(tmp_path / "a.npy")


def test_files_that_are_no_frames(tmp_path):
    cases = {
        "missing.bin": (None, r"there is no frame .*missing.bin"),
        "empty.bin": (b"", r"empty.bin is empty \(0 bytes\)"),
        "notes.txt": (b"hello", r"notes.txt is no frame: known endings are .bin, .pcd, .npy"),
        "odd.bin": (bytes(1001), r"1001 bytes, no whole number of points of 16 or 20 bytes: .* at byte 1000"),
        "odd.f16x5.bin": (bytes(1001), r"points of 10 bytes: .* at byte 1000"),
        "text.bin": (b"Where points should be, there is a text." * 4, "is beyond 10000 m: these are no points"),
        "zero.bin": (bytes(16 * 7), r"all 7 points lie within 0.01 m of the origin, first value at byte 0"),
        "far.bin": (np.full((9, 4), 400, np.float32).tobytes(), "9 of 9 points lie beyond 300 m"),
        "a.npy": (b"no header at all, none", "a.npy is no .npy file"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(FrameError, match=message):
            read_points(tmp_path / name)
    with pytest.raises(FrameError, match="is a folder, not a frame"):
        read_points(tmp_path)
    with pytest.raises(FrameError, match=r"cannot be read: File name too long"):
        read_points(tmp_path / ("a" * 300 + ".bin"))


def test_a_value_that_is_not_finite_is_named_with_its_row_and_byte(tmp_path):
    points = kitti(21)
    points[13, 1] = np.nan
    with pytest.raises(FrameError, match=r"point 13 of 21 has y = nan \(byte 212\), which is not finite"):
        read_points(written(tmp_path / "a.bin", points))
    with pytest.raises(FrameError, match=r"point 13 of 20 has y = nan"):
        read_points(written(tmp_path / "b.bin", points[:20]))


def test_signalling_nans_are_refused_without_a_warning(tmp_path):
    points = nuscenes(21)
    points.view(np.uint32)[4, 4] = 0x7F800001
    with pytest.raises(FrameError, match="point 4 of 21 has ring = nan"):
        read_points(written(tmp_path / "a.bin", points))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser reads everything")
def test_a_frame_without_permission(tmp_path):
    path = written(tmp_path / "a.bin", kitti())
    path.chmod(0)
    with pytest.raises(FrameError, match="cannot be read: Permission denied"):
        read_points(path)


class Payload:
    def __reduce__(self):
        return (os._exit, (3,))


def test_npy_never_unpickles_and_checks_its_shape(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[Payload(), 1, 2]], dtype=object), allow_pickle=True)
    with pytest.raises(FrameError, match=r"no table of floats: .*'\|O'.* pickle, are never read"):
        read_points(path)
    np.save(path, np.zeros((4, 7), dtype=np.float32))
    with pytest.raises(FrameError, match="has 7 columns and 3 to 6 are read"):
        read_points(path)
    np.save(path, kitti())
    with pytest.raises(FrameError, match="has 4 columns and 3 are named"):
        read_points(path, columns=("x", "y", "z"))
    np.save(path, kitti().astype(np.int32))
    with pytest.raises(FrameError, match="no table of floats"):
        read_points(path)
    np.save(path, kitti())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FrameError, match="states 24 points of 4 columns, 384 bytes, and has 383 from byte 128"):
        read_points(path)
    path.write_bytes(path.read_bytes().replace(b"(24, 4)", b"(999999999, 4)"))
    with pytest.raises(FrameError, match="states 999999999 points"):
        read_points(path)


def test_frames_of_a_folder_are_sorted_and_hidden_files_are_left(tmp_path):
    (tmp_path / "training/velodyne").mkdir(parents=True)
    with pytest.raises(FrameError, match=r"holds no .bin, .pcd, .npy file, nor does velodyne or training/velodyne"):
        list_frames(tmp_path)
    for name in ("000010.bin", "000002.bin", ".hidden.bin", "readme.txt", "b.PCD", "a.npy"):
        written(tmp_path / "training/velodyne" / name, kitti())
    expected = ["000002.bin", "000010.bin", "a.npy", "b.PCD"]
    for folder in (tmp_path, tmp_path / "training", tmp_path / "training/velodyne"):
        assert [path.name for path in list_frames(str(folder))] == expected
    assert list_frames(tmp_path / "training/velodyne/a.npy") == (tmp_path / "training/velodyne/a.npy",)
    with pytest.raises(FrameError, match="there is no file or folder"):
        list_frames(tmp_path / "elsewhere")


def test_describe_says_what_the_columns_were_taken_to_be(tmp_path):
    assert "columns x, y, z, intensity; intensity 0" in describe(read_points(written(tmp_path / "a.bin", kitti())))
    assert "(scale 0..1, as KITTI); no timestamp: one sweep" in describe(read_points(tmp_path / "a.bin"))
    told = describe(read_points(written(tmp_path / "b.bin", nuscenes())))
    assert "24 points" in told
    assert "(scale 0..255, as nuScenes and ONCE); ring 0 to 23 (whole numbers" in told
    assert "timestamp 0 to 0.45 s (time before" in describe(read_points(written(tmp_path / "c.bin", swept())))
    assert "\n" not in told


REAL = {
    "kitti": (11, "intensity", 1.0),
    "nuscenes": (5, "ring", 255.0),
    "once": (2, "intensity", 255.0),
    "semantickitti": (2, "intensity", 1.0),
}


@pytest.mark.data
@pytest.mark.parametrize("folder", REAL)
def test_real_frames_are_read_whole(shared, folder):
    count, last, scale = REAL[folder]
    frames = list_frames(shared / "data" / folder)
    assert len(frames) == count
    for path in frames:
        cloud = read_points(path)
        expected = "timestamp" if path.name.endswith(".f16x5.bin") else last
        point_bytes = 10 if expected == "timestamp" else 4 * len(cloud.columns)
        assert len(cloud.points) * point_bytes == path.stat().st_size
        assert cloud.columns[-1] == expected
        assert float(cloud.column("intensity").max()) <= scale
        assert f"(scale 0..{scale:g}" in describe(cloud)


@pytest.mark.data
def test_counts_of_real_frames(shared):
    counts = {
        "kitti/training/velodyne/000001.bin": 120_268,
        "nuscenes/ff9eff4389a740848f9a56ad749a4ae8.f16x5.bin": 271_156,
        "nuscenes/n015-2018-07-24-11-22-45+0800__LIDAR_TOP__1532402927647951.pcd.bin": 34_688,
        "once/1616535976199.bin": 65_967,
    }
    assert {name: len(read_points(shared / "data" / name).points) for name in counts} == counts
