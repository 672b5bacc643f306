"""Low precision on the CPU: recurrent layers in float32, bfloat16 and int8 beside other runtimes' low precision.

Each call is checked first: its error is the largest difference of an output from float64. Peers are OpenVINO with its
bfloat16 hint (where it is installed), ONNX Runtime's dynamic quantisation (LSTM alone), and torch's (LSTM and GRU).
``x best`` is the time of the fastest peer in low precision over a call's own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastseq
from bench.cases import LayerInputs, Recurrent, make_inputs
from bench.peers import build_layer, onnx_model
from bench.report import environment, unwritable, write_json
from bench.run import Timing, add_blocks

SHAPES = ((1, 1, 512, 512), (1, 32, 256, 256), (50, 32, 128, 128), (200, 8, 256, 256), (256, 16, 512, 512),
          (1000, 4, 40, 96))  # fmt: skip
"""T, B, I, H."""
CELLS = ("lstm", "gru", "gru_reset_before", "rnn")
PASSES = 5
REST = 0.05
"""Seconds between contestants: ONNX Runtime's idle workers spin for a while."""

Call = Callable[[], Any]


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bench precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=["lstm"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-time", type=float, default=1.0, metavar="SECONDS", help="given to each contestant")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(argv)
    if options.threads < 1 or not options.min_time > 0:
        parser.error("--threads and --min-time must be positive")
    if options.json is not None and (refusal := unwritable(options.json)):
        parser.error(f"--json {refusal}")
    torch.set_num_threads(options.threads)
    found = []
    for cell in options.cell:
        for steps, batch, features, hidden in SHAPES:
            case = Recurrent("inference", "float32", cell, steps, batch, features, hidden)
            found.append({"case": case.name, "contestants": compare(case, options.threads, options.min_time)})
            _print(found[-1])
    if options.json is not None:
        made = {"command": shlex.join(["python", "-m", "bench", "precision", *argv])}
        write_json(options.json, {**made, "environment": environment(options.threads), "shapes": found})
    return 0


def compare(case: Recurrent, threads: int, min_time: float) -> dict[str, dict[str, Any]]:
    """Each contestant's time of a call and its error."""
    inputs = make_inputs(case)
    assert isinstance(inputs, LayerInputs)
    assert inputs.h0 is not None
    layer = build_layer(fastseq.nn, case, inputs.state, torch.float32).eval()
    state = inputs.h0 if inputs.c0 is None else (inputs.h0, inputs.c0)
    with torch.no_grad():
        wide = tuple(s.double() for s in state) if isinstance(state, tuple) else state.double()
        truth = copy.deepcopy(layer).double()(inputs.x.double(), wide)[0]
    found: dict[str, dict[str, Any]] = {}
    timed: list[tuple[Call, Timing]] = []
    for name, call in contestants(case, inputs, layer, state, threads):
        y = torch.as_tensor(np.asarray(call()[0])).reshape(truth.shape)
        found[name] = {"error": (y.double() - truth).abs().max().item()}
        timed.append((call, Timing()))
    for _ in range(PASSES):
        for call, timing in timed:
            add_blocks([call], [timing], min_time, PASSES)
            time.sleep(REST)
    for one, (_, timing) in zip(found.values(), timed, strict=True):
        one["us"] = timing.median * 1e6
    return found


def contestants(
    case: Recurrent, inputs: LayerInputs, layer: nn.Module, state: Any, threads: int
) -> Iterator[tuple[str, Call]]:
    """Names and calls, whose first result is y."""
    for kind in (None, "bfloat16", "int8"):
        twin = copy.deepcopy(layer)
        fastseq.patch(twin, compute=kind)
        yield f"fastseq {kind or 'float32'}", _inference(twin, inputs.x, state)
    if case.cell in ("lstm", "gru"):
        theirs = build_layer(nn, case, inputs.state, torch.float32).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            holder = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), {nn.LSTM, nn.GRU}, torch.qint8)
        yield "torch int8", _inference(holder[0], inputs.x, state)
    given = {"X": inputs.x, "h_0": inputs.h0, "c_0": inputs.c0}
    arrays = {n: t.numpy() for n, t in given.items() if t is not None}
    model = onnx_model(case, inputs.state)
    if importlib.util.find_spec("openvino"):
        for hint in ("f32", "bf16"):
            yield f"OpenVINO {hint}", _openvino(model, arrays, hint, threads)
    if case.cell == "lstm" and importlib.util.find_spec("onnxruntime"):
        for spinning in (True, False)[: 1 if threads == 1 else 2]:
            yield f"ONNX RT int8{'' if spinning else ', not spinning'}", _onnx(model, arrays, spinning, threads)


def _inference(layer: nn.Module, x: Tensor, state: Any) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return layer(x, state)

    return call


def _openvino(model: bytes, arrays: dict[str, Any], hint: str, threads: int) -> Call:
    """For these shapes alone, which it is compiled for."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    graph.reshape({name: list(array.shape) for name, array in arrays.items()})
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(graph, "CPU", options | {"ENABLE_CPU_PINNING": False}).create_infer_request()
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)


def _onnx(model: bytes, arrays: dict[str, Any], spinning: bool, threads: int) -> Call:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        whole.write_bytes(model)
        logging.disable(logging.WARNING)
        quantize_dynamic(whole, small, op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8, per_channel=True)
        logging.disable(logging.NOTSET)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, arrays)


def _print(found: dict[str, Any]) -> None:
    own = found["contestants"]
    low = {name: one for name, one in own.items() if not name.startswith("fastseq") and name != "OpenVINO f32"}
    best = min((one["us"] for one in low.values()), default=float("nan"))
    print(f"{found['case']}\n  {'':<28}{'call':>13}{'error':>11}{'x best':>9}")
    for name, one in own.items():
        print(f"  {name:<28}{one['us']:>10.1f} µs{one['error']:>11.5f}{best / one['us']:>9.2f}", flush=True)
