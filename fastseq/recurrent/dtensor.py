"""Recurrent layers of DTensors, sharded along the batch: see :mod:`fastseq.dtensor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastseq.dtensor import BATCH, Axes, Shards, mesh_of, role_of
from fastseq.recurrent.call import RecurrentCall, Result

_TITLES = {"x": "input", "h0": "h_0", "c0": "c_0", "reset_h": "reset_state", "reset_c": "reset_state's c"}
"""What messages call the fields of a call."""


def run(call: RecurrentCall, run: Callable[[RecurrentCall], Result]) -> Result:
    """``run`` of a call of DTensors, on each process's shard of the batch, with whole weights. Unbatched and packed
    sequences are whole in every process."""
    batched = call.batch_sizes is None and call.x.dim() == 3
    steps = Axes(None if not batched else 0 if call.batch_first else 1)
    state, sequence = (Axes(dim if batched else None) for dim in (1, 0))
    axes = {"x": steps, "lengths": sequence, "reset": steps}
    axes |= dict.fromkeys(("h0", "c0", "reset_h", "reset_c", "state_mask"), state)
    given = {_TITLES.get(field, field): getattr(call, field) for field in axes}
    weights = {f"weights[{n}]": w for n, w in enumerate(call.weights)}
    norms = {f"norm_weights[{n}]": w for n, w in enumerate(call.norm_weights)}
    mesh = mesh_of(given | weights | norms)
    roles = [role_of(n, [(call.x, steps)]) for n in range(mesh.ndim)]
    shards = Shards(mesh, roles, {} if steps.batch is None else {BATCH: call.x.shape[steps.batch]})
    locals_of = zip(axes.items(), given.items(), strict=True)
    own = {field: shards.local(title, t, along) for (field, along), (title, t) in locals_of}
    local = [shards.local(name, w) for name, w in weights.items()]
    norm_weights = [shards.local(name, w) for name, w in norms.items()]
    shard = dataclasses.replace(call, weights=local, norm_weights=norm_weights, **own)
    with shards.drawing(call.draws):
        y, h_n, c_n, states = run(shard)
    return shards.joined(y, steps), shards.joined(h_n, state), shards.joined(c_n, state), shards.joined(states, steps)
