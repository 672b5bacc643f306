"""Memory that calls leave behind: none, however often they are repeated."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recurrent_support import options_of
from support import cell_inputs

import fastseq
from fastseq import ops

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(
    not STATM.exists() or ops.NATIVE_MISSING is not None,
    reason="reads resident memory from Linux' /proc, of calls of the native kernels",
)

CELLS = list(ops.GATES)


def grows(call: Callable[[], object], times: int) -> float:
    """Bytes of resident memory that a call leaves behind.

    Measured over five stretches of calls, of which the median counts: what grows for another reason, such as a cache or
    a thread's heap, grows once, and the first calls may fill holes in the heap; a leak grows from then on.
    """
    page = os.sysconf("SC_PAGESIZE")

    def resident() -> int:
        return int(STATM.read_text().split()[1]) * page

    found = []
    for _ in range(5):
        before = resident()
        for _ in range(times):
            call()
        found.append((resident() - before) / times)
    return statistics.median(found)


def leaks(call: Callable[[], object], times: int, most: float) -> bool:
    """Whether a call leaves ``most`` bytes or more behind, three times over: a heap in pieces may grow for a while, by
    128 KiB at once, a leak does every time."""
    return all(grows(call, times) >= most for _ in range(3))


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_an_operator_called_20_000_times_keeps_no_memory(cell: str) -> None:
    number = ops.NUMBER[cell]
    inputs = cell_inputs(cell, 1, 1, 2, 3)
    x, w_ih, w_hh, _, _, _, h0, c0 = inputs
    weights = [w_ih, w_hh]
    forward, backward = torch.ops.fastseq.scan_forward.native, torch.ops.fastseq.scan_backward.native
    y, _, _, states, tape = forward(*inputs, *options_of(), number, False, True, True)
    grads = (torch.ones_like(y), None, None, None)
    calls: dict[str, Callable[[], object]] = {
        "scan_forward": lambda: forward(*inputs, *options_of(), number, False, True, True),
        "scan_backward": lambda: backward(*grads, y, states, tape, w_hh, None, h0, c0, *options_of(), number, False),
        "layers_forward": lambda: torch.ops.fastseq.layers_forward.native(
            x, weights, None, None, *options_of(), number, 1, False, False, True, True
        ),
        "layers_backward": lambda: torch.ops.fastseq.layers_backward.native(
            y,
            None,
            None,
            [],
            x,
            weights,
            None,
            None,
            *options_of(),
            None,
            [y],
            [states] * ops.HAS_C[cell],
            [tape] * bool(ops.TAPE[cell]),
            number,
            1,
            False,
            False,
            True,
            True,
        ),
    }
    assert [name for name, call in calls.items() if leaks(call, 4000, 16)] == []


def test_asking_for_the_instruction_set_keeps_no_memory() -> None:
    assert not leaks(lambda: torch.ops.fastseq.native_isa(""), 4000, 16)


def test_training_steps_of_a_packed_bidirectional_stack_keep_no_memory() -> None:
    model = fastseq.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3), [5, 3, 1])

    def step() -> None:
        model(packed)[0].data.sum().backward()
        model.zero_grad()

    assert not leaks(step, 800, 100), "bytes a step"


def test_training_steps_of_attention_keep_no_memory() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([2])

    def step() -> None:
        torch.autograd.grad(fastseq.attention(q, k, v, softcap=3.0, lengths_k=lengths).sum(), (q, k, v))

    assert not leaks(step, 800, 100), "bytes a step"
