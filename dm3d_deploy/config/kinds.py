"""What kinds of values the YAML holds: the readers that every part of the config shares."""

from __future__ import annotations

from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.schema import Six
from dm3d_deploy.yaml_reader import Section

WORD = yaml_reader.text
WORDS = yaml_reader.sequence(yaml_reader.text)
COUNT = yaml_reader.integer(1, 4096)
COUNTS = yaml_reader.sequence(COUNT)
METRES = yaml_reader.sequence(yaml_reader.number(-10_000, 10_000), 6)
SHARE = yaml_reader.number(0, 1)


def limits_of(section: Section, key: str) -> Six:
    """Read x0, y0, z0, x1, y1, z1 (m), in order along each axis."""
    limits = section.get(key, METRES)
    if any(low >= high for low, high in zip(limits[:3], limits[3:], strict=True)):
        section.fail(key, f"is not ordered: {list(limits)}", fix="write x0, y0, z0, x1, y1, z1 with each 0 below its 1")
    return cast(Six, limits)
