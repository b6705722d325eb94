"""The test views with their error maps, and the training curves."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.charts import training_chart
from pipeline.report.page_images import (
    PageImage,
    color_bar,
    compression_for,
    error_map,
    page_image,
    psnr_db,
)
from pipeline.report.quantities import as_number, decibels
from pipeline.report.run_data import RunData, Unavailable, available
from pipeline.report.svg import STUDENT, TEACHER

SCORED = {"teacher": "Teacher", "student": "Student", "prune": "Pruned student"}
"""Name of the model by the stage that scores its images."""


@dataclass(frozen=True)
class Render:
    """A model's image of a test view."""

    model: str
    psnr_db: float
    image: PageImage
    error: PageImage


@dataclass(frozen=True)
class View:
    """A test view."""

    name: str
    truth: PageImage
    renders: list[Render]


@dataclass(frozen=True)
class Images:
    """The shown test views."""

    views: list[View]
    color_bar: PageImage
    missing: dict[str, Unavailable]
    """Models without images."""
    quality: int | None
    """WebP quality of the images; None is lossless."""


def images_of(run: RunData) -> Images:
    """As many test views as the page can hold, evenly chosen."""
    found = {SCORED[stage]: available(lambda s=stage: run.renders(s)) for stage in SCORED}
    missing = {name: each for name, each in found.items() if isinstance(each, Unavailable)}
    renders = {name: each for name, each in found.items() if not isinstance(each, Unavailable)}
    shown = run.shown_views()
    truths = run.scene.test.images[shown]
    firsts = [images[0] for images in renders.values()]
    stored = compression_for([truths[0], *firsts, *(error_map(p, truths[0]) for p in firsts)])
    quality, count = stored.quality, min(stored.views, len(shown))

    def view(i: int) -> View:
        name, truth = run.scene.test.names[shown[i]], truths[i]
        images = []
        for model, pixels in ((model, each[i]) for model, each in renders.items()):
            level = psnr_db(pixels, truth)
            image = page_image(pixels, f"{name}, {model.lower()}, {decibels(level)}", quality)
            alt = f"{name}, error of the {model.lower()}"
            images.append(
                Render(model, level, image, page_image(error_map(pixels, truth), alt, quality))
            )
        return View(name, page_image(truth, f"{name}, ground truth", quality), images)

    # the last view of an orbit resembles the first one
    views = [view(i * len(shown) // count) for i in range(count)]
    bar = page_image(
        color_bar(), "color bar of the error maps, from no error to a fifth", width=140
    )
    return Images(views, bar, missing, quality)


def curves_of(run: RunData) -> dict[str, Markup | Unavailable]:
    """The charts of the training curves, by stage."""

    def curve(stage: str, color: str) -> Markup | Unavailable:
        test_db = as_number(run.metric(stage, "psnr_db"))
        return available(
            lambda: training_chart(
                run.curve(stage), name=SCORED[stage], color=color, test_db=test_db
            )
        )

    return {"teacher": curve("teacher", TEACHER), "student": curve("student", STUDENT)}
