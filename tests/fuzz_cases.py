"""Drawn calls of layers, cells and attention: what they are given, and the tensors for it.

A case is a dict of plain values, so that it can be printed, sent to another process and run again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Case = dict[str, Any]
OneOf = Callable[..., Any]

FAMILIES = ["layer", "cell", "sdpa", "attention", "mha"]
CELLS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
KINDS = {
    "views": ["heads", "heads", "transposed", "moved", "sliced", "offset", "expanded", "split"],
    "negated": ["negated", "conjugated"],
    "zeros": ["zero", "zero_slice"],
    "freed": ["freed"],
    "meta": ["meta"],
    "wrapped": ["subclass", "parameter", "inference"],
}
"""By topic, what a tensor can be beside contiguous memory of its own."""
TOPICS = ["sizes", "aliases", "frozen", "autocast", "errors", *KINDS]
SPOILT = ["wider", "longer", "narrower", "dtype", "rank", "integer"]

# Choices are listed plainest first: hypothesis makes a failing case smaller towards them.
SIZES, FEW = [1, 2, 3, 5, 8, 17, 33], [1, 2, 3]
YES, NO, SELDOM, RARELY = [True, False], [False, True], [False, False, False, True], [*[False] * 7, True]
CHOICES: dict[str, dict[str, list[Any]]] = {
    "all": {
        "seed": list(range(256)), "dtype": ["float32", "float64", "bfloat16", "float16"], "training": YES,
        "mode": ["grad", "grad", "grad", "no_grad", "inference_mode"], "used": ["all", "first", "last"],
    },
    "recurrent": {
        "cell": list(CELLS), "T": SIZES, "B": SIZES, "I": SIZES, "H": SIZES, "bias": YES, "unbatched": SELDOM, "hx": NO,
    },
    "layer": {"layers": [1, 1, 2, 3], "bidirectional": NO, "batch_first": NO},
    "sdpa": {
        "B": FEW, "G": [1, 1, 2], "heads": FEW, "L": SIZES, "S": SIZES, "D": SIZES, "dims": [4, 4, 4, 3, 2, 5],
        "scale": [None, None, 0.3, -0.5, 0.0],
    },
    "attention": {
        "causal": NO, "align": ["bottom_right", "top_left"], "softcap": [0.0, 0.0, 1.5], "sinks": SELDOM,
        "slopes": SELDOM,
    },
    "mha": {
        "B": FEW, "heads": FEW, "D": [1, 2, 4, 8], "L": SIZES[:-1], "S": SIZES[:-1], "kdim": [None, None, 3],
        "vdim": [None, None, 5], "batch_first": NO, "unbatched": SELDOM, "bias": YES, "need_weights": NO,
        "average": YES, "add_bias_kv": RARELY, "add_zero_attn": RARELY, "causal": SELDOM,
        "padding": [None, None, "bool", "float"],
    },
}  # fmt: skip
PAIRS = {"LS": "LS", "BHLS": "BHLS", "BS": "B11S", "HLS": "HLS", "L1": "L1", "11": "11"}
"""Shapes of masks and biases, by name."""


def cases(family: str, topic: str, transform: str | None = None) -> st.SearchStrategy[Case]:
    """A call of ``family``; ``topic`` says what is unusual in it, ``transform`` (compile, vmap) what is around it.

    Each choice takes a byte, of which 0 is the first and plainest. Drawn one by one, hypothesis would repeat many.
    """
    return st.binary(min_size=200, max_size=200).map(lambda data: draw(family, topic, transform, iter(data)))


def draw(family: str, topic: str, transform: str | None, data: Iterator[int]) -> Case:
    def one_of(*choices: Any) -> Any:
        return choices[next(data) % len(choices)]

    def choose(table: str) -> None:
        case.update({name: one_of(*choices) for name, choices in CHOICES[table].items()})

    case: Case = {"family": family}
    choose("all")
    case["context"] = transform or ("autocast" if topic == "autocast" else one_of(*["plain"] * 4, "deterministic"))
    if topic == "autocast":
        case["dtype"] = "float32"
    if topic in ("aliases", "frozen"):  # which matter to gradients
        case["mode"] = "grad"
    empty = topic == "sizes" and one_of(*NO)
    if family in ("layer", "cell"):
        choose("recurrent")
        if family == "layer":
            choose("layer")
        draw_recurrent(case, one_of, topic, empty)
    elif family == "mha":
        choose("mha")
        draw_multihead(case, one_of, topic, empty)
    else:
        choose("sdpa")
        draw_attention(case, one_of, choose, topic, empty)
    names, parameters = list(argument_shapes(case)), parameter_names(case)
    frozen = one_of("none", "some", "all" if topic == "frozen" else "none")
    case["frozen"] = [n for n in names + parameters if frozen == "all" or (frozen == "some" and one_of(*NO))]
    case["nonleaf"] = [n for n in names if one_of(*NO)]
    if topic in KINDS:
        case["kinds"] = {one_of(*(parameters if parameters and one_of(*NO) else names)): one_of(*KINDS[topic])}
        if one_of(*NO):
            case["kinds"] |= {n: one_of(*KINDS[topic]) for n in names if one_of(*NO)}
        if topic == "meta" and one_of(*SELDOM):
            case["kinds"] = dict.fromkeys(names + parameters, "meta")
    if topic == "errors":
        case["spoilt"] = [one_of(*names), one_of(*SPOILT)]
    return case


def draw_recurrent(case: Case, one_of: OneOf, topic: str, empty: bool) -> None:
    if case["cell"] == "rnn_relu" and (case["dtype"].endswith("16") or topic == "autocast"):
        case["cell"] = "rnn_tanh"  # rounding to 16 bits carries units across the kink
    layer, lstm = case["family"] == "layer", case["cell"] == "lstm"
    case["P"] = one_of(0, 0, case["H"] - 1) if layer and lstm else 0
    if empty:
        case[one_of("B", "I", "T") if layer else one_of("B", "I")] = 0
    elif layer and not case["unbatched"] and case["context"] != "compile" and one_of(*SELDOM):
        case["lengths"] = [one_of(*range(1, case["T"] + 1)) for _ in range(min(case["B"], 8))]
        case["B"], case["T"] = len(case["lengths"]), max(case["lengths"])
        case["padded"] = topic == "freed" or one_of(*NO)  # torch's packing reads freed memory itself
    if topic == "aliases":
        case["hx"], case["P"], case["aliases"] = True, 0, {}
        if not lstm or one_of(*NO):
            case["aliases"]["h"] = ["x", one_of("same", "view")]
            case["I"] = case["H"]
            if layer:
                case.pop("lengths", None)
                case["T"] = case["layers"] * (2 if case["bidirectional"] else 1)
                case["batch_first"] &= case["unbatched"]
        if lstm:
            case["aliases"]["c"] = ["h", one_of("same", "view")]


def draw_attention(case: Case, one_of: OneOf, choose: Callable[[str], None], topic: str, empty: bool) -> None:
    sdpa = case["family"] == "sdpa"
    case["Dv"] = one_of(case["D"], case["D"], 3, 16)
    if topic == "aliases":
        case |= {"G": 1, "S": case["L"], "Dv": case["D"]}
        case["aliases"] = draw_aliases(one_of, "q", "k", "v")
    if empty:
        case[one_of(*(["heads", "heads", "D"] if sdpa else []), "B", "L", "S", "Dv")] = 0
    pairs = one_of(None, None, *PAIRS)
    if sdpa:
        if case["dims"] < 4:
            case["G"], pairs = 1, pairs and "LS"
        elif case["dims"] > 4 and pairs in ("BHLS", "BS"):
            pairs = "HLS"
        case["mask"] = pairs and [pairs, one_of("bool", "float", "float", "float32")]
        case["causal"] = pairs is None and one_of(*NO)
        return
    choose("attention")
    case["dims"], case["bias"] = 4, pairs and [pairs, "float"]
    pairs = one_of(None, None, *PAIRS)
    case["mask"] = pairs and [pairs, "bool"]
    far = one_of(2, 2, 2, 2, 2**31 - 1, 2**31, sys.maxsize - 1, sys.maxsize, 2**63)
    case["window"] = [one_of(-1, 0, 1, 3, far), one_of(-1, 0, 1, 3, far)] if one_of(*NO) else None
    for name, longest in (("lengths_q", case["L"]), ("lengths_k", case["S"])):
        case[name] = [one_of(*range(longest + 1)) for _ in range(case["B"])] if one_of(*SELDOM) else None
    if case["causal"] and one_of(*SELDOM):
        case["prefix_lengths"] = [one_of(*range(case["S"] + 1)) for _ in range(case["B"])]


def draw_multihead(case: Case, one_of: OneOf, topic: str, empty: bool) -> None:
    # A mask beside is_causal must be the causal one.
    case["mask"] = one_of(None, None, "bool", "float", *([] if case["causal"] else ["bool-3d", "float-3d"]))
    if empty:
        case[one_of("B", "L", "S")] = 0
    if topic == "aliases" or one_of(*SELDOM):
        case |= {"kdim": None, "vdim": None, "S": case["L"]}
        case["aliases"] = draw_aliases(one_of, "query", "key", "value")


def draw_aliases(one_of: OneOf, q: str, k: str, v: str) -> dict[str, list[str]]:
    """Which of query, key and value are one tensor, or views of one."""
    of = one_of({k: q}, {k: q}, {v: k}, {v: q}, {k: q, v: q})
    return {name: [other, one_of("same", "view")] for name, other in of.items()}


def argument_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every floating tensor that the call is given, parameters apart."""
    B = () if case.get("unbatched") else (case["B"],)
    if "cell" in case:
        given = 1 if not case["hx"] else 3 if case["cell"] == "lstm" else 2
        if case["family"] == "cell":
            shapes = {"x": (*B, case["I"]), "h": (*B, case["H"]), "c": (*B, case["H"])}
        else:
            many = case["layers"] * (2 if case["bidirectional"] else 1)
            time = (*B, case["T"]) if case["batch_first"] else (case["T"], *B)
            shapes = {"x": (*time, case["I"]), "h": (many, *B, case["P"] or case["H"]), "c": (many, *B, case["H"])}
        return dict(list(shapes.items())[:given])
    L, S, heads, D = case["L"], case["S"], case["heads"], case["D"]
    if case["family"] == "mha":
        lengths = {
            "query": (L, heads * D),
            "key": (S, case["kdim"] or heads * D),
            "value": (S, case["vdim"] or heads * D),
        }
        shapes = {n: (*B, t, f) if case["batch_first"] else (t, *B, f) for n, (t, f) in lengths.items()}
        return shapes | {n: s for n, (kind, s) in mask_shapes(case).items() if kind == "float"}
    lead = {2: (), 3: (heads,), 4: (*B, heads), 5: (2, *B, heads)}[case["dims"]]
    shapes = {"q": (*(n * case["G"] if i == len(lead) - 1 else n for i, n in enumerate(lead)), L, D)}
    shapes |= {"k": (*lead, S, D), "v": (*lead, S, case["Dv"])}
    shapes |= {n: s for n, (kind, s) in mask_shapes(case).items() if kind != "bool"}
    return shapes | ({"sinks": (heads * case["G"],)} if case.get("sinks") else {})


def mask_shapes(case: Case) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kind and shape of each mask and bias of a call of attention."""
    L, S = case["L"], case["S"]
    if case["family"] != "mha":
        size = {"B": case["B"], "H": case["heads"] * case["G"], "L": L, "S": S, "1": 1}
        drawn = {n: case[n] for n in ("mask", "bias") if case.get(n)}
        return {n: (kind, tuple(size[d] for d in PAIRS[pairs])) for n, (pairs, kind) in drawn.items()}
    B = () if case["unbatched"] else (case["B"],)
    masks = {}
    if case["mask"]:
        kind, _, deep = case["mask"].partition("-")
        masks["attn_mask"] = kind, (*((math.prod(B) * case["heads"],) if deep else ()), L, S)
    if case["padding"]:
        masks["key_padding_mask"] = case["padding"], (*B, S)
    return masks


def make_module(case: Case, library: Any, dtype: torch.dtype, device: str = "cpu") -> nn.Module | None:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if case["family"] == "mha":
        options |= {n: case[n] for n in ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first")}
        return library.MultiheadAttention(case["heads"] * case["D"], case["heads"], **options)
    if "cell" not in case:
        return None
    name, options["bias"] = CELLS[case["cell"]], case["bias"]
    if name == "RNN":
        options["nonlinearity"] = case["cell"].removeprefix("rnn_")
    if case["family"] == "cell":
        return getattr(library, name + "Cell")(case["I"], case["H"], **options)
    options |= {"batch_first": case["batch_first"], "bidirectional": case["bidirectional"]}
    options |= {"proj_size": case["P"]} if name == "LSTM" else {}
    return getattr(library, name)(case["I"], case["H"], case["layers"], **options)


def parameter_names(case: Case) -> list[str]:
    try:
        module = make_module(case, nn, torch.float32, device="meta")
    except ValueError:  # sizes that no layer has: ours must say so too
        return []
    return [] if module is None else [name for name, _ in module.named_parameters()]


class Subclass(Tensor):
    """A tensor of another class, without behaviour of its own."""


def placed(values: Tensor, kind: str | None) -> Tensor:
    """These values in a tensor of that kind, or contiguous where they have too few dimensions for it."""
    shape, dims = values.shape, values.dim()
    if kind in ("transposed", "heads", "moved") and dims > 1:
        a, b = {"transposed": (-2, -1), "heads": (-3 if dims > 2 else -2, -2), "moved": (0, -1)}[kind]
        return values.movedim(a, b).contiguous().movedim(b, a)
    if kind == "sliced":
        whole = values.new_full([2 * n + 1 for n in shape], math.nan)
        return whole[tuple(slice(1, None, 2) for _ in shape)].copy_(values)
    if kind == "split":  # a third of a wider product
        return values.new_full((*shape[:-1], 3 * shape[-1]), math.nan).chunk(3, -1)[1].copy_(values)
    if kind == "offset":
        return torch.cat([values.new_full((1,), math.nan), values.flatten()])[1:].view(shape)
    if kind == "expanded" and values.numel():  # of the first of them
        return values[:1].clone().expand(shape)
    if kind == "conjugated" and values.dtype != torch.bfloat16:  # contiguous, and with the negative bit
        pairs = -torch.cat([values.new_zeros(1), values.flatten(), values.new_zeros(1 + values.numel() % 2)])
        strides = torch.empty(shape, device="meta").stride()
        return torch.view_as_complex(pairs.view(-1, 2)).conj().imag.as_strided(shape, strides, 1)
    if kind in ("negated", "conjugated"):
        return torch._neg_view(-values)
    if kind == "zero":
        return torch._efficientzerotensor(shape, dtype=values.dtype)
    if kind == "zero_slice":
        return torch._efficientzerotensor((shape[0] + 1, *shape[1:]), dtype=values.dtype)[1:]
    if kind == "meta":
        return values.to("meta")
    if kind == "subclass":
        return values.clone().as_subclass(Subclass)
    with torch.inference_mode(kind == "inference"):
        return values.clone()


def spoil(values: Tensor, how: str) -> Tensor:
    """An argument that does not fit the others."""
    if how in ("wider", "longer"):
        dim = -1 if how == "wider" else 0
        return torch.cat([values, values.narrow(dim, 0, min(1, values.shape[dim]))], dim)
    if how in ("narrower", "rank"):
        return values[..., 1:] if how == "narrower" else values.unsqueeze(0)
    wider = torch.float32 if values.dtype == torch.float64 else torch.float64
    return values.to(torch.int64 if how == "integer" else wider)


def make_tensors(case: Case, truth: bool, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The floating tensors of a case; for the truth their values in float64, in plain tensors."""
    dtype, tensors = getattr(torch, case["dtype"]), {}
    kinds, aliases = case.get("kinds", {}), case.get("aliases", {})
    for name, shape in shapes.items():
        if name in aliases:
            other, how = aliases[name]
            tensors[name] = tensors[other] if how == "same" else tensors[other].view_as(tensors[other])
            continue
        kind, grad = kinds.get(name), name not in case["frozen"]
        spread = (shape[-1] or 1) ** -0.5 if "weight" in name else 0.5 if "bias" in name else 1.0
        values = (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)
        if kind in ("zero", "zero_slice"):
            values = torch.zeros_like(values)
        if kind == "expanded" and values.numel():
            values = values[:1].expand(shape)
        if "mask" in name:
            values = values.masked_fill(torch.rand(shape) < 0.2, -math.inf)
            if name == "attn_mask" and case["causal"]:  # stands for the causal mask, and is not read
                values, grad = torch.full(shape, -math.inf, dtype=dtype).triu(1), False
            if case["family"] == "sdpa" and case["mask"][1] == "float32":
                values = values.float()
        if case.get("spoilt", [None])[0] == name:
            values = spoil(values, case["spoilt"][1])
        tensor = values.double() if truth else placed(values, kind)
        if kind == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=grad)
        elif tensor.is_floating_point() and not tensor.is_inference():
            tensor = tensor.detach().requires_grad_(grad)
            tensor = tensor.view_as(tensor) if grad and name in case["nonleaf"] else tensor
        if kind == "freed" and not truth:
            tensor.untyped_storage().resize_(0)
        tensors[name] = tensor
    return tensors


def make_others(case: Case) -> dict[str, Tensor]:
    """The tensors without a gradient: bool masks, lengths and slopes."""
    masks = mask_shapes(case) if "cell" not in case else {}
    hidden = 0.3 if case["family"] == "mha" else 0.6
    others = {name: torch.rand(shape) < hidden for name, (kind, shape) in masks.items() if kind == "bool"}
    if "attn_mask" in others and case["causal"]:
        others["attn_mask"] = torch.ones_like(others["attn_mask"]).triu(1)
    if case.get("slopes"):
        others["alibi_slopes"] = torch.rand(case["heads"] * case["G"], dtype=torch.float64).to(
            getattr(torch, case["dtype"])
        )
    return others | {
        n: torch.tensor(case[n], dtype=torch.int64)
        for n in ("lengths_q", "lengths_k", "prefix_lengths")
        if case.get(n) is not None
    }
