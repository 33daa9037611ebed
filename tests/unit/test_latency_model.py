"""Estimates refuse what no published time speaks for, and never promise what was not seen."""

import dataclasses

import numpy as np
import pytest

from dm3d_deploy.device import device_named
from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.latency_model import (
    SPARSE_FIXED_MS,
    SPARSE_FIXED_RANGE_MS,
    bands_of,
    check_layers,
    check_voxels,
    convolution,
    dense_ms,
    figures_of,
    sparse_stage_ms,
    two_four_ms,
)

ORIN = figures_of(device_named("orin"))


def sparse(name: str, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> Layer:
    shape = (outputs, *kernel, 4)
    return Layer(name=name, part="3d", kind="sparse", shape=shape, positions=np.ones(int(np.prod(kernel))))


def conv(name: str, inputs: int) -> Layer:
    return Layer(name=name, part="2d", kind="conv2d", shape=(8, inputs, 1, 1), positions=np.ones(1))


@pytest.mark.parametrize("name", ["thor", "rtx3090", "h100"])
def test_devices_without_figures_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"no figures to estimate times on '{name}' from.*--device here") as caught:
        figures_of(device_named(name))
    named = caught.value.fix.partition("or name one of ")[2].split(", ")
    assert {figures_of(device_named(one)).name for one in named} == {*named} >= {"orin", "thor-jp7", "a30", "h200"}


@pytest.mark.parametrize("name", ["orin", "thor-jp7", "a30", "a100", "rtx4090", "h200"])
def test_devices_with_figures_have_them(name: str) -> None:
    found = figures_of(device_named(name))
    assert found.name == name
    assert found.tflops["int8"] > found.tflops["fp16"]


@pytest.mark.parametrize("kilovoxels", [14.999, 135.001, 0.0, float("nan")])
def test_voxels_outside_the_published_frames_are_refused(kilovoxels: float) -> None:
    with pytest.raises(UsageError, match="outside the 15,000 to 135,000 that the published times"):
        check_voxels(kilovoxels)
    with pytest.raises(UsageError, match="outside"):
        sparse_stage_ms(kilovoxels, ORIN)


def test_another_backbone_is_refused_with_both_named() -> None:
    published = [sparse(f"{width}.{n}", width) for width in (16, 32, 64, 128) for n in range(5)]
    published.append(sparse("out", 128, (3, 1, 1)))
    check_layers([*published, conv("a", 64), conv("b", 512)])
    words = r"residual backbone, 21 layers \(5 of 16, 5 of 32, 5 of 64, 6 of 128 channels\); this one has "
    with pytest.raises(UsageError, match=words + r"15 layers \(5 of 16, 5 of 32, 5 of 64 channels\)\..*--device here"):
        check_layers(published[:15])
    plain = [sparse(str(n), width) for n, width in enumerate((16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64, 128))]
    with pytest.raises(UsageError, match=words + r"12 layers \(2 of 16, 3 of 32, 6 of 64, 1 of 128 channels\)"):
        check_layers(plain)
    with pytest.raises(UsageError, match=words):
        check_layers([*published[:-1], sparse("out", 128, (3, 3, 3))])
    for inputs in (63, 513):
        with pytest.raises(UsageError, match=f"b has {inputs} input channels; the estimate was checked for 64 to 512"):
            check_layers([*published, conv("b", inputs)])


def test_bands_stand_where_something_was_compared_and_nowhere_else() -> None:
    assert bands_of(ORIN) == (0.2, 0.34)
    assert bands_of(figures_of(device_named("a30"))) == (0.14, None)
    assert bands_of(figures_of(device_named("thor-jp7"))) == (None, None)


def test_narrow_layers_gain_nothing_from_two_of_four() -> None:
    assert two_four_ms(2.0, inputs=255, outputs=512) == two_four_ms(2.0, inputs=512, outputs=255) == 2.0
    assert two_four_ms(1.17, inputs=256, outputs=256) == pytest.approx(1.0)
    assert two_four_ms(1.24, inputs=256, outputs=256, precision="int8") == pytest.approx(1.0)


def test_the_fixed_part_of_the_3d_stage_does_not_shrink_with_the_device() -> None:
    assert SPARSE_FIXED_RANGE_MS[0] < SPARSE_FIXED_MS < SPARSE_FIXED_RANGE_MS[1]
    slow, fast = sparse_stage_ms(60, ORIN), sparse_stage_ms(60, figures_of(device_named("a100")))
    assert slow[1] == fast[1] == SPARSE_FIXED_MS
    assert slow[0] / fast[0] == pytest.approx(1555 / 204.8)


def test_memory_bounds_a_thin_layer() -> None:
    thin = convolution(inputs=64, outputs=2, taps=1, cells_in=10**6, cells_out=10**6)
    starved = dataclasses.replace(ORIN, gb_per_s=ORIN.gb_per_s / 2)
    assert dense_ms(thin, starved) == pytest.approx(2 * dense_ms(thin, ORIN), rel=1e-2)


def test_a_product_of_nothing_is_a_bug() -> None:
    with pytest.raises(InternalError, match="no matrix product: 0 x 8 x 8"):
        convolution(inputs=8, outputs=8, taps=1, cells_in=4, cells_out=0)
