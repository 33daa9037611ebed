"""What a value of report.json may be: plain values with the question they must answer, lists, mappings, null."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PARTS = ("3d", "2d", "head")
PNG_IN_BASE64 = "iVBORw0KGgo"
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Scalar:
    """One plain value: what to call it, and the question it must answer with yes."""

    name: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class ListOf:
    """Any number of values of one shape."""

    item: Any


@dataclass(frozen=True, slots=True)
class MapOf:
    """A mapping whose keys are free text, or one of `keys`."""

    item: Any
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Nullable:
    """A value, or null where it was not looked for or is not known."""

    item: Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


TEXT = Scalar("text", lambda value: isinstance(value, str))
WORDS = Scalar("text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
FLAG = Scalar("true or false", lambda value: isinstance(value, bool))
COUNT = Scalar("a whole number >= 0", _is_count)
NUMBER = Scalar("a finite number", _is_number)
AMOUNT = Scalar("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
SHARE = Scalar("a share between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1 + ROUNDING)
PART = Scalar("one of " + ", ".join(PARTS), lambda value: isinstance(value, str) and value in PARTS)
SHA256 = Scalar(
    "64 lower-case hexadecimal digits",
    lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"),
)
PNG = Scalar("a PNG in base64", lambda value: isinstance(value, str) and value.startswith(PNG_IN_BASE64))
PERCENT = Scalar("a number from 0 to 100", lambda value: _is_number(value) and 0 <= value <= 100 + ROUNDING)
