"""DTensors: a call runs on each process's own shards, and its results are DTensors again.

Batches and heads are independent of each other, so a call that is sharded along these needs no communication. All else
is brought into that form first, by DTensor's own redistribution, which is differentiable: what a shard needs whole is
gathered, what is partial is summed, and the gradient of what all shards share is the sum of theirs. Nothing here
imports torch.distributed before a DTensor is met.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastseq.backend import BackendError
from fastseq.checks import ArgumentError, sizes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BATCH, HEADS = "batch", "heads"


def is_dtensor(x: Any) -> bool:
    """Whether it is a DTensor."""
    kind = type(x)
    return kind is not Tensor and kind is not Parameter and isinstance(x, Tensor) and hasattr(x, "device_mesh")


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether one of these, some of which may be None, is a DTensor."""
    for x in tensors:  # noqa: SIM110 - a plain loop takes half the time of any() over a generator
        if x is not None and is_dtensor(x):
            return True
    return False


def mesh_of(tensors: Mapping[str, Any]) -> DeviceMesh:
    """The mesh of a call's tensors, some of which may be None; at least one is a DTensor.

    Raises:
        ArgumentError: not all are DTensors, or not all of one mesh.
    """
    from torch.distributed.tensor import DTensor

    sharded: dict[str, Any] = {name: x for name, x in tensors.items() if x is not None and is_dtensor(x)}
    first = next(iter(sharded))
    mesh = sharded[first].device_mesh
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        if name not in sharded:
            if getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False):
                continue
            raise ArgumentError(
                f"{name} is a torch.Tensor but {first} a DTensor, got both in one call; make {name} a DTensor with "
                f"torch.distributed.tensor.distribute_tensor({name}, mesh), or call inside "
                "torch.distributed.tensor.experimental.implicit_replication()"
            )
        if sharded[name].device_mesh != mesh:
            got = f"{sharded[name].device_mesh} and {mesh}"
            raise ArgumentError(f"{name} and {first} must be on one mesh, got {got}")
    return mesh


class Axes(NamedTuple):
    """Which dimension of a tensor counts the batch and which the heads; None for one that it does not have."""

    batch: int | None = None
    heads: int | None = None


class Shards:
    """How a call is divided over a mesh. ``roles``: for each dimension of the mesh :data:`BATCH`, :data:`HEADS`, or
    None where all its processes do the same; ``whole``: the sizes of batch and heads before they are divided."""

    def __init__(self, mesh: DeviceMesh, roles: Sequence[str | None], whole: Mapping[str, int]) -> None:
        self.mesh, self.roles, self.whole = mesh, tuple(roles), whole
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ArgumentError(f"this process is not in the mesh of the DTensors, {mesh}; call in its processes alone")
        self.coordinate = coordinate

    def count(self, role: str) -> int:
        """Into how many shards."""
        count = 1
        for n, r in enumerate(self.roles):
            count *= self.mesh.size(n) if r == role else 1
        return count

    def index(self, *roles: str) -> int:
        """Which of the shards is this process's."""
        index = 0
        for n, role in enumerate(self.roles):
            if role in roles:
                index = index * self.mesh.size(n) + self.coordinate[n]
        return index

    def own(self, role: str) -> tuple[int, int]:
        """Where this process's shard begins, and its size: cut as torch.chunk cuts, for one dimension of the mesh after
        another."""
        start, size = 0, self.whole[role]
        for n, r in enumerate(self.roles):
            if r == role:
                step = -(-size // self.mesh.size(n))
                before = min(self.coordinate[n] * step, size)
                start, size = start + before, min(step, size - before)
        return start, size

    def _placements(self, axes: Axes) -> list[Any]:
        """Of a tensor with these axes."""
        from torch.distributed.tensor import Replicate, Shard

        dims = (None if role is None else getattr(axes, role) for role in self.roles)
        return [Replicate() if dim is None else Shard(dim) for dim in dims]

    def local(self, name: str, x: Tensor | None, axes: Axes = Axes()) -> Any:  # noqa: B008 - it is immutable
        """This process's part of a tensor: its shard along the axes that it has, whole along all others."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if x is None:
            return None
        batch = self.whole.get(BATCH)
        if axes.batch is not None and x.shape[axes.batch] != batch:
            raise ArgumentError(f"{name} {sizes(x)} must have the batch, {batch}, in dimension {axes.batch}")
        if not is_dtensor(x):  # taken for replicated
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = self._placements(axes)
        # What several shards read whole has a gradient from each.
        shared = [role is not None and p.is_replicate() for role, p in zip(self.roles, placements, strict=True)]
        grads = [Partial() if several else p for several, p in zip(shared, placements, strict=True)]
        # Even where nothing moves: backward, this brings the gradient into the placements that x has.
        own = x.redistribute(placements=placements).to_local(grad_placements=grads)  # type: ignore[attr-defined]
        if own.requires_grad and not torch.compiler.is_compiling():
            own.register_hook(_refuse_second_derivatives)
        return own

    def joined(self, x: Tensor | None, axes: Axes) -> Any:
        """The DTensor of which ``x`` is this process's part."""
        from torch.distributed.tensor import DTensor

        if x is None:
            return None
        shape = list(x.shape)
        for role, dim in zip((BATCH, HEADS), axes, strict=True):
            if dim is not None:
                shape[dim] = self.whole[role]
        order: list[int] = []  # of memory, outermost first; sorted() takes no size that torch.compile leaves open
        for d in range(x.dim()):
            place = len(order)
            while place > 0 and x.stride(order[place - 1]) < x.stride(d):
                place -= 1
            order.insert(place, d)
        stride, inner = [0] * x.dim(), 1
        for d in reversed(order):
            stride[d] = inner
            inner *= shape[d]
        whole: Any = {"shape": torch.Size(shape), "stride": tuple(stride)}
        return DTensor.from_local(x, self.mesh, self._placements(axes), run_check=False, **whole)

    @contextlib.contextmanager
    def drawing(self, wanted: bool) -> Any:
        """Inside, where ``wanted``, random numbers are drawn apart by shards, and alike by processes that do the same,
        as long as the generators of all processes are alike, which DTensor's own random operators ask for too."""
        if not wanted:
            yield
            return
        seeds = torch.randint(2**62, (self.count(BATCH) * self.count(HEADS),))
        device = self.mesh.device_type
        others = [] if device == "cpu" else [torch.get_device_module(device).current_device()]
        with torch.random.fork_rng(others, device_type="cuda" if device == "cpu" else device):
            torch.manual_seed(int(seeds[self.index(BATCH, HEADS)]))
            yield


@torch._disable_dynamo
def in_eager(function: Callable, *args: Any) -> Any:
    """The function, not traced by torch.compile, which has no account of :meth:`Shards.drawing`."""
    return function(*args)


def _refuse_second_derivatives(grad: Tensor) -> None:
    """The backward of DTensor's own to_local is not differentiable, and does not say so: terms would be missing."""
    if torch.is_grad_enabled():
        raise BackendError(
            "second derivatives (create_graph=True) do not go through DTensors: DTensor's to_local cuts them off; take "
            "them with ordinary tensors, as x.full_tensor() gives them"
        )


def role_of(n: int, tensors: Sequence[tuple[Tensor, Axes]]) -> str | None:
    """What the n-th dimension of the mesh divides: the first of BATCH and HEADS along which one of these tensors is
    already sharded there."""
    from torch.distributed.tensor import Shard

    for (x, axes), role in itertools.product(tensors, (BATCH, HEADS)):
        placement = x.placements[n] if is_dtensor(x) else None  # type: ignore[attr-defined]
        if type(placement) is Shard and placement.dim % x.dim() == getattr(axes, role):
            return role
    return None
