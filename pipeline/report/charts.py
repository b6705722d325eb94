"""The charts of the report as inline SVG; latencies are in ms, quality is in dB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightfield.latency import LatencyRecord
from lightfield.student import StudentSpec
from pipeline.report.quantities import as_number, decibels, milliseconds
from pipeline.report.svg import (
    BAD,
    CARD,
    INK,
    MUTED,
    PRUNED,
    STUDENT,
    TEACHER,
    drawing,
    inline_svg,
    new_figure,
)
from prune.measurement import Trial, pareto_front

MOST_DOTS, MOST_DOTS_OVER_TIME = 200, 400
"""Runs drawn per graph; of more runs, every n-th is drawn."""
SHORTEST_MS = 4000.0
"""Shortest measurement that is drawn over time when no sensor could be read."""
LINES = (PRUNED, STUDENT, TEACHER, BAD, INK, MUTED)
DASHED = (0, (4, 3))
VERDICTS: dict[str, dict[str, Any]] = {
    "dense": {"marker": "D", "color": STUDENT, "markersize": 7},
    "kept": {"marker": "o", "color": STUDENT},
    "passed over": {"marker": "o", "color": MUTED, "markerfacecolor": CARD},
    "missed": {"marker": "x", "color": BAD},
    "rolled back": {"marker": "v", "color": BAD, "markerfacecolor": CARD},
    "within budget": {"marker": "s", "color": STUDENT, "markerfacecolor": CARD},
    "over budget": {"marker": "s", "color": BAD, "markerfacecolor": CARD},
    "final": {"marker": "*", "color": PRUNED, "markersize": 14},
}
OTHER_VERDICT: dict[str, Any] = {"marker": "P", "color": MUTED, "markerfacecolor": CARD}
Series = dict[str, tuple[list[float], list[float]]]
"""Name -> seconds and values."""


def training_chart(
    curve: tuple[Sequence[float], Sequence[float]], *, name: str, color: str, test_db: float | None
) -> Markup:
    """Training PSNR over steps, with a dashed line at the final PSNR on the test views."""
    steps, psnr_db = curve
    with drawing(f"training {name}"):
        figure = new_figure(2.7)
        axes = figure.add_subplot(xlabel="training step", ylabel="PSNR of training pixels, dB")
        axes.plot(steps, psnr_db, color=color, marker="" if len(steps) > 12 else ".")
        if test_db is not None:
            axes.axhline(test_db, color=INK, linewidth=1, linestyle=DASHED)
        axes.set_xlim(left=0)
        label = f"{name}: training PSNR from {psnr_db[0]:.1f} to {psnr_db[-1]:.1f} dB"
        return inline_svg(figure, label=label)


def pareto_chart(trials: Sequence[Trial], budgets_ms: Sequence[float]) -> Markup:
    """Every measured student by latency and PSNR, with the Pareto front and the budgets."""
    with drawing("pareto"):
        figure = new_figure(3.6)
        axes = figure.add_subplot(ylabel="PSNR of held-out views, dB")
        axes.set_xlabel("latency of one image, ms (percentile of the budget)")
        front = [(t.latency_ms, t.psnr_db) for t in pareto_front(trials)]
        axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=PRUNED, linewidth=1)
        for budget_ms in budgets_ms:
            axes.axvline(budget_ms, color=INK, linewidth=1, linestyle=DASHED)
            axes.annotate(
                f"budget {milliseconds(budget_ms)}", (budget_ms, 1), (4, -2), va="top",
                xycoords=("data", "axes fraction"), textcoords="offset points",
            )  # fmt: skip
        tooltips = _points(axes, trials, [(t.latency_ms, t.psnr_db) for t in trials])
        axes.margins(0.08)
        _verdict_legend(axes, trials, Line2D([], [], color=PRUNED, lw=1, label="best trade-offs"))
        label = f"{len(trials)} measurements by latency and PSNR"
        return inline_svg(figure, label=label, tooltips=tooltips)


def prediction_chart(trials: Sequence[Trial]) -> Markup:
    """Median latency predicted by the latency table against the measured one."""
    points = [(t.predicted_ms, t.median_ms) for t in trials]
    low, high = min(map(min, points)), max(map(max, points))
    pad = 0.08 * (high - low) or 0.1 * high
    limits = (low - pad, high + pad)
    with drawing("prediction"):
        figure = new_figure(3.6)
        axes = figure.add_subplot(xlim=limits, ylim=limits)
        axes.set(xlabel="predicted median, ms", ylabel="measured median, ms")
        axes.plot(limits, limits, color=MUTED, linewidth=1)
        tooltips = _points(axes, trials, points)
        _verdict_legend(axes, trials, Line2D([], [], color=MUTED, lw=1, label="prediction exact"))
        label = f"predicted and measured latency of {len(points)} students"
        return inline_svg(figure, label=label, tooltips=tooltips)


def _points(
    axes: Axes, trials: Sequence[Trial], points: Sequence[tuple[float, float]]
) -> dict[str, str]:
    """Draw one marker per trial; returns the tooltips by gid."""
    tooltips = {}
    for index, (trial, (x, y)) in enumerate(zip(trials, points, strict=True)):
        look = VERDICTS.get(trial.verdict, OTHER_VERDICT)
        axes.plot([x], [y], linestyle="", gid=f"trial-{index}", zorder=3, **look)
        result = f"{milliseconds(trial.latency_ms)}, {decibels(trial.psnr_db)}"
        tooltips[f"trial-{index}"] = f"{trial.verdict}, {trial.kind}: {result}"
    return tooltips


def _verdict_legend(axes: Axes, trials: Sequence[Trial], line: Line2D) -> None:
    seen = [trial.verdict for trial in trials]
    shown = dict.fromkeys([*(v for v in VERDICTS if v in seen), *seen])
    handles = [
        Line2D([], [], linestyle="", label=v, **{**VERDICTS.get(v, OTHER_VERDICT), "markersize": 6})
        for v in shown
    ]
    axes.figure.legend(handles=[*handles, line], loc="outside upper center", ncols=4)


def network_chart(dense: StudentSpec, pruned: StudentSpec, kept: Sequence[Sequence[int]]) -> Markup:
    """Inner widths of the blocks as bars, stream widths as lines; removed blocks are hollow.

    `kept` are the indices of the pruned student's blocks among the dense one's, by group.
    """
    with drawing("network"):
        figure = new_figure(3.0)
        axes = figure.add_subplot(ylabel="channels")
        at, ticks = 0.0, []
        for before, after, left in zip(_groups(dense), _groups(pruned), kept, strict=True):
            title, width, inner = before
            span = max(len(inner), 1)
            places = at + np.arange(span)
            axes.bar(places[: len(inner)], inner, 0.72, facecolor="none", edgecolor=MUTED)
            axes.bar(places[list(left)], after[2], 0.72, color=PRUNED)
            edges = [at - 0.5, at + span - 0.5]
            axes.plot(edges, [width, width], color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
            axes.plot(edges, [after[1], after[1]], color=INK)
            ticks.append((at + (span - 1) / 2, title))
            at += span + 0.6
        axes.set_xticks(*zip(*ticks, strict=True))
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        handles = [
            Patch(facecolor="none", edgecolor=MUTED, label="block before pruning"),
            Patch(color=PRUNED, label="block now"),
            Line2D([], [], color=MUTED, lw=1, linestyle=(0, (3, 2)), label="stream before"),
            Line2D([], [], color=INK, label="stream now"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return inline_svg(figure, label="inner width of each block before and after pruning")


def _groups(spec: StudentSpec) -> list[tuple[str, int, tuple[int, ...]]]:
    """(title, stream width, inner widths) of the body and of each tail stage."""
    tail = [
        (f"tail {i}, ×{stage.factor}", stage.width, stage.inner_widths)
        for i, stage in enumerate(spec.tail, 1)
    ]
    return [("body", spec.stream_width, spec.inner_widths), *tail]


def latency_chart(records: Mapping[str, LatencyRecord], *, name: str = "latency") -> Markup:
    """Every run as a dot, later runs higher; a long line is the median, a short one the p90."""
    with drawing(name):
        figure = new_figure(0.9 + 0.75 * len(records))
        axes = figure.add_subplot(xlabel="wall-clock time of one run, ms")
        for row, record in enumerate(records.values()):
            samples = np.asarray(record.samples_ms)[:: -(-len(record.samples_ms) // MOST_DOTS)]
            base = -row - 0.3
            heights = base + 0.6 * np.linspace(0, 1, len(samples))
            axes.plot(samples, heights, ".", color=STUDENT, markersize=3, alpha=0.55)
            axes.vlines(record.p50_ms, base - 0.08, base + 0.68, color=INK, linewidth=2)
            axes.vlines(record.p90_ms, base + 0.1, base + 0.5, color=PRUNED, linewidth=2)
        axes.set_yticks([-row for row in range(len(records))], list(records))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        p90_ms, p99_ms = (max(r.percentile_ms(q) for r in records.values()) for q in (90, 99))
        axes.set_xlim(0, 1.08 * min(2 * p90_ms, p99_ms))
        axes.spines["left"].set_visible(False)
        handles = [
            Line2D([], [], color=STUDENT, marker=".", linestyle="", label="one run, later higher"),
            Line2D([], [], color=INK, lw=2, label="median"),
            Line2D([], [], color=PRUNED, lw=2, label="90th percentile"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return inline_svg(figure, label=f"latency samples of {len(records)} graphs")


def thermal_chart(record: LatencyRecord, title: str, *, name: str) -> Markup | None:
    """Latency, temperatures and clock frequencies over time; None when there is too little to draw."""
    at_ms, curve = (record.conditions.get(key) for key in ("at_ms", "curve"))
    if not isinstance(at_ms, list) or len(at_ms) != len(record.samples_ms):
        return None
    temperatures = _sensors(curve, "temperatures_celsius") | _battery(record.conditions)
    clocks = _one_per_clock(_sensors(curve, "frequencies_mhz"))
    if not temperatures and not clocks and at_ms[-1] < SHORTEST_MS:
        return None
    panels = [(label, s) for label, s in (("°C", temperatures), ("clock, MHz", clocks)) if s]
    with drawing(name):
        figure = new_figure(1.3 + 1.15 * (1 + len(panels)))
        first, *others = figure.subplots(1 + len(panels), 1, sharex=True, squeeze=False)[:, 0]
        first.set_ylabel("latency, ms")
        _draw_runs(first, np.asarray(at_ms) / 1e3, np.asarray(record.samples_ms))
        for axes, (label, series) in zip(others, panels, strict=True):
            axes.set_ylabel(label)
            for color, (sensor, (seconds, values)) in zip(LINES, series.items(), strict=False):
                style: dict[str, Any] = (
                    {"marker": ".", "markersize": 4} if len(seconds) < 12 else {}
                )
                axes.plot(seconds, values, color=color, label=sensor, **style)
            axes.margins(y=0.15)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
        last = others[-1] if others else first
        last.set_xlabel("seconds since the first measured run")
        last.set_xlim(left=0)
        return inline_svg(figure, label=f"{title}: latency, temperature and clocks over time")


def _draw_runs(axes: Axes, seconds: np.ndarray, samples_ms: np.ndarray) -> None:
    step = -(-len(samples_ms) // MOST_DOTS_OVER_TIME)
    axes.plot(seconds[::step], samples_ms[::step], ".", color=STUDENT, markersize=2.5, alpha=0.45)
    pieces = np.array_split(np.arange(len(samples_ms)), min(40, max(len(samples_ms) // 5, 1)))
    medians = [float(np.median(samples_ms[piece])) for piece in pieces]
    axes.plot([float(seconds[piece].mean()) for piece in pieces], medians, color=INK)
    axes.set_ylim(0, 1.15 * float(np.percentile(samples_ms, 99)))


def _sensors(curve: object, quantity: str) -> Series:
    """The sensors that have at least one reading."""
    if not isinstance(curve, Mapping):
        return {}
    times, sensors = curve.get("at_seconds"), curve.get(quantity)
    if not isinstance(times, Sequence) or not isinstance(sensors, Mapping):
        return {}
    found = {str(name): _readings(zip(times, each, strict=False)) for name, each in sensors.items()}
    return {name: readings for name, readings in found.items() if readings[0]}


def _battery(conditions: Mapping[str, Any]) -> Series:
    """The battery temperature that Android reported during the measurement."""
    states = conditions.get("during")
    states = [s for s in states if isinstance(s, Mapping)] if isinstance(states, list) else []
    readings = _readings((s.get("at_seconds"), s.get("battery_celsius")) for s in states)
    return {"battery": readings} if readings[0] else {}


def _readings(pairs: Iterable[tuple[object, object]]) -> tuple[list[float], list[float]]:
    """The times and values of all pairs of two numbers."""
    numbers = [(as_number(time), as_number(value)) for time, value in pairs]
    known = [(time, value) for time, value in numbers if time is not None and value is not None]
    return [time for time, _ in known], [value for _, value in known]


def _one_per_clock(series: Series) -> Series:
    """One line for all cores with equal readings, named by the first and last core; fastest first."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, (_, values) in series.items():
        groups.setdefault(tuple(values), []).append(name)
    named = {
        names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}": series[names[0]]
        for names in groups.values()
    }
    fastest = sorted(named.items(), key=lambda entry: -max(entry[1][1]))
    return dict(fastest[: len(LINES)])
