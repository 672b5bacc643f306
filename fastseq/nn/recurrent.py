"""RNN, GRU, LSTM and their cells: drop-in for torch.nn, same arguments, same attributes, same state_dict.

The layers derive from ``torch.nn.RNNBase`` rather than from ``torch.nn.LSTM`` and its siblings, which torch.compile
refuses to trace whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq import backend, checks, direct, functional
from fastseq.nn.compressed import CompressedWeights, Served
from fastseq.nn.normed import NormedLayer
from fastseq.recurrent import divided, sessions
from fastseq.recurrent.normed import check_form
from fastseq.recurrent.stack import in_one_call

Hidden = Tensor | tuple[Tensor, Tensor] | None
Pair = tuple[Tensor, Tensor]


def _refuse(layer: nn.Module, unknown: dict[str, Any]) -> None:
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    if unknown:
        raise TypeError(f"{type(layer).__name__}.__init__() got an unexpected keyword argument {next(iter(unknown))!r}")


class _Native(nn.Module):
    """A layer or cell that the native kernels run in one call in eager mode, in inference from smaller copies of its
    matrices where fastseq.patch asks (weights=, compute=) for that."""

    _compressed: CompressedWeights | None = None  # on the class, so that a torch.nn layer needs nothing more

    def _weights(self) -> list[Tensor]:
        raise NotImplementedError

    def _in_one_call(
        self,
        names: list[str],
        x: Any,
        h0: Tensor | None,
        c0: Tensor | None,
        cell: str,
        layout: str,
        num_layers: int = 1,
        bidirectional: bool = False,
    ) -> tuple | None:
        """The whole stack, or cell. Nothing is checked before; None where the native call does not take it."""
        if torch.compiler.is_compiling():
            return None
        if sessions.used and (step := sessions.current.get()) is not None:
            return step.in_one_call(self, names, (x, h0, c0, cell, layout, num_layers, bidirectional))
        if not backend.native_scan() and not self._divided(x, cell, layout, num_layers, bidirectional):
            return None
        if num_layers > 1 and self.training and self.dropout:
            return None
        if torch.is_grad_enabled():
            return in_one_call(x, h0, c0, self._weights(), cell, layout, num_layers, bidirectional)
        if self._compressed is not None:
            return self._compressed.infer(self, x, h0, c0, cell, layout, num_layers, bidirectional)
        return direct.infer(
            self._parameters, names, None, x, h0, c0, cell, layout, num_layers, bidirectional, 0, 0, False, None, None
        )  # fmt: skip

    def _divided(self, x: Any, cell: str, layout: str, num_layers: int, bidirectional: bool) -> bool:
        """Whether a call goes to the native kernels where measurements send some elsewhere; those of smaller copies do,
        which no other kernels read."""
        if self._compressed is not None and not torch.is_grad_enabled():
            return backend.divided("scan")
        return divided.takes_layers(x, self._weights, cell, layout, num_layers, bidirectional)

    __prepare_scriptable__ = checks.refuse_script

    def extra_repr(self) -> str:
        """Torch's, and the smaller copies where there are any."""
        text = super().extra_repr()
        return text if self._compressed is None else f"{text}, {self._compressed} in inference"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._compressed is not None:  # weights that are inference tensors have no version to tell of it
            self._compressed.forget()


class _Recurrent(_Native, NormedLayer):
    """What the three layers share: how a call is unpacked, and how its results are laid out again.

    ``forward`` takes its options by position too: torch.onnx's exporter without dynamo hands all over so.
    """

    _flat_weights: list[Tensor]  # type: ignore[assignment]
    recurrent_dropout: float = 0.0  # on the class, so that a torch.nn layer whose class is swapped needs nothing more
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    recompute: bool = False

    def _set_options(
        self, recurrent_dropout: float, weight_dropout: float, zoneout: float | tuple[float, float], recompute: bool
    ) -> None:
        checks.check_probability("recurrent_dropout", recurrent_dropout)
        checks.check_probability("weight_dropout", weight_dropout)
        pair = checks.zoneout_of(zoneout, pair=self.mode == "LSTM")
        checks.check_zoneout(pair)
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute must be True or False, got {recompute!r}")
        own = pair if isinstance(zoneout, (tuple, list)) else zoneout
        options = recurrent_dropout, weight_dropout, own if any(pair) else 0.0, recompute
        vars(self).update({name: value for name, value in zip(_OPTIONS, options, strict=True) if value})

    def extra_repr(self) -> str:
        """Torch's, and the options that torch does not have."""
        own = (f", {name}={getattr(self, name)!r}" for name in (*_OPTIONS, "norm") if getattr(self, name))
        return "".join((super().extra_repr(), *own))

    def _weights(self) -> list[Tensor]:
        """The weights in their flat order, as they are now: torch.func.functional_call swaps them behind our back."""
        own, names = list(self._parameters), self._flat_weights_names
        if own == names:
            return list(self._parameters.values())  # type: ignore[arg-type]
        if own[: len(names)] == names:  # those of normalisations come after
            return list(self._parameters.values())[: len(names)]  # type: ignore[return-value]
        self._update_flat_weights()  # parametrised or pruned
        return self._flat_weights

    def _call_weights(self) -> list[Tensor]:
        """Those that a call takes: in training with ``weight_dropout`` each w_hh is dropped in part, anew each time."""
        weights = self._weights()
        if not (self.training and self.weight_dropout):
            plain = self._compressed is None or not self._compressed.compute or torch.compiler.is_compiling()
            return weights if plain else Served(weights, self)
        width = len(weights) // (self.num_layers * (1 + self.bidirectional))
        checks.check_probability("weight_dropout", self.weight_dropout)
        return [F.dropout(w, self.weight_dropout, True) if n % width == 1 else w for n, w in enumerate(weights)]

    def _call(
        self, input: Tensor | PackedSequence, hx: Hidden, lengths: Tensor | None, reset: Tensor | None, **extra: Any
    ) -> tuple:
        step = None if torch.compiler.is_compiling() else sessions.current.get()
        if step is not None:
            return step.call(self, input, hx, lengths=lengths, reset=reset, **extra)
        if isinstance(input, PackedSequence):
            call = self._call_packed_in_eager if torch.compiler.is_compiling() else self._call_packed
            return call(input, hx, lengths, reset, **extra)
        return self._function(input, hx, lengths=lengths, reset=reset, batch_first=self.batch_first, **extra)

    def _stack(self, cell: str, x: Any, h0: Tensor | None, c0: Tensor | None) -> tuple | None:
        """The layer in one native call, without ``lengths`` and ``reset``; else None."""
        if self.norm is not None or self.zoneout or (self.recompute and torch.is_grad_enabled()):
            return None
        if self.training and (self.recurrent_dropout or self.weight_dropout):
            return None
        layout = "batch_first" if self.batch_first else "layer"
        names = self._flat_weights_names
        return self._in_one_call(names, x, h0, c0, cell, layout, self.num_layers, self.bidirectional)

    def _function(self, input: Tensor, hx: Hidden, **kwargs: Any) -> tuple:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "has_biases": self.bias,
            "dropout": self.dropout,
            "training": self.training,
            "bidirectional": self.bidirectional,
            "recurrent_dropout": self.recurrent_dropout,
            "zoneout": self.zoneout,
            "recompute": self.recompute,
            "norm": self.norm,
            "norm_weights": self._norm_weights(),
        }

    def _call_packed(
        self, packed: PackedSequence, hx: Hidden, lengths: Tensor | None, reset: Tensor | None, **extra: Any
    ) -> tuple:
        """A PackedSequence is data with batch_sizes; its states are sorted by length, as its sequences are."""
        if lengths is not None or reset is not None or "reset_state" in extra:
            raise checks.ArgumentError("lengths= and reset= go with a Tensor input; a PackedSequence has its lengths")
        data, batch_sizes, order, back = packed
        if order is not None and hx is not None:
            hx = _permute(hx, order)
        y, last, *states = self._function(data, hx, batch_sizes=batch_sizes, batch_first=False, **extra)
        if back is not None:
            last = _permute(last, back)
        y, *states = (PackedSequence(rows, batch_sizes, order, back) for rows in (y, *states))
        return (y, last, *states)

    @torch._disable_dynamo  # as torch.compiler.disable, but imports the compiler at the first call only
    def _call_packed_in_eager(self, *args: Any, **kwargs: Any) -> tuple:
        """torch.compile breaks its graph here, as at torch.nn's layers: sizes depend on what batch_sizes holds.

        Its tracer fails in ``pad_packed_sequence``, which a model calls next. torch.nn's layers hide that, as the whole
        function that calls one runs in eager mode; here the graph is told to break there too.
        """
        torch._dynamo.disallow_in_graph(torch._VF._pad_packed_sequence)
        return self._call_packed(*args, **kwargs)


_OPTIONS = ("recurrent_dropout", "weight_dropout", "zoneout", "recompute")


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _permute(hx: Any, order: Tensor) -> Any:
    if isinstance(hx, tuple):
        return tuple(h.index_select(1, order) for h in hx)
    return hx.index_select(1, order)


class _OfOneState(_Recurrent):
    """The call of RNN and GRU, whose state is h alone."""

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple:
        """Returns ``(output, h_n)``."""
        if lengths is None and reset is None and reset_state is None:
            done = self._stack(self._cell(), input, hx, None)
            if done is not None:
                return done
        return self._call(input, hx, lengths, reset, **_given(reset_state=reset_state))

    if TYPE_CHECKING:
        __call__ = forward


class RNN(_OfOneState):
    """Elman RNN, drop-in for :class:`torch.nn.RNN`: same constructor, attributes, state_dict and call.

    Beyond torch, the call takes ``lengths`` (int ``[B]``: from step ``lengths[b]`` on the output is 0 and the state
    stands still) and ``reset`` (bool, shaped as the input's time and batch: the state is cleared before that step, or
    with ``reset_state``, shaped as hx, becomes that, which may be learned).

    Two dropouts act on the recurrence, in training alone. ``recurrent_dropout=p`` (Gal and Ghahramani 2016) draws one
    mask for each sequence, layer and direction of a call, and applies it at every step to what the products read of
    h_{t-1}. ``weight_dropout=p`` (Merity et al. 2018) draws one mask of each ``weight_hh`` for a call; the gradient
    goes to the parameter, and the state_dict is unchanged. Both scale what they keep by 1 / (1 - p), and need
    0 <= p < 1. ``zoneout=p`` (Krueger et al. 2017): in training each unit keeps its old value at a step with
    probability p, in evaluation it moves by the expectation, h_t = p h_{t-1} + (1 - p) h_t.

    ``recompute=True`` keeps the states at some steps of a training call only, and recomputes the others in the
    backward pass: less memory for more time (:func:`fastseq.functional.rnn`).

    ``norm="layer"`` normalises W_ih x and W_hh h at every step (Ba et al. 2016). Each layer and direction then has the
    gains ``norm_ih_l{k}`` and ``norm_hh_l{k}`` too, which start at 1.

    Shapes: input ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``, ``[T, I]`` unbatched, or a PackedSequence);
    hx and h_n ``[num_layers * directions, B, H]``; output ``[T, B, directions * H]``, laid out as the input.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.nn.RNN(10, 20, num_layers=2)
        >>> y, h_n = rnn(torch.randn(5, 3, 10))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        recompute: bool = False,
        norm: Literal["layer"] | None = None,
        **unknown: NoReturn,
    ) -> None:
        _refuse(self, unknown)
        self.nonlinearity = nonlinearity
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        check_form(norm, f"rnn_{nonlinearity}")
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_options(recurrent_dropout, weight_dropout, zoneout, recompute)
        self._set_norm(norm)

    def _function(self, input: Tensor, hx: Any, **kwargs: Any) -> tuple:
        nonlinearity = "relu" if self.mode == "RNN_RELU" else "tanh"
        return functional.rnn(input, hx, self._call_weights(), nonlinearity=nonlinearity, **self._options(), **kwargs)

    def _cell(self) -> str:
        return "rnn_relu" if self.mode == "RNN_RELU" else "rnn_tanh"


class GRU(_OfOneState):
    """Gated recurrent unit, drop-in for :class:`torch.nn.GRU`, with one more keyword.

    ``reset_after=True`` (default) applies the reset gate after the recurrent product, as torch, cuDNN and Keras do;
    ``reset_after=False`` before it, as in Cho et al. 2014 and ONNX's default. The parameters are the same in both.
    The call takes ``lengths``, ``reset`` and ``reset_state`` as :class:`RNN`'s does; ``recurrent_dropout``,
    ``weight_dropout``, ``zoneout``, ``recompute`` and shapes are the same too. What z carries on of h_{t-1} is not
    dropped. ``norm="layer"`` is :class:`RNN`'s, over all gates; ``norm="joint"`` normalises their sum, as Dreamer's
    cell does (Hafner et al. 2020), with the parameters ``norm_l{k}`` and ``norm_bias_l{k}``. Both need
    ``reset_after=True``.

    Example:
        >>> import torch, fastseq
        >>> gru = fastseq.nn.GRU(10, 20, bidirectional=True, batch_first=True)
        >>> y, h_n = gru(torch.randn(3, 5, 10), lengths=torch.tensor([5, 2, 4]))
        >>> y.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))
    """

    reset_after: bool = True  # on the class, so that a torch.nn.GRU whose class is swapped needs nothing more

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        recompute: bool = False,
        norm: Literal["layer", "joint"] | None = None,
        **unknown: NoReturn,
    ) -> None:
        _refuse(self, unknown)
        check_form(norm, "gru" if reset_after else "gru_reset_before")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device,
            dtype=dtype,
        )  # fmt: skip
        if not reset_after:
            self.reset_after = False
        self._set_options(recurrent_dropout, weight_dropout, zoneout, recompute)
        self._set_norm(norm)

    def extra_repr(self) -> str:
        """Torch's, and reset_after where it differs from torch's form."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _function(self, input: Tensor, hx: Any, **kwargs: Any) -> tuple:
        return functional.gru(
            input, hx, self._call_weights(), reset_after=self.reset_after, **self._options(), **kwargs
        )  # fmt: skip

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"


class LSTM(_Recurrent):
    """Long short-term memory, drop-in for :class:`torch.nn.LSTM`, proj_size included, with one more keyword.

    ``input_forget=True`` couples the gates, f = 1 - i, as ONNX's attribute of that name does and CIFG in Greff et al.
    2017. The weights then have three blocks, i, g, o (``weight_ih [3H, I]``), and a quarter of the products is saved.

    The call takes ``lengths``, ``reset`` and ``reset_state`` (a pair) as :class:`RNN`'s does, and
    ``return_all_states=True`` returns a third value: every c_t of the last layer, ``[T, B, directions * H]``, laid out
    as the output. ``recurrent_dropout``, ``weight_dropout`` and ``recompute`` are :class:`RNN`'s; c is not dropped.
    ``zoneout`` is one probability for h and c, or a pair of theirs; h_t is made of the c_t that would be there without.
    ``norm="layer"`` is :class:`RNN`'s too, over all gates, and h = o * tanh(LN(c)), with the gain ``norm_c_l{k}`` and
    the shift ``norm_c_bias_l{k}``; c is carried on as it is.

    Shapes: as :class:`RNN`; hx is ``(h_0, c_0)``, h with ``proj_size`` features where that is set.

    Example:
        >>> import torch, fastseq
        >>> lstm = fastseq.nn.LSTM(10, 20, num_layers=2)
        >>> y, (h_n, c_n), c_all = lstm(torch.randn(5, 3, 10), return_all_states=True)
        >>> y.shape, c_n.shape, c_all.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([5, 3, 20]))
    """

    input_forget: bool = False  # on the class, so that a torch.nn.LSTM whose class is swapped needs nothing more

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        input_forget: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        recompute: bool = False,
        norm: Literal["layer"] | None = None,
    ) -> None:
        check_form(norm, "lstm", proj_size > 0)
        if input_forget:
            self.input_forget = True
        mode = "GRU" if input_forget else "LSTM"  # whose weights have three blocks, or four
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip
        self.mode = "LSTM"
        self._set_options(recurrent_dropout, weight_dropout, zoneout, recompute)
        self._set_norm(norm)

    def extra_repr(self) -> str:
        """Torch's, and input_forget where it differs from torch's form."""
        return super().extra_repr() + (", input_forget=True" if self.input_forget else "")

    def flatten_parameters(self) -> None:
        """Torch's; nothing with ``input_forget``, which cuDNN does not have."""
        if not self.input_forget:
            super().flatten_parameters()

    def _function(self, input: Tensor, hx: Any, **kwargs: Any) -> tuple:
        projected, input_forget = self.proj_size > 0, self.input_forget
        return functional.lstm(
            input, hx, self._call_weights(), input_forget=input_forget, projected=projected, **self._options(), **kwargs
        )  # fmt: skip

    def _cell(self) -> str:
        return "lstm_coupled" if self.input_forget else "lstm"

    @overload
    def forward(
        self, input: Tensor, hx: Pair | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
        return_all_states: Literal[False] = False, reset_state: Pair | None = None,
    ) -> tuple[Tensor, Pair]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: Pair | None = None, *, lengths: Tensor | None = None, reset: Tensor | None = None,
        return_all_states: Literal[True], reset_state: Pair | None = None,
    ) -> tuple[Tensor, Pair, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: Pair | None = None, *, return_all_states: Literal[False] = False
    ) -> tuple[PackedSequence, Pair]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Pair | None = None, *, return_all_states: Literal[True]
    ) -> tuple[PackedSequence, Pair, PackedSequence]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_all_states: bool = False,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple:
        """Returns ``(output, (h_n, c_n))``, and all c_t as a third value where asked for."""
        h0, c0 = checks.lstm_state(hx)
        if lengths is None and reset is None and not return_all_states and reset_state is None:
            done = self._stack(self._cell(), input, h0, c0)
            if done is not None:
                return done[0], done[1:]
        pair: Any = None if hx is None else (h0, c0)  # torch takes a list too
        more = _given(reset_state=reset_state)
        return self._call(input, pair, lengths, reset, return_all_states=return_all_states, **more)

    if TYPE_CHECKING:
        __call__ = forward
