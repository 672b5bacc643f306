"""Wheels of both kinds, native and pure: built from a copy of the source, installed aside, imported from there."""

from __future__ import annotations

import email
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import needs_native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "fastseq/_native.abi3.so"
LIBRARIES = {LIBRARY, "fastseq/libfastseq.so"}
RUN_A_LAYER = """
import fastseq, torch, fastseq.kernels
layer = fastseq.nn.GRU(3, 5)
y, h = layer(torch.randn(7, 2, 3))
y.sum().backward()
assert y.shape == (7, 2, 5) and layer.weight_hh_l0.grad.isfinite().all()
print(fastseq.__file__)
"""


def run(command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("FASTSEQ_BUILD", "FASTSEQ_BACKEND", "PYTHONPATH", "CXX")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


def succeed(command, cwd, **environment):
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def build_tools():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastseq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def copy_source(to: Path) -> Path:
    """What a clone holds, and the objects compiled already, so that building again takes seconds."""
    left_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.tmp")
    for name in ("fastseq", "kernels", "csrc", "build/native"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=left_out if name != "build/native" else None)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CONTRIBUTING.md"):
        shutil.copy2(ROOT / name, to / name)
    return to


@dataclass
class Built:
    wheel: Path
    log: str

    @property
    def files(self) -> set[str]:
        return set(zipfile.ZipFile(self.wheel).namelist())

    def read(self, ending: str) -> str:
        (name,) = (name for name in self.files if name.endswith(ending))
        return zipfile.ZipFile(self.wheel).read(name).decode()

    @property
    def report(self) -> dict:
        return json.loads(self.read("fastseq/_build.json"))

    def install(self, to: Path) -> Path:
        succeed([sys.executable, "-m", "pip", "install", "--no-deps", "--target", to, self.wheel], to.parent)
        return to


def build_wheel(source: Path, python: str | Path = sys.executable, **environment: str) -> Built:
    """For the processors whose objects are there already."""
    command = [python, "-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", "wheels"]
    whole = len(list((ROOT / "build" / "native").glob("*/recurrent-cpu-forward.cpp.o"))) > 2
    log = succeed(command, source, FASTSEQ_ISAS="all" if whole else "native", **environment)
    (wheel,) = (source / "wheels").glob("*.whl")
    return Built(wheel, log)


def assert_works_from(target: Path, warning: str = "") -> None:
    # An editable installation would lend the extension of another folder.
    alone = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]"
    done = run([sys.executable, "-c", f"{alone}\n{RUN_A_LAYER}"], target, PYTHONPATH=str(target))
    assert done.stdout.strip() == str(target / "fastseq" / "__init__.py"), done.stderr
    assert warning in done.stderr
    assert ("RuntimeWarning: fastseq has no native kernels here" in done.stderr) == bool(warning), done.stderr


@pytest.fixture(scope="module")
def native(tmp_path_factory, build_tools) -> Built:
    try:
        build_tools.cpu_compiler()
        build_tools.Torch.find()
    except build_tools.Unavailable as error:
        pytest.skip(str(error))
    return build_wheel(copy_source(tmp_path_factory.mktemp("native")), FASTSEQ_BUILD="cpu")


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> Built:
    source = copy_source(tmp_path_factory.mktemp("pure"))
    # What an earlier native build left behind must not slip into a pure wheel.
    for name in LIBRARIES:
        (source / name).write_bytes(b"stale")
    return build_wheel(source, FASTSEQ_BUILD="none")


def test_native_wheel_serves_every_python(native):
    assert re.fullmatch(r"fastseq_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", native.wheel.name)
    assert "Root-Is-Purelib: false" in native.read("dist-info/WHEEL")
    assert native.files >= LIBRARIES
    assert native.report["built"][0] == "cpu"
    assert native.report["instruction_sets"][0] == "baseline"
    assert native.report["torch"] == torch.__version__


def test_native_wheel_works_where_it_is_installed(native, tmp_path):
    target = native.install(tmp_path / "site")
    assert_works_from(target)
    program = """
import re, fastseq, torch
from fastseq import ops
assert ops.NATIVE_MISSING is None, ops.NATIVE_MISSING
assert fastseq._native.__file__.startswith(fastseq.__path__[0])
torch.randn(300, 300) @ torch.randn(300, 300)
print(torch.ops.fastseq.native_isa(""))
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = {path for path in mapped if re.search(r"/lib(gomp|omp|iomp)", path)}
assert len(runtimes) == 1 and "/torch/lib/" in runtimes.pop(), runtimes
"""
    printed = succeed([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(target))
    assert printed.strip() in native.report["instruction_sets"]


def test_pure_wheel_is_for_every_machine(pure):
    assert pure.wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in pure.read("dist-info/WHEEL")
    assert not [name for name in pure.files if name.endswith(".so") or ".data/" in name]
    assert pure.report["built"] == []
    assert "FASTSEQ_BUILD=none" in pure.report["reasons"]["cpu"]
    assert "installing in pure Python" in pure.log
    assert "INSTALLED WITHOUT" not in pure.log  # it was asked for


def test_pure_wheel_works_where_it_is_installed(pure, tmp_path):
    assert_works_from(pure.install(tmp_path / "site"))


@pytest.mark.parametrize("kind", ["native", "pure"])
def test_wheel_holds_the_whole_package_and_nothing_else(kind, request):
    built = request.getfixturevalue(kind)
    modules = {f"fastseq/{p.relative_to(ROOT / 'fastseq')}" for p in (ROOT / "fastseq").rglob("*.py")}
    modules |= {f"fastseq/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    data = {"fastseq/py.typed", "fastseq/_build.json"} | (LIBRARIES if kind == "native" else set())
    assert {name for name in built.files if ".dist-info/" not in name} == modules | data


@pytest.mark.parametrize("kind", ["native", "pure"])
def test_metadata(kind, request):
    built = request.getfixturevalue(kind)
    metadata = email.message_from_string(built.read("dist-info/METADATA"))
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "fastseq" / "__init__.py").read_text(), re.M)
    assert metadata["Name"] == "fastseq-kernels"
    assert metadata["Version"] == version[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert required == ["torch>=2.10", "numpy"]
    assert "Apache License" in built.read("licenses/LICENSE")


@pytest.fixture(scope="module")
def library(native, tmp_path_factory) -> Path:
    return Path(zipfile.ZipFile(native.wheel).extract(LIBRARY, tmp_path_factory.mktemp("library")))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_uses_the_stable_abis_only(library):
    needed = [line.split()[-1] for line in succeed(["nm", "-D", "--undefined-only", library], ROOT).splitlines()]
    # Mangled names of torch's C++ would tie it to one version; names with _Py are outside of Python's stable ABI, save
    # those that the macros of its limited API (Py_DECREF, Py_None, Py_False, Py_True) become.
    unstable = [name for name in needed if re.match(r"_ZN?K?(T[VISC])?N?K?(2at|3c10|5torch|8pybind11)", name)]
    assert unstable == []
    behind_macros = {"_Py_Dealloc", "_Py_NoneStruct", "_Py_FalseStruct", "_Py_TrueStruct"}
    assert {name for name in needed if name.startswith("_Py")} <= behind_macros
    assert {name.partition("_")[0] for name in needed if re.match(r"aoti|torch", name)} <= {"aoti", "torch"}
    exported = succeed(["nm", "-D", "--defined-only", "-C", library], ROOT).splitlines()
    assert [line for line in exported if "fastseq::" in line] == []
    assert any(line.endswith(" T PyInit__native") for line in exported)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_library_has_no_path_of_the_machine_it_was_built_on(library):
    dynamic = succeed(["readelf", "-d", library], ROOT)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    known = {
        "libtorch_cpu.so",
        "libc10.so",
        "libgomp.so.1",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
    }
    assert set(re.findall(r"NEEDED.*\[(.+)\]", dynamic)) <= known | {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_instruction_sets_share_no_code(native):
    # An inline function emitted by two sets is merged by the linker into either, and so would run where it must not.
    objects = native.wheel.parents[1] / "build" / "native"
    for isa in native.report["instruction_sets"]:
        for path in (objects / isa).glob("*.o"):
            lines = succeed(["nm", "-C", "--defined-only", path], ROOT).splitlines()
            names = [line.split(maxsplit=2)[2] for line in lines if line.split(maxsplit=2)[1] in "WVu"]
            shared = [name for name in names if f"fastseq::{isa}::" not in name and not name.startswith("DW.ref.")]
            assert shared == [], f"{isa}/{path.name} has weak symbols outside of fastseq::{isa}"


def test_a_compiler_is_not_needed(tmp_path):
    built = build_wheel(copy_source(tmp_path), PATH="")
    assert built.wheel.name.endswith("-py3-none-any.whl")
    assert "there is no C++ compiler" in built.report["reasons"]["cpu"]
    assert "INSTALLED WITHOUT ITS NATIVE KERNELS" in built.log
    assert "why: there is no C++ compiler (g++ or clang++) on PATH; install one" in built.log
    assert_works_from(built.install(tmp_path / "site"), warning="Why: there is no C++ compiler")


def python_without_torch(folder: Path) -> Path:
    succeed([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(torch.__file__).parents[1]
    for name in ("pip", "setuptools", "wheel", "packaging", "_distutils_hack"):
        for path in [here / name, *here.glob(f"{name}-*.dist-info")]:
            if path.exists():
                (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def test_torch_is_not_needed_to_build(tmp_path):
    python = python_without_torch(tmp_path / "bare")
    (tmp_path / "source").mkdir()
    built = build_wheel(copy_source(tmp_path / "source"), python)
    assert built.wheel.name.endswith("-py3-none-any.whl")
    assert "torch is not installed" in built.report["reasons"]["cpu"]
    assert_works_from(built.install(tmp_path / "site"), warning="install torch, then this package again")


def test_code_that_does_not_compile_leaves_a_pure_package(tmp_path, native):
    source = copy_source(tmp_path)
    (source / "csrc" / "core" / "broken.cpp").write_text("int x = ;\n")
    built = build_wheel(source)
    assert built.wheel.name.endswith("-py3-none-any.whl")
    assert "broken.cpp:1:9: error" in built.report["reasons"]["cpu"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTSEQ_BUILD": "cpu", "PATH": ""}, "cpu kernels cannot be built: there is no C++ compiler"),
        ({"FASTSEQ_BUILD": "cpu", "CXX": "/no/such/g++"}, "CXX=/no/such/g++ is not a command"),
        ({"FASTSEQ_BUILD": "cuda", "PATH": ""}, "FASTSEQ_BUILD=cuda, but the"),
        ({"FASTSEQ_BUILD": "fast"}, "expected auto, cpu, cuda or none"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(environment, expected, tmp_path):
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], copy_source(tmp_path), **environment)
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr


NO_GPU = "there is no NVIDIA GPU here; FASTSEQ_BUILD=cuda compiles them all the same"


@pytest.mark.parametrize(
    ("wanted", "gpu", "reason"),
    [
        ("auto", True, None),
        ("auto", False, NO_GPU),
        ("cuda", False, None),
        ("cpu", True, "FASTSEQ_BUILD=cpu was set; install again with FASTSEQ_BUILD=cuda"),
    ],
)
def test_cuda_kernels_are_compiled_where_there_is_a_gpu_or_where_they_are_asked_for(
    wanted, gpu, reason, build_tools, monkeypatch
):
    monkeypatch.setattr(build_tools, "has_gpu", lambda: gpu)
    for part in ("cpu", "cuda"):
        monkeypatch.setattr(build_tools, f"build_{part}", lambda report: [])
    report, libraries = build_tools.build(wanted)
    assert report.built == list(libraries) == (["cpu", "cuda"] if reason is None else ["cpu"])
    assert report.reasons.get("cuda") == reason


@pytest.mark.parametrize(
    ("asked", "here", "built"),
    [
        ("all", "", ["baseline", "small", "large", "unknown"]),
        ("native", "__AVX__ __AVX2__ __FMA__", ["baseline", "small"]),
        ("native", "__AVX__ __AVX2__ __AVX512F__ __SSE2__", ["baseline", "large"]),
        ("native", "__SSE2__", ["baseline"]),
    ],
)
def test_kernels_are_compiled_for_every_processor_or_for_this_one(asked, here, built, build_tools, monkeypatch):
    known = {"baseline": [], "small": ["-msmall"], "large": ["-mlarge"], "unknown": ["-munknown"]}
    defined = {"-march=native": here, "-msmall": "__AVX2__ __SSE3__", "-mlarge": "__AVX2__ __AVX512F__"}

    def run(command):
        if "-munknown" in command:
            raise build_tools.Unavailable("unknown option")
        return defined.get(command[1], "")

    monkeypatch.setattr(build_tools, "run", run)
    found = build_tools.instruction_sets(asked, ["c++"], known)
    assert list(found) == built
    assert all(found[isa] == known[isa] for isa in built)


def test_another_value_of_fastseq_isas_is_refused(build_tools):
    with pytest.raises(SystemExit, match="FASTSEQ_ISAS=avx9: expected all or native"):
        build_tools.instruction_sets("avx9", ["c++"], {"baseline": []})


@needs_native
def test_the_kernels_of_this_processor_run_here(build_tools):
    command, _ = build_tools.cpu_compiler()
    found = build_tools.instruction_sets("native", command, build_tools.ISAS[build_tools.machine_here()])
    for isa in found:
        assert torch.ops.fastseq.native_isa(isa) == isa


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", True),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", False),
        (None, False),
    ],
    ids=["a GPU", "a driver without a GPU", "no driver"],
)
def test_a_gpu_is_found_by_what_its_driver_lists(listed, found, build_tools, tmp_path, monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(build_tools.ctypes, "CDLL", no_library)
    monkeypatch.setenv("PATH", str(tmp_path))
    if listed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert build_tools.has_gpu() == found


@pytest.mark.parametrize(("devices", "found"), [(2, True), (0, False)])
def test_a_gpu_is_found_by_its_drivers_library(devices, found, build_tools, tmp_path, monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = devices
            return 0

    monkeypatch.setattr(build_tools.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_tools.has_gpu() == found


def test_a_machine_that_has_no_native_kernels_is_not_told_to_build_them(build_tools, monkeypatch, capsys):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    report, libraries = build_tools.build("auto")
    assert libraries == {}
    assert report.pure_is_expected
    assert "INSTALLED WITHOUT" not in capsys.readouterr().err


def test_kernels_cannot_be_imported_under_the_name_of_another_package():
    with pytest.raises(ImportError, match=r"they are the package 'fastseq\.kernels'"):
        importlib.import_module("kernels")


@pytest.fixture
def compiler_here(build_tools, tmp_path, monkeypatch) -> tuple[list[str], str]:
    """The compiler and its version, with an empty folder in the place of the sources'."""
    monkeypatch.setattr(build_tools, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        return build_tools.cpu_compiler()
    except build_tools.Unavailable as error:
        pytest.skip(str(error))


def test_only_what_changed_is_compiled(build_tools, tmp_path, compiler_here):
    compiler, version = compiler_here
    header = tmp_path / "one.h"
    header.write_text("int one();\n")
    (tmp_path / "one.cpp").write_text('#include "one.h"\nint one() { return 1; }\n')

    def compiled(*flags: str) -> bool:
        unit = build_tools.Unit(Path("objects", "one.o"), Path("one.cpp"), [*compiler, *flags])
        return build_tools.compile_all([unit], version)

    assert compiled()
    assert not compiled()
    header.write_text("int one(), two();\n")
    os.utime(header, (0, 0))  # contents count, not times: a file may be put back by a copy that keeps its time
    assert compiled()
    assert compiled("-O1")
    assert not compiled("-O1")
    header.write_text("broken\n")
    with pytest.raises(build_tools.Unavailable, match=r"one\.h"):
        compiled("-O1")
    header.write_text("int one();\n")
    assert compiled("-O1")


def test_what_the_compiler_remarks_is_kept_until_it_has_nothing_to_remark(build_tools, tmp_path, compiler_here):
    compiler, version = compiler_here
    unit = build_tools.Unit(Path("objects", "one.o"), Path("one.cpp"), compiler)
    (tmp_path / "one.cpp").write_text("#warning slow here\n")
    build_tools.compile_all([unit], version)
    assert "slow here" in Path("objects", "one.remarks").read_text()
    (tmp_path / "one.cpp").write_text("\n")
    build_tools.compile_all([unit], version)
    assert not Path("objects", "one.remarks").exists()


@pytest.mark.full
@pytest.mark.parametrize("wanted", ["auto", "none"])
def test_editable_install_runs_from_the_source(wanted, tmp_path):
    (tmp_path / "source").mkdir()
    source = copy_source(tmp_path / "source")
    succeed([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], ROOT)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # This environment's packages, but not its own fastseq.
    (site / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = tmp_path / "venv" / "bin" / "python"
    succeed(
        [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", "."],
        source,
        FASTSEQ_BUILD=wanted,
    )
    printed = succeed([python, "-c", RUN_A_LAYER], tmp_path)
    assert printed.strip() == str(source / "fastseq" / "__init__.py")
    assert (source / LIBRARY).exists() == bool(json.loads((source / "fastseq/_build.json").read_text())["built"])


@pytest.mark.full
def test_source_distribution_builds_the_same(tmp_path, native):
    source = copy_source(tmp_path)
    succeed([sys.executable, "setup.py", "--quiet", "sdist"], source)
    (archive,) = (source / "dist").glob("fastseq_kernels-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    shutil.copytree(ROOT / "build" / "native", unpacked / "build" / "native")
    built = build_wheel(unpacked, FASTSEQ_BUILD="cpu")
    assert built.wheel.name == native.wheel.name
    assert built.files == native.files


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What a clone holds, as git lists it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a clone: there is no list of its files")
    return succeed(["git", "ls-files", "--cached"], ROOT).split()


def source_archive(tracked: list[str], folder: Path, moment: int) -> Path:
    """The source distribution of a copy, whose files are of another time and of another umask."""
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
        (folder / name).chmod(0o600 if moment % 2 else 0o664)
        os.utime(folder / name, (moment, moment))
    succeed([sys.executable, "setup.py", "--quiet", "sdist"], folder)
    (archive,) = (folder / "dist").glob("fastseq_kernels-*.tar.gz")
    return archive


def test_a_source_distribution_has_every_file_and_the_same_bytes_each_time(tracked, tmp_path):
    one, other = (source_archive(tracked, tmp_path / str(t), t) for t in (1_000_000_001, 1_500_000_000))
    with tarfile.open(one) as tar:
        names = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    made = {name for name in names if name.startswith("fastseq_kernels.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == set(tracked)
    assert one.read_bytes() == other.read_bytes()


CUDA_TOY = """
#include <Python.h>
#include <torch/csrc/stable/tensor.h>
#include "recurrent/gates.h"
__global__ void doubled(float* x) { x[threadIdx.x] *= 2; }
extern "C" void launch(float* x) { doubled<<<1, 32>>>(x); }
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native_cuda"};
PyMODINIT_FUNC PyInit__native_cuda() { return PyModule_Create(&module); }
"""


@pytest.mark.full
def test_cuda_sources_go_into_an_extension_of_their_own(tmp_path, build_tools, native):
    try:
        build_tools.find_nvcc()
    except build_tools.Unavailable as error:
        pytest.skip(str(error))
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    source = copy_source(tmp_path)
    # One small source in place of all kernels, beside the headers that host and device share.
    for path in (source / "csrc").glob("*/cuda/*"):
        if path.suffix in (".cu", ".cpp"):
            path.unlink()
    (source / "csrc" / "core" / "cuda" / "toy.cu").write_text(CUDA_TOY)
    built = build_wheel(source, FASTSEQ_BUILD="cuda")
    assert built.report["built"] == ["cpu", "cuda"]
    assert {"sm_80", "sm_90a"} <= set(built.report["cuda_architectures"])
    assert {*LIBRARIES, "fastseq/_native_cuda.abi3.so"} <= built.files
    target = built.install(tmp_path / "site")
    succeed([sys.executable, "-c", "import torch, fastseq._native_cuda"], target, PYTHONPATH=str(target))
