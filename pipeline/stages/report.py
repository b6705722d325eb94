"""The report of a run: one HTML file without network access, JavaScript or other files.

Every number on the page comes from an artifact. The page gives the reason for anything missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from export.parity import ALLOWED_LOSS_DB, FP16_FLOOR_DB, FP32_FLOOR_DB
from lightfield.errors import CheckpointError
from lightfield.files import write_text
from lightfield.run import Artifact, Run, StageWriter
from pipeline.console import Console
from pipeline.report.device_latency import device_latency
from pipeline.report.page_images import ERROR_FACTOR
from pipeline.report.pages import page
from pipeline.report.pruning import CLOCKS, budget_percentile, history_of, network_of
from pipeline.report.quality import SCORED, curves_of, images_of
from pipeline.report.run_data import STAGES, RunData, available
from pipeline.report.summary import summary_of
from pipeline.stages.scene import EMBEDDED

PAGE = "index.html"
LAYOUT = 3
"""Grows when the same artifacts give another page."""
PARTS: dict[str, Callable[[RunData], Any]] = {
    "summary": summary_of,
    "images": lambda run: available(lambda: images_of(run)),
    "curves": curves_of,
    "history": lambda run: available(lambda: history_of(run)),
    "network": lambda run: available(lambda: network_of(run)),
    "latency": lambda run: available(lambda: _latency_of(run)),
    "graphs": lambda run: available(run.graphs),
    "lens_file": lambda run: available(lambda: _lens_file(run)),
}
"""The parts of the page that read more than the manifests."""


def make_report(run: Run, console: Console) -> Artifact:
    """Write `index.html` about all finished stages of the run.

    Raises:
        CheckpointError: when the run has no readable scene.
    """
    data = RunData.read(run)
    for stage, damage in data.damaged.items():
        console.say(f"report: the {stage} stage is damaged ({damage}); run `nelf {stage}` again")
    settings = {"layout": LAYOUT, "manifests": data.fingerprints(), "damaged": data.damaged}

    def work(stage: StageWriter) -> None:
        parts = {}
        with console.progress("report") as progress:
            for name, part in PARTS.items():
                parts[name] = part(data)
                progress(len(parts), len(PARTS))
        text = page(
            "report.html.j2",
            **parts,
            run=data,
            percentile=budget_percentile(data),
            SCORED=SCORED,
            STAGES=STAGES,
            EMBEDDED=EMBEDDED,
            CLOCKS=CLOCKS,
            ERROR_FACTOR=ERROR_FACTOR,
            FP32_FLOOR_DB=FP32_FLOOR_DB,
            FP16_FLOOR_DB=FP16_FLOOR_DB,
            ALLOWED_LOSS_DB=ALLOWED_LOSS_DB,
        )
        write_text(stage.path / PAGE, text)
        stage.metrics |= {"size_bytes": len(text.encode()), "missing": sorted(data.absent)}

    return run.perform("report", settings, data.artifacts, work)[0]


def _latency_of(run: RunData) -> dict[str, Any]:
    benches, failed = run.benches()
    pruned, emulated = run.exports_pruned, run.emulated("bench")
    devices = [
        device_latency(bench, number=number, pruned=pruned, emulated=emulated)
        for number, bench in enumerate(benches, 1)
    ]
    return {"devices": devices, "failed": failed}


def _lens_file(run: RunData) -> str:
    files = run.require("lens").manifest["files"]
    found = next((name for name in files if name.endswith(".esproj")), None)
    if found is None:
        raise CheckpointError("the lens artifact holds no project file")
    return found
