"""Attention's backward pass on the emulated machine as a Hopper GPU runs it: TMA, mbarriers, products of warpgroups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attention_emulated
import pytest
import torch
from attention_emulated import settings
from attention_operators import (
    Options,
    arguments,
    assert_past_a_length_is_never_read,
    assert_right,
    backward,
    dense,
    feature,
    forward,
)
from cuda_recurrent_support import emulation_only, missing
from emulation import build
from emulation.mutations import Mutation, library, noticed
from test_cuda_attention_emulated import HALVES, HEADS, LIMITS, limits
from torch import Tensor

pytestmark = [pytest.mark.device("native"), missing]


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with attention_emulated.emulating(9):
        yield


def check(q: Tensor, k: Tensor, v: Tensor, options: Options, **how: Any) -> None:
    assert_right(q, k, v, {"scale": q.shape[-1] ** -0.5, **options}, backend="emulated", **{"repeat": False, **how})


def refusal(q: Tensor, k: Tensor, v: Tensor, options: Options, d_o: Tensor | None = None) -> str | None:
    packed = q.dim() == 3
    o = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.zeros((q.shape[1], q.shape[0]) if packed else q.shape[:3])
    d_o = o if d_o is None else d_o
    return attention_emulated.backward_refusal(d_o, None, q, k, v, o, lse, *arguments(options), False)


def packed(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype) -> Any:
    """Four query heads, two key heads; two rows more than the sequences have."""
    heads, dim, dim_v = (4, 2), 24, 16
    cu = {f"cu_seqlens_{n}": torch.tensor([0, *x]).cumsum(0).int() for n, x in (("q", lengths_q), ("k", lengths_k))}
    sizes = (sum(lengths_q), heads[0], dim), (sum(lengths_k), heads[1], dim), (sum(lengths_k), heads[1], dim_v)
    return *(torch.randn(n + 2, *rest).to(dtype) for n, *rest in sizes), cu


@emulation_only
def test_the_plain_class_is_taken_and_all_else_left_with_a_reason() -> None:
    shape = (2, 4, 2, 33, 65, 24, 16)
    q, k, v = dense(shape, torch.bfloat16)
    for name in LIMITS:
        assert refusal(q, k, v, limits(name, shape)) is None
    for name in ("bias", "mask", "softcap", "alibi", "dropout", "negative scale"):
        assert "single pairs" in str(refusal(q, k, v, feature(name, torch.bfloat16, shape)))
    assert "16 bytes" in str(refusal(q[..., :20], k[..., :20], v, {}))
    assert "no queries" in str(refusal(q[:, :, :0], k, v, {}))
    assert "broadcast" in str(refusal(q, k, v, {}, torch.ones(2, 4, 1, 16, dtype=q.dtype).expand(2, 4, 33, 16)))
    settings.major = 8
    assert "compute capability" in str(refusal(q, k, v, {}))


@emulation_only
def test_these_kernels_are_what_runs() -> None:
    """They add in another order than the portable ones."""
    q, k, v = dense((1, 1, 1, 64, 64, 128, 128), torch.float16)
    o, lse = forward(q, k, v, {}, "emulated")
    d_o = torch.randn(o.shape).to(o.dtype)
    here = backward(d_o, None, q, k, v, o, lse, {}, "emulated")[:3]
    settings.major = 8
    portable = backward(d_o, None, q, k, v, o, lse, {}, "emulated")[:3]
    assert not any(torch.equal(a, b) for a, b in zip(here, portable, strict=True))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_kind_of_heads_under_every_limit(heads: tuple[int, int], name: str) -> None:
    """More tiles than one in both directions, odd ones at the ends."""
    shape = (1, 2, 1, 75, 131, *heads) if name in ("full", "sinks") else (2, 1, 1, 140, 131, *heads)
    settings.schedule, settings.seed = build.STICKY, HEADS.index(heads)
    dtype = HALVES[(HEADS.index(heads) + list(LIMITS).index(name)) % 2]
    check(*dense(shape, dtype), limits(name, shape), with_dlse=name == "sinks")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packed_sequences_of_grouped_heads(dtype: torch.dtype) -> None:
    *tensors, cu = packed([1, 0, 130, 33], [65, 7, 149, 0], dtype)
    check(*tensors, {**cu, "causal": True})
    settings.multiprocessors = 1  # one block makes all tiles
    check(*tensors, {**cu, "window_left": 5, "bottom_right": False, "sinks": torch.randn(4)})


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 8, 8), (1, 1, 1, 17, 200, 72, 40), (1, 3, 1, 129, 128, 64, 64),
                                   (1, 2, 2, 260, 1, 136, 128)], ids=str)  # fmt: skip
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    settings.decode = False
    check(*dense(shape, torch.bfloat16), {"causal": shape[3] != shape[4]})


def test_any_strides() -> None:
    q, k, v = dense((2, 2, 1, 20, 40, 64, 64), torch.bfloat16)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (8, 8))[..., 8:-8],
        lambda x: x[:1, :1].expand(x.shape),
    ):
        check(layout(q), layout(k), layout(v), {"causal": True})


@pytest.mark.parametrize("heads", [(16, 16), (128, 128)], ids=str)
def test_what_lies_past_a_length_is_never_read(heads: tuple[int, int]) -> None:
    assert_past_a_length_is_never_read(40, torch.bfloat16, "emulated")
    options = {"lengths_q": torch.tensor([150, 3]), "lengths_k": torch.tensor([70, 139]), "causal": True}
    q, k, v = dense((2, 2, 1, 150, 140, *heads), torch.bfloat16)
    d_o = torch.randn(2, 2, 150, heads[1]).to(q.dtype)
    results = []
    for junk in (0.0, math.nan, math.inf):
        q[1, :, 3:], d_o[1, :, 3:] = junk, junk
        k[0, :, 70:], v[0, :, 70:], k[1, :, 139:], v[1, :, 139:] = junk, junk, junk, junk
        o, lse = forward(q, k, v, options, "emulated")
        results.append(backward(d_o, None, q, k, v, o, lse, options, "emulated")[:3])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert all(x.isfinite().all() for x in results[0])


def gradients(options: Options, heads: tuple[int, int] = (64, 64), offset: float = 0) -> list[Tensor]:
    """Of inputs that are always the same, NaN past the lengths. With an offset of values dq meets all keys again."""
    torch.manual_seed(0)
    q, k, v = dense((1, 2, 1, 150, 300, *heads), torch.bfloat16)
    v += offset
    if "lengths_q" in options:
        for x, lengths in ((q, "lengths_q"), (k, "lengths_k"), (v, "lengths_k")):
            x[:, :, int(options[lengths]) :] = math.nan
    schedule, settings.schedule = settings.schedule, build.IN_ORDER
    o, lse = forward(q, k, v, options, "emulated")
    settings.schedule = schedule
    return list(backward(torch.randn(o.shape).to(o.dtype), None, q, k, v, o, lse, options, "emulated")[:3])


@pytest.mark.parametrize("schedule", [build.UNIFORM, build.STICKY, build.PRIORITY])
def test_no_order_of_threads_changes_a_bit(schedule: int) -> None:
    options = {"causal": True, "sinks": torch.randn(2)}
    settings.multiprocessors = 2
    for offset in (0, 20):
        settings.schedule = build.IN_ORDER
        expected = gradients(options, offset=offset)
        settings.schedule = schedule
        for seed in range(2):
            settings.seed = seed
            got = gradients(options, offset=offset)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"seed {seed}"


KERNELS = "csrc/attention/cuda/hopper_backward.cu"
FAULTS = [
    Mutation("near tiles are read before they have come", KERNELS, "    of_s.near.wait_full();\n", ""),
    Mutation("far tiles are read before they have come", KERNELS, "      of_p.far.wait_full();\n", ""),
    Mutation(
        "a buffer is released before its products are done",
        KERNELS,
        "        wg_wait<1>(numbers_of(sum_p));\n        of_p.far.release();\n",
        "        of_p.far.release();\n        wg_wait<1>(numbers_of(sum_p));\n",
    ),
    Mutation("dp is read before the product", KERNELS, "      wg_wait<0>(numbers_of(dp));\n", ""),
    Mutation(
        "ds is overwritten before its product",
        KERNELS,
        "        of_p.far.release();\n      }\n      wg_wait<0>",
        "        of_p.far.release();\n      }\n      round_fragment<T>(ds, s);\n      wg_wait<0>",
    ),
    Mutation("a buffer is filled before it is empty", KERNELS, "        factor.far.wait_empty();\n", ""),
    Mutation("near tiles are not released", KERNELS, "    of_s.near.release();\n", ""),
    Mutation("near tiles are overwritten before results have left", KERNELS, "      factor.near.wait_empty();\n", ""),
    Mutation("numbers are not waited for", KERNELS, "mbar_expect_tx(factor.far.full(), Factor::kNumbers);", ";"),
    Mutation("what lies past a length is left", KERNELS, "end - first, factor.landed", "kUnlimited, factor.landed"),
    Mutation("no tile is masked", KERNELS, "corner, tile.far.masked(first)", "corner, false"),
    Mutation(
        "the tile that dq meets again is read before it has come",
        KERNELS,
        "keep the rings in step\n      of_s.far.wait_full();\n",
        "keep the rings in step\n",
    ),
    Mutation("what decides on a second walk is not waited for", KERNELS, "    mbar_wait(decided, parity);\n", ""),
    Mutation(
        "the second walk is skipped", KERNELS, "if (j == least && !everywhere()) return;", "if (j == least) return;"
    ),
]


@emulation_only
@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Mutation) -> None:
    options = {"causal": True, "lengths_q": torch.tensor([140]), "lengths_k": torch.tensor([290])}
    settings.multiprocessors = 1

    def both() -> list[Tensor]:
        return gradients(options) + gradients(options, offset=20)

    expected = both()

    def run(kernels: build.Library, machine: dict[str, int]) -> str | None:
        settings.changed, settings.schedule, settings.seed = kernels, machine["schedule"], machine["seed"]
        try:
            got = both()
        except RuntimeError as seen:
            return str(seen)
        return None if all(map(torch.equal, got, expected)) else "other bits"

    assert noticed(run, library(fault, attention_emulated.SOURCES))


@emulation_only
@pytest.mark.full
@pytest.mark.parametrize("heads", [(64, 64), (256, 256)], ids=str)
def test_threads_do_not_race(heads: tuple[int, int]) -> None:
    """Under ThreadSanitizer, where copies, products and barriers are the only things that order threads."""
    settings.sanitizer, settings.multiprocessors = "thread", 1
    for options in ({"causal": True}, {"lengths_q": torch.tensor([140]), "lengths_k": torch.tensor([250])}):
        for offset in (0, 20):
            gradients(options, heads, offset)
