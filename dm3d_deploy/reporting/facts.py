"""What a report says in words: numbers with their units, latency pairs and the verdict; shared by page and terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dm3d_deploy.reporting.ap_section import ap_sentence

REFERENCE_VARIANT = "dense"
TOTAL_STAGE = "total"
PART_TITLES = {"3d": "3D backbone", "2d": "2D backbone", "head": "Head"}
BACKBONE_PARTS = ("3d", "2d")
PILLAR_TITLES = {**PART_TITLES, "3d": "Pillar feature net"}
STAGE_PARTS = {"BEV + head": ("2d", "head")}
NORMAL_975 = 1.959964


def percent(share: float) -> str:
    """0.3324 -> `33.2 %`."""
    return f"{100 * share:.1f} %"


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent between 1e-3 and 1e5."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude <= 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def scaled(value: float) -> str:
    """Counts with a decimal prefix: 86201999200 -> `86.2 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}"
    return significant(value)


def size(count_bytes: int) -> str:
    """Bytes with a decimal prefix."""
    return f"{count_bytes} B" if count_bytes < 1000 else f"{scaled(count_bytes)}B"


def milliseconds(value_ms: float) -> str:
    """`31.2 ms`."""
    return f"{significant(value_ms)} ms"


def duration(seconds: float) -> str:
    """`8.20 s`, `3 min 05 s`."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def plural(count: int, noun: str) -> str:
    """`1 frame`, `4 frames`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def plan_words(plan: Mapping[str, Any]) -> str:
    """The 3D plan in one line: what it takes, what it skips, and for which devices it was compiled."""
    tiles = plan["tiles_kept"] + plan["tiles_skipped"]
    names = ", ".join(device["sm"] for device in plan["devices"])
    return (
        f"{size(plan['workspace_bytes'])} of workspace, {plan['launches']} launches, "
        f"{plan['tiles_kept']:,} of {plural(tiles, 'tile')} kept, {scaled(plan['multiplications'])} of the "
        f"{scaled(plan['dense_multiplications'])} multiplications of its layers unpruned, with padding "
        f"({percent(plan_share(plan))}); "
        f"{names + ': ' if names else ''}{plan['standing']}"
    )


def plan_share(plan: Mapping[str, Any]) -> float:
    """Multiplications of the 3D plan over those of its own layers with nothing pruned, padding in both."""
    return float(plan["multiplications"] / plan["dense_multiplications"])


def removed_from(report: Mapping[str, Any], parts: Sequence[str]) -> bool:
    """Whether channels or blocks of these parts are no longer in the files."""
    whole = [layer for layer in report["layers"] if layer["pattern"].split(" + ")[0] in ("channel", "depth")]
    return any(layer["part"] in parts for layer in whole)


def unpruned_words(report: Mapping[str, Any]) -> str:
    """What the 3D plan's unpruned multiplications are those of: the plan's own layers, as wide as they are left."""
    if removed_from(report, ("3d",)):
        return "the same layers with nothing pruned; removed blocks and channels are not among them"
    return "a plan with nothing pruned"


def bound_words(report: Mapping[str, Any]) -> str:
    """How far the allocation is from the optimum at most, of what was minimised; or that nothing bounds it."""
    gap = report["budget"]["lower_bound_gap"]
    if gap is None:
        return "No lower bound was computed."
    within_distortion = report["provenance"]["recipe"].get("max_distortion", "None") != "None"
    what = "cost" if within_distortion else "predicted distortion"
    return f"The allocation's {what} is within {significant(100 * gap)} % of a proven lower bound."


def padding_words(report: Mapping[str, Any]) -> str:
    """Why the 3D plan multiplies more than the executed MACs of its part, with both shares; empty without one."""
    plan, macs = report["plan"], report["macs"]["by_part"].get("3d")
    if plan is None or macs is None:
        return ""
    return (
        f"With padding, the 3D plan multiplies {scaled(plan['multiplications'])} a frame, "
        f"{percent(plan_share(plan))} of the {scaled(plan['dense_multiplications'])} of {unpruned_words(report)}. "
        f"That is {significant(plan['multiplications'] / macs['executed'])} times its executed MACs. "
        f"Those ({scaled(macs['executed'])}, {percent(share_of(macs, 'executed'))}) count the pairs of sites "
        "that meet; the kernels multiply blocks of 64 rows at every tap that one of the rows needs, and fill channels "
        "up to whole tiles of 16 or 32."
    )


def part_titles(layers: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """What the parts of a detector are called, by its layers: pillars have a point network and no 3D backbone."""
    return PILLAR_TITLES if any(layer["name"].startswith("vfe.") for layer in layers) else PART_TITLES


def share_of(macs: Mapping[str, float], column: str) -> float:
    """Kept or executed MACs over dense MACs; an empty part keeps all of its nothing."""
    return macs[column] / macs["dense"] if macs["dense"] > 0 else 1.0


def backbone_macs(report: Mapping[str, Any]) -> dict[str, float]:
    """MACs of the 3D and 2D backbones together: the paper's denominator."""
    parts = [report["macs"]["by_part"][part] for part in BACKBONE_PARTS if part in report["macs"]["by_part"]]
    return {column: sum(part[column] for part in parts) for column in ("dense", "kept", "executed")}


def median_interval_ms(samples_ms: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics, samples taken as independent; few samples give their range."""
    ordered = sorted(samples_ms)
    reach = NORMAL_975 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - reach) - 1)
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return ordered[low], ordered[high]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPair:
    """One stage, one backend: a variant beside the dense detector; `separated`: their median intervals do not touch."""

    dense: Mapping[str, Any]
    other: Mapping[str, Any]
    separated: bool

    @property
    def change(self) -> float:
        """Relative change of the median; negative is faster."""
        return float(self.other["p50_ms"] / self.dense["p50_ms"] - 1) if self.dense["p50_ms"] > 0 else 0.0

    @property
    def measured(self) -> bool:
        """Both sides were timed."""
        return bool(self.dense["measured"] and self.other["measured"])

    @property
    def words(self) -> str:
        """What may be said about the time."""
        if not self.separated:
            return "within noise"
        return f"{percent(abs(self.change))} {'faster' if self.change < 0 else 'slower'}"


def latency_pairs(report: Mapping[str, Any]) -> list[LatencyPair]:
    """Every variant that has a dense counterpart of the same stage, backend and clock, in the report's order."""

    def key(entry: Mapping[str, Any]) -> tuple[str, str, str, bool]:
        return entry["stage"], entry["backend"], entry["clock"], entry["measured"]

    references = {key(entry): entry for entry in report["latency"] if entry["variant"] == REFERENCE_VARIANT}
    pairs = []
    for entry in report["latency"]:
        dense = references.get(key(entry))
        if dense is None or dense is entry:
            continue
        low_a, high_a = median_interval_ms(dense["samples_ms"] or [dense["p50_ms"]])
        low_b, high_b = median_interval_ms(entry["samples_ms"] or [entry["p50_ms"]])
        pairs.append(LatencyPair(dense=dense, other=entry, separated=high_b < low_a or low_b > high_a))
    return pairs


def headline_pair(report: Mapping[str, Any]) -> LatencyPair | None:
    """The pair that the verdict quotes: measured before estimated, the total before its stages, the longest first."""
    pairs = latency_pairs(report)
    if not pairs:
        return None
    return max(pairs, key=lambda pair: (pair.measured, pair.dense["stage"] == TOTAL_STAGE, pair.dense["p50_ms"]))


def latency_groups(report: Mapping[str, Any]) -> dict[tuple[str, str, bool], list[Mapping[str, Any]]]:
    """Entries that may stand on one axis, by backend, clock and whether they were measured."""
    groups: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for entry in report["latency"]:
        groups.setdefault((entry["backend"], entry["clock"], entry["measured"]), []).append(entry)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """One stage's time as the allocation counted it, beside the medians that were measured here (dense, pruned)."""

    stage: str
    dense_ms: float
    planned_ms: float
    fixed_ms: float
    band: float | None
    measured_here_ms: tuple[float, float] | None


def planned_rows(report: Mapping[str, Any]) -> list[PlannedRow]:
    """The planned time by the stages that the bench times; none where the budget counted multiplications.

    A stage that the profile leaves out has no row.
    """
    if report["planned_time"] is None:
        return []
    by_part = report["planned_time"]["by_part"]
    here = {(entry["stage"], entry["variant"]): entry["p50_ms"] for entry in report["latency"] if entry["measured"]}
    rows = []
    first = "pillars" if part_titles(report["layers"]) is PILLAR_TITLES else "3D"
    for stage, names in {first: ("3d",), **STAGE_PARTS}.items():
        parts = [by_part[name] for name in names if name in by_part]
        if not any(part["dense_ms"] for part in parts):
            continue
        bands = [part["band"] for part in parts]
        dense, pruned = here.get((stage, REFERENCE_VARIANT)), here.get((stage, "pruned"))
        rows.append(
            PlannedRow(
                stage=stage,
                dense_ms=sum(part["dense_ms"] for part in parts),
                planned_ms=sum(part["planned_ms"] for part in parts),
                fixed_ms=sum(part["fixed_ms"] for part in parts),
                band=None if not bands or None in bands else max(bands),
                measured_here_ms=None if dense is None or pruned is None else (dense, pruned),
            )
        )
    return rows


def planned_words(report: Mapping[str, Any]) -> str:
    """The planned time in one line, its label first, each stage with its band."""
    time = report["planned_time"]
    parts = ", ".join(
        f"{row.stage} {milliseconds(row.dense_ms)} to {milliseconds(row.planned_ms)}{_band_words(row, time)}"
        for row in planned_rows(report)
    )
    total = f"{milliseconds(time['dense_ms'])} to {milliseconds(time['planned_ms'])}"
    return f"{time['label'].upper()}: {total} at {time['voxels']:,} voxels; {parts}"


def _band_words(row: PlannedRow, time: Mapping[str, Any]) -> str:
    if row.band is not None:
        return f" (+-{percent(row.band)})"
    return " (no band: never compared)" if time["standing"] == "estimated" else ""


def final_distortion(report: Mapping[str, Any]) -> tuple[float, str]:
    """The distortion of the weights that are shipped, and how it is known."""
    distortion, recovery = report["distortion"], report["recovery"]
    if recovery is not None and recovery["accepted"] and distortion["heldout_after_recovery"] is not None:
        return distortion["heldout_after_recovery"], "held-out, after recovery"
    if distortion["heldout"] is not None:
        return distortion["heldout"], "held-out"
    return distortion["predicted"], "predicted, not verified"


def machine_from_stamp(stamp: Mapping[str, Any], *, ran_on: Literal["cpu", "gpu"]) -> dict[str, str]:
    """`provenance.machine` of a device stamp: flat text, the device that the latencies ran on first."""
    gpu = stamp["gpu"] if isinstance(stamp["gpu"], Mapping) else {}
    cpu = f"{stamp['cpu']}, {stamp['cores_usable']} of {stamp['cores']} cores"
    on_gpu = ran_on == "gpu" and bool(gpu)
    power = ", ".join(gpu[key] for key in ("power_mode", "power.limit", "pstate") if gpu.get(key)) if on_gpu else ""
    clocks = f"SM {gpu.get('clocks.sm')} of {gpu.get('clocks.max.sm')}" if on_gpu else ""
    words = {
        "device": gpu["name"] if on_gpu else cpu,
        "power_mode": power or "not reported",
        "clocks": clocks or "not reported",
        "cpu": cpu,
        "gpu": gpu.get("name", "none"),
        "os": stamp["os"],
        "python": stamp["python"],
        "OMP_NUM_THREADS": stamp["omp_num_threads"] or "not set",
    }
    if stamp["load_average"] is not None:
        words["load average"] = ", ".join(f"{load:.2f}" for load in stamp["load_average"])
    extra = {key: value for key, value in gpu.items() if key not in ("name", "power_mode", "power.limit", "pstate")}
    return {**words, **{f"gpu {key}": value for key, value in extra.items()}, **stamp["libraries"]}


def _sentence_of_time(report: Mapping[str, Any]) -> str:
    pair = headline_pair(report)
    if pair is None:
        return "no time saving was measured"
    entry = pair.other
    where = f"{entry['backend']}, on {report['provenance']['machine'].get('device', 'an unnamed device')}"
    samples = min(pair.dense["n"], entry["n"])
    how = f"measured with {where}, n = {samples}" if pair.measured else f"estimated for {where}"
    stage = f"the {TOTAL_STAGE}" if entry["stage"] == TOTAL_STAGE else entry["stage"]
    before, after = milliseconds(pair.dense["p50_ms"]), milliseconds(entry["p50_ms"])
    compared = f"instead of {before}" if pair.separated else f"where it took {before}, a difference within noise"
    return f"{stage} takes {after} {compared} (median, {how})"


def _sentence_of_cost(report: Mapping[str, Any]) -> str:
    cost, how = final_distortion(report)
    simulated = "simulated " if report["frames"]["simulated"] else ""
    if not how.startswith("held-out"):
        return f"the distortion is {significant(cost)}, predicted from {simulated}frames and not verified"
    recovered = " after recovery" if "recovery" in how else ""
    where = "simulated " if report["frames"]["held_out_simulated"] else ""
    return f"the distortion is {significant(cost)} on held-out {where}frames{recovered}"


def verdict_sentence(report: Mapping[str, Any]) -> str:
    """What was kept, what it cost, what time it saves and where that was found; it reads `passed`, not the sentence."""
    failed = sum(not comparison["passed"] for comparison in report["parity"])
    reason = f"{failed} of {plural(len(report['parity']), 'comparison')} out of tolerance: " if failed else ""
    reason = reason if report["parity"] else "nothing was compared: "
    untrained = "" if report["model"]["trained"] else "UNTRAINED "
    budget = report["budget"]
    executed = f"{percent(share_of(backbone_macs(report), 'executed'))} of the backbones'"
    unplanned = report["plan"] is None and any("tile" in layer["pattern"] for layer in report["layers"])
    runs = "no 3D plan could be made, one would execute" if unplanned else "hardware executes"
    kept = (
        f"keeps {percent(budget['kept_of_backbone'])} of its backbones' MACs "
        f"({percent(budget['kept_of_model'])} of the whole model's; {runs} {executed})"
    )
    return (
        f"{reason}{untrained}{report['model']['name']} {kept}; "
        f"{_sentence_of_cost(report)}; {ap_sentence(report)}{_sentence_of_time(report)}."
    )
