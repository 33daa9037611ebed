"""Fixtures that every test may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real frames and oracles beside the checkout."""
    if not (SHARED / "oracle").is_dir():
        pytest.skip("needs the real frames and oracles in ../shared")
    return SHARED
