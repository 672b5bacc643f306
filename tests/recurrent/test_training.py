"""Training of one layer or cell on the CPU past the operators: their bits, declined when a question remains."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import warnings

import pytest
import torch
from support import fast_paths, flat, needs_native
from test_direct import MODES, Dispatch, Functions, leaves_nothing_behind
from test_threads import run_python
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import direct, ops

pytestmark = needs_native


def build(mode, as_cell=False, of=fastseq.nn, features=5, hidden=17, **options):
    if mode == "rnn_relu":
        options["nonlinearity"] = "relu"
    if mode == "gru_reset_before":
        options["reset_after"] = False
    if mode == "lstm_coupled":
        options["input_forget"] = True
    return getattr(of, MODES[mode] + "Cell" * as_cell)(features, hidden, **options)


def call(layer, x, states):
    """Every result, flat."""
    hx = None if not states else states[0] if len(states) == 1 else tuple(states)
    found = layer(x, hx)
    return flat(found) if isinstance(found, tuple) else [found]


def trained(layer, x, states, seed=0, outputs=None):
    """Results, and the gradient of every leaf that wants one, under random gradients of all results, or of some."""
    leaves = [t for t in (x, *states, *layer.parameters()) if t.requires_grad]
    found = call(layer, x, states)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in found]
    chosen = range(len(found)) if outputs is None else outputs
    gradients = torch.autograd.grad([found[i] for i in chosen], leaves, [grads[i] for i in chosen], allow_unused=True)
    return found, gradients


def generally(*args, **kwargs):
    """By the operators."""
    with fast_paths(required=False):
        return trained(*args, **kwargs)


def same(a, b):
    return all(
        (s is None and t is None) or (s.shape == t.shape and s.stride() == t.stride() and torch.equal(s, t))
        for s, t in zip(a, b, strict=True)
    )


def states_of(mode, layer, shape, dtype):
    return [torch.randn(*shape, layer.hidden_size, dtype=dtype, requires_grad=True) for _ in range(1 + ops.HAS_C[mode])]


LAYOUTS = {
    "steps first": ((4, 3, 5), (1, 3), {}),
    "batch first": ((3, 4, 5), (1, 3), {"batch_first": True}),
    "one sequence": ((4, 5), (1,), {"batch_first": True}),
    "no biases": ((4, 1, 5), (1, 1), {"bias": False}),
    "a cell": ((3, 5), (3,), {}),
    "a cell alone": ((5,), (), {"bias": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_operators_bits(mode, layout, dtype):
    shape, batch, options = LAYOUTS[layout]
    layer = build(mode, "cell" in layout, dtype=dtype, **options)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    for states in (states_of(mode, layer, batch, dtype), []):
        for outputs in (None, *([i] for i in range(len(call(layer, x, states))))):
            with fast_paths(required=True):
                found, gradients = trained(layer, x, states, outputs=outputs)
            expected = generally(layer, x, states, outputs=outputs)
            # A cell's h is its y: one gradient of it, where the operator has none of y.
            assert same(found, expected[0])
            assert same(gradients, expected[1])


def nodes_of(found):
    """How many Functions of our own are behind these results."""
    names, seen, left = [], set(), [t.grad_fn for t in found]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            left += [before for before, _ in node.next_functions]
    return names.count("LayersBackward")


STACKS = {
    "two layers": {"num_layers": 2, "batch_first": True},
    "both directions": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "bias": False, "dropout": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("mode", MODES)
def test_layers_of_a_stack_give_the_operators_bits(mode, stack, dtype):
    layer = build(mode, dtype=dtype, **STACKS[stack])
    rows = layer.num_layers * (1 + layer.bidirectional)
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    for states in (states_of(mode, layer, (rows, x.shape[1 - layer.batch_first]), dtype), []):
        for outputs in (None, [0], [1]):
            torch.manual_seed(1)
            with fast_paths(required=True):
                found, gradients = trained(layer, x, states, outputs=outputs)
            assert nodes_of(found) == (layer.num_layers if layer.dropout else 1)
            torch.manual_seed(1)
            expected = generally(layer, x, states, outputs=outputs)
            assert same(found, expected[0])
            assert same(gradients, expected[1])


@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_second_derivatives_of_both_directions(mode):
    layer = build(mode, features=2, hidden=2, dtype=torch.float64, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    states = states_of(mode, layer, (2, 2), torch.float64)
    with fast_paths(required=True):
        call(layer, x, states)
    assert torch.autograd.gradgradcheck(lambda x, *states: tuple(call(layer, x, states)), (x, *states))


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", [mode for mode in MODES if not ops.NOT_IN_TORCH[mode]])
def test_torchs_gradients(mode, as_cell):
    ours, theirs = (build(mode, as_cell, of, dtype=torch.float64) for of in (fastseq.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*(() if as_cell else (6,)), 3, 5, dtype=torch.float64, requires_grad=True)
    states = states_of(mode, ours, (3,) if as_cell else (1, 3), torch.float64)
    for a, b in zip(trained(ours, x, states), trained(theirs, x, states), strict=True):
        for s, t in zip(a, b, strict=True):
            torch.testing.assert_close(s, t)


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_what_is_frozen_has_no_gradient(mode, as_cell, monkeypatch):
    for kept in (["weight_hh"], ["bias_ih", "bias_hh"], ["x"], ["h"], ["weight_ih", "h"]):
        layer = build(mode, as_cell)
        x = torch.randn(*(() if as_cell else (4,)), 3, 5)
        states = [s.detach() for s in states_of(mode, layer, (3,) if as_cell else (1, 3), x.dtype)]
        named = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()} | {"x": x, "h": states[0]}
        for name, tensor in named.items():
            tensor.requires_grad_(name in kept)
        found, gradients = trained(layer, x, states)
        assert "LayersBackward" in {f.grad_fn.name() for f in found}
        assert len(gradients) == len(kept)
        expected = generally(layer, x, states)
        assert same(gradients, expected[1])
    layer.requires_grad_(False)
    assert call(layer, x.detach(), [s.detach() for s in states])[0].grad_fn is None


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_second_derivatives(mode, as_cell):
    layer = build(
        mode, as_cell, features=2, hidden=3, dtype=torch.float64, **({} if as_cell else {"batch_first": True})
    )
    x = torch.randn(2, *(() if as_cell else (3,)), 2, dtype=torch.float64, requires_grad=True)
    states = states_of(mode, layer, (2,) if as_cell else (1, 2), torch.float64)
    assert "LayersBackward" in {f.grad_fn.name() for f in call(layer, x, states)}

    def function(x, w, *states):
        weights = dict(layer.named_parameters())
        weights[next(name for name in weights if "weight_hh" in name)] = w
        hx = states[0] if len(states) == 1 else states
        return tuple(flat(torch.func.functional_call(layer, weights, (x, hx))))

    w = next(p for name, p in layer.named_parameters() if "weight_hh" in name).detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x, w, *states))


def test_a_graph_is_walked_twice_and_guarded():
    layer, x = build("lstm"), torch.randn(4, 3, 5, requires_grad=True)
    y = layer(x)[0]
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]  # a gradient of stride 0
    assert torch.equal(first, torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0])
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)[0]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_saved_tensors_pass_their_hooks_and_checkpoints_compute_anew():
    layer, x = build("gru"), torch.randn(4, 3, 5, requires_grad=True)
    want = trained(layer, x, [])[1]
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert same(trained(layer, x, [])[1], want)
    assert packed
    for reentrant in (False, True):
        y, _ = checkpoint(layer, x, use_reentrant=reentrant)
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, torch.autograd.grad(layer(x)[0].sum(), x)[0])


def test_questions_lead_to_the_operator(monkeypatch):
    layer, x = build("lstm"), torch.randn(4, 3, 5, requires_grad=True)
    want = trained(layer, x, [])
    taken, native = [], direct.layers_forward
    monkeypatch.setattr(direct, "layers_forward", lambda *args: (taken.append(args), native(*args))[1])
    for mode in (Functions(), Dispatch(), torch.profiler.profile()):
        with mode:
            found = layer(x)[0]
        torch.testing.assert_close(found, want[0][0])
    assert not taken
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype is torch.bfloat16
    gradient = torch.func.grad(lambda x: layer(x)[0].sum())(x.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x)[0].sum(), x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(traced(x.flip(0))[0], layer(x.flip(0))[0])
    with fastseq.use_backend("reference"):
        taken.clear()
        layer(x)
        assert not taken
    layer(x)
    assert taken
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_a_question_in_the_walk_back_is_answered_too():
    layer, x = build("gru", batch_first=True), torch.randn(3, 4, 5, requires_grad=True)
    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x)[0].sum(), leaves)
    y = layer(x)[0]
    with torch.profiler.profile() as profile:
        found = torch.autograd.grad(y.sum(), leaves)
    assert "fastseq::layers_backward" in {event.key for event in profile.key_averages()}
    assert same(found, want)


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_gradients_of_many_outputs_at_once(mode, as_cell, capfd):
    layer = build(mode, as_cell, dtype=torch.float64)
    x = torch.randn(*(() if as_cell else (4,)), 3, 5, dtype=torch.float64, requires_grad=True)
    y, leaves = call(layer, x, [])[0], [x, *layer.parameters()]
    many = torch.randn(6, *y.shape, dtype=torch.float64)
    each = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in many]
    found = [torch.autograd.grad(y, leaves, many, retain_graph=True, is_grads_batched=True)]
    found.append(torch.func.vmap(lambda d: torch.autograd.grad(y, leaves, d, retain_graph=True))(many))
    for gradients in found:
        for n, gradient in enumerate(gradients):
            torch.testing.assert_close(gradient, torch.stack([e[n] for e in each]))
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_compiled_autograd(mode, as_cell):
    layer = build(mode, as_cell, dtype=torch.float64)
    x = torch.randn(*(() if as_cell else (4,)), 3, 5, dtype=torch.float64, requires_grad=True)
    states = states_of(mode, layer, (3,) if as_cell else (1, 3), torch.float64)
    leaves = [x, *states, *layer.parameters()]
    want = torch.autograd.grad(sum(y.sin().sum() for y in call(layer, x, states)), leaves)
    loss = sum(y.sin().sum() for y in call(layer, x, states))
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("as_cell", [False, True])
def test_bad_arguments_have_the_general_ways_messages(as_cell):
    layer = build("lstm", as_cell)
    x = torch.randn(*(() if as_cell else (4,)), 3, 5, requires_grad=True)
    good = torch.randn(*(() if as_cell else (1,)), 3, 17)
    for h, c in ((good[..., :4], good), (good, good[..., :2, :]), (good.double(), good), (good, None)):
        with pytest.raises(fastseq.checks.ArgumentError, match=r"h_0|c_0"):
            layer(x, (h, c))
    for half in ((good, None), (None, good)):
        with torch.no_grad(), pytest.raises(fastseq.checks.ArgumentError, match="must be a pair"):
            layer(x, half)
    with pytest.raises(fastseq.checks.ArgumentError, match="features"):
        layer(x[..., :4])
    with pytest.raises(fastseq.checks.ArgumentError, match="float64"):
        layer(x.double())
    layer.requires_grad_(False)
    with pytest.raises(TypeError, match="h_0 must be a Tensor"):
        layer(x.detach(), ([0.0], [0.0]))
    cell = build("rnn_tanh", True)
    cell.bias_hh = None
    with pytest.raises(fastseq.checks.ArgumentError, match="come together"):
        cell(torch.randn(3, 5))


def test_it_declines_what_is_not_fit():
    x, w_ih, w_hh, b = torch.randn(4, 3, 5), torch.randn(68, 5), torch.randn(68, 17), torch.randn(68)
    h = torch.randn(1, 3, 17)
    good = [x, h, h, "lstm", "layer", 1, False, (w_ih, w_hh, b, b)]
    assert direct.layers_forward(*good) is None, "gradients are on"
    with torch.no_grad():
        assert direct.layers_forward(*good) is not None
        for i, bad in (
            (0, None), (0, x[0, 0]), (0, x[:0]), (0, x.double()), (1, None), (1, h[0]), (1, h.expand(2, 3, 17)),
            (2, h[..., 1:]), (3, "elman"), (3, "gru"), (3, 5), (4, None), (4, "cell"), (4, "scan"), (4, "columns"),
            (5, 2), (5, 0), (6, True), (7, None), (7, (w_ih[1:], w_hh, b, b)), (7, (w_ih, w_hh[0], b, b)),
            (7, (w_ih, w_hh[:0], b, b)), (7, (w_ih, w_hh, b[1:], b)), (7, (w_ih, w_hh, b, b.half())),
            (7, (w_ih, w_hh, b, None)), (7, (w_ih,)), (7, ()), (7, (w_ih, w_hh, b, b) * 20),
        ):  # fmt: skip
            assert direct.layers_forward(*good[:i], bad, *good[i + 1 :]) is None, (i, bad)
        assert direct.layers_forward(*good[:-1]) is None
        need = (True,) * 7
        y, h_n, c_n, states, tape = direct.layers_forward(*good)
        walk = [*good, need, y, h_n, c_n, (y, states, tape)]
        assert direct.layers_backward(*walk) is not None
        for i, bad in (
            (0, None), (3, 3), (4, "scan"), (4, 3), (5, 2), (6, True), (7, None), (7, (w_ih, w_hh[1:], b, b)),
            (8, None), (8, need[1:]), (8, (*need, True)), (9, y[1:]), (9, y[0, 0]), (10, h_n[0]), (12, ()), (12, (y,)),
            (12, (y, states)), (12, (y, None, tape)), (12, (y, states, tape[..., 1:])), (12, (y, states, tape, tape)),
        ):  # fmt: skip
            assert direct.layers_backward(*walk[:i], bad, *walk[i + 1 :]) is None, (i, bad)
        assert direct.layers_backward(*walk[1:]) is None


def test_nothing_is_left_behind():
    layer, x = build("lstm"), torch.randn(4, 3, 5, requires_grad=True)
    cell = build("gru", True)

    def rounds():
        for _ in range(200):
            layer(x)[0].sum().backward()
            cell(x[0]).sum().backward()
            layer(x)  # never walked back

    leaves_nothing_behind(rounds, [x, layer, cell, *layer.parameters(), *cell.parameters()])


def test_threads_train_side_by_side():
    layers = [build("gru", features=64, hidden=64) for _ in range(4)]
    x = torch.randn(40, 8, 64)
    want = [torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())) for layer in layers]
    wrong: list[str] = []

    def call(layer, expected):
        for _ in range(20):
            if not same(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())), expected):
                wrong.append("differs")

    threads = [threading.Thread(target=call, args=pair) for pair in zip(layers, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradient(layer, x):
    layer.weight_hh_l0.grad = None
    layer(x)[0].sum().backward()
    return layer.weight_hh_l0.grad


def test_large_results_are_tensors_as_all_others(tmp_path):
    layer, x = build("lstm", features=64, hidden=128), torch.randn(200, 4, 64)
    with torch.no_grad():
        y = layer(x)[0]
    want = y.clone()
    torch.save(y, tmp_path / "y.pt")
    for twin in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.load(tmp_path / "y.pt"), y.numpy().copy()):
        assert torch.equal(torch.as_tensor(twin), want)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    view, y = y[:3], None
    gc.collect()
    with torch.no_grad():
        layer(x.neg())
    assert torch.equal(view, want[:3]), "a view keeps the whole"
    shared = want.clone().copy_(want)
    with torch.no_grad():
        shared = layer(x)[0].share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_trains_too():
    # In a process of its own: where autograd has threads already, torch refuses to train in a fork.
    run_python(
        """
        import os, torch, fastseq

        layer, x = fastseq.nn.GRU(64, 128), torch.randn(2, 3, 64)

        def gradient():
            layer.weight_hh_l0.grad = None
            layer(x)[0].sum().backward()
            return layer.weight_hh_l0.grad

        want = gradient().clone()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as in a DataLoader's workers: a fork takes no other thread of OpenMP's along
            os._exit(0 if torch.equal(gradient(), want) else 1)
        for _ in range(5):
            assert torch.equal(gradient(), want)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def masked_rollout(cell, steps=3):
    """The gradients of a rollout that clears the states of finished episodes in place."""
    torch.manual_seed(3)
    x, h = torch.randn(steps, 3, 5, dtype=torch.float64, requires_grad=True), None
    loss = torch.zeros((), dtype=torch.float64)
    for step in x:
        h = cell(step, h)
        states = h if isinstance(h, tuple) else (h,)
        loss = loss + sum(s.clone().sin().sum() for s in states)
        for s in states:
            s[1] = 0
    return torch.autograd.grad(loss, [x, *cell.parameters()])


@pytest.mark.parametrize("way", ["direct", "general", "compiled"])
@pytest.mark.parametrize("mode", ["gru", "lstm"])
def test_a_cells_state_may_be_masked_in_place(mode, way, monkeypatch):
    ours, theirs = (build(mode, True, of, dtype=torch.float64) for of in (fastseq.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    want = masked_rollout(theirs)
    if way == "general":
        monkeypatch.setattr(direct, "layers_forward", direct._decline)
    found = masked_rollout(torch.compile(ours, backend="aot_eager") if way == "compiled" else ours)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_what_the_backward_pass_does_not_read_may_change_in_place(mode, as_cell, general, monkeypatch):
    if general:
        monkeypatch.setattr(direct, "layers_forward", direct._decline)
    layer, x = build(mode, as_cell), torch.randn(*(() if as_cell else (4,)), 3, 5)

    def gradients(changed):
        y, leaves = call(layer, x, [])[0], [p for p in layer.parameters() if p.requires_grad]
        with torch.no_grad():
            for t in changed:
                t.mul_(1)
        return torch.autograd.grad(y.sum(), leaves)

    named = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}
    want = gradients([])
    assert same(gradients([named["bias_ih"], named["bias_hh"], named["weight_ih"]]), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients([x])
    named["weight_ih"].requires_grad_(False)
    want = gradients([])
    assert same(gradients([x]), want)


def test_a_symbolic_trace_and_eager_training_follow_each_other():
    layer, x = build("lstm"), torch.randn(4, 3, 5)

    def gradients(x, lengths=None):
        return torch.autograd.grad(layer(x, lengths=lengths)[0].sin().sum(), list(layer.parameters()))

    lengths = torch.tensor([4, 2, 3])
    want, with_lengths = gradients(x), gradients(x, lengths)
    for mode in ("symbolic", "fake", "real"):
        trace = make_fx(lambda x: gradients(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        for a, b in zip((*trace(x), *gradients(x), *gradients(x, lengths)), (*want, *want, *with_lengths), strict=True):
            torch.testing.assert_close(a, b)


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return None


@pytest.mark.parametrize("as_cell", [False, True])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_without_a_gradient_of_the_results_the_inputs_have_none(mode, as_cell):
    layer, x = build(mode, as_cell), torch.randn(*(() if as_cell else (4,)), 3, 5, requires_grad=True)
    Nothing.apply(call(layer, x, [])[0]).sum().backward()
    assert all(t.grad is None for t in (x, *layer.parameters()))


@pytest.mark.parametrize("mode", ["rnn_tanh", "lstm"])
def test_gradients_of_both_biases_are_tensors_of_their_own(mode):
    layer, x = build(mode, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    biases, y = [layer.bias_ih_l0, layer.bias_hh_l0], layer(x)[0]
    many = torch.randn(2, *y.shape, dtype=torch.float64)
    for found in (
        torch.autograd.grad(y, biases, many, is_grads_batched=True),
        torch.autograd.grad(layer(x)[0].sum(), biases),
    ):
        assert found[0].data_ptr() != found[1].data_ptr()


def test_a_weight_that_no_gradient_reads_may_be_freed():
    layer, x = build("gru"), torch.randn(4, 3, 5)
    want = torch.autograd.grad(layer(x)[0].sum(), [layer.weight_hh_l0])[0]
    y = layer(x)[0]
    layer.weight_ih_l0.untyped_storage().resize_(0)
    assert torch.equal(torch.autograd.grad(y.sum(), [layer.weight_hh_l0])[0], want)


@pytest.mark.parametrize("frozen", ["", "_reverse"])
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_what_one_direction_reads_may_not_change_in_place(mode, frozen):
    layer = build(mode, bidirectional=True)
    x = torch.randn(4, 3, 5)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.endswith("l0" + frozen))
    y = layer(x)[0]
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("general", [False, True])
def test_a_second_derivative_refuses_what_was_changed_in_place(general, monkeypatch):
    if general:
        monkeypatch.setattr(direct, "layers_forward", direct._decline)
    layer, x = build("lstm", dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)[0]
    with torch.no_grad():
        layer.bias_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="second derivative needs was modified"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
