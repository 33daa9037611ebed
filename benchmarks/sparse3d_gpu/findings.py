"""What a run on a GPU found, judged: checks, bars, the exit code, and the page for docs/measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Standing = Literal["passed", "failed", "missing", "measured"]
LEAST_RUNS = 1000
TILE_BARS = {0.5: 0.75, 0.3: 0.55}  # kept tiles: at most this share of the own dense time
COLUMNS = {
    "what": "", "kept_tiles": "kept tiles", "start": "from", "mode": "mode", "p50_ms": "p50 (ms)", "p99_ms": "p99 (ms)",
    "runs": "runs", "launches": "launches", "workspace_mib": "workspace (MiB)", "moved_mb": "moved (MB)",
    "gflop": "GFLOP", "bytes_floor_ms": "bytes floor (ms)", "flops_floor_ms": "FLOPs floor (ms)",
    "peaks_of": "peaks of",
}  # fmt: skip
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: `missing` says that it could not be, and why."""

    part: str
    name: str
    standing: Standing
    words: str
    rows: tuple[Row, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "rows": [dict(row) for row in self.rows]}


def missing(part: str, name: str, words: str) -> Finding:
    """What could not be looked at."""
    return Finding(part=part, name=name, standing="missing", words=words)


def judged(part: str, name: str, right: bool, words: str) -> Finding:
    """A check that passed or failed."""
    return Finding(part=part, name=name, standing="passed" if right else "failed", words=words)


def bars_of(rows: Sequence[Row]) -> list[Finding]:
    """The three bars, by medians of graphs; against spconv like for like, in every mode that both ran in."""
    found = [_tile_bar(rows, kept, most) for kept, most in TILE_BARS.items()]
    pairs = [(mode, _row(rows, "ours", mode), _row(rows, "spconv", mode)) for mode in ("graph", "eager")]
    compared = [_against_spconv(mode, ours, other) for mode, ours, other in pairs if ours and other]
    return [*(compared or [missing("bars", "dense against spconv", "spconv was not measured")]), *found]


def _row(rows: Sequence[Row], what: str, mode: str, kept: float = 1.0) -> Row | None:
    wanted = {"what": what, "mode": mode, "kept_tiles": kept, "start": "voxels"}
    return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


def _against_spconv(mode: str, ours: Row, other: Row) -> Finding:
    return _bar(f"dense against spconv, both {mode}", ours, other, 1.0)


def _tile_bar(rows: Sequence[Row], kept: float, most: float) -> Finding:
    name = f"tiles {kept:g} against own dense, graph"
    pruned, dense = _row(rows, "ours", "graph", kept), _row(rows, "ours", "graph")
    return _bar(name, pruned, dense, most) if pruned and dense else missing("bars", name, "not measured")


def _bar(name: str, row: Row, reference: Row, most: float) -> Finding:
    fewest = min(row["runs"], reference["runs"])
    if fewest < LEAST_RUNS:
        return missing("bars", name, f"{fewest} runs judge nothing: at least {LEAST_RUNS} are needed")
    share = row["p50_ms"] / reference["p50_ms"]
    words = f"{row['p50_ms']:g} ms of {reference['p50_ms']:g} ms: {share:.3f}, at most {most:g}"
    return judged("bars", name, share <= most, words)


def exit_code(findings: Iterable[Finding], *, allow_missing: bool) -> int:
    """0 where something was found and nothing failed; what is missing fails unless it is allowed."""
    standings = [finding.standing for finding in findings]
    bad = {"failed"} if allow_missing else {"failed", "missing"}
    return int(not standings or bool(bad & set(standings)))


def page(stamp: Mapping[str, Any], findings: Sequence[Finding], code: int) -> str:
    """The page in Markdown: stamp, bars, latencies, checks."""
    verdict = "every check and bar passed" if code == 0 else "**not passed**"
    if code == 0 and any(finding.standing == "missing" for finding in findings):
        verdict = "nothing failed, and what is missing was allowed to be"
    lines = [f"# The sparse 3D engine on {stamp['gpu']}", "", f"`{stamp['command']}`, {stamp['date']}: {verdict}.", ""]
    lines += [f"* {name}: {value}" for name, value in stamp.items() if name not in ("gpu", "command", "date")]
    own = {part: [finding for finding in findings if finding.part == part] for part in ("bars", "latency")}
    others = [finding for finding in findings if finding.part not in own]
    rows = [row for finding in own["latency"] for row in finding.rows]
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines += ["", "## Bars", "", *_table(("", "", ""), [_cells(finding) for finding in own["bars"]])]
    lines += ["", "## Latency", "", *[f"* {finding.name}: {finding.words}" for finding in own["latency"]], ""]
    lines += _table([COLUMNS[name] for name in names], [[_word(row.get(name)) for name in names] for row in rows])
    return "\n".join([*lines, "", "## Checks", "", *_table(("", "", ""), _checks(others))]) + "\n"


def _checks(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """A line for what passed of each part, and one for everything that did not."""
    lines = []
    for part in dict.fromkeys(finding.part for finding in findings):
        own = [finding for finding in findings if finding.part == part]
        passed = sum(finding.standing == "passed" for finding in own)
        lines.append((part, f"{passed} of {len(own)}", "passed"))
        lines += [_cells(finding) for finding in own if finding.standing != "passed"]
    return lines


def _cells(finding: Finding) -> tuple[str, str, str]:
    loud = finding.standing in ("failed", "missing")
    return finding.name, f"**{finding.standing}**" if loud else finding.standing, finding.words.replace("|", "/")


def _word(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
