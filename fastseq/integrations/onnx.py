"""ONNX: how our operators are written in the standard's, for ``torch.onnx.export(..., dynamo=True)``.

A model needs nothing of this: while it is exported, its layers of ours become LSTM, GRU and RNN, and its attention what
torch's own becomes. A program that ``torch.export.export`` made before holds our operators; for that one is

    torch.onnx.export(program, custom_translation_table=fastseq.integrations.onnx.translations())

Needs onnxscript, as torch's exporter does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from fastseq import ops
from fastseq.attn.call import AttentionCall
from fastseq.recurrent import onnx as recurrent
from fastseq.recurrent.cells import CELLS

op: Any = opset18  # whose annotations leave out the Python numbers and lists that it takes for constants
Value = Any
"""A value of the ONNX graph that is being built."""


def translations() -> dict[Callable, Callable]:
    """What ``custom_translation_table`` of ``torch.onnx.export`` takes: each of our operators that a model in inference
    may hold, and the function that writes it in ONNX's.

    Number and order of the layers, directions, heads and options are those of the program; T and B may be dynamic.
    Not translated: ``reset=``, ``state_mask=``, ``zoneout=``, ``norm=``, ``return_all_states=True``, dropout in
    attention, packed sequences and pages (NotImplementedError).

    Example:
        >>> import torch, fastseq, fastseq.integrations.onnx
        >>> program = torch.export.export(fastseq.nn.GRU(3, 5).eval(), (torch.randn(7, 2, 3),))
        >>> table = fastseq.integrations.onnx.translations()
        >>> model = torch.onnx.export(program, custom_translation_table=table, verbose=False)
        >>> "GRU" in [node.op_type for node in model.model.graph]
        True
    """
    table: dict[Callable, Callable] = {torch.ops.fastseq.layers_forward.native: _layers}
    for backend in ops.BACKENDS:
        table[getattr(torch.ops.fastseq.normed_forward, backend)] = _normed
        table[getattr(torch.ops.fastseq.scan_forward, backend)] = _scan
        table[getattr(torch.ops.fastseq.attention_forward, backend)] = _attention
    return table


class OnnxOps:
    """The operations of :class:`fastseq.recurrent.onnx.TorchOps` as ONNX's."""

    @staticmethod
    def cat(parts: Sequence[Value], dim: int) -> Value:
        return op.Concat(*parts, axis=dim)

    @staticmethod
    def stack(parts: Sequence[Value]) -> Value:
        return op.Concat(*(op.Unsqueeze(part, [0]) for part in parts), axis=0)

    @staticmethod
    def product(a: Value, b: Value) -> Value:
        return op.MatMul(a, b)

    @staticmethod
    def zeros_like(x: Value) -> Value:
        return op.Sub(x, x)

    @staticmethod
    def int32(x: Value) -> Value:
        return op.Cast(x, to=ir.DataType.INT32)

    @staticmethod
    def rows(w: Value, first: int, count: int) -> Value:
        return op.Slice(w, [first], [first + count], [0])

    @staticmethod
    def project(m: Value, w_hr: Value) -> Value:
        return op.MatMul(m, op.Transpose(w_hr, perm=[0, 2, 1]))

    @staticmethod
    def beside(y: Value) -> Value:
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])

    @staticmethod
    def where_empty(lengths: Value, given: Value, s: Value) -> Value:
        return op.Where(op.Unsqueeze(op.Equal(lengths, 0), [1]), given, s)

    @staticmethod
    def at_first_step(x: Value, h0: Value, direction: int, last: bool, lengths: Value) -> Value:
        steps = op.Unsqueeze(_range(x, 0), [1, 2])
        begin: Value = 0
        if last:
            begin = op.Sub(_size(x, 0) if lengths is None else op.Unsqueeze(lengths, [1]), 1)
        return op.Where(op.Equal(steps, begin), op.Gather(h0, direction, axis=0), op.CastLike(0.0, x))

    @staticmethod
    def node(kind: recurrent.Layer, inputs: Sequence[Value]) -> Sequence[Value]:
        return getattr(op, recurrent.OPERATOR[kind.cell])(*inputs, **kind.attributes())


def _size(x: Value, dim: int) -> Value:
    """The size of a dimension, int64 []."""
    return op.Squeeze(op.Shape(x, start=dim, end=dim + 1), [0])


def _range(x: Value, dim: int) -> Value:
    """The numbers from 0 to that size."""
    return op.Range(0, _size(x, dim), 1)


def _wide(x: Value) -> Value:
    """Floating values in the dtype that the kernels compute in, which runtimes have these operators for."""
    narrow = x is not None and x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return op.Cast(x, to=ir.DataType.FLOAT) if narrow else x


def _layers(
    x: Value, weights: Sequence[Value], h0: Value, c0: Value, reset_h: Value, reset_c: Value, lengths: Value,
    reset: Value, state_mask: Value, zoneout_h: Value, zoneout_c: Value, cell: int, num_layers: int,
    bidirectional: bool, reverse: bool, save: bool, states: bool,
) -> Sequence[Value]:  # fmt: skip
    """``layers_forward``: y, h_n and an LSTM's c_n; what training alone needs is left out."""
    _refuse(**{"reset=": reset is not None, "state_mask=": state_mask is not None})
    _refuse(**{"zoneout=": zoneout_h is not None or zoneout_c is not None})
    _refuse(**{"return_all_states=True": states and not save})
    directions = 2 if bidirectional else 1
    dtype, rows = x.dtype, num_layers * directions
    width = len(weights) // rows
    kind = recurrent.Layer(CELLS[cell].name, int(weights[1].shape[0]) // CELLS[cell].gates, directions, reverse)
    x, h0, c0, *weights = map(_wide, (x, h0, c0, *weights))
    found = []
    for first in range(0, rows, directions):
        own = [weights[n * width : (n + 1) * width] for n in range(first, first + directions)]
        h, c = (None if s is None else op.Slice(s, [first], [first + directions], [0]) for s in (h0, c0))
        x, *last = recurrent.layer(OnnxOps, kind, own, x, h, c, lengths)
        found.append(last)
    return [op.Cast(s, to=dtype) for s in (x, *(op.Concat(*parts, axis=0) for parts in zip(*found, strict=True)))]


def _scan(
    x: Value, w_ih: Value, w_hh: Value, b_ih: Value, b_hh: Value, w_hr: Value, h0: Value, c0: Value, reset_h: Value,
    reset_c: Value, lengths: Value, reset: Value, state_mask: Value, zoneout_h: Value, zoneout_c: Value, cell: int,
    reverse: bool, save: bool, states: bool,
) -> Sequence[Value]:  # fmt: skip
    """``scan_forward``, likewise: one layer and direction."""
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    h0, c0 = (None if s is None else op.Unsqueeze(s, [0]) for s in (h0, c0))
    options = reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c
    y, *last = _layers(x, weights, h0, c0, *options, cell, 1, False, reverse, save, states)
    return [y, *(op.Squeeze(s, [0]) for s in last)]


def _normed(*arguments: Any) -> Sequence[Value]:
    """``normed_forward``: ``torch.onnx.export`` of the model itself writes such a layer."""
    _refuse(**{"norm=": True})
    return ()


def _refuse(**what: bool) -> None:
    for name, given in what.items():
        if given:
            raise NotImplementedError(f"ONNX has no operator for {name} of fastseq")


def _attention(*arguments: Any) -> Sequence[Value]:
    """``attention_forward`` by its formula: o and lse."""
    call = AttentionCall(*arguments)
    _refuse(
        **{"dropout": call.dropout_p > 0.0, "a paged cache (block_table=)": call.block_table is not None},
        **{"a cache of int8 (k_scale)": call.k_scale is not None},
        **{"packed sequences (cu_seqlens)": call.cu_seqlens_q is not None},
    )
    q, k, v, bias, sinks, slopes = map(_wide, (call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes))
    queries, keys = (int(x.shape[1]) for x in (call.q, call.k))
    if queries > keys:  # heads of keys are shared
        heads = op.Constant(value_ints=[head * keys // queries for head in range(queries)])
        k, v = op.Gather(k, heads, axis=1), op.Gather(v, heads, axis=1)
    at = _Positions(call)
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), call.scale)
    if call.softcap > 0.0:
        scores = op.Mul(op.Tanh(op.Div(scores, call.softcap)), call.softcap)
    if bias is not None:
        scores = op.Add(scores, op.CastLike(bias, scores))
    if slopes is not None:
        distance = op.CastLike(op.Abs(op.Sub(at.diagonal, at.j)), scores)
        scores = op.Sub(scores, op.Mul(op.Unsqueeze(op.CastLike(slopes, scores), [1, 2]), distance))
    visible = at.visible()
    if visible is not None:
        scores = op.Where(visible, scores, op.CastLike(-math.inf, scores))
    largest = op.ReduceMax(scores, [-1], keepdims=1)
    if sinks is not None:
        sinks = op.Unsqueeze(op.CastLike(sinks, scores), [1, 2])
        largest = op.Max(largest, sinks)
    largest = op.Max(largest, op.CastLike(-1e38, scores))  # where no key is seen: -inf less -inf would be NaN
    numerator = op.Exp(op.Sub(scores, largest))
    denominator = op.ReduceSum(numerator, [-1], keepdims=1)
    if sinks is not None:
        denominator = op.Add(denominator, op.Exp(op.Sub(sinks, largest)))
    if at.keys_real is not None:  # 0 * NaN is NaN
        v = op.Where(op.Transpose(at.keys_real, perm=[0, 1, 3, 2]), v, op.CastLike(0.0, v))
    one = op.CastLike(1.0, scores)
    o = op.MatMul(op.Div(numerator, op.Where(op.Equal(denominator, 0.0), one, denominator)), v)
    lse = op.Add(largest, op.Log(denominator))
    if at.queries_real is not None:
        lse = op.Where(at.queries_real, lse, op.CastLike(-math.inf, lse))
    return op.Cast(o, to=call.q.dtype), op.Squeeze(lse, [-1])


class _Positions:
    """Which key each query sees, as :func:`fastseq.attn.reference.visible_pairs` has it."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        self.i, self.j = op.Unsqueeze(_range(call.q, 2), [1]), _range(call.k, 2)
        rows, columns = (
            _size(x, 2) if n is None else op.Unsqueeze(n, [1, 2, 3])
            for x, n in ((call.q, call.lengths_q), (call.k, call.lengths_k))
        )
        self.queries_real = None if call.lengths_q is None else op.Less(self.i, rows)  # [B,1,Tq,1]
        self.keys_real = None if call.lengths_k is None else op.Less(self.j, columns)  # [B,1,1,Tk]
        self.diagonal = op.Add(self.i, op.Sub(columns, rows)) if call.bottom_right else self.i

    def visible(self) -> Value:
        """Bool that broadcasts to ``[B,Hq,Tq,Tk]``, None for everywhere."""
        call = self.call
        ahead = op.Sub(self.j, self.diagonal)
        limits = _all_of(
            op.LessOrEqual(ahead, 0) if call.causal else None,
            op.GreaterOrEqual(ahead, -call.window_left) if call.window_left >= 0 else None,
            op.LessOrEqual(ahead, call.window_right) if call.window_right >= 0 else None,
        )
        if call.prefix_lengths is not None and limits is not None:
            limits = op.Or(limits, op.Less(self.j, op.Unsqueeze(call.prefix_lengths, [1, 2, 3])))
        return _all_of(self.queries_real, self.keys_real, call.mask, limits)


def _all_of(*conditions: Value) -> Value:
    result = None
    for condition in conditions:
        if condition is not None:
            result = condition if result is None else op.And(result, condition)
    return result
