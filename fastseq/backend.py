"""Which implementation runs: the overrides, AUTO (``fastseq/auto.py``), and the reasons.

Order: the ``backend=`` argument, then ``with use_backend(name)``, then the environment variable ``FASTSEQ_BACKEND``,
then AUTO. A backend that was named never falls back: it raises :class:`BackendError` with the reason. AUTO takes the
first of its row that can do the work, and logs once why an earlier one could not. A row that was measured on this
machine (``fastseq/calibration``) comes before that of the table, unless torch is told to be deterministic.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Hashable
from types import TracebackType

import torch
import torch.nn.functional as F

from fastseq import auto, ops
from fastseq.calibration import chosen
from fastseq.calibration.calls import Shape
from fastseq.ops import triton as ops_triton

NAMES = ("reference", "torch", "native", "triton")

log = logging.getLogger("fastseq")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do the work; the message says why."""


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    return name


# Plain module globals: torch.compile guards them, which it cannot do with a ContextVar.
# A name from the environment is checked at its first use, so that the import and the doctor work whatever it says.
_override: str | None = os.environ.get("FASTSEQ_BACKEND", "").replace("auto", "") or None
_decisions: list[str] | Recorded | None = None  # where explain() listens, or a calibration to a model
_logged: set[tuple[str, str, str]] = set()


class use_backend:
    """Run everything inside the ``with`` block on the named backend, in every thread.

    Args:
        name: ``reference``, ``torch``, ``native`` or ``triton``; None or ``"auto"`` gives the choice back to AUTO.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import torch, fastseq
        >>> with fastseq.use_backend("reference"):
        ...     y, h_n = fastseq.nn.GRU(3, 5)(torch.randn(7, 2, 3))
        >>> y.shape
        torch.Size([7, 2, 5])
    """

    def __init__(self, name: str | None) -> None:
        self.name = None if name in (None, "auto") else _checked(name, "use_backend")

    def __enter__(self) -> use_backend:
        global _override
        self._previous, _override = _override, self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _override
        _override = self._previous


def forced(argument: str | None = None) -> str | None:
    """The backend named by argument, ``use_backend`` or the environment; None leaves the choice to AUTO."""
    if argument is not None and argument != "auto":
        return _checked(argument, "backend")
    return None if _override is None else _checked(_override, "FASTSEQ_BACKEND")


Asked = tuple[Shape, torch.device]
"""A call with all that calibration knows of it."""


class Recorded:
    """The calls that AUTO was asked about, each once, and on which device."""

    def __init__(self) -> None:
        self.calls: dict[Asked, None] = {}

    def note(self, asked: Asked | None) -> None:
        """Takes down a call; not one whose sizes are open."""
        if asked is not None and all(type(value) in (str, int, bool) for value in asked[0]):
            self.calls[asked] = None


def listen(on: Recorded | list[str] | None) -> Recorded | list[str] | None:
    """Makes ``on`` what hears of decisions; returns what did before."""
    global _decisions
    before, _decisions = _decisions, on
    return before


def wants_description(device: torch.device) -> bool:
    """Whether a call on a device is to be described to :func:`resolve`: something was measured there, or a calibration
    listens."""
    if isinstance(_decisions, Recorded):
        return True
    return chosen.exists(device.type, device.index or 0) and not torch.are_deterministic_algorithms_enabled()


def resolve(
    op: str,
    kind: str,
    device: str,
    reasons: Callable[[str], str | None],
    argument: str | None = None,
    asked: Asked | None = None,
) -> str:
    """Choose a backend.

    Args:
        op: ``scan`` or ``attention``.
        kind: the call's, of ``auto.scan_kind`` or ``auto.attention_kind``.
        device: ``auto.device_key`` of the input's.
        reasons: tells of a backend why it cannot do this call; None where it can.
        argument: the caller's ``backend=``.
        asked: the call itself, where :func:`wants_description`.

    Raises:
        BackendError: the backend named cannot do it.
    """
    if isinstance(_decisions, list):
        measured = None if asked is None else chosen.row(*asked)
        _explain(measured or auto.row(device, op, kind), device, reasons, argument)
    named = forced(argument)
    if named is None and isinstance(_decisions, Recorded) and not torch.compiler.is_compiling():
        _decisions.note(asked)
    if named is not None:
        reason = reasons(named)
        if reason is not None:
            raise BackendError(f"backend {named!r} cannot run this {op}: {reason}")
        return named
    order = (() if asked is None else chosen.order(op, *asked)) or auto.row(device, op, kind).order
    if tracing():  # what torch's own layers do can be saved, loaded without this package, and differentiated
        order = ("torch", *order)
    elif exporting_onnx():  # ONNX knows torch's operators, not ours
        order = ("torch", "reference")
    for name in order:
        reason = reasons(name)
        if reason is None:
            if tracing() and name != "torch":
                _warn_of_trace(op, reasons("torch"))
            return name
        if not torch.compiler.is_compiling():
            _log_once(op, name, reason)
    raise BackendError(f"no backend can run this {op} on {device}: " + "; ".join(f"{n}: {reasons(n)}" for n in NAMES))


def _warn_of_trace(op: str, reason: str | None) -> None:
    warnings.warn(
        f"this trace holds fastseq's operator of {op}, since {reason}: import fastseq where it is loaded, and "
        "export to ONNX with dynamo=True",
        torch.jit.TracerWarning,
        stacklevel=2,
    )


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        log.info("%s: %s skipped: %s", op, name, reason)


def operator_reason(name: str, device: str, op: str = "scan") -> str | None:
    """Why an operator backend (``native``, ``triton``) cannot run ``op`` (``scan``, ``attention``) on a device at all;
    None where it can."""
    if name == "native":
        if ops.NATIVE_MISSING is not None:
            return f"the compiled extension is not installed ({ops.NATIVE_MISSING}); see python -m fastseq doctor"
        if device == "cuda":
            if ops.NATIVE_CUDA_MISSING is None:
                return None
            return f"the CUDA kernels are not installed ({ops.NATIVE_CUDA_MISSING}); see python -m fastseq doctor"
        if device != "cpu":
            return f"the native kernels of {op} run on the CPU and on CUDA, not on {device}"
        return None
    if name == "triton":
        return ops_triton.missing(device)
    return None


class _NativeFirst(dict[str, bool]):
    """By operation, whether every plain call on the CPU goes to the native kernels: by AUTO's table, and by what was
    measured, which is read when the first call asks."""

    def __missing__(self, op: str) -> bool:
        found = _first_in_table(op) and chosen.native_first(op)
        self[op] = found
        return found


_NATIVE_FIRST = _NativeFirst()


def _first_in_table(op: str) -> bool:
    return ops.NATIVE_MISSING is None and auto.row("cpu", op).order[0] == "native"


def _traced_native_first(op: str) -> bool:
    return _NATIVE_FIRST[op]


_traced_native_first._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo reads no file


def measured_anew() -> None:
    """Has the next call look at what was measured."""
    chosen.forget()
    _NATIVE_FIRST.clear()
    _native_for.clear()


def divided(op: str) -> bool:
    """Whether measurements send some plain calls on the CPU elsewhere, and nothing else than them decides: each call is
    then asked for (:func:`native_for`)."""
    if _decisions is not None or (_override is not None and _override != "native"):
        return False
    if op == "attention" and context_parallel():
        return False
    return not _NATIVE_FIRST[op] and _first_in_table(op)


_native_for: dict[Hashable, bool] = {}


def native_for(key: Hashable, shape: Callable[[], Shape | None]) -> bool:
    """Whether a plain call on the CPU goes to the native kernels, where those of its operation are divided.

    Args:
        key: equal for calls of the same shape; the answer is kept.
        shape: makes it; None of a call that is left to the general path.
    """
    if _override == "native" or torch.are_deterministic_algorithms_enabled():
        return True
    found = _native_for.get(key)
    if found is None:
        made = shape()
        row = None if made is None else chosen.row(made, _CPU)
        found = made is not None and (row is None or row.order[0] == "native")
        if len(_native_for) >= 4096:  # every length is another key
            _native_for.clear()
        _native_for[key] = found
    return found


_CPU = torch.device("cpu")


def tracing() -> bool:
    """Whether ``torch.jit.trace`` records this call."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def keeps_a_tape() -> bool:
    """Whether a backward pass may come. An exported program has none; to Dynamo every program is an exported one."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.is_grad_enabled() and not exporting


def exporting_onnx() -> bool:
    """Whether ``torch.onnx.export`` captures this call for its graph."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def native_scan() -> bool:
    """Whether every scan on the CPU goes to the native kernels, asked without any detail of the call."""
    return _NATIVE_FIRST["scan"] and (_override is None or _override == "native") and _decisions is None


def native_scan_in_general() -> bool:
    """:func:`native_scan`, which ``torch.compile`` may trace."""
    if not torch.compiler.is_compiling():
        return native_scan()
    return _traced_native_first("scan") and (_override is None or _override == "native") and _decisions is None


def native_attention() -> bool:
    """Whether attention on the CPU does, likewise."""
    ours = _NATIVE_FIRST["attention"] and (_override is None or _override == "native") and _decisions is None
    return ours and (F.scaled_dot_product_attention is _SDPA or not context_parallel())


_SDPA = F.scaled_dot_product_attention


def context_parallel() -> bool:
    """Whether torch's ``context_parallel`` is on: tensors are shards then of a longer sequence, and torch has put a
    function of its own in the place of its attention."""
    current = F.scaled_dot_product_attention
    if current is _SDPA:
        return False
    return (getattr(current, "__module__", None) or "").startswith("torch.distributed.tensor.experimental")


def check_not_context_parallel() -> None:
    """Refuses to attend to the keys of one shard alone."""
    if context_parallel():
        raise BackendError(
            "inside torch's context_parallel q, k and v are shards of the sequence, and fastseq's kernels do not "
            "exchange them: call torch.nn.functional.scaled_dot_product_attention or "
            "fastseq.scaled_dot_product_attention there, without naming a backend"
        )


def explain_native(op: str, attempt: Callable[..., object], *args: object) -> None:
    """Where explain() listens, which turns the native calls of whole layers off: makes this one after all, and says so
    if it takes the arguments (a result that is not None)."""
    global _decisions
    if not isinstance(_decisions, list):
        return
    listening, _decisions = _decisions, None
    try:
        done = attempt(*args)
    finally:
        _decisions = listening
    if done is not None:
        _explain(auto.row("cpu", op), "cpu", lambda n: operator_reason(n, "cpu", op), None)


class _Explained(Exception):
    """Ends the call that explain() listens to: the decision is known, nothing needs computing."""


def _explain(row: auto.Row, device: str, reasons: Callable[[str], str | None], argument: str | None) -> None:
    assert isinstance(_decisions, list)
    named = forced(argument)
    candidates = (named,) if named is not None else row.order
    chosen = next((n for n in candidates if reasons(n) is None), None)
    how = f"named: {named}" if named is not None else f"AUTO for {row.title}: {row.because}"
    _decisions.append(f"{row.op} on {device} runs on: {chosen or 'nothing'} ({how})")
    for name in NAMES:
        if name == chosen:
            continue
        reason = reasons(name)
        if reason is None:
            later = name in candidates
            reason = f"can, but {chosen} comes first" if later else "can, but is not in AUTO's row for this device"
            if named is not None:
                reason = f"can, but {named} was named"
        _decisions.append(f"  {name}: {reason}")
    raise _Explained


def explain(layer_or_function: Callable, *args: object, **kwargs: object) -> str:
    """Say which backend a call would run on, and why the others would not. Nothing is computed; but a whole
    MultiheadAttention is run, where only its native call can tell whether it takes the arguments.

    A call that wants gradients may run elsewhere than the same under ``torch.no_grad()``: ask as you would call.

    Args:
        layer_or_function: a layer of ``fastseq.nn``, a model that contains one, or a function of this package.
        *args, **kwargs: what it would be called with.

    Returns:
        Lines of text; of the first call met, where a model makes several.

    Example:
        >>> import torch, fastseq
        >>> print(fastseq.explain(fastseq.nn.GRU(3, 5), torch.randn(7, 2, 3)).splitlines()[0])  # doctest: +ELLIPSIS
        scan on cpu runs on: ...
    """
    global _decisions
    said: list[str] = []
    previous, _decisions = _decisions, said
    try:
        layer_or_function(*args, **kwargs)
    except _Explained:
        copies = getattr(layer_or_function, "_compressed", None)  # of fastseq.patch(weights=, compute=)
        return "\n".join(said if copies is None else (*said, f"without gradients from smaller copies: {copies}"))
    finally:
        _decisions = previous
    return "this call reaches no operation of fastseq"


def backends() -> dict[str, str | None]:
    """Every backend's name, and why it cannot run at all on this machine (None where it can)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "reference": None,
        "torch": None,
        "native": operator_reason("native", "cpu"),
        "triton": operator_reason("triton", device),
    }
