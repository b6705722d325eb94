"""Schedule of the teacher's training: learning-rate decay and number of rays of each step."""

from __future__ import annotations

import math

FIRST_RAYS = 1024
"""Rays of the first step."""
MIN_RAYS = 64
"""Smallest number of rays of a step."""
MAX_GROWTH = 1.25
"""Largest factor between the ray counts of two consecutive steps."""
FINAL_LEARNING_RATE = 1 / 30
"""Factor of the learning rate after the last step."""


def annealing(done: float) -> float:
    """Learning-rate factor after the fraction `done` of all steps: a cosine from 1 to a thirtieth."""
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def next_ray_count(rays: int, samples: int, *, target_samples: int, max_rays: int) -> int:
    """Number of rays of the next step, from the rays and samples of this step.

    The ray count keeps the samples of a step near `target_samples`, so all steps cost about the same.
    """
    wanted = rays * target_samples / max(samples, 1)
    return int(min(max(wanted, MIN_RAYS), MAX_GROWTH * rays, max_rays))
