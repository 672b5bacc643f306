"""The Triton attention as a table of tiles may ask for it: tiles by TMA descriptors, programs that make several, and
scores made a tile ahead.

Which tile does so on which machine is in kernels/attention/tuning.py; here every one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_operators import (
    FEATURES,
    Options,
    arguments,
    assert_past_a_length_is_never_read,
    assert_right,
    dense,
    feature,
    packed,
)
from fastseq.kernels.attention import launch as attention_launch
from fastseq.kernels.attention import tuning as tuning_attention
from fastseq.kernels.attention.problem import Problem
from torch import Tensor
from triton.runtime import _allocation
from triton_support import interpreter_only, needs_interpreter

pytestmark = [
    needs_interpreter,
    interpreter_only,  # it changes the interpreter's own tiles
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]

SCHEDULES: list[dict[str, Any]] = [
    {"tma": True},
    {"persistent": 1},
    {"ahead": True},
    {"tma": True, "persistent": 2, "ahead": True},
]
NARROW = (1, 2, 1, 70, 70, 24, 20)  # rows of a multiple of 16 bytes; several tiles both ways, none of them full
WIDE = (2, 2, 2, 35, 70, 80, 40)  # q and k in two parts


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tiles = {role: tile._replace(**request.param) for role, tile in tuning_attention._INTERPRETED.items()}
    monkeypatch.setattr(tuning_attention, "_INTERPRETED", tiles)
    return request.param


def switches(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict[str, dict[str, bool]]:
    """Of each launch of tiles by TMA: what it is told of the schedule, by the fields of a tile."""
    x = Problem(q, k, v, *arguments(options))
    o = torch.empty(*q.shape[:-1], v.shape[-1])
    lse = torch.empty(attention_launch.row_sizes(x))
    plans = [*attention_launch.plan_forward(x, o, lse)]
    plans += attention_launch.plan_backward(x, o, o, lse, None, attention_launch.allocate(x, False))
    return {
        plan.kernel.__name__: {
            name: plan.arguments[name.upper()]
            for name in ("tma", "ahead", "persistent")
            if name.upper() in plan.arguments
        }
        for plan in plans
        if "TMA" in plan.arguments
    }


def right(schedule: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    found = switches(q, k, v, options)
    for kernel, told in found.items():
        wanted = {name: bool(schedule.get(name, False)) for name in told}
        assert told == wanted, kernel
    assert {"attention_forward", "attention_backward_keys", "attention_backward_queries"} <= set(found)
    assert_right(q, k, v, options, backend="triton", repeat=False)


@pytest.mark.parametrize("name", ["plain", "window", "lengths"])
def test_features(name: str, schedule: dict[str, Any]) -> None:
    shape = WIDE if name == "lengths" else NARROW
    right(schedule, *dense(shape), feature(name, torch.float32, shape))


@pytest.mark.full
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature(name: str, schedule: dict[str, Any]) -> None:
    """Shapes alternate: every schedule meets both, and so does every feature."""
    shape = (NARROW, WIDE)[(FEATURES.index(name) + SCHEDULES.index(schedule)) % 2]
    right(schedule, *dense(shape), feature(name, torch.float32, shape))


@pytest.mark.parametrize("more", [{}, pytest.param({"causal": True}, marks=pytest.mark.full)], ids=["plain", "causal"])
def test_packed_sequences(more: Options, schedule: dict[str, Any]) -> None:
    """Where a sequence ends, the next begins: a descriptor stops at its own sequence's end."""
    q, k, _, cu = packed([40, 0, 33, 20], [35, 7, 67, 0], torch.float32, spare=2)
    right(schedule, q, k, torch.randn(*k.shape[:2], 20), {**cu, **more})


@pytest.mark.parametrize("schedule", SCHEDULES[:1], ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(2, 4, 2, 3, 150, 24, 20), (1, 2, 2, 1, 150, 80, 40)], ids=["group", "two parts"])
def test_decoding(shape: tuple[int, ...], schedule: dict[str, Any]) -> None:
    q, k, v = dense(shape)
    assert switches(q, k, v, {})["attention_decode"] == {"tma": True}
    assert_right(q, k, v, feature("lengths", torch.float32, shape), backend="triton", repeat=False)


@pytest.mark.parametrize("schedule", SCHEDULES[:1], ids=str, indirect=True)
def test_what_lies_past_a_length_is_never_read(schedule: dict[str, Any]) -> None:
    assert_past_a_length_is_never_read(40, torch.float32, "triton")


@pytest.mark.parametrize("schedule", SCHEDULES[:1], ids=str, indirect=True)
def test_what_no_descriptor_can_say_is_read_by_pointers(schedule: dict[str, Any]) -> None:
    """Rows that begin anywhere, and rows that are all the same one."""
    q, k, v = dense((1, 2, 2, 33, 40, 24, 20))
    anywhere = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]
    same = k[:, :, :1].expand(-1, -1, 40, -1)
    assert not any(told["tma"] for told in switches(q, anywhere, v, {}).values())
    assert not switches(q, same, v, {})["attention_forward"]["tma"]
    assert not switches(q, same, v, {})["attention_backward_queries"]["tma"]
    for key in (anywhere, same):
        assert_right(q, key, v, {}, backend="triton", repeat=False)


def test_memory_for_descriptors_is_torchs_and_the_users_allocator_stays() -> None:
    before = _allocation._allocator.get()
    seen = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **arguments: seen.append(_allocation._allocator.get())

    for tma in (True, False):
        attention_launch.Plan(Kernel(), 1, {"TMA": tma}, {}).run()
    assert seen[0] is not before
    assert seen[1] is before
    assert _allocation._allocator.get() is before
