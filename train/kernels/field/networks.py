"""Density and color networks of the teacher over tiles of samples, and the kernels built from them.

Letters: B samples of a tile, P = 16 padded levels, H hidden width, h the geometry features; M, R and L
as in `train.kernels.field.radiance_field`. The weights are one flat float16 copy of the float32
masters: each matrix [out, in] as in nn.Linear, in the order density in, density out, color in, color
middle, color out. Operands are float16, sums float32. A product with interleaved inputs is split into
two products instead: x @ W = x[0::2] @ W[0::2] + x[1::2] @ W[1::2]; the same holds for
[harmonics, h]. Twin: `train.radiance_field.RadianceField`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from train.kernels.field.lattice import interpolate, packed, unpacked

GEOMETRY_FEATURES = 16
HARMONICS = 16

LARGEST_EXPONENT = tl.constexpr(15.0)
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def transposed_weight(
    weights,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    READ_ROWS: tl.constexpr,
    READ_COLUMNS: tl.constexpr,
):
    """Tile [ROWS = in, COLUMNS = out] of a weight [out, in], with every STEP-th input."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < READ_ROWS) & (column < READ_COLUMNS)
    return tl.load(weights + column * STRIDE + row * STEP, mask=mask, other=0.0)


@triton.jit
def density_weights(weights, LEVELS: tl.constexpr, HIDDEN: tl.constexpr):
    """Weights in_even [P, H], in_odd [P, H] and out [H, 16] of the density network."""
    even = transposed_weight(weights, 16, 2 * LEVELS, HIDDEN, 2, LEVELS, HIDDEN)
    odd = transposed_weight(weights + 1, 16, 2 * LEVELS, HIDDEN, 2, LEVELS, HIDDEN)
    out = transposed_weight(weights + 2 * LEVELS * HIDDEN, HIDDEN, HIDDEN, 16, 1, HIDDEN, 16)
    return even, odd, out


@triton.jit
def color_weights(weights, LEVELS: tl.constexpr, HIDDEN: tl.constexpr):
    """Weights in_harmonics [16, H], in_geometry [16, H], middle [H, H] and out [H, 16] (3 used)."""
    start = weights + (2 * LEVELS + 16) * HIDDEN
    in_harmonics = transposed_weight(start, 16, 32, HIDDEN, 1, 16, HIDDEN)
    in_geometry = transposed_weight(start + 16, 16, 32, HIDDEN, 1, 16, HIDDEN)
    start += 32 * HIDDEN
    middle = transposed_weight(start, HIDDEN, HIDDEN, HIDDEN, 1, HIDDEN, HIDDEN)
    out = transposed_weight(start + HIDDEN * HIDDEN, HIDDEN, HIDDEN, 16, 1, HIDDEN, 3)
    return in_harmonics, in_geometry, middle, out


@triton.jit
def rectified(x):
    """ReLU of x as float16, clamped to its range."""
    return tl.minimum(tl.maximum(x, 0.0), LARGEST_HALF).to(tl.float16)


@triton.jit
def narrowed(x):
    """x as float16, clamped to its range."""
    return tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)


@triton.jit
def density_network(f0, f1, w_in_even, w_in_odd, w_out):
    """Geometry features [B, 16] (float32) from the features f0, f1 [B, P] of all levels."""
    hidden = rectified(tl.dot(f1, w_in_odd, tl.dot(f0, w_in_even)))
    return tl.dot(hidden, w_out)


@triton.jit
def color_network(h, harmonics, w_in_harmonics, w_in_geometry, w_middle, w_out):
    """Colors [B, 16] (float32; columns 0 to 2 are used) from float16 h and harmonics [B, 16]."""
    first = rectified(tl.dot(h, w_in_geometry, tl.dot(harmonics, w_in_harmonics)))
    second = rectified(tl.dot(first, w_middle))
    return tl.sigmoid(tl.dot(second, w_out))


@triton.jit
def column_zero(tile, COLUMNS: tl.constexpr):
    """Column 0 of a tile as a vector."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == 0, tile, 0.0), axis=1)


@triton.jit
def density_of(h0, initial_density):
    """Density initial_density * exp(h0), with the exponent clamped to +-15."""
    bounded = tl.minimum(tl.maximum(h0, -LARGEST_EXPONENT), LARGEST_EXPONENT)
    return initial_density * tl.exp(bounded)


@triton.jit
def _sample_features(features, sample, live, capacity, LEVELS: tl.constexpr):
    """Features 0 and 1 of a block of samples, [B, P] each, from features [L, M] (int32 pairs)."""
    level = tl.arange(0, 16)[:, None]
    pair = tl.load(
        features + level.to(tl.int64) * capacity + sample[None, :],
        mask=(level < LEVELS) & live[None, :],
        other=0,
    )
    feature_0, feature_1 = unpacked(pair)
    return tl.trans(feature_0), tl.trans(feature_1)


@triton.jit
def _ray_harmonics(harmonics, ray, sample, live):
    """Harmonics [B, 16] of the rays of a block of samples, from harmonics [R, 16] and ray [M]."""
    row = tl.load(ray + sample, mask=live, other=0)[:, None]
    return tl.load(harmonics + row * 16 + tl.arange(0, 16)[None, :], mask=live[:, None], other=0.0)


@triton.jit
def shade_kernel(features, harmonics, ray, weights, initial_density, count, density, color,
                 capacity, LEVELS: tl.constexpr, HIDDEN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Density [M] and color [3, M] of the used samples, from features [L, M] (int32 pairs).

    `harmonics` [R, 16] belong to rays, `ray` [M] is each sample's ray. Programs stride over blocks of
    BLOCK samples. Twin: `RadianceField.geometry` and `RadianceField.color`.
    """
    used = tl.load(count)
    initial = tl.load(initial_density)
    in_even, in_odd, density_out = density_weights(weights, LEVELS, HIDDEN)
    in_harmonics, in_geometry, middle, color_out = color_weights(weights, LEVELS, HIDDEN)
    column = tl.arange(0, 16)[None, :]
    start = tl.program_id(0) * BLOCK
    while start < used:
        sample = start + tl.arange(0, BLOCK)
        live = sample < used
        f0, f1 = _sample_features(features, sample, live, capacity, LEVELS)
        directions = _ray_harmonics(harmonics, ray, sample, live)
        h = density_network(f0, f1, in_even, in_odd, density_out)
        rgb = color_network(narrowed(h), directions, in_harmonics, in_geometry, middle, color_out)
        tl.store(
            density + sample[:, None] + 0 * column,
            density_of(h, initial),
            mask=live[:, None] & (column == 0),
        )
        tl.store(
            color + column * capacity + sample[:, None], rgb, mask=live[:, None] & (column < 3)
        )
        start += tl.num_programs(0) * BLOCK


@triton.jit
def _finite(x):
    """x, or 0 where x is not finite, so that one bad sample cannot spoil the weights."""
    return tl.where(tl.abs(x) <= 3e38, x, 0.0)


@triton.jit
def _through_rectifier(gradient, activation):
    """Gradient by the input of ReLU, from the gradient by its output, as float16."""
    return tl.where(activation > 0, narrowed(gradient), 0.0).to(tl.float16)


@triton.jit
def shade_backward_kernel(features, harmonics, ray, weights, initial_density, count,
                          density_gradient, color_gradient, feature_gradient, weight_gradient,
                          capacity, LEVELS: tl.constexpr, HIDDEN: tl.constexpr,
                          BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of the features [L, M] (int32 pairs) and of the flat weights.

    Inputs are those of `shade_kernel`, density_gradient [M] and color_gradient [3, M]. The kernel
    recomputes activations. A program sums its weight gradients in registers and adds them once at the
    end. Products are arranged so that the long side, which tensor cores need, is the hidden width and
    not 16. Twin: autograd through `RadianceField`.
    """
    used = tl.load(count)
    initial = tl.load(initial_density)
    in_even, in_odd, density_out = density_weights(weights, LEVELS, HIDDEN)
    in_harmonics, in_geometry, middle, color_out = color_weights(weights, LEVELS, HIDDEN)
    column = tl.arange(0, 16)[None, :]
    level = tl.arange(0, 16)[:, None]
    sum_even = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    sum_odd = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    sum_density_out = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    sum_harmonics = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    sum_geometry = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    sum_middle = tl.zeros((HIDDEN, HIDDEN), dtype=tl.float32)
    sum_color_out = tl.zeros((HIDDEN, 16), dtype=tl.float32)
    start = tl.program_id(0) * BLOCK
    while start < used:
        sample = start + tl.arange(0, BLOCK)
        live = sample < used
        f0, f1 = _sample_features(features, sample, live, capacity, LEVELS)
        directions = _ray_harmonics(harmonics, ray, sample, live)
        hidden = rectified(tl.dot(f1, in_odd, tl.dot(f0, in_even)))
        h = tl.dot(hidden, density_out)
        h_half = narrowed(h)
        first = rectified(tl.dot(h_half, in_geometry, tl.dot(directions, in_harmonics)))
        second = rectified(tl.dot(first, middle))
        rgb = tl.sigmoid(tl.dot(second, color_out))

        by_rgb = tl.load(
            color_gradient + column * capacity + sample[:, None],
            mask=live[:, None] & (column < 3),
            other=0.0,
        )
        by_logit = narrowed(_finite(by_rgb) * rgb * (1 - rgb))
        sum_color_out = tl.dot(tl.trans(second), by_logit, sum_color_out)
        by_second = _through_rectifier(tl.dot(by_logit, tl.trans(color_out)), second)
        sum_middle = tl.dot(tl.trans(by_second), first, sum_middle)
        by_first = _through_rectifier(tl.dot(by_second, tl.trans(middle)), first)
        sum_harmonics = tl.dot(tl.trans(by_first), directions, sum_harmonics)
        sum_geometry = tl.dot(tl.trans(by_first), h_half, sum_geometry)

        by_density = tl.load(density_gradient + sample, mask=live, other=0.0)
        by_exponent = _finite(by_density)[:, None] * density_of(h, initial)
        by_h = tl.dot(by_first, tl.trans(in_geometry)) + tl.where(column == 0, by_exponent, 0.0)
        by_h_half = narrowed(by_h)
        sum_density_out = tl.dot(tl.trans(hidden), by_h_half, sum_density_out)
        by_hidden = _through_rectifier(tl.dot(by_h_half, tl.trans(density_out)), hidden)
        sum_even = tl.dot(tl.trans(by_hidden), f0, sum_even)
        sum_odd = tl.dot(tl.trans(by_hidden), f1, sum_odd)
        by_f0 = narrowed(tl.dot(by_hidden, tl.trans(in_even)))
        by_f1 = narrowed(tl.dot(by_hidden, tl.trans(in_odd)))
        tl.store(
            feature_gradient + level.to(tl.int64) * capacity + sample[None, :],
            tl.trans(packed(by_f0, by_f1)),
            mask=(level < LEVELS) & live[None, :],
        )
        start += tl.num_programs(0) * BLOCK

    out = tl.arange(0, HIDDEN)[:, None]
    wide = tl.arange(0, HIDDEN)[None, :]
    target = weight_gradient + out * (2 * LEVELS) + 2 * column
    tl.atomic_add(target, sum_even, mask=(out >= 0) & (column < LEVELS), sem="relaxed")
    tl.atomic_add(target + 1, sum_odd, mask=(out >= 0) & (column < LEVELS), sem="relaxed")
    target = weight_gradient + 2 * LEVELS * HIDDEN
    tl.atomic_add(target + column * HIDDEN + out, sum_density_out, sem="relaxed")
    target += 16 * HIDDEN
    tl.atomic_add(target + out * 32 + column, sum_harmonics, sem="relaxed")
    tl.atomic_add(target + out * 32 + 16 + column, sum_geometry, sem="relaxed")
    target += 32 * HIDDEN
    tl.atomic_add(target + out * HIDDEN + wide, sum_middle, sem="relaxed")
    target += HIDDEN * HIDDEN
    tl.atomic_add(
        target + column * HIDDEN + out, sum_color_out, mask=(out >= 0) & (column < 3), sem="relaxed"
    )


@triton.jit
def density_kernel(points, table, numbers, weights, initial_density, count, density, capacity,
                   LEVELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Density [M] at the used points [3, M]: hash grid and density network in one kernel.

    `table` is int32 pairs, `numbers` are `DeviceLevels.numbers`. Twin: `RadianceField.density`.
    """
    used = tl.load(count)
    initial = tl.load(initial_density)
    in_even, in_odd, out = density_weights(weights, LEVELS, HIDDEN)
    start = tl.program_id(0) * BLOCK
    while start < used:
        sample = start + tl.arange(0, BLOCK)
        live = sample < used
        x = tl.load(points + sample, mask=live, other=0.0)
        y = tl.load(points + capacity + sample, mask=live, other=0.0)
        z = tl.load(points + 2 * capacity + sample, mask=live, other=0.0)
        f0, f1 = interpolate(table, numbers, x, y, z, live, 16)
        h = density_network(f0, f1, in_even, in_odd, out)
        tl.store(density + sample, density_of(column_zero(h, 16), initial), mask=live)
        start += tl.num_programs(0) * BLOCK
