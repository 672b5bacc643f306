"""Recurrent layers of DTensors, sharded along the batch: see :mod:`fastseq.dtensor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastseq.dtensor import BATCH, Axes, Shards, mesh_of, role_of
from fastseq.recurrent.call import RecurrentCall, Result


def run(call: RecurrentCall, run: Callable[[RecurrentCall], Result]) -> Result:
    """``run`` of a call of DTensors, on each process's shard of the batch, with whole weights. Unbatched and packed
    sequences are whole in every process."""
    batched = call.batch_sizes is None and call.x.dim() == 3
    steps = Axes(None if not batched else 0 if call.batch_first else 1)
    state, sequence = (Axes(dim if batched else None) for dim in (1, 0))
    axes = {"input": steps, "h_0": state, "c_0": state, "lengths": sequence, "reset": steps, "state_mask": state}
    tensors = call.x, call.h0, call.c0, call.lengths, call.reset, call.state_mask
    given = dict(zip(axes, tensors, strict=True))
    weights = {f"weights[{n}]": w for n, w in enumerate(call.weights)}
    norms = {f"norm_weights[{n}]": w for n, w in enumerate(call.norm_weights)}
    mesh = mesh_of(given | weights | norms)
    roles = [role_of(n, [(call.x, steps)]) for n in range(mesh.ndim)]
    shards = Shards(mesh, roles, {} if steps.batch is None else {BATCH: call.x.shape[steps.batch]})
    x, h0, c0, lengths, reset, mask = (shards.local(name, t, axes[name]) for name, t in given.items())
    local = [shards.local(name, w) for name, w in weights.items()]
    own = {"lengths": lengths, "reset": reset, "state_mask": mask, "weights": local}
    own["norm_weights"] = [shards.local(name, w) for name, w in norms.items()]
    shard = dataclasses.replace(call, x=x, h0=h0, c0=c0, **own)
    with shards.drawing(call.draws_mask or (call.training and call.dropout > 0.0)):
        y, h_n, c_n, states = run(shard)
    return shards.joined(y, steps), shards.joined(h_n, state), shards.joined(c_n, state), shards.joined(states, steps)
