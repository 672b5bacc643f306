"""One of the processes of test_distributed.py: ``python distributed_worker.py RANK WORLD STORE``.

Runs every function named ``check_*`` in order, together with the other processes, and prints a line after each. The
first that fails ends the process.
"""

from __future__ import annotations

import copy
import datetime
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves, tree_map

import fastseq

REPLICATE, BATCH, HEADS = Replicate(), Shard(0), Shard(1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def sharded(x: Any, placement: Any = REPLICATE) -> Any:
    """A DTensor leaf of the same values; with Partial they are one process's, and the others' zeros."""
    if not isinstance(x, Tensor):
        return x
    if isinstance(placement, Partial):
        local = x.detach() * (dist.get_rank() == 0)
        return DTensor.from_local(local, mesh(), [placement], run_check=False).requires_grad_(x.requires_grad)
    return distribute_tensor(x.detach(), mesh(), [placement]).requires_grad_(x.requires_grad)


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(found: Any) -> Any:
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, found)


def scalar(found: Any) -> Tensor:
    """Something that every result's every element counts in."""
    total: Any = 0
    for x in tree_leaves(found):
        if x is not None:
            x = x.full_tensor() if isinstance(x, DTensor) else x
            x = torch.where(torch.isfinite(x), x, 0.0)
            total = total + (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum()
    return total


def same(
    function: Callable, inputs: list, placements: list, expected: Any = None, others: Any = None, torchs_own=False
) -> Any:
    """The function of DTensors equals the function of tensors, gradients of inputs and of ``others`` (two lists of the
    parameters used, whole and sharded) too. ``torchs_own``: layers of torch's take part, with partial gradients."""
    given = [sharded(x, p) for x, p in zip(inputs, placements, strict=True)]
    theirs, ours = (expected or function)(*inputs), function(*given)
    torch.testing.assert_close(whole(ours), theirs)
    alone, apart = others or ([], [])
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad] + list(alone)
    shards = [x for x in given if isinstance(x, Tensor) and x.requires_grad] + list(apart)
    wanted = torch.autograd.grad(scalar(theirs), leaves)
    found = torch.autograd.grad(scalar(ours), shards)
    torch.testing.assert_close(list(whole(list(found))), list(wanted))
    for gradient, x in zip(found, shards, strict=True):
        assert isinstance(x.placements[0], Partial) or gradient.placements == x.placements or torchs_own
    return ours


def attention(q, k, v, bias=None, mask=None, sinks=None, lengths_k=None):
    return fastseq.attention(
        q, k, v, bias=bias, mask=mask, sinks=sinks, lengths_k=lengths_k, causal=True, return_lse=True
    )


def qkv(batch: int = 3, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    return [draw(batch, heads, 5, 8), draw(batch, kv_heads, 7, 8), draw(batch, kv_heads, 7, 3)]


def check_attention_by_batch():
    """3 sequences: one process has 2 of them, the other 1; of 1 sequence it has none."""
    o, lse = same(attention, qkv(), [BATCH] * 3)
    assert o.placements == lse.placements == (BATCH,)
    same(attention, qkv(batch=1), [BATCH] * 3)


def check_attention_by_heads():
    o, lse = same(attention, qkv(), [HEADS] * 3)
    assert o.placements == lse.placements == (HEADS,)
    assert o.to_local().shape == (3, 2, 5, 3)


def check_one_key_head_serves_the_query_heads_of_all_processes():
    o, _ = same(attention, qkv(kv_heads=1), [HEADS, REPLICATE, REPLICATE])
    assert o.placements == (HEADS,)


def check_heads_that_do_not_divide_are_gathered():
    o, _ = same(attention, qkv(heads=9, kv_heads=3), [HEADS] * 3)
    assert o.placements == (REPLICATE,)


def check_attention_of_mixed_placements():
    for placements in (
        [BATCH, HEADS, REPLICATE],
        [REPLICATE, BATCH, BATCH],
        [Partial(), REPLICATE, HEADS],
        [Shard(2)] * 3,
        [Partial()] * 3,
        [Shard(-2), Shard(3), BATCH],
        [Shard(-4), REPLICATE, Partial()],
    ):
        same(attention, qkv(), placements)


def check_options_follow_batch_and_heads():
    lengths = torch.tensor([4, 0, 7])
    for first in (BATCH, HEADS):
        for bias, mask in (((3, 4, 5, 7), (3, 1, 1, 7)), ((4, 5, 7), (1, 4, 1, 7)), ((5, 7), (5, 7))):
            inputs = [*qkv(), draw(*bias), torch.rand(mask) < 0.7, draw(4), lengths]
            same(attention, inputs, [first] * 3 + [REPLICATE] * 4)
            same(attention, inputs, [first] * 3 + [BATCH] * 4)


def check_packed_and_paged_attention():
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)

    def packed(q, k, v, starts):
        return fastseq.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, return_lse=True)

    inputs = [draw(9, 4, 8), draw(9, 2, 8), draw(9, 2, 8), starts]
    for placement in (HEADS, BATCH):
        same(packed, inputs, [placement] * 3 + [REPLICATE])

    def paged(q, k, v, table, lengths):
        return fastseq.attention(q, k, v, block_table=table, lengths_k=lengths)

    table = torch.tensor([[1, 2], [3, 0], [5, 6]], dtype=torch.int32)
    inputs = [draw(3, 4, 2, 8), draw(7, 4, 2, 8), draw(7, 4, 2, 8), table, torch.tensor([7, 3, 8])]
    same(paged, inputs, [BATCH, REPLICATE, REPLICATE, BATCH, BATCH])
    same(paged, inputs, [HEADS, Shard(2), Shard(2), REPLICATE, REPLICATE])


def check_torchs_signature():
    same(
        lambda q, k, v: fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        qkv(),
        [HEADS] * 3,
    )


def check_without_gradients():
    with torch.no_grad():
        q, k, v = qkv()
        found = fastseq.attention(*(sharded(x, BATCH) for x in (q, k, v)))
        torch.testing.assert_close(whole(found), fastseq.attention(q, k, v))


def check_dropout_is_drawn_apart_by_shards_and_alike_by_replicas():
    q = torch.ones(2, 2, 3, 4)
    v = torch.eye(50).expand(2, 2, 50, 50)
    for placement in (BATCH, HEADS, REPLICATE):
        torch.manual_seed(5)
        given = [sharded(x, placement) for x in (q, torch.ones(2, 2, 50, 4), v)]
        dropped = whole(fastseq.attention(*given, dropout_p=0.5)) == 0
        both = [torch.empty_like(dropped) for _ in range(2)]
        dist.all_gather(both, dropped)
        assert torch.equal(*both)
        assert not torch.equal(dropped[0], dropped[1])
        assert not torch.equal(dropped[:, 0], dropped[:, 1])
        assert 0.4 < dropped.float().mean() < 0.6
        following = torch.rand(3)
        both = [torch.empty_like(following) for _ in range(2)]
        dist.all_gather(both, following)
        assert torch.equal(*both)


def check_a_mixture_is_refused_unless_replication_is_implied():
    q, k, v = qkv()
    given = [sharded(x, BATCH) for x in (q, k, v)]
    mask = torch.rand(5, 7) < 0.5
    refused("mask is a torch.Tensor but q a DTensor", lambda: attention(*given, mask=mask))
    refused("q is a torch.Tensor but k a DTensor", lambda: attention(q, *given[1:]))
    layer = fastseq.nn.GRU(4, 5)
    refused("is a torch.Tensor but input a DTensor", lambda: layer(sharded(torch.randn(6, 3, 4), HEADS)))
    attended = fastseq.nn.MultiheadAttention(4, 2)
    x = sharded(torch.randn(6, 3, 4), HEADS)
    refused("is a torch.Tensor but query a DTensor", lambda: attended(x, x, x))
    refused("query is a torch.Tensor", lambda: distribute_module(attended, mesh())(*[torch.randn(6, 3, 4)] * 3))
    with implicit_replication():
        torch.testing.assert_close(whole(attention(*given, mask=mask)), attention(q, k, v, mask=mask))


def refused(message: str, call: Callable[[], object], kind: type[Exception] = fastseq.ArgumentError) -> None:
    with pytest.raises(kind, match=message):
        call()


def check_second_derivatives_are_refused():
    """DTensor's own backward would leave their terms out."""
    given = [sharded(x, BATCH) for x in qkv()]
    o = fastseq.attention(*given)
    refused(
        "second derivatives", lambda: torch.autograd.grad(scalar(o), given, create_graph=True), fastseq.BackendError
    )


def check_an_encoder_layer_by_batch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    fastseq.patch(layer)
    apart = distribute_module(copy.deepcopy(layer), mesh())
    others = list(layer.parameters()), list(apart.parameters())
    same(lambda x: apart(x), [draw(4, 5, 8)], [BATCH], lambda x: layer(x), others, torchs_own=True)


def check_packed_and_unbatched_sequences_are_whole_in_every_process():
    layer = fastseq.nn.LSTM(4, 5, dtype=torch.float64)
    apart = distribute_module(copy.deepcopy(layer), mesh())
    others = list(layer.parameters()), list(apart.parameters())
    y, _ = same(lambda x: apart(x), [draw(6, 4)], [BATCH], lambda x: layer(x), others)
    assert y.placements == (REPLICATE,)
    sizes = torch.tensor([3, 3, 1])

    def packed(model, data):
        y, state = model(nn.utils.rnn.PackedSequence(data, sizes))
        return y.data, state

    same(lambda x: packed(apart, x), [draw(7, 4)], [BATCH], lambda x: packed(layer, x), others)


def check_the_fast_layout_is_kept():
    """o of q made by view and transpose is viewed as [B, T, heads * D] again."""
    x = sharded(draw(2, 5, 4, 8), Shard(2)).transpose(1, 2)
    o = fastseq.attention(x, x, x)
    assert o.stride() == x.stride()
    assert o.transpose(1, 2).view(2, 5, 32).placements == (Shard(2),)


def check_recurrent_layers_by_batch():
    lengths = torch.tensor([4, 0, 7, 7, 2])
    for name, options in (("RNN", {}), ("GRU", {"bidirectional": True}), ("LSTM", {"num_layers": 2, "proj_size": 3}),
                          ("GRU", {"reset_after": False}), ("LSTM", {"batch_first": True})):  # fmt: skip
        layer = getattr(fastseq.nn, name)(4, 5, dtype=torch.float64, **options)
        apart = distribute_module(copy.deepcopy(layer), mesh())
        others = list(layer.parameters()), list(apart.parameters())
        first = options.get("batch_first", False)
        x, placement = (draw(5, 7, 4), BATCH) if first else (draw(7, 5, 4), HEADS)
        reset = torch.rand(x.shape[:2]) < 0.2
        rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        h0 = draw(rows, 5, options.get("proj_size", 5))
        hx: Any = [h0, draw(rows, 5, 5)] if name == "LSTM" else [h0]

        def run(model, x, lengths, reset, *hx):
            hx = tuple(hx) if len(hx) == 2 else hx[0] if hx else None
            return model(x, hx, lengths=lengths, reset=reset)

        for inputs, placements in (
            ([x, None, None], [placement, None, None]),
            ([x, lengths, reset, *hx], [placement, BATCH, placement, *[HEADS] * len(hx)]),
            ([x, lengths, reset, *hx], [placement, *[REPLICATE] * (2 + len(hx))]),
            ([x, lengths, reset, *hx], [Shard(2), BATCH, REPLICATE, *[Partial()] * len(hx)]),
        ):
            found = same(lambda *a, m=apart: run(m, *a), inputs, placements, lambda *a, m=layer: run(m, *a), others)
            if placements[0] == placement:
                assert found[0].placements == (placement,)


def check_a_weight_that_is_sharded_is_gathered():
    x, w_ih, w_hh = draw(6, 3, 4), draw(15, 4), draw(15, 5)
    same(
        lambda x, *w: fastseq.functional.gru(x, None, list(w), has_biases=False),
        [x, w_ih, w_hh], [HEADS, BATCH, HEADS],
    )  # fmt: skip


def check_masks_of_states_by_batch():
    """Also one that requires a gradient, which the reference computes."""
    x, mask, w_ih, w_hh = draw(6, 3, 4), draw(1, 3, 5), draw(15, 4), draw(15, 5)

    def run(x, mask, *weights):
        return fastseq.functional.gru(x, None, list(weights), has_biases=False, state_mask=mask)

    for own in (mask, mask.detach()):
        same(run, [x, own, w_ih, w_hh], [HEADS, HEADS, REPLICATE, REPLICATE])
        same(run, [x, own, w_ih, w_hh], [HEADS, REPLICATE, REPLICATE, BATCH])


def check_dropouts_of_a_recurrence():
    layer = distribute_module(
        fastseq.nn.LSTM(8, 8, 2, batch_first=True, recurrent_dropout=0.5, weight_dropout=0.5), mesh()
    )
    x, found = sharded(torch.randn(4, 5, 8), BATCH), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        y, _ = layer(x)
        assert y.placements == (BATCH,)
        found.append([whole(y), *(whole(d) for d in torch.autograd.grad(scalar(y), list(layer.parameters())))])
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])


def check_cells_by_batch():
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        cell = getattr(fastseq.nn, name)(4, 5, dtype=torch.float64)
        apart = distribute_module(copy.deepcopy(cell), mesh())
        others = list(cell.parameters()), list(apart.parameters())
        same(lambda x, m=apart: m(x), [draw(3, 4)], [BATCH], lambda x, m=cell: m(x), others)


def check_multihead_attention_by_batch():
    for options in ({}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 8, "vdim": 8}):
        layer = fastseq.nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
        apart = distribute_module(copy.deepcopy(layer), mesh())
        others = list(layer.parameters()), list(apart.parameters())
        x, placement = (draw(3, 5, 8), BATCH) if options.get("batch_first") else (draw(5, 3, 8), HEADS)
        padding = torch.tensor([[False] * 4 + [True], [True] * 5, [False] * 5])
        for mask in (None, torch.ones(5, 5).triu(1).bool(), draw(6, 5, 5)):
            for need_weights in (False, True):

                def run(model, x, mask, padding, need_weights=need_weights):
                    return model(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)

                y, weights = same(
                    lambda *a, m=apart: run(m, *a), [x, mask, padding], [placement, BATCH, REPLICATE],
                    lambda *a, m=layer: run(m, *a), others,
                )  # fmt: skip
                assert y.placements == (placement,)
                assert weights is None or weights.placements == (BATCH,)


class Attended(nn.Module):
    """Attention as models write it that are to be divided by heads: a Linear each for q, k, v and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, n, dtype=torch.float64) for n in (16, 8, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(fastseq.attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


def check_parallelize_module_divides_the_heads():
    for as_dtensor in (False, True):
        model = Attended()
        x = torch.randn(3, 5, 16, dtype=torch.float64)
        columns = ColwiseParallel(use_local_output=not as_dtensor)
        plan = {**dict.fromkeys("qkv", columns), "out": RowwiseParallel()}
        apart = parallelize_module(copy.deepcopy(model), mesh(), plan)
        ours, theirs = apart(x), model(x)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        for mine, p in zip(apart.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), p.grad)


def check_dtensors_compile_in_one_graph():
    layer = distribute_module(fastseq.nn.LSTM(8, 8, batch_first=True, dtype=torch.float64), mesh())
    x = draw(4, 5, 8)
    for function, inputs, placements in (
        (lambda q, k, v: fastseq.attention(q, k, v, causal=True), qkv(4), [HEADS] * 3),
        (lambda x: layer(x)[0], [x], [BATCH]),
    ):
        given = [sharded(x, p) for x, p in zip(inputs, placements, strict=True)]
        results = [f(*given) for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))]
        torch.testing.assert_close(*map(whole, results))
        torch.testing.assert_close(*(whole(list(torch.autograd.grad(scalar(r), given))) for r in results))


def check_one_compiled_graph_serves_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for keys in (6, 7, 9):
            q, k, v = (sharded(torch.randn(4, 4, n, 8), BATCH) for n in (5, keys, keys))
            torch.testing.assert_close(*(whole(f(q, k, v)) for f in (compiled, attention)))


def check_dropout_breaks_a_compiled_graph():
    layer = distribute_module(fastseq.nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True, dtype=torch.float64), mesh())
    q, x = sharded(draw(4, 2, 5, 8), BATCH), sharded(draw(4, 5, 8), BATCH)
    for function, given in ((lambda q: fastseq.attention(q, q, q, dropout_p=0.5), q), (lambda x: layer(x)[0], x)):
        torch._dynamo.reset()
        results = []
        for f in (function, torch.compile(function, backend="aot_eager")):
            torch.manual_seed(3)
            results.append(whole(f(given)))
        torch.testing.assert_close(*results)


def check_a_compiled_multihead_attention_breaks_its_graph():
    layer = distribute_module(fastseq.nn.MultiheadAttention(8, 2, dtype=torch.float64), mesh())
    x = sharded(draw(5, 4, 8), HEADS)
    torch.testing.assert_close(*(whole(f(x, x, x)) for f in (layer, torch.compile(layer, backend="aot_eager"))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.cell(x[:, -1])


def trained(patched_first: bool, each: bool, **options: Any) -> None:
    """Three steps under FSDP2 beside one process's, with gradients, evaluation in between, and unpatch at the end."""
    alone = Model().double() if "weights" not in options else Model()
    model = copy.deepcopy(alone)
    if patched_first:
        report = fastseq.patch(model, **options)
    for part in (*([model.lstm, model.attention, model.cell] * each), model):
        fully_shard(part, mesh=mesh())
    classes = [type(part) for part in (model.lstm, model.attention, model.cell)]
    if not patched_first:
        report = fastseq.patch(model, **options)
    assert len(report) == 3
    assert not report.left
    assert isinstance(model.lstm, fastseq.nn.LSTM)
    optimizers = [torch.optim.SGD(m.parameters(), 1.0) for m in (model, alone)]
    near = {"atol": 3e-2, "rtol": 3e-2} if options.get("weights") else {}
    rank = dist.get_rank()
    for _ in range(3):
        x = torch.randn(4, 5, 8, dtype=alone.cell.weight_ih.dtype)
        model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        alone(x).square().mean().backward()
        for mine, p in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model(x), alone(x), **near)
    assert len(fastseq.unpatch(model)) == 3
    torch.testing.assert_close(model(x), alone(x))
    if not patched_first:
        assert [type(part).__name__ for part in (model.lstm, model.attention, model.cell)] == [
            c.__name__ for c in classes
        ]
    if each:
        model.lstm.unshard()  # still of FSDP's class
        model.lstm.reshard()


def check_fsdp_of_a_patched_model():
    trained(True, False)
    trained(True, True)


def check_fsdp_before_patch():
    trained(False, False)
    trained(False, True)


def check_fsdp_of_layers_that_keep_their_class():
    trained(True, True, keep_class=True)
    trained(False, True, keep_class=True)


def check_smaller_weights_follow_an_optimizer_under_fsdp():
    trained(True, True, weights="bfloat16")
    trained(False, False, weights="bfloat16")


def check_copies_are_made_again_after_a_step_of_sharded_parameters():
    """What FSDP gathers may come back at the same address and version, with other values."""
    layer = fastseq.nn.LSTM(8, 8)
    fastseq.patch(layer, weights="int8")
    with torch.no_grad():
        layer(torch.randn(5, 2, 8))
    assert layer._compressed.nbytes > 0
    weight = nn.Parameter(sharded(torch.randn(4, 4)))
    weight.grad = sharded(torch.randn(4, 4))
    torch.optim.SGD([weight], 1.0).step()
    assert layer._compressed.nbytes == 0


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            check()
            dist.barrier()
            print(f"passed {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
