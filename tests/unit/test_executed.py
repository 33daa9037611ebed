"""Executed multiplications counted from a run's files."""

from __future__ import annotations

import json
import sys

import pytest

from dm3d_deploy.errors import VerificationFailed
from dm3d_deploy.executed import executed_in, main


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
