"""Training attention past the operators: the operators' gradients, and the general way where it is needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import assert_within_budget, needs_native
from test_direct import Counting, Dispatch, Functions, leaves_nothing_behind
from test_direct_attention import DTYPES, OPTIONS, call, spied
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import direct, use_backend

pytestmark = needs_native

BOTH = ["attend", "attend_backward"]


@pytest.fixture
def taken(monkeypatch):
    """Native calls that were made and not declined, as they go."""
    return spied(monkeypatch, *BOTH)


def leaves(dtype=torch.float32, **options):
    """q, k and v that want gradients, laid out as a projection leaves them, and the options of the call."""
    args = call(dtype=dtype, **options)
    names = ("bias", "mask", "scale", "causal", "bottom_right", "window", "softcap")
    options = dict(zip(names, (*args[3:5], *args[5]), strict=False))
    options["align"] = "bottom_right" if options.pop("bottom_right") else "top_left"
    return [x.requires_grad_() for x in args[:3]], options


def gradients(q, k, v, d_o, options):
    return torch.autograd.grad(fastseq.attention(q, k, v, **options), (q, k, v), d_o)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_have_the_operators_bits(options, dtype, taken):
    mask = torch.rand(5, 7) < 0.7
    mask[2] = False
    for queries, keys, more in (
        (1, 1, {}),
        (5, 7, {}),
        (5, 7, {"mask": mask}),
        (5, 7, {"bias": torch.randn(2, 1, 5, 1).to(dtype)}),
        (5, 7, {"bias": torch.randn(5, 7), "mask": mask[:, :1]}),
        (1, 70, {}),
        (70, 3, {}),
    ):
        tensors, given = leaves(dtype, queries=queries, keys=keys, **options, **more)
        o = fastseq.attention(*tensors, **given)
        for d_o in (torch.randn_like(o), torch.randn_like(o.mT).mT, torch.ones((), dtype=dtype).expand_as(o)):
            taken.clear()
            found = gradients(*tensors, d_o, given)
            assert taken == BOTH
            with use_backend("native"):
                want = torch.autograd.grad(fastseq.attention(*tensors, **given, return_lse=True)[0], tensors, d_o)
            for x, a, b in zip(tensors, found, want, strict=True):
                assert a.dtype == x.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_the_reference_in_float64(dtype, taken):
    for queries, keys in ((1, 9), (2, 5), (6, 6), (17, 33)):
        tensors, options = leaves(dtype, queries=queries, keys=keys, causal=True, heads_k=2, bias=torch.randn(keys))
        d_o = torch.randn_like(fastseq.attention(*tensors, **options))
        found = gradients(*tensors, d_o, options)
        assert taken[-2:] == BOTH
        with use_backend("reference"):
            peer = gradients(*tensors, d_o, options)
            wide = [x.detach().double().requires_grad_() for x in tensors]
            truth = gradients(*wide, d_o.double(), options | {"bias": options["bias"].double()})
        for a, b, t in zip(found, peer, truth, strict=True):
            assert_within_budget(a, b, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [{}, {"window": (3, -1)}, {"window": (3, -1), "align": "top_left"}], ids=str)
def test_a_lone_query(limits, dtype):
    """It has a kernel of its own, but for wide heads, far scores and masks: no less exact than the one for tiles."""
    shapes = (2, 16, 16, 0.3), (9, 40, 7, 0.3), (150, 5, 64, 1.0), (9, 300, 16, 0.1), (9, 16, 16, 3.0), (3, 4, 4, 1e7)
    for keys, dim, dim_v, scale in shapes:
        tensors = [torch.randn(2, 3, *s).to(dtype).requires_grad_() for s in ((1, dim), (keys, dim), (keys, dim_v))]
        d_o, dlse = torch.randn(2, 3, 1, dim_v).to(dtype), torch.randn(2, 3, 1)

        def run(*tensors, mask=None, scale=scale, seeds=(d_o, dlse)):
            o, lse = fastseq.attention(*tensors, **limits, mask=mask, scale=scale, return_lse=True)
            return torch.autograd.grad((o, lse), tensors, [x.to(y.dtype) for x, y in zip(seeds, (o, lse), strict=True)])

        with use_backend("native"):
            found, peer = run(*tensors), run(*tensors, mask=torch.ones(1, keys, dtype=torch.bool))
        with use_backend("reference"):
            truth = run(*(x.detach().double().requires_grad_() for x in tensors))
        for a, b, t in zip(found, peer, truth, strict=True):
            assert_within_budget(a, b, t)


def test_only_what_wants_a_gradient_has_one(taken):
    for wanted in itertools.product((True, False), repeat=3):
        tensors, options = leaves()
        for x, want in zip(tensors, wanted, strict=True):
            x.requires_grad_(want)
        taken.clear()
        o = fastseq.attention(*tensors, **options)
        assert o.requires_grad == any(wanted)
        if any(wanted):
            o.square().sum().backward()
        assert taken == BOTH[: 1 + any(wanted)]
        assert tuple(x.grad is not None for x in tensors) == wanted
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastseq.attention(x, x, x), x)
    assert torch.autograd.gradcheck(lambda x: fastseq.scaled_dot_product_attention(x, x, x), x)


def test_derivatives_of_every_order(taken):
    tensors, options = leaves(
        torch.float64, queries=3, keys=4, dim=4, dim_v=3, mask=torch.rand(3, 4) < 0.8, softcap=2.0
    )
    taken.clear()

    def f(*tensors):
        return fastseq.attention(*tensors, **options)

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)
    assert set(taken) == set(BOTH)
    plain = torch.autograd.grad(f(*tensors).sin().sum(), tensors)
    again = torch.autograd.grad(f(*tensors).sin().sum(), tensors, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad

    def third(x):
        first = torch.autograd.grad(f(x[:, :, :3], x, x).sin().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.sin().sum(), x)[0]

    x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(1, 2, 4, 4).requires_grad_()
    options["mask"] = None
    with use_backend("reference"):
        want = third(x)
    torch.testing.assert_close(third(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, taken):
    tensors, options = leaves()

    def f(*tensors):
        return fastseq.attention(*tensors, **options).square()

    want = torch.autograd.grad(f(*tensors).sum(), tensors)
    taken.clear()
    checkpoint(f, *tensors, use_reentrant=reentrant).sum().backward()
    assert taken == BOTH[:1] + BOTH
    assert all(torch.equal(x.grad, w) for x, w in zip(tensors, want, strict=True))


def test_saved_tensors_are_autograds(taken):
    tensors, options = leaves()
    want = torch.autograd.grad(fastseq.attention(*tensors, **options).square().sum(), tensors)
    packed: list[torch.Tensor] = []

    def pack(x):
        packed.append(x)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: packed[at].clone()):
        o = fastseq.attention(*tensors, **options)
    assert len(packed) == 5
    for retain in (True, False):
        found = torch.autograd.grad(o, tensors, 2 * o.detach(), retain_graph=retain)
        assert taken[-1] == BOTH[1]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        o.sum().backward()
    for spoil in (lambda o: tensors[1].detach().mul_(2), lambda o: o.mul_(2)):
        o = fastseq.attention(*tensors, **options)
        spoil(o)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


def test_the_general_way_where_there_is_more_to_do(taken):
    (q, k, v), _ = leaves()
    bias = torch.randn(5, 7, requires_grad=True)

    def general(f):
        taken.clear()
        o = f()
        o.sum().backward()
        assert not taken
        return o

    general(lambda: fastseq.attention(q, k, v, bias=bias))
    assert bias.grad.any()
    general(lambda: fastseq.scaled_dot_product_attention(q, k, v, bias))
    general(lambda: fastseq.attention(q, k, v, dropout_p=0.5))
    general(lambda: fastseq.attention(q, k, v, return_lse=True)[0])
    general(lambda: fastseq.attention(q, k, v.mT.contiguous().mT))
    for name in ("reference", "torch"):
        general(lambda name=name: fastseq.attention(q, k, v, backend=name))
    general(lambda: fastseq.attention(q.as_subclass(Counting), k, v))
    for mode in (Functions(), Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
        with mode:
            general(lambda: fastseq.attention(q, k, v))
    compiled = torch.compile(lambda q, k, v: fastseq.attention(q, k, v), backend="aot_eager", fullgraph=True)
    general(lambda: compiled(q, k, v))
    taken.clear()
    torch.func.grad(lambda q: fastseq.attention(q, k, v).sum())(q)
    torch.func.vmap(lambda q: fastseq.attention(q, k, v))(q[None])
    with forward_ad.dual_level():
        o = fastseq.attention(forward_ad.make_dual(q, torch.randn_like(q)), k, v)
        assert forward_ad.unpack_dual(o).tangent.any()
    assert not taken


def test_a_backward_that_is_more_than_its_numbers(taken, capfd):
    tensors, options = leaves(torch.float64)
    o = fastseq.attention(*tensors, **options)
    d_o = torch.randn(3, *o.shape, dtype=o.dtype)
    want = [torch.autograd.grad(o, tensors, d, retain_graph=True) for d in d_o]
    taken.clear()
    found = [torch.autograd.grad(o, tensors, d_o, retain_graph=True, is_grads_batched=True)]
    found.append(torch.func.vmap(lambda d: torch.autograd.grad(o, tensors, d, retain_graph=True))(d_o))
    for many in found:
        for n, x in enumerate(many):
            torch.testing.assert_close(x, torch.stack([w[n] for w in want]))
    for mode in (Dispatch(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile()):
        with mode:
            found = torch.autograd.grad(o, tensors, d_o[0], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, want[0], strict=True))
    assert not taken
    assert "Exception" not in capfd.readouterr().err
    with torch.autograd.detect_anomaly(check_nan=True):
        fastseq.attention(*tensors, **options).sum().backward()


def test_nothing_is_left_behind():
    (q, k, v), _ = leaves()
    settings = (None, False, True, None, 0.0, True)
    o, lse = direct.attend(q, k, v, None, None, settings)
    d_o, mask = torch.randn_like(o), torch.ones(5, 7, dtype=torch.bool)

    def rounds():
        for _ in range(300):
            direct.attend(q, k, v, None, mask, settings)
            direct.attend(q, k.double(), v, None, mask, settings)
            with torch.no_grad():
                assert direct.attend_backward(d_o, (q, k, v, None, mask, o, lse), settings) is not None
                assert direct.attend_backward(d_o[:1], (q, k, v, None, mask, o, lse), settings) is None
                assert direct.attend_backward(d_o, (q, k, v, None, mask, o, lse.double()), settings) is None
                assert direct.attend_backward(d_o, (q, k, v, None, mask, o), settings) is None
                assert direct.attend_backward(d_o, (q, k, v, None, mask, o.mT, lse), settings) is None
            fastseq.attention(q, k, v, mask=mask).backward(d_o)
            q.grad = k.grad = v.grad = None

    leaves_nothing_behind(rounds, [q, k, v, mask, o, lse, d_o, settings])
    assert direct.attend_backward(d_o, (q, k, v, None, mask, o, lse), settings) is None, "gradients are on"
