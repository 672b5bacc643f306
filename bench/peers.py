"""The contestants: fastseq, and the peers it is measured against.

Each contestant prepares, for a case and its inputs, one or more entrants: closures that make the whole call as a user
would write it. Where a peer has several settings (spinning workers or not; padding or a loop; a fast path or none),
each setting is an entrant, and the fastest counts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from bench.cases import Attention, AttentionInputs, Case, LayerInputs, Model, Multihead, Recurrent
from bench.models import build

Outputs = dict[str, Tensor]


DRAWN = 1e-9
"""The probability of what is drawn in cases with recurrent dropout or zoneout: nothing is, but it takes its time."""


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
    """prepare: takes a case, its inputs and the number of threads.
    alone: its idle workers spin, so it is timed by itself and not among the others."""

    name: str
    label: str
    prepare: Callable[[Any, Any, int], Iterable[Entrant]]
    needs: tuple[str, ...] = ()
    alone: bool = False

    def missing(self) -> str | None:
        """The first package it needs and that is not installed."""
        return next((package for package in self.needs if importlib.util.find_spec(package) is None), None)


def backward(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Gradients as a training step computes them: into ``leaf.grad``."""
    y.backward(dy)
    return leaves


def entrant(
    forward: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    named: Callable[[Any], Outputs],
    dy: Tensor | None,
    layer: nn.Module | None = None,
    setting: str = "",
    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    differentiate: Callable[[Tensor, list[Tensor], Tensor], Any] = backward,
) -> Entrant:
    """One call of ``forward(*inputs)``; in training with backward from its first output to every input and weight.

    Args:
        named: the outputs of an answer by name.
        dy: the gradient of the first output; None outside training.
        layer: whose weights get gradients.
        unpack: brings a peer's layout of the inputs' gradients to the case's.
        differentiate: computes the gradients of ``leaves``: returns them, or puts them into ``leaf.grad``.
    """
    if dy is None:
        given = tuple(inputs.values())
        return Entrant(lambda: forward(*given), named, setting)
    own = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    weights = dict(layer.named_parameters()) if layer is not None else {}
    leaves = [*own, *weights.values()]

    def train() -> Any:
        for leaf in leaves:
            leaf.grad = None
        answer = forward(*own)
        return answer, differentiate(answer[0] if isinstance(answer, tuple) else answer, leaves, dy)

    def outputs(trained: Any) -> Outputs:
        answer, found = trained
        gradients = [leaf.grad for leaf in leaves] if found is leaves else found
        by_name = dict(zip((f"d_{name}" for name in (*inputs, *weights)), gradients, strict=True))
        return named(answer) | by_name | {f"d_{name}": unpack(by_name[f"d_{name}"]) for name in inputs}

    return Entrant(train, outputs, setting)


def build_layer(library: ModuleType, case: Recurrent, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The layer or cell of ``library`` (torch.nn or fastseq.nn) for this case, with and on the device of its
    weights."""
    options: dict[str, Any] = {"reset_after": False} if case.cell == "gru_reset_before" else {}
    options |= {"nonlinearity": "relu"} if case.cell == "rnn_relu" else {}
    if case.stacked:
        options |= {"num_layers": case.layers, "bidirectional": case.directions == 2}
    options |= {"norm": case.norm} if case.norm else {}
    kind = case.cell.partition("_")[0].upper() + "Cell" * case.as_cell
    device = next(iter(state.values())).device
    layer: nn.Module = getattr(library, kind)(case.features, case.hidden, dtype=dtype, device=device, **options)
    layer.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, strict=not case.norm)
    for gain in (w for name, w in layer.named_parameters() if name.startswith("norm_") and "_bias_" not in name):
        nn.init.constant_(gain, 0.3)
    if device.type == "cuda" and isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()
    return layer.train(case.training)


def named_states(answer: tuple[Tensor, Any]) -> Outputs:
    """The outputs of a layer, (y, state), by name."""
    y, state = answer
    return {"y": y} | name_state(state)


def name_state(state: Any) -> Outputs:
    return {"h_n": state[0], "c_n": state[1]} if isinstance(state, tuple) else {"h_n": state}


def layer_entrant(case: Recurrent, layer: nn.Module, inputs: LayerInputs) -> Entrant:
    """One call of a layer or cell with a given state; a step hands its state to the next call."""
    if case.beside:
        return streams_entrant(case, layer, inputs, case.beside)
    state: Any = inputs.h0 if inputs.c0 is None else (inputs.h0, inputs.c0)
    named: Callable[[Any], Outputs] = name_state if case.as_cell else named_states
    dy = inputs.dy if case.training else None
    if case.mode != "step":
        hx = state
        return entrant(lambda x: layer(x, hx), {"x": inputs.x}, named, dy, layer)
    x = inputs.x

    def step_cell() -> Any:
        nonlocal state
        state = layer(x, state)
        return state

    def step_layer() -> Any:
        nonlocal state
        y, state = layer(x, state)
        return y, state

    return Entrant(step_cell if case.as_cell else step_layer, named)


def streams_entrant(case: Recurrent, layer: nn.Module, inputs: LayerInputs, way: str) -> Entrant:
    """One step a call of a case of streams, in a way: ``streams``, or its peers'. All sessions have a state before."""
    rng = case.generator()
    order = [torch.randperm(2 * case.batch, generator=rng)[: case.batch] for _ in inputs.x]
    first = torch.cat((inputs.x[-1], inputs.x[-2]))
    if way == "streams":
        streams = fastseq.Streams(layer, len(first))
        ids = torch.tensor([streams.open() for _ in first])
        streams.step(first, ids)
        steps: list[Any] = [partial(streams.step, x, ids[own]) for x, own in zip(inputs.x, order, strict=True)]
    else:
        with torch.no_grad():
            states = layer(first[None])[1]
        size, turns = (1, order) if way == "each" else (case.batch, order[:1] * len(order))
        keys = [own[::size].tolist() for own in turns]
        parts = {int(p[0]): p for own in turns for p in own.split(size)}
        live = {k: tuple(s[:, p] for s in states) if case.cell == "lstm" else states[:, p] for k, p in parts.items()}

        def run(xs: tuple[Tensor, ...], keys: list[int]) -> list[Tensor]:
            ys = []
            for x, key in zip(xs, keys, strict=True):
                y, live[key] = layer(x, live[key])
                ys.append(y)
            return ys

        steps = [partial(run, x[None].split(size, 1), own) for x, own in zip(inputs.x, keys, strict=True)]

    def step() -> Any:
        y = steps[0]()
        steps.append(steps.pop(0))
        return y

    return Entrant(step, lambda y: {"y": y if way == "streams" else torch.cat(y, 1)[0]})


def build_multihead(
    library: ModuleType, case: Multihead, state: dict[str, Tensor], dtype: torch.dtype
) -> nn.MultiheadAttention:
    """MultiheadAttention of ``library`` (torch.nn or fastseq.nn) for this case, with the given weights."""
    layer = library.MultiheadAttention(case.embed, case.heads, batch_first=True, dtype=dtype)
    layer.load_state_dict({name: weight.to(dtype) for name, weight in state.items()})
    return layer.train(case.training)


def multihead_entrant(case: Multihead, layer: nn.MultiheadAttention, inputs: LayerInputs, setting: str = "") -> Entrant:
    """One call of self-attention. The masks, which a model has from its tokenizer or makes once, are not timed."""
    options: dict[str, Any] = {"need_weights": case.weights}
    if case.causal:
        options |= {"is_causal": True, "attn_mask": torch.ones(case.steps, case.steps, dtype=torch.bool).triu(1)}
    if case.padded:
        assert inputs.lengths is not None
        options["key_padding_mask"] = torch.arange(case.steps) >= inputs.lengths[:, None]

    def named(answer: Any) -> Outputs:
        y, weights = answer
        return {"y": y} if weights is None else {"y": y, "weights": weights}

    dy = inputs.dy if case.training else None
    return entrant(lambda x: layer(x, x, x, **options), {"x": inputs.x}, named, dy, layer, setting)


def attention_entrant(
    case: Attention,
    function: Callable[..., Any],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    setting: str = "",
) -> Entrant:
    """One call of ``function(q, k, v)``. ``unpack`` brings the peer's layout of o and the gradients to the case's."""
    *qkv, d_o = inputs
    own = dict(zip("qkv", qkv, strict=True))
    dy = d_o if case.training else None
    return entrant(function, own, lambda o: {"o": unpack(o)}, dy, setting=setting, unpack=unpack)


def heads(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs.q, inputs.k, inputs.v, inputs.d_o


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
    return attention_entrant(case, partial(sdpa, **options), heads(inputs))


def cumulative(lengths: Tensor) -> Tensor:
    """int32 [B+1]: where each sequence of a packed batch begins, and the end."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def model_entrant(case: Model, inputs: Any, implementation: str) -> Entrant:
    """One call of the model, whose attention is run by this implementation."""
    model = build(case, implementation, inputs.dy.dtype)
    given = {"input_ids": inputs.tokens, "attention_mask": inputs.mask}
    if case.mode == "generate":
        given |= {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
        if case.option == "static":
            given |= {"cache_implementation": "static", "max_cache_len": 4 * case.steps}
        return Entrant(lambda: model.generate(**given), lambda y: {"tokens": y.double()}, implementation)
    dy = inputs.dy if case.training else None
    return entrant(lambda: model(**given).logits, {}, lambda y: {"y": y}, dy, model, implementation)


def fastseq_entrants(case: Case, inputs: Any, threads: int) -> Iterator[Entrant]:
    """fastseq's public layers and functions, on the backend in force."""
    if isinstance(case, Recurrent):
        layer = build_layer(fastseq.nn, case, inputs.state, case.torch_dtype)
        if case.weights:
            fastseq.patch(layer, weights=case.weights)
        if case.option and not case.norm:
            setattr(layer, case.option.replace("-", "_"), True if case.option == "recompute" else DRAWN)
        yield streams_entrant(case, layer, inputs, "streams") if case.beside else layer_entrant(case, layer, inputs)
    elif isinstance(case, Model):
        yield model_entrant(case, inputs, "fastseq")
    elif isinstance(case, Multihead):
        yield multihead_entrant(case, build_multihead(fastseq.nn, case, inputs.state, case.torch_dtype), inputs)
    elif isinstance(case, Attention) and case.kind == "varlen":
        ends = cumulative(inputs.lengths)
        options: dict[str, Any] = {"causal": case.causal, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
        yield attention_entrant(case, partial(fastseq.attention, **options), heads(inputs))
    elif isinstance(case, Attention):
        yield sdpa_entrant(case, fastseq.scaled_dot_product_attention, inputs)


def torch_entrants(case: Case, inputs: Any, threads: int) -> Iterator[Entrant]:
    """torch.nn's layers, and its scaled_dot_product_attention, in the data type of the inputs."""
    if isinstance(case, Recurrent):
        if case.cell == "gru_reset_before":
            raise Unavailable("torch has no GRU that resets before the product")
        if case.norm:
            raise Unavailable("torch has no layer normalisation within its recurrent layers")
        yield layer_entrant(case, build_layer(nn, case, inputs.state, inputs.x.dtype), inputs)
    elif isinstance(case, Model):
        yield model_entrant(case, inputs, "eager")
        if case.kind not in ("gemma2", "gpt_oss"):  # which transformers does not let use torch's function
            yield model_entrant(case, inputs, "sdpa")
    elif isinstance(case, Multihead):
        # Inference runs with and without torch's fast path, which keeps the matrix of scores. For all layers
        # `torch.backends.mha.set_fastpath_enabled(False)` turns it off; the training flag does so for this one and,
        # without dropout, changes nothing else.
        layer = build_multihead(nn, case, inputs.state, inputs.x.dtype)
        yield multihead_entrant(case, layer, inputs, "" if case.training else "fast path")
        if not case.training:
            slow = build_multihead(nn, case, inputs.state, inputs.x.dtype).train()
            yield multihead_entrant(case, slow, inputs, "no fast path")
    elif isinstance(case, Attention) and case.kind == "varlen":
        yield torch_padded(case, inputs)
        yield torch_loop(case, inputs)
    elif isinstance(case, Attention):
        yield sdpa_entrant(case, F.scaled_dot_product_attention, inputs)


def torch_padded(case: Attention, inputs: AttentionInputs) -> Entrant:
    """Unequal lengths as most code has them: padded to the longest, with a mask. Padding is not timed. Under a causal
    mask the padding comes last, so only padding sees it, and no other mask is needed."""
    assert inputs.lengths is not None
    sizes = inputs.lengths.tolist()
    live = torch.arange(max(sizes)) < inputs.lengths[:, None]  # [B,T]

    def pad(packed: Tensor) -> Tensor:  # [total,H,D] -> [B,H,T,D]
        return nn.utils.rnn.pad_sequence(list(packed.split(sizes)), batch_first=True).transpose(1, 2).contiguous()

    options: dict[str, Any] = {"is_causal": True} if case.causal else {"attn_mask": live[:, None, None]}
    padded = (pad(inputs.q), pad(inputs.k), pad(inputs.v), pad(inputs.d_o) if case.training else inputs.d_o)
    attend = partial(F.scaled_dot_product_attention, **options)
    return attention_entrant(case, attend, padded, lambda tensor: tensor.transpose(1, 2)[live], "padded")


def torch_loop(case: Attention, inputs: AttentionInputs) -> Entrant:
    """Unequal lengths one sequence at a time: more calls, no wasted work."""
    assert inputs.lengths is not None
    sizes = inputs.lengths.tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(t.transpose(0, 1)[None].split(sizes, 2) for t in (q, k, v)), strict=True)  # [1,H,t,D] each
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=case.causal) for q, k, v in sequences]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return attention_entrant(case, attend, heads(inputs), setting="loop")


ONNX_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""For each gate in ONNX's order, its index in torch's: GRU r,z,n -> z,r,h; LSTM i,f,g,o -> i,o,f,c."""


def onnx_model(case: Recurrent, state: dict[str, Tensor]) -> bytes:
    """A model of the one operator, with these weights as constants, X [T,B,I] and the first state as inputs."""
    import onnx

    kind = case.cell.partition("_")[0].upper()
    order, hidden, end = list(ONNX_GATES[kind]), case.hidden, "" if case.as_cell else "_l0"

    def reorder(name: str) -> Tensor:
        weight = state[name + end]
        return weight.reshape(len(order), hidden, -1)[order].reshape(weight.shape)

    bias = torch.cat([reorder("bias_ih"), reorder("bias_hh")])
    constants = {"W": reorder("weight_ih"), "R": reorder("weight_hh"), "B": bias}
    initializers = [onnx.numpy_helper.from_array(weight[None].numpy(), name) for name, weight in constants.items()]
    first, last = ([f"{state}_{when}" for state in ("hc" if kind == "LSTM" else "h")] for when in "0n")
    of_states = [", ".join(f"float[1,B,{hidden}] {name}" for name in names) for names in (first, last)]
    options = f"hidden_size = {hidden}" + f", linear_before_reset = {int(case.cell == 'gru')}" * (kind == "GRU")
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 17]>
        {kind} (float[T,B,{case.features}] X, {of_states[0]}) => (float[T,1,B,{hidden}] Y, {of_states[1]}) {{
            Y, {", ".join(last)} = {kind} <{options}> (X, W, R, B, "", {", ".join(first)})
        }}""")
    model.graph.initializer.extend(initializers)
    return model.SerializeToString()


def onnx_entrants(case: Case, inputs: Any, threads: int) -> Iterator[Entrant]:
    """session.run with the caller's arrays as inputs and new arrays as outputs, as a call of a layer has them: with
    spinning workers, which is the default, and without if there are workers."""
    if not isinstance(case, Recurrent):
        raise Unavailable("ONNX Runtime is a peer of the recurrent cases")
    if case.training or case.beside or case.norm:
        raise Unavailable("ONNX Runtime does inference only, keeps no sessions and has no normalised layers")
    if case.dtype != "float32":
        raise Unavailable(f"ONNX Runtime's {case.cell} takes float32 only on a CPU")
    import onnxruntime

    model = onnx_model(case, inputs.state)
    given = {"X": inputs.x, "h_0": inputs.h0} | ({} if inputs.c0 is None else {"c_0": inputs.c0})
    arrays = {name: (tensor[None] if case.as_cell else tensor).numpy() for name, tensor in given.items()}

    def outputs(answer: list[Any]) -> Outputs:
        """ONNX's Y [T,1,B,H] and states [1,B,H] as torch's layer or cell returns them."""
        y, *states = (torch.from_numpy(array) for array in answer)
        found = {f"{name}_n": s[0] if case.as_cell else s for name, s in zip("hc", states, strict=False)}
        return found if case.as_cell else {"y": y[:, 0]} | found

    def calls(session: Any) -> Callable[[], Any]:
        names, feed = [output.name for output in session.get_outputs()], dict(arrays)

        def step() -> Any:
            answer = session.run(names, feed)
            feed.update(zip(("h_0", "c_0"), answer[1:], strict=False))
            return answer

        return step if case.mode == "step" else lambda: session.run(names, feed)

    for spinning in (True, False)[: 1 if threads == 1 else 2]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        yield Entrant(calls(session), outputs, "spinning" if spinning else "not spinning")


def layer_entrants(case: Case, inputs: Any, threads: int) -> Iterator[Entrant]:
    """fastseq's layer in the place of fastseq.Streams, and without an option."""
    if not isinstance(case, Recurrent) or not (case.beside or case.option) or case.norm:
        raise Unavailable("fastseq's layer is a peer of the cases of streams and of options")
    yield layer_entrant(case, build_layer(fastseq.nn, case, inputs.state, case.torch_dtype), inputs)


def normed_loop(layer: Any, form: str, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """y and the last states of a normalised layer: what is of x alone for all steps at once, the rest step by step."""
    w_ih, w_hh, b_ih, b_hh = layer._weights()
    gains = layer._norm_weights()

    def normed(a: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(a, a.shape[-1:], gain, shift, 1e-5)

    of_x = F.linear(x, w_ih, b_ih + b_hh) if form == "joint" else normed(F.linear(x, w_ih), gains[0], b_ih)
    h, *c = (s[0] for s in (state if isinstance(state, tuple) else [state]))
    ys = []
    for a in of_x:
        product = F.linear(h, w_hh)
        if form == "joint":
            r, z, n = normed(a + product, *gains).chunk(3, -1)
            z = z.sigmoid()
            h = z * h + (1 - z) * torch.tanh(r.sigmoid() * n)
        elif c:
            i, f, g, o = (a + normed(product, gains[1], b_hh)).chunk(4, -1)
            c = [f.sigmoid() * c[0] + i.sigmoid() * g.tanh()]
            h = o.sigmoid() * normed(c[0], *gains[2:]).tanh()
        elif layer.mode == "GRU":
            (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, -1), normed(product, gains[1], b_hh).chunk(3, -1)
            z = (a_z + u_z).sigmoid()
            h = z * h + (1 - z) * torch.tanh(a_n + (a_r + u_r).sigmoid() * u_n)
        else:
            h = torch.tanh(a + normed(product, gains[1], b_hh))
        ys.append(h)
    return torch.stack(ys), (h[None], c[0][None]) if c else h[None]


def loop_entrants(case: Case, inputs: Any, threads: int) -> Iterator[Entrant]:
    """As users write it: recurrent dropout and zoneout as a loop over torch's cells, which read h times a mask, or
    whose states are in part those before; a normalised layer as a loop over its equations."""
    if not isinstance(case, Recurrent) or case.option in ("", "recompute"):
        raise Unavailable("a loop is a peer of the cases of recurrent dropout, zoneout and normalisation")
    layer: Any
    if case.norm:
        layer = build_layer(fastseq.nn, case, inputs.state, inputs.x.dtype)
        layer.forward = partial(normed_loop, layer, case.norm)
        yield layer_entrant(case, layer, inputs)
        return
    layer = build_layer(nn, case, inputs.state, inputs.x.dtype)
    cell: Any = {"rnn": torch.rnn_tanh_cell, "gru": torch.gru_cell, "lstm": torch.lstm_cell}[case.cell]

    def forward(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mask = F.dropout(torch.ones_like(inputs.h0[0]), DRAWN) if case.option == "recurrent-dropout" else None
        ys = []
        h, *c = (s[0] for s in (state if case.cell == "lstm" else [state]))
        for step in x:
            read = h if mask is None else mask * h
            found = cell(step, (read, *c) if c else read, *layer._flat_weights)
            new = list(found) if c else [found]
            if mask is None:
                new = [torch.where(torch.rand_like(s) < DRAWN, s, n) for s, n in zip((h, *c), new, strict=True)]
            h, *c = new
            ys.append(h)
        return torch.stack(ys), (h[None], c[0][None]) if c else h[None]

    layer.forward = forward
    yield layer_entrant(case, layer, inputs)


OURS = Contestant("fastseq", "fastseq", fastseq_entrants)
PEERS = {
    "torch": Contestant("torch", "torch", torch_entrants),
    "layer": Contestant("layer", "fastseq layer", layer_entrants),
    "loop": Contestant("loop", "loop over steps", loop_entrants),
    "ort": Contestant("ort", "ONNX RT", onnx_entrants, ("onnx", "onnxruntime"), alone=True),
}


def label(name: str) -> str:
    """How tables call a contestant."""
    return OURS.label if name == OURS.name else PEERS[name].label if name in PEERS else name
