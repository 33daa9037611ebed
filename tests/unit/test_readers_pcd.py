"""PCD files in every encoding, and every way in which header and data may disagree."""

import numpy as np
import pytest
from frame_samples import FIVE, nuscenes, pcd_bytes, swept

from calib.pcd_reader import _lzf
from calib.readers import read_points
from dm3d_deploy.errors import FrameError


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd_in_every_encoding(tmp_path, encoding):
    points = nuscenes()
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd_bytes(points, FIVE, encoding))
    cloud = read_points(path)
    assert cloud.columns == FIVE
    np.testing.assert_array_equal(cloud.points, points)
    assert read_points(path, columns=FIVE[:3]).points.shape == (24, 3)


def test_pcd_fields_are_found_by_name_between_others_and_other_types(tmp_path):
    dtype = np.dtype(
        [("_", "u1", 3), ("z", "<f8"), ("x", "<f4"), ("intensity", "u1"), ("y", "<i2"), ("ring", "<u2"), ("_2", "f4")]
    )
    table = np.zeros(4, dtype=dtype)
    table["x"], table["y"], table["z"] = [1, 2, 3, 4], [-5, 6, 7, 8], [0.5, 0.25, 0, 1]
    table["intensity"], table["ring"] = [255, 0, 1, 2], [3, 2, 1, 0]
    data = pcd_bytes(
        table,
        dtype.names,
        SIZE="1 8 4 1 2 2 4",
        TYPE="U F F U I U F",
        COUNT="3 1 1 1 1 1 1",
    )
    (tmp_path / "a.pcd").write_bytes(data.replace(b"_2", b"_"))
    cloud = read_points(tmp_path / "a.pcd")
    assert cloud.columns == FIVE
    assert cloud.points.tolist() == [[1, -5, 0.5, 255, 3], [2, 6, 0.25, 0, 2], [3, 7, 0, 1, 1], [4, 8, 1, 2, 0]]


def test_lzf_copies_overlap_and_are_long():
    assert _lzf(b"\x00a" + bytes([7 << 5, 20, 0]), 30) == b"a" * 30
    assert _lzf(b"\x02abc" + bytes([2 << 5, 2]), 7) == b"abcabca"
    assert _lzf(b"\x02abc" + bytes([1 << 5, 0]), 6) == b"abcccc"
    for damaged, size in ((b"\x00a" + bytes([1 << 5, 1]), 4), (b"\x05a", 6), (b"\x00a\xe0", 4), (b"\x00a", 4)):
        with pytest.raises(IndexError):
            _lzf(damaged, size)


PCD_REFUSALS = {
    "no DATA line": (dict(DATA=None), "no PCD header ends within"),
    "POINTS against WIDTH": (dict(POINTS=25), "POINTS 25 is not WIDTH 24 x HEIGHT 1"),
    "fewer bytes than stated": (dict(POINTS=30, WIDTH=30), r"30 points of 20 bytes, 600 bytes, but 480 follow"),
    "more bytes than stated": (dict(POINTS=3, WIDTH=3), r"3 points of 20 bytes, 60 bytes, but 480 follow"),
    "absurd WIDTH": (dict(POINTS=10**11, WIDTH=10**11), "or is above 50000000"),
    "negative WIDTH": (dict(WIDTH=-24), "WIDTH of the PCD header is '-24', no whole number"),
    "long COUNT": (dict(COUNT="1 1 1 1 99999"), "5 fields, or an impossible COUNT"),
    "short SIZE": (dict(SIZE="4 4"), "FIELDS, SIZE, TYPE and COUNT of the PCD header do not fit"),
    "strange TYPE": (dict(TYPE="F F F F Q"), "FIELDS, SIZE, TYPE and COUNT of the PCD header do not fit"),
    "unknown encoding": (dict(DATA="zip"), "unknown PCD data 'zip'. Fix: write it as ascii, binary"),
    "no z": (
        dict(FIELDS="x y h intensity ring"),
        "fields x, y, h, intensity, ring; x, y, z, intensity, ring are needed",
    ),
    "x twice": (dict(FIELDS="x y z x ring"), "fields x, y, z, x, ring; x, y, z, ring are needed, once each"),
}


@pytest.mark.parametrize("case", PCD_REFUSALS)
def test_pcd_headers_that_lie(tmp_path, case):
    changes, message = PCD_REFUSALS[case]
    (tmp_path / "a.pcd").write_bytes(pcd_bytes(nuscenes(), FIVE, **changes))
    with pytest.raises(FrameError, match=message) as refusal:
        read_points(tmp_path / "a.pcd")
    assert str(tmp_path / "a.pcd") in str(refusal.value)


def test_pcd_bodies_that_lie(tmp_path):
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd_bytes(nuscenes(), FIVE, "ascii") + b" 1.0")
    with pytest.raises(FrameError, match="120 numbers, but 121 follow"):
        read_points(path)
    path.write_bytes(pcd_bytes(nuscenes(), FIVE, "ascii")[:-4] + b"lamp")
    with pytest.raises(FrameError, match="the ascii data hold no numbers"):
        read_points(path)
    path.write_bytes(pcd_bytes(nuscenes(), FIVE, "binary_compressed")[:-1])
    with pytest.raises(FrameError, match=r"the compressed data state sizes \[495, 480\], but 494 bytes follow"):
        read_points(path)
    data = bytearray(pcd_bytes(nuscenes(), FIVE, "binary_compressed"))
    data[data.index(b"compressed\n") + 19] = 255
    path.write_bytes(data)
    with pytest.raises(FrameError, match="the compressed data are damaged"):
        read_points(path)


def test_pcd_places(tmp_path):
    points = nuscenes()
    points[7, 1] = np.nan
    path = tmp_path / "a.pcd"
    data = pcd_bytes(points, FIVE)
    path.write_bytes(data)
    start = len(data) - points.nbytes
    with pytest.raises(FrameError, match=rf"point 7 of 24 has y = nan \(byte {start + 7 * 20 + 4}\)"):
        read_points(path)
    path.write_bytes(pcd_bytes(points, FIVE, "ascii"))
    with pytest.raises(FrameError, match=r"y = nan \(number 37 of the ascii data\)"):
        read_points(path)
    path.write_bytes(pcd_bytes(points, FIVE, "binary_compressed"))
    with pytest.raises(FrameError, match=r"y = nan \(in the compressed data\)"):
        read_points(path)


def test_a_clock_time_is_no_time_lag(tmp_path):
    points = swept()
    points[:, 4] += 1.5e9
    (tmp_path / "a.pcd").write_bytes(pcd_bytes(points, (*FIVE[:4], "timestamp")))
    with pytest.raises(FrameError, match=r"timestamp = 1.5e\+09 .* does not fit"):
        read_points(tmp_path / "a.pcd")
    assert read_points(tmp_path / "a.pcd", columns=FIVE[:4]).columns == FIVE[:4]
