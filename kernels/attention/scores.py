"""What every attention kernel shares: the scores, and dropout's generator.

    s[i,j] = scale * q[i]·k[j];  softcap * tanh(s / softcap);  + bias[i,j];  - alibi * |i + shift - j|

Scores are kept in units of log 2, so that exp is one exp2; scale * log2(e) is folded into one multiplication. A feature
is a field of ``Call`` (problem.py), None where it is off: None is a constant to the compiler, and what it guards is no
code.

In the kernels b is a sequence, h a query head, i a query, j a key; a tile is [BLOCK_M queries, BLOCK_N keys].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import visible
from .tiles import load_pairs, number

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh, to 1e-7 absolutely; PRECISE: relatively too."""
    large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if PRECISE:
        z = x * x
        tail = -0.3333333271 + z * (0.1333321084 + z * (-0.0539298632 + z * (0.0214438829 + z * -0.0068822555)))
        return tl.where(z < 0.25, x + x * z * tail, large)
    else:
        return large


@triton.jit
def logits(qk, call, PRECISE: tl.constexpr):
    """Scaled and capped scores, in units of log 2."""
    if call.cap_in is None:
        return qk * (call.scale * LOG2E)
    else:
        return tanh(qk * call.cap_in, PRECISE) * call.cap_out


@triton.jit
def cap_slope(s, call):
    """What the cap makes of a gradient, from :func:`logits`' result: 1 - tanh^2."""
    t = s / call.cap_out
    return 1.0 - t * t


@triton.jit
def biased(s, call, b, h, i, j, i0, j0, tq, tk, shift, MASKED: tl.constexpr, PAST_END: tl.constexpr):
    """Scores with bias and slopes added; -inf where the pair is hidden, which only happens in MASKED tiles.
    PAST_END: whether keys past the last are to be hidden too."""
    if call.bias.ptr is not None:
        s += load_pairs(call.bias, b, h, i, j, i0, j0, tq, tk, 0.0).to(tl.float32) * LOG2E
    if call.alibi is not None:
        s -= tl.load(call.alibi + h) * LOG2E * tl.abs(i + shift - j).to(tl.float32)
    if MASKED:
        s = tl.where(visible(call, b, h, i, j, i0, j0, tq, tk, shift, PAST_END), s, float("-inf"))
    return s


@triton.jit
def kept(call, b, h, i, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights dropout keeps, [BLOCK_M, BLOCK_N], of queries i [BLOCK_M, 1] and keys from ``start`` on.

    Philox-4x32-10 under the key ``seed`` at the counter (j // 4, i, h, b), word j % 4: the same bit in every kernel.
    """
    seed = tl.load(call.seed)
    quad = start // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, quad + zero, i + zero, h + zero, b + zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_M, BLOCK_N])
    return words >= tl.cast(number(call.threshold), tl.uint32)
