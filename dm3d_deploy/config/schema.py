"""The frozen values that say what a detector is."""

from __future__ import annotations

from dataclasses import dataclass

from dm3d_deploy.errors import UsageError

Three = tuple[float, float, float]
Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoxelConfig:
    """The grid. Range is x0, y0, z0, x1, y1, z1 in metres; voxel size is x, y, z in metres."""

    point_range_m: tuple[float, float, float, float, float, float]
    voxel_size_m: tuple[float, float, float]
    max_points_per_voxel: int
    max_voxels: int
    columns: tuple[str, ...]

    @property
    def grid_zyx(self) -> tuple[int, int, int]:
        """Cells along z, y, x (OpenPCDet's grid_size, reversed); the sparse tensor has one more along z."""
        low, high = self.point_range_m[:3], self.point_range_m[3:]
        x, y, z = (round((end - start) / step) for start, end, step in zip(low, high, self.voxel_size_m, strict=True))
        return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class PillarConfig:
    """The point network of pillars: DynPillarVFE over all points (`dynamic`), or PillarVFE over the first of each.

    `filters` are the channels behind each layer; a point brings its own columns (x, y, z too with `absolute_xyz`), its
    offsets from the pillar's mean and from the pillar's centre, and with `with_distance` its distance (m).
    """

    dynamic: bool
    filters: tuple[int, ...]
    absolute_xyz: bool
    with_distance: bool

    def features(self, columns: int) -> int:
        """Numbers that a point of `columns` columns brings."""
        return columns + (6 if self.absolute_xyz else 3) + self.with_distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone3dConfig:
    """Sparse backbone. `channels` are those of conv_input, conv1 to conv4 and conv_out.

    `blocks` are the residual blocks of a stage (VoxelResBackBone8x), or the submanifold convolutions behind the strided
    one of conv2 to conv4 (VoxelBackBone8x, whose conv1 has one). OpenPCDet fixes both in code (16, 16, 32, 64, 128 or
    plain 64, 128, and 2); the YAML keys CHANNELS and NUM_BLOCKS are ours. VoxelResBackBone8xVoxelNeXt has conv5 and
    conv6, as wide as conv4, and its `conv_out` is flat.
    """

    name: str
    channels: tuple[int, int, int, int, int, int]
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone2dConfig:
    """BaseBEVBackbone: one entry per block; an upsample stride of 1/n is a convolution of stride n.

    VoxelNeXt has no block at all.
    """

    layer_nums: tuple[int, ...]
    strides: tuple[int, ...]
    filters: tuple[int, ...]
    upsample_strides: tuple[float, ...]
    upsample_filters: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One regression or heat-map branch: its name, output channels and number of convolutions."""

    name: str
    channels: int
    convs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterHeadConfig:
    """CenterHead. `branches[i]` are those of task i in OpenPCDet's order: HEAD_ORDER, then hm.

    With `sparse` it is VoxelNeXtHead: pointwise, at the active cells of a sparse map, without a shared convolution.
    """

    classes_by_task: tuple[tuple[str, ...], ...]
    shared_channels: int
    bias_before_norm: bool
    branches: tuple[tuple[Branch, ...], ...]
    stride: int
    sparse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAnchors:
    """Anchors of one class: `sizes_m` (length, width, height) times `rotations_rad`, standing on `bottom_m`.

    Training gives an anchor to an object at a bird's-eye IoU of `matched`, and to the background below `unmatched`.
    """

    class_name: str
    sizes_m: tuple[Three, ...]
    rotations_rad: tuple[float, ...]
    bottom_m: float
    align_center: bool
    matched: float
    unmatched: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionConfig:
    """The direction classifier: `bins` of 2 pi / `bins`, the first from `offset_rad` on; see OpenPCDet's DIR_OFFSET."""

    bins: int
    offset_rad: float
    limit_offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorHeadConfig:
    """AnchorHeadSingle: at each cell the anchors of all classes, in the file's order: sizes, and rotations within."""

    anchors: tuple[ClassAnchors, ...]
    direction: DirectionConfig | None
    stride: int

    @property
    def per_cell(self) -> int:
        """Anchors at one cell."""
        return sum(len(of_class.sizes_m) * len(of_class.rotations_rad) for of_class in self.anchors)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostConfig:
    """Decoding and NMS of CenterHead; the limit range is in metres."""

    score_threshold: float
    centre_limit_m: tuple[float, float, float, float, float, float]
    max_objects: int
    nms_threshold: float
    nms_pre: int
    nms_post: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorPostConfig:
    """Decoding and NMS of anchor heads: over all classes at once, or class by class (`multi_class`)."""

    score_threshold: float
    multi_class: bool
    nms_threshold: float
    nms_pre: int
    nms_post: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Neighbours of a place and the MLP over them, whose maximum is the place's feature.

    The first `samples` closer than `radius_m`; of cells only those at most `reach_zyx` cells away (Voxel R-CNN).
    """

    radius_m: float
    samples: int
    widths: tuple[int, ...]
    reach_zyx: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSource:
    """What is pooled: "raw_points", "keypoints", or cells of a stage, "x_conv1" to "x_conv4", of `stride` voxels."""

    name: str
    stride: int
    channels: int
    groupings: tuple[Grouping, ...]

    @property
    def out_channels(self) -> int:
        """Channels of a place's feature, all groupings side by side."""
        return sum(grouping.widths[-1] for grouping in self.groupings)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeypointConfig:
    """VoxelSetAbstraction and PointHeadSimple: `count` of the frame's points, farthest first, gather the sources.

    `bev_channels` are those of the bird's-eye view if it is read too, else 0; its cells are `bev_stride` voxels wide.
    The features side by side become `fused` channels, weighted by a score whose layers have `score_widths`.
    """

    count: int
    bev_channels: int
    bev_stride: int
    sources: tuple[PoolSource, ...]
    fused: int
    score_widths: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Channels of a keypoint before they are fused: bird's-eye view, raw points, then the stages."""
        return self.bev_channels + sum(source.out_channels for source in self.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondStageConfig:
    """The RoI head: of each of at most `nms_post` proposals, `grid`^3 places are pooled and a box is said.

    Proposals are the `nms_pre` best anchors after rotated NMS at `nms_threshold`. With `keypoints` (PV-RCNN) the places
    pool those, without (Voxel R-CNN) cells of the sparse backbone.
    """

    keypoints: KeypointConfig | None
    sources: tuple[PoolSource, ...]
    grid: int
    shared: tuple[int, ...]
    cls_widths: tuple[int, ...]
    reg_widths: tuple[int, ...]
    dropout: float
    nms_threshold: float
    nms_pre: int
    nms_post: int

    @property
    def stages_read(self) -> tuple[str, ...]:
        """The stages of the sparse backbone that are pooled, "x_conv1" to "x_conv4"."""
        pooled = (*(self.keypoints.sources if self.keypoints else ()), *self.sources)
        return tuple(sorted({source.name for source in pooled if source.name.startswith("x_conv")}))

    @property
    def reads_points(self) -> bool:
        """Whether the frame's points are needed, not its voxels alone."""
        return self.keypoints is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorConfig:
    """A whole detector. `text` is the flattened YAML (no `_BASE_CONFIG_`), which reads back to an equal config.

    Points reach the bird's-eye view through `backbone_3d` or through `pillars`; the other is None. Behind a sparse head
    the last of `bev_channels` is 1 at the active cells.
    """

    name: str
    dataset: str
    class_names: tuple[str, ...]
    voxels: VoxelConfig
    pillars: PillarConfig | None = None
    backbone_3d: Backbone3dConfig | None
    bev_channels: int
    backbone_2d: Backbone2dConfig
    head: CenterHeadConfig | AnchorHeadConfig
    post: PostConfig | AnchorPostConfig
    second_stage: SecondStageConfig | None = None
    text: str

    @property
    def center_head(self) -> CenterHeadConfig:
        """The CenterHead; UsageError for a detector with another head."""
        if not isinstance(self.head, CenterHeadConfig):
            raise UsageError(f"{self.name} has an anchor head, and this needs a CenterHead.", fix="use a CenterPoint")
        return self.head

    @property
    def estimates_velocity(self) -> bool:
        """Whether the boxes come with velocities."""
        branches = self.head.branches[0] if isinstance(self.head, CenterHeadConfig) else ()
        return any(branch.name == "vel" for branch in branches)

    @property
    def nms_groups(self) -> tuple[tuple[str, ...], ...]:
        """Classes whose boxes suppress each other, group by group in the order of decoding."""
        if isinstance(self.head, CenterHeadConfig):
            return self.head.classes_by_task
        if isinstance(self.post, AnchorPostConfig) and self.post.multi_class:
            return tuple((name,) for name in self.class_names)
        return (self.class_names,)
