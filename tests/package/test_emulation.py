"""The machine that runs CUDA kernels on the host: it does what the primitives promise, and it notices faults."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulation.build import HERE, IN_ORDER, PRIORITY, ROOT, STICKY, UNIFORM, Library, compiler
from emulation.mutations import SCHEDULES, THREADS, Mutation, library, noticed, seeds

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++20 compiler")

CHECKS = sorted(HERE.glob("check_*.cu"))
NAMES = [name for path in CHECKS for name in re.findall(r"^FASTSEQ_CHECK\((\w+),", path.read_text(), re.MULTILINE)]
DEMO = HERE / "demo.cu"
DEMO_NAME = str(DEMO.relative_to(ROOT))


@functools.cache
def checks(sanitizer: str = "") -> tuple[Library, list[str]]:
    """The primitives' checks, and their names in the order of their numbers."""
    kernels, names = Library(CHECKS, sanitizer), []
    plain = Library(CHECKS)
    while (name := plain.call("check_name", [], [len(names)])) is not None:
        names.append(name)
    return kernels, names


@functools.cache
def demo(sanitizer: str = "") -> Library:
    return Library([DEMO], sanitizer)


# ---- What the demo's kernels compute.


def bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values cut to bfloat16: as bits and as floats."""
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def difference(got: np.ndarray, expected: np.ndarray) -> str | None:
    worst = np.abs(got - expected).max()
    return None if worst < 1e-4 else f"off by {worst}"


def run_pipeline(kernels: Library, machine: dict[str, int]) -> str | None:
    draw = np.random.default_rng(machine["seed"])
    (x_bits, x), (w_bits, w) = (bfloat16(draw.standard_normal((rows, 96))) for rows in (16, 32))
    y = np.full((16, 32), np.nan, np.float32)
    return kernels.call("run_pipeline", [x_bits, w_bits, y], [96], **machine) or difference(y, x @ w.T)


def scan(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    h, all_h = np.zeros(len(w)), []
    for x_t in x:
        h = np.tanh(x_t + w @ h)
        all_h.append(h)
    return np.array(all_h)


def run_scan(name: str, kernels: Library, machine: dict[str, int], integers: Sequence[int] = (1,)) -> str | None:
    draw = np.random.default_rng(machine["seed"])
    x = draw.standard_normal((5, 64)).astype(np.float32)
    w = (draw.standard_normal((64, 64)) / 8).astype(np.float32)
    expected = scan(x, w)
    if name == "run_mbar_scan":
        expected = expected.reshape(5, 2, 32).sum(-1)
    y = np.full(expected.shape, np.nan, np.float32)
    flags = np.zeros(4, np.uint32)
    error = kernels.call(name, [x, w, y, flags], [5, *integers], **machine)
    return error or difference(y, expected)


Run = Callable[[Library, dict[str, int]], str | None]
RUNS: dict[str, Run] = {
    "pipeline": run_pipeline,
    **{
        name: functools.partial(run_scan, f"run_{name}")
        for name in ("cluster_scan", "mbar_scan", "grid_scan", "flag_scan")
    },
}

# ---- Each primitive alone.


@pytest.mark.parametrize("name", NAMES)
def test_primitive_does_what_it_promises(name: str) -> None:
    kernels, names = checks()
    machines = [{"schedule": IN_ORDER}, *({"schedule": UNIFORM, "seed": seed} for seed in range(2)), *seeds(8)]
    for machine in machines:
        assert kernels.call("check_run", [], [names.index(name)], **machine) is None, machine


@pytest.mark.parametrize("name", NAMES)
def test_primitive_orders_what_it_promises(name: str) -> None:
    kernels, names = checks("thread")
    for machine in seeds(1):
        assert kernels.call("check_run", [], [names.index(name)], **machine) is None, machine


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_primitive_stays_inside_its_memory(name: str) -> None:
    kernels, names = checks("address")
    assert kernels.call("check_run", [], [names.index(name)], seed=1, schedule=STICKY) is None


# ---- Correct kernels pass.


@pytest.mark.parametrize("name", RUNS)
def test_correct_kernel_passes_every_schedule(name: str) -> None:
    machines = [{"seed": 0, "schedule": IN_ORDER}, {"seed": 0, "schedule": UNIFORM}, *seeds(25)]
    assert [found for machine in machines if (found := RUNS[name](demo(), machine))] == []


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", RUNS)
def test_correct_kernel_passes_the_sanitizers(name: str, sanitizer: str) -> None:
    assert noticed(RUNS[name], demo(sanitizer)) == []


# ---- Faulty ones do not.

BOTH = (SCHEDULES, THREADS)
MUTATIONS: dict[str, list[tuple[str, str, str, tuple[str, ...]]]] = {
    "pipeline": [
        ("no block sync after the copy's wait", "    sync_block();  // all have waited\n", "", BOTH),
        ("no block sync after reading", "    sync_block();  // all have read\n", "", BOTH),
        ("read before the copy's wait", "    cp_wait<1>();\n", "", (SCHEDULES,)),
        ("missing commit", "    cp_commit();\n    cp_wait<1>();\n", "    cp_wait<1>();\n", (SCHEDULES,)),
        (
            "swapped fragment",
            "stage + lane() % 16 * 16 + lane() / 16 * 8",
            "stage + (lane() % 8 + lane() / 16 * 8) * 16 + lane() / 8 % 2 * 8",
            (SCHEDULES,),
        ),
        ("wrong row stays in the tile", "if (row < 16) cp_async16", "if (row < 15) cp_async16", (SCHEDULES,)),
    ],
    "cluster_scan": [
        ("h not double-buffered", "h + (t + 1) % 2 * 64;", "h + t % 2 * 64;", BOTH),
        ("no first cluster sync", "cluster_sync();  // both blocks run and are zero", "sync_block();", (SCHEDULES,)),
        (
            "relaxed arrive where release is due",
            "cluster_arrive_release();  // the step",
            "cluster_arrive_relaxed();",
            BOTH,
        ),
        (
            "store to an exited block",
            "(next + unit, peer, float_bits(v));\n    cluster_arrive_release();  // the step\n    cluster_wait_acquire",
            "(next + unit, peer, float_bits(v));\n    cluster_arrive_release();\n    if (t < 4) cluster_wait_acquire",
            (SCHEDULES,),
        ),
    ],
    "mbar_scan": [
        (
            "missing shuffle lane",
            "total += shfl_xor(total, by);",
            "if (tid() != 31) total += shfl_xor(total, by);",
            (SCHEDULES,),
        ),
        ("no fence after mbar_init", "    fence_mbar_init();\n    mbar_arrive_tx", "    mbar_arrive_tx", (SCHEDULES,)),
        ("too few bytes expected", "mbar_arrive_tx(full + 1, 256)", "mbar_arrive_tx(full + 1, 128)", (SCHEDULES,)),
        ("wait for the other parity", "(t - 1) / 2 % 2);  // h_t", "(t + 1) / 2 % 2);  // h_t", (SCHEDULES,)),
        ("wait that sees its own block alone", "mbar_wait_cluster(full + now,", "mbar_wait(full + now,", (SCHEDULES,)),
        (
            "the last stores not waited for",
            "  mbar_wait_cluster(full + steps % 2, (steps - 1) / 2 % 2);",
            "  ",
            (SCHEDULES,),
        ),
    ],
    "grid_scan": [
        ("grid barrier made a block barrier", "ld_acquire_gpu(arrived) < nblocks() * (t + 1)", "false", BOTH),
        ("no block sync before the grid arrive", "    sync_block();  // before the grid's arrival\n", "", BOTH),
        ("no block sync after the grid arrive", "    sync_block();  // the grid has arrived\n", "", BOTH),
        ("relaxed addition where release is due", "red_release_gpu(arrived", "red_relaxed_gpu(arrived", (THREADS,)),
        ("relaxed load where acquire is due", "ld_acquire_gpu(arrived)", "ld_relaxed_gpu(arrived)", (THREADS,)),
    ],
    "flag_scan": [
        ("the wrong block's flag", "ld_acquire_gpu(flag + from)", "ld_acquire_gpu(flag + bid())", BOTH),
        ("no warp sync before the flag", "      sync_warp();  // all lanes have stored\n", "", (THREADS,)),
        ("relaxed flag where release is due", "st_release_gpu(flag", "st_relaxed_gpu(flag", (THREADS,)),
        ("wrong barrier count", "named_bar_sync(2, 64);", "named_bar_sync(2, 32);", (SCHEDULES,)),
        ("h overwritten before it is read", "named_bar_sync(2, 64);", "named_bar_arrive(2, 64);", (THREADS,)),
    ],
}
# In the checks of the asynchronous proxy: the check that fails, and the fault.
PROXY = HERE / "check_sm90a.cu"
PROXY_MUTATIONS: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    ("tma_load", "read before the box has landed", "  mbar_wait(bar, 0);\n  for", "  sync_block();\n  for", BOTH),
    ("tma_load_swizzled_by_64", "read without the swizzle", "place = swizzled<kSwizzle>(place);", ";", (SCHEDULES,)),
    ("tma_load", "fewer bytes expected", "mbar_arrive_tx(bar, count * 2)", "mbar_arrive_tx(bar, count)", (SCHEDULES,)),
    (
        "tma_store",
        "no proxy fence before a store",
        "  fence_proxy_async();\n  sync_block();\n  if",
        "  sync_block();\n  if",
        (THREADS,),
    ),
    (
        "tma_store",
        "no block sync before a store",
        "  sync_block();\n  if (tid() == 0) {\n    if (rank == 2) tma_store",
        "  if (tid() == 0) {\n    if (rank == 2) tma_store",
        (SCHEDULES,),
    ),
    ("tma_store", "store not waited for", "    tma_store_wait<0>();\n    tma_store_wait_all<0>();\n", "", (SCHEDULES,)),
    (
        "wgmma_n16",
        "no proxy fence before a product",
        "  fence_proxy_async();\n  sync_block();\n  float",
        "  sync_block();\n  float",
        (THREADS,),
    ),
    (
        "wgmma_n16",
        "accumulators read before their wait",
        "  wg_wait<1>();\n  wg_wait<0>(sums);\n",
        "  wg_wait<1>();\n",
        (SCHEDULES,),
    ),
    (
        "wgmma_n16",
        "an operand overwritten before the wait",
        "  wg_wait<1>();\n  wg_wait<0>(sums);\n",
        "  *reinterpret_cast<T*>(tile_a + tid() * 2) = from_float<T>(9);\n  wg_wait<1>();\n  wg_wait<0>(sums);\n",
        (SCHEDULES,),
    ),
    (
        "wgmma_n64_registers",
        "an operand in registers overwritten before the wait",
        "        wg_wait<0>(sums);\n        wg_fence();\n",
        "        fragment[tid() % 4] = 0;\n        wg_wait<0>(sums);\n        wg_fence();\n",
        (SCHEDULES,),
    ),
    ("wgmma_n16", "no warpgroup fence at all", "  wg_fence();\n  for (int pass", "  for (int pass", (SCHEDULES,)),
    (
        "wgmma_n256",
        "one k step for two",
        "wg_desc(tile_a + 32 * k, 16, 1024, 128), wg_desc(tile_b + 32 * k,",
        "wg_desc(tile_a + 32 * k, 16, 1024, 128), wg_desc(tile_b + 16 * k,",
        (SCHEDULES,),
    ),
]


def faults() -> list[Any]:
    """Each planted fault once for each means that must notice it."""
    found = []
    for kernel, mutations in MUTATIONS.items():
        for name, old, new, caught in mutations:
            mutation = Mutation(name, DEMO_NAME, old, new, caught)
            found += [pytest.param(RUNS[kernel], mutation, [DEMO], m, id=f"{kernel}: {name}: {m}") for m in caught]
    for check, name, old, new, caught in PROXY_MUTATIONS:
        mutation = Mutation(name, str(PROXY.relative_to(ROOT)), old, new, caught)
        run, sources = functools.partial(run_proxy_check, check), [HERE / "check_main.cu", PROXY]
        found += [pytest.param(run, mutation, sources, means, id=f"{check}: {name}: {means}") for means in caught]
    return found


def run_proxy_check(name: str, kernels: Library, machine: dict[str, int]) -> str | None:
    names = re.findall(r"^FASTSEQ_CHECK\((\w+),", PROXY.read_text(), re.MULTILINE)
    return kernels.call("check_run", [], [names.index(name)], **machine)


@pytest.mark.parametrize(("run", "mutation", "sources", "means"), faults())
def test_fault_is_noticed(run: Run, mutation: Mutation, sources: list[Path], means: str) -> None:
    faulty = library(mutation, sources, "thread" if means == THREADS else "")
    found = noticed(run, faulty)
    assert found, f"nothing noticed: {mutation}"
    if means == THREADS:
        assert any("data race" in text for text in found), found


# ---- Reports say who stands where.


def line_of(text: str) -> int:
    """The only line of the demo with this text."""
    (line,) = [i for i, line in enumerate(DEMO.read_text().splitlines(), 1) if text in line]
    return line


@pytest.mark.parametrize("schedule", [IN_ORDER, UNIFORM, STICKY, PRIORITY])
def test_too_few_resident_blocks_for_a_grid_barrier_are_a_livelock(schedule: int) -> None:
    machine = {"seed": 0, "schedule": schedule, "resident": 128}
    report = run_scan("run_grid_scan", demo(), machine, [0])
    assert report is not None
    assert report.startswith("livelock")
    assert re.search(
        rf"block \(\d, 0, 0\) warp 0 lanes 00000001: ld_acquire_gpu at demo.cu:{line_of('(arrived) <')}", report
    )
    waits = line_of("the grid has arrived")
    assert re.search(rf"block \(\d, 0, 0\) warp 1 lanes ffffffff: sync_block at demo.cu:{waits}", report)


def test_missing_lane_is_a_deadlock_that_names_the_others() -> None:
    name, old, new, caught = MUTATIONS["mbar_scan"][0]
    faulty = library(Mutation(name, DEMO_NAME, old, new, caught), [DEMO])
    report = run_scan("run_mbar_scan", faulty, {"seed": 0, "schedule": STICKY})
    assert report is not None
    assert report.startswith("deadlock")
    assert f"lanes 7fffffff: shfl at demo.cu:{line_of('total += shfl_xor(total, by);')}" in report


def test_cooperative_launch_larger_than_the_device_is_refused() -> None:
    machine = {"seed": 0, "schedule": STICKY, "multiprocessors": 1, "shared_per_block": 256}
    assert run_scan("run_grid_scan", demo(), machine) == "too many blocks in cooperative launch"


def test_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    machines = [{"seed": seed, "schedule": STICKY, "resident": 128} for seed in range(6)]
    first, second = ([run_scan("run_grid_scan", demo(), machine, [0]) for machine in machines] for _ in range(2))
    assert first == second
    assert len(set(first)) > 2


# ---- The same checks for a GPU.

NVCC = shutil.which("nvcc") or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))), None)


@pytest.mark.full
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", CHECKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a", "sm_100"])
def test_primitives_compile_for_a_gpu_without_spills_or_warnings(
    source: Path, architecture: str, tmp_path: Path
) -> None:
    folders = [f"-I{ROOT}", f"-I{ROOT / 'csrc'}"]
    command = [str(NVCC), "-std=c++17", *folders, f"-arch={architecture}", "-Xptxas=-v", str(source)]
    goal = ["-c"] if source.name == "check_main.cu" else ["--cubin"]
    done = subprocess.run([*command, *goal, "-o", str(tmp_path / "out")], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said
    assert not re.search(r"C75\d\d", said), "ptxas serialises wgmma"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert all(spill == ("0", "0") for spill in spills), said
    assert spills or source.name == "check_main.cu"
