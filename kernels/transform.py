"""What becomes of a logit: scale and cap, and its exponential once the maximum is subtracted."""

import triton
import triton.language as tl

from .row_access import elements_of, tile_columns

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_of(difference):
    # FMUL and MUFU.EX2; tl.exp takes five instructions
    return tl.exp2(difference * LOG2E)


@triton.jit
def finite(difference):
    # Of a logit and its maximum: where exp of it is 0 in any dtype, 0 times it has to be 0 too, and
    # 0 times its product with an upstream gradient, which would overflow at the lowest float. NaN
    # stays, so that exp of the result is exp of the difference.
    return tl.maximum(difference, -2000.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def transform_of(
    logit_scale, softcap, DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """What happens to the logits first: (), (scale,) or (scale, softcap). A scale before a cap is
    logit_scale / softcap."""
    if HAS_SOFTCAP:
        return (tl.full([], logit_scale, DTYPE), tl.full([], softcap, DTYPE))
    elif HAS_SCALE:
        return (tl.full([], logit_scale, DTYPE),)
    else:
        return ()


@triton.jit
def transformed(x, transform):
    """(x scaled and capped, the derivative of tanh there, 1 without a cap).

    -inf becomes a number under a cap, and +inf under a negative scale: what masks lanes with -inf
    does so afterwards.
    """
    slope = tl.full([], 1.0, x.dtype)
    if len(transform) > 0:
        x = x * transform[0]
    if len(transform) > 1:
        x, slope = tanh(x)
        x *= transform[1]
    return x, slope


@triton.jit
def derivative_factor(transform, DTYPE: tl.constexpr):
    """The derivative of `transformed`, but for its slope."""
    factor = tl.full([], 1.0, DTYPE)
    if len(transform) > 0:
        factor *= transform[0]
    if len(transform) > 1:
        factor *= transform[1]
    return factor


@triton.jit
def tanh(x):
    """(tanh(x), its derivative), each to a few eps of itself; infinities are 1 and -1.

    One division serves both: up to 0.4 of seven levels of Lambert's continued fraction, whose
    terms have one sign, beyond it of (1 - e) / (1 + e) with e = exp(-2 |x|), where 1 - tanh**2
    would cancel.
    """
    size = tl.abs(x)
    e = exp_of(-2.0 * size)
    square = x * x
    is_small = size < 0.4
    top = size * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    bottom = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    bottom = tl.where(is_small, bottom, 1.0 + e)
    result = tl.where(is_small, top, 1.0 - e) / bottom
    slope = tl.where(is_small, 1.0 - result * result, 4.0 * e / (bottom * bottom))
    return tl.where(x < 0.0, -result, result), slope


@triton.jit
def logits_of(
    tile, start, size, transform, IN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The transformed elements of a tile of `load_tile`; -inf from column `size` on, if given."""
    x, _ = transformed(elements_of(tile, IN, DTYPE), transform)
    if len(transform) > 0 and size is not None:
        _, first = tile_columns(BLOCK_V, 128 // IN.primitive_bitwidth)
        x = tl.where(start + first < size, x, float("-inf"))
    return x
