"""Every variant of the recurrent Triton kernels, compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import re

import pytest
from fastseq.kernels import recurrent, recurrent_backward
from fastseq.kernels import tuning_recurrent as tuning
from triton_recurrent_support import Variant, variants
from triton_support import NVIDIA, TARGETS, needs_compiler

from bench.model import BARRIERS

pytestmark = needs_compiler


def quick(target: str, variant: Variant) -> bool:
    """Those of every run: bf16 as it is trained, and on Hopper fp32's LSTM; the others are in `make test-full`."""
    if not variant.save or variant.cell == "rnn_relu" or (variant.fused and variant.projected):
        return False
    return variant.dtype == "bf16" or (
        variant.dtype == "fp32" and target == "sm_90" and variant.cell == "lstm" and not variant.fused
    )


def check(target: str, chosen: list[Variant]) -> None:
    """All of them, so that one failure does not hide the others."""
    wrong = []
    for variant in chosen:
        made = variant.compile(target)
        tiles = variant.tiles
        try:
            made.check(tensor_cores=True)
            if isinstance(tiles, tuning.Sequence) and target in NVIDIA:
                backward = "backward" in variant.kernel
                room = tuning.sequence_bytes(variant.cell, variant.dtype, tiles.block_h, tiles.stages, backward)
                assert made.shared <= room, f"{target}: {made.shared} bytes of shared memory, {room} foreseen"
        except AssertionError as error:
            wrong.append(f"{variant}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("cell", [cell for cell in tuning.GATES if cell != "rnn_relu"])
@pytest.mark.parametrize("target", NVIDIA)
def test_variants_do_not_spill_fit_and_use_tensor_cores(target: str, cell: str) -> None:
    check(target, [v for v in variants(target) if v.cell == cell and quick(target, v)])


@pytest.mark.tiles
@pytest.mark.parametrize("cell", tuning.GATES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", NVIDIA)
def test_all_variants_do_not_spill_fit_and_use_tensor_cores(target: str, dtype: str, cell: str) -> None:
    check(target, [v for v in variants(target, [dtype]) if v.cell == cell and not quick(target, v)])


@pytest.mark.parametrize("kernel", ["forward_sequence", "forward_step", "backward_sequence", "backward_step"])
def test_amd_compiles_too(kernel: str) -> None:
    chosen = [v for v in variants("gfx942", ["bf16"]) if v.kernel == kernel and v.cell == "gru" and v.save]
    assert chosen
    check("gfx942", chosen[:2])


def test_how_many_variants_there_are() -> None:
    """As the design notes say; twice as many where H is no multiple of 16, and of fp32 where torch allows TF32."""
    counts = {target: len(list(variants(target))) for target in TARGETS}
    assert counts == {"sm_80": 382, "sm_90": 382, "sm_100": 382, "gfx942": 344}
    assert len({str(v) for v in variants("sm_90")}) == counts["sm_90"]


def test_hopper_multiplies_large_batches_by_warp_groups() -> None:
    step = next(t for t in tuning.step_tiles("bf16") if t.block_b == 64)
    made = Variant("forward_step", "lstm", "bf16", step).compile("sm_90")
    assert "wgmma.mma_async" in made.products
    assert "tcgen05.mma" in Variant("forward_step", "lstm", "bf16", step).compile("sm_100").products


def time_loop(kernel: str, cell: str, save: bool = True) -> str:
    """What runs at every step of the sequence role at H = 128."""
    tile = next(t for t in tuning.sequence_tiles(cell, "bf16", 227 * 1024, True) if t.block_h == 128)
    assert tile.stages == 2
    text = Variant(kernel, cell, "bf16", tile, save).compile("sm_90").text
    last = [m for m in re.finditer(r"^\$L__BB0_\d+:", text, re.M) if "mma.sync" in text[m.end() :]][-1]
    return text[last.end() : text.index("bra", last.end())]


@pytest.mark.parametrize("kernel", ["forward_sequence", "backward_sequence"])
def test_the_walk_keeps_w_hh_on_the_chip(kernel: str) -> None:
    """Inside the loop over time, nothing waits for a load that the pipeline has not started a step before."""
    loop = time_loop(kernel, "lstm")
    assert loop.count("mma.sync") == 64
    assert "cp.async.c" in loop
    assert "ld.global.v" not in loop


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_the_model_counts_barriers_as_compiled(cell: str) -> None:
    assert time_loop("forward_sequence", cell, False).count("bar.sync") == BARRIERS[cell]


def test_widths_that_no_vector_divides_compile() -> None:
    """On tensor cores too; element by element they take more registers, and some may spill."""
    tile = next(t for t in tuning.sequence_tiles("gru", "bf16", 227 * 1024, True) if t.block_h == 64)
    for kernel in ("forward_sequence", "backward_sequence"):
        assert Variant(kernel, "gru", "bf16", tile, aligned=False).compile("sm_80").products
    for kernel in ("forward_step", "backward_step"):
        for step in tuning.step_tiles("bf16"):
            assert Variant(kernel, "lstm", "bf16", step, aligned=False).compile("sm_90").products


def test_no_other_length_or_batch_compiles_anything() -> None:
    """T, B, the direction and which optional tensors there are come as numbers that no variant depends on."""
    for kernel in (
        recurrent.forward_sequence, recurrent.forward_step, recurrent.forward_projection,
        recurrent_backward.backward_sequence, recurrent_backward.backward_state, recurrent_backward.backward_step,
    ):  # fmt: skip
        parameters = {p.name: p for p in kernel.params if not p.is_constexpr}
        for name in {"T", "B", "t", "later", "given", "first", "direction", "x_t", "x_b", "reset_t", "reset_b"}:
            assert name not in parameters or parameters[name].do_not_specialize, f"{kernel.__name__}: {name}"
        assert "B" in parameters
