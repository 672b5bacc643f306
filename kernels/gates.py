"""What each cell does with its gates at one step, forward and backward, elementwise on fp32 tiles.

``x_*`` are a gate's pre-activation; a ``d`` before a name is the gradient of the loss with respect to it, of a gate's
letter with respect to its pre-activation. The products with W stay outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

# fmt: off
# Cells have tuples of different lengths.
# mypy: disable-error-code="assignment"


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # a shut gate is shut: exp overflows to inf, and the quotient is 0


@triton.jit
def tanh(x):
    """By exp(-2|x|), which cannot overflow; near 0, where that loses digits, by the series (next term < 6e-8 x)."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885))))
    return tl.where(size < 0.3, near, tl.where(x < 0, -far, far))


# RNN: h = phi(x)
@triton.jit
def rnn_forward(x, RELU: tl.constexpr):
    if RELU:
        h = tl.where(x < 0, 0.0, x)  # a NaN passes
    else:
        h = tanh(x)
    return h


@triton.jit
def rnn_backward(h, dh, RELU: tl.constexpr):
    if RELU:
        d = tl.where(h <= 0, 0.0, dh)  # NaN propagates
    else:
        d = dh * (1.0 - h * h)
    return d


# LSTM: c = f c_prev + i g, h = o tanh(c), with i, f, o = sigmoid(x_*) and g = tanh(x_g); coupled, i, g, o: f = 1 - i.
# Gates, their pre-activations and gradients come in tuples, as W has them and as the tape keeps them.
@triton.jit
def lstm_forward(x, c_prev, CELL: tl.constexpr):
    """The gates, c and h."""
    if CELL == "lstm_coupled":
        i, g, o = sigmoid(x[0]), tanh(x[1]), sigmoid(x[2])
        f = 1.0 - i
        gates = (i, g, o)
    else:
        i, f, g, o = sigmoid(x[0]), sigmoid(x[1]), tanh(x[2]), sigmoid(x[3])
        gates = (i, f, g, o)
    c = f * c_prev + i * g
    return gates, c, o * tanh(c)


@triton.jit
def lstm_state(gates, c_prev, CELL: tl.constexpr):
    """The c of these gates, as :func:`lstm_forward` made it."""
    if CELL == "lstm_coupled":
        c = (1.0 - gates[0]) * c_prev + gates[0] * gates[1]
    else:
        c = gates[1] * c_prev + gates[0] * gates[2]
    return c


@triton.jit
def lstm_backward(gates, c_prev, c, dh, dc, CELL: tl.constexpr):
    """``dc`` comes in as the gradient of c_t from later steps; the last result is that of c_prev."""
    if CELL == "lstm_coupled":
        i, g, o = gates[0], gates[1], gates[2]
        f = 1.0 - i
    else:
        i, f, g, o = gates[0], gates[1], gates[2], gates[3]
    squashed = tanh(c)
    dc = dc + dh * o * (1.0 - squashed * squashed)
    if CELL == "lstm_coupled":
        d = (dc * (g - c_prev) * i * f, dc * i * (1.0 - g * g), dh * squashed * o * (1.0 - o))
    else:
        di = dc * g * i * (1.0 - i)
        df = dc * c_prev * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        do = dh * squashed * o * (1.0 - o)
        d = (di, df, dg, do)
    return d, dc * f


# GRU: h = z h_prev + (1 - z) n, with r, z = sigmoid(x_*), and n = tanh(x_n + r q), q = W_hn h_prev + b_hn (reset after
# the product) or n = tanh(x_n + W_hn q + b_hn), q = r h_prev (reset before it).
@triton.jit
def gru_blend(z, n, h_prev):
    return z * h_prev + (1.0 - z) * n


@triton.jit
def gru_backward_blend(z, n, h_prev, dh):
    """Gradients of z and n, which do not depend on where the reset stands."""
    return dh * (h_prev - n) * z * (1.0 - z), dh * (1.0 - z) * (1.0 - n * n)


@triton.jit
def gru_backward_reset(r, other, dproduct):
    """dr from the gradient of what r multiplies: ``other`` is q (reset after) or h_prev (before)."""
    return dproduct * other * r * (1.0 - r)


# Zoneout: of a new state and the old one; a share of 1 or 0 gives one of them exactly.
@triton.jit
def zoneout(old, new, share):
    share = share.to(tl.float32)  # not before: in x's dtype it takes half of the registers
    return share * old + (1.0 - share) * new
