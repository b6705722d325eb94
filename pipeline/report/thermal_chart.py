"""How a device fared while it worked: latency, temperatures and clocks over one axis of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lightfield.latency import LatencyRecord
from pipeline.report.markup import Html
from pipeline.report.quantities import as_number
from pipeline.report.svg import (
    BAD,
    INK,
    MUTED,
    PRUNED,
    STUDENT,
    TEACHER,
    drawing,
    inline_svg,
    new_figure,
)

MOST_DOTS = 400
SHORTEST_MS = 4000.0
"""A pass without sensors is worth a curve from this length on."""
LINES = (PRUNED, STUDENT, TEACHER, BAD, INK, MUTED)
Series = dict[str, tuple[list[float], list[float]]]
"""Name -> seconds and values."""


def thermal_chart(record: LatencyRecord, title: str, *, name: str = "thermal") -> Html | None:
    """The curve of one measurement; None when it says neither when its runs were nor how warm it was."""
    at_ms = record.conditions.get("at_ms")
    curve = record.conditions.get("curve")
    if not isinstance(at_ms, list) or len(at_ms) != len(record.samples_ms):
        return None
    temperatures = _series(curve, "temperatures_celsius") | _polled(record.conditions)
    clocks = _one_per_clock(_series(curve, "frequencies_mhz"))
    if not temperatures and not clocks and at_ms[-1] < SHORTEST_MS:
        return None
    panels = [("latency, ms", None), ("°C", temperatures), ("clock, MHz", clocks)]
    shown = [(label, series) for label, series in panels if series is None or series]
    with drawing(name):
        figure = new_figure(1.3 + 1.15 * len(shown))
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for each, (label, series) in zip(axes, shown, strict=True):
            each.set_ylabel(label)
            if series is None:
                _draw_runs(each, np.asarray(at_ms) / 1e3, np.asarray(record.samples_ms))
            else:
                _draw_series(each, series)
        axes[-1].set_xlabel("seconds since the first measured run")
        axes[-1].set_xlim(left=0)
        return inline_svg(figure, label=f"{title}: latency, temperature and clocks over time")


def _draw_runs(axes: Axes, seconds: np.ndarray, samples_ms: np.ndarray) -> None:
    step = -(-len(samples_ms) // MOST_DOTS)
    axes.plot(seconds[::step], samples_ms[::step], ".", color=STUDENT, markersize=2.5, alpha=0.45)
    pieces = np.array_split(np.arange(len(samples_ms)), min(40, max(len(samples_ms) // 5, 1)))
    medians = [float(np.median(samples_ms[piece])) for piece in pieces]
    axes.plot([float(seconds[piece].mean()) for piece in pieces], medians, color=INK)
    axes.set_ylim(0, 1.15 * float(np.percentile(samples_ms, 99)))


def _draw_series(axes: Axes, series: Series) -> None:
    for color, (name, (seconds, values)) in zip(LINES, series.items(), strict=False):
        style: dict[str, Any] = {"marker": ".", "markersize": 4} if len(seconds) < 12 else {}
        axes.plot(seconds, values, color=color, label=name, **style)
    axes.margins(y=0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)


def _series(curve: object, quantity: str) -> Series:
    """The sensors of a curve that said something, as many as there are colors."""
    if not isinstance(curve, Mapping):
        return {}
    times, sensors = curve.get("at_seconds"), curve.get(quantity)
    if not isinstance(times, Sequence) or not isinstance(sensors, Mapping):
        return {}
    found: Series = {}
    for name, values in sensors.items():
        pairs = [(as_number(t), as_number(v)) for t, v in zip(times, values, strict=False)]
        known = [(t, v) for t, v in pairs if t is not None and v is not None]
        if known:
            found[str(name)] = ([t for t, _ in known], [v for _, v in known])
    return found


def _one_per_clock(series: Series) -> Series:
    """Cores that share a clock become one line, named by the first and the last."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, (_, values) in series.items():
        groups.setdefault(tuple(values), []).append(name)
    named = {
        names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}": series[names[0]]
        for names in groups.values()
    }
    fastest = sorted(named.items(), key=lambda entry: -max(entry[1][1]))
    return dict(fastest[: len(LINES)])


def _polled(conditions: Mapping[str, Any]) -> Series:
    """The battery, which Android tells from time to time."""
    states = conditions.get("during")
    if not isinstance(states, list):
        return {}
    points = [
        (as_number(state.get("at_seconds")), as_number(state.get("battery_celsius")))
        for state in states
        if isinstance(state, Mapping)
    ]
    known = [(at, celsius) for at, celsius in points if at is not None and celsius is not None]
    return {"battery": ([at for at, _ in known], [c for _, c in known])} if known else {}
