"""What `--model` knows by name: parts, size, and what was compared with OpenPCDet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dm3d_deploy.config import VOXELNEXT, CenterHeadConfig, DetectorConfig, detector_names, load_config
from dm3d_deploy.models.bundled import TRAINED_ON, bundled_weights

UNTRAINED = "none: UNTRAINED (seeded by parameter name) without --checkpoint"
# No checkpoint of a user's was seen by any of them: parity is that of seeded weights.
SEEDED = "seeded parity: every stored tensor of OpenPCDet's own forward"
COMPARED = {
    "centerpoint": SEEDED,
    "centerpoint-0075": "the modules of centerpoint; this grid was not compared",
    "centerpoint-once": "the modules of centerpoint; this grid was not compared",
    "centerpoint-pillar": SEEDED,
    "pointpillars": SEEDED,
    "pv-rcnn": SEEDED,
    "pv-rcnn-once": "the modules of pv-rcnn; this grid was not compared",
    "second": SEEDED,
    "voxelnext": SEEDED,
    "second-once": "the modules of second; this grid was not compared",
    "voxel-rcnn": SEEDED,
}
PARAMETERS = {
    "centerpoint": 8_941_590,
    "centerpoint-0075": 8_941_590,
    "centerpoint-once": 7_759_533,
    "centerpoint-pillar": 5_989_030,
    "centerpoint-slim": 1_970_646,
    "pointpillars": 4_834_888,
    "pv-rcnn": 13_115_697,
    "pv-rcnn-once": 13_107_925,
    "second": 5_325_576,
    "voxelnext": 7_981_398,
    "second-once": 5_360_460,
    "voxel-rcnn": 7_586_620,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplications:
    """MACs per frame: `fixed` in the 2D backbone and the head, `of_frame` before them, which depends on the frame.

    A sparse head depends on the frame, too.

    `second` are those of a second stage, with all RoIs that it takes.

    The frame is the first that `--frames simulated` calibrates with at seed 0, with so many `voxels` or pillars.
    """

    fixed: int
    of_frame: int
    voxels: int
    second: int | None = None


MULTIPLICATIONS = {
    "centerpoint": Multiplications(fixed=59_045_314_560, of_frame=20_540_271_152, voxels=66_301),
    "centerpoint-0075": Multiplications(fixed=116_764_416_000, of_frame=29_202_561_936, voxels=91_255),
    "centerpoint-once": Multiplications(fixed=85_823_149_056, of_frame=22_446_028_480, voxels=36_389),
    "centerpoint-pillar": Multiplications(fixed=63_608_717_312, of_frame=1_116_705_984, voxels=18_303),
    "centerpoint-slim": Multiplications(fixed=14_926_479_360, of_frame=3_006_209_072, voxels=66_301),
    "pointpillars": Multiplications(fixed=34_173_812_736, of_frame=188_538_880, voxels=9_206),
    "pv-rcnn": Multiplications(fixed=69_638_553_600, of_frame=5_959_597_440, voxels=39_004, second=11_921_793_024),
    "pv-rcnn-once": Multiplications(fixed=71_153_975_296, of_frame=6_341_612_992, voxels=36_389, second=13_830_725_632),
    "second": Multiplications(fixed=69_638_553_600, of_frame=5_959_597_440, voxels=39_004),
    "voxelnext": Multiplications(fixed=0, of_frame=46_146_823_824, voxels=91_255),
    "second-once": Multiplications(fixed=71_153_975_296, of_frame=6_341_612_992, voxels=36_389),
    "voxel-rcnn": Multiplications(fixed=19_860_684_800, of_frame=5_959_597_440, voxels=39_004, second=849_176_576),
}


def model_rows() -> list[dict[str, Any]]:
    """One row for each model that `--model` knows by name."""
    rows = []
    for name in detector_names():
        config = load_config(name)
        voxels, macs = config.voxels, MULTIPLICATIONS.get(name)
        rows.append(
            {
                "model": name,
                "data set": config.dataset.removesuffix("Dataset"),
                "classes": len(config.class_names),
                "inputs": ", ".join(voxels.columns),
                "parts": _parts(config),
                "parameters": PARAMETERS.get(name),
                "MACs of 2D and head": macs and macs.fixed,
                "MACs before them": macs and macs.of_frame,
                "MACs of second stage": macs and macs.second,
                "counted on": macs and f"the simulated frame of seed 0: {macs.voxels:,} voxels",
                "voxel m": " x ".join(f"{size:g}" for size in voxels.voxel_size_m),
                "grid zyx": " x ".join(map(str, voxels.grid_zyx)),
                "voxel cap": None if config.pillars is not None and config.pillars.dynamic else voxels.max_voxels,
                "weights": f"bundled, trained on {TRAINED_ON}" if bundled_weights(name) else UNTRAINED,
                "compared with": COMPARED.get(name),
            }
        )
    return rows


def _parts(config: DetectorConfig) -> str:
    """The modules, as OpenPCDet calls them."""
    if config.backbone_3d is not None and config.backbone_3d.name == VOXELNEXT:
        return f"{VOXELNEXT}, VoxelNeXtHead"
    head = "CenterHead" if isinstance(config.head, CenterHeadConfig) else "AnchorHeadSingle"
    if config.second_stage is not None:
        keypoints = "VoxelSetAbstraction, PointHeadSimple, PVRCNNHead"
        head = f"{head}, {keypoints if config.second_stage.keypoints is not None else 'VoxelRCNNHead'}"
    if config.backbone_3d is not None:
        return f"{config.backbone_3d.name}, BaseBEVBackbone, {head}"
    points = "DynPillarVFE" if config.pillars is not None and config.pillars.dynamic else "PillarVFE"
    return f"{points}, BaseBEVBackbone, {head}"
