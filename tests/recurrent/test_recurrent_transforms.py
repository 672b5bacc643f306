"""Derivatives of every order, torch.func, torch.compile, torch.export, checkpointing and opcheck of the scan."""

from __future__ import annotations

import pytest
import torch
from recurrent_support import options_of
from support import CELLS, NATIVE, cell_inputs, flat, needs_native
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import ops
from fastseq.recurrent.autograd import Inputs, Walk
from fastseq.recurrent.run import scan

CASES = [(cell, {}) for cell in CELLS] + [
    ("lstm", {"projected": 2}),
    ("lstm_coupled", {"projected": 2}),
    ("gru", {"biases": False}),
]
IDS = [cell + "".join(f"-{k}" for k in kwargs) for cell, kwargs in CASES]


def call(backend, inputs, cell, *, lengths=None, reset=None, reverse=False):
    return tuple(
        t
        for t in scan(Walk(cell, reverse, backend), Inputs(*inputs, *options_of(lengths, reset)), True)
        if t is not None
    )


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize(("cell", "kwargs"), CASES, ids=IDS)
def test_gradcheck_and_gradgradcheck(cell, kwargs, backend):
    for reverse in (False, True):
        inputs = cell_inputs(cell, 3, 2, 2, 3, requires_grad=True, **kwargs)
        options = {"lengths": torch.tensor([3, 1]), "reverse": reverse}
        options["reset"] = torch.tensor([[False, False], [False, True], [True, False]])

        def f(*present, inputs=inputs, options=options):
            given = iter(present)
            return call(backend, [None if t is None else next(given) for t in inputs], cell, **options)

        present = [t for t in inputs if t is not None]
        assert torch.autograd.gradcheck(f, present)
        assert torch.autograd.gradgradcheck(f, present)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_when_one_tensor_is_given_twice(cell, backend):
    inputs = cell_inputs(cell, 3, 2, 3, 3, requires_grad=True)
    if ops.HAS_C[cell]:
        inputs[7] = inputs[6]
    inputs[4] = inputs[3]
    f = sum(t.sin().sum() for t in call(backend, inputs, cell))
    (first,) = torch.autograd.grad(f, inputs[3], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), inputs[3])
    g = sum(t.sin().sum() for t in call("reference", inputs, cell))
    (first_truth,) = torch.autograd.grad(g, inputs[3], create_graph=True)
    torch.testing.assert_close(first, first_truth)
    torch.testing.assert_close(second, torch.autograd.grad(first_truth.square().sum(), inputs[3])[0])


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_func(cell, backend):
    inputs = cell_inputs(cell, 3, 2, 2, 3)
    xs, ws = torch.randn(4, 3, 2, 2).double(), torch.randn(4, *inputs[2].shape).double()

    def f(x, w, name=backend):
        return sum(t.sin().sum() for t in call(name, [x, inputs[1], w, *inputs[3:]], cell))

    vmap, grad = torch.func.vmap, torch.func.grad
    cases = {
        "grad": lambda g: grad(g, (0, 1))(xs[0], ws[0]),
        "vmap": lambda g: vmap(g, (0, None))(xs, ws[0]),
        "vmap over weights": lambda g: vmap(g, (None, 0))(xs[0], ws),
        "per-sample gradient": lambda g: vmap(grad(g, (0, 1)), (0, None))(xs, ws[0]),
        "ensemble gradient": lambda g: vmap(grad(g, (0, 1)))(xs, ws),
        "jacrev": lambda g: torch.func.jacrev(g, 1)(xs[0], ws[0]),
        "jacfwd": lambda g: torch.func.jacfwd(g, 1)(xs[0], ws[0]),
        "hessian": lambda g: torch.func.hessian(g, 1)(xs[0], ws[0]),
        "gradient of a gradient": lambda g: grad(lambda w: grad(g, 1)(xs[0], w).sin().sum())(ws[0]),
    }
    for name, case in cases.items():
        ours, truth = case(f), case(lambda x, w: f(x, w, "reference"))
        torch.testing.assert_close(ours, truth, msg=lambda text, name=name: f"{name}: {text}")


@needs_native
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_transforms_inside_a_compiled_function(name):
    layer = getattr(fastseq.nn, name)(3, 4).double().requires_grad_(False)
    x = torch.randn(5, 2, 3).double()

    def f(x):
        return layer(x)[0].sin().sum()

    for g in (torch.func.grad(f), lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack((x, 2 * x)))):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(g, fullgraph=True, backend="aot_eager")(x), g(x))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_plain_autograd_reaches_through_a_transform(name, backend):
    layer = getattr(fastseq.nn, name)(3, 4).double()
    x = torch.randn(5, 2, 3).double().requires_grad_()
    results = []
    for which in (backend, "reference"):
        with fastseq.use_backend(which):
            inner = torch.func.grad(lambda x: layer(x)[0].sin().sum())(x)
            results.append(torch.autograd.grad(inner.square().sum(), [x, *layer.parameters()], allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_meta_tensors_give_shapes(name):
    layer = getattr(fastseq.nn, name)(3, 4, device="meta")
    assert layer(torch.randn(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)


def test_jacobian_of_every_output():
    inputs = cell_inputs("gru", 3, 2, 2, 3)

    def f(name):
        return torch.func.jacrev(lambda w: call(name, [*inputs[:2], w, *inputs[3:]], "gru")[0])(inputs[2])

    torch.testing.assert_close(f("reference" if ops.NATIVE_MISSING else "native"), f("reference"))


LAYERS = [
    ("RNN", {}),
    ("GRU", {"num_layers": 2, "batch_first": True}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM", {"proj_size": 3}),
    ("LSTM", {"input_forget": True}),
]


@needs_native
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_compiles_whole_and_once_for_every_length(name, kwargs):
    layer = getattr(fastseq.nn, name)(5, 7, **kwargs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for steps in (4, 6, 9, 17):
        x = torch.randn(2, steps, 5) if kwargs.get("batch_first") else torch.randn(steps, 2, 5)
        x.requires_grad_()
        for run, other in ((flat(compiled(x)), flat(layer(x))),):
            for a, b in zip(run, other, strict=True):
                torch.testing.assert_close(a, b)
            leaves = [x, *layer.parameters()]
            pairs = [torch.autograd.grad(out[0].sin().sum(), leaves) for out in (run, other)]
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # one for the first length, one for all others


@needs_native
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_compile_whole(name):
    cell = getattr(fastseq.nn, name)(5, 7)
    torch._dynamo.reset()
    x = torch.randn(3, 5)
    for a, b in zip(flat(torch.compile(cell, fullgraph=True, backend="aot_eager")(x)), flat(cell(x)), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_inductor_runs_the_layer_with_lengths_and_reset():
    layer = fastseq.nn.LSTM(5, 7, batch_first=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x, lengths, reset = torch.randn(3, 6, 5), torch.tensor([6, 0, 4]), torch.rand(3, 6) < 0.3
    mine = flat(compiled(x, lengths=lengths, reset=reset))
    for a, b in zip(mine, flat(layer(x, lengths=lengths, reset=reset)), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_exports_with_a_dynamic_length(name, kwargs):
    layer = getattr(fastseq.nn, name)(5, 7, **kwargs).eval()
    time = 1 if kwargs.get("batch_first") else 0

    def example(steps):
        return torch.randn(2, steps, 5) if time else torch.randn(steps, 2, 5)

    program = torch.export.export(layer, (example(6),), dynamic_shapes=({time: torch.export.Dim("T", min=2, max=64)},))
    x = example(11)
    for a, b in zip(flat(program.module()(x)), flat(layer(x)), strict=True):
        torch.testing.assert_close(a, b)
    (node,) = (node for node in program.graph.nodes if "layers_forward.native" in str(node.target))
    assert node.args[-2:] == (False, False)  # nothing is kept for a backward pass


@needs_native
@pytest.mark.full
def test_an_aotinductor_package_takes_any_batch_and_length(tmp_path):
    layer = fastseq.nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True).eval()
    batch, steps = (torch.export.Dim(name, min=2, max=64) for name in "BT")
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(3, 6, 5),), dynamic_shapes=({0: batch, 1: steps},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        packaged, x = torch._inductor.aoti_load_package(path), torch.randn(4, 11, 5)
        for a, b in zip(flat(packaged(x)), flat(layer(x)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(backend, reentrant):
    layer = fastseq.nn.LSTM(5, 7)
    x = torch.randn(6, 2, 5, requires_grad=True)
    leaves = [x, *layer.parameters()]
    with fastseq.use_backend(backend):
        plain = [g.clone() for g in torch.autograd.grad(layer(x)[0].sin().sum(), leaves)]
        checkpoint(lambda v: layer(v)[0], x, use_reentrant=reentrant).sin().sum().backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


OPCHECKED = [
    pytest.param(*case, dtype, marks=[] if quick and dtype is torch.bfloat16 else pytest.mark.full)
    for dtype in (torch.float32, torch.bfloat16)
    for case in CASES
    for quick in [case in [("gru", {"biases": False}), ("lstm", {"projected": 2}), ("gru_reset_before", {})]]
]


@needs_native
@pytest.mark.parametrize(("cell", "kwargs", "dtype"), OPCHECKED)
def test_opcheck(cell, kwargs, dtype):
    inputs = cell_inputs(cell, 3, 2, 4, 5, dtype=dtype, **kwargs)
    lengths, reset = torch.tensor([3, 2]), torch.rand(3, 2) < 0.3
    mask = torch.rand(2, inputs[2].shape[1]).to(dtype)
    forward, backward = torch.ops.fastseq.scan_forward.native, torch.ops.fastseq.scan_backward.native
    number = ops.NUMBER[cell]
    shares = [torch.randint(0, 2, (3, 2, n)).to(dtype) for n in (inputs[2].shape[1], 5)]
    reset_h, reset_c = (None if s is None else torch.randn_like(s) for s in inputs[6:])
    shares[1:] = [shares[1] if ops.HAS_C[cell] and inputs[5] is None else None]
    every = (reset_h, reset_c, lengths, reset, mask, *shares)
    for options in ((*options_of(), number, False), (*every, number, True)):
        for save, states in ((False, False), (False, True), (True, True)):
            torch.library.opcheck(forward, (*inputs, *options, save, states))
        y, h_n, _, states, tape = forward(*inputs, *options, True, True)
        tail = (y, states, tape, inputs[2], inputs[5], inputs[6], inputs[7], *options)
        torch.library.opcheck(backward, (torch.randn_like(y), torch.randn_like(h_n), None, None, *tail))
        torch.library.opcheck(backward, (None, None, None, None, *tail))
        stateless = (*inputs[:6], None, None, *options, True, True)
        torch.library.opcheck(forward, stateless)
        torch.library.opcheck(backward, (torch.randn_like(y), None, None, None, *tail[:5], None, None, *options))


@needs_native
@pytest.mark.parametrize(("cell", "kwargs", "dtype"), OPCHECKED)
def test_opcheck_of_a_stack(cell, kwargs, dtype):
    x, *weights, h0, c0 = cell_inputs(cell, 3, 2, 4, 5, dtype=dtype, **kwargs)
    one = [w for w in weights if w is not None]
    outputs = one[1].shape[1]
    two = [*one, torch.randn(one[0].shape[0], outputs).to(dtype), *one[1:]]
    lengths, reset = torch.tensor([3, 2]), torch.rand(3, 2) < 0.3
    forward, backward = torch.ops.fastseq.layers_forward.native, torch.ops.fastseq.layers_backward.native
    mask = torch.rand(2, 2, outputs).to(dtype)
    for layers, own, reverse, options in (
        (1, one, True, options_of(lengths, reset)), (2, two, False, options_of()),
        (2, two, False, options_of(mask=mask)),
    ):  # fmt: skip
        h, c = (None if s is None else s.expand(layers, *s.shape) for s in (h0, c0))
        shape = (ops.NUMBER[cell], layers, False, reverse)
        for save, states in ((False, False), (False, True), (True, True)):
            torch.library.opcheck(forward, (x, own, h, c, *options, *shape, save, states))
        y, h_n, _, ys, states, tapes = forward(x, own, h, c, *options, *shape, True, True)
        tail = (x, own, h, c, *options, None, [*ys, y], states, tapes, *shape)
        torch.library.opcheck(backward, (torch.randn_like(y), torch.randn_like(h_n), None, [], *tail, True, True))
        for flags in ((True, False), (False, True), (False, False)):
            torch.library.opcheck(backward, (None, None, None, states[-1:], *tail, *flags))


@needs_native
def test_state_of_a_layer_can_be_detached_and_carried():
    layer = fastseq.nn.LSTM(5, 7)
    x = torch.randn(10, 2, 5)
    whole = layer(x)[0]
    hx, pieces = None, []
    for part in x.split(3):
        y, hx = layer(part, hx)
        hx = tuple(s.detach() for s in hx)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole)


FUNCTIONS = {
    **{name: (name, {}, (3, 2, 4)) for name in ("RNN", "GRU", "LSTM")},
    **{name: (name, {}, (2, 4)) for name in ("RNNCell", "GRUCell", "LSTMCell")},
    "projected": ("LSTM", {"proj_size": 3}, (3, 2, 4)),
    "stack": ("GRU", {"num_layers": 2, "bidirectional": True}, (3, 2, 4)),
}


def output_of(name, kwargs, shape):
    layer = getattr(fastseq.nn, name)(4, 6, **kwargs).double()
    return layer, lambda x: flat(layer(x))[0], torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("name", "kwargs", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functionalize(name, kwargs, shape, grad):
    layer, f, x = output_of(name, kwargs, shape)
    with torch.set_grad_enabled(grad):
        y = torch.func.functionalize(f)(x)
    torch.testing.assert_close(y, f(x))
    if grad:
        for a, b in zip(*(torch.autograd.grad(v.sum(), layer.parameters()) for v in (y, f(x))), strict=True):
            torch.testing.assert_close(a, b)
    gradient = torch.func.functionalize(torch.func.grad(lambda x: f(x).sum()))(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: f(x).sum())(x))


def test_functionalize_of_attention():
    q = torch.randn(1, 2, 5, 4)
    y = torch.func.functionalize(lambda q: fastseq.attention(q, q, q, causal=True))(q)
    torch.testing.assert_close(y, fastseq.attention(q, q, q, causal=True))


@pytest.mark.parametrize(("name", "kwargs", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_vectorized_jacobians(name, kwargs, shape):
    layer, f, x = output_of(name, kwargs, shape)
    want = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), want)

    def of_weights(*weights):
        return flat(torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,)))[0]

    names, weights = zip(*((n, p.detach()) for n, p in layer.named_parameters()), strict=True)
    found = torch.autograd.functional.jacobian(of_weights, weights, vectorize=True)
    for a, b in zip(found, torch.autograd.functional.jacobian(of_weights, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_a_projection_without_influence_has_torchs_gradient(kwargs, which, steps):
    found = []
    for library in (torch.nn, fastseq.nn):
        torch.manual_seed(0)
        layer = library.LSTM(4, 6, proj_size=3, **kwargs)
        flat(layer(torch.randn(steps, 2, 4)))[which].square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for theirs, ours in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
