"""Modules that give a recurrent layer what fastseq's layers have as an argument; ``patch`` names it in its report.

They are known by the shapes that public code has: a module with raw weights that it drops in part at each call
(``WeightDrop`` of awd-lstm-lm and torchnlp, ``WeightDropout`` of fastai), masks that all steps share, the layers of
``haste_pytorch``, cells with layer normalisation or zoneout. A name tells little of the equations, so none of them is
changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastseq import nn as fast

_RAW = re.compile(r"weight_hh\w*_raw")
_OURS = (fast.RNN, fast.GRU, fast.LSTM, fast.RNNCell, fast.GRUCell, fast.LSTMCell)
_NORMED = re.compile("layer_?norm|^LN|LN(LSTM|GRU|RNN)|(LSTM|GRU|RNN)(Cell)?LN|^Norm(LSTM|GRU)", re.I)
_MASKS = ("lockeddropout", "variationaldropout", "rnndropout")


def written_from_outside(model: nn.Module) -> dict[int, str]:
    """The layers, by id, of which another module writes weights at each call, and the reason why patch leaves them.

    That module keeps the weights as parameters of its own, ``weight_hh_l0_raw``. fastai writes into the layer's
    ``_parameters``, so that the layer alone does not show it."""
    found = {}
    for _, module in _readable(model):
        for raw in filter(_RAW.fullmatch, module._parameters):
            for child in module.children():
                if hasattr(child, raw.removesuffix("_raw")):
                    who = type(module).__name__
                    found[id(child)] = f"its {raw.removesuffix('_raw')} is written by {who} at each call"
    return found


def _readable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, but those that are scripted, whose parts are not read as of others."""
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule))


def hints(model: nn.Module) -> list[str]:
    """A line for each kind of such module in ``model``: the names of those there are, and the argument that serves."""
    groups: dict[tuple[str, str], list[str]] = {}
    covered: set[int] = set()
    recurrent = _holds(model, (nn.RNNBase, nn.RNNCellBase))
    for name, module in _readable(model):
        if isinstance(module, _OURS) or id(module) in covered:
            continue
        options = list(_options(module))
        if options:
            covered |= {id(part) for part in module.modules()}
            say = f"the layers of fastseq.nn have {', '.join(options)} for that"
        elif recurrent and _is_mask(module):
            say = "as it is between layers; on the recurrence the layers of fastseq.nn have recurrent_dropout= for that"
        else:
            continue
        groups.setdefault((type(module).__name__, say), []).append(name or "(root)")
    lines = []
    for (kind, say), names in groups.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"{shown} ({kind}): {say}")
    return lines


def _options(module: nn.Module) -> Iterator[str]:
    """The arguments, as they are written in a call, that do what this module does to a recurrence."""
    kind = type(module).__name__
    if type(module).__module__.startswith("haste_pytorch"):
        yield from _of_haste(module)
    elif (dropped := _dropped(module)) is not None:
        yield f"weight_dropout={dropped}"
    elif re.search("zone_?out", kind, re.I):
        yield f"zoneout={_value(module, 'zoneout', 'zoneout_rate', 'zoneout_prob')}"
    elif "GRU" in kind and _normalises_once(module):
        yield 'norm="joint"'
    elif re.search("LSTM|GRU|RNN", kind, re.I) and _NORMED.search(kind) and not _holds(module, nn.RNNBase):
        yield 'norm="layer"'
    elif share := _value(module, "recurrent_dropout_probability", "recurrent_dropout"):  # as in allennlp and Keras
        yield f"recurrent_dropout={share}"


def _of_haste(module: nn.Module) -> Iterator[str]:
    """LSTM, GRU and their kinds with layer normalisation: dropout is that of the recurrent kernel, an LSTM's zoneout is
    that of h alone. fastseq has no IndRNN."""
    kind = type(module).__name__.removeprefix("LayerNorm")
    if kind not in ("LSTM", "GRU"):
        return
    if kind != type(module).__name__:
        yield 'norm="layer"'
    if share := _value(module, "dropout"):
        yield f"weight_dropout={share}"
    if share := _value(module, "zoneout"):
        yield f"zoneout=({share}, 0.0)" if kind == "LSTM" else f"zoneout={share}"


def _dropped(module: nn.Module) -> str | None:
    """The share of weight_hh that a module drops at each call, "" if it does not tell; None if it drops none, other
    weights too, or whole rows of them (awd-lstm-lm's ``variational=True``)."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        held = module.parametrizations.items()  # type: ignore[operator, union-attr]
        drops = {weight: part for weight, parts in held for part in parts if "drop" in type(part).__name__.lower()}
        return _value(next(iter(drops.values())), "p", "dropout") if drops and _are_hidden(drops) else None
    inner = getattr(module, "module", None)
    raw = [n for m in (module, inner) if isinstance(m, nn.Module) for n in m._parameters if n.endswith("_raw")]
    if raw and _are_hidden(raw) and not getattr(module, "variational", False):
        own = () if isinstance(module, nn.RNNBase) else ("dropout", "p")  # torch's dropout is that between layers
        value = _value(module, "weight_p", "weight_dropout", "weight_drop", *own)
        return value if value or "drop" in kind.lower() else None
    # torchnlp's holds the layer in a closure, out of the sight of named_modules.
    bare = kind in ("WeightDrop", "WeightDropout") and "forward" in vars(module) and not list(module.children())
    return "" if bare else None


def _are_hidden(names: Iterable[str]) -> bool:
    return all(name.startswith("weight_hh") for name in names)


def _value(module: nn.Module, *names: str) -> str:
    """The first of these attributes that is a probability, as it is written; "" if none is."""
    values = (getattr(module, name, None) for name in names)
    return next((f"{value:g}" for value in values if isinstance(value, float) and 0 < value < 1), "")


def _holds(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _normalises_once(module: nn.Module) -> bool:
    """Whether it has one normalisation, of the three gates together, and no layer of torch's: the GRU of Dreamer."""
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    gates = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
    if len(norms) != 1 or len(gates) != 1 or _holds(module, (nn.RNNBase, nn.RNNCellBase)):
        return False
    return norms[0].normalized_shape == (*gates,) and max(gates) % 3 == 0


def _is_mask(module: nn.Module) -> bool:
    """A dropout of activations whose mask all steps share. What has parameters is another thing of that name."""
    kind = type(module).__name__.lower().removeprefix("input")
    return kind in _MASKS and not list(module.parameters())
