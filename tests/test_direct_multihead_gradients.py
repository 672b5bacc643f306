"""Training MultiheadAttention by one native call forward and one back: torch's gradients, and the general way where
there is more to do."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
from support import assert_within_budget, needs_native
from test_direct import Counting, Dispatch, Functions, leaves_nothing_behind
from test_direct_attention import DTYPES, LAYERS, spied
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import use_backend
from fastseq.functional import direct, multihead

pytestmark = needs_native

BOTH = ["multihead_forward", "multihead_backward"]
F64 = torch.float64


@pytest.fixture
def taken(monkeypatch):
    """Native calls that were made and not declined, as they go."""
    return spied(monkeypatch, "multihead", "attend_forward", *BOTH)


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
def test_torchs_gradients(kind, of, dtype, taken):
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
            taken.clear()
            found = gradients(layer, given, d_y, need_weights=need, **options)
            assert taken == (BOTH if not need or dtype in (F64, torch.float32) else [])
            peer = gradients(theirs, given, d_y, need_weights=need, **options)
            truth = gradients(true, wide, d_y.double(), need_weights=need, **widened)
            for a, b, t in zip(found, peer, truth, strict=True):
                assert_within_budget(a, b, t, floor_ulps=8)  # two products, each with its roundings, around the kernel


def test_longer_sequences_and_strided_gradients(taken):
    layer = layer_of(48, 3, torch.float32, batch_first=True)
    theirs, given = torchs(layer, batch_first=True), inputs("one", True, 48, torch.float32, 2, 150)
    for d_y in (torch.randn(2, 150, 48), torch.randn(2, 48, 150).mT, torch.ones(()).expand(2, 150, 48)):
        taken.clear()
        found = gradients(layer, given, d_y, need_weights=False)
        assert taken == BOTH
        for a, b in zip(found, gradients(theirs, given, d_y, need_weights=False), strict=True):
            # float32 against float32, in other orders of sums over 300 rows
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["one", "two", "three"])
def test_frozen_inputs_and_parameters(kind, taken):
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
        taken.clear()
        results = []
        for which in (layer, theirs):
            leaves = [x for x in [*different, *which.parameters()] if x.requires_grad]
            results.append(gradients(which, given, d_y, want=leaves, need_weights=False))
        assert (taken == BOTH) == wanted[len(different)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("average", [True, False])
def test_gradients_through_the_weights(average, taken):
    layer, given = layer_of(), inputs("two")
    theirs = torchs(layer)
    options = {"average_attn_weights": average}
    d_y, d_weights = torch.randn(4, 3, 12, dtype=F64), torch.randn(3, *(() if average else (3,)), 4, 6, dtype=F64)
    found = gradients(layer, given, d_y, d_weights, **options)
    assert taken[0] == BOTH[0]
    assert BOTH[1] not in taken
    for a, b in zip(found, gradients(theirs, given, d_y, d_weights, **options), strict=True):
        torch.testing.assert_close(a, b)
    weights = [which(*given, **options)[1] for which in (layer, theirs)]
    found, want = (torch.autograd.grad(w, given[:2], d_weights) for w in weights)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_derivatives_of_every_order(taken):
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
    assert set(BOTH) <= set(taken)

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
def test_checkpoints(reentrant, taken):
    layer, (x, *_) = layer_of(), inputs("one")

    def f(x):
        return layer(x, x, x, need_weights=False)[0].square()

    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(f(x).sum(), leaves)
    taken.clear()
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert taken == (["multihead"] if reentrant else BOTH[:1]) + BOTH
    assert all(torch.equal(x.grad, w) for x, w in zip(leaves, want, strict=True))


def test_saved_tensors_are_autograds(taken):
    layer, given = layer_of(), inputs("two")
    leaves = [*given[:2], *layer.parameters()]
    d_y = torch.randn(4, 3, 12, dtype=F64)
    want = gradients(layer, given, d_y, need_weights=False)[1:]
    packed: list[torch.Tensor] = []

    def pack(x):
        packed.append(x)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: packed[at].clone()):
        y = layer(*given, need_weights=False)[0]
    assert len(packed) == 2 + 2 + 2 + 2  # x, W, the matrices of q, k and v, o and lse
    for retain in (True, False):
        found = torch.autograd.grad(y, leaves, d_y, retain_graph=retain)
        assert taken[-1] == BOTH[1]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_what_the_gradient_needs_must_not_change_and_all_else_may(taken):
    layer, (x, *_) = layer_of(), inputs("one")
    for needed in (layer.in_proj_weight, layer.out_proj.weight, x):
        y = layer(x, x, x, need_weights=False)[0]
        needed.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    want = torch.autograd.grad(layer(x, x, x, need_weights=False)[0].sum(), x)[0]
    y = layer(x, x, x, need_weights=False)[0]
    for free in (layer.in_proj_bias, layer.out_proj.bias, y.add_(1)):
        free.detach().mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    x.requires_grad_(False)
    y = layer(x, x, x, need_weights=False)[0]
    layer.in_proj_weight.detach().mul_(2)
    taken.clear()
    y.sum().backward()
    assert taken == BOTH[1:]
    layer.in_proj_weight.requires_grad_(False)
    y = layer(x, x, x, need_weights=False)[0]
    x.mul_(2)
    y.sum().backward()


def test_the_general_way_where_there_is_more_to_do(taken):
    layer, (x, *_) = layer_of(dtype=torch.float32), inputs("one", dtype=torch.float32)

    def general(f):
        taken.clear()
        f().sum().backward()
        assert not {*BOTH} & {*taken}

    def call(x=x, layer=layer, **options):
        return layer(x, x, x, **{"need_weights": False, **options})[0]

    mask = torch.randn(4, 4, requires_grad=True)
    general(lambda: call(attn_mask=mask))
    assert mask.grad.any()
    dropping = copy.deepcopy(layer)
    dropping.dropout = 0.5
    general(lambda: call(layer=dropping))
    general(lambda: call(x.transpose(0, 1).contiguous().transpose(0, 1)))
    general(lambda: call(x.as_subclass(Counting)))
    for name in ("reference", "torch"):
        with use_backend(name):
            general(call)
    for mode in (Functions(), Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
        with mode:
            general(call)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    general(lambda: compiled(x))
    taken.clear()
    torch.func.grad(lambda x: call(x).sum())(x)
    torch.func.vmap(call)(x[None])
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x, torch.randn_like(x)))
        assert forward_ad.unpack_dual(y).tangent.any()
    assert not taken
    call().sum().backward()
    assert taken == BOTH


def test_a_backward_that_is_more_than_its_numbers(taken, capfd):
    layer, given = layer_of(), inputs("two")
    leaves = [*given[:2], *layer.parameters()]
    for need in (False, True):
        y = layer(*given, need_weights=need)[0]
        d_y = torch.randn(3, *y.shape, dtype=F64)
        want = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in d_y]
        taken.clear()
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
        assert BOTH[1] not in taken
    assert "Exception" not in capfd.readouterr().err
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(*given)[0].sum().backward()


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_autograd(need_weights, taken):
    layer, (x, *_) = layer_of(), inputs("one")
    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x, x, x, need_weights=need_weights)[0].square().sum(), leaves)
    y = layer(x, x, x, need_weights=need_weights)[0]
    taken.clear()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.square().sum().backward()
    assert BOTH[1] not in taken
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


def test_a_declined_gradient_goes_the_general_way(monkeypatch):
    for of, kind in itertools.product(LAYERS.values(), ("one", "two", "three", "unbatched")):
        layer, given = layer_of(**of), inputs(kind, of.get("batch_first", False))
        d_y = torch.randn(given[0].shape, dtype=F64)
        want = gradients(layer, given, d_y)
        with monkeypatch.context() as away:
            away.setattr(direct, "multihead_backward", lambda *_: None)
            found = gradients(layer, given, d_y)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_training_run_is_torchs(taken):
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
    assert taken == BOTH * 20
    torch.testing.assert_close(*losses)


def test_nothing_is_left_behind():
    layer, (x, *_) = layer_of(dtype=torch.float32), inputs("one", dtype=torch.float32)
    own, out = layer._parameters, layer.out_proj._parameters
    d_y = torch.randn_like(x)
    wanted = (True,) * 7

    def rounds():
        for _ in range(200):
            tail = (None, None, 3, False, False)
            q, k, v, o, lse = direct.multihead_forward(own, out, x, x, x, *tail, False, True)[2:]
            assert direct.multihead_forward(own, own, x, x, x, *tail, False, True) is None
            saved = (x, None, None, own["in_proj_weight"], out["weight"], None, None, q, k, v, o, lse)
            with torch.no_grad():
                settings = (3, False, False)
                assert direct.multihead_backward(d_y, saved, settings, wanted) is not None
                assert direct.multihead_backward(d_y, saved, settings, (False,) * 7) == (None,) * 8
                for bad in (
                    (d_y[:2], saved, settings, wanted),
                    (d_y.double(), saved, settings, wanted),
                    (d_y, saved[:-1], settings, wanted),
                    (d_y, (*saved[:-1], lse.double()), settings, wanted),
                    (d_y, (*saved[:-2], o.mT, lse), settings, wanted),
                    (d_y, (*saved[:3], None, *saved[4:]), settings, wanted),
                    (d_y, saved, (5, False, False), wanted),
                    (d_y, saved, settings, wanted[1:]),
                    (None, saved, settings, wanted),
                ):
                    assert direct.multihead_backward(*bad) is None
            layer(x, x, x)[0].backward(d_y)
            x.grad = None
            layer.zero_grad()

    leaves_nothing_behind(rounds, [x, d_y, own, out, *own.values(), *out.values()])


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


def test_the_way_is_off_with_a_torch_that_has_it_not(monkeypatch):
    monkeypatch.setattr(direct, "multihead", None)
    layer, x = layer_of(), inputs("one")[0]
    own, out = layer._parameters, layer.out_proj._parameters
    assert multihead.short_way(own, out, x, x, x, None, None, 3, False, False, False, True) is None
