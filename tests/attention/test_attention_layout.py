"""Where results of attention lie in memory: o as q does, so that a user's transpose back is a view; a gradient as its
input does."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_operators import arguments
from fastseq.kernels.attention.layout import empty_as, laid_out_as
from support import BACKENDS, NATIVE, needs_native

from fastseq import attention, scaled_dot_product_attention, use_backend

ORDERS = [(*order, 3) for order in itertools.permutations(range(3))]
SHAPES = [(2, 4, 9, 16), (1, 4, 9, 16), (2, 1, 9, 16), (2, 4, 1, 16), (1, 1, 1, 16), (3, 3, 3, 3)]


def in_order(shape, order, **options):
    """A dense tensor of this shape whose dimensions lie in memory in that order, outermost first."""
    return torch.randn([shape[d] for d in order], **options).permute([order.index(d) for d in range(len(shape))])


def layout(x):
    """Strides of the dimensions that have any: a single row has none that matters."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transposed_result_can_be_viewed_as_one_row_a_token(backend):
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)
    with use_backend(backend):
        o = scaled_dot_product_attention(q, q, q)
    expected = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(2, 9, 64)
    torch.testing.assert_close(o.transpose(1, 2).view(2, 9, 64), expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_o_lies_in_memory_as_q_does(backend, order):
    for shape in SHAPES:
        for width in (shape[3], 5):
            q, k = in_order(shape, order), in_order(shape, (0, 1, 2, 3))
            v = in_order((*shape[:3], width), (0, 2, 1, 3))
            like = torch.empty_like(in_order((*shape[:3], width), order))
            with use_backend(backend):
                assert layout(attention(q, k, v)) == layout(like)
                assert layout(attention(q.requires_grad_(), k, v)) == layout(like)
                if backend != "torch":
                    assert layout(attention(q, k, v, return_lse=True)[0]) == layout(like)


@needs_native
@pytest.mark.parametrize("orders", list(itertools.product(ORDERS[:3], ORDERS[1:5:2], ORDERS[::5])), ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
def test_each_gradient_lies_in_memory_as_its_input_does(orders, return_lse):
    shapes = (2, 4, 9, 16), (2, 2, 7, 16), (2, 2, 7, 5)
    inputs = [in_order(shape, order, requires_grad=True) for shape, order in zip(shapes, orders, strict=True)]
    out = attention(*inputs, return_lse=return_lse)
    o = out[0] if return_lse else out
    for x, gradient in zip(inputs, torch.autograd.grad(o.square().sum(), inputs), strict=True):
        assert gradient.stride() == x.stride()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_packed_sequences_keep_their_layout(backend):
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    for q in (torch.randn(4, 10, 16).transpose(0, 1), torch.randn(10, 4, 16)):
        o = attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend)
        assert o.stride() == q.stride()
        if backend == "native":
            q = q.detach().requires_grad_()
            o = attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend)
            assert torch.autograd.grad(o.square().sum(), q)[0].stride() == q.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_dense_where_the_query_is_not(backend):
    """The order of dimensions is kept, gaps and repetitions are not; the features of a row are always adjacent."""
    rows = torch.randn(2, 18, 8, 16)
    queries = {
        "sliced": (rows[:, ::2, ::2].transpose(1, 2), (576, 16, 64, 1)),
        "broadcast over heads": (torch.randn(2, 1, 9, 16).expand(2, 4, 9, 16), (576, 144, 16, 1)),
        "features not innermost": (torch.randn(2, 4, 16, 9).transpose(2, 3), (576, 144, 16, 1)),
    }
    for name, (q, strides) in queries.items():
        with use_backend(backend):
            assert attention(q, q, q).stride() == strides, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_results_lie_as_eager_ones_do(backend, grad):
    """A fake kernel that told another layout would have the graph compiled for that one."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def merged(q, k, v):
        o = scaled_dot_product_attention(q, k, v)
        return o, o.transpose(1, 2).view(o.shape[0], o.shape[2], -1)

    with use_backend(backend):
        for length in (9, 12):
            inputs = [torch.randn(2, length, 4, 16).transpose(1, 2).requires_grad_(grad) for _ in range(3)]
            o, rows = merged(*inputs)
            assert o.stride() == inputs[0].stride()
            assert rows.shape == (2, length, 64)
            if grad and backend == "native":
                for x, gradient in zip(inputs, torch.autograd.grad(rows.square().sum(), inputs), strict=True):
                    assert gradient.stride() == x.stride()


@needs_native
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("width", [16, 5])
def test_the_operators_and_their_fake_kernels_agree_on_strides(order, width):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def both(q, k, v):
        options = arguments({"scale": 0.25})
        o, lse = torch.ops.fastseq.attention_forward.native(q, k, v, *options)
        found = torch.ops.fastseq.attention_backward.native(o, None, q, k, v, o, lse, *options, False)
        return [x.stride() for x in (o, lse, *found[:3])]

    inputs = [in_order((2, 4, 9, n), order) for n in (16, 16, width)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        told = both(*fakes)
    assert told == both(*inputs)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_rule_is_that_of_empty_like(order):
    for shape in SHAPES:
        x = in_order(shape, order)
        assert layout(empty_as(x, shape[-1])) == layout(torch.empty_like(x))
        copy = laid_out_as(x, torch.arange(x.numel()).view(shape))
        assert layout(copy) == layout(x)
        assert torch.equal(copy, torch.arange(x.numel()).view(shape))
