"""Default weights that come with the package: which models have them, and where they lie."""

from __future__ import annotations

from pathlib import Path

WEIGHT_FILES = Path(__file__).parent / "weights"
TRAINED_ON = "simulated scenes only"


def bundled_weights(model: str) -> Path | None:
    """The weights that come with a model known by name; None for a YAML of the user's own, or without any."""
    path = WEIGHT_FILES / f"{model}.safetensors"
    return path if Path(model).name == model and path.is_file() else None
