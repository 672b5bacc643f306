"""Bad arguments of attention: the message names the argument, what came and what was expected."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from support import BACKENDS

import fastseq
from fastseq import attention, scaled_dot_product_attention, use_backend
from fastseq.checks import ArgumentError
from fastseq.nn import MultiheadAttention


def t(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


Q, K, V = t(2, 4, 5, 8), t(2, 2, 7, 8), t(2, 2, 7, 6)
PACKED = (t(6, 4, 8), t(9, 2, 8), t(9, 2, 6))
CU_Q, CU_K = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
LENGTHS = torch.tensor([1, 2])
NESTED = torch.nested.nested_tensor([torch.tensor([1]), torch.tensor([2])], layout=torch.jagged)
CU = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}

DENSE = [
    ((Q[0], K[0], V[0]), {}, r"q, k and v must be 4-D .*\[4, 5, 8\].*packed batch \[total,H,D\] needs cu_seqlens_q"),
    ((Q, K[..., :5], V), {}, r"q and k must have the same number of features .*\[2, 4, 5, 8\] and \[2, 2, 7, 5\]"),
    ((Q, K, V[:, :, :6]), {}, r"k and v must have the same length .*\[2, 2, 7, 8\] and \[2, 2, 6, 6\]"),
    ((Q, K[:1], V[:1]), {}, r"q, k and v must have the same batch .*\[1, 2, 7, 8\].*expand"),
    ((Q, K, V[:, :1]), {}, r"k and v must have the same number of heads, got 2 and 1"),
    ((Q[:, :3], K, V), {}, r"heads of k and v must divide those of q, got 2 and 3"),
    ((Q[..., :0], K[..., :0], V), {}, r"q \[2, 4, 5, 0\] has no features"),
    ((Q.double(), K, V), {}, r"k is torch.float32 but q is torch.float64; convert one"),
    ((Q.int(), K.int(), V.int()), {}, r"q must be float64, float32, bfloat16 or float16, got torch.int32"),
    ((Q.to("meta"), K, V), {}, r"k is on cpu but q on meta"),
    ((Q, K, V), {"mask": torch.ones(5, 6).bool()}, r"mask \[5, 6\] does not broadcast to .* = \[2, 4, 5, 7\]"),
    ((Q, K, V), {"mask": torch.ones(1, 2, 4, 5, 7).bool()}, r"mask \[1, 2, 4, 5, 7\] does not broadcast"),
    ((Q, K, V), {"mask": torch.ones(5, 7)}, r"mask must be bool .* got torch.float32; .*bias="),
    ((Q, K, V), {"mask": [[True]]}, r"mask must be a Tensor, got list"),
    ((Q, K, V), {"bias": torch.ones(5, 7).bool()}, r"bias must be .* got torch.bool; a bool mask goes into mask="),
    ((Q, K, V), {"bias": torch.ones(5, 7).double()}, r"bias must be torch.float32 as q, .* got torch.float64"),
    ((Q, K, V), {"bias": torch.ones(3, 5, 7)}, r"bias \[3, 5, 7\] does not broadcast"),
    ((Q, K, V), {"bias": torch.ones(5, 7, device="meta")}, r"bias is on meta but q on cpu; move it with .to\('cpu'\)"),
    ((Q, K, V), {"sinks": t(2)}, r"sinks must be \[Hq\] = \[4\], got \[2\]"),
    ((Q, K, V), {"sinks": torch.arange(4)}, r"sinks must be torch.float32 .* got torch.int64"),
    ((Q, K, V), {"alibi_slopes": t(4, 1)}, r"alibi_slopes must be \[Hq\] = \[4\], got \[4, 1\]"),
    ((Q, K, V), {"alibi_slopes": t(4, requires_grad=True)}, r"alibi_slopes has no gradient; detach it"),
    ((Q, K, V), {"lengths_q": torch.tensor([6, 1])}, r"lengths_q must lie in 0..5, got values from 1 to 6"),
    ((Q, K, V), {"lengths_k": torch.tensor([-1, 1])}, r"lengths_k must lie in 0..7, got values from -1 to 1"),
    ((Q, K, V), {"lengths_k": torch.tensor([1])}, r"lengths_k must be \[B\] = \[2\], got \[1\]"),
    ((Q, K, V), {"lengths_k": torch.tensor([1.0, 2.0])}, r"lengths_k must be int32 or int64, got torch.float32"),
    ((Q, K, V), {"lengths_k": [1, 2]}, r"lengths_k must be an integer Tensor, got list; use torch.tensor"),
    ((Q, K, V), {"prefix_lengths": LENGTHS}, r"prefix_lengths needs causal=True or a window, got neither"),
    ((Q, K, V), {"prefix_lengths": LENGTHS, "window": (-1, -1)}, r"prefix_lengths needs causal=True or a window"),
    ((Q, K, V), {"prefix_lengths": torch.tensor([-1, 1]), "causal": True}, r"prefix_lengths must lie in 0..7, got"),
    ((Q, K, V), {"prefix_lengths": torch.tensor([8, 1]), "window": (1, 0)}, r"prefix_lengths must lie in 0..7, got"),
    ((Q, K, V), {"prefix_lengths": torch.tensor([1]), "causal": True}, r"prefix_lengths must be \[B\] = \[2\], got"),
    ((Q, K, V), {"prefix_lengths": torch.tensor([1.0, 2.0]), "causal": True}, r"prefix_lengths must be int32 or int64"),
    ((Q, K, V), {"scale": math.nan}, r"scale must be a finite number, or None for 1/sqrt\(D\), got nan"),
    ((Q, K, V), {"softcap": -1.0}, r"softcap must be a finite number, at least 0 .* got -1.0"),
    ((Q, K, V), {"softcap": math.nan}, r"softcap must be .* got nan"),
    ((Q, K, V), {"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\], got 1.5"),
    ((Q, K, V), {"dropout_p": math.nan}, r"dropout_p must lie in \[0, 1\], got nan"),
    ((Q, K, V), {"align": "centre"}, r"align must be 'bottom_right' or 'top_left', got 'centre'"),
    ((Q, K, V), {"window": 5}, r"window must be a pair \(left, right\) .* got 5; .*\(n - 1, 0\)"),
    ((Q, K, V), {"window": (1, -2)}, r"window must be a pair .* got \(1, -2\)"),
    ((Q, K, V), {"window": (1.0, 2)}, r"window must be a pair .* got \(1.0, 2\)"),
    ((Q, K, V), {"cu_seqlens_q": CU_Q}, r"cu_seqlens_k is missing"),
    ((Q, K, V), {"backend": "fastest"}, r"backend: unknown backend 'fastest'"),
    (PACKED, {"cu_seqlens_k": CU_K}, r"cu_seqlens_q is missing"),
    ((Q, K, V), CU, r"with cu_seqlens q, k and v must be 3-D"),
    (PACKED, {**CU, "cu_seqlens_q": CU_Q.float()}, r"cu_seqlens_q must be int32 or int64, got torch.float32"),
    (PACKED, {**CU, "cu_seqlens_q": CU_Q.flip(0)}, r"cu_seqlens_q must begin with 0, .* got \[6, 2, 0\]"),
    (PACKED, {**CU, "cu_seqlens_q": CU_Q + 1}, r"cu_seqlens_q must begin with 0"),
    (PACKED, {**CU, "cu_seqlens_k": CU_K * 2}, r"cu_seqlens_k .* end at or before k's 9 rows"),
    (PACKED, {**CU, "cu_seqlens_q": CU_Q[:2]}, r"same number of sequences, got shapes \[2\] and \[3\]"),
    (PACKED, {**CU, "cu_seqlens_q": CU_Q[None]}, r"cu_seqlens_q must be 1-D \[B\+1\], got \[1, 3\]"),
    (PACKED, {**CU, "mask": torch.ones(1).bool()}, r"mask cannot be given with cu_seqlens"),
    (PACKED, {**CU, "prefix_lengths": CU_K, "causal": True}, r"prefix_lengths must be \[B\] = \[\d\], got"),
    (PACKED, {**CU, "lengths_k": CU_K}, r"lengths_k cannot be given with cu_seqlens"),
    ((PACKED[0], PACKED[1], PACKED[2][:8]), CU, r"k and v must have the same length"),
    ((Q, K.to_sparse(), V), {}, r"k must be a dense tensor, got layout torch.sparse_coo; .*to_dense"),
    ((Q, K, V), {"lengths_k": LENGTHS.to_sparse()}, r"lengths_k must be a dense tensor, got layout torch.sparse_coo"),
    ((Q, K, V), {"lengths_q": NESTED}, r"lengths_q must be a dense tensor, got a nested one"),
    (PACKED, {**CU, "cu_seqlens_k": CU_K.to_sparse()}, r"cu_seqlens_k must be a dense tensor"),
    (PACKED, {**CU, "cu_seqlens_q": NESTED}, r"cu_seqlens_q must be a dense tensor, got a nested one"),
    ((Q, K, V), {"mask": torch.ones(5, 7).bool().to_sparse()}, r"mask must be a dense tensor"),
    ((Q, K, V), {"bias": torch.ones(5, 7).to_sparse()}, r"bias must be a dense tensor"),
    ((Q, K, V), {"sinks": t(4).to_sparse()}, r"sinks must be a dense tensor"),
    ((Q, K, V), {"attn_mask": t(5, 7)}, r"unexpected keyword argument 'attn_mask'; use mask= .* or bias="),
    ((Q, K, V), {"is_causal": True}, r"unexpected keyword argument 'is_causal'; use causal=, and align=\"top_left\""),
    ((Q, K, V), {"dropout": 0.1}, r"unexpected keyword argument 'dropout'; use dropout_p="),
    ((Q, K, V), {"enable_gqa": True}, r"unexpected keyword argument 'enable_gqa'; leave it out: heads .* are shared"),
    ((Q, K, V), {"colour": 1}, r"attention\(\) got an unexpected keyword argument 'colour'$"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "options", "message"), DENSE)
def test_bad_argument_of_attention_is_named(inputs, options, message):
    with pytest.raises((ArgumentError, TypeError, ValueError), match=message):
        attention(*inputs, **options)


THREE = (t(2, 3, 4), t(2, 5, 4), t(2, 5, 4))
TORCH = [
    ((t(8), t(8), t(8)), {}, r"query, key and value must be at least 2-D .*query \[8\]"),
    ((Q, K, V), {}, r"leading dimensions of query, key and value must broadcast.*enable_gqa=True"),
    ((Q[:, :3], K, V), {"enable_gqa": True}, r"heads of k and v must divide those of q, got 2 and 3"),
    ((t(2, 3, 4), t(2, 5, 3), t(2, 5, 4)), {}, r"query and key must have the same number of features"),
    ((t(2, 3, 4), t(2, 5, 4), t(2, 6, 4)), {}, r"key and value must have the same length"),
    (THREE, {"attn_mask": t(3, 4)}, r"attn_mask \[3, 4\] does not broadcast to .*\[2, 3, 5\]"),
    (THREE, {"attn_mask": t(7, 2, 3, 5)}, r"attn_mask \[7, 2, 3, 5\] does not broadcast"),
    (THREE, {"attn_mask": torch.ones(3, 5).long()}, r"attn_mask must be torch.float32"),
    (THREE, {"attn_mask": t(3, 5), "is_causal": True}, r"attn_mask must not be given with is_causal=True"),
    ((t(3, 4), t(5, 4), t(5, 4)), {"dropout_p": -0.1}, r"dropout_p must lie in \[0, 1\]"),
    ((t(3, 4), t(5, 4), t(5, 4)), {"scale": math.inf}, r"scale must be a finite number"),
    ((t(3, 4), t(5, 4).half(), t(5, 4)), {}, r"key is torch.float16 but query is torch.float32"),
    (([1.0], t(5, 4), t(5, 4)), {}, r"query must be a Tensor, got list"),
    ((t(3, 4).to_sparse(), t(5, 4), t(5, 4)), {}, r"query must be a dense tensor, got layout torch.sparse_coo"),
    (THREE, {"attn_mask": t(3, 5).to_sparse()}, r"attn_mask must be a dense tensor"),
    (THREE, {"mask": t(3, 5)}, r"unexpected keyword argument 'mask'; use attn_mask="),
    (THREE, {"causal": True}, r"unexpected keyword argument 'causal'; use is_causal="),
    (THREE, {"colour": 1}, r"scaled_dot_product_attention\(\) got an unexpected keyword argument 'colour'$"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "options", "message"), TORCH)
def test_bad_argument_of_scaled_dot_product_attention_is_named(inputs, options, message):
    with pytest.raises((ArgumentError, TypeError), match=message):
        scaled_dot_product_attention(*inputs, **options)


X, M = t(5, 2, 12), t(7, 2, 12)
LAYER = [
    ((t(5, 2, 11), M, M), {}, r"query \[5, 2, 11\] has 11 features in its last dimension, embed_dim is 12"),
    ((X, t(7, 2, 5), M), {}, r"key \[7, 2, 5\] has 5 features in its last dimension, kdim is 12"),
    ((X, M, t(6, 2, 12)), {}, r"key and value must have the same length and batch.*\[7, 2, 12\] and \[6, 2, 12\]"),
    ((X, t(7, 3, 12), t(7, 3, 12)), {}, r"query and key must have the same batch, dimension 1 with batch_first=False"),
    ((X[:, 0], M, M), {}, r"query, key and value must all be 3-D, or 2-D"),
    ((X[None], M, M), {}, r"query, key and value must all be 3-D"),
    ((X, M, M), {"key_padding_mask": torch.zeros(7, 2).bool()}, r"key_padding_mask must be \[N, S\] = \[2, 7\], got"),
    ((X, M, M), {"key_padding_mask": torch.zeros(2, 7).int()}, r"key_padding_mask must be bool .* got torch.int32"),
    ((X, M, M), {"key_padding_mask": [[True]]}, r"key_padding_mask must be a Tensor, got list"),
    (
        (X, M, M),
        {"attn_mask": t(7, 5)},
        r"attn_mask must be \[L, S\] = \[5, 7\] or \[N \* heads, L, S\] = \[6, 5, 7\], got \[7",
    ),
    ((X, M, M), {"attn_mask": t(2, 5, 7)}, r"attn_mask must be \[L, S\] = \[5, 7\] or .* got \[2, 5, 7\]"),
    ((X, M, M), {"attn_mask": t(5, 7).double()}, r"bias must be torch.float32"),
    ((X, M, M), {"attn_mask": t(5, 7).to_sparse()}, r"attn_mask must be a dense tensor, got layout torch.sparse_coo"),
    ((None, None, None), {}, r"query must be a Tensor, got NoneType"),
    ((X, None, M), {}, r"key must be a Tensor, got NoneType"),
    ((X, M, [1.0]), {}, r"value must be a Tensor, got list"),
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("inputs", "options", "message"), LAYER)
def test_bad_argument_of_the_layer_is_named(inputs, options, message, need_weights):
    with pytest.raises((ArgumentError, TypeError), match=message):
        MultiheadAttention(12, 3)(*inputs, need_weights=need_weights, **options)


def test_masks_of_one_unbatched_sequence_are_named_by_their_dimensions():
    x = t(5, 12)
    with pytest.raises(ArgumentError, match=r"key_padding_mask must be \[S\] = \[5\], got \[1, 5\]"):
        MultiheadAttention(12, 3)(x, x, x, key_padding_mask=torch.zeros(1, 5).bool())


@pytest.mark.parametrize("function", [attention, scaled_dot_product_attention])
def test_keywords_that_are_refused_are_not_shown(function):
    shown = inspect.signature(function).parameters.values()
    assert all(p.kind is not p.VAR_KEYWORD for p in shown)


@pytest.mark.skipif(not hasattr(torch.Tensor, "rename"), reason="this torch has no named tensors")
@pytest.mark.filterwarnings("ignore:Named tensors")
@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_dimensions_are_refused_rather_than_lost(backend):
    """As by torch's attention, which has no rule for them."""
    named = Q.rename("batch", "heads", "time", "features")
    with use_backend(backend):
        for options in ({}, {"dropout_p": 0.5}):  # on the fast path, and off it
            for inputs in ((named, K, V), (Q, K.rename("batch", "heads", "time", "features"), V)):
                with pytest.raises(ArgumentError, match=r"[qk] has named dimensions .*'features'.*rename\(None\)"):
                    attention(*inputs, **options)
            with pytest.raises(ArgumentError, match="query has named dimensions"):
                scaled_dot_product_attention(named, Q, Q, **options)
        x = X.rename("time", "batch", "features")
        for dropout in (0.0, 0.5):
            with pytest.raises(RuntimeError, match="named tensors"):
                MultiheadAttention(12, 3, dropout=dropout)(x, x, x)


def test_heads_must_divide_the_features():
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(12, 5)


def test_argument_error_is_what_torch_would_raise():
    """torch raises ValueError for some of these and RuntimeError for others."""
    with pytest.raises(ValueError, match="features"):
        attention(Q, K[..., :3], V)
    with pytest.raises(RuntimeError, match="features"):
        attention(Q, K[..., :3], V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_call_harms_nothing(backend):
    kept = [x.clone() for x in (Q, K, V)]
    with use_backend(backend):
        before = attention(Q, K, V)
        for inputs, options, _ in DENSE:
            if "backend" not in options:
                with pytest.raises((ArgumentError, TypeError)):
                    attention(*inputs, **options)
        assert torch.equal(before, attention(Q, K, V))
    assert all(torch.equal(a, b) for a, b in zip((Q, K, V), kept, strict=True))


def test_named_backend_never_falls_back():
    with use_backend("torch"):
        for options, reason in (
            ({"softcap": 1.0}, "no softcap"),
            ({"sinks": t(4)}, "no sinks"),
            ({"return_lse": True}, "log-sum-exp"),
        ):
            with pytest.raises(fastseq.BackendError, match=reason):
                attention(Q, K, V, **options)
        with pytest.raises(fastseq.BackendError, match="packed"):
            attention(*PACKED, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)
