"""The contestants: fastseq, and those it is measured against.

Each prepares, for a case and its inputs, one or more entrants: closures that do the whole call a user would write.
Where a peer has several settings (spinning workers or not; padding or a loop; a fast path or none) each is an entrant
of its own, and the fastest stands for the peer.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Attention, AttentionInputs, Case, Multihead, MultiheadInputs, Recurrent, RecurrentInputs

Inputs = RecurrentInputs | AttentionInputs | MultiheadInputs
Outputs = dict[str, Tensor]


class Unavailable(Exception):
    """The contestant cannot run this case; the message says why."""


@dataclass
class Entrant:
    """``call()`` is what is timed; ``outputs(call())`` are its answers (and gradients) by name."""

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    setting: str = ""


@dataclass(frozen=True)
class Contestant:
    """alone: its idle workers spin, so it is timed by itself and not among the others.
    looseness: error allowed beside the budget of check.py, relative to the largest value."""

    name: str
    label: str
    prepare: Callable[[Case, Inputs, int], Iterable[Entrant]]
    needs: tuple[str, ...] = ()
    alone: bool = False
    looseness: float = 0.0

    def missing(self) -> str | None:
        """The first package it needs and that is not installed."""
        return next((package for package in self.needs if importlib.util.find_spec(package) is None), None)


# --- a layer, a cell, an attention function: how one call is made -----------------------------------------------------


def build_layer(library: ModuleType, case: Recurrent, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The layer or cell of ``library`` (torch.nn or fastseq.nn) for this case, with the given weights."""
    kind = "GRU" if case.cell == "gru_reset_before" else case.cell.upper()
    options: dict[str, Any] = {"reset_after": False} if case.cell == "gru_reset_before" else {}
    if case.stacked:
        options |= {"num_layers": case.layers, "bidirectional": case.directions == 2}
    layer = getattr(library, kind + ("Cell" if case.as_cell else ""))(
        case.features, case.hidden, dtype=dtype, **options
    )
    layer.load_state_dict({name: weight.to(dtype) for name, weight in state.items()})
    return layer.train(case.training)


def layer_entrant(case: Recurrent, layer: nn.Module, inputs: RecurrentInputs) -> Entrant:
    """One call of a layer with a state given; in training with the walk back into x and every weight."""
    x, h0, c0 = inputs.x, inputs.h0, inputs.c0
    hx: Any = h0 if c0 is None else (h0, c0)

    def named(y: Tensor | None, h_n: Any) -> Outputs:
        outputs = {} if y is None else {"y": y}
        return outputs | ({"h_n": h_n} if c0 is None else {"h_n": h_n[0], "c_n": h_n[1]})

    if case.mode == "step":
        state = hx

        def step_cell() -> Any:
            nonlocal state
            state = layer(x, state)
            return state

        def step_layer() -> Any:
            nonlocal state
            y, state = layer(x, state)
            return y, state

        if case.as_cell:
            return Entrant(step_cell, lambda answer: named(None, answer))
        return Entrant(step_layer, lambda answer: named(*answer))

    if not case.training:
        return Entrant(lambda: layer(x, hx), lambda answer: named(*answer))

    x = x.clone().requires_grad_()
    leaves, dy = [x, *layer.parameters()], inputs.dy

    def train() -> Any:
        for leaf in leaves:
            leaf.grad = None
        if case.as_cell:
            state = layer(x, hx)
            (state if c0 is None else state[0]).backward(dy)
            return None, state
        y, h_n = layer(x, hx)
        y.backward(dy)
        return y, h_n

    def gradients(answer: Any) -> Outputs:
        grads = {f"d_{name}": _grad(parameter) for name, parameter in layer.named_parameters()}
        return named(*answer) | {"d_x": _grad(x)} | grads

    return Entrant(train, gradients)


def build_multihead(
    library: ModuleType, case: Multihead, state: dict[str, Tensor], dtype: torch.dtype
) -> nn.MultiheadAttention:
    """MultiheadAttention of ``library`` (torch.nn or fastseq.nn) for this case, with the given weights."""
    layer = library.MultiheadAttention(case.embed, case.heads, batch_first=True, dtype=dtype)
    layer.load_state_dict({name: weight.to(dtype) for name, weight in state.items()})
    return layer.train(case.training)


def multihead_entrant(
    case: Multihead, layer: nn.MultiheadAttention, inputs: MultiheadInputs, setting: str = ""
) -> Entrant:
    """One call of self-attention; in training with the walk from y back into x and every weight. The masks, which a
    model has from its tokenizer or makes once, are not timed."""
    x, dy = inputs.x, inputs.dy
    options: dict[str, Any] = {"need_weights": case.weights}
    if case.causal:
        options |= {"is_causal": True, "attn_mask": torch.ones(case.steps, case.steps, dtype=torch.bool).triu(1)}
    if case.padded:
        assert inputs.lengths is not None
        options["key_padding_mask"] = torch.arange(case.steps) >= inputs.lengths[:, None]

    def named(y: Tensor, weights: Tensor | None) -> Outputs:
        return {"y": y} if weights is None else {"y": y, "weights": weights}

    if not case.training:
        return Entrant(lambda: layer(x, x, x, **options), lambda answer: named(*answer), setting)

    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]

    def train() -> Any:
        for leaf in leaves:
            leaf.grad = None
        y, weights = layer(x, x, x, **options)
        y.backward(dy)
        return y, weights

    def gradients(answer: Any) -> Outputs:
        grads = {f"d_{name}": _grad(parameter) for name, parameter in layer.named_parameters()}
        return named(*answer) | {"d_x": _grad(x)} | grads

    return Entrant(train, gradients, setting)


def attention_entrant(
    case: Attention,
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    setting: str = "",
) -> Entrant:
    """One call of ``function(q, k, v)``; in training with the gradient of each. ``unpack`` brings the peer's layout of
    o and of the gradients to the case's."""
    q, k, v, d_o = inputs
    if not case.training:
        return Entrant(lambda: function(q, k, v), lambda o: {"o": unpack(o)}, setting)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]

    def train() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        o = function(*leaves)
        o.backward(d_o)
        return o

    def gradients(o: Tensor) -> Outputs:
        return {"o": unpack(o)} | {f"d_{n}": unpack(_grad(t)) for n, t in zip("qkv", leaves, strict=True)}

    return Entrant(train, gradients, setting)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


# --- fastseq --------------------------------------------------------------------------------------------------------


def fastseq_entrants(case: Case, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    """fastseq's public layers and functions, on the backend in force."""
    import fastseq

    if isinstance(case, Recurrent):
        assert isinstance(inputs, RecurrentInputs)
        layer = build_layer(fastseq.nn, case, inputs.state, case.torch_dtype)
        if case.weights:
            fastseq.patch(layer, weights=case.weights)
        yield layer_entrant(case, layer, inputs)
        return
    if isinstance(case, Multihead):
        assert isinstance(inputs, MultiheadInputs)
        yield multihead_entrant(case, build_multihead(fastseq.nn, case, inputs.state, case.torch_dtype), inputs)
        return
    assert isinstance(case, Attention)
    assert isinstance(inputs, AttentionInputs)
    if case.kind == "varlen":
        cu_seqlens = cumulative(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = fastseq.attention(q, k, v, causal=case.causal, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
            assert isinstance(o, Tensor)
            return o

        yield attention_entrant(case, attend, (inputs.q, inputs.k, inputs.v, inputs.d_o))
    else:
        yield sdpa_entrant(case, fastseq.scaled_dot_product_attention, inputs)


def cumulative(inputs: AttentionInputs) -> Tensor:
    """int32 [B+1]: where each sequence of a varlen case begins, and the end."""
    assert inputs.lengths is not None
    return F.pad(inputs.lengths.cumsum(0), (1, 0)).to(torch.int32)


def sdpa_entrant(case: Attention, sdpa: Callable[..., Tensor], inputs: AttentionInputs) -> Entrant:
    """A function of scaled_dot_product_attention's signature on a dense case."""
    options: dict[str, Any] = {}
    if case.kind == "mask":
        assert inputs.lengths is not None
        options["attn_mask"] = (torch.arange(case.keys) < inputs.lengths[:, None])[:, None, None]  # [B,1,1,Tk]
    if case.causal:
        options["is_causal"] = True
    if case.heads != case.kv_heads:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, **options)

    return attention_entrant(case, attend, (inputs.q, inputs.k, inputs.v, inputs.d_o))


# --- torch ----------------------------------------------------------------------------------------------------------


def torch_entrants(case: Case, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    """torch.nn's layers, and its scaled_dot_product_attention."""
    if isinstance(case, Recurrent):
        assert isinstance(inputs, RecurrentInputs)
        if case.cell == "gru_reset_before":
            raise Unavailable("torch has no GRU that resets before the product")
        yield layer_entrant(case, build_layer(nn, case, inputs.state, case.torch_dtype), inputs)
        return
    if isinstance(case, Multihead):
        assert isinstance(inputs, MultiheadInputs)
        yield from torch_multihead(case, inputs)
        return
    assert isinstance(case, Attention)
    assert isinstance(inputs, AttentionInputs)
    if case.kind == "varlen":
        yield torch_padded(case, inputs)
        yield torch_loop(case, inputs)
    else:
        yield sdpa_entrant(case, F.scaled_dot_product_attention, inputs)


def torch_multihead(case: Multihead, inputs: MultiheadInputs) -> Iterator[Entrant]:
    """The layer as it is; in inference also without its fast path, which keeps the matrix of scores where the other way
    need not. ``torch.backends.mha.set_fastpath_enabled(False)`` turns it off for all layers; the training flag does so
    for this one and, without dropout, nothing else."""
    layer = build_multihead(nn, case, inputs.state, case.torch_dtype)
    if case.training:
        yield multihead_entrant(case, layer, inputs)
    else:
        yield multihead_entrant(case, layer, inputs, "fast path")
        slow = build_multihead(nn, case, inputs.state, case.torch_dtype).train()
        yield multihead_entrant(case, slow, inputs, "no fast path")


def torch_padded(case: Attention, inputs: AttentionInputs) -> Entrant:
    """Unequal lengths as most code has them: padded to the longest, with a mask. Padding is not timed. Under a causal
    mask the padding, which comes last, is seen by padding only, and no other mask is needed."""
    assert inputs.lengths is not None
    sizes = inputs.lengths.tolist()
    live = torch.arange(max(sizes)) < inputs.lengths[:, None]  # [B,T]

    def pad(packed: Tensor) -> Tensor:  # [total,H,D] -> [B,H,T,D]
        return nn.utils.rnn.pad_sequence(list(packed.split(sizes)), batch_first=True).transpose(1, 2).contiguous()

    def unpack(padded: Tensor) -> Tensor:
        return padded.transpose(1, 2)[live]

    options: dict[str, Any] = {"is_causal": True} if case.causal else {"attn_mask": live[:, None, None]}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    d_o = pad(inputs.d_o) if case.training else inputs.d_o
    return attention_entrant(case, attend, (pad(inputs.q), pad(inputs.k), pad(inputs.v), d_o), unpack, "padded")


def torch_loop(case: Attention, inputs: AttentionInputs) -> Entrant:
    """Unequal lengths one sequence at a time: more calls, no wasted work."""
    assert inputs.lengths is not None
    sizes = inputs.lengths.tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(t.transpose(0, 1)[None].split(sizes, 2) for t in (q, k, v)), strict=True)  # [1,H,t,D] each
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=case.causal) for q, k, v in sequences]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return attention_entrant(case, attend, (inputs.q, inputs.k, inputs.v, inputs.d_o), setting="loop")


def torch_int8_entrants(case: Case, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    """torch's dynamic quantisation: int8 weights, activations quantised at each call."""
    if not isinstance(case, Recurrent) or case.cell not in ("gru", "lstm") or case.training:
        raise Unavailable("dynamic quantisation is for the inference of LSTM and GRU")
    if case.dtype != "float32":
        raise Unavailable("dynamic quantisation begins from float32")
    assert isinstance(inputs, RecurrentInputs)
    layer = nn.Sequential(build_layer(nn, case, inputs.state, torch.float32))  # what is swapped is a child
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(layer, {type(layer[0])}, dtype=torch.qint8)[0]
    yield layer_entrant(case, quantized, inputs)


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------

ONNX_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""Torch's gate that stands at each of ONNX's places: GRU r,z,n -> z,r,h; LSTM i,f,g,o -> i,o,f,c."""


def onnx_model(case: Recurrent, state: dict[str, Tensor]) -> bytes:
    """A model of the one operator, with these weights as constants, X [T,B,I] and the first state as inputs."""
    import onnx

    kind = "GRU" if case.cell == "gru_reset_before" else case.cell.upper()
    order, hidden, end = list(ONNX_GATES[kind]), case.hidden, "" if case.as_cell else "_l0"

    def reorder(name: str) -> Tensor:
        weight = state[name + end]
        return weight.reshape(len(order), hidden, -1)[order].reshape(weight.shape)

    bias = torch.cat([reorder("bias_ih"), reorder("bias_hh")])
    constants = {"W": reorder("weight_ih"), "R": reorder("weight_hh"), "B": bias}
    initializers = [onnx.numpy_helper.from_array(weight[None].numpy(), name) for name, weight in constants.items()]

    def value(name: str, *shape: int | str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    states = ["h", "c"] if kind == "LSTM" else ["h"]
    options: dict[str, Any] = {"linear_before_reset": int(case.cell == "gru")} if kind == "GRU" else {}
    node = onnx.helper.make_node(
        kind,
        ["X", "W", "R", "B", "", *(f"{s}_0" for s in states)],
        ["Y", *(f"{s}_n" for s in states)],
        hidden_size=hidden,
        **options,
    )
    graph = onnx.helper.make_graph(
        [node],
        case.name,
        [value("X", "T", "B", case.features), *(value(f"{s}_0", 1, "B", hidden) for s in states)],
        [value("Y", "T", 1, "B", hidden), *(value(f"{s}_n", 1, "B", hidden) for s in states)],
        initializers,
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def onnx_sessions(case: Case, inputs: Inputs, threads: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(setting, session, feed) with spinning workers, the default, and without where there are workers at all."""
    if not isinstance(case, Recurrent):
        raise Unavailable("ONNX Runtime is a peer of the recurrent cases")
    if case.training:
        raise Unavailable("ONNX Runtime does inference only")
    if case.dtype != "float32":
        raise Unavailable(f"ONNX Runtime's {case.cell} takes float32 only on a CPU")
    assert isinstance(inputs, RecurrentInputs)
    import onnxruntime

    model = onnx_model(case, inputs.state)
    feed = {"X": inputs.x, "h_0": inputs.h0} | ({} if inputs.c0 is None else {"c_0": inputs.c0})
    arrays = {name: (tensor[None] if case.as_cell else tensor).numpy() for name, tensor in feed.items()}
    for spinning in (True, False)[: 1 if threads == 1 else 2]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        yield ("spinning" if spinning else "not spinning"), session, dict(arrays)


def onnx_outputs(case: Case, arrays: list[Any]) -> Outputs:
    """ONNX's Y [T,1,B,H] and states [1,B,H] as torch's layer or cell would give them."""
    assert isinstance(case, Recurrent)
    y, *states = (torch.from_numpy(array) for array in arrays)
    outputs = {f"{name}_n": s[0] if case.as_cell else s for name, s in zip("hc", states, strict=False)}
    return outputs if case.as_cell else {"y": y[:, 0]} | outputs


def onnx_entrants(case: Case, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    """session.run with the caller's arrays in and new arrays out: the same bargain as a layer's call."""
    for setting, session, feed in onnx_sessions(case, inputs, threads):
        names = [output.name for output in session.get_outputs()]

        def call(session: Any = session, feed: Any = feed, names: Any = names) -> Any:
            return session.run(names, feed)

        def step(session: Any = session, feed: Any = feed, names: Any = names) -> Any:
            answer = session.run(names, feed)
            feed["h_0"] = answer[1]
            if len(answer) == 3:
                feed["c_0"] = answer[2]
            return answer

        yield Entrant(step if case.mode == "step" else call, lambda arrays: onnx_outputs(case, arrays), setting)


def onnx_bound_entrants(case: Case, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    """The same with inputs bound to the session once and outputs left with it. That is less than a call does: no
    argument is passed, nothing is handed out, and a step's state is not carried on; so it is asked for by name."""
    for setting, session, feed in onnx_sessions(case, inputs, threads):
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            binding.bind_output(output.name)

        def call(session: Any = session, binding: Any = binding, feed: Any = feed) -> Any:  # feed: kept alive
            session.run_with_iobinding(binding)
            return binding

        yield Entrant(call, lambda bound: onnx_outputs(case, bound.copy_outputs_to_cpu()), setting)


# --- the registry ---------------------------------------------------------------------------------------------------

OURS = Contestant("fastseq", "fastseq", fastseq_entrants)

_ORT = ("onnx", "onnxruntime")
PEERS = {
    peer.name: peer
    for peer in (
        Contestant("torch", "torch", torch_entrants),
        Contestant("ort", "ONNX RT", onnx_entrants, _ORT, alone=True),
        Contestant("ort-bound", "ONNX RT, bound", onnx_bound_entrants, _ORT, alone=True),
        Contestant("torch-int8", "torch int8", torch_int8_entrants, looseness=0.1),
    )
}
DEFAULT_PEERS = ("torch", "ort")
