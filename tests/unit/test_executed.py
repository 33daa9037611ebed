"""Executed multiplications counted from a run's files."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from run_sample import Noted

from calib.pool import FramePool
from dm3d_deploy.errors import VerificationFailed
from dm3d_deploy.executed import executed_in, main
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import FILES, RunContext
from dm3d_deploy.steps.layers import read_group_curves
from dm3d_deploy.steps.verify import exported_maps


def test_the_files_leave_no_more_than_was_claimed(tiny_run):
    rows = executed_in(tiny_run)
    assert len(rows) == 19
    assert all(row.found_macs <= row.claimed_macs * (1 + 1e-9) for row in rows)
    assert any(row.found_macs < row.dense_macs for row in rows)


def test_the_printed_table_ends_with_what_the_plan_multiplies(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["executed", str(tiny_run)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 19 + 2
    told = json.loads((tiny_run / "report.json").read_text())["plan"]
    share = told["multiplications"] / told["dense_multiplications"]
    assert lines[-1].startswith("3D plan, padding in both ")
    assert lines[-1].endswith(f"{share:.4f} of its multiplications with nothing pruned")


def test_a_claim_that_the_files_do_not_hold_is_refused(run_copy):
    path = run_copy / "work" / "masks.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    named = next(row for row in rows if row["layer"] == "backbone_2d.blocks.0.1")
    named["executed_macs"] /= 4
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(VerificationFailed, match=r"in 1 of 19 layers, first backbone_2d\.blocks\.0\.1") as caught:
        executed_in(run_copy)
    assert caught.value.fix.startswith("build the run again")


def test_a_narrower_map_is_compared_at_the_channels_that_are_left(run_copy):
    file = run_copy / "work" / "allocation.json"
    maps = {"bev": np.arange(32.0).reshape(1, 32, 1, 1), "0.hm": np.zeros((1, 1, 1, 1))}
    with FramePool() as pool:
        run = RunContext(root=run_copy, recipe=Recipe(model="centerpoint", target=0.5), watch=Noted(), pool=pool)
        assert exported_maps(run, maps) is maps
        allocation = json.loads(file.read_text(encoding="utf-8"))
        allocation["widths"] = {"backbone_3d.conv_out.0": 8}
        file.write_text(json.dumps(allocation), encoding="utf-8")
        found = exported_maps(run, maps)
    kept = np.sort(read_group_curves(run_copy / FILES["channels"])["backbone_3d.conv_out.0"].keep(8).nonzero()[0])
    assert found["bev"].ravel().tolist() == [2 * channel + height for channel in kept for height in (0, 1)]
    assert found["0.hm"] is maps["0.hm"]
