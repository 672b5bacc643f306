"""Runs a drawn call by fastseq, by torch, and by torch in float64, and says what is wrong with the first.

As a program it runs the case that it is given, or, without one, serves cases that come by a pipe (:class:`Runner`).
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_support import peer as formula
from fuzz_cases import Case, argument_shapes, make_module, make_others, make_tensors
from support import error, fill_new_memory_with_junk, flat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

Fault = tuple[str, str]  # what is wrong, in a fixed word or two; and the details
DEADLY: Case = {"family": "ends the process"}
# What a mistake of ours raises, rather than a look at the arguments.
UNCLEAR = (AttributeError, IndexError, KeyError, AssertionError, OverflowError, ZeroDivisionError, UnboundLocalError)


@dataclass
class Answer:
    """What a call gave."""

    outputs: list[Tensor] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)  # arguments that were written to
    error: Exception | None = None


def make_call(case: Case, side: str) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, Tensor]]:
    """What to call, the floating tensors to call it with, and the parameters behind it."""
    torch.manual_seed(case["seed"])
    dtype = torch.float64 if side == "truth" else getattr(torch, case["dtype"])
    given, others = make_tensors(case, side == "truth", argument_shapes(case)), make_others(case)
    module = make_module(case, fastseq.nn if side == "ours" else nn, dtype)
    if module is not None:
        torch.manual_seed(case["seed"] + 1)
        module.train(case["training"])
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        plain = {**case, "aliases": {}, "nonleaf": []}
        for name, tensor in make_tensors(plain, side == "truth", shapes).items():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, nn.Parameter(tensor.detach(), tensor.requires_grad))
    call = (
        call_recurrent
        if "cell" in case
        else {"mha": call_multihead, "sdpa": call_sdpa}.get(case["family"], call_attention)
    )
    parameters = {} if module is None else dict(module.named_parameters())
    return lambda **tensors: call(case, side, module, **others, **tensors), given, parameters


def call_recurrent(
    case: Case, side: str, module: Any, x: Tensor, h: Tensor | None = None, c: Tensor | None = None
) -> Any:
    hx, first = h if c is None else (h, c), case.get("batch_first", False)
    if "lengths" not in case:
        return module(x, hx)
    if case["padded"] and side == "ours":
        return module(x, hx, lengths=torch.tensor(case["lengths"], device=x.device))
    y, last = module(pack_padded_sequence(x, case["lengths"], first, enforce_sorted=False), hx)
    return (
        (pad_packed_sequence(y, first, total_length=x.shape[1 if first else 0])[0], last)
        if case["padded"]
        else (y, last)
    )


def call_multihead(
    case: Case, side: str, module: Any, query: Tensor, key: Tensor, value: Tensor, **masks: Tensor
) -> Any:
    options = {
        "need_weights": case["need_weights"],
        "average_attn_weights": case["average"],
        "is_causal": case["causal"],
    }
    return module(query, key, value, **masks, **options)


def call_sdpa(
    case: Case, side: str, module: None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    function = fastseq.scaled_dot_product_attention if side == "ours" else F.scaled_dot_product_attention
    with ExitStack() as stack:
        if side == "truth":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return function(q, k, v, mask, 0.0, case["causal"], scale=case["scale"], enable_gqa=case["G"] > 1)


def call_attention(case: Case, side: str, module: None, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> Any:
    options = {n: case[n] for n in ("causal", "align", "softcap")} | tensors
    window = case["window"] and tuple(case["window"])
    if side == "ours":
        return fastseq.attention(q, k, v, scale=case["scale"], window=window, return_lse=case["training"], **options)
    scale = 1.0 if case["scale"] is None else case["scale"] * q.shape[-1] ** 0.5
    # A side that is so far limits nothing: the sums with it are not left to the reference.
    window = window and tuple(-1 if side > 10**6 else side for side in window)
    o, lse = formula(q * scale, k, v, window=window, **options)
    return (o, lse) if case["training"] else o


@contextmanager
def surroundings(case: Case, side: str) -> Iterator[None]:
    with ExitStack() as stack:
        if case["context"] == "autocast" and side != "truth":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if case["mode"] != "grad":
            stack.enter_context(getattr(torch, case["mode"])())
        if case["context"] == "deterministic":
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, False)
        yield


def run(case: Case, side: str) -> Answer:
    """One side of a case: ``ours``, ``torch``, or ``truth``, which is torch in float64 on plain tensors."""
    answer = Answer()
    try:
        call, given, parameters = make_call(case, side)
        tensors = {**given, **parameters}
        versions = {name: t._version for name, t in tensors.items() if not t.is_inference()}
        with surroundings(case, side):
            result = transformed(case, side, call, given)
        answer.structure, answer.outputs = structure(result), flat(result)
        used = {"all": slice(None), "first": slice(1), "last": slice(-1, None)}[case["used"]]
        outputs = [o for o in answer.outputs[used] if o.requires_grad]
        names = {id(t): name for name, t in reversed(tensors.items()) if t.requires_grad}  # each tensor once
        if case["mode"] == "grad" and outputs and names:
            torch.manual_seed(case["seed"] + 2)
            # Eighths are exact in every dtype, so that all sides get the same.
            weights = [(torch.randint(-16, 17, o.shape) / 8).to(o.device, o.dtype) for o in outputs]
            leaves = [tensors[name] for name in names.values()]
            found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
            answer.gradients = dict(zip(names.values(), found, strict=True))
        answer.changed = [name for name, version in versions.items() if tensors[name]._version != version]
    except Exception as problem:  # held to what the other side raises
        answer.error = problem
    return answer


def transformed(case: Case, side: str, call: Callable[..., Any], given: dict[str, Tensor]) -> Any:
    """The call; under vmap over two of its first argument, or compiled, where the case says so."""
    first = next(iter(given))
    if case["context"] == "vmap":
        pair = torch.stack([given[first], 0.5 * given[first]])
        if side == "ours":
            return torch.func.vmap(lambda x: tuple(flat(call(**{**given, first: x}))))(pair)
        results = [flat(call(**{**given, first: x})) for x in pair]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    if case["context"] == "compile" and side == "ours":
        torch._dynamo.reset()
        return torch.compile(call, backend="aot_eager")(**given)
    return call(**given)


def structure(result: Any) -> list[str]:
    if isinstance(result, tuple):
        return [type(result).__name__, *(word for part in result for word in structure(part))]
    return ["Tensor" if isinstance(result, Tensor) else type(result).__name__]


def faults_of(case: Case, stage: Callable[[str], None] = lambda name: None) -> list[Fault]:
    """What is wrong with a call; ``stage`` hears who is about to run it."""
    stage("ours")
    if case == DEADLY:
        os.kill(os.getpid(), signal.SIGSEGV)
    ours = Answer() if case.get("alone") else run(case, "ours")
    stage("torch")
    torchs = run(case, "torch")
    if case.get("alone"):
        return []
    far = case["family"] == "attention" and case["window"] is not None and max(case["window"]) >= 2**63
    if far and isinstance(ours.error, fastseq.ArgumentError):
        return []
    if ours.error is None and torchs.error is None:
        return compare(case, ours, torchs, run(case, "truth"))
    text = f"ours {ours.error!r:.400}; torch {torchs.error!r:.400}"
    if ours.error is None or torchs.error is None:
        return [(f"only {'torch' if ours.error is None else 'ours'} raises", text)]
    unclear = isinstance(ours.error, UNCLEAR) and type(ours.error) is not type(torchs.error)
    return [("unclear error", text)] if unclear else []


def compare(case: Case, ours: Answer, torchs: Answer, truth: Answer) -> list[Fault]:
    if ours.structure != torchs.structure:
        return [("structure", f"{ours.structure} where torch returns {torchs.structure}")]
    meta = any(t.is_meta for t in torchs.outputs)
    if truth.error is not None and not meta:
        return [("no truth", f"{truth.error!r:.300}")]
    faults: list[Fault] = [("changed", f"{name} was changed in place") for name in ours.changed]
    attention = case["family"] in ("sdpa", "attention")
    # Without elements torch 2.14 has no gradient of a mask.
    empty = any(case.get(size) == 0 for size in ("B", "heads", "L", "S", "D", "Dv"))
    strides = not attention and case["context"] not in ("vmap", "compile") and not case.get("padded")
    for i, (o, t) in enumerate(zip(ours.outputs, torchs.outputs, strict=True)):
        what = f"output {i}"
        faults += compare_form(what, o, t)
        if o.requires_grad != t.requires_grad and case["family"] != "attention" and not empty:
            faults.append(("requires_grad", f"{what}: ours {o.requires_grad}, torch {t.requires_grad}"))
        if strides and t.is_contiguous() and not o.is_contiguous():
            faults.append(("layout", f"{what}: strides {o.stride()}, where torch's are {t.stride()}, contiguous"))
        if attention and i == 0 and case["context"] != "vmap":
            faults += compare_layout(case, o, t)
        if not faults and not meta:
            # Near 0 a result is a sum that cancels. The lse of 16 bits is made as well as they need.
            lse = attention and i == 1
            floor = 16 if lse and case["dtype"].endswith("16") else 4 * case.get("layers", 1)
            faults += compare_values(case, "value", what, o, t, truth.outputs[i], floor, 1.0 if lse else 0.25)
    # Those that come in are up to 2, and cancel: in a softmax of one key, or times 1 - h² in a unit that is saturated.
    scale = max(largest(g) for g in (*truth.gradients.values(), torch.tensor(2.0)) if g is not None)
    for name in torchs.gradients:
        o, t, what = ours.gradients.get(name), torchs.gradients[name], f"gradient of {name}"
        if o is None or t is None:
            alone = empty or case["family"] == "attention"  # of which lse does not depend on v
            zeros = alone and o is not None and not o.any()
            faults += (
                [("None gradient", f"{name}: ours {form(o)}, torch {form(t)}")] if o is not t and not zeros else []
            )
            continue
        faults += compare_form(what, o, t)
        if not faults and not meta:
            # exp carries the rounding of a score, which is a few times larger than 1, over to its weight.
            floor = 8.0 * case.get("layers", 1) if "cell" in case and o.dtype.itemsize > 2 else 16.0
            if name in ("mask", "bias"):  # a sum over what it is broadcast along
                floor *= (
                    max(1.0, case["B"] * case["heads"] * case["G"] * case["L"] * case["S"] / max(1, o.numel())) ** 0.5
                )
            faults += compare_values(case, "gradient", what, o, t, truth.gradients[name], floor, scale)
    return faults


def form(t: Tensor | None) -> str:
    return "None" if t is None else f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}@{t.device}"


def largest(t: Tensor) -> float:
    return float(t.detach().double().abs().nan_to_num(0.0).max()) if t.numel() else 0.0


def compare_form(what: str, ours: Tensor, torchs: Tensor) -> list[Fault]:
    if form(ours) == form(torchs):
        return []
    return [("dtype or shape", f"{what}: ours {form(ours)}, torch {form(torchs)}")]


def compare_layout(case: Case, o: Tensor, torchs: Tensor) -> list[Fault]:
    """The output of attention lies in memory as torch's, or as q does: without gaps, and its features side by side."""
    q = make_call(case, "ours")[1]["q"]
    order = sorted((d for d in range(q.dim() - 1) if q.shape[d] > 1), key=q.stride)
    strides = [q.stride(d) for d in order]
    if o.numel() == 0 or o.stride() == torchs.stride() or o.dim() != q.dim() or len({0, *strides}) <= len(strides):
        return []
    step = 1
    for d in [o.dim() - 1, *(d for d in range(o.dim() - 1) if d not in order), *order]:
        if o.shape[d] > 1 and o.stride(d) != step:
            return [
                ("layout", f"o {list(o.shape)} has strides {o.stride()}, torch's {torchs.stride()}, q's {q.stride()}")
            ]
        step *= o.shape[d]
    return []


def compare_values(
    case: Case, code: str, what: str, ours: Tensor, torchs: Tensor, truth: Tensor, floor: float, scale: float
) -> list[Fault]:
    """The rule of tests/support.py, with a floor relative to ``scale`` where that is larger than the truth."""
    ours, torchs, truth = ours.detach(), torchs.detach(), truth.detach()
    if not ours.is_floating_point():
        return [] if torch.equal(ours, torchs) else [(code, f"{what}: {ours} where {torchs} was expected")]
    if truth.isnan().any():  # a row that sees nothing
        return [] if ours.isfinite().all() else [(code, f"{what}: not finite; torch has NaN")]
    infinite = truth.isinf()
    if not torch.equal(ours[infinite].double(), truth[infinite]):
        return [(code, f"{what}: {ours[infinite]} where {truth[infinite]} was expected")]
    ours, torchs, truth = (t.masked_fill(infinite, 0.0) for t in (ours, torchs, truth))
    eps = torch.finfo(ours.dtype if code == "value" else getattr(torch, case["dtype"])).eps
    if case["context"] == "autocast":
        eps = torch.finfo(torch.bfloat16).eps
    if case["dtype"] == "float64":
        floor = max(floor, 64)
    scale = max(scale, largest(truth))
    budget, found = 2 * error(torchs.nan_to_num(), truth) + floor * eps * scale, error(ours, truth)
    if found <= budget:
        return []
    return [(code, f"{what}: error {found:.3g} over the budget of {budget:.3g} (largest value {scale:.3g})")]


class Runner:
    """Runs cases in a child process, and says which one that died of."""

    LIMIT = 300.0  # seconds for one case

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.child: Any = subprocess.Popen([sys.executable, str(Path(__file__))], env=environment, **pipes)

    def faults_of(self, case: Case) -> list[Fault]:
        self.child.stdin.write(json.dumps(case).encode() + b"\n")
        stage = "nobody"
        while True:
            if not select.select([self.child.stdout], [], [], self.LIMIT)[0]:
                self.close()
                raise AssertionError(f"{stage} did not end within {self.LIMIT} s: '{json.dumps(case)}'")
            reply = json.loads(self.child.stdout.readline())
            if "faults" in reply:
                return [tuple(fault) for fault in reply["faults"]]
            if "died" in reply:
                died = [("died", f"the process ended, status {reply['died']}")]
                if stage == "torch" and reply["died"] < 0:  # ours has been run before, and did not end it
                    return died if case.get("alone") else []
                # Nor is it held against us that a kernel of torch ends it, which torch's layer runs too.
                return died if case == DEADLY or not self.faults_of({**case, "alone": True}) else []
            stage = reply["stage"]

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def serve() -> None:
    """Answers cases, one a line. The process that does is a fork, and another one follows when it has died."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**what: Any) -> None:
        replies.write(json.dumps(what) + "\n")

    while True:
        pid = os.fork()
        if pid == 0:
            fill_new_memory_with_junk(True)
            for line in iter(sys.stdin.readline, ""):
                reply(faults=faults_of(json.loads(line), lambda name: reply(stage=name)))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return
        reply(died=status)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        fill_new_memory_with_junk(True)
        for fault in faults_of(json.loads(sys.argv[1])):
            print(*fault, sep=": ")
    else:
        serve()
