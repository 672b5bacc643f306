"""Training MultiheadAttention: torch's gradients, whatever is frozen, shared, transformed or changed in between."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from support import assert_within_budget, needs_native
from test_direct import Dispatch
from test_direct_attention import DTYPES, LAYERS
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import use_backend

pytestmark = needs_native

F64 = torch.float64


def layer_of(embed=12, heads=3, dtype=F64, **options):
    layer = fastseq.nn.MultiheadAttention(embed, heads, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def torchs(layer, **options):
    theirs = nn.MultiheadAttention(layer.embed_dim, layer.num_heads, dtype=layer.in_proj_weight.dtype, **options)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def inputs(kind, batch_first=False, embed=12, dtype=F64, batch=3, queries=4, keys=6):
    """query, key and value that want gradients: of one tensor, two or three; or unbatched."""

    def one(length):
        shape = (length,) if kind == "unbatched" else (batch, length) if batch_first else (length, batch)
        return torch.randn(*shape, embed, dtype=dtype, requires_grad=True)

    x = one(queries)
    if kind == "one":
        return x, x, x
    y = one(keys)
    return (x, y, y) if kind == "two" else (x, y, one(keys))


def gradients(layer, given, d_y, d_weights=None, want=None, **options):
    """The output, and gradients of inputs and parameters, or of those in ``want``."""
    y, weights = layer(*given, **options)
    outputs = [y] if d_weights is None else [y, weights]
    leaves = [*dict.fromkeys(given), *layer.parameters()] if want is None else want
    return y, *torch.autograd.grad(outputs, leaves, [d_y, d_weights][: len(outputs)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", ["one", "two", "three", "unbatched"])
def test_torchs_gradients(kind, of, dtype):
    layer = layer_of(dtype=dtype, **of)
    theirs, true = torchs(layer, **of), torchs(layer, **of).double()
    given = inputs(kind, of.get("batch_first", False), dtype=dtype)
    twice = {x: x.detach().double().requires_grad_() for x in given}
    wide = tuple(twice[x] for x in given)
    queries, keys = 4, 4 if kind == "one" else 6
    alone = kind == "unbatched"
    padding = torch.rand(*(() if alone else (3,)), keys) < 0.4
    padding[..., 0] = False
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    d_y = torch.randn(given[0].shape, dtype=dtype)
    for options in (
        {},
        {"attn_mask": causal, "is_causal": True},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(queries, keys, dtype=dtype)},
    ):
        widened = {n: x.double() if getattr(x, "is_floating_point", bool)() else x for n, x in options.items()}
        for need in (False, True):
            found = gradients(layer, given, d_y, need_weights=need, **options)
            peer = gradients(theirs, given, d_y, need_weights=need, **options)
            truth = gradients(true, wide, d_y.double(), need_weights=need, **widened)
            for a, b, t in zip(found, peer, truth, strict=True):
                assert_within_budget(a, b, t, floor_ulps=8)  # two products, each with its roundings, around the kernel


def test_longer_sequences_and_strided_gradients():
    layer = layer_of(48, 3, torch.float32, batch_first=True)
    theirs, given = torchs(layer, batch_first=True), inputs("one", True, 48, torch.float32, 2, 150)
    for d_y in (torch.randn(2, 150, 48), torch.randn(2, 48, 150).mT, torch.ones(()).expand(2, 150, 48)):
        found = gradients(layer, given, d_y, need_weights=False)
        for a, b in zip(found, gradients(theirs, given, d_y, need_weights=False), strict=True):
            # float32 against float32, in other orders of sums over 300 rows
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["one", "two", "three"])
def test_frozen_inputs_and_parameters(kind):
    layer, given = layer_of(), inputs(kind)
    theirs = torchs(layer)
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    different = list(dict.fromkeys(given))
    d_y = torch.randn(given[0].shape, dtype=F64)
    for wanted in itertools.product((True, False), repeat=len(different) + len(names)):
        if not any(wanted):
            continue
        for x, want in zip(different, wanted, strict=False):
            x.requires_grad_(want)
        for name, want in zip(names, wanted[len(different) :], strict=True):
            layer.get_parameter(name).requires_grad_(want)
            theirs.get_parameter(name).requires_grad_(want)
        results = []
        for which in (layer, theirs):
            leaves = [x for x in [*different, *which.parameters()] if x.requires_grad]
            results.append(gradients(which, given, d_y, want=leaves, need_weights=False))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("same", ["qqq", "qqv", "qvv", "qkq", "qkk", "qkv"])
def test_arguments_that_are_one_tensor(same, need_weights, batch_first):
    layer = layer_of(batch_first=batch_first)
    layers = layer, torchs(layer, batch_first=batch_first)
    for views in (False, True):  # the same tensor twice, or two views of one storage
        leaves = {name: torch.randn(5, 3, 12, dtype=F64, requires_grad=True) for name in set(same)}
        given = [leaves[name].view_as(leaves[name]) if views else leaves[name] for name in same]
        d_y = torch.randn(5, 3, 12, dtype=F64)
        found, want = (
            gradients(which, given, d_y, want=[*leaves.values(), *which.parameters()], need_weights=need_weights)
            for which in layers
        )
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("need_weights", [True, False])
def test_what_may_change_between_forward_and_backward_is_what_torch_allows(need_weights):
    def backward(which, frozen, changed):
        """The error, if any, of a backward before which something was changed in place."""
        for parameter in which.parameters():
            parameter.requires_grad_(True)
        x = torch.randn(4, 3, 12, dtype=F64).requires_grad_(frozen != "x")
        if frozen == "in_proj_weight":
            which.in_proj_weight.requires_grad_(False)
        y = which(x, x, x, need_weights=need_weights)[0]
        {"x": x, "y": y, **dict(which.named_parameters())}[changed].detach().mul_(1)
        try:
            y.sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""

    layer = layer_of()
    theirs = torchs(layer)
    for frozen in (None, "x", "in_proj_weight"):
        for changed in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "x", "y"):
            found, want = (backward(which, frozen, changed) for which in (layer, theirs))
            assert want or not found, f"{changed} changed, {frozen} frozen: torch computes, ours says {found}"
            assert not found or "modified by an inplace operation" in found


@pytest.mark.parametrize("average", [True, False])
def test_gradients_through_the_weights(average):
    layer, given = layer_of(), inputs("two")
    theirs = torchs(layer)
    options = {"average_attn_weights": average}
    d_y, d_weights = torch.randn(4, 3, 12, dtype=F64), torch.randn(3, *(() if average else (3,)), 4, 6, dtype=F64)
    found = gradients(layer, given, d_y, d_weights, **options)
    for a, b in zip(found, gradients(theirs, given, d_y, d_weights, **options), strict=True):
        torch.testing.assert_close(a, b)
    weights = [which(*given, **options)[1] for which in (layer, theirs)]
    found, want = (torch.autograd.grad(w, given[:2], d_weights) for w in weights)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_derivatives_of_every_order():
    layer, mask = layer_of(4, 2), torch.rand(2, 3) < 0.3
    leaves = (*inputs("three", embed=4, batch=1, queries=2, keys=3), *layer.parameters())
    for x in leaves[:3]:
        x.data.mul_(0.5)

    def f(query, key, value, *parameters, need_weights=False):
        state = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        options = {"attn_mask": mask, "need_weights": need_weights}
        return torch.func.functional_call(layer, state, (query, key, value), options)[0]

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: f(*x, need_weights=True), leaves, fast_mode=True)

    def third(which, x):
        # One input made from another: a gradient of the one must not count the other's.
        y = which(x, x.sin(), x.cos(), need_weights=False)[0].sin().sum()
        for _ in range(3):
            y = torch.autograd.grad(y, x, create_graph=True)[0].sin().sum()
        return torch.autograd.grad(y, [x, *which.parameters()], allow_unused=True)

    x = leaves[0]
    with use_backend("reference"):
        want = third(layer, x)
    for a, b in zip(third(layer, x), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    layer, (x, *_) = layer_of(), inputs("one")

    def f(x):
        return layer(x, x, x, need_weights=False)[0].square()

    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(f(x).sum(), leaves)
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, w) for x, w in zip(leaves, want, strict=True))


def test_a_backward_that_is_more_than_its_numbers(capfd):
    layer, given = layer_of(), inputs("two")
    leaves = [*given[:2], *layer.parameters()]
    for need in (False, True):
        y = layer(*given, need_weights=need)[0]
        d_y = torch.randn(3, *y.shape, dtype=F64)
        want = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in d_y]
        found = [torch.autograd.grad(y, leaves, d_y, retain_graph=True, is_grads_batched=True)]
        found.append(torch.func.vmap(lambda d, y=y: torch.autograd.grad(y, leaves, d, retain_graph=True))(d_y))
        for many in found:
            for n, x in enumerate(many):
                torch.testing.assert_close(x, torch.stack([w[n] for w in want]))
        for mode in (Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
            with mode:
                again = torch.autograd.grad(y, leaves, d_y[0], retain_graph=True)
            for a, b in zip(again, want[0], strict=True):
                torch.testing.assert_close(a, b)
    assert "Exception" not in capfd.readouterr().err
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(*given)[0].sum().backward()


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_autograd(need_weights):
    layer, (x, *_) = layer_of(), inputs("one")
    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x, x, x, need_weights=need_weights)[0].square().sum(), leaves)
    y = layer(x, x, x, need_weights=need_weights)[0]
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.square().sum().backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


def test_a_training_run_is_torchs():
    layer = fastseq.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs = torchs(layer, batch_first=True)
    x, target = torch.randn(8, 5, 16), torch.randn(8, 5, 16)
    losses = []
    for which in (layer, theirs):
        optimizer = torch.optim.SGD(which.parameters(), 0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (which(x, x, x, need_weights=False)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


def test_one_layer_in_many_threads():
    layer = fastseq.nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(4, 40, 64)
    want = torch.autograd.grad(layer(x, x, x, need_weights=False)[0].square().sum(), list(layer.parameters()))
    found = []

    def work():
        for _ in range(10):
            y = layer(x, x, x, need_weights=False)[0]
            found.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for one in found:
        for a, b in zip(one, want, strict=True):
            # torch divides its products by the threads that it is given, which differ here
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
