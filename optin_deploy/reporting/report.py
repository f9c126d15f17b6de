"""The report of a job: one JSON with everything, one page to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optin_deploy.common.formatting import BYTES, COUNTS, pair
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import point_name
from optin_deploy.measuring.state import ranges_of
from optin_deploy.measuring.timing import PairTiming
from optin_deploy.quality.metrics import METRICS, Metric
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.artifact_table import ArtifactQuality, artifact_table
from optin_deploy.structure.kept import HEADER, KeptGroup, kept_lines, kept_rows

SCHEMA_VERSION = 2
EXPECT_LOSS_BELOW = 0.95
"""Agreement on held-out data under which the report says that accuracy loss is to be expected."""


@dataclass(frozen=True)
class Report:
    """Everything that is known about one pruned model; fields as in report.json."""

    quality: Quality
    params: Mapping[str, int]
    macs: Mapping[str, float]
    """dense, pruned, kept, prunable_kept; of one sample."""
    size_bytes: Mapping[str, int]
    parity: Mapping[str, float]
    """Errors relative to max(1, largest reference value)."""
    latency: Sequence[Measurement]
    heads: Sequence[int]
    neurons: Sequence[int]
    """Kept units of the groups of these kinds, in the order of work."""
    environment: Mapping[str, Any]
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    """Name, kind, kept and all units of each group."""
    artifacts: Sequence[ArtifactQuality] = ()
    """Artifacts of other types beside the float32 networks; empty where all artifacts are in float32."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Most bytes that the process held, by stage."""
    tuned: Mapping[str, Any] | None = None
    """How the network was tuned without labels, and what that did; None: it was not."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """What report.json holds."""
        left = {"quality", "latency", "artifacts", *(("tuned",) if self.tuned is None else ())}
        plain = {k: v for k, v in vars(self).items() if k not in left}
        rows = {"latency": [m.to_json() for m in self.latency]}
        if self.artifacts:
            rows["artifacts"] = [row.to_json() for row in self.artifacts]
        return {**plain, "quality": self.quality.to_json(), **rows}


def quality_lines(report: Report) -> list[str]:
    """The sentence that a report opens with, and a warning if agreement is low."""
    return _lines_of(report.quality)


def tuned_lines(tuned: Mapping[str, Any]) -> list[str]:
    """What tuning without labels did, and the quality before it. Args: tuned: see `Report.tuned`."""
    fell = f"went from {tuned['before']:.3g} to {tuned['after']:.3g}"
    if tuned["after"] == tuned["before"]:
        fell = f"stays at {tuned['before']:.3g}: what came nearer may be chance, and is not kept"
    return [
        f"Tuned without labels for {tuned['seconds'] / 60:.1f} min: {tuned['steps']:,} steps on {tuned['rows']:,} "
        f"calibration rows; on {tuned['held_out']:,} others the distance to the dense outputs {fell}.",
        f"Before the tuning: {_lines_of(Quality(**tuned['quality_before']))[0]}",
    ]


def _lines_of(q: Quality) -> list[str]:
    metric = METRICS[q.metric]
    if q.metric == "relative_error":
        return [f"The outputs differ from the dense ones by {q.pruned:.2%} of their size ({q.samples} held-out rows)."]
    if metric.labelled:
        main, *others = (
            _figures(METRICS[name], *values) for name, values in {q.metric: (q.dense, q.pruned), **q.beside}.items()
        )
        points = f"{100 * (q.pruned - q.dense):+.1f} points, " if metric.share else ""
        beside = "".join(f"; {other[0].lower()}{other[1:]}" for other in others)
        return [f"{main} ({points}{q.samples} held-out {metric.rows}){beside}."]
    lines = [f"{metric.title}: {q.pruned:.3f} ({q.samples} held-out rows, no labels)."]
    if q.pruned < EXPECT_LOSS_BELOW:
        lines.append(f"Below {EXPECT_LOSS_BELOW}: expect some loss of accuracy; give labelled data to measure it.")
    return lines


def _figures(metric: Metric, dense: float, pruned: float) -> str:
    form = ".1%" if metric.share else ".3f"
    return f"{metric.title} {dense:{form}} dense, {pruned:{form}} pruned"


def summary_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows (what, dense, pruned, ratio) of the size table."""
    sizes = [
        ("parameters", report.params["dense"], report.params["pruned"], COUNTS),
        ("MACs a sample", report.macs["dense"], report.macs["pruned"], COUNTS),
    ]
    if "dense" in report.size_bytes:
        sizes.append(("file", report.size_bytes["dense"], report.size_bytes["pruned"], BYTES))
    return [(name, *pair(dense, pruned, units), f"{pruned / dense:.1%}") for name, dense, pruned, units in sizes]


def _named(latency: Sequence[Measurement]) -> list[tuple[str, Measurement]]:
    """Measurements with their points; where engine, precision or threads differ, the names say them too."""
    alike = len({(m.engine, m.precision, m.threads) for m in latency}) < 2
    names = [
        (point_name(m.batch, m.seq_len), "" if alike else f"{m.engine} {m.precision} {m.threads}t", m.beside)
        for m in latency
    ]
    return [(", ".join(filter(None, parts)), m) for parts, m in zip(names, latency, strict=True)]


def latency_rows(latency: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Rows (point, dense p50/p95, pruned p50/p95, samples/s, speed-up with interval, share of the ideal)."""
    rows: list[tuple[str, ...]] = []
    for name, m in _named(latency):
        t = m.timing
        before, after = t.throughput(m.batch)
        rows.append(
            (
                name,
                f"{t.dense(50):.2f} / {t.dense(95):.2f}",
                f"{t.pruned(50):.2f} / {t.pruned(95):.2f}",
                f"{before:.0f} -> {after:.0f}",
                _speedup(t),
                "-" if m.beside else f"{m.realised:.0%} of {m.ideal:.2f}x",
            )
        )
    return rows


def _speedup(timing: PairTiming) -> str:
    low, high = timing.ci95
    return f"{timing.speedup:.2f}x [{low:.2f}, {high:.2f}]"


def device_rows(latency: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Rows (point, what, dense p50, pruned p50, speed-up with interval) where the time on the device was measured."""
    rows: list[tuple[str, ...]] = []
    for name, m in _named(latency):
        if m.device_time is None:
            continue
        for what, t in m.device_time.ways.items():
            found = (
                ("none recorded", "", "") if t is None else (f"{t.dense(50):.3f}", f"{t.pruned(50):.3f}", _speedup(t))
            )
            rows.append((name, what, *found))
        cost = m.device_time.transfers_ms(m.timing)
        rows.append((name, "transfers", f"{cost['dense']:.3f}", f"{cost['pruned']:.3f}", ""))
    return rows


def memory_lines(latency: Sequence[Measurement]) -> list[str]:
    """Peak memory at each point where it was measured."""
    return [
        f"Memory at {point_name(m.batch, m.seq_len)}: {m.peak_bytes['dense'] / 2**20:.0f} MiB dense, "
        f"{m.peak_bytes['pruned'] / 2**20:.0f} MiB pruned, beyond the libraries."
        for m in latency
        if m.peak_bytes is not None
    ]


def machine_lines(latency: Sequence[Measurement]) -> list[str]:
    """What the machine did meanwhile, if it tells."""
    ranges = ranges_of([state for m in latency for state in m.timing.states])
    return [f"While measuring: {ranges}."] if ranges else []


def unstable_lines(latency: Sequence[Measurement]) -> list[str]:
    """A warning for each timing in which the dense model differed from itself."""
    timings = [
        (", ".join(filter(None, (point_name(m.batch, m.seq_len), m.beside))) + where, timing)
        for m in latency
        for where, timing in (("", m.timing), *_on_device(m))
        if timing is not None
    ]
    return [
        f"Unstable at {point}: two sessions of the dense model differ by a factor of "
        f"[{timing.same_ci95[0]:.2f}, {timing.same_ci95[1]:.2f}]. Measure again on a quieter machine."
        for point, timing in timings
        if timing.unstable
    ]


def _on_device(m: Measurement) -> list[tuple[str, PairTiming | None]]:
    ways = {} if m.device_time is None else m.device_time.ways
    return [(f" on the device, {way}", timing) for way, timing in ways.items()]


LATENCY_HEADER = (
    "batch x length",
    "dense p50/p95 ms",
    "pruned p50/p95 ms",
    "samples/s",
    "speed-up [95% CI]",
    "time saved of ideal",
)
DEVICE_HEADER = ("batch x length", "on the device", "dense p50 ms", "pruned p50 ms", "speed-up [95% CI]")
DEVICE_NOTE = (
    "Times on the device are by CUDA events; inputs and outputs stay there. Transfers in and out are in the ordinary "
    "figures and not in these: `transfers` is ordinary p50 - device p50, starting and waiting included."
)
SUMMARY_HEADER = ("", "dense", "pruned", "kept")


def to_markdown(report: Report) -> str:
    """The page to read: quality first, then size, latency, what was kept, parity, environment."""
    env = report.environment
    parts = [
        "# Pruning report",
        " ".join(quality_lines(report)),
        to_table(SUMMARY_HEADER, summary_rows(report)),
        *([to_table(*artifact_table(report.artifacts, report.latency))] if report.artifacts else []),
    ]
    if report.latency:
        first = report.latency[0]
        threads = first.threads or "default"
        parts += [
            f"Latency on {first.engine} {first.precision}, {threads} threads:",
            to_table(LATENCY_HEADER, latency_rows(report.latency)),
            *unstable_lines(report.latency),
            *machine_lines(report.latency),
        ]
    groups = [KeptGroup(**group) for group in report.groups]
    rows, sizes = kept_rows(groups), report.settings.get("counted_at") or {}
    counted = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in sizes.items())
    parts += [
        *([f"MACs are counted at {counted}."] if counted else []),
        " ".join([f"Of what could be cut {report.macs['prunable_kept']:.1%} of the MACs stay.", *kept_lines(groups)]),
        *([to_table(HEADER, rows)] if rows else []),
        "Parity: " + ", ".join(f"{name} {error:.1e}" for name, error in report.parity.items()) + ".",
        "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report.seconds.items()) + ".",
        *_stage_memory(report.memory),
        f"{env['date']}, {env['cpu_model']}, {env['cores_logical']} cores, {env['platform']}.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in env["versions"].items()) + ".",
        "Hashes: " + ", ".join(f"{k} {v[:12]}" for k, v in report.hashes.items()) + ".",
    ]
    return "\n\n".join([*parts[:2], *report.notes, *parts[2:]]) + "\n"


def _stage_memory(memory: Mapping[str, int]) -> list[str]:
    listed = ", ".join(f"{name} {held / 2**20:.0f}" for name, held in memory.items())
    return [f"MiB held at most, by stage: {listed}."] if listed else []


def to_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
