"""Imports go one way, files stay short, and torch is met in few places."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 500

# Lowest first; a module may import lower layers and its own. References and kernels import nothing of ours at all.
LAYERS: list[set[str]] = [
    {"_native", "_native_cuda", "installed", "recurrent.cells", "attn.call"},
    {"cli", "children"},
    {
        "auto",
        "ops",
        "calibration.calls",
        "calibration.file",
        "calibration.chosen",
        "recurrent.reference",
        "recurrent.normed_reference",
        "attn.reference",
        "attn.random",
        "kernels",
    },
    {"checks", "attn.checks", "backend", "autograd", "attn.autograd", "dtensor"},
    {"direct"},
    {"recurrent", "attn"},
    {"functional"},
    {"nn", "patch", "flops", "streams", "swapped", "torch_calls", "wrapped", "integrations", "calibration"},
    {"fastseq"},
    {"calibration.measure", "calibration.command", "doctor", "demo", "__main__"},
]
REFERENCE = {"recurrent.reference", "recurrent.normed_reference", "attn.reference", "attn.random"}
ALONE = REFERENCE | {"kernels"}
THIRD_PARTY = {**{name: {"torch"} for name in REFERENCE}, "kernels": {"torch", "triton"}}


def modules() -> dict[str, Path]:
    """Every module of the package, by the name it is installed under."""
    found = {}
    for folder, package in (("fastseq", "fastseq"), ("kernels", "fastseq.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def unit(module: str) -> str:
    """The part of the package that a module belongs to, as LAYERS names it."""
    name = module.partition(".")[2] or "fastseq"
    known = set().union(*LAYERS)
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def layer(module: str) -> int:
    for height, units in enumerate(LAYERS):
        if unit(module) in units:
            return height
    raise AssertionError(f"{module} has no place in the layers; give {unit(module)!r} one in LAYERS")


def statements(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements and whether each is inside a function; those only a type checker sees are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, inside
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(node, inside or function)


def imports(module: str, modules: Mapping[str, Path] = MODULES) -> Iterator[tuple[str, bool]]:
    """Those of ``modules`` and others that one of them imports, absolute, and whether only when a function runs."""
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, inside in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*above, base]))
            # `from package import module` imports the module; `from package import name` the package.
            names = [full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names]
        for name in names:
            yield name, inside


def ours(name: str) -> bool:
    return name.split(".")[0] == "fastseq"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers(module):
    for name, inside in imports(module):
        if not ours(name):
            continue
        if unit(module) in ALONE:
            own = {unit(module)} if unit(module) == "kernels" else REFERENCE
            assert unit(name) in own, f"{module} imports {name}; it may import nothing of ours"
        elif unit(name) == "kernels":
            assert unit(module) == "ops", f"{module} imports {name}; only ops reaches the kernels"
            assert inside, f"{module} imports {name} at its top; device implementations do so in their bodies"
        else:
            assert layer(name) <= layer(module), f"{module} imports {name}, which is above it"


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A chain of modules that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        found: list[str] = []
        if module not in done:
            found = next(filter(None, (visit(name, (*path, module)) for name in graph[module])), [])
            done.add(module)
        return found

    return next(filter(None, (visit(module, ()) for module in graph)), [])


def test_no_module_imports_itself_in_a_circle():
    graph = {m: {n for n, inside in imports(m) if n in MODULES and n != m and not inside} for m in MODULES}
    assert circle(graph) == []


BENCH = {
    ".".join(["bench", *path.relative_to(ROOT / "bench").with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted((ROOT / "bench").rglob("*.py"))
}


def test_no_module_of_the_bench_imports_itself_in_a_circle():
    """Imports inside functions count, and so do modules that are named in a string, to be imported or run later."""
    graph = {}
    for module, path in BENCH.items():
        tree = ast.parse(path.read_text())
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in BENCH}
        graph[module] = {name for name, _ in imports(module, BENCH)} & BENCH.keys() | (named - {module})
    for started in ("bench.gpu.worker", "bench.gpu.record"):  # which run in processes of their own
        assert started in graph["bench.gpu.command"]
    assert {"bench.page", "bench.gpu.command", "bench.studies.memory"} <= graph["bench.__main__"]
    assert circle(graph) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


def test_the_bench_needs_neither_its_studies_nor_a_gpu_to_time_kernels():
    """bench.session measures on the CPU; bench/gpu builds on that, and the studies on both."""
    above = {"bench": 0, "bench.gpu": 1, "bench.studies": 2}
    commands = {"bench.__main__", "bench.page", "bench.support"}
    for module in BENCH.keys() - commands:
        own = ".".join(module.split(".")[:2])
        for name, _ in imports(module, BENCH):
            if name in BENCH:
                other = ".".join(name.split(".")[:2])
                assert above.get(other, 0) <= above.get(own, 0), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if unit(m) in ALONE])
def test_reference_and_kernels_use_torch_and_triton_only(module):
    for name, _ in imports(module):
        top = name.split(".")[0]
        assert ours(name) or top in sys.stdlib_module_names | THIRD_PARTY[unit(module)], f"{module} imports {name}"


def test_the_package_imports_neither_its_bench_nor_its_tests():
    for module in MODULES:
        for name, _ in imports(module):
            assert name.split(".")[0] not in {"bench", "tests", "support"}, f"{module} imports {name}"


def test_no_source_file_grows_past_500_lines():
    folders = ("fastseq", "kernels", "csrc", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in [*files, ROOT / "setup.py"]}
    assert {str(path): n for path, n in lengths.items() if n > LONGEST} == {}


CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)


FACING_TORCH = {
    *("arguments.h", "settings.h", "ops.h", "marshal.h", "stack.h", "dispatch.h", "direct.h", "direct_objects.h")
}
"""Headers of the operators and of the fast path past torch's dispatcher."""


def test_cpu_kernels_and_shared_math_include_nothing_of_torch():
    paths = [*(ROOT / "csrc").glob("*/cpu/*"), *(ROOT / "csrc").glob("*/*.h")]
    assert len(paths) > 20
    for path in paths:
        if path.name in FACING_TORCH:
            continue
        for header in INCLUDE.findall(path.read_text()):
            assert not header.startswith(("torch/", "ATen/", "c10/", "Python")), f"{path.name} includes {header}"


def test_cpp_meets_torch_through_its_stable_abi_only():
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in CODE:
            for header in INCLUDE.findall(path.read_text()):
                stable = not header.startswith(("torch/", "ATen/", "c10/")) or header.startswith(allowed)
                assert stable, f"{path.relative_to(ROOT)} includes {header}"


def test_ops_are_registered_in_library_files_only():
    for path in (ROOT / "csrc").rglob("*.cpp"):
        if "TORCH_LIBRARY" in path.read_text():
            assert path.name in ("library.cpp", "schemas.cpp"), f"{path.relative_to(ROOT)} registers with torch"


CUDA_FILES = sorted((ROOT / "csrc").glob("*/cuda/*"))
COMMENT = re.compile(r"//.*")
RAW_CUDA = re.compile(
    r"\basm\b|<<<|\b__(?!CUDA|builtin)\w+|\bcuda[A-Z]\w*|\bcu[A-Z]\w*|\b(thread|block)Idx\b|\b(block|grid)Dim\b|"
    r"\batomic[A-Z]\w*|\b(cooperative_groups|nvcuda|wmma)\b|#\s*include\s*[<\"](cuda|cute|cutlass|cub|mma)[\w./]*\.h"
)
"""What only CUDA knows: machine code, its own words, and the functions and headers of its libraries."""


def code_of(path: Path) -> str:
    return COMMENT.sub("", path.read_text())


def test_cuda_appears_in_the_primitives_alone():
    primitives = "".join(map(code_of, (ROOT / "csrc" / "primitives").glob("*.cuh")))
    assert len({match[0] for match in RAW_CUDA.finditer(primitives)}) > 40  # so that this finds what it looks for
    for path in [*CUDA_FILES, ROOT / "csrc" / "recurrent" / "gates.h", ROOT / "csrc" / "core" / "math.h"]:
        text = code_of(path).replace("#define FASTSEQ_HD __host__ __device__ __forceinline__", "")
        text = re.sub(r"defined\(__\w+\)|__attribute__|_?_m512\w*", "", text)  # math.h's: the CPU's vectors
        found = RAW_CUDA.search(text)
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]} belongs into primitives"


def test_cuda_code_never_waits_for_the_device_nor_compiles_at_run_time():
    waits = re.compile(r"\w*Synchronize\w*|\bcuda(Memcpy|Malloc|Free)\w*|\bnvrtc\w*|_local_scalar_dense|aten::item")
    for path in [*CUDA_FILES, *(ROOT / "csrc" / "primitives").iterdir()]:
        assert not waits.findall(code_of(path)), path.name


def test_every_primitive_has_a_check_and_an_emulation():
    """A check runs a device function of csrc/primitives/*.cuh alone, on the emulated machine and on a GPU."""
    folder = ROOT / "tests" / "emulation"
    emulated, checks = ("".join(map(code_of, folder.glob(p))) for p in ("emulated*.h", "check_*.cu"))
    headers = map(code_of, (ROOT / "csrc" / "primitives").glob("*.cuh"))
    public = [re.sub(r"namespace detail \{.*?^\}", "", text, flags=re.S | re.M) for text in headers]
    names = set(re.findall(r"^(?:FASTSEQ_DEVICE|inline) [\w:<>,*& ]*?\b(\w+)(?:<\w+>)?\(", "\n".join(public), re.M))
    names -= {"error_text"}
    assert len(names) > 100
    for text, what in ((emulated, "emulation"), (checks, "check")):
        lacking = {name for name in names if not re.search(rf"\b{name}\b", text)}
        assert not lacking, f"without {what}: {lacking}"
