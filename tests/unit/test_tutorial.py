"""docs/tutorial.md, line by line, on a small PointPillars with seeded weights."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from test_pcdet_live import EasyDict, SECONDNet
from zoo_sample import small_cloud_points, variant, variant_text

from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The folder of a reader: a checkpoint, its YAML with a base file, and four frames as KITTI writes them."""
    detector = build_detector(variant("pointpillars"))
    seed_weights(detector, 1)
    torch.save({"epoch": 80, "model_state": detector.state_dict()}, tmp_path / "mine.pth")
    whole = yaml.safe_load(variant_text("pointpillars"))
    (tmp_path / "cfgs").mkdir()
    (tmp_path / "cfgs" / "base.yaml").write_text(yaml.safe_dump(whole["DATA_CONFIG"]))
    own = {**whole, "DATA_CONFIG": {"_BASE_CONFIG_": "cfgs/base.yaml"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "drives").mkdir()
    for frame in range(4):
        small_cloud_points(4, seed=frame).astype("<f4").tofile(tmp_path / "drives" / f"{frame:06d}.bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path, SECONDNet(EasyDict(whole), detector)


def test_every_line_does_what_the_page_says(desk, cli):
    folder, model = desk
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for language, text in blocks if language == "bash" for line in text.splitlines()]
    assert (len(blocks), len(lines)) == (8, 10)
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {"model": model})  # noqa: S102 - our own page
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dm3d-deploy"
            code, out, err = cli(*arguments)
            assert code == 0, f"{line}\n{out}\n{err}"
    report = json.loads((folder / "runs/mine/report.json").read_text())
    assert report["verdict"]["passed"]
    assert report["model"]["trained"]
    assert report["frames"]["simulated"] is False
    assert (folder / "runs/mine/manifest.json").is_file()
    assert {path.suffix for path in (folder / "detections").iterdir()} == {".json", ".png", ".txt"}
    assert json.loads((folder / "ap" / "evaluation.json").read_text())["frames"] == 2
    assert not (folder / "runs/live").exists()
