"""The CUDA kernels of the scan against the reference, on the emulated machine: every cell, dtype, role and schedule.

With ``--device cuda --kernels native`` on a GPU, where no schedule can be asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import devices
import pytest
import torch
from cuda_recurrent_support import emulation_only, hook, machine, missing, plan
from emulation import build
from recurrent_support import OPTIONS, backward, compare, draw, forward, options, seed
from support import CELLS
from torch import Tensor

from bench.studies import fit
from fastseq import backend, ops
from fastseq.recurrent import reference

pytestmark = [pytest.mark.device("native"), missing]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = [build.IN_ORDER, build.UNIFORM, build.STICKY, build.PRIORITY]


class Case(NamedTuple):
    """A role with its blocks, threads a block and rows a tile, and the shape T, B, I, H it is given."""

    role: str
    blocks: int
    threads: int
    rows: int
    shape: tuple[int, int, int, int]


# T = 1, B = 1, H = 1; H that no tile divides; a last block with few units; two tiles of rows, the second ragged; two
# tiles of columns; more work than a warp's registers hold; one warp alone.
CASES = [
    Case("step", 0, 0, 0, (1, 1, 1, 1)),
    Case("step", 0, 0, 0, (5, 3, 3, 33)),
    Case("grid", 1, 32, 8, (1, 1, 1, 1)),
    Case("grid", 3, 96, 8, (4, 9, 5, 17)),
    Case("grid", 2, 192, 16, (3, 11, 2, 33)),
    Case("cluster", 1, 32, 8, (1, 1, 1, 1)),
    Case("cluster", 1, 160, 8, (4, 9, 5, 33)),
    Case("cluster", 2, 192, 16, (3, 11, 2, 33)),
    Case("cluster", 4, 64, 8, (5, 7, 3, 49)),
    Case("cluster", 8, 32, 8, (3, 3, 3, 57)),
    Case("cluster", 16, 32, 8, (2, 3, 3, 121)),
    Case("cluster_barrier", 2, 96, 8, (4, 9, 5, 17)),
]
LARGE = [
    Case("grid", 4, 256, 8, (3, 10, 7, 129)),
    Case("grid", 8, 64, 8, (9, 5, 7, 57)),
    Case("cluster", 1, 512, 8, (3, 8, 7, 97)),
    Case("cluster", 2, 512, 16, (2, 33, 7, 65)),
    Case("cluster", 4, 256, 8, (3, 10, 7, 129)),
    Case("cluster", 8, 64, 8, (9, 5, 7, 57)),
    Case("cluster", 8, 64, 8, (5, 5, 7, 65)),  # whose units six blocks have, or five
    Case("cluster", 16, 32, 8, (9, 5, 7, 121)),
    Case("cluster_barrier", 4, 64, 8, (5, 7, 3, 49)),
]


def check(cell: str, dtype: torch.dtype, case: Case, option: str, schedule: int, draws: int = 0) -> None:
    steps, batch = case.shape[:2]
    with machine(case.role, case.blocks, case.threads, case.rows, seed=draws, schedule=schedule):
        for direction in (False, True):
            found = plan(cell, dtype, case.shape[3], batch, direction)
            if found["role"] != case.role:
                assert devices.DEVICE == "cuda", found["reason"]  # or it has no such clusters
                return
        seed(cell, dtype, case, draws)
        inputs = draw(cell, *case.shape, dtype=dtype)
        lengths, reset, reverse = options(option, steps, batch)
        compare(inputs, lengths, reset, cell, reverse, (True, True, True, True), "emulated")


@emulation_only
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_cases_have_clusters_of_every_size(dtype: torch.dtype) -> None:
    sizes = set()
    for case in CASES:
        with machine(case.role, case.blocks, case.threads, case.rows):
            for direction in (False, True):
                found = plan("lstm", dtype, case.shape[3], case.shape[1], direction)
                assert found["role"] == case.role
                sizes.add((direction, case.role == "cluster" and int(found["blocks"])))
    assert sizes >= set(itertools.product((False, True), (1, 2, 4, 8, 16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_match_the_reference(cell: str, dtype: torch.dtype) -> None:
    # Each case meets another option and another schedule in each cell and dtype.
    first = CELLS.index(cell) + 2 * DTYPES.index(dtype)
    for n, case in enumerate(CASES):
        check(cell, dtype, case, OPTIONS[(n + first) % 5], SCHEDULES[(n + first) % 4], n)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_match_the_reference_in_every_option(cell: str, dtype: torch.dtype) -> None:
    for n, (case, option) in enumerate(itertools.product(CASES, OPTIONS)):
        check(cell, dtype, case, option, SCHEDULES[n % 4], 100 + n)
    for n, case in enumerate(LARGE):
        check(cell, dtype, case, OPTIONS[n % 5], SCHEDULES[n % 4], 200 + n)


def run(cell: str, inputs: list, lengths: Tensor | None, reset: Tensor | None, reverse: bool) -> list[Tensor]:
    out = forward(inputs, lengths, reset, cell, reverse, backend="emulated")
    lstm = ops.HAS_C[cell]
    grads = [torch.ones_like(out[0]), torch.ones_like(out[1]), torch.ones_like(out[2]) if lstm else None, None]
    return [*out, *backward(grads, out, inputs, lengths, reset, cell, reverse, "emulated")]


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("role", ["grid", "cluster"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_float32_is_one_product_of_tf32_where_torch_allows_it_and_exact_elsewhere(cell: str, role: str) -> None:
    """One step, whose factors are known: each setting is within float32's rounding of its own product alone."""
    inputs = draw(cell, 1, 9, 5, 33, dtype=torch.float32)
    inputs[0] = torch.zeros_like(inputs[0])  # its product is torch's
    dy = torch.randn(1, 9, 33)
    for setting in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = setting
        with machine(role, 2, 96):
            out = forward(inputs, None, None, cell, False, backend="emulated")
            dgates, _, dh0, *_ = backward([dy, None, None, None], out, inputs, None, None, cell, False, "emulated")
        for name, factor in (("tf32", as_tf32), ("ieee", lambda t: t)):
            x, w_ih, w_hh, b_ih, b_hh, _, h0, c0 = inputs
            exact: list[Any] = [x, w_ih, factor(w_hh), b_ih, b_hh, None, factor(h0), c0]
            exact = [None if t is None else t.double() for t in exact]
            y = reference.scan(*exact, None, None, None, None, cell=cell)[0]
            found = [(out[0] - y).abs().max(), (dh0 - factor(dgates[0]).double() @ factor(w_hh).double()).abs().max()]
            for error in found:
                assert error < 2e-6 if name == setting else error > 2e-5, (setting, name, error)


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("cell", CELLS)
def test_a_walk_in_tf32_stays_near(cell: str) -> None:
    torch.set_float32_matmul_precision("high")
    assert torch.ops.fastseq.one_tf32_product()
    inputs = draw(cell, 5, 9, 5, 33, dtype=torch.float32)
    lengths, reset, _ = options("lengths+reset", 5, 9)
    with machine("cluster", 2, 96):
        y = forward(inputs, lengths, reset, cell, True, backend="emulated")[0]
    exact: list[Any] = [None if t is None else t.double() for t in inputs]
    error = (y - reference.scan(*exact, None, None, lengths, reset, cell=cell, reverse=True)[0]).abs().max()
    assert 1e-5 < error < 2e-3


@pytest.mark.parametrize("role", ["grid", "cluster"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_every_schedule_gives_the_same_bits(cell: str, role: str) -> None:
    inputs = draw(cell, 5, 5, 3, 19, dtype=torch.bfloat16)
    lengths, reset, reverse = options("lengths+reset+reverse", 5, 5)
    with machine(role, 2, 96):
        expected = run(cell, inputs, lengths, reset, reverse)
    assert all(t.isfinite().all() for t in expected)
    for schedule, number in itertools.product((build.STICKY, build.PRIORITY), range(1, 5)):
        with machine(role, 2, 96, seed=number, schedule=schedule):
            for ours, wanted in zip(run(cell, inputs, lengths, reset, reverse), expected, strict=True):
                assert torch.equal(ours, wanted), f"schedule {schedule}, seed {number}"


@pytest.mark.parametrize("role", ["step", "grid", "cluster"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_absent_counts_as_zero(cell: str, role: str) -> None:
    steps, batch, hidden, lstm = 3, 4, 9, ops.HAS_C[cell]
    inputs = draw(cell, steps, batch, 5, hidden, biases=False, dtype=torch.float32)
    bare = [*inputs[:6], None, None]
    zeros = [*inputs[:6], torch.zeros(batch, hidden), torch.zeros(batch, hidden) if lstm else None]
    with machine(role, 2 * (role != "step"), 64):
        ours, full = (forward(i, None, None, cell, False, backend="emulated") for i in (bare, zeros))
        for a, b in zip(ours, full, strict=True):
            assert torch.equal(a, b)
        lean = backward([None] * 4, ours, bare, None, None, cell, False, "emulated")
        assert not lean[0].any()
        assert lean[2].shape == lean[3].shape == (0,)
        dy, nothing = torch.randn(steps, batch, hidden), torch.zeros(batch, hidden)
        some = backward([dy, None, None, None], ours, bare, None, None, cell, False, "emulated")
        grads = [dy, nothing, nothing if lstm else None, None]
        whole = backward(grads, full, zeros, None, None, cell, False, "emulated")
    for a, b in zip(some[:2], whole[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("role", ["step", "cluster"])
def test_strides_do_not_matter(role: str) -> None:
    cell, steps, batch, hidden = "gru", 4, 3, 9
    inputs = draw(cell, steps, batch, 5, hidden, dtype=torch.float32)
    lengths, reset, _ = options("lengths+reset", steps, batch)
    strided = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in inputs]
    strided[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    dy = torch.randn(steps, batch, hidden)
    batch_first = dy.transpose(0, 1).contiguous().transpose(0, 1)
    views = [dy, batch_first, dy[:1, :1].expand_as(dy), torch.stack([dy, dy], 3)[..., 0]]
    with machine(role, 2 * (role != "step"), 64):
        ours = forward(strided, lengths, reset.t().contiguous().t(), cell, False, backend="emulated")
        plain = forward(inputs, lengths, reset, cell, False, backend="emulated")
        for a, b in zip(ours, plain, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)  # the input's product is torch's, whose order may differ
        for view in views:
            found, wanted = (
                backward([v, None, None, None], plain, inputs, lengths, reset, cell, False, "emulated")
                for v in (view, view.contiguous())
            )
            for a, b in zip(found, wanted, strict=True):
                assert torch.equal(a, b)


def test_what_lies_past_a_length_has_no_influence() -> None:
    steps, batch, hidden = 6, 5, 9
    lengths = torch.tensor([6, 0, 3, 1, 5])
    for cell, reverse, role in itertools.product(CELLS, (False, True), ("step", "grid", "cluster")):
        inputs = draw(cell, steps, batch, 3, hidden, dtype=torch.bfloat16)
        dirty = list(inputs)
        dirty[0] = inputs[0].masked_fill((torch.arange(steps)[:, None] >= lengths)[..., None], float("nan"))
        dy = torch.randn(steps, batch, hidden).bfloat16()
        grown = dy.masked_fill((torch.arange(steps)[:, None] >= lengths)[..., None], float("nan"))
        with machine(role, 2 * (role != "step"), 64):
            clean_out = forward(inputs, lengths, None, cell, reverse, backend="emulated")
            dirty_out = forward(dirty, lengths, None, cell, reverse, backend="emulated")
            clean, found = (
                backward([g, None, None, None], o, inputs, lengths, None, cell, reverse, "emulated")
                for g, o in ((dy, clean_out), (grown, dirty_out))
            )
        for a, b in zip([*clean_out, *clean], [*dirty_out, *found], strict=True):
            assert torch.equal(a, b), (cell, reverse, role)


def test_a_cell_state_may_grow_beyond_what_16_bits_hold() -> None:
    inputs = draw("lstm", 4, 2, 3, 9, dtype=torch.float16)
    inputs[7] = torch.full((2, 9), 6e4, dtype=torch.float16)
    inputs[3] = torch.zeros(36, dtype=torch.float16)
    inputs[3][:] = 30  # all gates open: c grows by a candidate of 1 a step
    with machine("cluster", 2, 64):
        _, _, _, states, _ = forward(inputs, None, None, "lstm", False, backend="emulated")
    assert torch.equal(states[-1], torch.full((2, 9), 6e4).half().float() + 4)


def test_errors_name_what_is_wrong() -> None:
    inputs = draw("gru", 2, 2, 3, 5, dtype=torch.float64)
    with machine():  # which registers them
        pass
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        forward(inputs, None, None, "gru", False, backend="emulated")
    inputs = draw("lstm", 2, 2, 3, 5, projected=2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no projection"):
        forward(inputs, None, None, "lstm", False, backend="emulated")
    inputs = draw("gru", 2, 2, 3, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"h0 must be of shape \[2, 5\]"):
        forward([*inputs[:6], torch.zeros(3, 5), None], None, None, "gru", False, backend="emulated")


@emulation_only
def test_an_old_device_gets_the_grid_and_a_large_scan_the_step() -> None:
    with machine(major=8, multiprocessors=108, shared=163 * 1024):
        found = plan("lstm", torch.bfloat16, 512, 8)
        assert found["role"] == "grid"
        assert "compute capability 9.0" in found["reason"]
        found = plan("lstm", torch.float32, 4096, 8)
        assert found["role"] == "step"
        assert "bytes of shared memory a block; this device has 166912" in found["reason"]
    with machine():
        assert plan("lstm", torch.bfloat16, 512, 8)["role"] == "cluster"
        assert plan("gru", torch.bfloat16, 1024, 8)["role"] == "grid"


@emulation_only
@pytest.mark.parametrize("walk_back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_plan_keeps_to_what_the_device_has(cell: str, walk_back: bool) -> None:
    for dtype, hidden, batch in itertools.product(DTYPES, (1, 63, 160, 512, 768, 1024, 2048), (1, 17, 64, 500)):
        with machine():
            found = plan(cell, dtype, hidden, batch, walk_back)
        if found["role"] == "step":
            assert found["reason"]
            continue
        blocks, groups, units, rows, threads, shared = (
            int(found[k]) for k in ("blocks", "groups", "units", "rows", "threads", "shared")
        )
        assert shared <= 232448
        assert threads in (128, 256, 512)
        assert units * blocks >= hidden > units * (blocks - 1)
        assert units * rows <= 2 * threads
        assert groups <= -(-batch // rows)
        assert groups * blocks * (threads if found["role"] == "cluster" else 2048) <= 132 * 2048


@emulation_only
def test_native_on_cuda_says_why_not() -> None:
    reason = backend.operator_reason("native", "cuda")
    assert reason is None or "CUDA kernels are not installed" in reason
    assert "of attention" in str(backend.operator_reason("native", "mps", "attention"))


def test_the_page_of_what_fits_is_true() -> None:
    lines = fit.table(hook("plan"), hook("role"))
    page = (build.ROOT / "docs" / "cuda-scan.md").read_text()
    assert "\n".join(lines) in page, "python -m bench fit has the tables as they are now"
