"""Models with our layers as ONNX: standard operators, any T and B, results as in eager mode, in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support import flat
from torch import Tensor, nn
from torch.export import Dim

import fastseq

onnx = pytest.importorskip("onnx", reason="the exporter needs onnx")
pytest.importorskip("onnxscript", reason="the exporter needs onnxscript")
ort = pytest.importorskip("onnxruntime", reason="runs the exported model")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
ANY = Dim.DYNAMIC


class Recurrent(nn.Module):
    """A layer whose options are inputs of the model."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None, reset: Tensor | None = None) -> Any:
        return self.layer(x, hx, lengths=lengths, reset=reset, **self.options)


class Masked(nn.Module):
    """A layer by its function, which takes a mask of its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state_mask: Tensor, lengths: Tensor | None = None) -> Any:
        batch_first = self.layer.batch_first
        return self.layer._function(x, None, lengths=lengths, state_mask=state_mask, batch_first=batch_first)


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def exported(model: Any, inputs: tuple, shapes: Any, **kwargs: Any) -> Any:
    """The checked model, as ONNX's own classes have it; of a module, or of a program of torch.export's."""
    program = torch.onnx.export(
        model.eval() if isinstance(model, nn.Module) else model, inputs, dynamo=True, dynamic_shapes=shapes,
        verbose=False, **{"opset_version": 20, **kwargs},
    )  # fmt: skip
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    return proto


def operators(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def run(proto: Any, *inputs: Any) -> list[Tensor]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, flat(inputs), strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def assert_equal(proto: Any, model: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        expected = flat(model(*inputs))
    found = run(proto, *(x for x in inputs if x is not None))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


LAYERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "RNN": ("RNN", {}, "RNN", {}),
    "RNN relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True}, "RNN", {"activations": [b"Relu", b"Relu"]}),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True}, "GRU", {"linear_before_reset": 1}),
    "GRU reset before": ("GRU", {"reset_after": False, "batch_first": True}, "GRU", {}),
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}, "LSTM", {}),
    "LSTM coupled": ("LSTM", {"input_forget": True, "bias": False}, "LSTM", {"input_forget": 1}),
    "LSTM projected": ("LSTM", {"proj_size": 3, "bidirectional": True}, "LSTM", {}),
}
given = pytest.mark.parametrize(("name", "kwargs", "operator", "attributes"), LAYERS.values(), ids=LAYERS)


def states(layer: Any, batch: int) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(rows, batch, layer.hidden_size)) if layer.mode == "LSTM" else h


def steps(layer: Any, steps: int, batch: int) -> Tensor:
    return torch.randn(*((batch, steps) if layer.batch_first else (steps, batch)), 4)


@given
def test_a_layer_is_one_standard_node_that_takes_any_length_and_batch(name, kwargs, operator, attributes):
    layer = getattr(fastseq.nn, name)(4, 6, **kwargs)
    proto = exported(layer, (steps(layer, 5, 3),), {"input": {0: ANY, 1: ANY}})
    nodes = [node for node in proto.graph.node if node.op_type == operator]
    assert len(nodes) == layer.num_layers
    assert set(operators(proto)) <= {operator, "Transpose", "Reshape", "Shape", "Concat", "MatMul", "Unsqueeze"}
    found = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    direction = b"bidirectional" if layer.bidirectional else b"forward"
    assert {k: v for k, v in found.items() if k not in ("hidden_size", "direction")} == attributes
    assert found["direction"] == direction
    for T, B in ((5, 3), (9, 2), (1, 1)):
        assert_equal(proto, layer, steps(layer, T, B))


@given
def test_lengths_and_initial_states_are_inputs_of_the_node(name, kwargs, operator, attributes):
    model = Recurrent(getattr(fastseq.nn, name)(4, 6, **kwargs))
    layer = model.layer
    state = {1: ANY}
    example = steps(layer, 5, 3), states(layer, 3), torch.tensor([5, 2, 4])
    shapes = {"x": {0: ANY, 1: ANY}, "hx": (state, state) if operator == "LSTM" else state, "lengths": {0: ANY}}
    proto = exported(model, example, shapes)
    node = next(node for node in proto.graph.node if node.op_type == operator)
    assert node.input[4]
    for T, lengths in ((5, [5, 2, 4]), (7, [7, 0]), (1, [1, 1, 0, 1])):
        x = steps(layer, T, len(lengths))
        for b, length in enumerate(lengths):  # the padding has no influence
            (x[b, length:] if layer.batch_first else x[length:, b]).fill_(float("nan"))
        assert_equal(proto, model, x, states(layer, len(lengths)), torch.tensor(lengths))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_cell_takes_any_batch(name):
    cell = getattr(fastseq.nn, name)(4, 6)

    def state(batch: int) -> Any:
        h, c = torch.randn(2, batch, 6)
        return (h, c) if name == "LSTMCell" else h

    axes = {0: ANY}
    proto = exported(cell, (torch.randn(3, 4), state(3)), (axes, (axes, axes) if name == "LSTMCell" else axes))
    assert name.removesuffix("Cell") in operators(proto)
    assert_equal(proto, cell, torch.randn(7, 4), state(7))


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_resets_are_a_scan(name):
    model = Recurrent(getattr(fastseq.nn, name)(4, 6, bidirectional=True))
    axes = {0: ANY, 1: ANY}
    inputs = torch.randn(5, 3, 4), None, torch.tensor([5, 2, 0]), torch.rand(5, 3) < 0.4
    proto = exported(model, inputs, {"x": axes, "hx": None, "lengths": {0: ANY}, "reset": axes})
    assert operators(proto).count("Scan") == 2
    assert_equal(proto, model, *inputs)
    assert_equal(proto, model, torch.randn(9, 2, 4), None, torch.tensor([4, 9]), torch.rand(9, 2) < 0.4)


@pytest.mark.parametrize("kind", ["GRU", "GRU reset before", "LSTM projected"])
def test_a_mask_of_states_is_a_scan(kind):
    name, kwargs, *_ = LAYERS[kind]
    model = Masked(getattr(fastseq.nn, name)(4, 6, **kwargs))
    layer = model.layer

    def inputs(T: int, lengths: list[int]) -> tuple[Tensor, ...]:
        h = states(layer, len(lengths))
        mask = torch.where(torch.rand_like(flat(h)[0]) < 0.4, 0.0, 1.5)
        return steps(layer, T, len(lengths)), mask, torch.tensor(lengths)

    proto = exported(model, inputs(5, [5, 2, 4]), {"x": {0: ANY, 1: ANY}, "state_mask": {1: ANY}, "lengths": {0: ANY}})
    assert operators(proto).count("Scan") == layer.num_layers * (1 + layer.bidirectional)
    for T, lengths in ((5, [5, 2, 4]), (9, [4, 9]), (1, [1, 0, 1, 1])):
        assert_equal(proto, model, *inputs(T, lengths))


@pytest.mark.parametrize(("name", "norm"), [("LSTM", "layer"), ("GRU", "joint")])
def test_a_normalised_layer_is_a_scan(name, norm):
    layer = getattr(fastseq.nn, name)(4, 6, norm=norm, bidirectional=True)
    proto = exported(layer, (torch.randn(5, 3, 4),), {"input": {0: ANY, 1: ANY}})
    assert operators(proto).count("Scan") == 2
    assert_equal(proto, layer, torch.randn(9, 2, 4))


def test_dropouts_of_the_recurrence_leave_no_trace_in_evaluation():
    plain = fastseq.nn.GRU(4, 6, 2, bidirectional=True)
    layer = fastseq.nn.GRU(4, 6, 2, bidirectional=True, recurrent_dropout=0.5, weight_dropout=0.5)
    layer.load_state_dict(plain.state_dict())
    proto = exported(layer, (torch.randn(5, 3, 4),), {"input": {0: ANY, 1: ANY}})
    assert operators(proto).count("GRU") == 2
    assert not {"Dropout", "Bernoulli", "RandomUniform"} & set(operators(proto))
    assert_equal(proto, plain, torch.randn(9, 2, 4))


def test_every_c_is_returned_by_a_scan():
    model = Recurrent(fastseq.nn.LSTM(4, 6, batch_first=True, input_forget=True, proj_size=2), return_all_states=True)
    proto = exported(model, (torch.randn(3, 5, 4),), {"x": {0: ANY, 1: ANY}})
    assert_equal(proto, model, torch.randn(2, 9, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_layers_compute_in_float32(dtype):
    layer = fastseq.nn.LSTM(4, 6).to(dtype)
    model = Function(lambda x: layer(x.to(dtype))[0].float())
    model.layer = layer
    proto = exported(model, (torch.randn(5, 3, 4),), None)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(run(proto, x)[0], model(x), rtol=2e-2, atol=2e-2)


def test_any_length_and_batch_give_what_torchs_layer_computes():
    theirs, ours = nn.LSTM(4, 6), fastseq.nn.LSTM(4, 6)
    ours.load_state_dict(theirs.state_dict())
    proto = exported(ours, (torch.randn(5, 3, 4),), {"input": {0: ANY, 1: ANY}})
    assert_equal(proto, theirs, torch.randn(9, 2, 4))


FUNCTIONS = {
    "plain": lambda q, k, v: fastseq.attention(q, k, v),
    "causal": lambda q, k, v: fastseq.attention(q, k, v, causal=True),
    "window and softcap": lambda q, k, v: fastseq.attention(q, k, v, causal=True, window=(2, 0), softcap=5.0),
    "sinks": lambda q, k, v: fastseq.attention(q, k, v, sinks=torch.ones(4), return_lse=True),
    "slopes": lambda q, k, v: fastseq.attention(q, k, v, alibi_slopes=torch.tensor([0.5, 0.2, 0.1, 0.05])),
    "sdpa": lambda q, k, v: fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
}


def heads(batch: int, queries: int, keys: int, shared: int = 2) -> tuple[Tensor, ...]:
    k = torch.randn(batch, shared, keys, 8)
    return torch.randn(batch, 4, queries, 8), k, torch.randn_like(k)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_attention_takes_any_length_and_batch(function):
    model, any_heads = Function(function), {0: ANY, 2: ANY}
    proto = exported(model, heads(2, 5, 7), {"inputs": (any_heads,) * 3})
    for sizes in ((2, 5, 7), (3, 4, 9), (1, 1, 1), (2, 7, 4)):  # in the last, some rows see no key
        assert_equal(proto, model, *heads(*sizes))


def test_attention_is_one_node_from_opset_23_on():
    model, any_heads = Function(FUNCTIONS["sdpa"]), {0: ANY, 2: ANY}
    proto = exported(model, heads(2, 5, 7), {"inputs": (any_heads,) * 3}, opset_version=23)
    assert operators(proto) == ["Attention"]
    assert_equal(proto, model, *heads(3, 4, 9))


def test_lengths_of_attention_are_inputs():
    model = Function(lambda q, k, v, n: fastseq.attention(q, k, v, causal=True, lengths_k=n))
    any_heads = {0: ANY, 2: ANY}
    proto = exported(model, (*heads(2, 5, 7), torch.tensor([7, 3])), {"inputs": (*(any_heads,) * 3, {0: ANY})})
    assert_equal(proto, model, *heads(3, 4, 9), torch.tensor([9, 0, 4]))


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_layer_of_attention_takes_any_length_and_batch(need_weights):
    layer = fastseq.nn.MultiheadAttention(16, 4, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return self.layer(x, x, x, key_padding_mask=padding, need_weights=need_weights)

    def inputs(batch: int, steps: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, steps, 16), torch.arange(steps) >= torch.randint(0, steps + 1, (batch, 1))

    axes = {0: ANY, 1: ANY}
    model = Model()
    proto = exported(model, inputs(2, 5), {"x": axes, "padding": axes}, opset_version=23)
    for sizes in ((2, 5), (4, 9), (1, 3)):
        assert_equal(proto, model, *inputs(*sizes))


def test_a_patched_model_is_exported():
    model = nn.ModuleList([nn.Linear(4, 4), nn.GRU(4, 6), nn.LSTM(6, 5)])
    fastseq.patch(model)
    chain = Function(lambda x: model[2](model[1](model[0](x))[0])[0])
    chain.own = model
    proto = exported(chain, (torch.randn(5, 3, 4),), {"inputs": ({0: ANY, 1: ANY},)})
    assert {"GRU", "LSTM"} <= set(operators(proto))
    assert_equal(proto, chain, torch.randn(2, 6, 4))


class EveryOption(nn.Module):
    def forward(self, q, k, v, bias, mask, lengths, prefix, sinks, slopes):
        return fastseq.attention(
            q, k, v, bias=bias, mask=mask, causal=True, window=(3, -1), softcap=4.0, sinks=sinks, alibi_slopes=slopes,
            lengths_q=lengths, lengths_k=lengths, prefix_lengths=prefix, return_lse=True,
        )  # fmt: skip


def every_option(batch: int, steps: int) -> tuple[Tensor, ...]:
    bias = torch.randn(batch, 1, 1, steps).masked_fill(torch.rand(batch, 1, 1, steps) < 0.2, float("-inf"))
    mask = torch.rand(steps, steps) < 0.7
    lengths, prefix = (torch.randint(0, steps + 1, (batch,)) for _ in range(2))
    return *heads(batch, steps, steps), bias, mask, lengths, prefix, torch.randn(4), torch.rand(4)


def translated(model: nn.Module, inputs: tuple, shapes: Any) -> Any:
    from fastseq.integrations.onnx import translations

    program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
    assert any(str(node.target).startswith("fastseq") for node in program.graph.nodes)
    return exported(program, inputs, None, custom_translation_table=translations())


@pytest.mark.parametrize(
    ("name", "kwargs", "operator", "attributes"),
    [LAYERS[name] for name in ("RNN relu", "GRU", "LSTM", "LSTM projected")],
)
def test_a_program_that_was_exported_before_is_translated(name, kwargs, operator, attributes):
    model = Recurrent(getattr(fastseq.nn, name)(4, 6, **kwargs))
    layer, state = model.layer, {1: ANY}
    shapes = {"x": {0: ANY, 1: ANY}, "hx": (state, state) if operator == "LSTM" else state, "lengths": {0: ANY}}
    inputs = steps(layer, 5, 3), states(layer, 3), torch.tensor([5, 2, 4])
    proto = translated(model, inputs, shapes)
    assert operators(proto).count(operator) == layer.num_layers
    assert_equal(proto, model, *inputs)
    assert_equal(proto, model, steps(layer, 9, 2), states(layer, 2), torch.tensor([9, 0]))


def test_a_program_with_every_option_of_attention_is_translated():
    model, free = EveryOption(), Dim.AUTO
    shapes = (*({0: free, 2: free},) * 3, {0: free, 3: free}, {0: free, 1: free}, {0: free}, {0: free}, None, None)
    proto = translated(model, every_option(2, 5), shapes)
    for sizes in ((2, 5), (3, 9), (1, 2)):
        assert_equal(proto, model, *every_option(*sizes))


def test_what_cannot_be_translated_is_named():
    model = Recurrent(fastseq.nn.GRU(4, 6))
    inputs = torch.randn(5, 3, 4), None, None, torch.rand(5, 3) < 0.4
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"ONNX has no operator for reset="):
        translated(model, inputs, None)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"ONNX has no operator for state_mask="):
        translated(Masked(model.layer), (torch.randn(5, 3, 4), torch.ones(1, 3, 6)), None)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"ONNX has no operator for norm="):
        translated(fastseq.nn.GRU(4, 6, norm="layer"), inputs[:1], None)


def test_a_backend_that_was_named_is_kept():
    with fastseq.use_backend("reference"):
        proto = exported(fastseq.nn.GRU(4, 6), (torch.randn(3, 2, 4),), None)
    assert "GRU" not in operators(proto)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_legacy_exporter_gives_torchs_nodes(name, tmp_path):
    layer = getattr(fastseq.nn, name)(4, 6, bidirectional=True, recurrent_dropout=0.5)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        layer.eval(), (torch.randn(5, 3, 4),), path, dynamo=False, input_names=["x"], dynamic_axes={"x": [0, 1]}
    )
    proto = onnx.load(path)
    assert name in operators(proto)
    for T, B in ((5, 3), (9, 3)):  # with zeros for its first state, torch's export fixes the batch of some layers
        assert_equal(proto, layer, torch.randn(T, B, 4))


def test_importing_fastseq_imports_no_exporter():
    clients = {"onnx", "onnxscript", "transformers", "fastseq.integrations.onnx", "fastseq.integrations.transformers"}
    program = f"import sys, fastseq; print({clients} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
