"""RNN, GRU and LSTM over stacks of layers, and the cells, as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastseq import checks, ops
from fastseq.recurrent.call import RecurrentCall
from fastseq.recurrent.run import run


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    state_mask: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    recompute: bool = False,
    norm: str | None = None,
    norm_weights: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman RNN, h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh); Elman 1990.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[T, I]``; float64, float32, bfloat16 or float16.
        hx: ``[num_layers * directions, B, H]`` (no B when unbatched), or None for zeros.
        weights: flat, as ``torch.nn.RNN._flat_weights``: a layer and direction at a time w_ih ``[H, I]``,
            w_hh ``[H, H]``, and with ``has_biases`` b_ih ``[H]``, b_hh ``[H]``.
        nonlinearity: phi, ``"tanh"`` or ``"relu"``.
        lengths: int ``[B]``: from step ``lengths[b]`` on the output is 0 and the state stands still.
        reset: bool ``[T, B]`` (``[B, T]`` with ``batch_first``, ``[T]`` unbatched): the state is cleared before a step.
        reset_state: laid out as hx: what ``reset`` puts in the state's place, instead of zeros. It has a gradient: it
            may be learned: a parameter ``[num_layers * directions, 1, H]``, expanded to the batch.
        state_mask: ``[num_layers * directions, B, H]`` (laid out as hx), of the input's dtype: what the products read
            of h_{t-1}, at every step, is multiplied by it. What a GRU carries on of h_{t-1}, and an LSTM's c, are not.
            A mask that requires a gradient runs on the reference backend.
        recurrent_dropout: with ``training`` the call draws a state_mask: 0 with this probability, else
            1 / (1 - recurrent_dropout), each sequence, layer and direction for itself (Gal and Ghahramani 2016).
        zoneout: the probability that a unit keeps its old value at a step. With ``training`` the call draws which do,
            each unit and step for itself; else h_t = zoneout * h_{t-1} + (1 - zoneout) * h_t (Krueger et al. 2017).
        recompute: in training keep the states at some steps only, and recompute the others in the backward pass, which
            takes one more forward pass. For the native kernels; torch.compile and transforms of torch.func keep
            everything, and so does ``return_all_states``.
        norm: ``"layer"`` (Ba et al. 2016): h_t = phi(g_ih LN(W_ih x_t) + b_ih + g_hh LN(W_hh h_{t-1}) + b_hh), LN being
            a row's layer normalisation with eps = 1e-5, without parameters of its own.
        norm_weights: with ``norm``, flat, a layer and direction at a time: g_ih, g_hh ``[H]``.
        batch_sizes: int64 ``[T]`` on the CPU, in place of lengths and reset: the input is packed, ``[rows, I]``, as the
            data of a ``PackedSequence`` with these batch_sizes, and so is the output.
        backend: overrides the choice of backend for this call.

    Returns:
        The output ``[T, B, directions * H]`` (laid out as the input) and the last state, shaped as ``hx``.

    Raises:
        ArgumentError: an argument's shape, dtype, device or value does not fit; the message says which and how.
        BackendError: the named backend cannot run this.

    Example:
        >>> import torch
        >>> from fastseq.functional import rnn
        >>> y, h_n = rnn(torch.randn(7, 2, 3), None, [torch.randn(5, 3), torch.randn(5, 5)], has_biases=False)
        >>> y.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    checks.check_nonlinearity(nonlinearity)
    call = RecurrentCall(
        f"rnn_{nonlinearity}", input, hx, None, weights, lengths, reset, batch_sizes, False,
        num_layers, has_biases, dropout, training, bidirectional, batch_first, state_mask=state_mask,
        recurrent_dropout=recurrent_dropout, zoneout=checks.zoneout_of(zoneout), reset_h=reset_state,
        recompute=recompute, norm=norm, norm_weights=norm_weights,
    )  # fmt: skip
    return run(call, backend)[:2]


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    state_mask: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    recompute: bool = False,
    norm: str | None = None,
    norm_weights: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit; Cho et al. 2014. Gates r, z and candidate n, h_t = z * h_{t-1} + (1 - z) * n.

    Args:
        reset_after: True: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), torch's and cuDNN's form; False:
            n = tanh(W_in x + b_in + W_hn (r * h) + b_hn), the form of the paper and ONNX's default.
        norm: ``"layer"``: W_ih x and W_hh h are normalised as :func:`rnn`'s, over all 3H gates together; ``"joint"``
            (Hafner et al. 2020): a = g LN(W_ih x + b_ih + W_hh h + b_hh) + b, n = tanh(r * a_n). reset_after is True.
        norm_weights: ``"layer"``: g_ih, g_hh ``[3H]``; ``"joint"``: g, b ``[3H]``.
        input, hx, weights, lengths, reset, state_mask, zoneout, batch_sizes, backend and the rest: as :func:`rnn`, with
            w_ih ``[3H, I]``, w_hh ``[3H, H]``, blocks r, z, n.

    Returns:
        The output ``[T, B, directions * H]`` and the last state.

    Raises:
        ArgumentError, BackendError: as :func:`rnn`.
    """
    cell = "gru" if reset_after else "gru_reset_before"
    call = RecurrentCall(
        cell, input, hx, None, weights, lengths, reset, batch_sizes, False,
        num_layers, has_biases, dropout, training, bidirectional, batch_first, state_mask=state_mask,
        recurrent_dropout=recurrent_dropout, zoneout=checks.zoneout_of(zoneout), reset_h=reset_state,
        recompute=recompute, norm=norm, norm_weights=norm_weights,
    )  # fmt: skip
    return run(call, backend)[:2]


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    input_forget: bool = False,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    projected: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    state_mask: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    recompute: bool = False,
    norm: str | None = None,
    norm_weights: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Long short-term memory; Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    c_t = f * c_{t-1} + i * g, h_t = o * tanh(c_t), and with a projection (Sak et al. 2014) h_t = W_hr (o * tanh(c_t)).

    Args:
        hx: ``(h_0, c_0)``, ``[num_layers * directions, B, P]`` and ``[num_layers * directions, B, H]``, or None.
        input_forget: True: the forget gate is f = 1 - i and has no weights (ONNX's ``input_forget``; Greff et al.
            2017). There are three blocks then, i, g, o: w_ih ``[3H, I]``, w_hh ``[3H, P]``.
        projected: each layer and direction has a w_hr ``[P, H]`` after its biases; otherwise P = H.
        return_all_states: also return every c_t of the last layer.
        reset_state: as :func:`rnn`'s, a pair shaped as hx.
        state_mask: as :func:`rnn`'s, ``[num_layers * directions, B, P]``.
        zoneout: as :func:`rnn`'s, one probability for h and c or a pair of theirs. h_t is made of the c_t that would be
            there without.
        norm: ``"layer"``: W_ih x and W_hh h are normalised as :func:`rnn`'s, over all gates together, and
            h_t = o * tanh(g_c LN(c_t) + b_c); c itself is carried on as it is. Without a projection.
        norm_weights: g_ih, g_hh ``[4H]`` (``[3H]``), g_c, b_c ``[H]``.
        input, weights, lengths, reset, batch_sizes, backend and the rest: as :func:`rnn`, with w_ih ``[4H, I]``,
            w_hh ``[4H, P]``, blocks i, f, g, o.

    Returns:
        The output ``[T, B, directions * P]`` and ``(h_n, c_n)``; with ``return_all_states`` also c
        ``[T, B, directions * H]``, laid out as the output.

    Raises:
        ArgumentError, BackendError: as :func:`rnn`.
    """
    h0, c0 = checks.lstm_state(hx)
    reset_h, reset_c = checks.lstm_state(reset_state, "reset_state")
    cell = "lstm_coupled" if input_forget else "lstm"
    call = RecurrentCall(
        cell, input, h0, c0, weights, lengths, reset, batch_sizes, return_all_states,
        num_layers, has_biases, dropout, training, bidirectional, batch_first, projected, state_mask=state_mask,
        recurrent_dropout=recurrent_dropout, zoneout=checks.zoneout_of(zoneout, pair=True), reset_h=reset_h,
        reset_c=reset_c, recompute=recompute, norm=norm, norm_weights=norm_weights,
    )  # fmt: skip
    y, h_n, c_n, states = run(call, backend)
    assert c_n is not None
    return (y, (h_n, c_n), states) if states is not None else (y, (h_n, c_n))


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    state_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`rnn`: input ``[B, I]`` or ``[I]``, hx and state_mask ``[B, H]`` or ``[H]``; returns the new
    state."""
    checks.check_nonlinearity(nonlinearity)
    return _cell(f"rnn_{nonlinearity}", input, hx, None, (w_ih, w_hh, b_ih, b_hh), state_mask, backend)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    state_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`gru`: input ``[B, I]`` or ``[I]``, hx and state_mask ``[B, H]`` or ``[H]``; returns the new
    state."""
    return _cell(
        "gru" if reset_after else "gru_reset_before", input, hx, None, (w_ih, w_hh, b_ih, b_hh), state_mask, backend
    )[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    input_forget: bool = False,
    state_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: input ``[B, I]`` or ``[I]``, hx a pair ``[B, H]`` or ``[H]``, state_mask as
    h; returns ``(h, c)``."""
    h, c = checks.lstm_state(hx)
    h, c = _cell("lstm_coupled" if input_forget else "lstm", input, h, c, (w_ih, w_hh, b_ih, b_hh), state_mask, backend)
    assert c is not None
    return h, c


def _cell(
    cell: str,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: tuple[Tensor | None, ...],
    state_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    checks.check_cell_input(x, weights[0])  # type: ignore[arg-type]
    present = [w for w in weights if w is not None]
    if len(present) not in (2, 4):
        raise checks.ArgumentError("b_ih and b_hh come together: give both or neither")
    for name, state in (("h_0" if ops.HAS_C[cell] else "hx", h), ("c_0", c), ("state_mask", state_mask)):
        if state is not None:
            checks.check_tensor(name, state)
    h, c, mask = (None if s is None else s.unsqueeze(0) for s in (h, c, state_mask))
    call = RecurrentCall(
        cell, x.unsqueeze(0), h, c, present, has_biases=len(present) == 4, is_cell=True, state_mask=mask
    )
    _, h_n, c_n, _ = run(call, backend)
    return h_n[0], None if c_n is None else c_n[0]
