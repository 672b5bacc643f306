"""How fast a cache of keys and values is read: a decoding step, or a chunk of a prompt, beside torch and ONNX Runtime.

A call appends the newest positions and attends to all of them, with 32 heads over 8 of 128 features. Contestants are
checked against float64 and take turns. ONNX Runtime's is GroupQueryAttention, which appends in place too. The bytes of
the cache that a call reads in a second stand beside those that a copy of memory reads and writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from bench.cases import DTYPES, Attention, AttentionInputs, attention_inputs
from bench.check import Judge, cast
from bench.formats import NONE, duration, markdown, times
from bench.peers import Contestant, Entrant, Outputs, Unavailable
from bench.run import Options, Result
from bench.studies import turns

LAYOUTS: dict[str, dict[str, Any]] = {"contiguous": {}, "paged": {"page_size": 64}, "int8": {"dtype": torch.int8}}
SCALE = 1 / 64
"""Of int8 every row is drawn as whole numbers up to 127 times this, so that all contestants read the same numbers."""


@dataclass(frozen=True)
class Step(Attention):
    """``queries`` positions appended to a cache that then holds ``keys``; causal."""

    layout: str = "contiguous"
    family = ""

    @property
    def group(self) -> str:
        return f"{'decode' if self.queries == 1 else 'cache'} {self.layout} {DTYPES[self.dtype]}"

    @property
    def name(self) -> str:
        what = "decode" if self.queries == 1 else f"cache-{self.queries}"
        return f"{what}-{self.layout}-B{self.batch}-Tk{self.keys}{self._suffix()}"


def grid() -> list[Step]:
    shapes = [(1, 1, 4096), (1, 1, 16384), (1, 1, 65536), (4, 1, 4096), (1, 32, 4096)]
    return [
        Step("forward", dtype, "decode", batch, 32, 8, queries, keys, 128, causal=True, layout=layout)
        for batch, queries, keys in shapes for layout in LAYOUTS for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def drawn(case: Step) -> AttentionInputs:
    inputs = attention_inputs(case)
    if case.layout != "int8":
        return inputs
    k, v = ((x * 40).round().clamp(-126, 126) for x in (inputs.k, inputs.v))
    for x in (k, v):
        x[..., 0] = torch.where(x[..., 0] < 0, -127.0, 127.0)
    return dataclasses.replace(inputs, k=k * SCALE, v=v * SCALE)


def answer(case: Step, x: AttentionInputs) -> Outputs:
    """By torch's own function, in the dtype of the inputs."""
    seen = torch.ones(case.queries, case.keys, dtype=torch.bool).tril(case.keys - case.queries)
    return {"o": F.scaled_dot_product_attention(x.q, x.k, x.v, seen, enable_gqa=True)}


def fastseq_entrants(case: Step, x: AttentionInputs, threads: int) -> Iterator[Entrant]:
    options = {"dtype": x.q.dtype, **LAYOUTS[case.layout]}
    cache = fastseq.KVCache(case.batch, 8, case.dim, capacity=case.keys * (case.batch if "page_size" in options else 1),
                            **options)  # fmt: skip
    old = case.keys - case.queries
    cache.append(x.k[:, :, :old], x.v[:, :, :old])
    k, v = x.k[:, :, old:], x.v[:, :, old:]

    def step() -> Tensor:
        cache.lengths.fill_(old)  # as before the last call: the room, and the pages, are there
        cache.append(k, v)
        return fastseq.attention(x.q, cache=cache, causal=True)

    yield Entrant(step, lambda o: {"o": o})


def torch_entrants(case: Step, x: AttentionInputs, threads: int) -> Iterator[Entrant]:
    if case.layout != "contiguous":
        raise Unavailable("torch's function reads neither pages nor int8")
    k, v, old = x.k.clone(), x.v.clone(), case.keys - case.queries
    seen = None if case.queries == 1 else torch.ones(case.queries, case.keys, dtype=torch.bool).tril(old)

    def step() -> Tensor:
        k[:, :, old:], v[:, :, old:] = x.k[:, :, old:], x.v[:, :, old:]
        return F.scaled_dot_product_attention(x.q, k, v, seen, enable_gqa=True)

    yield Entrant(step, lambda o: {"o": o})


def onnx_model(case: Step) -> bytes:
    """GroupQueryAttention alone; q, k and v [B,t,H * D], a cache [B,Hk,capacity,D]."""
    from onnx import TensorProto, helper, numpy_helper

    small = case.layout == "int8"
    kind = TensorProto.INT8 if small else TensorProto.FLOAT
    rows, kept, wide = ["B", "t", 1024], ["B", 8, "N", 128], ["B", "t", 4096]
    shapes: dict[str, list[Any]] = {
        **{"q": wide, "k": rows, "v": rows, "lengths": ["B"], "total": [1], "o": wide},
        **dict.fromkeys(("old_k", "old_v", "new_k", "new_v"), kept),
    }
    types = {"lengths": TensorProto.INT32, "total": TensorProto.INT32}
    values = {
        n: helper.make_tensor_value_info(n, types.get(n, kind if "_" in n else TensorProto.FLOAT), shape)
        for n, shape in shapes.items()
    }
    inputs, outputs = ["q", "k", "v", "old_k", "old_v", "lengths", "total"], ["o", "new_k", "new_v"]
    options: dict[str, Any] = {"num_heads": 32, "kv_num_heads": 8}
    if small:
        options |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    scale = [numpy_helper.from_array(torch.tensor([SCALE]).numpy(), "scale")] if small else []
    node = helper.make_node("GroupQueryAttention", [*inputs, *[""] * 5 * small, *["scale"] * 2 * small], outputs,
                            domain="com.microsoft", **options)  # fmt: skip
    graph = helper.make_graph([node], case.name, [values[n] for n in inputs], [values[n] for n in outputs], scale)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def onnx_entrants(case: Step, x: AttentionInputs, threads: int) -> Iterator[Entrant]:
    """The cache is bound as input and output, so that it is written in place."""
    if case.layout == "paged" or case.dtype != "float32":
        raise Unavailable("ONNX Runtime's GroupQueryAttention takes no pages and no bfloat16 on a CPU")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it takes turns with the others
    session = onnxruntime.InferenceSession(onnx_model(case), options, providers=["CPUExecutionProvider"])
    binding, old = session.io_binding(), case.keys - case.queries

    def bind(name: str, tensor: Tensor) -> Any:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
        binding.bind_ortvalue_input(name, value)
        return value

    rows = {"q": x.q, "k": x.k[:, :, old:], "v": x.v[:, :, old:]}
    kept = [bind(n, t.transpose(1, 2).flatten(2)) for n, t in rows.items()]
    kept.append(bind("lengths", torch.full((case.batch,), case.keys - 1, dtype=torch.int32)))
    kept.append(bind("total", torch.tensor([case.keys], dtype=torch.int32)))
    binding.bind_output("o", "cpu")
    for name, t in (("k", x.k), ("v", x.v)):
        value = bind(f"old_{name}", (t / SCALE).to(torch.int8) if case.layout == "int8" else t)
        binding.bind_ortvalue_output(f"new_{name}", value)

    def outputs(_: Any) -> Outputs:
        o = torch.from_numpy(binding.get_outputs()[0].numpy())
        return {"o": o.unflatten(2, (32, 128)).transpose(1, 2)}

    yield Entrant(lambda: session.run_with_iobinding(binding), outputs)


CONTESTANTS = (
    Contestant("fastseq", "fastseq", fastseq_entrants),
    Contestant("torch", "torch", torch_entrants),
    Contestant("ort", "ONNX RT", onnx_entrants, ("onnx", "onnxruntime")),
)


def measured(case: Step, options: Options) -> tuple[Result, float]:
    """Every contestant checked and timed; and bytes a second of a copy, timed among them."""
    inputs = drawn(case)
    judge = Judge.by(lambda dtype: answer(case, cast(inputs, dtype)), case)  # type: ignore[arg-type]
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    result, (copy,) = turns.compare(case, inputs, judge, CONTESTANTS, options, lambda: target.copy_(source))
    return result, 2 * source.nbytes / copy.median


def row(result: Result, copied: float) -> list[str]:
    case: Any = result.case
    timing = result.entries["fastseq"].timing
    if timing is None:
        return [case.name, result.entries["fastseq"].reason, *[NONE] * 4]
    features = 2 * (case.dim + 4) if case.layout == "int8" else 2 * case.dim * case.torch_dtype.itemsize
    read = case.batch * case.kv_heads * case.keys * features / timing.median
    speed = [f"{read / 1e9:.1f} GB/s", f"{read / copied:.0%}"]
    return [case.name, duration(timing.median), *speed, times(result.ratio("torch")), times(result.ratio("ort"))]


def main(argv: Sequence[str]) -> int:
    """Entry point of ``python -m bench decoding``; 1 where an answer was wrong."""
    given = turns.parser("decoding", __doc__).parse_args(argv)
    cases, options = turns.chosen(given, grid()), Options(given.threads, given.min_time)
    with torch.inference_mode():
        found = [measured(case, options) for case in cases]
    header = ["a call", "fastseq", "of cache read", "of a copy's", "vs torch", "vs ort"]
    print("\n".join(markdown(header, [row(*one) for one in found], right=True)))
    more = [{"copy_bytes_per_second": copied} for _, copied in found]
    return turns.conclude(given, options, [result for result, _ in found], more)
