"""Posed images, cut into the windows on which a student trains.

Letters: an image is h x w rays and sh x sw pixels; a window is p x q rays of one image, wholly
inside it. Next to a window's sides lie `StudentSpec.halo_pixels` pixels that depend on rays outside
it, except where the side is the image's own: they are left out of the loss, so that every pixel in
the loss is exactly the whole image's.

Draws are a function of (seed, step, window) alone. Of W windows the i-th shows image
floor((i + u) n / W) of n, with u uniform in [0, 1): all images are equally likely, each step is
spread evenly over them, and the windows of one of N processes, which are about W / N consecutive ones,
need about n / N of the images only. So any number of processes draws the same windows. Where N does
not divide W, some processes have one window more than others, and the weights make up for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightfield.camera import Intrinsics
from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.light_field import ray_grid
from lightfield.rays import RaySpace, camera_directions, points_along, rays_in_space, world_rays
from lightfield.student import StudentSpec
from train.draws import WORD_BITS, below, random_words, uniform

GPU_SHARE = 0.7
"""Share of the GPU's free memory that images may take; larger sets stay in the host's."""
IMAGE, TOP, LEFT, JITTER = range(4)
"""What random words are for."""


@dataclass(frozen=True)
class Places:
    """Where windows of p x q rays lie: images (of all) and first rows and columns, in rays."""

    image: Int[Tensor, "b"]
    top: Int[Tensor, "b"]
    left: Int[Tensor, "b"]
    p: int
    q: int

    def of(self, windows: slice) -> Places:
        """Some of them."""
        return Places(self.image[windows], self.top[windows], self.left[windows], self.p, self.q)


class Windows(NamedTuple):
    """What a student trains on in one step."""

    points: Float[Tensor, "b p q d"]
    """Points along the rays, not yet encoded."""
    pixels: UInt8[Tensor, "b sp sq 3"]
    mask: Bool[Tensor, "b sp sq"]
    """Pixels that count in the loss."""
    weight: Float[Tensor, ""] | None
    """Share of all processes' counted pixels that these are, times the processes; None is 1."""


class ImagePool:
    """Posed images from which random windows are drawn, with their rays.

    Images stay uint8, and where they are (a memory map), unless they fit on the device. Process
    `rank` of `ranks` holds and draws its own share of them: it is given all of them as an array, or
    as a tensor on the device those that `needed` names. Steps are of `windows` windows, or of any
    multiple of the processes.
    """

    def __init__(
        self,
        poses: Float[np.ndarray, "n 3 4"],
        images: UInt8[np.ndarray, "n sh sw 3"] | UInt8[Tensor, "share sh sw 3"],
        intrinsics: Intrinsics,
        space: RaySpace,
        spec: StudentSpec,
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        windows: int | None = None,
    ):
        rays = ray_grid(intrinsics, spec)
        if images.shape[1:3] != (intrinsics.height, intrinsics.width):
            raise ConfigError(
                f"images of {images.shape[2]}x{images.shape[1]} pixels for a camera of "
                f"{intrinsics.width}x{intrinsics.height}",
                where="image pool",
            )
        self.spec, self.space, self.device = spec, space, device
        self.rank, self.ranks, self.windows = rank, ranks, windows
        self.height, self.width = rays.height, rays.width
        self.poses = torch.from_numpy(np.array(poses)).to(device)
        self.directions = camera_directions(rays, device=device)
        needed = self.needed(len(poses), rank, ranks, windows)
        self.first = needed.start
        if isinstance(images, Tensor):
            assert len(images) == needed.stop - needed.start
            assert images.device == self.poses.device
            self.images: np.ndarray | Tensor = images
        else:
            mine = images[needed]
            self.images = _on_gpu(mine, device) if _fits_on_gpu(mine, device) else mine

    @staticmethod
    def needed(count: int, rank: int, ranks: int, windows: int | None = None) -> slice:
        """The images, of `count`, that the windows of process `rank` show, in steps of `windows` or of
        a multiple of the processes.

        Raises:
            ConfigError: when there are fewer windows than processes.
        """
        windows = windows or ranks
        first = shared_out(windows, rank, ranks).start * count // windows
        return slice(first, -(-(rank + 1) * count // ranks))

    def __len__(self) -> int:
        """Images of all processes."""
        return len(self.poses)

    @property
    def reads_host(self) -> bool:
        """Whether pixels come to the GPU from the host's memory, so that no CUDA graph holds all."""
        return self.device.type == "cuda" and not isinstance(self.images, Tensor)

    def draw(
        self,
        windows: int,
        window_rays: int,
        seed: int,
        step: int | Int[Tensor, ""],
        *,
        jitter: bool,
        pixels: UInt8[Tensor, "b sp sq 3"] | None = None,
    ) -> Windows:
        """This process's share of `windows` random windows.

        Nothing waits for a GPU that holds the images, or is given the `pixels`, when `step` is on
        it. A window larger than the image is the image.

        Raises:
            ConfigError: when windows are so small that no pixel of theirs is sure to count, or
                fewer than the processes.
        """
        step = torch.as_tensor(step, device=self.device)
        everyone = self.places(windows, window_rays, seed, step)
        share = self._share(windows)
        mine, weight = everyone.of(share), None
        if self.ranks > 1:
            counted = self._counted(everyone)
            weight = self.ranks * counted[share].sum() / counted.sum()
        jittered = uniform(self._jitter_words(mine, share.start, seed, step)) if jitter else None
        points = self._points(mine, jittered)
        pixels = self.pixels(mine).to(self.device) if pixels is None else pixels
        return Windows(points, pixels, self._mask(mine), weight)

    def encoded(self, points: Float[Tensor, "b p q d"]) -> Float[Tensor, "b c p q"]:
        """The student's input at some points."""
        # The network multiplies channels-last tensors faster: 37 against 61 ms per step in bfloat16.
        return encode(points, self.spec.frequencies).permute(0, 3, 1, 2)

    def places(self, windows: int, window_rays: int, seed: int, step: Int[Tensor, ""]) -> Places:
        """Where the windows of all processes lie at a step, on the step's device."""
        p, q = min(window_rays, self.height), min(window_rays, self.width)
        self._check_window(p, q)
        numbers = torch.arange(windows, device=step.device)
        words = [random_words(seed, step, purpose, numbers) for purpose in (IMAGE, TOP, LEFT)]
        assert windows * len(self) < 1 << (63 - WORD_BITS)
        image = ((numbers << WORD_BITS) + words[0]) * len(self) // (windows << WORD_BITS)
        top, left = below(self.height - p + 1, words[1]), below(self.width - q + 1, words[2])
        return Places(image, top, left, p, q)

    def pixels(self, places: Places) -> UInt8[Tensor, "b sp sq 3"]:
        """The pixels of places in this process's images, where the images are."""
        s = self.spec.factor
        if isinstance(self.images, Tensor):
            rows = s * places.top[:, None] + torch.arange(s * places.p, device=self.device)
            columns = s * places.left[:, None] + torch.arange(s * places.q, device=self.device)
            which = (places.image - self.first)[:, None, None]
            return self.images[which, rows[:, :, None], columns[:, None, :]]
        height, width = s * places.p, s * places.q
        at = (x.tolist() for x in (places.image, places.top, places.left))
        crops = [
            self.images[i - self.first, s * y : s * y + height, s * x : s * x + width]
            for i, y, x in zip(*at, strict=True)
        ]
        return torch.from_numpy(np.stack(crops))

    def _share(self, windows: int) -> slice:
        """Which of all windows are this process's."""
        assert windows == self.windows or windows % self.ranks == 0
        return shared_out(windows, self.rank, self.ranks)

    def _check_window(self, p: int, q: int) -> None:
        s, halo = self.spec.factor, self.spec.halo_pixels
        if any(
            s * side <= 2 * halo and side < of for side, of in ((p, self.height), (q, self.width))
        ):
            raise ConfigError(
                f"windows of {max(p, q)} rays are all halo ({halo} pixels on each side)",
                where="distil.window_rays",
                remedy=f"choose at least {2 * halo // s + 1}",
            )

    def _points(
        self, places: Places, jittered: Float[Tensor, "b p q k"] | None
    ) -> Float[Tensor, "b p q d"]:
        rows = places.top[:, None] + torch.arange(places.p, device=self.device)
        columns = places.left[:, None] + torch.arange(places.q, device=self.device)
        directions = self.directions[rows[:, :, None], columns[:, None, :]]
        poses = self.poses[places.image][:, None, None]
        rays = rays_in_space(*world_rays(directions, poses), self.space)
        return points_along(*rays, self.space, self.spec.points, jitter=jittered)

    def _jitter_words(
        self, places: Places, first: int, seed: int, step: Int[Tensor, ""]
    ) -> Int[Tensor, "b p q k"]:
        shape = (len(places.top), places.p, places.q, self.spec.points)
        each = shape[1] * shape[2] * shape[3]
        numbers = torch.arange(first * each, (first + shape[0]) * each, device=self.device)
        return random_words(seed, step, JITTER, numbers).view(shape)

    def _mask(self, places: Places) -> Bool[Tensor, "b sp sq"]:
        s, halo = self.spec.factor, self.spec.halo_pixels

        def known(start: Tensor, length: int, size: int) -> Tensor:
            at = torch.arange(s * length, device=self.device)
            after_start = (at >= halo) | (start == 0)[:, None]
            return after_start & ((at < s * length - halo) | (start + length == size)[:, None])

        rows = known(places.top, places.p, self.height)
        columns = known(places.left, places.q, self.width)
        return rows[:, :, None] & columns[:, None, :]

    def _counted(self, places: Places) -> Int[Tensor, "b"]:
        """How many pixels the mask of each place holds."""
        s, halo = self.spec.factor, self.spec.halo_pixels

        def known(start: Tensor, length: int, size: int) -> Tensor:
            cut = (start != 0).long() + (start + length != size).long()
            return (s * length - halo * cut).clamp(min=0)

        rows = known(places.top, places.p, self.height)
        return rows * known(places.left, places.q, self.width)


def shared_out(windows: int, rank: int, ranks: int) -> slice:
    """Which of `windows` windows are process `rank`'s: as many as another's, or one more or less.

    Raises:
        ConfigError: when there are fewer windows than processes.
    """
    if windows < ranks:
        raise ConfigError(
            f"{windows} windows cannot be shared out to {ranks} processes",
            where="distil.windows",
            remedy=f"choose at least {ranks}, or start fewer processes",
        )
    return slice(rank * windows // ranks, (rank + 1) * windows // ranks)


class PixelPrefetch:
    """The pixels of one step after the other from the host's memory, read while the GPU works."""

    def __init__(self, pool: ImagePool, windows: int, window_rays: int, seed: int):
        self._pool, self._drawn = pool, (windows, window_rays, seed)
        self._reader = ThreadPoolExecutor(
            1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
        )
        self._next: tuple[int, Future[Tensor]] | None = None

    def pixels(self, step: int) -> UInt8[Tensor, "b sp sq 3"]:
        """This process's pixels of a step, in pinned memory; begins to read those of the next."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._reader.submit(self._read, step)
        result = self._next[1].result()
        self._next = step + 1, self._reader.submit(self._read, step + 1)
        return result

    def close(self) -> None:
        """End the reader."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Tensor:
        pool, (windows, window_rays, seed) = self._pool, self._drawn
        places = pool.places(windows, window_rays, seed, torch.tensor(step))
        return pool.pixels(places.of(pool._share(windows))).pin_memory()


def _fits_on_gpu(images: np.ndarray, device: torch.device) -> bool:
    return device.type == "cuda" and (
        images.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    )


def _on_gpu(images: np.ndarray, device: torch.device) -> Tensor:
    result = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for place, image in zip(result, images, strict=True):  # one by one: never all in host memory
        place.copy_(torch.from_numpy(np.array(image)))
    return result
