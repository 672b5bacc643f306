"""``python -m fastseq doctor``: what works on this machine, what does not, and the command that fixes it.

Every layer is tried for real, on every device and backend, against float64 references, in a process of its own: a
kernel that crashes or hangs is one line in the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastseq import children, cli, installed

LAYERS = ("RNN", "GRU", "LSTM", "MultiheadAttention")
BACKENDS = ("auto", "reference", "torch", "native", "triton")
REQUIRABLE = {"native": "cpu", "triton": "cuda"}
"""What ``--require`` takes, and the device that it asks about."""

LIBRARY = "_native.abi3.so"
PATIENCE = 120.0
"""Seconds that one trial may take."""

Cell = tuple[str, str, str]  # device, layer, backend


@dataclass
class Findings:
    """All that the doctor found. ``table[device][layer][backend]`` is None where it works, else why not."""

    facts: dict[str, str] = field(default_factory=dict)
    table: dict[str, dict[str, dict[str, str | None]]] = field(default_factory=dict)
    runs_on: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether every layer gives right answers with the backend that is chosen for it."""
        rows = [row for device in self.table.values() for row in device.values()]
        return bool(rows) and all(row["auto"] is None for row in rows)

    def lacks(self, backend: str) -> str | None:
        """Why a backend of :data:`REQUIRABLE` does not run every layer on its device; None where it does."""
        device = REQUIRABLE[backend]
        reasons = [row[backend] for row in self.table.get(device, {}).values()] or [f"there is no device {device!r}"]
        return next((reason for reason in reasons if reason is not None), None)

    def problem(self, what: str, fix: str) -> None:
        """Note something that is wrong or missing, and the command that fixes it."""
        if not any(known["problem"] == what for known in self.problems):
            self.problems.append({"problem": what, "fix": fix})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor's options."""
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--require", choices=REQUIRABLE, metavar="BACKEND",
        help="end with status 3 where this backend does not run every layer: native (on the CPU), triton (on a GPU)",
    )  # fmt: skip
    parser.add_argument("--try", dest="cells", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Examine this machine and print what was found.

    Returns 0 where the layers work here, 1 where they do not, 3 where they do without the backend that was required.
    """
    if options.cells:
        return _try_cells(json.loads(options.cells))
    findings = examine()
    required = {options.require: findings.lacks(options.require)} if options.require else {}
    if options.json:
        print(json.dumps({"works": findings.works, "required": required, **vars(findings)}, indent=2))
    else:
        _print(findings)
        for backend, reason in required.items():
            if reason is not None:
                print(f"Required, and not here: {backend} on {REQUIRABLE[backend]}: {reason}")
    if not findings.works:
        return 1
    return 0 if all(reason is None for reason in required.values()) else 3


def examine() -> Findings:
    """Look at everything. Never raises: what breaks is shown as broken."""
    findings = Findings()
    build = installed.record()
    for name, probe in {
        "fastseq": _fastseq,
        "Python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": lambda: f"{platform.system()} {platform.release()}, {platform.machine()}, {_processor()}",
        "torch": _torch,
        "threads": _threads,
        "native kernels": lambda: _native(build),
        "instruction sets": lambda: _instruction_sets(build),
        "fast path": _fast_path,
        "CUDA kernels": lambda: _cuda_kernels(build),
        "Triton": _triton,
        "GPU": _gpu,
        "C++ compiler": _compiler,
        "nvcc": _nvcc,
        "calibration": _calibration,
        "FASTSEQ_BACKEND": lambda: os.environ.get("FASTSEQ_BACKEND", "not set: the choice is automatic"),
        "extras": _extras,
        "transformers": lambda: importlib.import_module("fastseq.integrations").transformers_here(),
    }.items():
        findings.facts[name] = _guarded(probe)
    cells = [(device, layer, backend) for device in _devices() for layer in LAYERS for backend in BACKENDS]
    for (device, layer, backend), result in _try_all(cells).items():
        findings.table.setdefault(device, {}).setdefault(layer, {})[backend] = result["reason"]
        if result.get("runs_on"):
            findings.runs_on.setdefault(device, {})[layer] = result["runs_on"]
    _guarded(lambda: _problems(findings, build))
    return findings


def _guarded(probe: Callable[[], str | None]) -> str:
    try:
        return probe() or ""
    except Exception as error:
        return f"cannot tell: {type(error).__name__}: {error}"


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else f"{shlex.join(command)} said nothing (exit status {done.returncode})"


# What is here ---------------------------------------------------------------------------------------------------------


def _fastseq() -> str:
    import fastseq

    return f"{fastseq.__version__} ({Path(fastseq.__file__).parent})"


def _other_installation() -> Path | None:
    """The folder of an installed fastseq that this one hides, as in a checkout after ``pip install .``."""
    mine = Path(__file__).resolve().parent
    for found in importlib.metadata.distributions(name="fastseq-kernels"):
        folder = Path(str(found.locate_file("fastseq"))).resolve()
        if folder != mine and (folder / "__init__.py").exists():
            return folder
    return None


def _processor() -> str:
    from fastseq.calibration.file import processor

    return processor()


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'built without CUDA'}"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} of torch's, {_cores()} cores for this process"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native(build: dict[str, Any]) -> str:
    from fastseq import ops

    if ops.NATIVE_MISSING is None:
        compiler = build.get("compiler") or "an unknown compiler"
        return f"loaded; built with {compiler}, torch {build.get('torch') or 'unknown'}"
    reason = build.get("reasons", {}).get("cpu") or ops.NATIVE_MISSING
    return f"missing: {reason}"


def _fast_path() -> str:
    from fastseq import direct

    return "on" if direct.MISSING is None else f"off, so small calls take some microseconds more: {direct.MISSING}"


def _instruction_sets(build: dict[str, Any]) -> str:
    import torch

    from fastseq import ops

    if ops.NATIVE_MISSING is not None:
        return "none"
    text = f"running {torch.ops.fastseq.native_isa('')}; built {', '.join(build.get('instruction_sets', []))}"
    left_out = [f"{name} left out: {reason}" for name, reason in build.get("instruction_sets_left_out", {}).items()]
    return "; ".join([text, *left_out])


def _cuda_kernels(build: dict[str, Any]) -> str:
    if "cuda" in build.get("built", []):
        return f"built for {', '.join(build.get('cuda_architectures', []))} with nvcc {build.get('nvcc')}"
    return "none: " + build.get("reasons", {}).get("cuda", "the build left no record")


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.metadata.version("triton")


def _gpu() -> str:
    import torch

    from fastseq import auto

    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        own = auto.device_key(torch.device("cuda", i)) in {row.device for row in auto.AUTO if " " in row.device}
        ours = "our kernels were timed on such a GPU" if own else "our kernels have not run on such a GPU yet"
        found.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB; {ours}"
        )
    return "; ".join(found)


def _calibration() -> str:
    """What was measured on the devices that are here, and is used."""
    from fastseq.calibration import shown

    return shown.in_one_line()


def _compiler() -> str:
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else next(([c] for c in ("g++", "c++", "clang++") if shutil.which(c)), [])
    return _first_line([*command, "--version"]) if command else "none on PATH"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if not found:
        return f"none in CUDA_HOME={home}" if home else "none on PATH"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
    releases = [line for line in done.stdout.splitlines() if "release" in line]
    return f"{releases[0].partition(', ')[2] if releases else 'version unknown'} ({found})"


def _extras() -> str:
    names = ("rich", "tqdm", "matplotlib", "onnxruntime")
    return ", ".join(name if importlib.util.find_spec(name) else f"no {name}" for name in names)


def _devices() -> list[str]:
    try:
        import torch

        return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    except Exception:
        return ["cpu"]


# Trials ---------------------------------------------------------------------------------------------------------------


def _try_all(cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
    """The result of every cell."""
    tried = children.each(["doctor", "--try"], cells, PATIENCE, "reason")
    return {cell: {"reason": result["lost"]} if "lost" in result else result for cell, result in tried}


def _try_cells(cells: list[Cell]) -> int:
    """The child: one line of JSON a cell."""
    for device, layer, backend in cells:
        try:
            result = _try_cell(device, layer, backend)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            named = type(error).__name__ == "BackendError"
            result = {"reason": text.partition(": ")[2] or text if named else f"{type(error).__name__}: {text}"}
        print(json.dumps(result), flush=True)
    return 0


def _try_cell(device: str, layer: str, backend: str) -> dict[str, Any]:
    """A small layer forward and backward, beside torch's own in float64."""
    import torch

    import fastseq

    def outputs(module: Any, x: Any) -> list[Any]:
        x = x.detach().requires_grad_()
        y = module(x, x, x, need_weights=False)[0] if layer == "MultiheadAttention" else module(x)[0]
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in module.parameters())]

    torch.manual_seed(0)
    sizes = (24, 3) if layer == "MultiheadAttention" else (24, 40)
    truth = getattr(torch.nn, layer)(*sizes).double()
    module = getattr(fastseq.nn, layer)(*sizes)
    module.load_state_dict(truth.state_dict())
    x = torch.randn(9, 5, 24)
    # From "auto" on the environment variable no longer counts, and it should where it is set.
    forced = os.environ.get("FASTSEQ_BACKEND") or None if backend == "auto" else backend
    module.to(device)
    with fastseq.use_backend(forced):
        got = outputs(module, x.to(device))
        x = x.to(device)
        call, how = ((x, x, x), {"need_weights": False}) if layer == "MultiheadAttention" else ((x,), {})
        runs_on = fastseq.explain(module, *call, **how).splitlines()[0] if backend == "auto" else ""
    worst = 0.0
    for value, right in zip(got, outputs(truth, x.cpu().double()), strict=True):
        error = (value.cpu().double() - right).abs().max() / right.abs().max().clamp(min=1.0)
        worst = max(worst, float(error.nan_to_num(torch.inf)))
    # float32, and TF32 on a GPU that is allowed to use it
    reason = None if worst < (1e-4 if device == "cpu" else 1e-2) else f"WRONG: off by {worst:.1e} from float64"
    return {"reason": reason, "runs_on": runs_on}


# Advice ---------------------------------------------------------------------------------------------------------------


def _install() -> str:
    """The command that installs this package again."""
    source = Path(__file__).resolve().parent.parent
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (source / "setup.py").exists():
        return f"{pip} --no-build-isolation --no-deps -e {shlex.quote(str(source))}"
    return f"{pip} --no-deps --force-reinstall --no-binary fastseq-kernels FOLDER_OR_ARCHIVE_OF_FASTSEQ"


def _problems(findings: Findings, build: dict[str, Any]) -> None:
    import torch

    from fastseq import ops

    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        findings.problem(f"torch {torch.__version__} is too old", f"{pip} 'torch>=2.10'")
    here, hidden = Path(__file__).resolve().parent, _other_installation()
    elsewhere = f"cd /   # or any folder but {here.parent}, then the same command again"
    if hidden is not None:
        findings.problem(f"the package in {here} is used, and hides the installed one in {hidden}", elsewhere)
    if ops.NATIVE_MISSING is not None:
        reason = build.get("reasons", {}).get("cpu") or ops.NATIVE_MISSING
        fix = _install()
        if hidden is not None and (hidden / LIBRARY).exists():
            reason, fix = f"they are in the hidden package, {hidden}", elsewhere
        elif findings.facts.get("C++ compiler", "").startswith("none"):
            fix = f"sudo apt install g++   # or your system's own command, then: {fix}"
        findings.problem(f"the native CPU kernels are missing ({reason})", fix)
    if "OMP_NUM_THREADS" in os.environ and torch.get_num_threads() < _cores() // 2:
        findings.problem(
            f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} on {_cores()} cores", "unset OMP_NUM_THREADS"
        )
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        fix = f"{pip} --force-reinstall torch   # a CUDA build" if torch.version.cuda is None else "nvidia-smi"
        findings.problem("this machine has an NVIDIA driver, but torch cannot use a GPU", fix)
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        findings.problem("Triton, which the GPU kernels need, is not installed", f"{pip} 'triton>=3.6'")
    if torch.cuda.is_available() and ops.NATIVE_MISSING is None and ops.NATIVE_CUDA_MISSING is not None:
        findings.problem(
            f"the CUDA C++ kernels are missing ({ops.NATIVE_CUDA_MISSING})", f"FASTSEQ_BUILD=cuda {_install()}"
        )
    broken: dict[tuple[str, str], list[str]] = {}
    for device, layers in findings.table.items():
        for layer, row in layers.items():
            for backend, reason in row.items():
                if reason and (backend in ("auto", "torch", "reference") or _broken(reason)):
                    broken.setdefault((device, reason), []).append(f"{layer} ({backend})")
    for (device, reason), where in broken.items():
        what = f"on {device}, {', '.join(where)}: {reason}"
        findings.problem(what, "unset FASTSEQ_BACKEND" if os.environ.get("FASTSEQ_BACKEND") else _install())


def _broken(reason: str) -> bool:
    return reason.startswith(("WRONG", "the trial", "no answer"))


# Printing -------------------------------------------------------------------------------------------------------------


def _print(findings: Findings) -> None:
    width = max(map(len, findings.facts))
    for name, value in findings.facts.items():
        print(f"{name:<{width}}  {value}")
    notes: list[str] = []
    for device, layers in findings.table.items():
        rows = [[f"on {device}", *BACKENDS]]
        for layer, row in layers.items():
            cells = []
            for backend in BACKENDS:
                reason = row.get(backend)
                if reason is None:
                    cells.append("works")
                else:
                    if reason not in notes:
                        notes.append(reason)
                    cells.append(f"{'BROKEN' if _broken(reason) else 'no'} [{notes.index(reason) + 1}]")
            rows.append([layer, *cells])
        print()
        cli.table(rows, {"works": "green", "BROKEN": "bold red", "no": "dim"})
        chosen = findings.runs_on.get(device, {})
        for text in dict.fromkeys(chosen.values()):
            print(f"{', '.join(layer for layer in chosen if chosen[layer] == text)}: {text}")
    if notes:
        print()
    for i, note in enumerate(notes, 1):
        print(f"[{i}] {note}")
    for entry in findings.problems:
        print(f"\nproblem: {entry['problem']}\n    fix: {entry['fix']}")
    if not findings.works:
        print("\nThe layers do NOT work here; see above.")
    elif findings.facts.get("native kernels", "").startswith("missing"):
        print("\nThe layers work here, but without the native kernels: torch's are used instead.")
    else:
        print("\nThe layers work here.")
