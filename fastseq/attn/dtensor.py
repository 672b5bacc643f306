"""Attention of DTensors, sharded along batch or heads: see :mod:`fastseq.dtensor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from fastseq.attn.call import PER_SEQUENCE, TENSORS, AttentionCall
from fastseq.dtensor import BATCH, HEADS, Axes, Shards, mesh_of, role_of

_KEYS, _PAIRS, _PER_HEAD = ("k", "v", "k_scale", "v_scale"), ("bias", "mask"), ("sinks", "alibi_slopes")


def attend(call: AttentionCall, run: Callable[[AttentionCall], tuple[Tensor, Any]]) -> tuple[Any, Any]:
    """``run`` of a call of DTensors, on each process's shard; o and, where there is one, lse are DTensors.

    Key heads that the shards do not divide are whole in every process; each takes the one that its query heads share.
    """
    mesh = mesh_of({name: getattr(call, name) for name in TENSORS})
    axes = _axes(call)
    packed = call.cu_seqlens_q is not None
    roles = [role_of(n, [(getattr(call, x), axes[x]) for x in "qkv"]) for n in range(mesh.ndim)]
    whole = {BATCH: -1 if packed else call.q.shape[0], HEADS: call.q.shape[1]}
    heads_q, heads_k = call.q.shape[1], call.k.shape[1 if call.block_table is None else 2]
    shards = Shards(mesh, roles, whole)
    share = shared_heads(heads_q, heads_k, shards.count(HEADS))
    if share is None:
        shards, share = Shards(mesh, [None if role == HEADS else role for role in roles], whole), 1
    local = {name: _local(shards, call, name, axes[name], share) for name in TENSORS}
    with shards.drawing(call.dropout_p > 0.0):
        o, lse = run(call._replace(**local))
    batch = None if packed else 0
    return shards.joined(o, Axes(batch, 1)), shards.joined(lse, Axes(batch, 0 if packed else 1))


def shared_heads(heads_q: int, heads_k: int, shards: int) -> int | None:
    """How many shards of the query heads use one shard of the key heads: 1 where both divide evenly, more where several
    use one key head; None where heads cannot be divided so."""
    if heads_k == 0 or heads_q % shards:
        return None
    if heads_k % shards == 0:
        return 1
    return shards // heads_k if shards % heads_k == 0 else None


def _axes(call: AttentionCall) -> dict[str, Axes]:
    """Of every tensor of a call."""
    packed, paged = call.cu_seqlens_q is not None, call.block_table is not None
    batch = None if packed else 0
    axes = dict.fromkeys(TENSORS, Axes())
    axes["q"] = Axes(batch, 1)
    axes |= dict.fromkeys(_KEYS, Axes(None, 2) if paged else Axes(batch, 1))
    if not packed:
        axes |= dict.fromkeys((*PER_SEQUENCE, "block_table"), Axes(0, None))
    axes |= dict.fromkeys(_PER_HEAD, Axes(None, 0))
    for name in _PAIRS:
        x = getattr(call, name)
        if x is not None:
            own = (d if x.shape[d] == call.q.shape[d] else None for d in (0, 1))
            axes[name] = Axes(*own)
    return axes


def _local(shards: Shards, call: AttentionCall, name: str, axes: Axes, share: int) -> Any:
    """This process's part of one of a call's tensors."""
    x = getattr(call, name)
    if x is None or share == 1 or name not in _KEYS:
        return shards.local(name, x, axes)
    assert axes.heads is not None
    return shards.local(name, x, Axes(axes.batch)).narrow(axes.heads, shards.index(HEADS) // share, 1)


Layer = TypeVar("Layer", bound=nn.MultiheadAttention)


def multihead(
    layer: Layer, tensors: Mapping[str, Any], run: Callable[[Layer, Mapping[str, Any]], tuple[Tensor, Any]]
) -> tuple[Any, Any]:
    """``run`` of a MultiheadAttention and the tensors of its call, on each process's shard of the batch, with whole
    parameters; its results are DTensors."""
    own, out = layer._parameters, layer.out_proj._parameters
    parameters = own | {f"out_proj.{name}": x for name, x in out.items()}
    mesh = mesh_of({**tensors, **parameters})
    query = tensors["query"]
    batched = query.dim() == 3
    steps = Axes(None if not batched else 0 if layer.batch_first else 1)
    first = Axes(0 if batched else None)
    roles = [role_of(n, [(query, steps)]) for n in range(mesh.ndim)]
    shards = Shards(mesh, roles, {BATCH: query.shape[steps.batch]} if batched else {})
    local = {name: shards.local(name, tensors[name], steps) for name in ("query", "key", "value")}
    local["key_padding_mask"] = shards.local("key_padding_mask", tensors["key_padding_mask"], first)
    mask = shards.local("attn_mask", tensors["attn_mask"])
    if mask is not None and mask.dim() == 3 and batched:  # [N * heads, L, S]
        start, size = shards.own(BATCH)
        mask = mask.narrow(0, start * layer.num_heads, size * layer.num_heads)
    found = {name: shards.local(name, x) for name, x in parameters.items()}
    out_proj = _with_parameters(layer.out_proj, {name: found[f"out_proj.{name}"] for name in out})
    shard = _with_parameters(layer, {name: found[name] for name in own}, out_proj=out_proj)
    with shards.drawing(layer.training and layer.dropout > 0.0):
        y, weights = run(shard, {**local, "attn_mask": mask})
    return shards.joined(y, steps), shards.joined(weights, first)


def _with_parameters(module: Any, parameters: Mapping[str, Any], **modules: nn.Module) -> Any:
    """The module with other parameters, in a copy of its own; the parameters need not be leaves."""
    copy = object.__new__(type(module))
    vars(copy).update(vars(module), _parameters=dict(parameters), _modules=dict(modules))
    return copy
