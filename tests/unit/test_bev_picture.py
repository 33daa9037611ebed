"""The picture from above: where things are drawn, which colours, and that equal data gives equal bytes."""

import io
import math
from pathlib import Path

import numpy as np
import pytest

from dm3d_deploy.errors import UsageError
from dm3d_deploy.pointcloud import Boxes3D, Detections, PointCloud
from dm3d_deploy.reporting.bev_picture import HALO, PALETTE, bev_png, draw_bev

NAMES = ("car", "bus")


def cloud_of(count: int = 300) -> PointCloud:
    points = np.random.default_rng(0).uniform(-30, 30, (count, 3)).astype(np.float32)
    return PointCloud(points=points, columns=("x", "y", "z"))


def boxes(*rows: tuple[float, float, float, int]) -> Detections:
    """Rows x, y, yaw, label."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 4)
    count = len(values)
    return Detections(
        boxes=Boxes3D(
            centre=np.concatenate([values[:, :2], np.zeros((count, 1), np.float32)], axis=1),
            size=np.tile(np.array([[6, 3, 2]], np.float32), (count, 1)),
            yaw=values[:, 2],
            velocity=np.zeros((count, 2), np.float32),
        ),
        scores=np.full(count, 0.5, np.float32),
        labels=values[:, 3].astype(np.int64),
        class_names=NAMES,
    )


def picture(detections: Detections, compare: Detections | None = None, count: int = 0, title: str = "t") -> np.ndarray:
    from matplotlib.image import imread

    data = bev_png(cloud_of(count), detections, title=title, range_m=40, compare=compare)
    pixels: np.ndarray = imread(io.BytesIO(data))[:, :, :3]
    return pixels


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Row and column of the pixels of a colour, the legend below left out."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    found: np.ndarray = np.argwhere((np.abs(pixels - wanted) < 0.02).all(axis=2))
    return found[found[:, 0] < len(pixels) - 116]


def test_forward_is_up_and_left_is_left() -> None:
    pixels = picture(boxes((20, 10, 0, 0)))
    assert pixels.shape[1] == 1200
    row, column = coloured(pixels, PALETTE[0]).mean(axis=0)
    side = 1200 - 62 - 14
    assert row == pytest.approx(78 + side * (40 - 21) / 80, abs=25)  # the line out of the front pulls it forward
    assert column == pytest.approx(62 + side * (40 - 10) / 80, abs=10)


@pytest.mark.parametrize(
    ("yaw", "axis", "sign"), [(0, 0, -1), (math.pi, 0, 1), (math.pi / 2, 1, -1), (-math.pi / 2, 1, 1)]
)
def test_the_line_leaves_the_front(yaw: float, axis: int, sign: int) -> None:
    found = coloured(picture(boxes((20, 10, yaw, 0))), PALETTE[0])
    middle = (78 + 1124 * 20 / 80, 62 + 1124 * 30 / 80)[axis]
    reach = {-1: middle - found[:, axis].min(), 1: found[:, axis].max() - middle}
    assert reach[sign] > reach[-sign] + 10


def test_each_class_has_its_colour_and_absent_classes_are_not_drawn() -> None:
    pixels = picture(boxes((20, 10, 0, 1)))
    assert len(coloured(pixels, PALETTE[1])) > 50
    assert len(coloured(pixels, PALETTE[0])) == 0


def test_equal_data_gives_equal_bytes_whatever_the_users_settings() -> None:
    import matplotlib

    first = bev_png(cloud_of(), boxes((1, 2, 3, 0)), title="a", range_m=40)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 30}):
        assert bev_png(cloud_of(), boxes((1, 2, 3, 0)), title="a", range_m=40) == first
    assert first.startswith(b"\x89PNG")
    assert b"tEXt" not in first
    assert b"matplotlib" not in first.lower()
    assert bev_png(cloud_of(), boxes((1.5, 2, 3, 0)), title="a", range_m=40) != first


def test_boxes_of_one_side_alone_are_set_off_on_that_side() -> None:
    a, b = boxes((20, 10, 0, 0), (-20, 10, 0, 0)), boxes((20.3, 10, 0, 0))
    halo = coloured(picture(a, b), HALO)
    assert len(halo) > 50
    assert halo[:, 1].max() < 600  # on the left, and only around the box behind
    assert halo[:, 0].min() > 78 + 270
    assert len(coloured(picture(a, a), HALO)) == 0


def test_points_are_grey_and_high_ones_darker() -> None:
    from matplotlib.image import imread

    points = np.array([[25, 0, 0.0], [25, 0, 0.1], [-25, 0, 5.0], [-25, 0, 5.1]], dtype=np.float32)  # between rings
    cloud = PointCloud(points=points, columns=("x", "y", "z"))
    pixels = imread(io.BytesIO(bev_png(cloud, boxes(), title="t", range_m=40)))[:, :, :3]
    column, low_row, high_row = 62 + 1124 // 2, 78 + 1124 * 15 // 80, 78 + 1124 * 65 // 80
    low, high = (pixels[row - 3 : row + 4, column - 3 : column + 4] for row in (low_row, high_row))
    assert np.array_equal(low.max(axis=2), low.min(axis=2))
    assert high.min() < low.min() < 1


def test_a_frame_without_points_boxes_or_formula_is_drawn() -> None:
    assert picture(boxes(), title="costs $5 and $6").shape == (1318, 1200, 3)
    assert picture(boxes(), boxes(), count=50).shape == (734, 1200, 3)


@pytest.mark.parametrize("range_m", [0.0, -5.0, math.nan, math.inf])
def test_a_range_that_is_none_is_refused(range_m: float) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        bev_png(cloud_of(), boxes(), title="t", range_m=range_m)


def test_the_file_holds_the_bytes(tmp_path: Path) -> None:
    draw_bev(tmp_path / "deep/p.png", cloud_of(), boxes((1, 2, 0, 0)), title="t", range_m=40)
    expected = bev_png(cloud_of(), boxes((1, 2, 0, 0)), title="t", range_m=40)
    assert (tmp_path / "deep/p.png").read_bytes() == expected


def test_the_module_is_imported_without_matplotlib() -> None:
    import subprocess
    import sys

    code = "import sys, dm3d_deploy.reporting.bev_picture; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
