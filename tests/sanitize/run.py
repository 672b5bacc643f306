"""Runs the CPU kernels as a plain C++ program under a sanitizer: ``run.py address thread arm64``, any of them.

``address`` is AddressSanitizer with UndefinedBehaviorSanitizer; ``thread`` is ThreadSanitizer, with std::thread in the
place of OpenMP, into whose runtime it cannot see. Both run the baseline set, and the set of AMX's matrix tiles with a
software model in the place of their instructions, which a sanitizer cannot see into: its vectors are those of the best
set that this processor has (``address``), or the baseline's (``thread``: how threads meet does not depend on them).
``arm64`` cross-compiles by Debian's aarch64-linux-gnu-g++ and runs under qemu-aarch64, where they are installed, and
says so where they are not.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDR_NO_RANDOMIZE = 0x0040000


def load_setup():
    """setup.py as a module: the flags of every instruction set stand there, and nowhere else."""
    spec = importlib.util.spec_from_file_location("fastseq_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Check:
    """How a check compiles and runs; ``cases`` are the draws of recurrent layers, attention and encoders."""

    flags: list[str]
    cases: tuple[int, int, int]
    link: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


LINES = ["-g1", "-fno-omit-frame-pointer"]
TILE_MODEL = ['-DFASTSEQ_TILE_MODEL="../tests/sanitize/tile_model.h"']
CHECKS = {
    "address": Check(
        ["-O1", *LINES, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        (1000, 400, 200),
        # Not detect_stack_use_after_return: GCC 12's does not align 64-byte vectors on its fake stack.
        environment={"ASAN_OPTIONS": "detect_stack_use_after_return=0"},
    ),
    "thread": Check(
        ["-O1", *LINES, "-fsanitize=thread", "-DFASTSEQ_STD_THREADS"],
        (150, 150, 60),
        environment={"TSAN_OPTIONS": "halt_on_error=1"},
    ),
    "arm64": Check(["-O2"], (60, 60, 30), link=["-static"]),
}


def sets_of(name: str, sets: dict[str, list[str]], everything: bool) -> dict[str, list[str]]:
    """The instruction sets that a check compiles, with their flags, out of an architecture's."""
    if "amx_bf16" not in sets:
        return sets
    chip = Path("/proc/cpuinfo").read_text()
    needs = {"avx2": "avx2", "avx512": "avx512vl", "avx512_bf16": "avx512_bf16"}
    usable = ["baseline", *(isa for isa, flag in needs.items() if f" {flag} " in chip)]
    vectors = sets["baseline" if name == "thread" else usable[-1]]
    return {**{isa: sets[isa] for isa in (usable if everything else usable[:1])}, "amx_bf16": [*vectors, *TILE_MODEL]}


def build(setup, name: str, check: Check, compiler: list[str], sets: dict[str, list[str]]) -> Path:
    """Compiles the kernels and the driver under build/; returns the program."""
    folder = Path("build", name)
    base = [*compiler, *(f for f in setup.COMMON_FLAGS if not f.startswith("-O")), *check.flags]
    units = [
        setup.Unit(
            folder / isa / f"{'-'.join(path.parts[1:])}.o",
            path,
            [*base, *setup.KERNEL_FLAGS, *flags, f"-DFASTSEQ_ISA={isa}"],
        )
        for isa, flags in sets.items()
        for path in setup.sources("csrc/*/cpu/*.cpp")
    ]
    have = [f"-DFASTSEQ_HAVE_{isa.upper()}" for isa in sets if isa != "baseline"]
    model = TILE_MODEL if "amx_bf16" in sets else []
    units += [
        setup.Unit(folder / "driver" / f"{path.stem}.o", path, [*base, *have, *model])
        for path in [Path("csrc/core/isa.cpp"), *setup.sources("tests/sanitize/*.cpp")]
    ]
    setup.compile_all(units, setup.run([*compiler, "--version"]).splitlines()[0])
    program = ROOT / folder / "run"
    # ThreadSanitizer must be alone with its threads: no OpenMP in that program.
    threads = ["-pthread"] if "-DFASTSEQ_STD_THREADS" in check.flags else ["-fopenmp"]
    objects = [str(unit.object) for unit in units]
    setup.run([*base, *objects, *threads, *check.link, "-o", str(program)])
    return program


def run_check(setup, name: str, every_set: bool, cases: tuple[int, int, int] | None, seed: int) -> bool:
    check = CHECKS[name]
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    emulator: list[str] = []
    if name == "arm64" and machine != "aarch64":
        cross = "aarch64-linux-gnu-g++"
        if shutil.which(cross) is None:
            print(
                f"{name}: NOT CHECKED, there is no {cross} here (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
            )
            return True
        compiler, machine = [cross], "aarch64"
        emulator = [found] if (found := shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")) else []
    else:
        compiler, _ = setup.cpu_compiler()
    sets = sets_of(name, setup.ISAS[machine], every_set)
    start = time.time()
    program = build(setup, name, check, compiler, sets)
    built = time.time()
    if name == "arm64" and machine != platform.machine() and not emulator:
        print(f"{name}: compiles and links; NOT RUN, there is no qemu-aarch64 here (Debian: apt install qemu-user)")
        return True
    # Where the kernel spreads addresses widely, GCC 12's ThreadSanitizer cannot find room for its shadow.
    personality = ctypes.CDLL(None).personality
    counts = [str(count) for count in cases or check.cases]
    done = subprocess.run(
        [*emulator, str(program), *counts, str(seed)],
        env={**os.environ, **check.environment},
        preexec_fn=lambda: personality(ADDR_NO_RANDOMIZE),
    )
    verdict = "clean" if done.returncode == 0 else f"FAILED, exit {done.returncode}"
    print(
        f"{name}: {verdict} [{' '.join(sets)}] (built in {built - start:.0f} s, ran {time.time() - built:.0f} s)",
        flush=True,
    )
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="+", choices=list(CHECKS))
    parser.add_argument("--all", action="store_true", help="every instruction set, not only baseline and the tiles")
    parser.add_argument("--cases", type=int, nargs=3, metavar=("RECURRENT", "ATTENTION", "ENCODER"))
    parser.add_argument("--seed", type=int, default=1, help="the first case's; each next case adds one")
    args = parser.parse_args()
    os.chdir(ROOT)
    setup = load_setup()
    results = []
    for name in args.checks:
        try:
            results.append(run_check(setup, name, args.all, args.cases, args.seed))
        except setup.Unavailable as error:
            print(f"{name}: FAILED to build: {error}", file=sys.stderr)
            results.append(False)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
