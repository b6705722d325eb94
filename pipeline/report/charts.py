"""The report's charts, as inline SVG. Numbers in, markup out; latencies in ms, quality in dB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightfield.latency import LatencyRecord
from lightfield.student import StudentSpec
from pipeline.report.chain import Trial
from pipeline.report.markup import Html
from pipeline.report.quantities import decibels, milliseconds
from pipeline.report.svg import (
    BAD,
    CARD,
    INK,
    MUTED,
    PRUNED,
    STUDENT,
    drawing,
    inline_svg,
    new_figure,
)

MOST_DOTS = 200
"""Runs drawn per graph; more are thinned evenly."""
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


def training_chart(
    curve: tuple[Sequence[float], Sequence[float]],
    *,
    name: str,
    color: str,
    test_db: float | None,
) -> Html:
    """Training PSNR over steps, and the level reached on the test views."""
    steps, psnr_db = curve
    with drawing(f"training {name}"):
        figure = new_figure(2.7)
        axes = figure.add_subplot()
        axes.plot(steps, psnr_db, color=color, marker="" if len(steps) > 12 else ".")
        if test_db is not None:
            axes.axhline(test_db, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("training step")
        axes.set_ylabel("PSNR of training pixels, dB")
        axes.set_xlim(left=0)
        label = f"{name}: training PSNR from {psnr_db[0]:.1f} to {psnr_db[-1]:.1f} dB"
        return inline_svg(figure, label=label)


def front_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (latency, quality) points that no other beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def pareto_chart(trials: Sequence[Trial], budgets_ms: Sequence[float]) -> Html:
    """Every measured student by latency and quality, the best trade-offs, and the budgets."""
    drawn = [t for t in trials if t.latency_ms is not None and t.psnr_db is not None]
    points = [(t.latency_ms or 0.0, t.psnr_db or 0.0) for t in drawn]
    with drawing("pareto"):
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        front = front_of(points)
        axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=PRUNED, linewidth=1)
        for budget_ms in budgets_ms:
            axes.axvline(budget_ms, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"budget {milliseconds(budget_ms)}",
                (budget_ms, 1),
                (4, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
            )
        tooltips = _points(axes, drawn, points)
        axes.set_xlabel("latency of one image, ms (percentile of the budget)")
        axes.set_ylabel("PSNR of held-out views, dB")
        axes.margins(0.08)
        _verdict_legend(axes, drawn, [Line2D([], [], color=PRUNED, lw=1, label="best trade-offs")])
        label = f"{len(drawn)} measurements by latency and PSNR"
        return inline_svg(figure, label=label, tooltips=tooltips)


def prediction_chart(trials: Sequence[Trial]) -> Html:
    """What the latency table predicted beside what the device then measured."""
    points = [(t.predicted_ms or 0.0, t.median_ms or 0.0) for t in trials]
    ends = [min(map(min, points)), max(map(max, points))]
    pad = 0.08 * (ends[1] - ends[0]) or 0.1 * ends[1]
    limits = (ends[0] - pad, ends[1] + pad)
    with drawing("prediction"):
        figure = new_figure(3.6)
        axes = figure.add_subplot(xlim=limits, ylim=limits)
        axes.plot(limits, limits, color=MUTED, linewidth=1)
        tooltips = _points(axes, trials, points)
        axes.set_xlabel("predicted median, ms")
        axes.set_ylabel("measured median, ms")
        line = Line2D([], [], color=MUTED, lw=1, label="prediction exact")
        _verdict_legend(axes, trials, [line])
        label = f"predicted and measured latency of {len(points)} students"
        return inline_svg(figure, label=label, tooltips=tooltips)


def _points(
    axes: Axes, trials: Sequence[Trial], points: Sequence[tuple[float, float]]
) -> dict[str, str]:
    """Draw one marker per trial; tooltips by gid."""
    tooltips = {}
    for index, (trial, (x, y)) in enumerate(zip(trials, points, strict=True)):
        look = VERDICTS.get(trial.verdict, OTHER_VERDICT)
        axes.plot([x], [y], linestyle="", gid=f"trial-{index}", zorder=3, **look)
        tooltips[f"trial-{index}"] = (
            f"{trial.verdict}, {trial.kind}: {milliseconds(trial.latency_ms)}, "
            f"{decibels(trial.psnr_db)}"
        )
    return tooltips


def _verdict_legend(axes: Axes, trials: Sequence[Trial], others: list[Line2D]) -> None:
    seen = dict.fromkeys(trial.verdict for trial in trials)
    known = [verdict for verdict in VERDICTS if verdict in seen]
    shown = known + [verdict for verdict in seen if verdict not in VERDICTS]
    handles = [
        Line2D([], [], linestyle="", label=v, **{**VERDICTS.get(v, OTHER_VERDICT), "markersize": 6})
        for v in shown
    ]
    axes.figure.legend(handles=[*handles, *others], loc="outside upper center", ncols=4)


def network_chart(dense: StudentSpec, pruned: StudentSpec, kept: Sequence[Sequence[int]]) -> Html:
    """Inner width of every block as a bar, stream and tail widths as lines; hollow is gone.

    `kept` are the places of the pruned student's blocks among the dense one's, group by group.
    """
    with drawing("network"):
        figure = new_figure(3.0)
        axes = figure.add_subplot()
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
        axes.set_xticks([place for place, _ in ticks], [title for _, title in ticks])
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("channels")
        handles = [
            Patch(facecolor="none", edgecolor=MUTED, label="block before pruning"),
            Patch(color=PRUNED, label="block now"),
            Line2D([], [], color=MUTED, lw=1, linestyle=(0, (3, 2)), label="stream before"),
            Line2D([], [], color=INK, label="stream now"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return inline_svg(figure, label="inner width of each block before and after pruning")


def _groups(spec: StudentSpec) -> list[tuple[str, int, tuple[int, ...]]]:
    """(title, width of the stream, inner widths) of the body and of each tail stage."""
    tail = [
        (f"tail {i}, ×{stage.factor}", stage.width, stage.inner_widths)
        for i, stage in enumerate(spec.tail, 1)
    ]
    return [("body", spec.stream_width, spec.inner_widths), *tail]


def latency_chart(records: Mapping[str, LatencyRecord], *, name: str = "latency") -> Html:
    """Every run as a dot, later runs higher; the median as a long stroke, p90 as a short one."""
    with drawing(name):
        figure = new_figure(0.9 + 0.75 * len(records))
        axes = figure.add_subplot()
        most_ms = [max(r.percentile_ms(q) for r in records.values()) for q in (90, 99)]
        right = 1.08 * min(2 * most_ms[0], most_ms[1])
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
        axes.set_xlim(0, right)
        axes.set_xlabel("wall-clock time of one run, ms")
        axes.spines["left"].set_visible(False)
        handles = [
            Line2D([], [], color=STUDENT, marker=".", linestyle="", label="one run, later higher"),
            Line2D([], [], color=INK, lw=2, label="median"),
            Line2D([], [], color=PRUNED, lw=2, label="90th percentile"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return inline_svg(figure, label=f"latency samples of {len(records)} graphs")
