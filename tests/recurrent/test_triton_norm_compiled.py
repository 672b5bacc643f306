"""The Triton kernels of normalised layers, compiled for GPUs that are not there, and what launches ask for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from fastseq.kernels.recurrent import normed_launch, normed_tuning, tuning
from triton_norm_support import NormVariant, sequence_variants, step_variants
from triton_recurrent_driver import Log, Made, Operations, device
from triton_support import NVIDIA, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    normed_launch.role = None


def check(target: str, chosen: Iterable[NormVariant], spills_outside: bool = False) -> None:
    """All of them, so that one failure does not hide the others."""
    wrong = []
    for variant in chosen:
        made = variant.compile(target)
        try:
            made.check(tensor_cores=variant.tile is not None, spills_outside=spills_outside)
            if variant.tile is not None:
                backward = "backward" in variant.kernel
                room = normed_tuning.sequence_bytes(variant.cell, variant.dtype, variant.tile, backward)
                assert made.shared <= room, f"{target}: {made.shared} bytes of shared memory, {room} foreseen"
        except AssertionError as error:
            wrong.append(f"{variant}: {error}")
    assert not wrong, "\n".join(wrong)


def quick(variant: NormVariant) -> bool:
    """Those of every run: bf16 as it is trained, the largest of an LSTM, and of the joint form; and a row's kernels."""
    if not variant.save or variant.masked:
        return False
    if variant.tile is not None:
        return variant.tile.units == 128 and (variant.joint or variant.cell == "lstm")
    return variant.cell == "lstm" and variant.hidden in (0, 4096)


def test_the_largest_do_not_spill_and_fit() -> None:
    chosen = [v for v in (*sequence_variants("sm_90", "bf16"), *step_variants("bf16")) if quick(v)]
    assert len(chosen) == 8
    check("sm_90", chosen)


@pytest.mark.tiles
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("cell", "joint"), normed_tuning.FORMS)
@pytest.mark.parametrize("target", NVIDIA)
def test_all_variants_do_not_spill_fit_and_use_tensor_cores(target: str, cell: str, joint: bool, dtype: str) -> None:
    """Without a second stage (compute capability 8.0) an LSTM of 128 units spills 32 bytes before its walk begins."""
    every = (*sequence_variants(target, dtype), *step_variants(dtype))
    check(target, [v for v in every if (v.cell, v.joint) == (cell, joint)], spills_outside=target == "sm_80")


@pytest.mark.parametrize("kernel", ["normed_forward_sequence", "normed_backward_sequence"])
def test_the_walk_keeps_w_hh_on_the_chip(kernel: str) -> None:
    """Inside the loop over time, nothing waits for a load that the pipeline has not started a step before."""
    tile = list(normed_tuning.sequence_tiles("lstm", "bf16", 227 * 1024, "backward" in kernel))[-1]
    assert (tile.block_h, tile.stages) == (128, 2)
    text = NormVariant(kernel, "lstm", False, "bf16", tile).compile("sm_90").text
    last = [m for m in re.finditer(r"^\$L__BB0_\d+:", text, re.M) if "mma.sync" in text[m.end() :]][-1]
    loop = text[last.end() : text.index("bra", last.end())]
    assert loop.count("mma.sync") == 64
    assert "cp.async.c" in loop
    assert "ld.global.v" not in loop


# --- What launches ask for, on a GPU that is not there.


def there_and_back(
    cell: str, joint: bool, steps: int, batch: int, hidden: int, dtype: torch.dtype = torch.bfloat16, *,
    options: bool = False, reverse: bool = False, save: bool = True,
) -> None:  # fmt: skip
    """One walk forward and one back; whatever they return holds nothing."""
    gates, lstm = tuning.GATES[cell] * hidden, tuning.HAS_C[cell]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    of_c = [empty(hidden), empty(hidden)] if lstm else [None, None]
    tensors: list[Any] = [empty(gates, hidden), empty(gates), empty(gates), *of_c, empty(batch, hidden), None]
    tensors += [torch.full((batch,), steps), torch.zeros(steps, batch, dtype=torch.bool)] if options else [None, None]
    tensors += [empty(batch, hidden) if options else None]
    out = normed_launch.normed_forward(empty(steps, batch, gates), *tensors, cell, joint, reverse, save, save)
    if save:
        y, h_n, c_n, states, tape, stats = out
        grads = [torch.empty_like(y), torch.empty_like(h_n), torch.empty_like(c_n) if options and lstm else None, None]
        kept = y, states if lstm else None, tape, stats
        normed_launch.normed_backward(*grads, *kept, *tensors, cell, joint, reverse)


def asked(made: Made) -> tuple:
    aligned = {i for i, value in made.attributes.items() if value == [["tt.divisibility", 16]]}
    return made.kernel, made.signature, made.constants, aligned, made.options.num_warps


def compiled(variant: NormVariant) -> tuple:
    """What Triton would look a variant up by."""
    kernel, types, constants, options = variant.source("sm_90")
    signature = {n: types[n].partition(":")[0] if n in types else "constexpr" for n in kernel.arg_names}
    aligned = {(i,) for i, n in enumerate(kernel.arg_names) if types.get(n, "").endswith(":16")}
    return kernel.__name__, signature, constants, aligned, options["num_warps"]


@pytest.mark.parametrize(("cell", "joint"), normed_tuning.FORMS)
def test_what_is_launched_is_what_is_compiled_and_no_other_length_or_batch_compiles_anything(
    cell: str, joint: bool
) -> None:
    every = (*sequence_variants("sm_90", "bf16"), *step_variants("bf16"))
    known = [compiled(v) for v in every if (v.cell, v.joint) == (cell, joint)]
    for role in ("sequence", "step"):
        normed_launch.role = role
        with device() as log:
            for options, save in itertools.product((True, False), (True, False)):
                there_and_back(cell, joint, 3, 4, 32, options=options, save=save)
            made = len(log.made)
            assert [asked(m)[0] for m in log.made if asked(m) not in known] == []
            for steps, batch in ((2, 1), (16, 8), (17, 33)):
                for options, reverse in ((False, False), (True, True)):
                    there_and_back(cell, joint, steps, batch, 32, options=options, reverse=reverse)
            assert [m.kernel for m in log.made[made:]] == []


def launched(log: Log) -> list[str]:
    return [at.made.kernel for at in log.launches]


def test_how_many_launches_a_walk_takes_and_nothing_waits_for_the_device() -> None:
    with device() as log, Operations() as operations:
        there_and_back("lstm", False, 100, 16, 128, options=True)
        sums = ["gain_gradients", "gain_gradients"]
        assert launched(log) == ["normed_forward_sequence", "normed_backward_sequence", *sums]
        log.launches.clear()
        log.bound = 0
        there_and_back("lstm", False, 5, 16, 256, options=True)
        assert launched(log) == ["normed_forward_step"] * 5 + ["normed_backward_step"] * 5 + sums
        assert log.bound == 2 + 2 + 2  # from the third step on Triton does not look at the arguments again
        ts = [at.arguments["t"] for at in log.launches[:10]]
        assert ts == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
        for before, after in itertools.pairwise(log.launches[:5]):
            left, right = (
                getattr(t, "data_ptr", lambda t=t: t)()
                for t in (before.arguments["h_out"], after.arguments["h_in"])
            )  # fmt: skip
            assert left == right
    found = {name for name in operations.seen if any(w in name for w in ("_local_scalar", "item", "nonzero", "equal"))}
    assert not found
