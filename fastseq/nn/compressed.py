"""Smaller copies of a layer's weight matrices, for inference: less to read, and packed once instead of at each call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fastseq import direct, ops
from fastseq.dtensor import any_dtensor
from fastseq.recurrent.call import RecurrentCall, Result

KINDS = ("bfloat16", "int8")
"""bfloat16: each weight rounded to 8 significant bits. int8: each row times a float32 scale, its largest weight 127."""


def compress(weight: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """A float32 matrix ``[rows, K]`` in a smaller type, and for int8 the float32 scales ``[rows]``."""
    if kind == "bfloat16":
        return weight.to(torch.bfloat16), None
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Copies(NamedTuple):
    """What the kernels read in place of a layer's weights, as ``direct.infer`` takes it. sizes: H and P, or zeros where
    the weights are the layer's own; and whether products multiply what is so small."""

    weights: list[Tensor]
    scales: list[Tensor]
    sizes: tuple[int, int, bool]


class Served(list[Tensor]):
    """A layer's weights, of which a checked call may compute with the smaller copies.

    Args:
        layer: the layer whose weights these are.
    """

    def __init__(self, weights: Sequence[Tensor], layer: Any) -> None:
        super().__init__(weights)
        self.layer = layer

    def infer(self, call: RecurrentCall) -> Result | None:
        """The results of a call, its tensors laid out as ``[T, B, I]``; None where the copies do not serve it."""
        if torch.is_grad_enabled() or call.want_states or call.state_mask is not None:
            return None
        if call.reset_h is not None or any(call.zoneout):
            return None
        done = self.layer._compressed.infer(
            self.layer, call.x, call.h0, call.c0, call.cell, "layer", call.num_layers, call.bidirectional,
            lengths=call.lengths, reset=call.reset,
        )  # fmt: skip
        return None if done is None else (*done, *(4 - len(done)) * (None,))


class _Sources:
    """What copies were made from. The memory is kept alive with it, so that its address cannot be another tensor's."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.memory = [tensor.detach() for tensor in tensors if tensor is not None]
        self.addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        self.versions = tuple(_version(tensor) for tensor in tensors)
        self.isa = torch.ops.fastseq.native_isa("")

    def are_still(self, tensors: list[Tensor | None]) -> bool:
        return direct.unchanged(tensors, self.tensors, self.addresses, self.versions, self.isa)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


class CompressedWeights:
    """Copies of one layer's float32 matrices, made at the first use and again when a weight has changed.

    They are packed as the kernels of the instruction set in force read them. A change is noticed by the tensor's
    identity, address and version, and an optimizer's step and ``load_state_dict`` whether versions tell of them or not
    (torch's fused optimizers leave them alone). What is not: writing through ``.data`` or ``.numpy()``, from another
    process, or into inference tensors.

    Args:
        kind: one of :data:`KINDS`.
        compute: whether products multiply this type, inputs and states being rounded to it, where the chip does that;
            else it is widened first.
    """

    def __init__(self, kind: str, compute: bool = False) -> None:
        if kind not in KINDS:
            raise ValueError(f"weights: got {kind!r}, accepted is one of {', '.join(map(repr, KINDS))}")
        self.kind, self.compute = kind, compute
        self._made: tuple[_Sources, Copies] | None = None

    def forget(self) -> None:
        """Have the copies made again at their next use."""
        self._made = None

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take now, beside the layer's own weights; 0 before the first use."""
        if self._made is None:
            return 0
        _, copies = self._made
        return sum(t.nbytes for t in copies.weights if t.dim() == 3) + sum(scale.nbytes for scale in copies.scales)

    def infer(
        self, layer: Any, x: Any, h0: Any, c0: Any, cell: str, layout: str, num_layers: int, bidirectional: bool,
        *block: Tensor | None, lengths: Tensor | None = None, reset: Tensor | None = None,
    ) -> tuple[Tensor, ...] | None:  # fmt: skip
        """What ``direct.infer`` returns for a layer or cell, from the copies of its weights. For a layer that has asked
        whether the native kernels are in force. ``lengths`` int64 ``[B]`` and ``reset`` bool ``[T, B]`` are checked."""
        copies = self.of(layer, cell, num_layers * (2 if bidirectional else 1))
        if copies is None:
            return None
        return direct.infer(
            copies.weights, None, copies.scales, x, h0, c0, cell, layout, num_layers, bidirectional, *copies.sizes,
            lengths, reset, *block,
        )  # fmt: skip

    def of(self, layer: Any, cell: str, rows: int = 1) -> Copies | None:
        """The copies, as they must be now, made again where one of the layer's parameters has changed. None where they
        cannot be made: a gradient may be wanted, or the weights are not ordinary tensors on the CPU.

        Args:
            layer: the layer or cell.
            cell: which cell its weights belong to.
            rows: how many layers and directions they are of.
        """
        parameters = list(layer._parameters.values())
        made = self._made
        if made is None or not made[0].are_still(parameters):
            if torch.is_grad_enabled() or not direct.is_plain():
                return None
            weights = layer._weights()
            if not all(type(w) in (Tensor, Parameter) and w.is_cpu for w in weights):
                return None
            self._made = made = (_Sources(parameters), self._copies(weights, rows, cell))
            _watch(self)
        return made[1]

    def _copies(self, weights: Sequence[Tensor], rows: int, cell: str) -> Copies:
        matrices = {i: w.detach() for i, w in enumerate(weights) if w.dim() == 2}
        made = list(weights)
        scales: list[Tensor] = []
        if any(matrix.dtype is not torch.float32 for matrix in matrices.values()):
            return Copies(made, scales, (0, 0, False))
        gates, fused = ops.GATES[cell], 2 if cell == "gru_reset_before" else ops.GATES[cell]
        blocks = ((gates, 0), (fused, gates - fused), (1, 0))  # of w_ih, w_hh, w_hr
        for place, (i, matrix) in enumerate(matrices.items()):
            copy, scale = compress(matrix, self.kind)
            made[i] = torch.ops.fastseq.pack_weights(copy, *blocks[place % (len(matrices) // rows)])
            if scale is not None:
                # Sums of products with bytes that are 128 too large start from there (ScanForward::narrow).
                scales.append(torch.stack((scale, -128.0 * copy.sum(1))) if self.compute else scale)
        w_hh = matrices[1]
        return Copies(made, scales, (w_hh.shape[0] // gates, w_hh.shape[1], self.compute))

    def __getstate__(self) -> dict[str, Any]:  # a copy of the layer has weights of its own
        return {"kind": self.kind, "compute": self.compute, "_made": None}

    def __str__(self) -> str:
        """How patch was asked for them."""
        return f"{'compute' if self.compute else 'weights'}={self.kind!r}"


_watched: weakref.WeakSet[CompressedWeights] = weakref.WeakSet()
_hook: RemovableHandle | None = None


def _watch(copies: CompressedWeights) -> None:
    """Have the copies forgotten when an optimizer has written what they were made from."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    _watched.add(copies)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # then the graph writes the weights, through autograd's book-keeping
        return
    current = [(copies, made) for copies in tuple(_watched) if (made := copies._made) is not None]
    if not current:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = any_dtensor(parameters)  # as by FSDP, whose whole weights lie elsewhere, and tell of no new version
    written = {p.untyped_storage().data_ptr() for p in parameters if type(p) in (Tensor, Parameter) and p.is_cpu}
    for copies, (sources, _) in current:
        if sharded or any(source.untyped_storage().data_ptr() in written for source in sources.memory):
            copies.forget()
