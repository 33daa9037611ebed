"""A live OpenPCDet model, by a stand-in with the attributes that its Detector3DTemplate has."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from zoo_sample import VARIANTS, variant, variant_text

from dm3d_deploy.api import detector_from_pcdet
from dm3d_deploy.errors import CheckpointError, UsageError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights


class EasyDict(dict):
    """Keys are attributes, too, and nested mappings are of the same class, as in OpenPCDet's configuration."""

    def __init__(self, entries):
        super().__init__({key: eased(value) for key, value in entries.items()})
        self.__dict__ = self


def eased(value):
    if isinstance(value, dict):
        return EasyDict(value)
    return [eased(item) for item in value] if isinstance(value, list) else value


class Dataset:
    def __init__(self, cfg):
        self.dataset_cfg = EasyDict({"_BASE_CONFIG_": "cfgs/dataset_configs/any.yaml", **cfg.DATA_CONFIG})
        self.dataset_cfg["POINT_CLOUD_RANGE"] = np.array(cfg.DATA_CONFIG.POINT_CLOUD_RANGE, np.float32)
        self.class_names = cfg.CLASS_NAMES


class SECONDNet(nn.Module):
    """What pcdet.models.detectors.Detector3DTemplate.__init__ keeps; the modules below are a detector's of ours."""

    def __init__(self, cfg, inner):
        super().__init__()
        self.model_cfg, self.num_class, self.dataset = cfg.MODEL, len(cfg.CLASS_NAMES), Dataset(cfg)
        self.class_names = self.dataset.class_names
        self.register_buffer("global_step", inner.global_step.clone())
        for name, child in inner.named_children():
            self.add_module(name, child)


def live(name):
    inner = build_detector(variant(name))
    seed_weights(inner, 5)
    return SECONDNet(EasyDict(yaml.safe_load(variant_text(name))), inner)


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_and_weights_come_from_the_live_model(name):
    model = live(name)
    found = detector_from_pcdet(model)
    wanted = variant(name)
    assert (found.config.head, found.config.post, found.config.backbone_3d) == (
        wanted.head, wanted.post, wanted.backbone_3d,
    )  # fmt: skip
    assert found.config.voxels.grid_zyx == wanted.voxels.grid_zyx
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    weight = next(found.parameters())
    weight.data += 1
    assert not torch.equal(weight, next(model.parameters()))


def test_what_is_no_live_model_is_refused():
    with pytest.raises(UsageError, match=r"the Linear has no model_cfg and no dataset\.dataset_cfg and no class_names"):
        detector_from_pcdet(nn.Linear(2, 2))
    model = live("second")
    model.model_cfg.BACKBONE_3D["NAME"] = "VoxelWideBackBone8x"
    with pytest.raises(UsageError, match="'VoxelWideBackBone8x', which is no supported BACKBONE_3D module"):
        detector_from_pcdet(model)
    model.model_cfg.BACKBONE_3D["NAME"] = print
    with pytest.raises(UsageError, match=r"model_cfg\.BACKBONE_3D\.NAME is a builtin_function_or_method, which no"):
        detector_from_pcdet(model)


def test_weights_that_disagree_with_the_live_configuration_are_refused():
    model = live("second")
    model.model_cfg.BACKBONE_2D["NUM_FILTERS"] = [10, 12]
    with pytest.raises(CheckpointError, match=r"the SECONDNet does not fit live-SECONDNet: .* misshapen: backbone_2d"):
        detector_from_pcdet(model)
