"""Smaller copies of a layer's weight matrices, for inference: less to read, and packed once instead of at each call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fastseq import backend, direct, ops

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
    """What the kernels read in place of a layer's weights, as ``direct.stack`` takes it. sizes: H and P, or zeros where
    the weights are the layer's own."""

    weights: list[Any]
    scales: list[Tensor]
    sizes: tuple[int, int]


class _Sources:
    """What copies were made from. The memory is kept alive with it, so that its address cannot be another tensor's."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.memory = [tensor.detach() for tensor in tensors if tensor is not None]
        self.addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        self.versions = tuple(_version(tensor) for tensor in tensors)
        self.isa = torch.ops.fastseq.native_isa("")

    def plan(self, copies: Copies, shape: tuple[Any, ...]) -> Any:
        """The copies as ``direct.planned`` takes them, or None where it cannot."""
        if not copies.sizes[0]:
            return None
        mine = (self.tensors, self.addresses, self.versions, self.isa)
        return direct.plan(*mine, copies.weights, copies.scales, *shape)  # type: ignore[misc]

    def are_still(self, tensors: list[Tensor | None]) -> bool:
        return direct.unchanged(tensors, self.tensors, self.addresses, self.versions, self.isa)  # type: ignore[misc]


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
    """

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"weights: got {kind!r}, accepted is one of {', '.join(map(repr, KINDS))}")
        self.kind = kind
        self._made: tuple[_Sources, Copies] | None = None
        self._plan: Any = None

    def forget(self) -> None:
        """Have the copies made again at their next use."""
        self._made = self._plan = None

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take now, beside the layer's own weights; 0 before the first use."""
        if self._made is None:
            return 0
        _, copies = self._made
        return sum(t.nbytes for t in copies.weights if t is not None and t.dim() == 3) + sum(
            scale.nbytes for scale in copies.scales
        )

    def infer(self, layer: Any, x: Any, h0: Any, c0: Any, *shape: Any) -> tuple[Tensor, ...] | None:
        """What ``direct.stack`` returns for a layer, from the copies of its weights; shape: its cell, num_layers,
        bidirectional and batch_first. For a layer that has asked whether the native kernels are in force."""
        plan = self._plan
        if plan is not None:
            assert direct.planned is not None
            made, sizes = plan
            done = direct.planned(made, layer._parameters, x, h0, c0, *shape, *sizes)
            if done is not None:
                return done
        copies = self.of(list(layer._parameters.values()), shape[0], layer._flat, shape)
        if copies is None:
            return None
        return direct.stack(x, h0, c0, copies.weights, copies.scales, *shape, *copies.sizes)  # type: ignore[misc]

    def of(
        self,
        parameters: list[Tensor | None],
        cell: str,
        flat: Callable[[], tuple[Sequence[Tensor | None], int]] | None = None,
        shape: tuple[Any, ...] = (),
    ) -> Copies | None:
        """The copies, as they must be now; None where they cannot be made: a gradient may be wanted, the weights are
        not ordinary tensors on the CPU, or the native kernels are not in force.

        Args:
            parameters: the layer's parameters, None where absent; the copies are made again whenever one has changed.
            cell: which cell the weights belong to.
            flat: gives the weights in torch's flat order, and how many layers and directions they are of; without it
                ``parameters`` are the weights, of one.
            shape: of a layer, what :meth:`infer` takes.
        """
        made = self._made
        if made is None or not made[0].are_still(parameters):
            if not backend.native_scan() or direct.stack is None or not direct.plain():
                return None
            weights, rows = flat() if flat is not None else (parameters, 1)
            if not all(w is None or (type(w) in (Tensor, Parameter) and w.is_cpu) for w in weights):
                return None
            made = (_Sources(parameters), self._copies(weights, rows, cell))
            plan = made[0].plan(made[1], shape) if shape else None
            self._made, self._plan = made, None if plan is None else (plan, made[1].sizes)  # whole, for other threads
            _watch(self)
        return made[1]

    def _copies(self, weights: Sequence[Tensor | None], rows: int, cell: str) -> Copies:
        matrices = {i: w.detach() for i, w in enumerate(weights) if w is not None and w.dim() == 2}
        made: list[Any] = list(weights)
        scales: list[Tensor] = []
        if any(matrix.dtype is not torch.float32 for matrix in matrices.values()):
            return Copies(made, scales, (0, 0))
        gates, fused = ops.GATES[cell], 2 if cell == "gru_reset_before" else ops.GATES[cell]
        blocks = ((gates, 0), (fused, gates - fused), (1, 0))  # of w_ih, w_hh, w_hr
        for place, (i, matrix) in enumerate(matrices.items()):
            copy, scale = compress(matrix, self.kind)
            made[i] = torch.ops.fastseq.pack_weights(copy, *blocks[place % (len(matrices) // rows)])
            if scale is not None:
                scales.append(scale)
        w_hh = matrices[1]
        return Copies(made, scales, (w_hh.shape[0] // gates, w_hh.shape[1]))

    def __getstate__(self) -> dict[str, Any]:  # a copy of the layer has weights of its own
        return {"kind": self.kind, "_made": None, "_plan": None}


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
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    written = {p.untyped_storage().data_ptr() for p in parameters if type(p) in (Tensor, Parameter) and p.is_cpu}
    for copies, (sources, _) in current:
        if any(source.untyped_storage().data_ptr() in written for source in sources.memory):
            copies.forget()
