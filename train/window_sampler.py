"""Sampler of random windows of posed images, on which students train.

Letters: an image has h x w rays and sh x sw pixels; a window is p x q rays inside one image. The outer
`StudentSpec.halo_pixels` pixels on each side of a window depend on rays outside it, except on a side
that is a side of the image. These pixels are excluded from the loss, so every pixel in the loss equals
the student's pixel for the whole image.

A draw is a function of (seed, step, window) alone. Window i of W shows image floor((i + u) n / W) of n,
with u uniform in [0, 1). So all images are equally likely, the windows of a step are spread evenly over
the images, and the about W / N consecutive windows of one of N ranks show only about n / N images. The
windows are the same for any number of ranks. If N does not divide W, some ranks draw one window more
than others, and a weight corrects the mean over the ranks.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightfield.encoding import encode
from lightfield.errors import ConfigError
from lightfield.light_field import ray_grid
from lightfield.rays import camera_directions, points_along, rays_in_space, world_rays
from lightfield.student import StudentSpec
from train.counter_rng import WORD_BITS, below, random_words, uniform
from train.distributed import ALONE, Ranks
from train.posed_images import PosedImages, window_shard

GPU_MEMORY_FRACTION = 0.7
"""Fraction of the GPU's free memory that images may take; larger sets stay in host memory."""
IMAGE, TOP, LEFT, JITTER = range(4)
"""Purposes of random words."""


@dataclass(frozen=True)
class WindowPositions:
    """Positions of windows of p x q rays: image in the whole set, and first row and column in rays."""

    image: Int[Tensor, "b"]
    top: Int[Tensor, "b"]
    left: Int[Tensor, "b"]
    p: int
    q: int

    def select(self, windows: slice) -> WindowPositions:
        """The positions of some of the windows."""
        image, top, left = (x[windows] for x in (self.image, self.top, self.left))
        return WindowPositions(image, top, left, self.p, self.q)


class Windows(NamedTuple):
    """This rank's training data of one step."""

    points: Float[Tensor, "b p q d"]
    """Points along the rays, before the encoding."""
    pixels: UInt8[Tensor, "b sp sq 3"]
    mask: Bool[Tensor, "b sp sq"]
    """Pixels in the loss."""
    weight: Float[Tensor, ""] | None
    """World size times this rank's fraction of all pixels in the loss; None means 1."""


class WindowSampler:
    """Sampler of random windows of posed images, with their rays.

    Images stay uint8. They stay where they are (for example in a memory map), unless they fit into the
    GPU's memory. A rank holds its shard (`PosedImages.shard`) and draws its windows of each step. Steps
    have `windows` windows, or a multiple of the ranks.
    """

    def __init__(
        self,
        images: PosedImages,
        spec: StudentSpec,
        *,
        device: torch.device,
        ranks: Ranks = ALONE,
        windows: int | None = None,
    ):
        rays = ray_grid(images.intrinsics, spec)
        self.spec, self.space, self.device = spec, images.space, device
        self.ranks, self.windows = ranks, windows
        self.height, self.width = rays.height, rays.width
        self.poses = torch.from_numpy(np.array(images.poses)).to(device)
        self.directions = camera_directions(rays, device=device)
        shard = images.shard(ranks, windows)
        self.first = shard.first
        self.images: np.ndarray | Tensor = shard.images
        if isinstance(shard.images, Tensor):
            assert shard.images.device == self.poses.device
        elif _fits_on_gpu(shard.images, device):
            self.images = _on_gpu(shard.images, device)

    def __len__(self) -> int:
        """Images of the whole set."""
        return len(self.poses)

    @property
    def reads_host(self) -> bool:
        """Whether pixels are copied from host memory to the GPU, which no CUDA graph can contain."""
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
        """This rank's windows of the `windows` random windows of a step.

        On a GPU the call does not synchronize if `step` is on the GPU and either the images are there or
        `pixels` are given. A window larger than the image is the image.

        Raises:
            ConfigError: when windows are so small that the loss could have no pixels, or when there are
                fewer windows than ranks.
        """
        step = torch.as_tensor(step, device=self.device)
        of_all_ranks = self.positions(windows, window_rays, seed, step)
        shard = self.shard(windows)
        positions, weight = of_all_ranks.select(shard), None
        if self.ranks.world_size > 1:
            counts = self._pixels_in_loss(of_all_ranks)
            weight = self.ranks.world_size * counts[shard].sum() / counts.sum()
        jittered = None
        if jitter:
            jittered = uniform(self._jitter_words(positions, shard.start, seed, step))
        points = self._points(positions, jittered)
        pixels = self.pixels(positions).to(self.device) if pixels is None else pixels
        return Windows(points, pixels, self._mask(positions), weight)

    def encoded(self, points: Float[Tensor, "b p q d"]) -> Float[Tensor, "b c p q"]:
        """The student's input for points along rays."""
        # The network is faster on channels-last tensors: 37 ms per step in bfloat16 instead of 61 ms.
        return encode(points, self.spec.frequencies).permute(0, 3, 1, 2)

    def positions(
        self, windows: int, window_rays: int, seed: int, step: Int[Tensor, ""]
    ) -> WindowPositions:
        """Positions of the windows of all ranks at a step, on the step's device."""
        p, q = min(window_rays, self.height), min(window_rays, self.width)
        self._check_window(p, q)
        numbers = torch.arange(windows, device=step.device)
        words = [random_words(seed, step, purpose, numbers) for purpose in (IMAGE, TOP, LEFT)]
        assert windows * len(self) < 1 << (63 - WORD_BITS)
        image = ((numbers << WORD_BITS) + words[0]) * len(self) // (windows << WORD_BITS)
        top, left = below(self.height - p + 1, words[1]), below(self.width - q + 1, words[2])
        return WindowPositions(image, top, left, p, q)

    def pixels(self, positions: WindowPositions) -> UInt8[Tensor, "b sp sq 3"]:
        """The pixels of windows in this rank's images, in the memory of the images."""
        s = self.spec.factor
        if isinstance(self.images, Tensor):
            rows = s * positions.top[:, None] + torch.arange(s * positions.p, device=self.device)
            columns = s * positions.left[:, None] + torch.arange(
                s * positions.q, device=self.device
            )
            which = (positions.image - self.first)[:, None, None]
            return self.images[which, rows[:, :, None], columns[:, None, :]]
        height, width = s * positions.p, s * positions.q
        at = (x.tolist() for x in (positions.image, positions.top, positions.left))
        crops = [
            self.images[i - self.first, s * y : s * y + height, s * x : s * x + width]
            for i, y, x in zip(*at, strict=True)
        ]
        return torch.from_numpy(np.stack(crops))

    def shard(self, windows: int) -> slice:
        """This rank's windows, of a step's `windows`."""
        assert windows == self.windows or windows % self.ranks.world_size == 0
        return window_shard(windows, self.ranks)

    def _check_window(self, p: int, q: int) -> None:
        s, halo = self.spec.factor, self.spec.halo_pixels
        sides = ((p, self.height), (q, self.width))
        if any(s * side <= 2 * halo and side < size for side, size in sides):
            raise ConfigError(
                f"windows of {max(p, q)} rays consist of halo only ({halo} pixels on each side)",
                where="distill.window_rays",
                remedy=f"choose at least {2 * halo // s + 1}",
            )

    def _points(
        self, positions: WindowPositions, jittered: Float[Tensor, "b p q k"] | None
    ) -> Float[Tensor, "b p q d"]:
        rows = positions.top[:, None] + torch.arange(positions.p, device=self.device)
        columns = positions.left[:, None] + torch.arange(positions.q, device=self.device)
        directions = self.directions[rows[:, :, None], columns[:, None, :]]
        poses = self.poses[positions.image][:, None, None]
        rays = rays_in_space(*world_rays(directions, poses), self.space)
        return points_along(*rays, self.space, self.spec.points, jitter=jittered)

    def _jitter_words(
        self, positions: WindowPositions, first: int, seed: int, step: Int[Tensor, ""]
    ) -> Int[Tensor, "b p q k"]:
        shape = (len(positions.top), positions.p, positions.q, self.spec.points)
        each = shape[1] * shape[2] * shape[3]
        numbers = torch.arange(first * each, (first + shape[0]) * each, device=self.device)
        return random_words(seed, step, JITTER, numbers).view(shape)

    def _mask(self, positions: WindowPositions) -> Bool[Tensor, "b sp sq"]:
        s, halo = self.spec.factor, self.spec.halo_pixels

        def known(start: Tensor, length: int, size: int) -> Tensor:
            at = torch.arange(s * length, device=self.device)
            after_start = (at >= halo) | (start == 0)[:, None]
            return after_start & ((at < s * length - halo) | (start + length == size)[:, None])

        rows = known(positions.top, positions.p, self.height)
        columns = known(positions.left, positions.q, self.width)
        return rows[:, :, None] & columns[:, None, :]

    def _pixels_in_loss(self, positions: WindowPositions) -> Int[Tensor, "b"]:
        """Number of pixels in the mask of each window."""
        s, halo = self.spec.factor, self.spec.halo_pixels

        def known(start: Tensor, length: int, size: int) -> Tensor:
            cut = (start != 0).long() + (start + length != size).long()
            return (s * length - halo * cut).clamp(min=0)

        rows = known(positions.top, positions.p, self.height)
        return rows * known(positions.left, positions.q, self.width)


class PixelPrefetch:
    """Reader of the pixels of consecutive steps from host memory, one step ahead of the GPU."""

    def __init__(self, sampler: WindowSampler, windows: int, window_rays: int, seed: int):
        self._sampler, self._draw_settings = sampler, (windows, window_rays, seed)
        self._reader = ThreadPoolExecutor(
            1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
        )
        self._next: tuple[int, Future[Tensor]] | None = None

    def pixels(self, step: int) -> UInt8[Tensor, "b sp sq 3"]:
        """This rank's pixels of a step, in pinned memory; starts reading the next step's pixels."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._reader.submit(self._read, step)
        result = self._next[1].result()
        self._next = step + 1, self._reader.submit(self._read, step + 1)
        return result

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Tensor:
        sampler, (windows, window_rays, seed) = self._sampler, self._draw_settings
        positions = sampler.positions(windows, window_rays, seed, torch.tensor(step))
        return sampler.pixels(positions.select(sampler.shard(windows))).pin_memory()


def _fits_on_gpu(images: np.ndarray, device: torch.device) -> bool:
    return device.type == "cuda" and (
        images.nbytes <= GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    )


def _on_gpu(images: np.ndarray, device: torch.device) -> Tensor:
    result = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for slot, image in zip(result, images, strict=True):  # one by one, to need little host memory
        slot.copy_(torch.from_numpy(np.array(image)))
    return result
