"""Scoring of rendered images against the test views of a scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightfield.metrics import Quality, mean_quality
from lightfield.progress import Progress
from lightfield.scenes.scene import Views

SHOWN_VIEWS = 8
"""Test views whose renders an artifact keeps for the report."""


def score(
    render: Callable[[Tensor], Tensor], views: Views, renders: Path, progress: Progress
) -> Quality:
    """The mean quality of `render` over all views; the renders of up to 8 evenly spread views are
    written to the file `renders`."""
    shown = set(np.linspace(0, len(views) - 1, min(SHOWN_VIEWS, len(views))).round().astype(int))
    pairs, kept = [], []
    for i in range(len(views)):
        image = render(torch.from_numpy(views.poses[i])).float().clamp(0, 1).cpu()
        pairs.append((image, torch.from_numpy(views.image(i))))
        if i in shown:
            kept.append((image * 255).round().to(torch.uint8).numpy())
        progress(i + 1, len(views))
    np.save(renders, np.stack(kept))
    return mean_quality(pairs)
