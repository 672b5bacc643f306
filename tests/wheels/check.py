"""Checks a built wheel as a user gets it: ``check.py [WHEEL]``, by default the newest of dist/.

What is in it; by auditwheel, where that is installed, which systems it runs on, under whose tag it is then written to
dist/manylinux; and, in an environment that has nothing but it, torch and pytest: which OpenMP it runs on, the doctor,
and a short suite away from the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 20e6
"""Of a wheel without CUDA kernels."""

LIBRARIES = {f"fastseq/{name}" for name in ("_native.abi3.so", "_native_cuda.abi3.so", "libfastseq.so")}
BUILD_REPORT = "fastseq/_build.json"
TORCHS = ("libtorch*", "libc10*", "libcudart*", "libgomp*")
"""Libraries that torch brings. A second copy of OpenMP's runtime would start threads of its own."""

SUITES = (
    "tests/package/test_patch.py",
    "tests/attention/test_merge_attention.py",
    "tests/recurrent/test_training.py",
)
NEEDED_BY_TESTS = ("bench", "docs", "examples", "kernels", "csrc", "tests", "pyproject.toml", "README.md")
"""What is copied beside the tests; not fastseq/, whose place the wheel takes."""

ONE_OPENMP = """
import re, fastseq, torch
from fastseq import ops
assert "/site-packages/" in fastseq.__file__, fastseq.__file__
assert ops.NATIVE_MISSING is None, ops.NATIVE_MISSING
fastseq.nn.LSTM(64, 64)(torch.randn(50, 32, 64))[0].sum().backward()
torch.randn(300, 300) @ torch.randn(300, 300)
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = sorted(path for path in mapped if re.search(r"/lib(gomp|omp|iomp)", path))
assert len(runtimes) == 1, f"more than one OpenMP: {runtimes}"
print(f"torch {torch.__version__}, OpenMP of {runtimes[0]}")
"""


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel's contents."""
    opened = zipfile.ZipFile(wheel)
    names = opened.namelist()
    found = [f"{name} is not a library of fastseq" for name in names if ".so" in name and name not in LIBRARIES]
    if "fastseq/_native.abi3.so" not in names:
        found.append("it has no native kernels")
    elif "fastseq/_native_cuda.abi3.so" not in names and wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size:,} bytes, expected at most {MOST_BYTES:,.0f}")
    if BUILD_REPORT in names and wheel.stem.endswith("x86_64"):
        built = json.loads(opened.read(BUILD_REPORT))["instruction_sets"]
        if missing := set(runpy.run_path(str(ROOT / "setup.py"))["ISAS"]["x86_64"]) - set(built):
            found.append(f"it has no kernels for {', '.join(sorted(missing))}; build it with FASTSEQ_ISAS=all")
    return found


def repaired(wheel: Path) -> Path:
    """The wheel under the tag of the systems that it runs on, or itself where auditwheel is not installed."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    auditwheel = shutil.which("auditwheel", path=beside)
    if auditwheel is None:
        print("auditwheel is not installed: the wheel keeps the tag of this system alone")
        return wheel
    folder = wheel.parent / "manylinux"
    shutil.rmtree(folder, ignore_errors=True)
    excluded = [part for name in TORCHS for part in ("--exclude", name)]
    run(auditwheel, "repair", *excluded, "-w", folder, wheel)
    (made,) = folder.glob("*.whl")
    return made


def run(*command: object, cwd: Path = ROOT) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def torch_requirement(wanted: str) -> str:
    """``oldest``, ``pinned``, ``newest`` or a version, as pip is asked for it."""
    if wanted == "newest":
        return "torch"
    file, pattern = {
        "oldest": ("pyproject.toml", r'"torch>=([\d.]+)"'),
        "pinned": ("constraints.txt", r"^torch==([\d.]+)$"),
    }.get(wanted, ("", ""))
    if not file:
        return f"torch=={wanted}"
    found = re.search(pattern, (ROOT / file).read_text(), re.M)
    assert found is not None, f"{file} does not say which torch is the {wanted}"
    return f"torch=={found[1]}.*" if wanted == "oldest" else f"torch=={found[1]}"


def environment(folder: Path, python: str, wheel: Path, torch: str) -> Path:
    """An environment with the wheel, torch and what the suite needs; its Python. One that is there is brought up to
    date, so that torch is fetched once."""
    bare = folder / "bin" / "python"
    if not bare.exists():
        run(python, "-m", "venv", folder)
    pinned = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not re.match("(torch|triton)==", x)]
    (folder / "constraints.txt").write_text("\n".join(pinned) + "\n")
    pip = (bare, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "-c", folder / "constraints.txt")
    run(*pip, "--upgrade", torch_requirement(torch), wheel, "pytest", "hypothesis", "expecttest")
    run(*pip, "--no-deps", "--force-reinstall", wheel)  # also where its version was there
    return bare


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="default: the newest of dist/")
    parser.add_argument("--torch", default="newest", help="oldest, pinned, newest or a version; default: %(default)s")
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument("--environment", type=Path, help="default: a folder of build/wheels for each torch")
    options = parser.parse_args(argv)
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if options.wheel is None and not wheels:
        parser.error("dist/ has no wheel; make one by `make wheel`, or name one")
    wheel = (options.wheel or wheels[-1]).resolve()
    if "-linux_" in wheel.name:
        wheel = repaired(wheel)
    if wrong := faults(wheel):
        print(f"{wheel.name}: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    folder = (options.environment or ROOT / "build" / "wheels" / f"torch-{options.torch}").resolve()
    python = environment(folder, options.python, wheel, options.torch)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name in NEEDED_BY_TESTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tree / name)
    run(python, "-c", ONE_OPENMP, cwd=folder)
    run(python, "-m", "fastseq", "doctor", "--require", "native", cwd=folder)
    run(python, "-m", "pytest", "-q", *SUITES, cwd=tree)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"this command failed with status {error.returncode}: {' '.join(map(str, error.cmd[:6]))} ...")
