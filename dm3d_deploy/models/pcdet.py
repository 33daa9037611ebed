"""A live OpenPCDet model as a detector of ours; OpenPCDet itself is never imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn

from dm3d_deploy.config import config_from_text
from dm3d_deploy.errors import UsageError
from dm3d_deploy.models.checkpoints import load_tensors
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.yaml_reader import BASE_KEY

FIX = "give the model that OpenPCDet's build_network returned, or its YAML and checkpoint"


def detector_from_pcdet(model: nn.Module) -> Detector:
    """A detector with the configuration and the weights of a model that OpenPCDet built; the model stays as it is.

    Reads `model.model_cfg`, `model.dataset.dataset_cfg`, `model.class_names` and the state dict. UsageError for what is
    no such model and for a configuration that is not supported, CheckpointError where weights and configuration
    disagree.
    """
    name = type(model).__name__
    parts = (
        ("MODEL", "model_cfg", getattr(model, "model_cfg", None)),
        ("DATA_CONFIG", "dataset.dataset_cfg", getattr(getattr(model, "dataset", None), "dataset_cfg", None)),
        ("CLASS_NAMES", "class_names", getattr(model, "class_names", None)),
    )
    absent = [attribute for _, attribute, value in parts if not value]
    if absent:
        raise UsageError(f"the {name} has no {' and no '.join(absent)}: it is no live OpenPCDet model.", fix=FIX)
    entries = {key: _plain(value, f"{name}.{attribute}") for key, attribute, value in parts}
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    _take_back_inputs(entries["MODEL"], state)
    config = config_from_text(yaml.safe_dump(entries, sort_keys=False), f"live-{name}.yaml")
    detector = build_detector(config)
    load_tensors(detector, state, f"the {name}")
    return detector


def _take_back_inputs(model: dict[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Remove the input channels that OpenPCDet's second stages write in front of the MLPS of their own configuration.

    The weights tell how many layers there are: a list that is longer by one begins with its inputs.
    """
    found: dict[str, Any] = {}
    if isinstance(keypoints := model.get("PFE"), dict):
        table, named = keypoints.get("SA_LAYER", {}), keypoints.get("FEATURES_SOURCE", [])
        stages = [name for name in named if name.startswith("x_conv")]
        found = {f"pfe.SA_layers.{index}.mlps": table.get(name) for index, name in enumerate(stages)}
        found["pfe.SA_rawpoints.mlps"] = table.get("raw_points")
    if isinstance(head := model.get("ROI_HEAD"), dict):
        pool = head.get("ROI_GRID_POOL", {})
        layers = pool.get("POOL_LAYERS", {})
        found["roi_head.roi_grid_pool_layer.mlps"] = pool
        for index, name in enumerate(pool.get("FEATURES_SOURCE", [])):
            found[f"roi_head.roi_grid_pool_layers.{index}.mlps_(in|out)"] = layers.get(name)
    for scope, section in found.items():
        for index, widths in enumerate(section["MLPS"] if isinstance(section, dict) and "MLPS" in section else []):
            layer = re.compile(rf"{scope}\.{index}\.\d+\.weight")
            count = sum(1 for key, tensor in state.items() if layer.fullmatch(key) and tensor.ndim > 1)
            if len(widths) == count + 1:
                del widths[0]


def _plain(value: Any, path: str) -> Any:
    """Dictionaries, lists and plain values of an EasyDict, which keeps the names of the files it was merged from."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items() if key != BASE_KEY}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        return _plain(value.tolist(), path)  # numpy
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UsageError(f"{path} is a {type(value).__name__}, which no YAML holds.", fix=FIX)
