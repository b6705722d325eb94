"""Up-sampling layers on rows of pixels: transposed convolutions and pixel shuffles.

The transposed convolutions have kernel 4, stride 2 and padding 1, or kernel 3 and stride 3. A 1x1
convolution with pixel shuffle by S is computed as a transposed convolution of kernel and stride S, but
with one bias per output phase.

Letters: a window is h x w input pixels, n windows are R = n h w rows of CI channels; an input pixel has
S x S output pixels of CO channels; K is the kernel's side, P its padding. Weights are [K, CI, K * CO],
that is ky, input channel, (kx, output channel), so one row of taps is one contiguous matrix.

No kernel unfolds its input in memory. The forward kernel multiplies, for each output phase (p, q), the
K/S x K/S input pixels that contribute. Both backward kernels read the K x K output pixels of an input
pixel in place, K * CO contiguous values at a time. Twin: `lightfield.student`'s layers on NCHW tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from train.kernels.availability import processors
from train.kernels.student.sums import add_to_sum

FORWARD_ROWS = 128
INPUT_ROWS = 128
WEIGHT_ROWS = 64
STAGES = 3
WEIGHT_PROGRAMS_PER_SM = 2


@triton.jit
def upsample_kernel(
    x_ptr,
    y_ptr,
    weights_ptr,
    weight_at,
    bias_at,
    rows,
    height,
    width,
    CI: tl.constexpr,
    CO: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    PHASE_BIAS: tl.constexpr,  # distance of the phases' biases; 0 for one common bias
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One output phase of y [n S h S w, CO] for a tile of input pixels of x [n h w, CI].

    Grid: [tiles of ROWS rows, S * S phases]. Twin: `nn.ConvTranspose2d`, or `nn.PixelShuffle` after a
    1x1 convolution.
    """
    TAPS: tl.constexpr = K // S
    p, q = tl.program_id(1) // S, tl.program_id(1) % S
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_at, y_at = r % width, (r // width) % height
    image = r // (width * height)
    k, co = tl.arange(0, CHUNK), tl.arange(0, CO)
    result = tl.zeros([ROWS, CO], tl.float32)
    for step in range(0, TAPS * TAPS * (CI // CHUNK)):
        tap, ci = step // (CI // CHUNK), (step % (CI // CHUNK)) * CHUNK
        a, b = tap // TAPS, tap % TAPS
        if TAPS == 2:
            dy, dx, ky, kx = p - 1 + a, q - 1 + b, 3 - p - 2 * a, 3 - q - 2 * b
        else:
            dy, dx, ky, kx = 0, 0, p, q
        inside = (r < rows) & (y_at + dy >= 0) & (y_at + dy < height)
        inside = inside & (x_at + dx >= 0) & (x_at + dx < width)
        source = (r + dy * width + dx) * CI + ci
        x = tl.load(x_ptr + source[:, None] + k[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(
            weights_ptr + weight_at + (ky * CI + ci + k[:, None]) * (K * CO) + kx * CO + co[None, :]
        )
        result = tl.dot(x, w, result, input_precision="ieee")
    bias_at += tl.program_id(1) * PHASE_BIAS
    result += tl.load(weights_ptr + bias_at + co).to(tl.float32)[None, :]
    target = ((image * S * height + S * y_at + p) * (S * width) + S * x_at + q) * CO
    tl.store(
        y_ptr + target[:, None] + co[None, :],
        result.to(y_ptr.dtype.element_ty),
        mask=r[:, None] < rows,
    )


@triton.jit
def _taps(
    dy_ptr, r, rows, height, width, ky, k, CO: tl.constexpr, S: tl.constexpr, K: tl.constexpr
):
    """Columns k of row ky of the output pixels [rows, K * CO] of input pixels r; zero outside."""
    P: tl.constexpr = (K - S) // 2
    x_at, y_at = r % width, (r // width) % height
    image = r // (width * height)
    y, x = S * y_at - P + ky, S * x_at - P
    column = x[:, None] + (k // CO)[None, :]
    inside = ((r < rows) & (y >= 0) & (y < S * height))[:, None]
    inside = inside & (column >= 0) & (column < S * width) & (k < K * CO)[None, :]
    source = ((image * S * height + y) * (S * width) + x) * CO
    return tl.load(dy_ptr + source[:, None] + k[None, :], mask=inside, other=0.0)


@triton.jit
def upsample_input_gradient_kernel(
    dy_ptr,
    dx_ptr,
    weights_ptr,
    weight_at,
    rows,
    height,
    width,
    CI: tl.constexpr,
    CO: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient dx [n h w, CI] of a tile of ROWS input pixels, from dy [n S h S w, CO].

    Twin: autograd through the up-sampling layer.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ci = tl.arange(0, CI)
    STEPS: tl.constexpr = K * CO // CHUNK
    result = tl.zeros([ROWS, CI], tl.float32)
    for step in range(0, K * STEPS):
        ky = step // STEPS
        k = (step % STEPS) * CHUNK + tl.arange(0, CHUNK)
        dy = _taps(dy_ptr, r, rows, height, width, ky, k, CO, S, K)
        w = tl.load(weights_ptr + weight_at + (ky * CI + ci[:, None]) * (K * CO) + k[None, :])
        result = tl.dot(dy, tl.trans(w), result, input_precision="ieee")
    tl.store(
        dx_ptr + r[:, None] * CI + ci[None, :],
        result.to(dx_ptr.dtype.element_ty),
        mask=r[:, None] < rows,
    )


@triton.jit
def upsample_weight_gradient_kernel(
    x_ptr,
    dy_ptr,
    gradients_ptr,  # int64 sums, laid out as the weights
    weight_at,
    rows,
    height,
    width,
    rows_per_program,
    CI: tl.constexpr,
    CO: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    TILE_CI: tl.constexpr,
    TILE_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weight gradient [K, CI, K * CO] from x and dy: a tile of input channels, one ky, some rows.

    Grid: [tiles of input channels, K, parts of the rows]. Twin: autograd through the layer.
    """
    ci = tl.program_id(0) * TILE_CI + tl.arange(0, TILE_CI)
    ky = tl.program_id(1)
    k = tl.arange(0, TILE_K)
    result = tl.zeros([TILE_CI, TILE_K], tl.float32)
    first = tl.program_id(2) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        x = tl.load(x_ptr + r[:, None] * CI + ci[None, :], mask=r[:, None] < rows, other=0.0)
        dy = _taps(dy_ptr, r, rows, height, width, ky, k, CO, S, K)
        result = tl.dot(tl.trans(x), dy, result, input_precision="ieee")
    add_to_sum(
        gradients_ptr + weight_at + (ky * CI + ci[:, None]) * (K * CO) + k[None, :],
        result,
        (k < K * CO)[None, :],
    )


def _chunk(width: int) -> int:
    """The largest power of two up to 64 that divides a width."""
    return min(64, width & -width)


def upsample(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    offsets: tuple[int, int],
    grid: tuple[int, int, int],
    s: int,
    k: int,
    *,
    shuffled: bool,
) -> None:
    """Write y [n S h S w, CO] from x [n h w, CI]; `grid` is (n, h, w), `offsets` those of W, b."""
    (n, height, width), (ci, co) = grid, (x.shape[1], y.shape[1])
    rows = n * height * width
    upsample_kernel[(triton.cdiv(rows, FORWARD_ROWS), s * s)](
        x, y, weights, *offsets, rows, height, width,
        CI=ci, CO=co, S=s, K=k, PHASE_BIAS=co if shuffled else 0,
        ROWS=FORWARD_ROWS, CHUNK=_chunk(ci),
        num_warps=8 if co > 64 else 4, num_stages=STAGES,
    )  # fmt: skip


def upsample_gradients(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    weights: Tensor,
    gradients: Tensor,
    weight_at: int,
    grid: tuple[int, int, int],
    s: int,
    k: int,
) -> None:
    """Write dx [n h w, CI] and add the weight gradient; the bias gradient (sum of dy) is not added."""
    (n, height, width), (ci, co) = grid, (x.shape[1], dy.shape[1])
    rows = n * height * width
    upsample_input_gradient_kernel[(triton.cdiv(rows, INPUT_ROWS),)](
        dy, dx, weights, weight_at, rows, height, width,
        CI=ci, CO=co, S=s, K=k, ROWS=INPUT_ROWS, CHUNK=_chunk(k * co),
        num_warps=8 if ci > 64 else 4, num_stages=STAGES,
    )  # fmt: skip
    tile_ci, tile_k = min(128, ci), triton.next_power_of_2(k * co)
    tiles = ci // tile_ci * k
    splits = max(1, WEIGHT_PROGRAMS_PER_SM * processors(x.device) // tiles)
    rows_per_program = WEIGHT_ROWS * triton.cdiv(triton.cdiv(rows, WEIGHT_ROWS), splits)
    upsample_weight_gradient_kernel[(ci // tile_ci, k, triton.cdiv(rows, rows_per_program))](
        x, dy, gradients, weight_at, rows, height, width, rows_per_program,
        CI=ci, CO=co, S=s, K=k, TILE_CI=tile_ci, TILE_K=tile_k, ROWS=WEIGHT_ROWS,
        num_warps=8 if tile_ci * tile_k > 8192 else 4, num_stages=STAGES,
    )  # fmt: skip
