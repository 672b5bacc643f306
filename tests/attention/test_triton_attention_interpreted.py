"""The Triton attention under Triton's interpreter, against the reference: the numbers, the promises, and the memory.

What the interpreter cannot show (registers, shared memory, tensor cores) is in test_triton_attention_compiled.py.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable

import pytest
import torch
from attention_operators import (
    FEATURES,
    Options,
    arguments,
    assert_past_a_length_is_never_read,
    assert_right,
    backward,
    dense,
    draw,
    feature,
    forward,
    packed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton_support import needs_interpreter

import fastseq
from fastseq.attn.random import keep_mask

# NumPy, on which the interpreter computes, remarks on infinities that the kernels mean.
pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIRST_DTYPES = [
    *DTYPES[:2],
    pytest.param(torch.float16, marks=pytest.mark.full),
]  # the other is a matter of two constants
SHAPE = (1, 2, 1, 35, 70, 24, 17)  # several tiles in both directions, none of them full
FEW = (1, 4, 2, 3, 150, 17, 24)  # decodes, in several splits


def right(*call, with_dlse: bool = False, repeat: bool = False) -> None:
    assert_right(*call, with_dlse=with_dlse, backend="triton", repeat=repeat)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_alone(name: str) -> None:
    right(*dense(SHAPE), feature(name, torch.float32, SHAPE), with_dlse=True, repeat=name == "window")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "softcap", "bias of -inf", "dropout"])
def test_features_in_16_bits(name: str, dtype: torch.dtype) -> None:
    right(*dense(SHAPE, dtype), feature(name, dtype, SHAPE))


@pytest.mark.full
@pytest.mark.parametrize("shape", [SHAPE, FEW], ids=["many queries", "few"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_in_16_bits(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[1 + (FEATURES.index(name) + (shape is FEW)) % 2]
    right(*dense(shape, dtype), feature(name, dtype, shape), with_dlse=True)


@pytest.mark.parametrize("name", FEATURES[::2])
def test_features_with_few_queries(name: str) -> None:
    dtype = torch.bfloat16 if len(name) % 2 else torch.float32
    right(*dense(FEW, dtype), feature(name, dtype, FEW))


@pytest.mark.parametrize("queries", [35, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("alike", list(itertools.product((True, False), repeat=4)), ids=str)
def test_masks_and_biases_of_every_shape_that_broadcasts(alike: tuple[bool, ...], queries: int) -> None:
    """``alike``: for which of [B,Hq,Tq,Tk] one number of the mask serves all, and one of the bias each."""
    whole = (2, 2, queries, 37)
    mask = torch.rand([1 if one else n for one, n in zip(alike, whole, strict=True)]) < 0.7
    bias = torch.randn([n if one else 1 for one, n in zip(alike, whole, strict=True)])
    right(*dense((2, 2, 1, queries, 37, 8, 8)), {"mask": mask, "bias": bias})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads after rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "features before rows": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "heads outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows that begin anywhere": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "every other row of every third head": lambda x: x.repeat_interleave(3, 1).repeat_interleave(2, 2)[:, ::3, ::2],
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one row for all": lambda x: x[:, :, :1].expand_as(x),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("queries", [40, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, queries: int) -> None:
    """Of q, k, v and of the gradients that come in: as of the same numbers laid out in order."""
    dtype = torch.bfloat16 if queries == 3 else torch.float32
    q, k, v = (LAYOUTS[layout](x) for x in dense((2, 2, 1, queries, 40, 24, 16), dtype))
    d_o, dlse = LAYOUTS[layout](torch.randn(2, 2, queries, 16).to(dtype)), torch.randn(()).expand(2, 2, queries)
    results = []
    for q_, k_, v_, d_o_ in ((q, k, v, d_o), tuple(x.contiguous() for x in (q, k, v, d_o))):
        o, lse = forward(q_, k_, v_, {"causal": True}, "triton")
        results.append((o, lse, *backward(d_o_, dlse, q_, k_, v_, o, lse, {"causal": True}, "triton")[:3]))
    torch.testing.assert_close(*results)


def test_packed_sequences_of_any_strides() -> None:
    """q, k and v are of one product, [T,3,H,D], as a layer makes them; of the gradient heads come before rows."""
    cu = torch.tensor([0, 1, 34, 40]).int()
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True}
    strided = (*torch.randn(40, 3, 2, 16).unbind(1), torch.randn(2, 40, 16).transpose(0, 1))
    results = []
    for q, k, v, d_o in (strided, tuple(x.contiguous() for x in strided)):
        o, lse = forward(q, k, v, options, "triton")
        results.append((o, lse, *backward(d_o, None, q, k, v, o, lse, options, "triton")[:3]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"causal": True}, {"window_left": 5, "bottom_right": False}, {"sinks": torch.tensor([0.5, -1, 2, 0])},
     {"causal": True, "prefix_lengths": torch.tensor([3, 7, 60, 0])}],
    ids=["plain", "causal", "window", "sinks", "prefix"],
)  # fmt: skip
def test_packed_sequences(more: Options, dtype: torch.dtype) -> None:
    q, k, v, cu = packed([1, 0, 40, 33], [35, 7, 67, 0], dtype, spare=2)
    right(q, k, v, {**cu, **more})


def test_a_packed_batch_of_nothing_but_spare_rows() -> None:
    q, k, v, cu = packed([], [], torch.float32, spare=5)
    o, lse = forward(q, k, v, cu, "triton")
    assert not o.any()
    assert (lse == -math.inf).all()
    grads = backward(torch.ones_like(o), None, q, k, v, o, lse, cu, "triton")
    assert not any(g.any() for g in grads)


def test_dropout_in_a_packed_batch() -> None:
    q, k, v, cu = packed([1, 3, 20], [70, 1, 40], torch.float32)
    right(q, k, v, {**cu, "causal": True, "dropout_p": 0.2, "seed": torch.tensor([5])})


@pytest.mark.parametrize(
    ("lengths", "dim"),
    [((1, 33), (1, 1)), ((33, 65), (7, 3)), ((64, 1), (16, 65)), ((65, 64), (65, 16)), ((17, 70), (80, 80)),
     ((1, 150), (192, 128)), ((40, 33), (192, 128)), ((33, 40), (256, 256)), ((33, 40), (300, 17)),
     ((3, 70), (511, 512)), ((17, 33), (129, 512))],
    ids=str,
)  # fmt: skip
def test_odd_shapes(lengths: tuple[int, int], dim: tuple[int, int]) -> None:
    q, k, v = dense((1, 2, 1, *lengths, *dim), torch.bfloat16 if sum(dim) % 2 else torch.float32)
    right(q, k, v, {"scale": dim[0] ** -0.5, "causal": True})


def run_drawn(case: int, dtype: torch.dtype) -> None:
    rng = random.Random(zlib.crc32(f"triton {case} {dtype}".encode()))
    torch.manual_seed(case)
    q, k, v, options = draw(rng, dtype)
    keys = slice(0, min(k.shape[2], 130))
    if k.shape[2] > 130:  # slow enough as it is
        k, v = k[:, :, keys], v[:, :, keys]
        for name in ("bias", "mask"):
            if options.get(name) is not None and options[name].shape[3] > 1:
                options[name] = options[name][..., keys]
        if options.get("lengths_k") is not None:
            options["lengths_k"] = options["lengths_k"].clamp(max=130)
    right(q, k, v, options, with_dlse=case % 3 == 0)


@pytest.mark.parametrize("dtype", FIRST_DTYPES, ids=str)
@pytest.mark.parametrize("case", range(4))
def test_features_together(case: int, dtype: torch.dtype) -> None:
    run_drawn(case, dtype)


@pytest.mark.full
@pytest.mark.parametrize("case", range(4, 34))
def test_more_features_together(case: int) -> None:
    run_drawn(case, DTYPES[case % 3])


@settings(max_examples=8)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), left=st.integers(-1, 70), right_=st.integers(-1, 70),
    causal=st.booleans(), bottom_right=st.booleans(),
)  # fmt: skip
def test_no_tile_that_somebody_sees_is_left_out(
    queries: int, keys: int, left: int, right_: int, causal: bool, bottom_right: bool
) -> None:
    q, k, v = dense((1, 1, 1, queries, keys, 8, 8))
    options = {"causal": causal, "bottom_right": bottom_right, "window_left": left, "window_right": right_}
    right(q, k, v, options)


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("dtype", FIRST_DTYPES, ids=str)
def test_a_hidden_key_has_no_influence_at_all(dtype: torch.dtype, queries: int) -> None:
    q, k, v = dense((1, 2, 1, queries, 70, 24, 24), dtype)
    hidden = torch.rand(1, 1, 1, 70) < 0.4
    huge = 3e4 if dtype == torch.float16 else 1e30
    d_o = torch.randn(1, 2, queries, 24).to(dtype)
    options = {"mask": ~hidden, "softcap": 3.0}
    results = []
    for junk in (0.0, huge, -huge):
        k, v = (x.masked_fill(hidden.transpose(2, 3), junk) for x in (k, v))
        o, lse = forward(q, k, v, options, "triton")
        results.append((o, lse, *backward(d_o, None, q, k, v, o, lse, options, "triton")[:3]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("dtype", FIRST_DTYPES, ids=str)
def test_what_lies_past_a_length_is_never_read(dtype: torch.dtype, queries: int) -> None:
    assert_past_a_length_is_never_read(queries, dtype, "triton")


@pytest.mark.parametrize("queries", [2, 40])
def test_a_row_that_sees_nothing_is_zero(queries: int) -> None:
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    q, k, v = dense((1, 2, 2, queries, 70, 16, 16))
    d_o = torch.randn(1, 2, queries, 16)
    o, lse = forward(q, k, v, {"mask": nothing}, "triton")
    assert not o.any()
    assert (lse == -math.inf).all()
    grads = backward(d_o, torch.ones_like(lse), q, k, v, o, lse, {"mask": nothing}, "triton")
    assert not any(x.any() for x in grads[:3])
    options = {"mask": nothing, "sinks": torch.tensor([0.5, -3.0])}
    o, lse = forward(q, k, v, options, "triton")
    assert not o.any()
    torch.testing.assert_close(lse, options["sinks"][None, :, None].expand(1, 2, queries))
    grads = backward(d_o, torch.ones_like(lse), q, k, v, o, lse, options, "triton")
    assert not any(x.any() for x in grads[:3])
    torch.testing.assert_close(grads[4], torch.full((2,), float(queries)))


@pytest.mark.parametrize("queries", [2, 40])
def test_nan_in_a_query_stays_in_its_row(queries: int) -> None:
    for dtype in DTYPES:
        q, k, v = dense((1, 2, 2, queries, 70, 16, 16), dtype)
        clean = forward(q, k, v, {}, "triton")
        q[0, 1, 1, 3] = math.nan
        for got, before in zip(forward(q, k, v, {}, "triton"), clean, strict=True):
            assert got[0, 1, 1].isnan().all()
            got[0, 1, 1] = before[0, 1, 1]
            assert torch.equal(got, before)


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("seed", [-7, 0x1234567890ABCDEF])
def test_dropout_keeps_what_the_reference_keeps_and_leaves_lse(queries: int, seed: int) -> None:
    q, k, _ = dense((2, 3, 1, queries, 70, 16, 16))
    v = torch.eye(70).expand(2, 1, 70, 70)  # o is the weights
    options: Options = {"dropout_p": 0.4, "seed": torch.tensor([seed])}
    o, lse = forward(q, k, v, options, "triton")
    b, h, i, j = (torch.arange(n) for n in o.shape)
    kept = keep_mask(options["seed"], 0.4, b[:, None, None, None], h[:, None, None], i[:, None], j)
    assert torch.equal(o != 0, kept)
    assert torch.equal(lse, forward(q, k, v, {}, "triton")[1])
    assert not forward(q, k, v, {**options, "dropout_p": 1.0}, "triton")[0].any()


def test_empty_inputs() -> None:
    for shape in [(0, 2, 1, 5, 7, 8, 8), (2, 2, 1, 0, 7, 8, 8), (2, 2, 1, 5, 0, 8, 8), (2, 2, 1, 50, 0, 8, 8)]:
        q, k, v = dense(shape)
        options = {"sinks": torch.full((2,), -math.inf), "bias": torch.zeros(1, 2, 1, 1)}
        o, lse = forward(q, k, v, options, "triton")
        assert not o.any()
        assert (lse == -math.inf).all()
        grads = backward(torch.ones_like(o), None, q, k, v, o, lse, options, "triton")
        assert [g.shape for g in grads[:4]] == [q.shape, k.shape, v.shape, (1, 2, 1, 1)]
        assert not any(g.any() for g in grads)


def test_a_gradient_of_stride_zero() -> None:
    q, k, v = dense(SHAPE)
    o, lse = forward(q, k, v, {}, "triton")
    ones = torch.ones(()).expand_as(o)
    for got, dense_ in zip(
        backward(ones, None, q, k, v, o, lse, {}, "triton"),
        backward(ones.contiguous(), None, q, k, v, o, lse, {}, "triton"),
        strict=True,
    ):
        assert torch.equal(got, dense_)


def test_few_queries_get_the_same_bits_whatever_the_batch_around_them() -> None:
    """Under torch.use_deterministic_algorithms splits are of fixed size; else they fill the machine."""
    q, k, v = dense((3, 2, 1, 2, 1100, 16, 16))
    lengths = torch.tensor([700, 1100, 3])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        o, lse = forward(q, k, v, {"lengths_k": lengths, "causal": True}, "triton")
        for b in range(3):
            n = int(lengths[b])
            alone = forward(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], {"causal": True}, "triton")
            assert torch.equal(alone[0][0], o[b])
            assert torch.equal(alone[1][0], lse[b])
    finally:
        torch.use_deterministic_algorithms(False)
    right(q[:1], k[:1], v[:1], {"causal": True}, repeat=True)


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all memory that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given, out = tree_flatten((args, kwargs))[0], function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        made = [x.untyped_storage() for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self.bytes += sum(x.nbytes() for x in made if x.data_ptr() not in old)
        return out


def assert_linear(allocated: Callable[[int], int]) -> None:
    small, large = allocated(4096), allocated(65536)
    assert small > 0
    assert large <= 16 * small * 1.01


# Of a bias one number for each key, for all queries: its gradient is a sum over queries.
FEATURED: dict[str, Callable[[int], Options]] = {
    "bias and sinks": lambda n: {"bias": torch.zeros(1, 4, 1, n), "sinks": torch.zeros(4), "causal": True},
    "all others": lambda n: {
        "mask": torch.ones(1, 1, 1, n, dtype=torch.bool), "window_left": n // 2, "softcap": 3.0, "dropout_p": 0.1,
        "alibi_slopes": torch.zeros(4), "seed": torch.tensor([5]), "lengths_q": torch.tensor([n]),
        "lengths_k": torch.tensor([n]),
    },
    "packed": lambda n: {f"cu_seqlens_{x}": torch.tensor([0, 1, n // 2, n]).int() for x in "qk"} | {"causal": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "queries"), [("bias and sinks", 1), ("all others", 1), *((name, None) for name in FEATURED)]
)
def test_scratch_is_linear_in_the_lengths(name: str, queries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.kernels.attention import launch as attention_launch

    monkeypatch.setattr(attention_launch.Plan, "run", lambda plan: None)  # what is asked for, without the work

    def allocated(length: int) -> int:
        q, k, v = dense((1, 4, 2, queries or length, length, 16, 16))
        if name == "packed":
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        options = FEATURED[name](length)
        with Allocations() as count:
            o, lse = attention_launch.forward(q, k, v, *arguments(options))
            attention_launch.backward(o, lse, q, k, v, o, lse, *arguments(options), "bias" in options)
        return count.bytes

    assert_linear(allocated)


def test_above_the_kernels_nothing_but_results_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that heads share are not copied, the limits of a call are made no mask, and a layer's memory is linear."""
    from fastseq.kernels.attention import launch as attention_launch

    monkeypatch.setattr(attention_launch.Plan, "run", lambda plan: None)
    q, k, v = (x.requires_grad_() for x in dense((2, 8, 2, 40, 70, 16, 24)))
    results = 4 * (2 * 8 * 40 * 24 + 2 * 8 * 40)  # o and lse
    layer = fastseq.nn.MultiheadAttention(16, 2, batch_first=True)

    def allocated(length: int) -> int:
        x = torch.zeros(1, length, 16)
        with Allocations() as count:
            layer(x, x, x, need_weights=False)[0].sum().backward()
        return count.bytes

    with fastseq.use_backend("triton"):
        with Allocations() as count:
            o = fastseq.attention(q, k, v, causal=True, window=(30, 0), align="top_left")
        assert count.bytes == results
        ones = torch.ones(()).expand_as(o)
        with Allocations() as count:
            torch.autograd.grad(o, (q, k, v), ones)
        assert count.bytes == sum(x.numel() * 4 for x in (q, k, v))
        with Allocations() as count:
            fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert count.bytes == results
        assert_linear(allocated)


def test_the_public_functions_and_the_layer_reach_the_kernels() -> None:
    q, k, v = dense((2, 4, 2, 5, 9, 16, 16))
    layer = fastseq.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 20, 16)
    with fastseq.use_backend("triton"):
        assert fastseq.explain(layer, x, x, x).startswith(f"attention on {x.device.type} runs on: triton")
        results = [
            fastseq.attention(q, k, v, causal=True),
            fastseq.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            layer(x, x, x, need_weights=False)[0],
        ]
    with fastseq.use_backend("reference"):
        truths = [
            fastseq.attention(q, k, v, causal=True),
            fastseq.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            layer(x, x, x, need_weights=False)[0],
        ]
    torch.testing.assert_close(results, truths)


def test_derivatives_through_autograd_and_vmap() -> None:
    q, k, v = (x.requires_grad_() for x in dense((2, 2, 1, 5, 9, 8, 8)))
    loss = fastseq.attention(q, k, v, causal=True, return_lse=True, backend="triton")
    grads = torch.autograd.grad(loss[0].square().sum() + loss[1].sum(), (q, k, v), create_graph=True)
    truth = fastseq.attention(q, k, v, causal=True, return_lse=True, backend="reference")
    expected = torch.autograd.grad(truth[0].square().sum() + truth[1].sum(), (q, k, v), create_graph=True)
    torch.testing.assert_close(grads, expected)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), q)
    torch.testing.assert_close(second, torch.autograd.grad(sum(g.square().sum() for g in expected), q))

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return fastseq.attention(x, k.detach()[:1], v.detach()[:1], backend="triton").square().sum()

    stack = torch.randn(3, 1, 2, 5, 8)
    each = torch.stack([torch.func.grad(loss_of)(x) for x in stack])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss_of))(stack), each)


def test_what_the_kernels_cannot_do_is_refused_with_its_reason() -> None:
    q, k, v = dense((1, 2, 1, 5, 9, 8, 8))
    with pytest.raises(fastseq.BackendError, match="compute in float32"):
        fastseq.attention(q.double(), k.double(), v.double(), backend="triton")
    for dtype, most in ((torch.float32, 256), (torch.bfloat16, 512)):
        q, k, v = dense((1, 2, 1, 5, 9, most + 1, 8), dtype)
        with pytest.raises(fastseq.BackendError, match=f"up to {most} features"):
            fastseq.attention(q, k, v, backend="triton")


def test_wrong_arguments_are_refused_before_they_do_harm() -> None:
    q, k, v = dense(SHAPE)
    for wrong in (
        {"lengths_q": torch.tensor([1, 2])},
        {"mask": torch.ones(1, 1, 35, 64, dtype=torch.bool)},
        {"bias": torch.randn(1, 1, 35, 70, dtype=torch.float64)},
        {"sinks": torch.randn(3)},
        {"alibi_slopes": torch.randn(2, dtype=torch.float64)},
        {"dropout_p": 0.5},
    ):
        with pytest.raises(RuntimeError, match=next(iter(wrong))):
            forward(q, k, v, wrong, "triton")
    with pytest.raises(RuntimeError, match="k and v"):
        forward(q, k, v[:, :, 1:], {}, "triton")


def test_the_operators_pass_opcheck() -> None:
    utilities = ("test_schema", "test_faketensor")
    for options in (feature("sinks", torch.float32, SHAPE), feature("bias", torch.float32, SHAPE)):
        q, k, v = dense(SHAPE)
        torch.library.opcheck(
            torch.ops.fastseq.attention_forward.triton, (q, k, v, *arguments(options)), test_utils=utilities
        )
        o, lse = forward(q, k, v, options, "triton")
        rest = (*arguments(options), options.get("bias") is not None)
        torch.library.opcheck(
            torch.ops.fastseq.attention_backward.triton,
            (torch.randn_like(o), None, q, k, v, o, lse, *rest),
            test_utils=utilities,
        )


def test_keys_past_their_length_get_no_gradient() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 17, 16), torch.randn(2, 2, 17, 16)
    options = {"lengths_k": torch.tensor([7, 0]), "causal": True, "bottom_right": False, "scale": 0.25}
    right(q, k, v, options)
