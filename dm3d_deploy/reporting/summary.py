"""The report in a terminal: the same facts as the page, in one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dm3d_deploy.reporting import facts
from dm3d_deploy.reporting.ap_section import ap_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

SHOWN_FAILURES = 5


def summary_lines(report: Mapping[str, Any]) -> RenderableType:
    """A rich renderable of a valid report: verdict, warnings, MACs, distortion, comparisons, latency, engines."""
    from rich.console import Group
    from rich.text import Text

    blocks: list[RenderableType] = [_verdict(report), *_warnings(report), _macs(report), _findings(report)]
    blocks += [_latency(report, entries) for entries in facts.latency_groups(report).values()]
    if report["latency_note"]:
        blocks.append(Text(report["latency_note"], style="dim"))
    return Group(*blocks)


def _verdict(report: Mapping[str, Any]) -> Text:
    from rich.text import Text

    passed = report["verdict"]["passed"]
    mark = ("PASSED ", "bold green") if passed else ("NOT PASSED ", "bold red")
    return Text.assemble(mark, (report["verdict"]["sentence"], "bold"))


def _warnings(report: Mapping[str, Any]) -> list[Text]:
    from rich.text import Text

    lines = list(report["warnings"])
    if not report["model"]["trained"]:
        lines.insert(0, f"UNTRAINED: {report['model']['weights_source']}")
    return [Text(f"! {line}", style="yellow") for line in lines]


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _macs(report: Mapping[str, Any]) -> Table:
    table = _table("MACs per frame", "dense", "kept", "share", "executed", "share")
    by_part = report["macs"]["by_part"]
    rows = [(title, by_part[part]) for part, title in facts.part_titles(report["layers"]).items() if part in by_part]
    rows += [("backbones", facts.backbone_macs(report)), ("whole model", report["macs"])]
    for title, macs in rows:
        table.add_row(
            title,
            facts.scaled(macs["dense"]),
            facts.scaled(macs["kept"]),
            facts.percent(facts.share_of(macs, "kept")),
            facts.scaled(macs["executed"]),
            facts.percent(facts.share_of(macs, "executed")),
        )
    return table


def _findings(report: Mapping[str, Any]) -> Table:
    """One line for each of: budget, distortion, AP, comparisons, detections, engines."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    budget, distortion = report["budget"], report["distortion"]
    simulated = ", simulated frames" if report["frames"]["held_out_simulated"] else ""
    foreseen = "predicted behind the refit" if distortion["foresees_refit"] else "predicted"
    known = [(foreseen, distortion["predicted"]), ("held-out", distortion["heldout"])]
    known.append(("recovered", distortion["heldout_after_recovery"]))
    parts = [f"{word} {facts.significant(value)}" for word, value in known if value is not None]
    parts += [f"{baseline['method']} {facts.significant(baseline['heldout'])}" for baseline in distortion["baselines"]]
    rows = [
        ("goal", f"{budget['goal']}, cost {budget['cost']}"),
        ("reached", f"{facts.percent(budget['kept'])} kept, {facts.percent(budget['executed'])} executed of the scope"),
        ("distortion", ", ".join(parts) + simulated),
        ("AP", ap_line(report)),
    ]
    if report["planned_time"] is not None:
        rows.insert(2, ("planned time", facts.planned_words(report)))
    failed = [comparison for comparison in report["parity"] if not comparison["passed"]]
    rows.append(("comparisons", f"{len(report['parity']) - len(failed)} of {len(report['parity'])} within tolerance"))
    rows += [("", f"FAIL {_failure(comparison)}") for comparison in failed[:SHOWN_FAILURES]]
    if report["detections"]:
        boxes = report["detections"]
        rows.append(("detections", f"{boxes['dense']} dense, {boxes['pruned']} pruned, {boxes['matched']} matched"))
    if report["plan"]:
        rows.append(("3D plan", facts.plan_words(report["plan"])))
    rows += [
        ("engine" if index == 0 else "", f"{engine['path']} ({facts.size(engine['bytes'])}): {engine['standing']}")
        for index, engine in enumerate(report["engines"])
    ]
    for title, text in rows:
        table.add_row(Text(title, style="dim"), Text(text, style="red" if text.startswith("FAIL ") else ""))
    return table


def _failure(comparison: Mapping[str, Any]) -> str:
    relative = comparison["max_relative"]
    found = comparison["detail"] or "not finite" if relative is None else f"relative {facts.significant(relative)}"
    return f"{comparison['output']}: {found}, wanted {comparison['tolerance']}"


def _latency(report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Table:
    """One backend: dense and pruned of a stage on one line."""
    from rich.text import Text

    pairs = {id(pair.other): pair for pair in facts.latency_pairs(report)}
    paired = {id(pair.dense) for pair in pairs.values()}
    table = _table("dense → pruned", "median ms", "p99 ms", "n", "pruned is")
    for entry in entries:
        if id(entry) in paired:
            continue
        pair = pairs.get(id(entry))
        before = pair.dense if pair else None
        known = before is not None and entry["variant"] == "pruned"
        table.add_row(
            Text(entry["stage"] if known else f"{entry['stage']} ({entry['variant']})"),
            _before_after(before, entry, "p50_ms"),
            _before_after(before, entry, "p99_ms"),
            f"{entry['n']:,}",
            pair.words if pair else "",
        )
    table.caption = Text(_conditions(report, entries), style="dim", justify="left")
    return table


def _conditions(report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    standing = "Measured" if entries[0]["measured"] else "Estimated"
    device = report["provenance"]["machine"].get("device", "an unnamed device")
    indicative = any(entry["p99_indicative"] for entry in entries)
    note = " p99 is indicative: fewer than 1,000 samples." if indicative else ""
    return f"{standing}: {entries[0]['backend']}, {entries[0]['clock']}; {device}.{note}"


def _before_after(before: Mapping[str, Any] | None, entry: Mapping[str, Any], column: str) -> str:
    after = facts.significant(entry[column])
    return f"{facts.significant(before[column])} → {after}" if before else after
