"""Few queries against many keys under Triton's interpreter: packed batches, caches in pages, splits that never move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_operators import Options, arguments, assert_right, dense, feature, forward, packed
from devices import operator
from fastseq.kernels.attention import launch as attention_launch
from fastseq.kernels.attention.problem import Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_support import needs_interpreter

import fastseq
from fastseq.attn import checks as checks_attention

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")]

SHAPE = (2, 4, 2, 3, 150, 24, 17)  # B, Hq, Hk, Tq, Tk, D, Dv


@pytest.fixture
def fixed_splits() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def in_pages(x: Tensor, page: int, lengths: Tensor, table: Tensor) -> Tensor:
    """x [B,H,T,D] as a pool [P,page,H,D] by ``table``; what no key of ``lengths`` fills is NaN."""
    pool = torch.full((int(table.max()) + 2, page, x.shape[1], x.shape[3]), math.nan, dtype=x.dtype)
    for b, length in enumerate(lengths.tolist()):
        for j in range(length):
            pool[table[b, j // page], j % page] = x[b, :, j]
    return pool


def paged(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, page: int, options: Options) -> tuple[Tensor, Tensor]:
    """The operator for pages, on k and v [B,H,T,D] scattered over a pool whose unused places hold NaN."""
    pages = -(-k.shape[2] // page)
    table = (torch.randperm(k.shape[0] * pages) + 1).view(k.shape[0], pages).int()
    pools = [in_pages(x, page, lengths, table) for x in (k, v)]
    table[torch.arange(pages) * page >= lengths[:, None]] = -7
    given = arguments({**options, "lengths_k": lengths, "block_table": table})
    return operator("attention_forward", "triton")(q, *pools, *given)


PAGED: dict[str, Any] = {
    "plain": {}, "causal": {"causal": True}, "window": {"window_left": 9, "window_right": 3},
    "prefix": {"prefix_lengths": torch.tensor([40, 0]), "window_left": 9},
    "softcap": {"softcap": 2.0, "causal": True}, "sinks": {"sinks": torch.tensor([0.5, -1, 2, 0])},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0, 0.0])},
}  # fmt: skip


QUICK = [("plain", 7), ("causal", 16), ("window", 64), ("softcap", 7), ("sinks", 64), ("alibi", 16)]
REST = [(name, page) for name in PAGED for page in (7, 16, 64) if (name, page) not in QUICK]


@pytest.mark.parametrize(
    ("name", "page"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]
)  # fmt: skip
def test_pages_hold_the_same_keys_as_a_tensor(name: str, page: int) -> None:
    dtype = {7: torch.float32, 16: torch.bfloat16, 64: torch.float16}[page]
    queries = 40 if page == 16 else 3  # of the forward kernel, and of the decoding one
    q, k, v = dense((*SHAPE[:3], queries, *SHAPE[4:]), dtype)
    lengths = torch.tensor([150, 61])
    room = -(-150 // page) * page
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, room - 150)) for x in (k, v))
    for got, want in zip(
        paged(q, k, v, lengths, page, PAGED[name]),
        forward(q, k, v, {**PAGED[name], "lengths_k": lengths}, "triton"),  # tested by itself
        strict=True,
    ):
        assert torch.equal(got, want)


def test_pages_under_a_mask_a_bias_and_query_lengths() -> None:
    q, k, v = dense((2, 4, 2, 5, 64, 24, 17))
    lengths = torch.tensor([0, 50])
    options = {
        "mask": torch.rand(2, 1, 5, 64) < 0.6, "bias": torch.randn(1, 4, 1, 64), "lengths_q": torch.tensor([5, 2])
    }  # fmt: skip
    for got, want in zip(
        paged(q, k, v, lengths, 16, options), forward(q, k, v, {**options, "lengths_k": lengths}, "triton"), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["plain", "causal", "window"])
def test_packed_queries_on_pages(name: str, fixed_splits: None) -> None:
    """One query, several, none and many, against keys in pages: as against packed keys."""
    lengths_q, lengths_k = [1, 5, 0, 20, 1], [130, 33, 7, 40, 0]
    q, k, v, cu = packed(lengths_q, lengths_k, torch.float32)
    options = PAGED[name]
    want = forward(q, k, v, {**cu, **options}, "triton")
    rows = torch.arange(160) + cu["cu_seqlens_k"][:-1, None]
    k, v = (x[rows.clamp(max=x.shape[0] - 1)].transpose(1, 2) for x in (k, v))  # [B,H,160,D]
    options = {**options, "cu_seqlens_q": cu["cu_seqlens_q"]}
    for a, b in zip(paged(q, k, v, torch.tensor(lengths_k), 16, options), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "more",
    [{"causal": True, "dropout_p": 0.2, "seed": torch.tensor([5])}, {"sinks": torch.tensor([0.5, -1, 2, 0])},
     *(pytest.param(more, marks=pytest.mark.full)
       for more in ({}, {"causal": True}, {"window_left": 5, "bottom_right": False},
                    {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.5, 1, 0])}))],
    ids=["dropout", "sinks", "plain", "causal", "window", "softcap and slopes"],
)  # fmt: skip
def test_a_packed_batch_of_single_queries(more: Options) -> None:
    dtype = torch.bfloat16 if "causal" in more else torch.float32
    q, k, v, cu = packed([1, 1, 0, 1, 1], [70, 1, 5, 150, 0], dtype, spare=1)
    problem = Problem(q, k, v, *arguments({**cu, **more}))
    o, lse = torch.empty(5, 4, 17, dtype=dtype), torch.empty(4, 5)
    made = [plan.kernel.__name__ for plan in attention_launch.plan_forward(problem, o, lse)]
    assert made == ["attention_decode", "attention_merge", "attention_forward"]
    assert_right(q, k, v, {**cu, **more}, backend="triton", repeat=False)


@pytest.mark.parametrize(
    "group", [4, pytest.param(1, marks=pytest.mark.full), pytest.param(20, marks=pytest.mark.full)]
)
def test_short_and_long_sequences_in_one_packed_batch(group: int) -> None:
    _, k, v, cu = packed([1, 4, 5, 33, 16, 17], [150, 33, 64, 40, 70, 1], torch.float32)
    q = torch.randn(76, 2 * group, 24)
    assert_right(q, k, v, {**cu, "causal": True}, with_dlse=True, backend="triton", repeat=False)


def test_single_queries_get_the_same_bits_whatever_the_batch_around_them(fixed_splits: None) -> None:
    """Under torch.use_deterministic_algorithms; here with long sequences, short ones, or none beside them."""
    lengths_q, lengths_k = [1, 60, 1, 3], [700, 90, 3, 300]
    q, k, v, cu = packed(lengths_q, lengths_k, torch.float32)
    options = {"causal": True, "window_left": 650}
    o, lse = forward(q, k, v, {**cu, **options}, "triton")
    starts_q, starts_k = cu["cu_seqlens_q"].tolist(), cu["cu_seqlens_k"].tolist()
    for b in (0, 1, 2, 3):
        own_q, own_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        alone = {f"cu_seqlens_{n}": torch.tensor([0, x[b]]).int() for n, x in (("q", lengths_q), ("k", lengths_k))}
        got = forward(q[own_q], k[own_k], v[own_k], {**alone, **options}, "triton")
        assert torch.equal(got[0], o[own_q])
        assert torch.equal(got[1], lse[:, own_q])


def test_a_cut_under_a_window_is_of_what_it_shows() -> None:
    q, k, v = dense((1, 2, 1, 1, 600, 16, 16))
    assert_right(q, k, v, {"window_left": 290, "causal": True}, backend="triton", repeat=False)
    assert_right(q, k, v, feature("mask of keys", torch.float32, (1, 2, 1, 1, 600, 16, 16)), backend="triton")


class OnlyMemoryAndViews(TorchDispatchMode):
    """Fails on whatever is neither new memory nor a view: a value looked at, a copy, a synchronisation."""

    ALLOWED = (
        "empty",
        "new_empty",
        "zeros",
        "view",
        "transpose",
        "permute",
        "expand",
        "detach",
        "alias",
        "sum",
        "select",
        "slice",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name in self.ALLOWED, f"a launch called {name}"
        return function(*args, **(kwargs or {}))


def refuse_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("a launch looked at a tensor's values")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)


def test_launches_never_look_at_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing waits for the device, and a CUDA graph captures the call."""
    monkeypatch.setattr(attention_launch.Plan, "run", lambda plan: None)
    refuse_values(monkeypatch)
    sequences, sinks = torch.tensor([0, 1, 8]).int(), torch.zeros(4)
    lengths, seed = torch.tensor([3, 150]), torch.tensor([5])
    for shape in (SHAPE, (*SHAPE[:3], 40, *SHAPE[4:])):
        q, k, v = dense(shape)
        bias, mask = torch.zeros(1, 4, 1, 150), torch.ones(2, 1, shape[3], 150, dtype=torch.bool)
        everything = {"bias": bias, "mask": mask, "sinks": sinks, "lengths_q": lengths, "lengths_k": lengths,
                      "dropout_p": 0.1, "seed": seed, "causal": True, "alibi_slopes": sinks}  # fmt: skip
        with OnlyMemoryAndViews():
            o, lse = attention_launch.forward(q, k, v, *arguments(everything))
            attention_launch.backward(o, lse, q, k, v, o, lse, *arguments(everything), True)
    q, k, v = torch.zeros(8, 4, 24), torch.zeros(8, 2, 24), torch.zeros(8, 2, 17)
    table, paged = torch.zeros(2, 3, dtype=torch.int32), {"lengths_k": lengths, "cu_seqlens_q": sequences}
    cu = {"cu_seqlens_q": sequences, "cu_seqlens_k": sequences, "sinks": sinks}
    with OnlyMemoryAndViews():
        o, lse = attention_launch.forward(q, k, v, *arguments(cu))
        attention_launch.backward(o, lse, q, k, v, o, lse, *arguments(cu), False)
        pools = torch.zeros(5, 2, 16, 24), torch.zeros(5, 2, 16, 17)
        attention_launch.forward(q, *pools, *arguments({**paged, "block_table": table}))


def test_the_public_function_never_looks_at_a_value_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its tensors are on a GPU: on the CPU it checks lengths and pages by their values."""
    monkeypatch.setattr(attention_launch.Plan, "run", lambda plan: None)
    monkeypatch.setattr(checks_attention, "values_visible", lambda x: False)
    refuse_values(monkeypatch)
    monkeypatch.setattr(
        OnlyMemoryAndViews, "ALLOWED",
        (*OnlyMemoryAndViews.ALLOWED, "attention_forward", "attention_backward", "randint"),
    )  # fmt: skip
    q, k, v = (x.requires_grad_() for x in dense((*SHAPE[:3], 40, *SHAPE[4:])))
    lengths, cu, table = torch.tensor([3, 150]), torch.tensor([0, 1, 8]).int(), torch.zeros(2, 10).int()
    options = {"mask": torch.ones(2, 1, 40, 150, dtype=torch.bool), "lengths_k": lengths, "dropout_p": 0.1}
    rows = [torch.zeros(8, h, 24) for h in (4, 2, 2)]
    with OnlyMemoryAndViews(), fastseq.use_backend("triton"):
        o = fastseq.attention(q, k, v, causal=True, window=(9, 0), **options)
        torch.autograd.grad(o, (q, k, v), o)
        fastseq.attention(*rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
        pools = torch.zeros(5, 16, 2, 24), torch.zeros(5, 16, 2, 17)
        fastseq.attention(q.detach(), *pools, block_table=table, lengths_k=lengths)
        fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("packed_queries", [False, True])
def test_the_public_function_reads_pages(packed_queries: bool) -> None:
    pools = [torch.randn(9, 16, 2, 24), torch.randn(9, 16, 2, 17)]
    table, lengths = torch.tensor([[5, 2, 8], [1, 0, 0]]), torch.tensor([41, 7])
    q = torch.randn(4, 6, 24) if packed_queries else torch.randn(2, 6, 2, 24)
    options = {"cu_seqlens_q": torch.tensor([0, 1, 4])} if packed_queries else {}

    def call(backend: str, **more: Any) -> Any:
        return fastseq.attention(
            q, *pools, block_table=table, lengths_k=lengths, causal=True, backend=backend, **options, **more
        )

    torch.testing.assert_close(call("triton", return_lse=True), call("reference", return_lse=True))
    with torch.profiler.profile() as seen:
        call("triton")
    assert not any("index" in event.key for event in seen.key_averages()), "nothing is gathered"
    pools[0].requires_grad_()  # a gradient: the keys are gathered, and the kernels take them so
    grads = [torch.autograd.grad(call(name).square().sum(), pools[0])[0] for name in ("triton", "reference")]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("layout", [{}, {"page_size": 16}, {"window": 20}], ids=str)
def test_the_public_function_takes_every_cache(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """Pages are read where they lie, a cache of int8 is widened first: the operator refuses it."""
    cache = fastseq.KVCache(2, 2, 24, dim_v=17, dtype=dtype, **layout)
    cache.append(torch.randn(2, 2, 41, 24), torch.randn(2, 2, 41, 17))
    for queries in (1, 5):
        q = torch.randn(2, 6, queries, 24)
        found = [fastseq.attention(q, cache=cache, causal=True, backend=name) for name in ("triton", "reference")]
        torch.testing.assert_close(*found)
    rows, scales = torch.zeros(2, 2, 4, 24, dtype=torch.int8), torch.ones(2, 2, 4, 1)
    given = arguments({"k_scale": scales, "v_scale": scales})
    with pytest.raises(RuntimeError, match=r"the Triton kernels read no int8 keys \(k_scale\)"):
        torch.ops.fastseq.attention_forward.triton(q, rows, rows, *given)


def test_the_operator_for_pages_passes_opcheck_and_vmap() -> None:
    lengths, table = torch.tensor([5, 16]), torch.tensor([[0], [1]]).int()
    q, k, v = torch.randn(2, 4, 3, 24), torch.randn(2, 16, 2, 24), torch.randn(2, 16, 2, 17)
    rest = arguments({"lengths_k": lengths, "scale": 0.2, "causal": True, "block_table": table})
    op = torch.ops.fastseq.attention_forward.triton
    torch.library.opcheck(op, (q, k, v, *rest), test_utils=("test_schema", "test_faketensor"))
    stack = torch.randn(3, 2, 4, 3, 24)
    each = torch.stack([op(x, k, v, *rest)[0] for x in stack])
    assert torch.equal(torch.vmap(lambda x: op(x, k, v, *rest)[0])(stack), each)


def test_pages_that_do_not_fit_are_refused_before_they_do_harm() -> None:
    lengths, table = torch.tensor([5, 16]), torch.tensor([[0], [1]]).int()
    q, k, v = torch.randn(2, 4, 3, 24), torch.randn(2, 16, 2, 24), torch.randn(2, 16, 2, 17)
    settings = {"scale": 0.2, "causal": True, "lengths_k": lengths, "block_table": table}
    op = torch.ops.fastseq.attention_forward.triton
    for message, values, more in (
        ("block_table must be int32", v, {"block_table": table.long()}),
        (r"block_table must be int32 of shape \[2", v, {"block_table": table[:1]}),
        ("pages", v[:1], {}),
        ("lengths_k must be torch.int64", v, {"lengths_k": lengths[:1]}),
        ("neither cu_seqlens_k nor dropout", v, {"dropout_p": 0.5, "seed": torch.tensor([1])}),
        ("differ in heads or length", v[:, :8], {}),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(q, k, values, *arguments({**settings, **more}))
    for values, more in ((v, {"block_table": table.long()}), (v, {"block_table": table[:1]}), (v[:1], {})):
        with pytest.raises(RuntimeError, match="pages need as many of k as of v, lengths_k and an int32 block_table"):
            torch.ops.fastseq.attention_forward.native(q, k, values, *arguments({**settings, **more}))
