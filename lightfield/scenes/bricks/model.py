"""The model of the embedded scene: a toy truck of studded bricks with its load, on a base plate.

Its solids are given in stud units (1 is the distance between two studs; a plate is 0.4 high, a
brick 1.2), with x forward, y to the truck's left and z up from the top of the base plate.
`truck_on_plate` then moves the solids to world coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightfield.scenes.bricks.solids import HalfSpace, Solid, Vector

STUD_PITCH = 0.2
"""Distance between two studs in world units."""
WORLD_SHIFT: Vector = (0.0, 0.0, -0.42)
"""Center of the base plate's top in world coordinates."""
PLATE = 0.4
STUD_RADIUS, STUD_HEIGHT = 0.3, 0.2
BASE_HALF_LENGTH, BASE_HALF_WIDTH = 5.0, 4.0
WHEEL_RADIUS, WHEEL_X = 0.95, 2.35

CHARCOAL, SLATE, SILVER = (0.16, 0.17, 0.19), (0.27, 0.30, 0.34), (0.70, 0.72, 0.74)
GLASS, LAMP = (0.34, 0.56, 0.70), (1.0, 0.93, 0.66)
AMBER, TAIL = (1.0, 0.58, 0.10), (0.75, 0.07, 0.07)
LEAF, BLOSSOM = (0.16, 0.50, 0.22), (0.98, 0.62, 0.72)


@dataclass(frozen=True)
class Palette:
    """The colors that depend on the seed, in sRGB."""

    cab: Vector
    bed: Vector
    base: Vector
    load: tuple[Vector, Vector, Vector, Vector]


RED, YELLOW, BLUE, TEAL, ORANGE, WHITE, GREEN, SAND = (
    (0.83, 0.16, 0.13), (0.98, 0.77, 0.15), (0.11, 0.37, 0.71), (0.10, 0.58, 0.57),
    (0.95, 0.47, 0.12), (0.93, 0.93, 0.91), (0.38, 0.68, 0.32), (0.86, 0.77, 0.58),
)  # fmt: skip
PALETTES = (
    Palette(RED, YELLOW, GREEN, (BLUE, ORANGE, TEAL, WHITE)),
    Palette(BLUE, WHITE, SAND, (RED, YELLOW, GREEN, ORANGE)),
    Palette(TEAL, ORANGE, SAND, (RED, BLUE, WHITE, YELLOW)),
    Palette(YELLOW, SLATE, TEAL, (RED, WHITE, BLUE, ORANGE)),
    Palette(ORANGE, BLUE, GREEN, (YELLOW, RED, WHITE, TEAL)),
)


def truck_on_plate(seed: int) -> list[Solid]:
    """All solids of the scene in world coordinates.

    The seed selects the palette and the order of the load's colors.
    """
    palette = PALETTES[seed % len(PALETTES)]
    order = np.random.default_rng(seed).permutation(4) if seed else range(4)
    palette = replace(palette, load=tuple(palette.load[i] for i in order))
    base = Solid(
        (-BASE_HALF_LENGTH, -BASE_HALF_WIDTH, -PLATE),
        (BASE_HALF_LENGTH, BASE_HALF_WIDTH, 0.0),
        palette.base,
        studded=True,
    )
    bricks = [base, *_chassis(palette), *_cab(palette), *_bed(palette), *_plate_decoration()]
    return [s.placed(STUD_PITCH, WORLD_SHIFT) for s in [*bricks, *_studs(bricks)]]


def _brick(
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    color: Vector,
    **details: Any,
) -> Solid:
    low, high = (x[0], y[0], z[0]), (x[1], y[1], z[1])
    return replace(Solid(low, high, color), **details)


def _cylinder(
    axis: int, center: tuple[float, float], radius: float, span: tuple[float, float], color: Vector,
    **details: Any,
) -> Solid:  # fmt: skip
    """A cylinder along one axis; `center` holds the other two coordinates, in the order x, y, z."""
    low, high = [c - radius for c in center], [c + radius for c in center]
    low.insert(axis, span[0])
    high.insert(axis, span[1])
    solid = Solid((low[0], low[1], low[2]), (high[0], high[1], high[2]), color, axis)
    return replace(solid, **details)


def _studs(bricks: list[Solid]) -> list[Solid]:
    """Studs on every unit square of studded tops that no other brick covers."""
    studs = []
    for brick in bricks:
        if not brick.studded:
            continue
        (x0, y0, _), (x1, y1, top) = brick.low, brick.high
        for x in np.arange(x0 + 0.5, x1):
            for y in np.arange(y0 + 0.5, y1):
                if any(other.contains((x, y, top + 0.5 * STUD_HEIGHT)) for other in bricks):
                    continue
                span = (top, top + STUD_HEIGHT)
                studs.append(_cylinder(2, (x, y), STUD_RADIUS, span, brick.color))
    return studs


def _wheel(x: float, side: int) -> list[Solid]:
    z = STUD_HEIGHT + WHEEL_RADIUS

    def disc(radius: float, inner: float, outer: float, color: Vector, **details: Any) -> Solid:
        span = (inner, outer) if side > 0 else (-outer, -inner)
        return _cylinder(1, (x, z), radius, span, color, **details)

    return [
        disc(WHEEL_RADIUS, 1.3, 2.15, CHARCOAL, bevel=0.16, gloss=0.35),
        disc(0.55, 2.1, 2.2, SILVER, bevel=0.06),
        disc(0.24, 2.15, 2.32, SLATE, bevel=0.06),
    ]


def _chassis(palette: Palette) -> list[Solid]:
    """Wheels, frame, mudguards with wheel arches, bumpers and lamps."""
    arch = (WHEEL_X, STUD_HEIGHT + WHEEL_RADIUS, 1.17)
    rear_arch = (-arch[0], *arch[1:])
    wheels = [part for x in (WHEEL_X, -WHEEL_X) for side in (1, -1) for part in _wheel(x, side)]
    lamps = [
        lamp
        for y in (1.45, -1.45)
        for lamp in (
            _cylinder(0, (y, 2.0), 0.36, (3.9, 4.06), SILVER),
            _cylinder(0, (y, 2.0), 0.27, (4.0, 4.12), LAMP, bevel=0.1),
            _cylinder(0, (y, 2.0), 0.25, (-4.1, -3.9), TAIL, bevel=0.1),
        )
    ]
    return [
        *wheels,
        *lamps,
        _brick((-3.9, 3.9), (-1.25, 1.25), (0.9, 2.4), SLATE),
        _brick((1.0, 4.0), (-2.0, 2.0), (1.3, 2.5), palette.cab, bore=arch),
        _brick((-1.0, 1.0), (-2.0, 2.0), (1.0, 1.3), SLATE),
        _brick((-1.0, 1.0), (-2.0, 2.0), (1.3, 2.5), palette.cab),
        _brick((-4.0, -1.0), (-2.0, 2.0), (1.3, 2.5), SLATE, bore=rear_arch),
        _brick((3.7, 4.35), (-2.0, 2.0), (0.9, 1.3), SILVER, bevel=0.08),
        _brick((-4.25, -3.7), (-2.0, 2.0), (0.9, 1.3), SILVER, bevel=0.08),
        _brick((3.9, 4.05), (-0.9, 0.9), (1.5, 2.3), CHARCOAL),
        _brick((3.9, 4.09), (-0.8, 0.8), (1.66, 1.8), SILVER, bevel=0.05),
        _brick((3.9, 4.09), (-0.8, 0.8), (2.0, 2.14), SILVER, bevel=0.05),
    ]


def _cab(palette: Palette) -> list[Solid]:
    """Hood, windows and pillars, roof with beacons, mirrors."""
    front, back = _slanted(2.0), _slanted(1.72)  # the outer and inner faces of the front pillars
    behind_front = (tuple(-n for n in back[0]), -back[1])
    upper = (3.3, 4.9)
    return [
        _brick((2.0, 4.0), (-2.0, 2.0), (2.5, 3.3), palette.cab, studded=True),
        _brick((0.0, 2.0), (-2.0, 2.0), (2.5, 3.3), palette.cab),
        _brick((0.05, 2.0), (-1.9, 1.9), upper, GLASS, cuts=(_slanted(1.9),), gloss=2.5),
        _brick((-0.2, 1.7), (-2.1, 2.1), (4.9, 5.3), palette.cab),
        *(
            pillar
            for y in ((1.7, 2.0), (-2.0, -1.7))
            for pillar in (
                _brick((0.0, 0.35), y, upper, palette.cab),
                _brick((0.0, 2.0), y, upper, palette.cab, cuts=(front, behind_front)),
            )
        ),
        *(
            part
            for y, arm in (((2.1, 2.55), (1.9, 2.3)), ((-2.55, -2.1), (-2.3, -1.9)))
            for part in (
                _brick((1.75, 1.9), y, (3.5, 4.1), CHARCOAL, bevel=0.06),
                _brick((1.8, 1.9), arm, (3.6, 3.75), CHARCOAL),
            )
        ),
        *(_brick((0.15, 0.6), y, (2.95, 3.08), SILVER) for y in ((1.9, 2.06), (-2.06, -1.9))),
        _brick((0.1, 0.9), (-0.9, 0.9), (5.3, 5.42), SILVER),
        _cylinder(2, (0.5, 0.5), 0.3, (5.42, 5.85), AMBER, bevel=0.12),
        _cylinder(2, (0.5, -0.5), 0.3, (5.42, 5.85), AMBER, bevel=0.12),
    ]


def _slanted(foot: float) -> HalfSpace:
    """The half space behind a slanted windshield that meets the top of the hood at x = `foot`."""
    across, up = 1.6 / np.hypot(1.6, 0.7), 0.7 / np.hypot(1.6, 0.7)
    return (across, 0.0, up), across * foot + up * 3.3


def _bed(palette: Palette) -> list[Solid]:
    """The cargo bed and the bricks in it."""
    first, second, third, fourth = palette.load
    return [
        _brick((-4.0, -0.3), (-2.0, 2.0), (2.5, 2.9), palette.bed),
        _brick((-4.0, -0.3), (1.7, 2.0), (2.9, 3.8), palette.bed),
        _brick((-4.0, -0.3), (-2.0, -1.7), (2.9, 3.8), palette.bed),
        _brick((-4.0, -3.7), (-2.0, 2.0), (2.9, 3.8), palette.bed),
        _brick((-0.6, -0.3), (-2.0, 2.0), (2.9, 3.8), palette.bed),
        _brick((-3.6, -1.6), (-1.6, 0.4), (2.9, 4.1), first, studded=True),
        _brick((-1.6, -0.6), (-1.6, 0.4), (2.9, 4.1), second, studded=True),
        _brick((-2.6, -0.6), (0.5, 1.5), (2.9, 4.1), third, studded=True),
        _brick((-3.6, -2.6), (0.5, 1.5), (2.9, 4.1), second, studded=True),
        _brick((-2.6, -1.6), (-0.6, 0.4), (4.1, 5.3), fourth, studded=True),
    ]


def _plate_decoration() -> list[Solid]:
    """A flower and a traffic cone on the plate beside the truck."""
    return [
        _cylinder(2, (-4.5, 3.5), 0.14, (0.0, 1.3), LEAF),
        *(
            _cylinder(2, (-4.5 + dx, 3.5 + dy), 0.28, (1.3, 1.6), BLOSSOM, bevel=0.1)
            for dx, dy in ((0.3, 0.0), (0.0, 0.3), (-0.3, 0.0), (0.0, -0.3))
        ),
        _cylinder(2, (-4.5, 3.5), 0.26, (1.3, 1.75), YELLOW, bevel=0.1),
        _brick((4.05, 4.95), (-3.95, -3.05), (0.0, 0.3), ORANGE),
        _cylinder(2, (4.5, -3.5), 0.36, (0.3, 0.75), ORANGE),
        _cylinder(2, (4.5, -3.5), 0.28, (0.75, 1.1), WHITE),
        _cylinder(2, (4.5, -3.5), 0.2, (1.1, 1.5), ORANGE),
    ]
