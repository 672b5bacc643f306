"""One call on every backend: right or not, beside float64, and how long.

What is right is what the tests hold kernels to: an error of at most twice that of torch in the same dtype (its plain
products in attention), plus four roundings of the largest value.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import timeit
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import fastseq
from fastseq.backend import BackendError
from fastseq.calibration.calls import AttentionShape, ScanShape, Shape, from_values
from fastseq.calibration.file import CANNOT, PASSED, RAISED, WRONG, Verdict
from fastseq.calibration.shown import one_line

ROUNDS = 9
NOISY = 0.05
"""Spread from which there are more rounds."""
ULPS = 4
LARGEST_TRUTH = 1 << 26
"""Scores, or units times steps and batch, up to which a call is compared with float64; a larger one is compared as a
smaller one of the same features."""

Answer = dict[str, Tensor]
Call = Callable[[], Answer]


# --- calls ------------------------------------------------------------------------------------------------------------


def prepare(shape: Shape, device: torch.device, dtype: torch.dtype | None = None) -> Call:
    """A call of a shape: always the same numbers, those of ``shape.dtype`` in whatever dtype is asked for."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(shape).encode()))
    own: torch.dtype = getattr(torch, shape.dtype)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(own).to(device, dtype or own)

    made = _scan(shape, draw) if isinstance(shape, ScanShape) else _attention(shape, draw)
    leaves, run = made

    def call() -> Answer:
        with torch.set_grad_enabled(shape.training):
            answer = run()
            if shape.training:
                names = [name for name in answer if answer[name].requires_grad]
                outputs = [answer[name] for name in names]
                grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
                answer = {name: tensor.detach() for name, tensor in answer.items()}
                answer |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return answer

    return call


_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_coupled": ("LSTM", {"input_forget": True}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}


def _scan(shape: ScanShape, draw: Callable[..., Tensor]) -> tuple[Answer, Callable[[], Answer]]:
    name, options = _LAYERS[shape.cell]
    if shape.projected:
        options = options | {"proj_size": shape.projected}
    x = draw(shape.steps, shape.batch, shape.inputs)
    layer = getattr(fastseq.nn, name)(
        shape.inputs, shape.hidden, num_layers=shape.layers, bias=shape.biases, bidirectional=shape.directions > 1,
        device=x.device, dtype=x.dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(draw(*weight.shape, scale=0.6 * shape.hidden**-0.5))
    more: dict[str, Any] = {}
    if shape.lengths:
        more["lengths"] = torch.linspace(shape.steps, max(1, shape.steps // 3), shape.batch).long().to(x.device)
    if shape.reset:
        more["reset"] = (torch.arange(shape.steps * shape.batch) % 11 == 5).view(shape.steps, -1).to(x.device)
    leaves = {}
    if shape.training:
        leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    else:
        layer.requires_grad_(False)

    def run() -> Answer:
        y, last = layer(x, **more)
        states = last if isinstance(last, tuple) else (last,)
        return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}

    return leaves, run


def _attention(shape: AttentionShape, draw: Callable[..., Tensor]) -> tuple[Answer, Callable[[], Answer]]:
    batch, tokens, keys = shape.batch, shape.queries, shape.keys
    sizes = {
        "q": (batch, shape.heads, tokens, shape.dim), "k": (batch, shape.kv_heads, keys, shape.dim),
        "v": (batch, shape.kv_heads, keys, shape.dim_v),
    }  # fmt: skip
    tensors = {name: draw(*size) for name, size in sizes.items()}
    device = tensors["q"].device
    options: dict[str, Any] = {"causal": shape.causal, "align": "bottom_right" if shape.bottom_right else "top_left"}
    if shape.left >= 0 or shape.right >= 0:
        options["window"] = (shape.left, shape.right)
    if shape.softcap:
        options["softcap"] = 5.0
    if shape.sinks:
        options["sinks"] = draw(shape.heads)
    if shape.slopes:
        options["alibi_slopes"] = draw(shape.heads).abs() * 0.1
    if shape.bias:
        options["bias"] = draw(*_pairs(shape, shape.bias))
    if shape.mask:
        options["mask"] = draw(*_pairs(shape, shape.mask)) < 0.8
    if shape.lengths:
        options["lengths_k"] = torch.linspace(keys, max(1, keys // 3), batch).long().to(device)
    if shape.packed:
        tensors = {name: t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for name, t in tensors.items()}
        for name, length in (("cu_seqlens_q", tokens), ("cu_seqlens_k", keys)):
            options[name] = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    if shape.training:
        tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def run() -> Answer:
        return {"o": fastseq.attention(*tensors.values(), **options)}

    return tensors if shape.training else {}, run


def _pairs(shape: AttentionShape, dims: str) -> list[int]:
    """The shape of a mask or bias that has these dimensions."""
    sizes = {"b": shape.batch, "h": shape.heads, "q": shape.queries, "k": shape.keys, "1": 1}
    return [sizes[dim] for dim in dims]


# --- right or not -----------------------------------------------------------------------------------------------------


def compared(shape: Shape) -> Shape:
    """The shape at which a call is compared with float64: itself, or one with fewer steps, sequences, queries."""
    if isinstance(shape, ScanShape):
        if shape.steps * shape.batch * (shape.hidden + shape.inputs) * shape.walks <= LARGEST_TRUTH:
            return shape
        return shape._replace(steps=min(shape.steps, 32), batch=min(shape.batch, 16))
    if shape.batch * shape.heads * shape.queries * shape.keys <= LARGEST_TRUTH:
        return shape
    return shape._replace(batch=min(shape.batch, 2), queries=min(shape.queries, 256), keys=min(shape.keys, 2048))


class Judge:
    """The right answer of a call, and the error that each part of an answer may have."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.truth = _by_torch(shape, device, torch.float64)
        peer = _by_torch(shape, device, getattr(torch, shape.dtype))
        eps = torch.finfo(getattr(torch, shape.dtype)).eps
        self.budget = {
            name: 2 * error(peer[name], true) + (64 if shape.dtype == "float64" else ULPS) * eps * _largest(true)
            for name, true in self.truth.items()
        }

    def verdict(self, answer: Answer) -> Verdict:
        """Whether an answer is right."""
        for name, true in self.truth.items():
            off = error(answer[name], true) if answer[name].shape == true.shape else float("inf")
            if not off <= self.budget[name]:
                allowed = f"{self.budget[name]:.1e} is allowed, the largest value is {_largest(true):.1e}"
                return Verdict(WRONG, f"{name} is off by {off:.1e}; {allowed}")
        return Verdict(PASSED)


def _by_torch(shape: Shape, device: torch.device, dtype: torch.dtype) -> Answer:
    """torch's own answer; the reference's where torch has no such call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = prepare(shape, device, dtype)
    with contextlib.suppress(BackendError), fastseq.use_backend("torch"), sdpa_kernel(SDPBackend.MATH):
        return call()
    with fastseq.use_backend("reference"):
        return call()


def error(answer: Tensor, truth: Tensor) -> float:
    """Largest difference from the truth; infinite where the answer is not finite."""
    return float((answer.double() - truth).abs().max().nan_to_num(torch.inf)) if truth.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def judged(backend: str, shape: Shape, device: torch.device, judge: Judge) -> Verdict:
    """What becomes of a call on a backend."""
    try:
        with fastseq.use_backend(backend):
            return judge.verdict(prepare(shape, device)())
    except (BackendError, NotImplementedError, torch.OutOfMemoryError) as failure:
        return Verdict(CANNOT, one_line(failure))
    except Exception as failure:
        return Verdict(RAISED, f"{type(failure).__name__}: {one_line(failure)}")


# --- how long ---------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Seconds of a block of calls; ``cold``: with caches emptied before each, which is not timed."""

    def __call__(self, call: Callable[[], object], calls: int, cold: bool = False) -> float: ...


class EventClock:
    """Seconds by a GPU's own events."""

    SWEEP = 256 << 20
    """Bytes written to empty the caches: several times the largest L2."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = device
        self._dirt: Tensor | None = None

    def __call__(self, call: Callable[[], object], calls: int, cold: bool = False) -> float:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls if cold else 1)]
        torch.cuda.synchronize()
        if cold and self._dirt is None:
            self._dirt = torch.empty(self.SWEEP, dtype=torch.uint8, device=self._device)
        for start, end in pairs:
            if cold and self._dirt is not None:
                self._dirt.zero_()
            start.record()
            for _ in range(1 if cold else calls):
                call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


def host_clock(call: Callable[[], object], calls: int, cold: bool = False) -> float:
    """Seconds by the host's clock."""
    return timeit.Timer(call).timeit(calls)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return EventClock(device) if device.type == "cuda" else host_clock


def in_turns(calls: Mapping[str, Call], clock: Clock, seconds: float) -> tuple[dict[str, float], float]:
    """The median time of a call of each, over blocks in turns, about ``seconds`` for each, three times that where the
    rounds spread widely. And what a ratio of two medians may be off by."""

    def block(name: str, count: int) -> float:
        with fastseq.use_backend(name):
            return clock(calls[name], count) / count

    counts: dict[str, int] = {}
    for name in calls:
        block(name, 1)
        cost = min(block(name, 1), block(name, 1))
        counts[name] = max(1, min(1000, int(seconds / ROUNDS / max(cost, 1e-7))))
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    names, collecting = list(calls), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(3 * ROUNDS):
            if turn == ROUNDS and spread(blocks) <= NOISY:
                break
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                blocks[name].append(block(name, counts[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: max(statistics.median(found), 1e-9) for name, found in blocks.items()}, spread(blocks)


def spread(blocks: Mapping[str, list[float]]) -> float:
    """Twice the standard error of the noisiest median, as a share of it: from the interquartile range."""
    worst = 0.0
    for found in blocks.values():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        worst = max(worst, 1.86 * (high - low) / max(middle, 1e-12) / len(found) ** 0.5)
    return worst


# --- what a child is asked --------------------------------------------------------------------------------------------


def examine(item: Mapping[str, Any], tell: Callable[[str], None] = lambda backend: None) -> dict[str, Any]:
    """A call on some backends: ``out`` by backend, outcome and what is said; ``times`` by backend,
    seconds; ``spread``.

    Args:
        item: ``op`` and ``call``, the shape; ``device``; ``backends``; ``seconds`` for each, 0 to time nothing.
        tell: called with the name of the backend that is tried next.
    """
    shape, device = from_values(item["op"], item["call"]), torch.device(item["device"])
    with _on(device):
        small = compared(shape)
        tell("torch")
        judge = Judge(small, device)
        out: dict[str, Verdict] = {}
        for backend in item["backends"]:
            tell(backend)
            out[backend] = judged(backend, small, device, judge)
        del judge
        right = [backend for backend in out if out[backend].outcome == PASSED]
        if not item["seconds"] or len(right) < 1:
            return {"out": out, "times": {}}
        calls: dict[str, Call] = {}
        for backend in right:
            tell(backend)
            calls[backend] = prepare(shape, device)
            try:
                with fastseq.use_backend(backend):
                    calls[backend]()
            except torch.OutOfMemoryError as failure:
                del calls[backend]
                out[backend] = Verdict(CANNOT, one_line(failure))
        tell("timing")
        times, noise = in_turns(calls, clock_of(device), item["seconds"])
    return {"out": out, "times": times, "spread": noise}


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def answer_items(items: list[dict[str, Any]]) -> int:
    """A child's work: one line of JSON an item, and one before for each backend that it tries."""
    torch.set_num_threads(int(items[0]["threads"]))
    if items[0].get("instructions"):
        torch.ops.fastseq.native_isa(items[0]["instructions"])
    for item in items:
        try:
            result = examine(item, lambda backend: print(json.dumps({"at": backend}), flush=True))
        except Exception as failure:
            said = f"{type(failure).__name__}: {one_line(failure)}"
            result = {"out": {}, "times": {}, "failed": said}  # of torch's own answer, which is the truth
        print(json.dumps({"result": result}), flush=True)
    return 0
