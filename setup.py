"""Builds fastseq: a pure-Python package, and the native kernels where this machine can compile them.

FASTSEQ_BUILD says how much: ``auto`` (all that can be built, the CUDA kernels only where there is an NVIDIA GPU; never
fails), ``cpu``, ``cuda`` (fail if that cannot be built) or ``none``. FASTSEQ_ISAS says for which processors: ``all``
instruction sets, or ``native``: the best of this processor, and baseline. ``fastseq/_build.json`` says what was built.

Every kernel source (csrc/*/cpu) is compiled once per instruction set, the sources that talk to torch once, and all is
linked into ``fastseq/_native.abi3.so``: by the stable ABIs of Python and torch, so that it serves every later version.
The same without what talks to Python, and with the operators' schemas, is ``fastseq/libfastseq.so``, for C++ programs.
CUDA sources go into ``fastseq/_native_cuda.abi3.so``, as the first file must load under a torch without CUDA. Objects
are kept in build/native and compiled again only when their command line, their source or a header changed.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib.machinery
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build", "native")
REPORT = "_build.json"
LIBRARIES = {"cpu": ["_native.abi3.so", "libfastseq.so"], "cuda": ["_native_cuda.abi3.so"]}
OLDEST_TORCH = (2, 10)
PYTHON_ABI = "cp310"
EARLIEST = "315532800"  # 1980, the earliest that zip files have; the time of files in an sdist, as SOURCE_DATE_EPOCH

# GCC 12 and 13 warn of "uninitialized" values inside their own AVX-512 headers.
AVX512 = ["-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Flags of each instruction set; baseline is whatever every processor of the architecture has.
ISAS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe", "-mpopcnt"],
        "avx512": ["-march=skylake-avx512", *AVX512],
        "avx512_bf16": ["-march=cooperlake", *AVX512],
        "amx_bf16": ["-march=cooperlake", "-mamx-tile", "-mamx-bf16", "-mamx-int8", *AVX512],
    },
    "aarch64": {"baseline": []},
}
COMMON_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall"]
COMMON_FLAGS += ["-iquotecsrc"]  # as with -I our math.h would also answer to <math.h>
# g++ vectorises gate math only without errno and traps; -ffast-math is not needed.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
BOTH = [Path("csrc/attention/marshal.cpp")]  # what both extensions have
OF_PYTHON = ("direct", "module")  # how the names of sources begin that talk to Python
SCHEMAS = Path("csrc/core/schemas.cpp")  # of libfastseq.so alone
CUDA_ARCHITECTURES = {"80": ["sm_80"], "90a": ["sm_90a"], "100": ["sm_100", "compute_100"]}


class Unavailable(Exception):
    """This machine cannot build that part; the message says why and what would fix it."""


def say(message: str) -> None:
    print(f"fastseq: {message}", file=sys.stderr, flush=True)


def run(command: list[str], remarks: Path | None = None) -> str:
    """Returns what a command prints; what it says besides is passed on, and kept in ``remarks``."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        shown = "\n".join((done.stdout + done.stderr).strip().splitlines()[:40])
        raise Unavailable(f"this command failed:\n  {shlex.join(command)}\n{shown}")
    if said := done.stderr.strip():
        print(said, file=sys.stderr)
        if remarks is not None:
            remarks.write_text(f"{said}\n")
    return done.stdout


@dataclass(frozen=True)
class Torch:
    """The torch to build against, found without importing it."""

    root: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        # pip's build isolation hides the environment's packages from sys.path, but not from sysconfig.
        places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
        spec = importlib.machinery.PathFinder.find_spec("torch", places)
        if spec is None or spec.origin is None:
            raise Unavailable("torch is not installed here; install torch, then this package again")
        root = Path(spec.origin).parent
        facts = runpy.run_path(str(root / "version.py"))
        version = facts["__version__"]
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            raise Unavailable(f"torch {version} is too old: the stable ABI needs {oldest}; install a newer torch")
        return cls(root, version, facts.get("cuda"))

    @property
    def compile_flags(self) -> list[str]:
        return [*ABI_FLAGS, "-isystem", str(self.root / "include")]

    @property
    def link_flags(self) -> list[str]:
        # No RPATH: `import torch` comes first and has all of these libraries loaded.
        return [f"-L{self.root / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10", "-ldl"]


def files_read(rule: Path) -> list[str]:
    """The source and the headers that a compiler's dependency file names."""
    return rule.read_text().replace("\\\n", " ").partition(":")[2].split()


@dataclass
class Unit:
    """One object file and the command that makes it (to which the output's name is added)."""

    object: Path
    source: Path
    command: list[str]
    signature: str = ""

    def stamp(self) -> str:
        """What the object depends on: the command, the compiler, and the contents of every file that was read."""
        digest = hashlib.sha256()
        for name in files_read(self.object.with_suffix(".d")):
            digest.update(f"{name}\n".encode() + (ROOT / name).read_bytes())
        return f"{self.signature}{digest.hexdigest()}\n"

    def stale(self) -> bool:
        try:
            return not self.object.exists() or self.object.with_suffix(".cmd").read_text() != self.stamp()
        except OSError:
            return True

    def compile(self) -> None:
        start = time.time()
        self.object.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved into place: two builds may run in one tree, and a broken one must leave nothing.
        aside = self.object.with_suffix(f".{os.getpid()}.tmp")
        listed = Path(f"{aside}.d")
        remarks = self.object.with_suffix(".remarks")  # there only where the compiler had any; the tests look
        try:
            remarks.unlink(missing_ok=True)
            run([*self.command, "-MMD", "-MF", str(listed), "-c", str(self.source), "-o", str(aside)], remarks)
            edited = any((ROOT / name).stat().st_mtime > start for name in files_read(listed))
            self.object.with_suffix(".cmd").unlink(missing_ok=True)
            os.replace(listed, self.object.with_suffix(".d"))
            os.replace(aside, self.object)
            if not edited:  # else it is not known which contents were compiled
                self.object.with_suffix(".cmd").write_text(self.stamp())
        finally:
            for leftover in (aside, listed):
                leftover.unlink(missing_ok=True)
        say(f"compiled {self.source} [{self.object.parent.name}] in {time.time() - start:.1f} s")


def compile_all(units: list[Unit], versions: str) -> bool:
    """Brings every object up to date, one a core at a time; returns whether any was compiled."""
    for unit in units:
        unit.signature = f"{shlex.join(unit.command)}\n{versions}\n"
    stale = [unit for unit in units if unit.stale()]
    stale.sort(key=lambda unit: -(ROOT / unit.source).stat().st_size)  # so that no core waits long for the last one
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(unit.compile) for unit in stale]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return bool(stale)


def link(command: list[str], units: list[Unit], flags: list[str], name: str, compiled: bool) -> Path:
    library = OBJECTS / name
    stamp = library.with_suffix(".cmd")
    whole = [*command, "-shared", *(str(unit.object) for unit in units), *flags]
    signature = shlex.join(whole)
    if compiled or not library.exists() or not stamp.exists() or stamp.read_text() != signature:
        aside = library.with_suffix(f".{os.getpid()}.tmp")
        run([*whole, "-o", str(aside)])
        os.replace(aside, library)
        stamp.write_text(signature)
        say(f"linked {library}")
    return library


def sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def object_of(source: Path, variant: str) -> Path:
    """Where the object of a source under csrc is kept. Its name is the whole path, since folders share file names."""
    return OBJECTS / variant / f"{'-'.join(source.parts[1:])}.o"


def cpu_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and its version line."""
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else next(([c] for c in ("g++", "c++", "clang++") if shutil.which(c)), [])
    if not command or not shutil.which(command[0]):
        wanted = f"CXX={named} is not a command" if named else "there is no C++ compiler (g++ or clang++) on PATH"
        raise Unavailable(f"{wanted}; install one (Debian: apt install g++), then this package again")
    return command, run([*command, "--version"]).splitlines()[0]


def instruction_sets(asked: str, command: list[str], known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of ``known`` that FASTSEQ_ISAS asks for, with their flags. Raises Unavailable."""
    if asked not in ("all", "native"):
        raise SystemExit(f"FASTSEQ_ISAS={asked}: expected all or native")

    def features(*flags: str) -> set[str]:
        macros = run([*command, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        return set(re.findall(r"__(?:AVX|AMX|FMA|F16C|BMI)\w*__", macros))

    best = "baseline"
    for isa, flags in known.items() if asked == "native" else ():
        with suppress(Unavailable):  # a compiler that does not know these flags
            best = isa if features(*flags) <= features("-march=native") else best
    return known if asked == "all" else {"baseline": [], best: known[best]}


@dataclass
class Report:
    """What fastseq/_build.json says. ``reasons`` has an entry for each part that was not built."""

    built: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    torch: str | None = None
    compiler: str | None = None
    nvcc: str | None = None
    instruction_sets: list[str] = field(default_factory=list)
    instruction_sets_left_out: dict[str, str] = field(default_factory=dict)
    cuda_architectures: list[str] = field(default_factory=list)
    pure_is_expected: bool = False  # else the package warns at its import where it has no native kernels


def write_schemas() -> None:
    """What csrc/core/schemas.cpp includes: the operators' schemas, from the files that Python reads."""
    options = runpy.run_path(str(ROOT / "fastseq/attn/call.py"))["OPTIONS_SCHEMA"]
    schemas = runpy.run_path(str(ROOT / "fastseq/ops/schemas.py"))["of_the_cpu"](options)
    text = "".join(f"m.def({json.dumps(name + schema)});\n" for name, schema in schemas.items())
    written = ROOT / OBJECTS / "schemas.inc"
    if not written.exists() or written.read_text() != text:
        written.write_text(text)


def machine_here() -> str | None:
    """The processor's architecture, as ISAS names it; None where the native kernels are not written for this system."""
    name = platform.machine().lower()
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
    return name if sys.platform == "linux" and name in ISAS else None


def build_cpu(report: Report) -> list[Path]:
    """Compiles and links the CPU extension and libfastseq.so. Raises Unavailable."""
    machine = machine_here()
    if machine is None:
        here = f"{sys.platform} {platform.machine()}"
        raise Unavailable(f"native kernels are built on Linux for {' and '.join(ISAS)}; this is {here}")
    torch = Torch.find()
    report.torch = torch.version
    command, version = cpu_compiler()
    report.compiler = version
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise Unavailable(f"Python.h is not in {python_include}; install its package (Debian: apt install python3-dev)")
    base = [*command, *COMMON_FLAGS]
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)

    units: dict[str, list[Unit]] = {}
    kernels = sources("csrc/*/cpu/*.cpp")
    asked = os.environ.get("FASTSEQ_ISAS") or "all"
    for isa, flags in instruction_sets(asked, command, ISAS[machine]).items():
        flags = [*KERNEL_FLAGS, *flags, f"-DFASTSEQ_ISA={isa}"]
        try:
            run([*base, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull])
        except Unavailable as error:
            if isa == "baseline":
                raise
            report.instruction_sets_left_out[isa] = f"{version} does not know its flags"
            say(f"without the {isa} kernels: {error}")
            continue
        report.instruction_sets.append(isa)
        units[isa] = [Unit(object_of(path, isa), path, [*base, *flags]) for path in kernels]
    have = [f"-DFASTSEQ_HAVE_{isa.upper()}" for isa in report.instruction_sets if isa != "baseline"]
    write_schemas()
    include = [*torch.compile_flags, f"-iquote{OBJECTS}", "-isystem", python_include]
    talks = [*base, "-fopenmp", *have, *include]
    glue = [Unit(object_of(path, "torch"), path, talks) for path in sources("csrc/*/*.cpp")]
    # Glue and baseline come first: should an inline function of the standard library be emitted in several objects, the
    # linker keeps the first, which every processor can run.
    ordered = [*glue, *(unit for isa in report.instruction_sets for unit in units[isa])]
    compiled = compile_all(ordered, f"{version}\ntorch {torch.version}")
    without = {
        "_native.abi3.so": [unit for unit in glue if unit.source == SCHEMAS],
        "libfastseq.so": [unit for unit in glue if unit.source.name.startswith(OF_PYTHON)],
    }
    flags = ["-fopenmp", *torch.link_flags]
    return [
        link(command, [unit for unit in ordered if unit not in without[name]], flags, name, compiled)
        for name in LIBRARIES["cpu"]
    ]


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU here: by the driver's library or, where that is not found, by nvidia-smi."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return True
    except (OSError, AttributeError):  # no driver, or something else by its name
        pass
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.startswith("GPU ")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH"
        raise Unavailable(f"there is no nvcc {where}; install the CUDA toolkit of torch.version.cuda, or set CUDA_HOME")
    return nvcc


def build_cuda(report: Report) -> list[Path]:
    """Compiles and links the CUDA extension, for all architectures in one file. Raises Unavailable."""
    files = [*sources("csrc/*/cuda/*.cpp"), *sources("csrc/*/cuda/*.cu"), *BOTH]
    torch = Torch.find()
    if torch.cuda is None:
        raise Unavailable(f"torch {torch.version} is built without CUDA; install a CUDA build of torch")
    nvcc = find_nvcc()
    found = re.search(r"release (\d+)\.(\d+)", version := run([nvcc, "--version"]))
    if not found or found[1] != torch.cuda.split(".")[0]:
        release = found[0] if found else version
        raise Unavailable(
            f"nvcc is {release}, torch is built for CUDA {torch.cuda}; set CUDA_HOME to a toolkit of that"
        )
    known = run([nvcc, "--list-gpu-arch"]).split()
    generate = []
    for virtual, codes in CUDA_ARCHITECTURES.items():
        if f"compute_{virtual.rstrip('a')}" in known:
            report.cuda_architectures += codes
            generate.append(f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]")
    report.nvcc = found[0]
    # nvcc compiles and links the host code as well: it knows its toolkit's headers and libraries, also when the command
    # on PATH is a wrapper. The runtime is the shared one that torch has loaded.
    host = [flag for flag in COMMON_FLAGS if not flag.startswith(("-std", "-O"))]
    base = [nvcc, "-std=c++17", "-O3", "-cudart=shared", *(f"-Xcompiler={flag}" for flag in host)]
    flags = [*generate, *torch.compile_flags, "-DUSE_CUDA", "-isystem", sysconfig.get_path("include")]
    units = [Unit(object_of(path, "cuda"), path, [*base, *flags]) for path in files]
    compiled = compile_all(units, f"{version}\ntorch {torch.version}")
    libraries = [flag.replace("-Wl,", "-Xlinker=") for flag in torch.link_flags]
    return [link(base, units, [*libraries, "-ltorch_cuda"], LIBRARIES["cuda"][0], compiled)]


def build(wanted: str) -> tuple[Report, dict[str, list[Path]]]:
    """Builds what ``wanted`` (the value of FASTSEQ_BUILD) asks for; returns the report and the libraries."""
    report = Report()
    libraries: dict[str, list[Path]] = {}
    parts: dict[str, Callable[[Report], list[Path]]] = {"cpu": build_cpu, "cuda": build_cuda}
    required = {"auto": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}
    if wanted not in required:
        raise SystemExit(f"FASTSEQ_BUILD={wanted}: expected auto, cpu, cuda or none")
    for part, make in parts.items():
        try:
            if wanted == "none" or (wanted == "cpu" and part == "cuda"):
                how = "with FASTSEQ_BUILD=cuda" if part == "cuda" else "without it"
                raise Unavailable(f"FASTSEQ_BUILD={wanted} was set; install again {how}")
            if wanted == "auto" and part == "cuda" and not has_gpu():
                raise Unavailable("there is no NVIDIA GPU here; FASTSEQ_BUILD=cuda compiles them all the same")
            if part == "cuda" and "cpu" not in libraries:
                raise Unavailable("the CPU kernels, which it needs, were not built")
            libraries[part] = make(report)
            report.built.append(part)
        except Unavailable as error:
            if part in required[wanted]:
                raise SystemExit(
                    f"fastseq: FASTSEQ_BUILD={wanted}, but the {part} kernels cannot be built: {error}"
                ) from None
            report.reasons[part] = str(error)
            say(f"without the {part} kernels: {error}")
    if libraries:
        say(f"built {', '.join(report.built)} [{' '.join(report.instruction_sets + report.cuda_architectures)}]")
    else:
        report.pure_is_expected = wanted == "none" or machine_here() is None
        say("installing in pure Python; it works, through torch's own layers")
        if not report.pure_is_expected:  # fastseq/installed.py repeats it, as pip shows none of this
            print(f"\n{'!' * 100}", file=sys.stderr)
            say("INSTALLED WITHOUT ITS NATIVE KERNELS: calls will run on torch's own layers, at their speed.")
            say(f"why: {report.reasons['cpu']}")
            say("fix: remove that cause, then install again; with FASTSEQ_BUILD=cpu an installation fails instead.")
            print(f"{'!' * 100}\n", file=sys.stderr, flush=True)
    return report, libraries


class BuildNative(build_ext):
    """build_ext that compiles by the functions above, and is content with nothing where nothing can be built."""

    def run(self) -> None:
        if getattr(self, "written", None) is not None:
            return
        report, libraries = build(os.environ.get("FASTSEQ_BUILD") or "auto")
        self.cuda = "".join(re.findall(r"\d+", report.nvcc or "")) if "cuda" in libraries else ""
        in_place = self.inplace or self.editable_mode
        target = ROOT / "fastseq" if in_place else Path(self.build_lib, "fastseq")
        target.mkdir(parents=True, exist_ok=True)
        self.written = [target / REPORT]
        for part, names in LIBRARIES.items():
            for path in libraries.get(part, []):
                # Moved into place, as a running process may have the old file mapped.
                shutil.copy2(ROOT / path, target / f"{path.name}.tmp")
                os.replace(target / f"{path.name}.tmp", target / path.name)
                self.written.append(target / path.name)
            for name in names if part not in libraries else ():
                (target / name).unlink(missing_ok=True)
        (target / REPORT).write_text(json.dumps(vars(report), indent=2) + "\n")
        if not libraries:
            self.distribution.ext_modules = []  # from here on a pure distribution

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "written", None) or []]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sources("csrc/**/*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]


class Wheel(bdist_wheel):
    """bdist_wheel that compiles first, because the wheel's name depends on what was built."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        if cuda := self.get_finalized_command("build_ext").cuda:  # a name beside the CPU wheel's
            self.build_number = f"1cu{cuda}"
        super().run()


class SourceDistribution(sdist):
    """sdist without the builder's name, machine and time: the same files make the same archive, byte for byte."""

    def make_archive(self, base_name: str, format: str, root_dir=None, base_dir=None, **owner: object) -> str:
        if format != "gztar":
            raise SystemExit(f"fastseq: sdist --formats={format}: expected gztar")
        moment = int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST))

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            entry.mtime = moment
            return entry

        path = Path(f"{base_name}.tar.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", 9, file, moment) as packed,  # no name in the header
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            tar.add(base_dir, filter=plain)  # sorted
        return str(path)


if __name__ == "__main__":  # also under pip; the tests import this file for its flags
    setup(
        ext_modules=[Extension("fastseq._native", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel, "sdist": SourceDistribution},
        options={"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
    )
