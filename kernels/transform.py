"""What becomes of a logit: scale and cap, and its exponential once the maximum is subtracted."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .row_access import elements_of, tile_columns

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    if len(transform) > 1:
        x, slope = capped(x, transform[0], transform[1])
    elif len(transform) > 0:
        x = x * transform[0]
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
def capped(x, scale, cap):
    """(cap * tanh(scale * x), the derivative of tanh there), each to a few eps of itself."""
    if x.dtype == tl.float64:
        result, slope = tanh(x * scale)
        return result * cap, slope
    else:
        return capped_float32(x, scale, cap)


@triton.jit
def capped_float32(x, scale, cap):
    """`capped`, where 13 instructions give the result and 2 more the slope: `tanh` takes twice as
    many.

    With a = 2 * scale * x in base 2 and r = 1 / (1 + 2**|a|), tanh is 1 - 2 r and its derivative
    4 r (1 - r). The former cancels for small a: up to scale * x = 0.4 it is a polynomial in a * a,
    whose relative error is 1 eps at most (the least maximum; its first coefficient is exact). What
    depends on scale and cap alone leaves the loops.
    """
    a = x * (scale * (2.0 * LOG2E))
    square = a * a
    first, third = cap * (0.5 * LN2), cap * (0.5 * LN2 * -0.0400360082)
    fifth, seventh = cap * (0.5 * LN2 * 0.00191558924), cap * (0.5 * LN2 * -8.28224581e-5)
    small = a * (first + square * (third + square * (fifth + square * seventh)))
    rest = reciprocal(1.0 + tl.exp2(tl.abs(a)))
    large = cap - (2.0 * cap) * rest
    sign = a.to(tl.int32, bitcast=True) & -2147483648
    large = (large.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    rest4 = 4.0 * rest
    return tl.where(tl.abs(a) < 1.15415603, small, large), rest4 - rest4 * rest


@triton.jit
def reciprocal(x):
    """1 / x of a float32 from 1 to infinity, 1 ulp off at most."""
    if not IS_INTERPRETED and is_cuda():
        # one instruction; a division takes nine, most of them for what x is not
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


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
