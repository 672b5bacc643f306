"""Compiles kernels against the emulated machine into a library, and calls it: plainly in this process, or by a program
of its own under ThreadSanitizer or AddressSanitizer.

    library = Library([Path("csrc/recurrent/cuda/recurrent.cu"), Path("tests/emulation/recurrent_entries.cpp")])
    error = library.call("scan_forward", [x, w, y], [T, B, H], [0.5], seed=3, schedule=PRIORITY)

An entry is written with FASTSEQ_ENTRY of entry.h. Its pointers are CPU tensors or numpy arrays (contiguous; None is a
null pointer), which it changes in place in every mode.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulation"
BUILD = ROOT / "build" / "emulation"

IN_ORDER, UNIFORM, STICKY, PRIORITY = range(4)

BASE = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread", "-DFASTSEQ_EMULATION"]
# The machine is compiled without sanitizers and without turning its loops into calls that they would follow.
MACHINE = ["-O2", "-ftree-vectorize", "-fno-tree-loop-distribute-patterns"]
SANITIZERS = {
    "": ([], []),
    "thread": (["-fsanitize=thread"], ["-DFASTSEQ_THREAD_SANITIZER"]),
    "address": (["-fsanitize=address", "-fno-omit-frame-pointer"], ["-DFASTSEQ_ADDRESS_SANITIZER"]),
}
RUNTIME = [
    "scheduler.cpp",
    "work.cpp",
    "switch.cpp",
    "barriers.cpp",
    "memory.cpp",
    "matrix.cpp",
    "bulk.cpp",
    "wgmma.cpp",
    "entry.cpp",
]
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def compiler() -> str | None:
    """A C++20 compiler, or None."""
    return shutil.which(os.environ.get("CXX", "") or "g++")


def included(path: Path, folders: Sequence[Path], seen: dict[Path, bytes]) -> None:
    """Collects a file and, by the includes in quotes, all files that it is made of."""
    path = path.resolve()
    if path in seen:
        return
    seen[path] = path.read_bytes()
    for name in INCLUDE.findall(seen[path].decode()):
        for folder in (path.parent, *folders):
            if (folder / name).is_file():
                included(folder / name, folders, seen)
                break


def compile_one(source: Path, flags: Sequence[str], folders: Sequence[Path]) -> Path:
    """Compiles a source into build/emulation unless the same text has been compiled so before; returns the object."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("there is no C++ compiler here; install g++ 12 or newer")
    seen: dict[Path, bytes] = {}
    included(source, folders, seen)
    # The texts say all that the folders' names could, and a changed copy shares what is not changed in it.
    command = [cxx, *BASE, *flags]
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted(seen):
        digest.update(path.name.encode() + b"\0" + seen[path])
    target = BUILD / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        run([*command, *(f"-iquote{folder}" for folder in folders), "-x", "c++", "-c", str(source)], target)
    return target


def run(command: list[str], target: Path) -> None:
    """Runs a compiler, once though several test processes ask; its output appears whole or not at all."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            make(command, target)


def make(command: list[str], target: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=BUILD, delete=False) as scratch:
        pass
    done = subprocess.run([*command, "-o", scratch.name], capture_output=True, text=True)
    if done.returncode:
        os.unlink(scratch.name)
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    os.chmod(scratch.name, 0o755)
    os.replace(scratch.name, target)


def build(sources: Sequence[Path], sanitizer: str = "", flags: Sequence[str] = (), quote: Sequence[Path] = ()) -> Path:
    """Compiles sources (.cu or .cpp) with the machine into a shared library; returns its path.

    ``quote`` are folders searched for headers before the repository's own, as a changed copy of a kernel needs.
    """
    kernel_flags, machine_flags = SANITIZERS[sanitizer]
    folders = [HERE, ROOT, ROOT / "csrc"]
    jobs = [(Path(source), ["-O1", *kernel_flags, *flags], [*quote, *folders]) for source in sources]
    jobs += [(HERE / name, [*MACHINE, *machine_flags], folders) for name in RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    name = hashlib.sha256(" ".join(sorted(o.name for o in objects)).encode()).hexdigest()[:20]
    target = BUILD / f"kernels-{name}.so"
    if not target.exists():
        run([str(compiler()), "-shared", "-pthread", *kernel_flags, *map(str, objects)], target)
    return target


def address_and_size(buffer: Any) -> tuple[int, int]:
    """Where a tensor, a numpy array or None lies, and its bytes."""
    if buffer is None:
        return 0, 0
    if hasattr(buffer, "data_ptr"):
        assert buffer.is_contiguous(), "an emulated kernel takes contiguous tensors"
        return buffer.data_ptr(), buffer.numel() * buffer.element_size()
    assert buffer.flags["C_CONTIGUOUS"], "an emulated kernel takes contiguous arrays"
    return buffer.ctypes.data, buffer.nbytes


class Library:
    """Emulated kernels, built on the first use.

    ``sanitizer`` is "" (calls run in this process), "thread" or "address" (each call runs in a process of its own, and
    the report of a sanitizer is returned as the error).
    """

    def __init__(
        self, sources: Sequence[Path], sanitizer: str = "", flags: Sequence[str] = (), quote: Sequence[Path] = ()
    ) -> None:
        self.sanitizer = sanitizer
        self.path = build(sources, sanitizer, flags, quote)
        if not sanitizer:
            self.native = ctypes.CDLL(str(self.path))

    def call(
        self,
        name: str,
        pointers: Sequence[Any],
        integers: Sequence[int] = (),
        reals: Sequence[float] = (),
        *,
        seed: int = 0,
        schedule: int = IN_ORDER,
        resident: int = 0,
        major: int = 0,
        multiprocessors: int = 0,
        shared_per_block: int = 0,
    ) -> str | None:
        """Calls an entry; None, or what went wrong: a launch refused, a deadlock, a race...

        ``resident`` is how many threads of a plain launch run side by side (0: 512); ``major``, ``multiprocessors`` and
        ``shared_per_block`` are the device's, 0 an H100's.
        """
        machine = (seed, schedule, resident, major, multiprocessors, shared_per_block)
        if self.sanitizer:
            return self.replay(name, pointers, integers, reals, machine)
        setter = self.native.fastseq_emulation_set
        setter.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        setter(*machine)
        entry = getattr(self.native, name)
        entry.restype = ctypes.c_char_p
        error = entry(
            (ctypes.c_void_p * max(1, len(pointers)))(*(address_and_size(p)[0] for p in pointers)),
            (ctypes.c_int64 * max(1, len(integers)))(*integers),
            (ctypes.c_double * max(1, len(reals)))(*reals),
        )
        return None if error is None else error.decode()

    def replay(
        self, name: str, pointers: Sequence[Any], integers: Sequence[int], reals: Sequence[float], machine: tuple
    ) -> str | None:
        """The same call by replay.cpp's program: buffers travel by a file and come back by it."""
        buffers = [address_and_size(p) for p in pointers]
        parts = [struct.pack("<Qq2qqQ", *machine), struct.pack("<3q", len(buffers), len(integers), len(reals))]
        parts += [struct.pack(f"<{len(integers)}q{len(reals)}d", *integers, *reals)]
        for address, size in buffers:
            parts += [struct.pack("<qq", bool(address), size), ctypes.string_at(address, size) if size else b""]
        program = build_replay(self.sanitizer)
        environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1 exitcode=66 report_signal_unsafe=0")
        environment["ASAN_OPTIONS"] = "detect_stack_use_after_return=0:detect_leaks=0:exitcode=66"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "call")
            file.write_bytes(b"".join(parts))
            # Where the kernel spreads addresses widely, GCC 12's ThreadSanitizer cannot find room for its shadow.
            done = subprocess.run(
                ["setarch", "-R", str(program), str(self.path), name, str(file)],
                capture_output=True,
                text=True,
                env=environment,
                timeout=170,
            )
            if done.returncode == 0:
                data, at = file.read_bytes(), 0
                for address, size in buffers:
                    if size:
                        ctypes.memmove(address, data[at : at + size], size)
                    at += size
                return None
        return f"exit {done.returncode}: {done.stdout}{done.stderr}"


def build_replay(sanitizer: str) -> Path:
    """The program that calls an entry under a sanitizer."""
    kernel_flags, _ = SANITIZERS[sanitizer]
    compiled = compile_one(HERE / "replay.cpp", ["-O1", *kernel_flags], [HERE, ROOT])
    target = BUILD / f"replay-{sanitizer}-{compiled.stem[-20:]}"
    if not target.exists():
        run([str(compiler()), "-pthread", *kernel_flags, str(compiled), "-ldl"], target)
    return target
