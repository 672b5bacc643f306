"""Every variant of the recurrent Triton kernels, compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fastseq.kernels.recurrent import backward as recurrent_backward
from fastseq.kernels.recurrent import forward as recurrent
from fastseq.kernels.recurrent import tuning
from triton_recurrent_support import OPTIONS, Variant, shares_of, variants
from triton_support import NVIDIA, TARGETS, needs_compiler

from bench.studies.model import BARRIERS

pytestmark = needs_compiler


def quick(target: str, variant: Variant) -> bool:
    """Those of every run: bf16 as it is trained, and on Hopper fp32's LSTM; the others are in `make test-tiles`."""
    if not variant.save or variant.cell == "rnn_relu" or (variant.fused and variant.projected):
        return False
    if variant.kernel.endswith("persistent") and target != "sm_90":
        return False
    if getattr(variant.tiles, "tail", 0):  # test_an_lstm_of_160_units_fits_one_multiprocessor has some
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
            if isinstance(tiles, tuning.Sequence) and not target.startswith("gfx"):
                backward = "backward" in variant.kernel
                shares = shares_of(variant.cell, variant.options)
                room = tuning.sequence_bytes(variant.cell, variant.dtype, tiles, backward, shares)
                assert made.shared <= room, f"{target}: {made.shared} bytes of shared memory, {room} foreseen"
        except AssertionError as error:
            wrong.append(f"{variant}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=pytest.mark.full) if cell == "lstm_coupled" else cell  # an LSTM's, with a gate fewer
     for cell in tuning.GATES if cell != "rnn_relu"],
)  # fmt: skip
@pytest.mark.parametrize("target", [pytest.param(t, marks=[] if t == "sm_90" else pytest.mark.full) for t in NVIDIA])
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


@pytest.mark.tiles
@pytest.mark.parametrize("cell", tuning.GATES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_all_of_amd_do_not_spill_and_fit(dtype: str, cell: str) -> None:
    check("gfx942", [v for v in variants("gfx942", [dtype]) if v.cell == cell])


def in_two_parts(target: str, dtype: str) -> list[Variant]:
    """The sequence role's variants of units that lie between two powers of two."""
    return [v for v in variants(target, [dtype]) if isinstance(v.tiles, tuning.Sequence) and v.tiles.tail]


def test_an_lstm_of_160_units_fits_one_multiprocessor() -> None:
    """W_hh takes 200 of its 227 KiB."""
    chosen = [v for v in in_two_parts("sm_90", "bf16") if v.cell == "lstm" and v.save]
    assert [v.tiles for v in chosen] == [tuning.Sequence(16, 128, 8, 2, 32), tuning.Sequence(16, 128, 8, 1, 32)]
    check("sm_90", chosen)


@pytest.mark.tiles
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_parts_fit_where_there_is_little_shared_memory(dtype: str) -> None:
    """Of a consumer's GPU, whose multiprocessor cannot hold an LSTM of 128 units, but of 96."""
    chosen = in_two_parts("sm_89", dtype)
    assert {(v.cell, v.tiles.units) for v in chosen} == {
        ("lstm", 96), ("gru", 96), ("gru_reset_before", 96), ("lstm_coupled", 96),
        ("rnn_tanh", 160), ("rnn_tanh", 192), ("rnn_relu", 160), ("rnn_relu", 192),
    }  # fmt: skip
    check("sm_89", chosen)


EVERY = tuple(OPTIONS)


def widest_with_options(cell: str, kernel: str) -> Variant:
    tiles = [v for v in variants("sm_90", ["bf16"], EVERY) if v.cell == cell and v.kernel == kernel and v.save]
    return next(v for v in reversed(tiles) if not (v.fused or v.projected))


@pytest.mark.parametrize("kernel", ["forward_sequence", "backward_sequence"])
def test_a_mask_zoneout_and_a_state_to_reset_to_find_registers(kernel: str) -> None:
    """All of them together, beside the most units that the sequence role has with them."""
    variant = widest_with_options("lstm", kernel)
    assert variant.tiles.units == 128
    check("sm_90", [variant])


@pytest.mark.tiles
@pytest.mark.parametrize("options", [("mask",), ("zoneout",), ("state",), EVERY], ids="+".join)
@pytest.mark.parametrize("cell", tuning.GATES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", NVIDIA)
def test_all_variants_with_options_do_not_spill_fit_and_use_tensor_cores(
    target: str, dtype: str, cell: str, options: tuple[str, ...]
) -> None:
    check(target, [v for v in variants(target, [dtype], options) if v.cell == cell])


@pytest.mark.parametrize("kernel", ["forward_step", "backward_step"])
def test_an_option_that_is_off_is_no_code(kernel: str) -> None:
    """Its pointers are no parameters of the kernel."""
    counts = []
    for options in ((), EVERY):
        variant = replace(widest_with_options("gru", kernel), options=options)
        _, types, _, _ = variant.source("sm_90")
        found = len(re.findall(rf"{kernel}_param_\d+[,\n]", variant.compile("sm_90").text))
        assert found == len(types) + 2, "Triton's own two pointers come last"
        counts.append(found)
    assert counts[1] - counts[0] == {"forward_step": 6, "backward_step": 4}[kernel]


def walk_between_meetings(target: str, kernel: str, cell: str, dtype: str, large: bool = False) -> list[str]:
    """The persistent role's PTX from its loop over time on, without what does not matter: a line an instruction."""
    tile = list(tuning.persistent_tiles(dtype))[large]
    text = Variant(kernel, cell, dtype, tile).compile(target).text
    return [line.strip() for line in text[text.index("Loop Header: Depth=1") :].splitlines()]


def first(lines: list[str], pattern: str, after: int = 0) -> int:
    return next(i for i, line in enumerate(lines) if i > after and re.search(pattern, line))


@pytest.mark.parametrize("kernel", ["forward_persistent", "backward_persistent"])
@pytest.mark.parametrize("target", NVIDIA)
def test_programs_wait_in_a_loop_and_read_what_others_stored_after_it(target: str, kernel: str) -> None:
    """The look at the counter is an acquire inside its own loop; all threads wait for it; then loads past the L1."""
    for cell, large in (("lstm", False), ("gru_reset_before", True)):
        lines = walk_between_meetings(target, kernel, cell, "bf16", large)
        look = first(lines, r"ld\.global\.gpu\.acquire|atom\.global\.(gpu\.)?acquire")
        top = max(i for i in range(look) if lines[i].startswith("$L__BB"))
        label = lines[top].partition(":")[0]
        end = first(lines, rf"bra(\.uni)?\s+{re.escape(label)};", look)
        assert any("bar.sync" in line for line in lines[look:end])
        read = first(lines, r"cp\.async\.cg|ld\.global\.cg", end)
        assert read < first(lines, "mma", end)
        assert not any(re.search(r"cp\.async|ld\.global\.cg", line) for line in lines[:look])


@pytest.mark.parametrize("kernel", ["forward_persistent", "backward_persistent"])
@pytest.mark.parametrize("target", NVIDIA)
def test_programs_count_themselves_in_after_all_their_threads_have_stored(target: str, kernel: str) -> None:
    tile = next(tuning.persistent_tiles("bf16"))
    lines = Variant(kernel, "gru", "bf16", tile).compile(target).text.splitlines()
    counts = [i for i, line in enumerate(lines) if re.search(r"(atom|red)\.(global\.)?(gpu\.)?release", line)]
    assert counts
    for count in counts:
        barrier = max(i for i in range(count) if "bar.sync" in lines[i])
        assert not any("st.global" in line for line in lines[barrier:count])
        assert any("st.global" in line for line in lines[max(0, barrier - 400) : barrier])


def test_how_many_variants_there_are() -> None:
    """As the design notes say; twice as many where H is no multiple of 16, and of fp32 where torch allows TF32."""
    counts = {target: len(list(variants(target))) for target in TARGETS}
    assert counts == {"sm_80": 601, "sm_89": 582, "sm_90": 641, "sm_100": 641, "gfx942": 466}
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


@pytest.mark.parametrize("cell", [cell for cell in tuning.GATES if cell != "rnn_relu"])
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
