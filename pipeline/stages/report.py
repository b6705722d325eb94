"""The report of a run: one HTML file that needs no network, no JavaScript and nothing beside it.

Every figure on the page stands in an artifact; what is missing is named with its reason.
"""

from __future__ import annotations

from collections.abc import Callable

from lightfield.files import write_text
from lightfield.run import Artifact, Run, StageWriter
from pipeline.console import Console
from pipeline.report.chain import Chain
from pipeline.report.document import document
from pipeline.report.files import files_section
from pipeline.report.latency import latency_section
from pipeline.report.making import making_section
from pipeline.report.markup import Html, element, fragment
from pipeline.report.pruning import pruning_section
from pipeline.report.quality import images_section, quality_section
from pipeline.report.summary import header

PAGE = "index.html"
LAYOUT = 2
"""Grows when the same artifacts give another page."""
PARTS: tuple[Callable[[Chain], Html], ...] = (
    header, images_section, quality_section, pruning_section, latency_section, files_section,
    making_section,
)  # fmt: skip
LINKS = {
    "images": "Images",
    "quality": "Quality",
    "pruning": "Pruning",
    "latency": "Latency",
    "files": "Files",
    "making": "How it was made",
}


def make_report(run: Run, console: Console) -> Artifact:
    """Write `index.html` about everything the run has so far.

    Raises:
        CheckpointError: when the run has no readable scene.
    """
    chain = Chain.of(run)
    for stage, damage in chain.damaged.items():
        console.say(f"report: the {stage} stage is damaged ({damage}); run `nelf {stage}` again")
    settings = {"layout": LAYOUT, "manifests": chain.identity(), "damaged": chain.damaged}

    def work(stage: StageWriter) -> None:
        parts = []
        with console.progress("report") as progress:
            for part in PARTS:
                parts.append(part(chain))
                progress(len(parts), len(PARTS))
        page = page_of(chain.scene.name, parts)
        write_text(stage.path / PAGE, page)
        stage.metrics |= {"size_bytes": len(page.encode()), "missing": sorted(chain.absent)}

    return run.perform("report", settings, chain.artifacts, work)[0]


def page_of(title: str, parts: list[Html]) -> str:
    """The whole document around its parts."""
    top, *rest = parts
    links = [element("a", text, href=f"#{name}") for name, text in LINKS.items()]
    contents = element("nav", *links, aria_label="Contents")
    return document(f"{title}: a neural light field", top, contents, fragment(*rest))
