"""The top of the page: what was made, from which images, measured on what, and how good it is."""

from __future__ import annotations

from typing import Any

from lightfield.errors import NelfError
from pipeline.report.chain import STAGES, Chain, Trial
from pipeline.report.images import image_element, shown_width
from pipeline.report.layout import or_reason
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import (
    NOT_AVAILABLE,
    decibels,
    duration,
    finite,
    fixed,
    interval,
    large,
    milliseconds,
    plural,
    share,
    size,
    whole,
)
from pipeline.stages.scene import EMBEDDED

FORMATS = {
    "blender": "Blender (NeRF-synthetic) form",
    "transforms": "transforms.json form",
    "llff": "LLFF form",
}
CREDIT_FIELDS = ("credit", "attribution", "author", "license", "license")
HERO_PIXELS = 400
RUNS_OF_CLOCK = {
    "wall": "all runs",
    "quiet": "the runs that no other program disturbed",
    "processor": "the processor time, as the machine was too busy for undisturbed runs",
}
"""What a latency of the search was read from (see `prune.evidence`)."""


def header(chain: Chain) -> Html:
    """Title, hero image, the first lines, the headline figures and the chain."""
    text = element(
        "div",
        element("p", "Neural light field · report of a run", class_="kicker"),
        element("h1", chain.scene.name),
        element("p", _in_one_line(chain), class_="lead"),
        element("p", data_line(chain)),
        element("p", device_line(chain)),
        *_damages(chain),
        _cards(chain),
    )
    return element("header", element("div", text, _hero(chain), class_="first"), _stages(chain))


def _damages(chain: Chain) -> list[Html]:
    return [
        element("p", f"Damaged: {stage}/{damage}; run this stage again.", class_="warning")
        for stage, damage in chain.damaged.items()
    ]


def data_line(chain: Chain) -> str:
    """Which images the run is about."""
    scene, camera = chain.scene, chain.scene.intrinsics
    counts = (
        f"{camera.width} × {camera.height} pixels; {plural(len(scene.train), 'image')} to learn from, "
        f"{len(scene.val)} to tune with, {len(scene.test)} only to test on"
    )
    if scene.source == EMBEDDED:
        return (
            "Images: no data set was given, so this run used the embedded scene, a toy truck of "
            f"bricks that the program draws itself ({counts})."
        )
    form = FORMATS.get(scene.source, f"“{scene.source}” form")
    credited = [str(scene.provenance[name]) for name in CREDIT_FIELDS if scene.provenance.get(name)]
    credit = f" Credit: {'; '.join(credited)}." if credited else ""
    return f"Images: the data set “{scene.name}” in {form} ({counts}).{credit}"


def device_line(chain: Chain) -> str:
    """What measured the latency, and that a host is no phone."""
    stages = [stage for stage in ("prune", "bench") if stage in chain.artifacts]
    if not stages:
        return f"Latency: {NOT_AVAILABLE}: nothing has been measured yet."
    first, *others = [_device_phrase(chain, stage) for stage in stages]
    more = [f" The bench below: {phrase}" for phrase in others if phrase != first]
    return f"Latency: {first}{''.join(more)}"


def _device_phrase(chain: Chain, stage: str) -> str:
    device = chain.device(stage)
    if not device:
        return f"{NOT_AVAILABLE}: the measurement does not name its device."
    name = device_name(device)
    if chain.emulated(stage):
        return f"{NOT_AVAILABLE}: {name} is an emulated device, whose times mean nothing."
    if device.get("kind") == "phone":
        return f"measured on a phone, {name}."
    return f"measured on this host, {name}. This is no phone: the milliseconds are the host's own."


def device_name(device: dict[str, Any]) -> str:
    """Device, runtime and threads in one phrase."""
    words = [str(device.get(field) or "unknown") for field in ("name", "runtime")]
    return f"{words[0]} with {words[1]}, {plural(device.get('threads'), 'thread')}"


def _in_one_line(chain: Chain) -> str:
    final = final_trial(chain)
    dense_db = decibels(chain.metric("student", "psnr_db"))
    if "prune" in chain.artifacts and chain.outdated("prune"):
        return (
            f"A network that draws this scene from new viewpoints in one pass, at {dense_db}. The "
            "pruned student is older than it and not comparable: nelf prune makes it anew."
        )
    if final is not None:
        kind = " of processor time" if final.clock == "processor" else ""
        return (
            "A small network that draws this scene from new viewpoints: "
            f"{milliseconds(final.latency_ms)}{kind} an image where the unpruned one takes "
            f"{milliseconds(chain.metric('prune', 'dense_ms'))}, at "
            f"{decibels(chain.metric('prune', 'psnr_db'))} where that one reaches {dense_db}."
        )
    if "student" in chain.artifacts:
        return f"A network that draws this scene from new viewpoints in one pass, at {dense_db}."
    if "teacher" in chain.artifacts:
        return (
            f"A radiance field at {decibels(chain.metric('teacher', 'psnr_db'))}; the fast network "
            "that will stand in for it has not been trained yet."
        )
    return "The images are loaded; nothing has been trained yet."


def final_trial(chain: Chain) -> Trial | None:
    """The last measurement of the pruned student, where it is a result."""
    if chain.emulated("prune"):
        return None
    try:
        return next((t for t in reversed(chain.trials()) if t.verdict == "final"), None)
    except NelfError:
        return None


def _hero(chain: Chain) -> Html:
    names = {"prune": "pruned student", "student": "student", "teacher": "teacher"}
    stage = next((s for s in names if s in chain.artifacts), None)

    def build() -> Html:
        view = chain.scene.test.names[chain.shown_views()[0]]
        if stage is None:
            pixels, who = chain.scene.test.images[0], "A test image of the scene"
        else:
            pixels, who = chain.renders(stage)[0], f"Drawn by the {names[stage]}"
        width = pixels.shape[1]
        quality = 90 if width > HERO_PIXELS else None
        alt = f"{chain.scene.name}, view {view}, {who.lower()}"
        caption = f"{who}: test view “{view}”"
        if stage is not None:
            caption += ", which no training has seen"
        content = image_element(pixels, alt, quality, width=shown_width(width, HERO_PIXELS))
        return element("figure", content, element("figcaption", f"{caption}."), class_="hero")

    return or_reason(build)


def _cards(chain: Chain) -> Html:
    return element(
        "div",
        _card("Quality on test views", _quality(chain), "PSNR in dB; higher is better"),
        _card("Latency of one image", *_latency(chain)),
        _card("Size of the network", *_size(chain)),
        class_="cards",
    )


def _card(title: str, value: str, note: str) -> Html:
    return element(
        "div",
        element("p", title, class_="title"),
        element("div", value, class_="values"),
        element("p", note, class_="note"),
    )


def _value(figure: str, name: str) -> Html:
    return element("p", element("b", figure), element("small", name))


def _quality(chain: Chain) -> Html:
    names = {"teacher": "teacher", "student": "student", "prune": "pruned"}
    values = [
        _value(fixed(chain.metric(stage, "psnr_db"), 2), name)
        for stage, name in names.items()
        if stage in chain.artifacts
    ]
    return fragment(*values) if values else _value(NOT_AVAILABLE, "nothing has been trained")


def _latency(chain: Chain) -> tuple[Html, str]:
    if "prune" not in chain.artifacts:
        return _latency_unpruned(chain)
    final = final_trial(chain)
    if final is None:
        reason = "measured on an emulated device" if chain.emulated("prune") else "no final record"
        return _value(NOT_AVAILABLE, reason), ""
    values = fragment(
        _value(milliseconds(chain.metric("prune", "dense_ms")), "dense"),
        _value(milliseconds(final.latency_ms), "pruned"),
    )
    return values, (
        f"{share(final.ratio)} of dense (95% interval {interval(final.ratio_low, final.ratio_high)}); "
        f"budget {milliseconds(chain.metric('prune', 'budget_ms'))}; {percentile_name(chain)} of "
        f"{RUNS_OF_CLOCK.get(final.clock, final.clock)}"
    )


def _latency_unpruned(chain: Chain) -> tuple[Html, str]:
    """The bench's figure of the dense student, where there is one that counts."""
    current = not chain.emulated("bench") and not chain.pruned_files
    median_ms = chain.metric("bench", "student_p50_ms") if current else None
    if finite(median_ms) is None:
        return _value(NOT_AVAILABLE, chain.absent["prune"]), ""
    return _value(milliseconds(median_ms), "median, not pruned"), chain.absent["prune"]


def percentile_name(chain: Chain) -> str:
    """The percentile that the budget was held against, in words."""
    settings = chain.require("prune").manifest["config"].get("prune")
    value = settings.get("percentile") if isinstance(settings, dict) else None
    return "percentile" if finite(value) is None else f"{fixed(value, 0)}th percentile"


def _size(chain: Chain) -> tuple[Html, str]:
    if chain.newest is None:
        return _value(NOT_AVAILABLE, chain.absent["student"]), ""
    counts = [
        whole(chain.metric(stage, "parameters"))
        for stage in ("student", "prune")
        if stage in chain.artifacts
    ]
    note = f"{' → '.join(counts)} parameters; {large(chain.metric(chain.newest, 'macs'))} MACs an image"
    try:
        graphs = [g for g in chain.graphs() if "for ONNX Runtime" in str(g.get("purpose"))]
    except NelfError as error:
        return _value(NOT_AVAILABLE, error.what), note
    if old := chain.outdated("export"):
        return _value(NOT_AVAILABLE, f"exported before the present {' and '.join(old)}"), note
    if not graphs:
        return _value(NOT_AVAILABLE, "no graph for ONNX Runtime was exported"), note
    return _value(size(graphs[0].get("size_bytes")), "ONNX file"), note


def _stages(chain: Chain) -> Html:
    """The chain, stage by stage: done, absent, or older than what it was made from."""
    items = []
    for stage in STAGES:
        if stage not in chain.artifacts:
            items.append(element("li", stage, element("small", chain.absent[stage]), class_="todo"))
            continue
        seconds = duration(chain.artifacts[stage].manifest.get("seconds"))
        old = chain.outdated(stage)
        note = f"made before the present {', '.join(old)}" if old else seconds
        state = "old" if old else "done"
        items.append(element("li", stage, element("small", note), class_=state))
    return element("ol", *items, class_="stages", aria_label="Stages of the run")
