"""``KVCache``: what is appended a few positions at a time is what attention sees, however the cache lies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_support import DecodingStep
from hypothesis import given, settings
from hypothesis import strategies as st
from support import needs_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.checks import ArgumentError

BATCH, HEADS, DIM, DIM_V = 3, 2, 8, 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {"capacity": 200},
    "contiguous that grows": {},
    "paged": {"capacity": 600, "page_size": 16},
    "paged that grows": {"page_size": 7},
    "ring": {"window": 11},
    "ring in small pages": {"window": 11, "page_size": 3},
    "ring of one": {"window": 1},
}


def made(layout: str, **more: Any) -> fastseq.KVCache:
    return fastseq.KVCache(BATCH, HEADS, DIM, dim_v=DIM_V, **{**LAYOUTS[layout], **more})


def drawn(n: int, t: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, HEADS, t, DIM), torch.randn(n, HEADS, t, DIM_V)


class Model:
    """What a cache should hold: a list of tensors a sequence."""

    def __init__(self) -> None:
        self.k = [torch.zeros(HEADS, 0, DIM)] * BATCH
        self.v = [torch.zeros(HEADS, 0, DIM_V)] * BATCH

    def append(self, k: Tensor, v: Tensor, sequences: list[int]) -> None:
        for i, b in enumerate(sequences):
            self.k[b], self.v[b] = torch.cat((self.k[b], k[i]), 1), torch.cat((self.v[b], v[i]), 1)

    def reset(self, sequences: list[int]) -> None:
        for b in sequences:
            self.k[b], self.v[b] = self.k[b][:, :0], self.v[b][:, :0]

    def attention(self, q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        alone = [
            fastseq.attention(q[b : b + 1], self.k[b][None], self.v[b][None], return_lse=True, **options)
            for b in range(BATCH)
        ]
        return torch.cat([o for o, _ in alone]), torch.cat([lse for _, lse in alone])


STEP = st.tuples(
    st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=BATCH, unique=True), st.integers(1, 30), st.booleans()
)


@given(layout=st.sampled_from(sorted(LAYOUTS)), steps=st.lists(STEP, min_size=1, max_size=8), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_pieces_appended_to_any_sequences_are_what_attention_sees(layout, steps, seed):
    torch.manual_seed(seed)
    cache, model = made(layout), Model()
    window = cache.window
    for sequences, t, forget in steps:
        if forget:
            cache.reset(torch.tensor(sequences))
            model.reset(sequences)
        k, v = drawn(len(sequences), t)
        everyone = sequences == list(range(BATCH))
        cache.append(k, v, sequences=None if everyone else torch.tensor(sequences))
        model.append(k, v, sequences)
        assert cache.lengths.tolist() == [x.shape[1] for x in model.k]
        # A ring keeps what the newest t positions may see, for those that were given t.
        queries = 1 if window is not None and not everyone else min(t, 3)
        q = torch.randn(BATCH, 2 * HEADS, queries, DIM)
        limits = {"causal": True} if window is None else {"causal": True, "window": (window - 1, -1)}
        got = fastseq.attention(q, cache=cache, causal=True, return_lse=True)
        torch.testing.assert_close(got, model.attention(q, **limits))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": (5, -1)}], ids=str)
def test_prefill_in_chunks_is_prefill_at_once(layout, options):
    if "window" in options and layout == "ring of one":
        options = {"window": (0, 0)}
    k, v = drawn(BATCH, 90)
    q = torch.randn(BATCH, 2 * HEADS, 90, DIM)
    cache, found = made(layout), []
    for start in (0, 1, 40, 41, 77):
        end = {0: 1, 1: 40, 40: 41, 41: 77, 77: 90}[start]
        cache.append(k[:, :, start:end], v[:, :, start:end])
        found.append(fastseq.attention(q[:, :, start:end], cache=cache, causal=True, **options))
    window = options.get("window") or (None if cache.window is None else (cache.window - 1, -1))
    whole = fastseq.attention(q, k, v, causal=True, **{**options, "window": window})
    torch.testing.assert_close(torch.cat(found, 2), whole)


@needs_native
def test_every_layout_gives_the_same_bits():
    k, v = drawn(BATCH, 150)
    q = torch.randn(BATCH, HEADS, 1, DIM)
    found = []
    for layout in ("contiguous", "contiguous that grows", "paged", "paged that grows"):
        cache = made(layout)
        cache.append(k, v)
        found.append(fastseq.attention(q, cache=cache, backend="native"))
    assert all(torch.equal(o, found[0]) for o in found)


@needs_native
def test_room_that_is_not_in_use_does_not_change_the_bits():
    k, v, q = torch.randn(1, 1, 300, DIM), torch.randn(1, 1, 300, DIM_V), torch.randn(1, 2, 1, DIM)
    found = []
    for options in ({"capacity": 300}, {"capacity": 10000}, {"capacity": 10000, "page_size": 16}, {"page_size": 7}):
        cache = fastseq.KVCache(1, 1, DIM, dim_v=DIM_V, **options)
        cache.append(k, v)
        found.append(fastseq.attention(q, cache=cache, backend="native"))
    assert all(torch.equal(o, found[0]) for o in found)


@needs_native
def test_the_work_of_a_step_does_not_grow_with_the_pool():
    cache = fastseq.KVCache(4, 1, 4, capacity=4000, page_size=1)
    assert cache.table is not None
    own = {x.untyped_storage().data_ptr() for x in cache.buffers()}
    made_sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in own:
                made_sizes.append(out.numel())
            return out

    with Sizes():
        cache.append(torch.randn(4, 1, 2, 4), torch.randn(4, 1, 2, 4))
        fastseq.attention(torch.randn(4, 1, 1, 4), cache=cache)
    assert max(made_sizes) < 1000 < cache.table.numel()


def test_a_ring_has_the_memory_of_its_window():
    cache = fastseq.KVCache(1, 1, 4, window=100, page_size=10)
    before = cache.nbytes
    for _ in range(1000):
        cache.append(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert cache.nbytes == before <= 2 * 4 * 4 * (100 + 2 * 10)
    assert cache.lengths.tolist() == [1000]


def test_pages_go_back_to_the_pool():
    cache = fastseq.KVCache(2, 1, 4, capacity=40, page_size=10)
    one, all_ = torch.tensor([1]), torch.randn(1, 1, 40, 4)
    for _ in range(3):
        cache.append(all_, all_, sequences=one)  # one sequence may have all of it
        with pytest.raises(ArgumentError, match="room for 40 positions"):
            cache.append(all_[:, :, :1], all_[:, :, :1], sequences=torch.tensor([0]))
        cache.reset(one)
    cache.append(torch.randn(2, 1, 20, 4), torch.randn(2, 1, 20, 4))
    assert cache.nbytes == 2 * 40 * 4 * 4


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_a_full_cache_says_so_and_stays_as_it_was(layout):
    cache = made(layout, capacity=20 if layout == "contiguous" else 64)
    k, v = drawn(BATCH, 6)
    cache.append(k, v)
    before = copy.deepcopy(cache.state_dict())
    with pytest.raises(ArgumentError, match="full"):
        cache.append(*drawn(BATCH, 20))
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_checkpoints_go_on_where_the_cache_was(layout):
    cache = made(layout)
    cache.append(*drawn(BATCH, 70))
    other = made(layout)
    other.load_state_dict(cache.state_dict())
    twin = copy.deepcopy(cache)
    k, v = drawn(BATCH, 1)
    q = torch.randn(BATCH, HEADS, 1, DIM)
    for one in (cache, other, twin):
        one.append(k, v)
    want = fastseq.attention(q, cache=cache)
    assert torch.equal(fastseq.attention(q, cache=other), want)
    cache.append(k, v)
    assert torch.equal(fastseq.attention(q, cache=twin), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_appending_nothing_changes_nothing(layout):
    cache = made(layout)
    cache.append(*drawn(BATCH, 70))
    before = copy.deepcopy(cache.state_dict())
    cache.append(*drawn(BATCH, 0))
    cache.append(*drawn(0, 4), sequences=torch.tensor([], dtype=torch.int64))
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [{"dim": 16}, {"heads": 4}, {"batch": 4}, {"page_size": 5}], ids=str)
def test_a_checkpoint_of_other_sizes_is_refused(layout, change):
    cache, sizes = made(layout), {"batch": BATCH, "heads": HEADS, "dim": DIM, "dim_v": DIM_V}
    other = fastseq.KVCache(**{**sizes, **LAYOUTS[layout], **change})
    other.append(*(torch.randn(other.batch, other.heads, 40, d) for d in (other.dim, DIM_V)))
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        cache.load_state_dict(other.state_dict())
    assert cache.k.shape[-1] == DIM
    assert cache.page_size is None or cache.k.shape[2] == cache.page_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(layout):
    cache, plain = made(layout), made(layout)
    pieces = [drawn(BATCH, t) for t in (90, 1, 90)]
    with torch.inference_mode():
        cache.append(*pieces[0])
        cache.append(*pieces[1])
    cache.append(*pieces[2])
    for piece in pieces:
        plain.append(*piece)
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in cache.state_dict().items())


@pytest.mark.parametrize("layout", ["contiguous", "paged", "ring"])
def test_a_decoding_step_compiles_whole_and_once(layout):
    cache, plain = made(layout), made(layout)
    frames = []

    def backend(graph, example):
        frames.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(q, k, v):
        cache.append(k, v)
        return fastseq.attention(q, cache=cache, causal=True)

    torch._dynamo.reset()
    with torch.no_grad():
        for _ in range(20):
            (k, v), q = drawn(BATCH, 1), torch.randn(BATCH, HEADS, 1, DIM)
            plain.append(k, v)
            torch.testing.assert_close(step(q, k, v), fastseq.attention(q, cache=plain, causal=True))
    assert len(frames) == 1


@pytest.mark.parametrize("layout", ["contiguous", "paged", "ring"])
def test_a_decoding_step_is_exported(layout):
    (k, v), q = drawn(BATCH, 1), torch.randn(BATCH, HEADS, 1, DIM)
    with torch.no_grad():
        program = torch.export.export(DecodingStep(made(layout)), (q, k, v)).module()
        plain = made(layout)
        for _ in range(15):
            (k, v), q = drawn(BATCH, 1), torch.randn(BATCH, HEADS, 1, DIM)
            plain.append(k, v)
            torch.testing.assert_close(program(q, k, v), fastseq.attention(q, cache=plain, causal=True))


def test_a_compiled_step_on_a_full_cache_raises():
    for layout in ("contiguous", "paged"):
        cache = made(layout, capacity=16 if layout == "contiguous" else 48)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(k, v, cache=cache):
            cache.append(k, v)

        with torch.no_grad():
            cache.append(*drawn(BATCH, 16))
            with pytest.raises((IndexError, RuntimeError), match="out of"):
                step(*drawn(BATCH, 1))


WRONG_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("paged", {"k": torch.zeros(BATCH, HEADS, 4, DIM)}, "k cannot be given with this cache"),
    ("paged", {"lengths_k": torch.tensor([1, 1, 1])}, "lengths_k cannot be given"),
    ("ring", {"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "mask cannot be given"),
    ("ring", {"window": (11, 0)}, "keeps 11 positions"),
    ("ring", {"window": 5}, "window must be a pair"),
    ("ring", {"align": "top_left"}, "align cannot be given"),
    ("contiguous", {"q": torch.zeros(2, HEADS, 1, DIM)}, "batch"),
]


@pytest.mark.parametrize(("layout", "change", "message"), WRONG_CALLS, ids=[m for *_, m in WRONG_CALLS])
def test_what_does_not_go_with_a_cache_is_refused(layout, change, message):
    cache = made(layout)
    cache.append(*drawn(BATCH, 4))
    with pytest.raises(ArgumentError, match=message):
        fastseq.attention(**{"q": torch.zeros(BATCH, HEADS, 1, DIM), "cache": cache, **change})


def test_without_keys_and_cache_the_call_says_what_is_missing():
    with pytest.raises(TypeError, match="k and v are missing"):
        fastseq.attention(torch.zeros(1, 1, 1, 4))


def test_what_is_no_cache_is_refused():
    with pytest.raises(TypeError, match=r"cache must be a fastseq\.KVCache, got tuple"):
        fastseq.attention(torch.zeros(1, 1, 1, 4), cache=(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)))


WRONG_APPENDS: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.zeros(BATCH, HEADS, 2, DIM)}, r"v must be \[3, 2, t, 5\]"),
    ({"k": torch.zeros(BATCH, HEADS, 1, DIM + 1)}, r"k must be \[3, 2, t, 8\]"),
    ({"k": torch.zeros(BATCH, HEADS, 1, DIM).double()}, "float64"),
    ({"k": None}, "k must be a Tensor"),
    ({"sequences": torch.tensor([0, 1])}, r"k must be \[2, 2, t, 8\]"),
    ({"sequences": torch.tensor([0, 1, 3])}, r"0\.\.2"),
    ({"sequences": torch.tensor([0, 1, 1])}, "twice"),
    ({"sequences": torch.tensor([0.0, 1.0, 2.0])}, "int64"),
    ({"sequences": torch.tensor(1)}, r"int64 Tensor \[n\]"),
    ({"sequences": 1}, r"int64 Tensor \[n\]"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_APPENDS, ids=[m for _, m in WRONG_APPENDS])
@pytest.mark.parametrize("layout", ["contiguous", "paged", "ring"])
def test_what_does_not_fit_is_not_appended(layout, change, message):
    cache = made(layout)
    (k, v) = drawn(BATCH, 1)
    with pytest.raises((ArgumentError, TypeError), match=message):
        cache.append(**{"k": k, "v": v, **change})
    assert not cache.lengths.any()


@pytest.mark.parametrize(
    "wrong", [{"capacity": 0}, {"window": 4, "capacity": 4}, {"page_size": 2.5}, {"batch": True}, {"dim": -1}], ids=str
)
def test_a_cache_that_cannot_be_is_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(reversed(wrong)))):
        fastseq.KVCache(**{"batch": 1, "heads": 1, "dim": 4, **wrong})
