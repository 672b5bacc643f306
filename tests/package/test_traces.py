"""torch.jit.trace records what can be saved, loaded and differentiated, as it does of torch.nn's layers."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from support import flat
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
LAYERS = {
    "RNN": ("RNN", {}),
    "GRU": ("GRU", {"batch_first": True}),
    "LSTM": ("LSTM", {}),
    "GRU stack": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "LSTM projected": ("LSTM", {"proj_size": 3}),
    "RNNCell": ("RNNCell", {}),
    "GRUCell": ("GRUCell", {}),
    "LSTMCell": ("LSTMCell", {}),
}


def inputs(name: str, steps: int) -> Tensor:
    return torch.randn(steps, 4) if name.endswith("Cell") else torch.randn(steps, 3, 4)


def reloaded(trace: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_same(found: object, expected: object) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("name", "kwargs"), LAYERS.values(), ids=LAYERS)
def test_a_trace_is_saved_and_runs_on_other_lengths(name, kwargs, grad):
    layer = getattr(fastseq.nn, name)(4, 6, **kwargs)
    with torch.set_grad_enabled(grad):
        trace = reloaded(torch.jit.trace(layer, inputs(name, 5)))
    x = inputs(name, 9)
    assert_same(trace(x), layer(x))


@pytest.mark.parametrize(("name", "kwargs"), LAYERS.values(), ids=LAYERS)
def test_a_loaded_trace_can_be_trained(name, kwargs):
    layer = getattr(fastseq.nn, name)(4, 6, **kwargs)
    trace, x = reloaded(torch.jit.trace(layer, inputs(name, 5))), inputs(name, 5)
    for module in (trace, layer):
        flat(module(x))[0].square().sum().backward()
    for ours, theirs in zip(trace.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_what_torch_does_not_have_is_traced_as_an_operator(grad):
    layer = fastseq.nn.GRU(4, 6, reset_after=False)
    with torch.set_grad_enabled(grad), pytest.warns(torch.jit.TracerWarning, match="import fastseq where it is loaded"):
        trace = reloaded(torch.jit.trace(layer, torch.randn(5, 3, 4)))
    x = torch.randn(9, 3, 4)
    assert_same(trace(x), layer(x))


LOAD_WITHOUT_FASTSEQ = """
import sys, torch
sys.modules["fastseq"] = None
for file in sys.argv[1:]:
    trace, inputs, expected = torch.load(file, weights_only=False)
    y = torch.jit.load(trace)(*inputs)
    torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, expected)
    print("same")
"""


def test_a_trace_runs_where_fastseq_is_not_installed(tmp_path):
    models = {
        **{name: getattr(fastseq.nn, name)(4, 6, num_layers=2, bidirectional=True) for name in ("RNN", "GRU", "LSTM")},
        "LSTMCell": fastseq.nn.LSTMCell(4, 6),
        "MultiheadAttention": fastseq.nn.MultiheadAttention(4, 2),
    }
    files = []
    for name, layer in models.items():
        repeated = 3 if name == "MultiheadAttention" else 1
        trace = torch.jit.trace(layer.eval(), repeated * (inputs(name, 5),))
        torch.jit.save(trace, tmp_path / name)
        x = repeated * (inputs(name, 9),)
        files.append(str(tmp_path / f"{name}.inputs"))
        torch.save((str(tmp_path / name), x, layer(*x)[0].detach()), files[-1])
    done = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_FASTSEQ, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == len(models) * ["same"]


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LSTMCell", "MultiheadAttention"])
def test_scripting_says_in_one_line_what_to_do(name):
    layer = getattr(fastseq.nn, name)(4, 2)
    for model in (layer, nn.Sequential(nn.Linear(4, 4), layer)):
        with pytest.raises(RuntimeError, match=f"fastseq's {name}: use torch.jit.trace or .*unpatch") as e:
            torch.jit.script(model)
        assert "\n" not in str(e.value)


def test_an_unpatched_model_can_be_scripted():
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 6))
    fastseq.patch(model)
    with pytest.raises(RuntimeError, match="unpatch"):
        torch.jit.script(model)
    fastseq.unpatch(model)
    x = torch.randn(5, 3, 4)
    assert_same(torch.jit.script(model)(x), model(x))


class Packed(nn.Module):
    """A model that packs, runs a layer, and pads again."""

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layer = getattr(fastseq.nn, name)(4, 6, **kwargs)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple:
        y, last = self.layer(pack_padded_sequence(self.first(x), lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0] * 2, last


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_model_that_packs_can_be_traced(name):
    model = Packed(name, num_layers=2, bidirectional=True)
    trace = reloaded(torch.jit.trace(model, (torch.randn(5, 2, 4), torch.tensor([3, 5]))))
    x, lengths = torch.randn(9, 3, 4), torch.tensor([2, 9, 4])
    assert_same(trace(x, lengths), model(x, lengths))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_model_that_packs_can_be_compiled(name, grad):
    torch._dynamo.reset()
    model = Packed(name, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 4), torch.tensor([2, 6, 4])
    with torch.set_grad_enabled(grad):
        found = torch.compile(model, backend="aot_eager")(x, lengths)
        expected = model(x, lengths)
        assert_same(found, expected)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        alone = torch.compile(model.layer, backend="aot_eager")(packed)[0]
        assert_same(alone.data, model.layer(packed)[0].data)
    if grad:
        ours, theirs = (torch.autograd.grad(y[0].sum(), model.parameters()) for y in (found, expected))
        assert_same(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [True, False])
def test_attention_can_be_traced(grad):
    layer, x = fastseq.nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    q = torch.randn(1, 2, 5, 4, requires_grad=grad)

    def attend(q: Tensor) -> Tensor:
        return fastseq.scaled_dot_product_attention(q, q, q)

    with torch.set_grad_enabled(grad):
        of_layer, of_function = torch.jit.trace(layer, (x, x, x)), torch.jit.trace(attend, (q,))
    x = torch.randn(9, 3, 8)
    assert_same(reloaded(of_layer)(x, x, x), layer(x, x, x))
    assert_same(reloaded(of_function)(q), attend(q))


TRACE_A_CLOSURE = """
import torch, fastseq
for name, shape in {"GRU": (5, 2, 4), "LSTMCell": (2, 4), "MultiheadAttention": (5, 2, 4)}.items():
    layer = getattr(fastseq.nn, name)(4, 2 if name == "MultiheadAttention" else 6)
    inputs = (3 if name == "MultiheadAttention" else 1) * (torch.randn(shape),)
    with torch.no_grad():
        try:
            torch.jit.trace(lambda *x: layer(*x)[0], inputs)
        except RuntimeError as error:
            assert "Cannot insert a Tensor that requires grad" in str(error)
            print(name, "raised")
"""


def test_tracing_a_closure_raises_torchs_error_and_the_process_lives():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACE_A_CLOSURE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["GRU raised", "LSTMCell raised", "MultiheadAttention raised"]
