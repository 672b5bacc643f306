"""The oracle is held to two independent implementations: torch.nn, and ONNX Runtime, which has all cells."""

from __future__ import annotations

import pytest
import torch
from support import CELLS, cell_inputs

from fastseq import ops
from fastseq.recurrent import reference

TORCH_CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


def torch_scan(cell: str, inputs: list, reverse: bool) -> tuple:
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = inputs
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    hx = h0[None] if c0 is None else (h0[None], c0[None])
    x = x.flip(0) if reverse else x
    y, *last = getattr(torch._VF, cell)(x, hx, weights, b_ih is not None, 1, 0.0, False, False, False)
    return (y.flip(0) if reverse else y, *(s[0] for s in last))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_reference_is_torch_nn_in_value_and_gradient(cell, biases, reverse):
    inputs = cell_inputs(cell, 6, 3, 4, 5, biases=biases, requires_grad=True)
    ours = [t for t in reference.scan(*inputs, None, None, None, None, cell=cell, reverse=reverse)[:3] if t is not None]
    theirs = torch_scan(cell, inputs, reverse)
    leaves = [t for t in inputs if t is not None]
    weights = [torch.randn_like(t) for t in ours]
    grads = [torch.autograd.grad(list(out), leaves, weights) for out in (ours, theirs)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_is_torch_nn_with_a_projection():
    inputs = cell_inputs("lstm", 6, 3, 4, 5, projected=2)
    y, h_n, c_n, _ = reference.scan(*inputs, None, None, None, None, cell="lstm")
    for a, b in zip((y, h_n, c_n), torch_scan("lstm", inputs, False), strict=True):
        torch.testing.assert_close(a, b)


def onnx_scan(cell: str, inputs: list, reverse: bool) -> list:
    """The same scan by ONNX Runtime: gates in its order. linear_before_reset tells the GRU forms apart, input_forget
    the LSTMs; the forget gate that this leaves out has weights there, which do not count."""
    onnx = pytest.importorskip("onnx", reason="onnx is an extra (bench)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra (bench)")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    x, w_ih, w_hh, b_ih, b_hh, _, h0, c0 = [None if t is None else t.float() for t in inputs]
    gates = ops.GATES[cell]
    hidden = w_hh.shape[0] // gates
    kind = cell[: cell.find("_")].upper() if "_" in cell else cell.upper()
    order = {"RNN": "x", "GRU": "zrn", "LSTM": "iofg"}[kind]  # of ONNX, in torch's letters
    ours = {1: "x", 3: "igo" if kind == "LSTM" else "rzn", 4: "ifgo"}[gates]

    def reorder(w: torch.Tensor) -> torch.Tensor:
        blocks = dict(zip(ours, w.chunk(gates), strict=True))
        return torch.cat([blocks.get(gate, torch.randn_like(w[:hidden])) for gate in order])

    attributes = {"hidden_size": hidden, "direction": "reverse" if reverse else "forward"}
    if kind == "GRU":
        attributes["linear_before_reset"] = int(cell == "gru")
    if kind == "LSTM":
        attributes["input_forget"] = int(cell == "lstm_coupled")
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"]
    values = {"W": reorder(w_ih)[None], "R": reorder(w_hh)[None], "h0": h0[None]}
    values["B"] = torch.cat((reorder(b_ih), reorder(b_hh)))[None]
    names = ["X", "W", "R", "B", "", "h0"]
    outputs = ["Y", "Y_h"]
    if kind == "LSTM":
        values["c0"] = c0[None]
        names.append("c0")
        outputs.append("Y_c")
    node = helper.make_node(kind, names, outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "scan",
        [helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(v.numpy(), n) for n, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, *last = session.run(None, {"X": x.numpy()})
    return [torch.from_numpy(y[:, 0]), *(torch.from_numpy(s[0]) for s in last)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_onnx_runtime(cell, reverse):
    inputs = cell_inputs(cell, 6, 3, 4, 5)
    ours = [t for t in reference.scan(*inputs, None, None, None, None, cell=cell, reverse=reverse)[:3] if t is not None]
    for a, b in zip(ours, onnx_scan(cell, inputs, reverse), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_each_row_run_alone(cell):
    inputs = cell_inputs(cell, 6, 4, 3, 5)
    lengths = torch.tensor([6, 0, 1, 4])
    for reverse in (False, True):
        y, h_n, c_n, states = reference.scan(*inputs, None, None, lengths, None, cell=cell, reverse=reverse)
        for b, n in enumerate(lengths.tolist()):
            assert not y[n:, b].any()
            if n == 0:
                assert torch.equal(h_n[b], inputs[6][b])
                continue
            row = [inputs[0][:n, b : b + 1], *inputs[1:6], inputs[6][b : b + 1]]
            row.append(None if inputs[7] is None else inputs[7][b : b + 1])
            alone = reference.scan(*row, None, None, None, None, cell=cell, reverse=reverse)
            torch.testing.assert_close(y[:n, b], alone[0][:, 0])
            torch.testing.assert_close(h_n[b], alone[1][0])
            if ops.HAS_C[cell]:
                torch.testing.assert_close(c_n[b], alone[2][0])
                torch.testing.assert_close(states[:n, b], alone[3][:, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_reset_is_two_sequences_laid_end_to_end(cell):
    inputs = cell_inputs(cell, 7, 1, 3, 5)
    reset = torch.zeros(7, 1, dtype=torch.bool)
    reset[4] = True
    y, *_ = reference.scan(*inputs, None, None, None, reset, cell=cell)
    zero = [torch.zeros_like(inputs[6]), None if inputs[7] is None else torch.zeros_like(inputs[7])]
    second, *_ = reference.scan(inputs[0][4:], *inputs[1:6], *zero, None, None, None, None, cell=cell)
    torch.testing.assert_close(y[4:], second)


def test_garbage_in_the_padding_has_no_influence():
    inputs = cell_inputs("gru", 4, 2, 3, 5, requires_grad=True)
    lengths = torch.tensor([4, 2])
    dirty = inputs[0].detach().clone()
    dirty[2:, 1] = float("nan")
    dirty.requires_grad_()
    y, *_ = reference.scan(dirty, *inputs[1:], None, None, lengths, None, cell="gru")
    grads = torch.autograd.grad(y.sum(), [dirty, inputs[1]])
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
