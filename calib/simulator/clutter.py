"""Everything that is not an object: walls, hedges, trees, poles, junk."""

from __future__ import annotations

from calib.simulator.primitives import Material
from calib.simulator.scene import Scene


def furnish(scene: Scene) -> None:
    """Line both sides of the road."""
    for side in (-1, 1):
        v = scene.road.kerb(side) + side * (scene.road.pavement_m + 6.0)
        for place in range(-3, 4):
            scene.primitives.box(scene.foot(20.0 * place, v), scene.road.heading, (17.0, 10.0, 6.0), Material(0.4))
