"""Labels that pass between processes: what comes out of the arrays is what went into them."""

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from calib.held_out import FIRST_SEED
from calib.labelled_frames import arrays_from_labels, labels_from_arrays, read_labelled
from dm3d_deploy.geometry.boxes import select_boxes


def same(a, b) -> bool:
    """Whether two contracts hold the same values of the same types."""
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def labels():
    return read_labelled({"sensor": "hdl64", "seed": FIRST_SEED}, 1).labels


def empty(labels):
    truth, none = labels.truth, np.zeros(0, np.int64)
    arrays = {name: getattr(truth, name)[:0] for name in ("image_px", "truncation", "occlusion", "types")}
    return replace(labels, truth=replace(truth, boxes=select_boxes(truth.boxes, none), **arrays), num_points=none)


def test_labels_pass_through_a_file(labels) -> None:
    assert len(labels.truth.boxes) > 5
    by_people = replace(
        labels, all_around=False, truth=replace(labels.truth, dont_care_px=np.array([[1.0, 2.0, 3.0, 4.0]]))
    )
    for given in (labels, by_people, empty(labels)):
        assert same(labels_from_arrays(load(save(arrays_from_labels(given)))), given)
    assert not same(by_people, labels)
    assert not same(empty(labels), labels)


def test_a_detector_may_leave_arrays_beside_them(labels) -> None:
    beside = {"labels": np.zeros(3), "boxes": np.zeros((3, 9)), "scores": np.zeros(3)}
    assert same(labels_from_arrays(beside | arrays_from_labels(labels)), labels)
    assert not beside.keys() & arrays_from_labels(labels).keys()


def test_the_index_counts_seeds_up(labels) -> None:
    assert same(read_labelled({"sensor": "hdl64", "seed": FIRST_SEED + 1}, 0).labels, labels)
