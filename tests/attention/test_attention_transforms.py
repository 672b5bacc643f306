"""Derivatives of every order, torch.func, torch.compile, torch.export, checkpointing and opcheck of attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import BACKENDS, flat, needs_native
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import attention, scaled_dot_product_attention, use_backend
from fastseq.attn.autograd import backward_arguments
from fastseq.attn.call import AttentionCall

F64 = torch.float64
MASK = torch.tensor([[[[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]], [[[1, 0, 1, 1, 1]] * 3]]).bool()


def inputs(batch=2, queries=3, keys=5, requires_grad=False, dtype=F64):
    """q, k, v, bias, sinks."""
    shapes = (batch, 4, queries, 4), (batch, 2, keys, 4), (batch, 2, keys, 3), (1, 4, queries, keys), (4,)
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def value(q, k, v, bias=None, sinks=None, **options):
    """Everything at once, o alone."""
    return attention(q, k, v, bias=bias, sinks=sinks, mask=MASK, softcap=2.0, **options)


def loss(*args, **options):
    """A number that both o and lse take part in."""
    o, lse = value(*args, return_lse=True, **options)
    return o.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()


def assert_same_on(backend, call):
    results = []
    for name in (backend, "reference"):
        with use_backend(name):
            results.append(flat(call()))
    assert results[0]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck(backend):
    q, k, v, bias, sinks = inputs(requires_grad=True)
    if backend == "torch":
        given, call = (q, k, v, bias), lambda q, k, v, bias: attention(q, k, v, bias=bias, mask=MASK, causal=True)
    else:
        given, call = (q, k, v, bias, sinks), value
    with use_backend(backend):
        assert torch.autograd.gradcheck(call, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, given, fast_mode=True)
        if backend != "torch":
            assert torch.autograd.gradgradcheck(lambda *t: loss(*t), given, fast_mode=True)


@needs_native
def test_gradient_is_the_same_whether_or_not_it_can_be_differentiated_again():
    given = inputs(requires_grad=True)
    with use_backend("native"):
        first = torch.autograd.grad(loss(*given), given)
        again = torch.autograd.grad(loss(*given), given, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_native
def test_third_derivative_and_one_tensor_given_three_times():
    def call():
        x = torch.linspace(-1, 1, 24, dtype=F64).view(1, 2, 3, 4).requires_grad_()
        total = loss_of(x)
        results = []
        for _ in range(3):
            (first,) = torch.autograd.grad(total, x, create_graph=True)
            results.append(first)
            total = first.square().sum()
        return results

    def loss_of(x):
        return attention(x, x, x, causal=True).sin().sum()

    assert_same_on("native", call)


@needs_native
def test_each_gradient_is_computed_only_where_it_is_wanted():
    q, k, v, bias, sinks = inputs()
    with use_backend("native"):
        for place in range(5):
            given = [q, k, v, bias, sinks]
            given[place] = given[place].clone().requires_grad_()
            (got,) = torch.autograd.grad(loss(*given), given[place])
            with use_backend("reference"):
                torch.testing.assert_close(got, torch.autograd.grad(loss(*given), given[place])[0])
        assert not attention(q, k, v).requires_grad
        with torch.no_grad():
            assert not attention(q.clone().requires_grad_(), k, v).requires_grad


TRANSFORMS = {
    "grad": lambda q, k, v, bias, sinks, many: grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, bias, sinks),
    "grad of grad": lambda q, k, v, bias, sinks, many: grad(lambda q: grad(loss)(q, k, v, bias, sinks).square().sum())(
        q
    ),
    "vmap": lambda q, k, v, bias, sinks, many: vmap(lambda q: value(q, k, v, bias, sinks))(many),
    "vmap along another dimension": lambda q, k, v, bias, sinks, many: vmap(
        lambda q: value(q, k, v, bias, sinks), in_dims=2
    )(many.movedim(0, 2)),
    "vmap of vmap": lambda q, k, v, bias, sinks, many: vmap(vmap(lambda q: value(q, k, v)))(
        many.expand(2, *many.shape)
    ),
    "vmap over every input": lambda q, k, v, bias, sinks, many: vmap(value)(
        many, *(torch.stack((x, 2 * x, -x)) for x in (k, v, bias, sinks))
    ),
    "vmap of grad": lambda q, k, v, bias, sinks, many: vmap(
        grad(loss, argnums=(0, 1, 3, 4)), in_dims=(0, None, None, None, None)
    )(many, k, v, bias, sinks),
    "vmap of grad without sinks": lambda q, k, v, bias, sinks, many: vmap(
        grad(loss, argnums=(0, 1, 3)), in_dims=(0, None, None, None)
    )(many, k, v, bias),
    "grad of vmap": lambda q, k, v, bias, sinks, many: grad(
        lambda many, bias: vmap(lambda q: loss(q, k, v, bias, sinks))(many).sum(), argnums=(0, 1)
    )(many, bias),
    "jacrev": lambda q, k, v, bias, sinks, many: jacrev(value, argnums=(0, 3))(q, k, v, bias),
    "jacfwd": lambda q, k, v, bias, sinks, many: jacfwd(value)(q, k, v, bias, sinks),
    "hessian": lambda q, k, v, bias, sinks, many: hessian(loss)(q[:, :, :1], k, v, bias[:, :, :1]),
    "jacrev of jacrev": lambda q, k, v, bias, sinks, many: jacrev(jacrev(loss))(q[:, :, :1], k, v),
    "jvp of vjp": lambda q, k, v, bias, sinks, many: jvp(
        lambda ct: vjp(lambda q: value(q, k, v, bias), q)[1](ct)[0],
        (v.new_ones(2, 4, 3, 3),),
        (v.new_ones(2, 4, 3, 3),),
    ),
}
MASKS = {"hessian": MASK[:, :, :1], "jacrev of jacrev": MASK[:, :, :1]}


@pytest.mark.parametrize("transform", TRANSFORMS)
@needs_native
def test_torch_func(transform, monkeypatch):
    monkeypatch.setitem(globals(), "MASK", MASKS.get(transform, MASK))
    given = (*inputs(), torch.randn(3, 2, 4, 3, 4, dtype=F64))
    assert_same_on("native", lambda: TRANSFORMS[transform](*given))


@needs_native
def test_torch_func_inside_plain_autograd():
    q, k, v, bias, sinks = inputs()

    def call():
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        inner = grad(lambda q: loss(q, leaves[1], v, bias, sinks))(leaves[0])
        return inner, *torch.autograd.grad(inner.square().sum(), leaves)

    assert_same_on("native", call)


@needs_native
def test_plain_autograd_through_vmap():
    many = torch.randn(3, 2, 4, 3, 4, dtype=F64)
    given = inputs()

    def call():
        leaves = [x.clone().requires_grad_() for x in (many, *given[1:])]
        total = vmap(lambda q: loss(q, *leaves[1:]))(leaves[0]).sum()
        return torch.autograd.grad(total, leaves)

    assert_same_on("native", call)


@needs_native
def test_forward_mode():
    q, k, v, bias, sinks = inputs()

    def call():
        with forward_ad.dual_level():
            o = value(forward_ad.make_dual(q, torch.ones_like(q)), k, v, bias, sinks)
            return forward_ad.unpack_dual(o).tangent

    assert_same_on("native", call)


@needs_native
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness):
    q, k, v, _, _ = inputs()
    many = torch.stack((q, q, q))

    def call():
        torch.manual_seed(3)
        return vmap(lambda q: attention(q, k, v, dropout_p=0.5), randomness=randomness)(many)

    assert_same_on("native", call)
    rows = call()
    assert torch.equal(rows[0], rows[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda q: attention(q, k, v, dropout_p=0.5, backend="native"))(many)


# Graphs.


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_once_for_every_length(backend, requires_grad):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def call(q, k, v, keys):
        return 2 * attention(q, k, v, causal=True, window=(6, -1), mask=keys)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with use_backend(backend):
        for length in (5, 6, 9, 33, 70):
            q, k, v, _, _ = inputs(queries=length, keys=length, requires_grad=requires_grad)
            keys = torch.rand(2, 1, 1, length) < 0.8
            got, want = compiled(q, k, v, keys), call(q, k, v, keys)
            torch.testing.assert_close(got, want)
            if requires_grad:
                for a, b in zip(
                    torch.autograd.grad(got.sin().sum(), (q, k, v)),
                    torch.autograd.grad(want.sin().sum(), (q, k, v)),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b)
    assert counter.frame_count == 2  # the first length, and all others


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_compiles_whole_and_once_for_every_length(backend, need_weights):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = fastseq.nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with use_backend(backend):
        for length in (5, 6, 9, 33):
            x = torch.randn(2, length, 8, dtype=F64)
            padding = torch.arange(length) >= torch.tensor([[length], [2]])
            kwargs = {"key_padding_mask": padding, "need_weights": need_weights}
            torch.testing.assert_close(compiled(x, x, x, **kwargs), layer(x, x, x, **kwargs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_step(backend):
    torch._dynamo.reset()
    q, k, v, _, _ = inputs(requires_grad=True)

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sin().sum()

    with use_backend(backend):
        got = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
        want = torch.autograd.grad(call(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize(
    "transform", ["grad", "grad of grad", "vmap", "vmap of grad", "grad of vmap", "jacrev", "jacfwd", "hessian"]
)
def test_compiled_transforms_have_right_gradients(transform, monkeypatch):
    monkeypatch.setitem(globals(), "MASK", MASKS.get(transform, MASK))
    torch._dynamo.reset()
    given = (*inputs(), torch.randn(3, 2, 4, 3, 4, dtype=F64))
    with use_backend("native"):
        got = torch.compile(TRANSFORMS[transform], fullgraph=True, backend="aot_eager")(*given)
    with use_backend("reference"):
        want = TRANSFORMS[transform](*given)
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_that_is_several_arguments_has_all_its_gradients_when_compiled():
    x, d_o = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)

    def gradient(call):
        return torch.autograd.grad(call(x), x, d_o)[0]

    def call(x):
        return fastseq.attention(x, x, x, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(call))


def test_a_scale_that_the_graph_leaves_open_compiles():
    """torch.compile(dynamic=True) takes a number of the module for an input."""
    layer = torch.nn.Module()
    layer.scale = 0.3
    layer.forward = lambda x: fastseq.attention(x, x, x, scale=layer.scale)
    x = torch.randn(2, 2, 5, 8)
    got = torch.compile(layer.forward, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    torch.testing.assert_close(got, layer.forward(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_any_length(backend, strict):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    length = torch.export.Dim("length", min=2, max=512)
    dynamic = ({2: length},) * 3
    with use_backend(backend):
        given = tuple(torch.randn(2, 4, 7, 8, dtype=F64) for _ in range(3))
        program = torch.export.export(Model(), given, dynamic_shapes=dynamic, strict=strict)
        given = tuple(torch.randn(2, 4, 40, 8, dtype=F64) for _ in range(3))
        torch.testing.assert_close(program.module()(*given), Model()(*given))
    if backend == "native":
        called = [str(node.target) for node in program.graph.nodes]
        assert "fastseq.attention_forward.native" in called


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_dropout_again(backend, use_reentrant):
    q, k, v, _, _ = inputs(requires_grad=True)

    def call(q, k, v):
        return attention(q, k, v, causal=True, dropout_p=0.3)

    results = []
    with use_backend(backend):
        for run in (call, lambda *t: checkpoint(call, *t, use_reentrant=use_reentrant)):
            torch.manual_seed(3)
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            o = run(*leaves)
            o.sin().sum().backward()
            results.append([o, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    forward, backward = torch.ops.fastseq.attention_forward.native, torch.ops.fastseq.attention_backward.native
    q, k, v, bias, sinks = inputs(dtype=torch.float32)
    alibi, seed = torch.rand(4), torch.tensor([7])
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        cu_q, cu_k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 5, 10], dtype=torch.int32)
        own = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "prefix_lengths": torch.tensor([1, 5])}
    else:
        own = {"bias": bias, "mask": MASK, "lengths_q": torch.tensor([3, 1]), "lengths_k": torch.tensor([5, 4])}
    call = AttentionCall(
        q, k, v, **own, sinks=sinks, alibi_slopes=alibi, seed=seed, scale=0.3, causal=True, bottom_right=True,
        window_left=3, softcap=2.0, dropout_p=0.25,
    )  # fmt: skip
    torch.library.opcheck(forward, tuple(call))
    o, lse = forward(*call)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(backward, backward_arguments(torch.randn_like(o), dlse, o, lse, call, not packed))
