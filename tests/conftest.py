"""What every test gets: reproducible draws, poisoned memory, and the settings it changed put back."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator

import devices
import pytest
import torch
import without_hypothesis
from support import ISAS, fill_new_memory_with_junk

import fastseq
from fastseq import ops
from fastseq.calibration.file import path
from fastseq.ops.triton import interpreted

HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
if not HYPOTHESIS:
    without_hypothesis.install()

from hypothesis import settings  # noqa: E402

# Without Triton its kernels have no tests.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*"]

# Examples take as long as the machine is busy; a failing one is printed and replayed by hypothesis itself.
settings.register_profile("fastseq", deadline=None, print_blob=True)
settings.load_profile("fastseq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=devices.CHOICES,
        help="where tests draw; cuda: the tests of GPU kernels alone, on a GPU; pretend: the same without one",
    )  # fmt: skip
    parser.addoption(
        "--kernels", default="triton", choices=("triton", "native"),
        help="whose GPU kernels are tested with --device cuda; native: CUDA C++",
    )  # fmt: skip
    parser.addoption("--fuzz-seed", default=0, type=int, help="what tests/package/test_fuzz.py draws from")
    parser.addoption("--fuzz-examples", default=0, type=int, help="calls that each of its tests draws; 0: few")


def pytest_configure(config: pytest.Config) -> None:
    device, kernels = config.getoption("--device"), config.getoption("--kernels")
    if device == "cpu" and not HYPOTHESIS:
        raise pytest.UsageError("hypothesis is not installed: pip install hypothesis")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    devices.use(device, kernels)
    if (measured := path()) is not None and measured.exists():  # tests are of AUTO's table, in their children too
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only what is marked for it; on the CPU the Triton kernels only where they are interpreted."""
    away = [
        item
        for item in items
        if devices.DEVICE == "cuda"
        and (item.get_closest_marker("device") is None or item.get_closest_marker("interpreter_only") is not None)
    ]
    items[:] = [item for item in items if item not in set(away)]
    config.hook.pytest_deselected(items=away)
    for item in items:
        mark = item.get_closest_marker("device")
        if mark is not None and "triton" in mark.args and devices.DEVICE == "cpu" and not interpreted():
            item.add_marker(pytest.mark.skip(reason="runs in the interpreted process"))


def pytest_report_header() -> list[str]:
    native = ops.NATIVE_MISSING or torch.ops.fastseq.native_isa("")
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; fastseq {fastseq.__version__} from "
        f"{os.path.dirname(fastseq.__file__)}; native kernels: {native}",
        *(["Triton is not installed: the tests of its kernels are left out"] if collect_ignore_glob else []),
    ]


EMULATED = re.compile(r"test_(emulation|cuda_(?!\w*_compiled))\w*\.py::")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch from the test's own name: every test draws other numbers, and the same ones each time it runs."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hands what a test has counted to the process that reports."""
    before = devices.COUNTS.copy()
    yield
    request.node.user_properties += [("count", item) for item in (devices.COUNTS - before).items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many calls were held to the reference, how many kernels compiled (told when a test is torn down), and how
    much was run on the machine that emulates a GPU."""
    total: Counter[str] = Counter()
    for report in terminalreporter.stats.get("", []):
        if report.when == "teardown":
            for _, (what, count) in (x for x in report.user_properties if x[0] == "count"):
                total[what] += count
    for what, count in sorted(total.items()):
        terminalreporter.write_line(f"{count} {what}")
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if EMULATED.search(report.nodeid)]
    faults = [name for name in passed if "fault" in name.partition("::")[2].partition("[")[0]]
    if passed and devices.DEVICE == "cpu":
        terminalreporter.write_line(
            f"emulated GPU: {len(passed)} tests passed, in {len(faults)} of which a planted fault was noticed"
        )


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Puts back the number of threads and the instruction set that a test chose."""
    threads = torch.get_num_threads()
    isa = torch.ops.fastseq.native_isa("") if ops.NATIVE_MISSING is None else None
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if isa is not None:
        torch.ops.fastseq.native_isa(isa)


@pytest.fixture(scope="session", autouse=True)
def poison() -> Iterator[None]:
    """Fills all memory that torch hands out on the CPU with junk."""
    fill_new_memory_with_junk(True)
    yield
    fill_new_memory_with_junk(False)


@pytest.fixture(autouse=True)
def poison_gpu(request: pytest.FixtureRequest) -> None:
    """Leaves junk in the memory that torch's allocator keeps for the next small and large tensors on a GPU."""
    if request.config.getoption("--device") != "cuda":
        return
    blocks = [torch.empty(size, dtype=torch.int32) for size in [1 << 12] * 8 + [1 << 17] * 8 + [1 << 20] * 8]
    for block in blocks:
        block.fill_(0x7FEDBEEF)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of the native CPU kernels in turn; skips those that are not built or not to be had here."""
    if ops.NATIVE_MISSING is not None:
        pytest.skip(f"the compiled extension is not installed: {ops.NATIVE_MISSING}")
    try:
        return torch.ops.fastseq.native_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2, 3], ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param
