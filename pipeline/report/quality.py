"""Images side by side with their errors, the quality table, and the training curves."""

from __future__ import annotations

import numpy as np

from lightfield.errors import CheckpointError, NelfError
from pipeline.report.chain import RENDERED, Chain
from pipeline.report.charts import training_chart
from pipeline.report.images import (
    ERROR_FACTOR,
    Compression,
    color_bar,
    compression_for,
    error_map,
    image_element,
    psnr_db,
)
from pipeline.report.layout import (
    figure,
    or_reason,
    section,
    side_by_side,
    table,
    unavailable,
)
from pipeline.report.markup import Html, element, fragment
from pipeline.report.quantities import DOES_NOT_APPLY, as_number, decibels, fixed, large, whole
from pipeline.report.svg import STUDENT, TEACHER

NO_LPIPS = fragment(
    "LPIPS is not available: the weights it needs were not on the machine that scored the images; ",
    element("code", "nelf doctor"),
    " says which. ",
)
YARDSTICK = (
    "The last row is a yardstick: what one ray per pixel of the exact scene scores against these "
    "anti-aliased images."
)


def images_section(chain: Chain) -> Html:
    """Test views: the truth, and what each network made of it."""
    return section("images", "Images", or_reason(lambda: fragment(_introduction(), _views(chain))))


def _introduction() -> Html:
    return element(
        "p",
        "Each row is one view that no training has seen. Under an image lies its error map: the mean "
        f"absolute error of the three channels, ×{ERROR_FACTOR}; black is no error, the brightest "
        f"color one fifth of the range ({255 // ERROR_FACTOR} of 255) or more.",
    )


def _views(chain: Chain) -> Html:
    renders: dict[str, np.ndarray] = {}
    reasons = []
    for stage, name in RENDERED.items():
        try:
            renders[stage] = chain.renders(stage)
        except CheckpointError as error:
            reasons.append(unavailable(error.what, name))
    views = chain.shown_views()
    truths = chain.scene.test.images[views]
    sample = [truths[0], *(r[0] for r in renders.values())]
    sample += [error_map(r[0], truths[0]) for r in renders.values()]
    stored = compression_for(sample)
    count = min(stored.views, len(views))
    chosen = [i * len(views) // count for i in range(count)]  # an orbit's last view is its first
    rows = [
        _view(
            chain.scene.test.names[views[i]],
            truths[i],
            {stage: images[i] for stage, images in renders.items()},
            stored,
        )
        for i in chosen
    ]
    note = f"Stored {stored.note}; errors and PSNR are those of the uncompressed 8-bit images."
    return fragment(*reasons, *rows, element("p", note, class_="note"))


def _view(
    name: str, truth: np.ndarray, renders: dict[str, np.ndarray], stored: Compression
) -> Html:
    bar = element(
        "div",
        element("p", f"Error ×{ERROR_FACTOR}"),
        image_element(
            color_bar(), "color bar of the error maps, from no error to a fifth", width=140
        ),
        element("p", element("span", "0"), element("span", f"≥ {255 // ERROR_FACTOR}/255")),
        class_="bar",
    )
    cells = [
        _cell(
            image_element(truth, f"{name}, ground truth", stored.quality), "Ground truth", "", bar
        )
    ]
    for stage, image in renders.items():
        who = RENDERED[stage]
        level = decibels(psnr_db(image, truth))
        cells.append(
            _cell(
                image_element(image, f"{name}, {who.lower()}, {level}", stored.quality),
                who,
                level,
                image_element(
                    error_map(image, truth), f"{name}, error of the {who.lower()}", stored.quality
                ),
            )
        )
    return element("div", element("h3", name), element("div", *cells, class_="row"), class_="view")


def _cell(image: Html, who: str, level: str, below: Html) -> Html:
    caption = element("figcaption", element("b", who), " ", level)
    return element("figure", image, caption, below)


def quality_section(chain: Chain) -> Html:
    """Scores over all test views, and how training went."""
    rows = [
        _row(chain, stage, name) for stage, name in RENDERED.items() if stage in chain.artifacts
    ]
    absent = [
        unavailable(chain.absent[stage], name)
        for stage, name in RENDERED.items()
        if stage in chain.absent
    ]
    reference = as_number(chain.metric("scene", "one_ray_reference_db"))
    if reference is not None:
        blank = [DOES_NOT_APPLY] * 2
        test = whole(len(chain.scene.test))
        rows.append(["Exact scene, one ray per pixel", decibels(reference), *blank, test, *blank])
    absent_lpips = any(
        chain.metric(stage, "lpips") is None for stage in RENDERED if stage in chain.artifacts
    )
    caption = fragment(
        "Means over all test views. PSNR measures the error of every pixel, SSIM the likeness of "
        "structure (1 is equal), LPIPS the difference that people see (0 is equal). ",
        NO_LPIPS if absent_lpips else None,
        YARDSTICK if reference is not None else None,
    )
    head = ["", "PSNR", "SSIM", "LPIPS", "views", "parameters", "MACs"]
    scores = table(head, rows, caption=caption) if rows else None
    return section("quality", "Quality", scores, *absent, _curves(chain))


def _row(chain: Chain, stage: str, name: str) -> list[str]:
    macs = DOES_NOT_APPLY if stage == "teacher" else large(chain.metric(stage, "macs"))
    return [
        name,
        decibels(chain.metric(stage, "psnr_db")),
        fixed(chain.metric(stage, "ssim"), 3),
        fixed(chain.metric(stage, "lpips"), 3),
        whole(chain.metric(stage, "views")),
        whole(chain.metric(stage, "parameters")),
        macs,
    ]


def _curves(chain: Chain) -> Html:
    captions = {
        "teacher": ("Teacher", TEACHER, "pixels of the training images"),
        "student": ("Student", STUDENT, "the teacher's images, before fine-tuning on real ones"),
    }

    def chart(stage: str) -> Html:
        name, color, source = captions[stage]
        try:
            curve = chain.curve(stage)
        except NelfError as error:
            return unavailable(error.what, f"{name}'s training curve")
        test_db = as_number(chain.metric(stage, "psnr_db"))
        drawn = training_chart(curve, name=name, color=color, test_db=test_db)
        text = f"{name}: PSNR while training on {source}."
        if test_db is not None:
            text += f" Dashed: the finished one on test views, {decibels(test_db)}."
        return figure(drawn, text)

    return side_by_side(*(chart(stage) for stage in captions))
