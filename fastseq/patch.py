"""``patch(model)`` makes an existing model run on fastseq by swapping the class of its layers; ``unpatch`` swaps back.

Only ``module.__class__`` changes. Parameters, buffers, hooks, names, the training flag and the module's identity are
the same objects before and after, so nothing is copied and an optimizer made earlier stays valid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastseq import nn as fast
from fastseq.dtensor import is_dtensor
from fastseq.nn.compressed import KINDS, CompressedWeights
from fastseq.swapped import own_class, swapped
from fastseq.torch_calls import calls_torch, is_redirected, redirected, runs_later
from fastseq.wrapped import hints, written_from_outside

TO_FASTSEQ: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: fast.RNN,
    nn.GRU: fast.GRU,
    nn.LSTM: fast.LSTM,
    nn.RNNCell: fast.RNNCell,
    nn.GRUCell: fast.GRUCell,
    nn.LSTMCell: fast.LSTMCell,
    nn.MultiheadAttention: fast.MultiheadAttention,
    nn.TransformerEncoderLayer: fast.TransformerEncoderLayer,
}
_KIND_OF: dict[object, str] = {torch.bfloat16: "bfloat16", torch.int8: "int8", torch.qint8: "int8"}
_RECURRENT = (fast.RNN, fast.GRU, fast.LSTM, fast.RNNCell, fast.GRUCell, fast.LSTMCell)
TO_TORCH = {ours: theirs for theirs, ours in TO_FASTSEQ.items()}

_NAMES = frozenset(cls.__name__ for cls in TO_FASTSEQ)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Changed:
    """A layer whose class was swapped: its name in the model ("" for the model itself) and both classes."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Left:
    """A layer that stayed as it was: its name in the model, its class, and the reason."""

    name: str
    cls: str
    reason: str


@dataclass
class Report:
    """What :func:`patch` or :func:`unpatch` did. True if it changed a layer; its length is how many it changed.

    Attributes:
        action: ``"patch"`` or ``"unpatch"``.
        changed: the layers whose class was swapped, in the model's order; a shared layer counts once.
        left: the layers of these kinds that were not, each with the reason.
        already: names of the layers that needed no change.
        notes: what is worth knowing besides.
    """

    action: str
    changed: list[Changed] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.changed)

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(f"a Report is not a model: {self._in_place()}")

    def __getattr__(self, name: str) -> NoReturn:  # of what it does not have, as a model's train or parameters
        raise AttributeError(f"a Report has no attribute {name!r}: {self._in_place()}", name=name, obj=self)

    @staticmethod
    def _in_place() -> str:
        return "fastseq.patch and unpatch change the model in place; call them without assigning, and use the model"

    def __str__(self) -> str:
        head = f"fastseq.{self.action}: {_count(len(self.changed))} changed, {len(self.left)} left"
        if self.already:
            kind = "fastseq" if self.action == "patch" else "torch.nn"
            head += f", {len(self.already)} already {kind}"
        rows = [("changed", c.name, f"{c.old} -> {c.new}") for c in self.changed]
        rows += [("left", entry.name, f"{entry.cls}: {entry.reason}") for entry in self.left]
        width = max((len(_shown(name)) for _, name, _ in rows), default=0)
        lines = [head] + [f"  {what:<7}  {_shown(name):<{width}}  {text}" for what, name, text in rows]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def patch(
    model: nn.Module,
    *,
    weights: str | torch.dtype | None = None,
    compute: str | torch.dtype | None = None,
    keep_class: bool = False,
    functional: bool = False,
) -> Report:
    """Make every ``torch.nn`` RNN, GRU, LSTM, cell, MultiheadAttention and TransformerEncoderLayer inside ``model``
    run on fastseq, in place.

    Layers are found wherever they are, the model itself included, also under ``DataParallel`` and ``torch.compile``.
    Only exact ``torch.nn`` classes are swapped. Left as they are, with the reason in the report: subclasses, layers
    whose ``forward`` was replaced, scripted, parametrized, weight-normed, pruned and quantized ones, and those of which
    another module writes the weights. Where modules of the model drop recurrent weights, or normalise or keep states,
    the report's notes name the argument of fastseq's layers that serves. Calling it again changes nothing.

    Args:
        model: any module.
        weights: None: the kernels read the model's own weights. ``"bfloat16"`` or ``"int8"`` (a scale a row): without
            gradients, the recurrent layers and cells read copies of their float32 matrices that are half or a quarter
            the size (``torch.bfloat16``, ``torch.int8`` and ``torch.qint8`` say the same); inputs, states, biases and
            the arithmetic stay float32. For models that stream a step at a time and are bound by reading weights. The
            float32 weights stay in the model, serve in training, with ``lengths`` or ``reset``, for a PackedSequence
            and under torch.compile, and are what a state_dict holds; the copies follow their changes (an optimizer's
            step, ``load_state_dict``, any operation in place or
            assignment), save those written through ``.data`` or ``.numpy()``, from another process, or into tensors
            made in ``inference_mode``: patch again after those.
        compute: None, ``"bfloat16"`` or ``"int8"``: the same copies, and without gradients products multiply that type
            where the chip does: with AVX-512-BF16 (and VNNI) or AMX. Inputs and states are rounded to it as products
            read them (beside int8 weights to 16 bits, with a scale for each sequence and step); c, gates, outputs and
            states stay float32.
            Serves with ``lengths`` and ``reset`` and for a PackedSequence too, not with ``return_all_states``. On other
            chips as ``weights=``, which it excludes.
        keep_class: a patched layer stays an instance of the class that it had, for tools that ask
            ``isinstance(layer, torch.nn.LSTM)``. Subclasses of torch's layers that override nothing of these are then
            patched too. torch.compile breaks its graph at such layers, as it does at torch's own.
        functional: modules that call ``torch.nn.functional.scaled_dot_product_attention`` themselves call
            :func:`fastseq.scaled_dot_product_attention` instead, they and what they call, in every thread and under
            torch.compile; code outside of them is not touched. They are found by reading the code of their
            ``forward``; their class becomes a subclass of what it was. Without it the report counts them.

    Returns:
        a :class:`Report`; print it to see the table.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``weights`` or ``compute`` is not an accepted value, or both are given.

    Example:
        >>> import fastseq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LSTM(16, 32))
        >>> print(fastseq.patch(model))
        fastseq.patch: 1 layer changed, 0 left
          changed  1  torch.nn.LSTM -> fastseq.nn.LSTM
          note     tools that look for torch.nn's recurrent classes miss these layers: see keep_class=, weights="int8"
    """
    asked = {name: kind for name, kind in (("weights", weights), ("compute", compute)) if kind is not None}
    for name, kind in asked.items():
        if _KIND_OF.get(kind, str(kind)) not in KINDS:
            accepted = ", ".join(map(repr, (None, *KINDS)))
            raise ValueError(f"{name}: got {kind!r}, accepted is one of {accepted}")
    if len(asked) > 1:
        raise ValueError(
            f"weights={weights!r} and compute={compute!r}: give one of them; compute= has weights of that type too"
        )
    report = Report("patch")
    done: set[int] = set()
    modules = list(_modules(model, "patch"))
    written = written_from_outside(model)
    for name, module in modules:
        target = _target(module, keep_class)
        if target is None:
            if isinstance(module, tuple(TO_TORCH)):
                report.already.append(name)
            elif reason := _why_not_exact(module, keep_class):
                report.left.append(Left(name, _class_name(_unsharded(type(module))), reason))
        elif reason := written.get(id(module)) or _why_not_patch(module):
            report.left.append(Left(name, _class_name(_unsharded(type(module))), reason))
        elif _swap(report, name, module, target):
            done.add(id(module))
    _redirect(report, model, functional)
    report.notes += _transformers_note(model)
    report.notes += hints(model)
    report.notes += _class_note(report, keep_class)
    report.notes += _fast_path_note(model, done)
    for name, kind in asked.items():
        report.notes.append(_compress(model, _KIND_OF.get(kind, str(kind)), name == "compute"))
    return report


def _redirect(report: Report, model: nn.Module, functional: bool) -> None:
    """Give the calls of torch's attention function in a model to fastseq, or tell how many modules have some."""
    others = [(name, m) for name, m in model.named_modules() if not isinstance(m, (*TO_TORCH, torch.jit.ScriptModule))]
    report.already += [name for name, module in others if is_redirected(module)]
    callers = [(name, module) for name, module in others if not is_redirected(module) and calls_torch(module)]
    if not functional and callers:
        what = "1 module calls" if len(callers) == 1 else f"{len(callers)} modules call"
        report.notes.append(f"{what} torch's scaled_dot_product_attention: patch(..., functional=True) sends them here")
    for name, module in callers if functional else ():
        reason, target = "", None
        if "forward" in vars(module):
            reason = "a forward that was replaced on the instance"
        elif runs_later(module):
            reason = "a forward that is a generator or a coroutine"
        else:
            try:
                target = redirected(_unsharded(type(module)))
            except Exception as error:  # a class that has its say on subclasses: __init_subclass__, a metaclass
                reason = f"a class that refuses a subclass ({error})"
        if target is not None:
            _swap(report, name, module, target)
        else:
            reason = f"calls torch's scaled_dot_product_attention from {reason}"
            report.left.append(Left(name, _class_name(_unsharded(type(module))), reason))


def unpatch(model: nn.Module) -> Report:
    """Turn every fastseq layer inside ``model`` into the ``torch.nn`` layer of the same name, in place.

    The reverse of :func:`patch`; layers that were built from ``fastseq.nn`` are converted too where torch has the same
    layer. Left, with the reason: layers with an option that torch's have not, as a GRU with ``reset_after=False``, and
    subclasses of fastseq layers.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = Report("unpatch")
    for name, module in _modules(model, "unpatch"):
        cls = _unsharded(type(module))
        target = own_class(cls) or TO_TORCH.get(cls)
        if target is None:
            if cls in TO_FASTSEQ:
                report.already.append(name)
            elif isinstance(module, tuple(TO_TORCH)):
                subclass = "a subclass of a fastseq layer: its code may need what torch's does not have"
                report.left.append(Left(name, _class_name(cls), subclass))
        elif reason := _why_not_unpatch(module, target):
            report.left.append(Left(name, _class_name(cls), reason))
        else:
            options = _options(module, target)
            if _swap(report, name, module, target):
                for option in options:
                    delattr(module, option)
    return report


def _target(module: nn.Module, keep_class: bool) -> type[nn.Module] | None:
    """The class that patching gives a module; None where there is none."""
    cls = _unsharded(type(module))
    ours = TO_FASTSEQ.get(cls)
    if not keep_class or isinstance(module, tuple(TO_TORCH)):
        return ours
    if ours is None and not _overridden(cls) and not parametrize.is_parametrized(module):
        ours = next((TO_FASTSEQ[base] for base in cls.__mro__ if base in TO_FASTSEQ), None)
    return None if ours is None else _with_class(ours, cls)  # type: ignore[arg-type]


@functools.cache
def _with_class(ours: Any, cls: Any) -> type[nn.Module]:
    """Our layer as a subclass of ``cls`` too."""
    if issubclass(ours, cls):
        return ours
    return swapped(_with_class, (ours, cls), cls, (ours, cls))


def _unsharded(cls: type) -> Any:
    """The class that a module had before torch's fully_shard, which gives it a subclass."""
    fsdp = any(base.__name__ == "FSDPModule" for base in cls.__bases__[0].__mro__)
    return cls.__bases__[1] if fsdp and len(cls.__bases__) == 2 else cls


@functools.cache
def _sharded_as(cls: Any, target: Any) -> Any:
    """The class that fully_shard would have made of ``target``, where it has made ``cls``."""
    if _unsharded(cls) is cls:
        return target
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (cls.__bases__[0], target), own)


def _overridden(cls: type) -> list[str]:
    """What a subclass of a torch.nn layer has in the place of the layer's own, apart from how it is made and shown."""
    base = next((base for base in cls.__mro__ if base in TO_FASTSEQ), object)
    names = {name for between in cls.__mro__[: cls.__mro__.index(base)] for name in vars(between)}
    special = {name for name in names if name.startswith("__")} - {"__call__", "__getattr__", "__getattribute__"}
    return sorted(name for name in names - special - {"extra_repr"} if hasattr(base, name))


def _class_note(report: Report, keep_class: bool) -> list[str]:
    """What tools that look for torch's classes no longer find. Our cells and attention derive from torch's."""
    layers = {f"torch.nn.{cls.__name__}" for cls in (nn.RNN, nn.GRU, nn.LSTM)}
    if keep_class or not any(change.old in layers for change in report.changed):
        return []
    return ['tools that look for torch.nn\'s recurrent classes miss these layers: see keep_class=, weights="int8"']


def _transformers_note(model: nn.Module) -> list[str]:
    """Models of transformers choose their attention by name, from a table."""
    for _, module in model.named_modules():
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if type(module).__module__.startswith("transformers.") and chosen in ("sdpa", "eager"):
            name = type(module).__name__
            how = 'fastseq.integrations.transformers.register(), then attn_implementation="fastseq"'
            return [f"{name} takes its attention from a table of transformers ({chosen!r} now): {how}"]
    return []


def _compress(model: nn.Module, kind: str, compute: bool) -> str:
    """Give every recurrent layer of ours its smaller copies; says how many."""
    count, others, elements = 0, 0, 0
    for module in model.modules():
        if isinstance(module, _RECURRENT):
            matrices = [p for p in module.parameters(recurse=False) if p.dim() == 2 and p.dtype is torch.float32]
            if matrices and not any(getattr(module, option, None) for option in ("norm", "zoneout")):
                module._compressed = CompressedWeights(kind, compute)
                elements += sum(matrix.numel() for matrix in matrices)
                count += 1
            else:
                others += 1
    what = f"that multiply {kind}" if compute else f"with {kind} weights"
    note = f"{_count(count)} {what} in inference"
    note += f"; {_count(others)} not, having no float32 weights, a norm or zoneout" if others else ""
    kept = elements * getattr(torch, kind).itemsize
    return f"{note}; the copies take {kept / 1e6:,.1f} MB beside {4 * elements / 1e6:,.1f} MB of float32"


def _modules(model: nn.Module, action: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        fix = ": pass an instance, not the class" if isinstance(model, type) else ""
        got = _class_name(model) if isinstance(model, type) else _class_name(type(model))
        raise TypeError(f"{action}: model must be a torch.nn.Module, got {got}{fix}")
    return model.named_modules()


def _swap(report: Report, name: str, module: nn.Module, target: type[nn.Module]) -> bool:
    old = _class_name(_unsharded(type(module)))
    try:
        module.__class__ = _sharded_as(type(module), target)  # type: ignore[arg-type]
    except TypeError as error:  # a class with another memory layout (__slots__)
        report.left.append(Left(name, old, f"Python refused to swap its class: {error}"))
        return False
    shown = next((base for base in target.__mro__ if base in TO_TORCH), target)  # of a class that keeps another one
    new = "calls fastseq.scaled_dot_product_attention" if is_redirected(module) else _class_name(shown)
    report.changed.append(Changed(name, old, new))
    return True


def _why_not_exact(module: nn.Module, keep_class: bool) -> str | None:
    """The reason to report a module that is not exactly one of torch.nn's layers; None if it is unrelated."""
    cls = _unsharded(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        kind = getattr(module, "original_name", "")
        return "a ScriptModule, already compiled: patch before torch.jit.script or trace" if kind in _NAMES else None
    if cls.__name__ in _NAMES and cls.__module__.startswith(("torch.ao.", "torchao.")):
        return "a quantization layer: it keeps its weights in another form"
    base = next((theirs for theirs in TO_FASTSEQ if isinstance(module, theirs)), None)
    if base is None:
        return None
    if parametrize.is_parametrized(module):
        return "parametrized (torch.nn.utils.parametrize): its weights are computed at each call"
    if keep_class and (names := _overridden(cls)):
        return f"a subclass of {_class_name(base)} that overrides {', '.join(names)}"
    return f"a subclass of {_class_name(base)}: its own code may rely on torch's forward; see keep_class="


def _why_not_patch(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for name in _weight_names(module):
        if name not in module._parameters:
            return f"its {name} is not a parameter: weight_norm, spectral_norm, pruning or sharding computes it"
        weight = module._parameters[name]
        if weight is None:
            continue
        if type(weight) is not nn.Parameter and not is_dtensor(weight):
            return f"its {name} is a {_class_name(type(weight))}: the kernels read plain tensors"
        if weight.dtype not in _DTYPES:
            return f"its {name} has dtype {weight.dtype}: supported are {', '.join(str(d) for d in _DTYPES)}"
    out_proj = getattr(module, "out_proj", None)
    if out_proj is not None and type(out_proj).forward is not nn.Linear.forward:
        return f"its out_proj is a {_class_name(type(out_proj))}, not a torch.nn.Linear"
    return None


def _why_not_unpatch(module: nn.Module, target: type[nn.Module]) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for option in _options(module, target):
        value = vars(module)[option]
        if not option.startswith("_") and value != getattr(type(module), option):
            return f"{option}={value!r}: {_class_name(target)} has no such option"
    return None


def _options(module: nn.Module, target: type[nn.Module]) -> list[str]:
    """What is set on a layer of ours that torch's class does not have: ``reset_after``, ``_compressed``."""
    return [name for name in vars(module) if hasattr(type(module), name) and not hasattr(target, name)]


def _weight_names(module: nn.Module) -> list[str]:
    """The names under which the layer's forward looks for its weights."""
    if isinstance(module, nn.RNNBase):
        return list(module._flat_weights_names)
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]
        return names + (["bias_k", "bias_v"] if module.bias_k is not None else [])
    if isinstance(module, nn.TransformerEncoderLayer):  # its weights are its parts'
        return []
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def _fast_path_note(model: nn.Module, done: set[int]) -> list[str]:
    """An encoder layer that was left hands its attention's weights to one fused kernel of torch's in inference."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and not isinstance(module, fast.TransformerEncoderLayer)
        and id(module.self_attn) in done
        and module.self_attn.batch_first
        and module.self_attn.in_proj_bias is not None
    ]
    if not names:
        return []
    shown = ", ".join(map(_shown, names[:3])) + (", ..." if len(names) > 3 else "")
    what = "TransformerEncoderLayer uses" if len(names) == 1 else "TransformerEncoderLayers use"
    return [
        f"{len(names)} {what} torch's own fused kernel in eval mode without gradients ({shown}); "
        "torch.backends.mha.set_fastpath_enabled(False) sends them through fastseq there too"
    ]


def _class_name(cls: type) -> str:
    """torch.nn.GRU, not torch.nn.modules.rnn.GRU."""
    for public in ("torch.nn", "fastseq.nn"):
        if cls.__module__.startswith(f"{public}."):
            return f"{public}.{cls.__qualname__}"
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _shown(name: str) -> str:
    return name or "(root)"


def _count(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"
