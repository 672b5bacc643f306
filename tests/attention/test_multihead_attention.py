"""MultiheadAttention beside torch.nn's: every argument, every mask, the same parameters, and the rows torch loses."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys

import pytest
import torch
from support import BACKENDS, NATIVE, assert_within_budget, needs_native
from torch import nn

import fastseq
from fastseq.nn import MultiheadAttention

F64 = torch.float64
HEADS, EMBED = 3, 12


def pair(dtype=F64, **options):
    """torch's layer, and ours with its parameters."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def drawn(layer, kind, *, batch=2, queries=4, keys=6, dtype=F64):
    """query, key and value: ``self`` one tensor, ``cross`` key is value, ``apart`` three, ``unbatched`` three 2-D."""

    def one(length, features):
        if kind == "unbatched":
            return torch.randn(length, features, dtype=dtype)
        shape = (batch, length) if layer.batch_first else (length, batch)
        return torch.randn(*shape, features, dtype=dtype)

    if kind == "self":
        return (one(queries, EMBED),) * 3
    key = one(keys, layer.kdim)
    return one(queries, EMBED), key, key if kind == "cross" else one(keys, layer.vdim)


def masks(padding, pairs, *, batch, queries, keys, batched, dtype=F64):
    """Masks of each kind that leave every query the first key."""
    kwargs = {}
    if padding != "none":
        hidden = torch.rand(batch, keys) < 0.4
        hidden[:, 0] = False
        hidden = hidden if batched else hidden[0]
        if padding == "float":
            hidden = torch.randn(hidden.shape, dtype=dtype).masked_fill(hidden, -math.inf)
        kwargs["key_padding_mask"] = hidden
    if pairs != "none":
        hidden = torch.rand(*((batch if batched else 1) * HEADS,) * pairs.endswith("3d"), queries, keys) < 0.4
        hidden[..., 0] = False
        if pairs.startswith("float"):
            hidden = torch.randn(hidden.shape, dtype=dtype).masked_fill(hidden, -math.inf)
        kwargs["attn_mask"] = hidden
    return kwargs


CONSTRUCTORS = [
    {},
    {"batch_first": True},
    {"bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 7, "vdim": 5},
    {"kdim": 7, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "bias": False},
]
MASKS = [
    ("none", "none"), ("bool", "none"), ("float", "none"), ("none", "bool"), ("none", "float-3d"),
    ("bool", "bool-3d"), ("bool", "float"), ("float", "float-3d"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", ["self", "cross", "apart", "unbatched"])
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_answers_weights_and_gradients_as_torch(backend, options, kind):
    if "kdim" in options and kind in ("self", "cross"):
        kind = "apart"
    theirs, ours = pair(**options)
    keys = 4 if kind == "self" else 6
    for padding, pairs in MASKS:
        inputs = drawn(ours, kind)
        kwargs = masks(padding, pairs, batch=2, queries=4, keys=keys, batched=kind != "unbatched")
        for need_weights, average in ((True, True), (True, False), (False, True)):
            kwargs |= {"need_weights": need_weights, "average_attn_weights": average}
            want, want_weights = theirs(*inputs, **kwargs)
            with fastseq.use_backend(backend):
                got, weights = ours(*inputs, **kwargs)
            torch.testing.assert_close(got, want)
            assert (weights is None) == (not need_weights)
            loss, want_loss = got.sin().sum(), want.sin().sum()
            if need_weights:
                torch.testing.assert_close(weights, want_weights)
                loss, want_loss = loss + weights.cos().sum(), want_loss + want_weights.cos().sum()
            for (name, p), a, b in zip(
                theirs.named_parameters(),
                torch.autograd.grad(loss, list(ours.parameters())),
                torch.autograd.grad(want_loss, list(theirs.parameters())),
                strict=True,
            ):
                torch.testing.assert_close(a, b, msg=lambda m, name=name, p=p: f"{name} {list(p.shape)}: {m}")


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=lambda o: "-".join(o) or "default")
def test_same_attributes_and_state_dict_in_both_directions(options):
    theirs, ours = pair(**options)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert set(vars(ours)) == set(vars(theirs))
    theirs.load_state_dict(MultiheadAttention(EMBED, HEADS, dtype=F64, **options).state_dict(), strict=True)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    torch.manual_seed(1)
    first = nn.MultiheadAttention(EMBED, HEADS, **options).state_dict()
    torch.manual_seed(1)
    second = MultiheadAttention(EMBED, HEADS, **options).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_is_causal(backend, need_weights, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    inputs = drawn(ours, "self", queries=5)
    hidden = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for extra in ({}, {"key_padding_mask": padding}):
        want, _ = theirs(*inputs, attn_mask=hidden, **extra)
        with fastseq.use_backend(backend):
            for kwargs in ({"attn_mask": hidden}, {}):
                got, _ = ours(*inputs, is_causal=True, need_weights=need_weights, **kwargs, **extra)
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_is_causal_leaves_the_appended_keys_visible(options, need_weights):
    theirs, ours = pair(**options)
    inputs = drawn(ours, "self", queries=5)
    hidden = torch.ones(5, 5).triu(1).bool()
    want, _ = theirs(*inputs, attn_mask=hidden)
    for kwargs in ({"attn_mask": hidden}, {}):
        got, _ = ours(*inputs, is_causal=True, need_weights=need_weights, **kwargs)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["padding", "float-padding", "pairs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_query_that_sees_no_key_attends_to_nothing_and_has_finite_gradients(backend, kind, need_weights, training):
    _, ours = pair(batch_first=True)
    ours.train(training)
    x = torch.randn(2, 5, EMBED, dtype=F64, requires_grad=True)
    padding = torch.tensor([[False] * 5, [True] * 5])
    rows = torch.zeros(5, 5, dtype=torch.bool)
    rows[2] = True
    kwargs = {
        "padding": {"key_padding_mask": padding},
        "float-padding": {"key_padding_mask": torch.zeros(2, 5, dtype=F64).masked_fill(padding, -math.inf)},
        "pairs": {"attn_mask": rows},
    }[kind]
    with fastseq.use_backend(backend):
        y, weights = ours(x, x, x, need_weights=need_weights, **kwargs)
    blind = y[:, 2] if kind == "pairs" else y[1]
    torch.testing.assert_close(blind, ours.out_proj.bias.expand_as(blind))
    y.sin().sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in ours.parameters())))
    if need_weights:
        blind = weights[:, 2] if kind == "pairs" else weights[1]
        assert torch.equal(blind, torch.zeros_like(blind))
        torch.testing.assert_close(weights[0, 0].sum(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_same_after_the_same_seed_and_off_in_eval(backend, need_weights):
    layer = MultiheadAttention(EMBED, HEADS, dropout=0.5, dtype=F64)
    x = torch.randn(4, 2, EMBED, dtype=F64)
    results = []
    with fastseq.use_backend(backend):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(layer(x, x, x, need_weights=need_weights, average_attn_weights=False))
        assert torch.equal(results[0][0], results[1][0])
        assert not torch.equal(results[0][0], results[2][0])
        if need_weights:
            assert torch.equal(results[0][1], results[1][1])
            assert (results[0][1] == 0).any()
        layer.eval()
        assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@needs_native
def test_native_weights_are_those_that_made_the_output():
    layer = MultiheadAttention(EMBED, HEADS, dropout=0.5, dtype=F64, batch_first=True)
    with torch.no_grad():
        for part, weight in zip(("q", "k", "v"), layer.in_proj_weight.chunk(3), strict=True):
            weight.copy_(torch.eye(EMBED) if part == "v" else torch.randn(EMBED, EMBED))
        layer.out_proj.weight.copy_(torch.eye(EMBED))
    x = torch.randn(2, 5, EMBED, dtype=F64)
    with fastseq.use_backend("native"):
        y, weights = layer(x, x, x, average_attn_weights=False)
    v = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(y, (weights @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_twice_torchs(backend, need_weights, dtype):
    theirs, ours = pair(batch_first=True)
    x = torch.randn(3, 17, EMBED, dtype=F64)
    padding = torch.arange(17) >= torch.tensor([[17], [9], [13]])
    truth = theirs(x, x, x, padding)[0]
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    want = theirs(x, x, x, padding, need_weights)[0]
    with fastseq.use_backend(backend):
        got = ours(x, x, x, padding, need_weights)[0]
    # Both round at each of the three products.
    assert_within_budget(got, want, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_has_a_backward(backend):
    theirs, ours = (m.eval() for m in pair(batch_first=True))
    x = torch.randn(2, 5, EMBED, dtype=F64, requires_grad=True)
    with fastseq.use_backend(backend):
        (got,) = torch.autograd.grad(ours(x, x, x)[0].sin().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(theirs(x, x, x)[0].sin().sum(), x)[0])


def test_deepcopy_pickle_and_dtypes():
    _, layer = pair(batch_first=True, dropout=0.1)
    x = torch.randn(2, 5, EMBED, dtype=F64)
    layer.eval()
    want = layer(x, x, x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(x, x, x)[0], want)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y, weights = copy.deepcopy(layer).to(dtype)(*(x.to(dtype),) * 3)
        assert y.dtype == weights.dtype == dtype
    assert layer.float().double()(x, x, x)[0].dtype == F64


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_torchs_dtypes(backend):
    theirs, ours = pair(dtype=torch.float32, add_bias_kv=True)
    x = torch.randn(4, 2, EMBED)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastseq.use_backend(backend):
        for need_weights in (False, True):
            got, want = ours(x, x, x, need_weights=need_weights), theirs(x, x, x, need_weights=need_weights)
            assert got[0].dtype == want[0].dtype == torch.bfloat16
            torch.testing.assert_close(got[0], want[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("need_weights", [False, True])
def test_second_derivatives(backend, need_weights):
    _, layer = pair(batch_first=True)
    x = torch.randn(1, 3, EMBED, dtype=F64, requires_grad=True)
    padding = torch.tensor([[False, False, True]])
    with fastseq.use_backend(backend):
        assert torch.autograd.gradgradcheck(lambda x: layer(x, x, x, padding, need_weights)[0], (x,), fast_mode=True)


def test_inside_torchs_transformer_layers():
    theirs = nn.TransformerDecoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True, dtype=F64)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        layer = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=F64)
        layer.load_state_dict(getattr(theirs, name).state_dict())
        setattr(ours, name, layer)
    target, memory = torch.randn(2, 5, EMBED, dtype=F64), torch.randn(2, 7, EMBED, dtype=F64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    kwargs = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    torch.testing.assert_close(ours(target, memory, **kwargs), theirs(target, memory, **kwargs))


def test_nested_tensors_go_to_torchs_forward():
    theirs, ours = (
        nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        MultiheadAttention(8, 2, batch_first=True).eval(),
    )
    ours.load_state_dict(theirs.state_dict())
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        got, want = (m(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(got.to_padded_tensor(0.0), want.to_padded_tensor(0.0))
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(nested, nested, nested)


@needs_native
def test_no_matrix_of_scores_is_stored_without_weights():
    program = """
import resource, torch, fastseq
layer = fastseq.nn.MultiheadAttention(8, 2, batch_first=True)
x = torch.randn(1, 8000, 8)
padding = torch.zeros(1, 8000).masked_fill(torch.rand(1, 8000) < 0.1, -torch.inf)
with fastseq.use_backend("native"):
    layer(x[:, :64], x[:, :64], x[:, :64], need_weights=False)[0].sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, "MB; one matrix of scores would be 512"
