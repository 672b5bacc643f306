"""The scan's CUDA kernels have no race that ThreadSanitizer or an adverse schedule can find; planted faults are found.

The faults are planted in a copy of the kernels. Some show as wrong bits or a report under an adverse schedule, some to
ThreadSanitizer alone.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from cuda_recurrent_support import CUDA, machine
from emulation import build
from recurrent_support import backward, draw, forward, options
from torch import Tensor

from fastseq import ops

pytestmark = pytest.mark.skipif(
    build.compiler() is None or ops.NATIVE_MISSING is not None or shutil.which("setarch") is None,
    reason="needs a C++ compiler, the CPU extension and setarch",
)
CELLS = {"lstm": 2, "gru_reset_before": 4}
ROLES = {"grid": 1, "cluster": 2, "cluster_barrier": 3}
T, B, H = 4, 5, 19


class Walk:
    """One draw of a cell, what the right kernels give, and walks of others to hold to it."""

    def __init__(self, cell: str, role: str) -> None:
        torch.manual_seed(1)
        self.numbers = [T, B, H, True, CELLS[cell], ROLES[role], 2, 96, 8]
        inputs = draw(cell, T, B, 3, H, dtype=torch.bfloat16)
        lengths, reset, _ = options("lengths+reset", T, B)
        x, w_ih, w_hh, b_ih, b_hh, _, h0, c0 = inputs
        lstm = cell == "lstm"
        dy, dh_n, dc_n = torch.ones(T, B, H).bfloat16(), *torch.ones(2, B, H).bfloat16()
        with machine(role, 2, 96, 8):
            out = forward(inputs, lengths, reset, cell, True, backend="emulated")
            grads = [dy, dh_n, dc_n if lstm else None, None]
            dgates, _, dh0, dc0, *_ = backward(grads, out, inputs, lengths, reset, cell, True, "emulated")
        y, h_n, c_n, states, tape = out
        gates_x = torch.nn.functional.linear(x, w_ih, b_ih)
        self.calls = {
            "walk_forward": (
                [gates_x, w_hh, b_hh, h0, c0, lengths, reset],
                [y, h_n, c_n if lstm else None, states if lstm else None, tape],
            ),
            "walk_backward": (
                [dy, dh_n, dc_n if lstm else None, y, tape, w_hh, h0, c0, states if lstm else None, lengths, reset],
                [dgates, dh0, dc0 if lstm else None],
            ),
        }

    def fault(self, library: build.Library, seed: int = 0, schedule: int = build.IN_ORDER) -> str | None:
        """What is wrong with the walks of these kernels, or None."""
        for name, (given, expected) in self.calls.items():
            results: list[Tensor | None] = [None if t is None else torch.empty_like(t) for t in expected]
            error = library.call(name, [*given, *results], self.numbers, seed=seed, schedule=schedule)
            if error is not None:
                return error
            for ours, wanted in zip(results, expected, strict=True):
                if wanted is not None and not torch.equal(ours, wanted):
                    return "other bits"
        return None


@functools.lru_cache
def walk(cell: str, role: str) -> Walk:
    return Walk(cell, role)


def sources(folder: Path) -> list[Path]:
    return [build.HERE / "recurrent_entries.cpp", folder / "plan.cpp"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_thread_sanitizer_finds_no_race(cell: str, role: str) -> None:
    library = build.Library(sources(CUDA), "thread")
    for schedule in (build.IN_ORDER, build.STICKY):
        assert walk(cell, role).fault(library, 7, schedule) is None


SYNC = "    sync_block();\n"
# name: role, file, what stands there, what is put in its place
FAULTS = {
    "no block barrier before the push": ("cluster", "exchange", SYNC + "    const int e", "    const int e"),
    "no block barrier before the push, with the cluster's barrier": (
        "cluster_barrier", "exchange", SYNC + "    ++this->epoch;", "    ++this->epoch;",
    ),
    "no cluster barrier before the first push": ("cluster", "exchange", "    if (blocks > 1) cluster_sync();\n", ""),
    "one buffer": ("cluster", "exchange", "return (e & 1) * layout.buffer;", "return 0;"),
    "one buffer, with the cluster's barrier": (
        "cluster_barrier", "exchange", "return (e & 1) * layout.buffer;", "return 0;",
    ),
    "arrival that releases nothing": (
        "cluster_barrier", "exchange", "cluster_arrive_release()", "cluster_arrive_relaxed()",
    ),
    "barriers that the cluster does not know": ("cluster", "exchange", "      fence_mbar_init();\n", ""),
    "no bytes expected": (
        "cluster", "exchange", "mbar_arrive_tx(bar, theirs * 16 * kParts * mine.columns)", "mbar_arrive(bar)",
    ),
    "a column's bytes not expected": ("cluster", "exchange", "* mine.columns)", "* (mine.columns - 1))"),
    "wait for the phase before": ("cluster", "exchange", "(this->epoch - 1) / 2 & 1", "(this->epoch + 1) / 2 & 1"),
    "wait at the other buffer's barrier": (
        "cluster", "exchange", "_wait_cluster(bars + (this->epoch & 1)", "_wait_cluster(bars + (~this->epoch & 1)",
    ),
    "wait that acquires from its own block alone": ("cluster", "exchange", "mbar_wait_cluster(", "mbar_wait("),
    "no block barrier before the grid's arrival": (
        "grid", "exchange", SYNC + "    ++epoch;\n    if (tid()", "    ++epoch;\n    if (tid()",
    ),
    "counter that releases nothing": ("grid", "exchange", "red_release_gpu", "red_relaxed_gpu"),
    "no block barrier after the grid's wait": ("grid", "exchange", "      }\n" + SYNC, "      }\n"),
    "counter that waits for one block less": (
        "grid", "exchange", "static_cast<unsigned>(epoch) * blocks", "static_cast<unsigned>(epoch) * blocks - 1",
    ),
    "grid's wait made a block's": (
        "grid", "exchange", "ld_acquire_gpu(counter) < static_cast<unsigned>(epoch) * blocks", "false",
    ),
    "one buffer of the grid": ("grid", "exchange", "return buffers + (e & 1) * layout.buffer;", "return buffers;"),
    "no block barrier after the wait for the grid's copy": (
        "grid", "exchange", "    cp_wait<0>();\n" + SYNC, "    cp_wait<0>();\n",
    ),
    "the grid's copy read before its wait": ("grid", "exchange", "    cp_wait<0>();\n", ""),
    "the grid's copy not committed": ("grid", "exchange", "    cp_commit();\n", ""),
    "barrier that counts an arrival too many": (
        "cluster", "exchange", "mbar_init(bars + 1, 1)", "mbar_init(bars + 1, 2)",
    ),
    "stores to a block that has ended": (
        "cluster", "resident", "if (more) exchange.template publish<1>", "exchange.template publish<1>",
    ),
    "no block barrier after the product": ("grid", "resident", "columns, exchange);\n" + SYNC, "columns, exchange);\n"),
    "swapped halves of a fragment": (
        "grid", "product", "const int m = row + (i & 1) * 8;", "const int m = row + (i >> 1) * 8;",
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    role, file, old, new = FAULTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    folder = csrc / CUDA.relative_to(build.ROOT / "csrc")
    target = folder / f"{file}.cuh"
    text = target.read_text()
    assert old in text, "the fault has no place any more"
    target.write_text(text.replace(old, new))
    quote = [tmp_path, csrc]
    plain = build.Library(sources(folder), quote=quote)
    seeds = list(itertools.product((build.STICKY, build.PRIORITY), range(1, 5)))
    if any(walk(cell, role).fault(plain, seed, schedule) for cell in CELLS for schedule, seed in seeds):
        return
    thread = build.Library(sources(folder), "thread", quote=quote)
    found = [walk(cell, role).fault(thread, 1, build.STICKY) for cell in CELLS]
    assert any(found), "no schedule and no sanitizer sees it"
