"""Functions in fp32 that neither overflow nor need a device library, and the product of two tiles.

(The interpreter has no device libraries, and the same code should run in both.)
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to a few ulp over the whole range."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """To a few ulp, near zero too, where 2 sigmoid(2x) - 1 loses its digits."""
    z = x * x
    # Chebyshev fit of (tanh(x) / x - 1) / x^2 in x^2 on |x| < 0.5, relative error 6e-8
    p = -0.3333331 + z * (0.13330513 + z * (-0.05339105 + z * 0.01799922))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, x + x * z * p, tl.where(x < 0, -large, large))


@triton.jit
def tanh_absolute(x):
    """To 1e-7 absolutely, in half the instructions: for terms of a sum."""
    return 1.0 - 2.0 / (1.0 + tl.exp(tl.minimum(2.0 * x, 80.0)))


@triton.jit
def uniform(x):
    """An int32 that all threads have alike, so that the assembler knows it too: a loop bound that it takes for
    different ones would keep what depends on the loop out of the registers that a warp shares."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], tl.int32, True, 1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if INTERPRETED:  # its dot takes the bits of a bf16 for an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b, in two steps: of products that go on with each other's sums, all but the last are given to warps in
    rows alone, some of them twice, and with more registers. A mere addition would be made one product again."""
    part = dot(a, b, tl.zeros_like(acc), PRECISION)
    return tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)
