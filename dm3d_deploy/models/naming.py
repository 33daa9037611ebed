"""What a checkpoint is made of, by the names and shapes of its tensors alone; nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

HEAT_MAP = re.compile(r"dense_head\.heads_list\.(\d{1,4})\.hm\.(\d{1,4})(?:\.\d+)*\.weight")
# The first whose tensor is there says what lies before the bird's-eye view.
BEFORE_BEV = (
    ("backbone_3d.conv6.", "a VoxelNeXt backbone"),
    ("backbone_3d.conv1.0.conv1.", "a residual 3D backbone"),
    ("backbone_3d.", "a plain 3D backbone"),
    ("vfe.pfn_layers.1.", "pillars of several layers"),
    ("vfe.", "pillars"),
)
COMMON = ("global_step", "vfe", "backbone_3d", "backbone_2d", "dense_head")


def classes_per_task(shapes: Mapping[str, Sequence[int]]) -> list[int]:
    """Channels of the last heat-map convolution of every task; empty where there is no CenterHead."""
    last: dict[int, tuple[int, int]] = {}
    for name, shape in shapes.items():
        found = HEAT_MAP.fullmatch(name)
        if found and shape:
            last[int(found[1])] = max(last.get(int(found[1]), (-1, 0)), (int(found[2]), shape[0]))
    return [channels for _, (_, channels) in sorted(last.items())]


def made_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """The parts in words, like "pillars, an anchor head of 18 scores a cell"."""
    parts = [words for start, words in BEFORE_BEV if _any_starts(shapes, start)][:1]
    tasks, scores = classes_per_task(shapes), shapes.get("dense_head.conv_cls.weight", ())
    if tasks:
        parts.append(f"a centre head with {', '.join(map(str, tasks))} classes per task")
    if scores:
        parts.append(f"an anchor head of {scores[0]} scores a cell")
    parts += sorted({name.split(".")[0] for name in shapes} - set(COMMON))[:5]
    return ", ".join(parts) if parts else "nothing known here"


def _any_starts(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)
