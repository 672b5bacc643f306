"""The role of the Triton scan whose programs wait for each other, interpreted with the programs side by side.

Whatever order they run in, and however late their stores land, the numbers are those of the reference, and the bits the
same; without the wait, or without the release, they are not: so the schedule would show a race.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels.recurrent import (
    launch as recurrent_launch,
)
from fastseq.kernels.recurrent import (
    persistent as recurrent_persistent,
)
from fastseq.kernels.recurrent import (
    persistent_backward as recurrent_persistent_backward,
)
from fastseq.kernels.recurrent import tuning
from recurrent_support import OPTIONS, backward, compare, draw, forward, options, seed
from support import CELLS
from triton_recurrent_schedule import side_by_side
from triton_support import needs_interpreter

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def persistent() -> Iterator[None]:
    recurrent_launch.role = "persistent"
    yield
    recurrent_launch.role = None


@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_match_the_reference(cell: str) -> None:
    for number, option in enumerate(OPTIONS):
        dtype = [torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32][number]
        shape = [(3, 2, 5, 40), (4, 17, 3, 33), (1, 3, 4, 35), (2, 2, 3, 33), (5, 5, 7, 65)][number]
        seed(cell, option)
        lengths, reset, reverse = options(option, *shape[:2])
        with side_by_side(number) as schedule:
            compare(draw(cell, *shape, dtype=dtype), lengths, reset, cell, reverse, backend="triton")
        assert schedule.switches > 20


@pytest.mark.parametrize("cell", CELLS)
def test_large_tiles_of_the_batch(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_launch, "properties", lambda device: (227 * 1024, 3))
    dtype = torch.float16
    tile, _ = recurrent_launch.tile(cell, torch.empty(2, 18, 3, dtype=dtype), 40, False, False)
    assert tile.block_b == 64
    lengths, reset, reverse = options("lengths+reset+reverse", 2, 18)
    with side_by_side(5):
        compare(draw(cell, 2, 18, 3, 40, dtype=dtype), lengths, reset, cell, reverse, backend="triton")


def both_ways(cell: str, inputs, grads, lengths, reset):
    out = forward(inputs, lengths, reset, cell, True, backend="triton")
    return *out, *backward(grads, out, inputs, lengths, reset, cell, True, "triton")


@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_do_not_depend_on_who_comes_first(cell: str) -> None:
    inputs = draw(cell, 3, 3, 5, 70, dtype=torch.float32)
    lengths, reset, _ = options("lengths+reset", 3, 3)
    grads = [torch.randn(3, 3, 70), torch.randn(3, 70), None, None]
    with side_by_side(0):
        want = both_ways(cell, inputs, grads, lengths, reset)
    for number, restless in ((1, 0.0), (2, 0.9)):
        with side_by_side(number, restless):
            for a, b in zip(want, both_ways(cell, inputs, grads, lengths, reset), strict=True):
                assert torch.equal(a, b)


@triton.jit
def no_wait(arrived, count):
    tl.debug_barrier()


@triton.jit
def arrive_without_release(arrived):
    tl.atomic_add(arrived, 1, sem="relaxed", scope="gpu")


@pytest.mark.parametrize(("name", "broken"), [("wait", no_wait), ("arrive", arrive_without_release)])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_the_schedule_would_show_a_race(cell: str, name: str, broken, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(cell, 3, 2, 5, 70, dtype=torch.float32)
    grads = [torch.randn(3, 2, 70), torch.randn(2, 70), None, None]
    with side_by_side(0):
        out = forward(inputs, None, None, cell, False, backend="triton")
        back = backward(grads, out, inputs, None, None, cell, False, "triton")
    monkeypatch.setattr(recurrent_persistent, name, broken)
    monkeypatch.setattr(recurrent_persistent_backward, name, broken)
    with side_by_side(0):
        assert not torch.equal(forward(inputs, None, None, cell, False, backend="triton")[0], out[0])
        assert not torch.equal(backward(grads, out, inputs, None, None, cell, False, "triton")[0], back[0])


@triton.jit
def no_arrival(arrived):
    tl.debug_barrier()


def test_waiting_for_who_never_comes_is_a_deadlock_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_persistent, "arrive", no_arrival)
    monkeypatch.setattr("triton_recurrent_schedule.SPINS", 100)
    inputs = draw("gru", 2, 1, 3, 40, dtype=torch.float32)
    with side_by_side(0), pytest.raises(Exception, match="every program waits for another"):
        forward(inputs, None, None, "gru", False, backend="triton")


def test_reasons_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(9, 16, 1, dtype=torch.bfloat16)
    tile, reason = recurrent_launch.tile("lstm", x, 512, False, False)
    assert isinstance(tile, tuning.Persistent)
    assert reason == "asked for"
    assert tuning.persistent("bf16", 32, 1024, 132).block_b == 16  # 128 programs
    assert tuning.persistent("bf16", 33, 1024, 132).block_b == 64
    assert tuning.persistent("bf16", 128, 1024, 132).block_b == 64
    few = tuning.persistent("bf16", 16, 1024, 20)
    assert few == "B = 16, H = 1024 takes 64 programs at once; this device has 20 processors"
    with pytest.raises(ValueError, match="B = 16, H = 8192 takes 512 programs at once; this device has 132 processors"):
        recurrent_launch.tile("lstm", x, 8192, False, True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        with pytest.raises(ValueError, match="is for CUDA GPUs"):
            recurrent_launch.tile("lstm", x, 512, False, True)
    recurrent_launch.role = None
    tile, reason = recurrent_launch.tile("lstm", x, 512, False, False)
    assert type(tile) is tuning.Step  # not before it has run on hardware
    assert reason == "H = 512 is above 160, the most units of a lstm in bf16 that one SM holds"
