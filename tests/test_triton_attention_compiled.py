"""The Triton attention compiled ahead of time: every tile of the tables, without spills, and on tensor cores.

A line of CASES is a set of features with the same code; the numbers are in test_triton_attention_interpreted.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attention_operators import Options
from fastseq.kernels import tuning_attention
from triton_attention_support import compile_plan, plans, variant
from triton_support import NVIDIA, needs_compiler

pytestmark = needs_compiler

HALF = torch.bfloat16
WIDTHS = {64: (64, 64), 128: (128, 128), 192: (192, 128), 256: (256, 256)}


def case(name: str, dtype: torch.dtype = HALF) -> Options:
    batch, heads, length = 2, 4, 256
    lengths = torch.empty(batch, dtype=torch.int64)
    by_pair: Options = {
        "bias": torch.empty(batch, heads, length, length, dtype=dtype),
        "mask": torch.empty(batch, heads, length, length, dtype=torch.bool),
    }
    options: dict[str, Options] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window_left": 100, "sinks": torch.empty(heads, dtype=dtype)},
        "packed": {"causal": True, **{f"cu_seqlens_{x}": torch.empty(batch + 1, dtype=torch.int32) for x in "qk"}},
        "lengths": {"lengths_q": lengths, "lengths_k": lengths, "sinks": torch.empty(heads)},
        "padding mask": {"mask": torch.empty(batch, 1, 1, length, dtype=torch.bool)},
        "bias of heads": {"bias": torch.empty(1, heads, length, length, dtype=dtype)},
        "bias of keys": {"bias": torch.empty(batch, 1, 1, length)},
        "dropout": {"dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64), "causal": True},
        "alibi": {"alibi_slopes": torch.empty(heads), "causal": True},
        "softcap": {"softcap": 30.0, "causal": True, "window_left": 100},
        "everything": {
            **by_pair, "alibi_slopes": torch.empty(heads), "softcap": 30.0, "dropout_p": 0.1, "window_left": 9,
            "seed": torch.empty(1, dtype=torch.int64), "sinks": torch.empty(heads), "lengths_q": lengths,
            "lengths_k": lengths, "causal": True,
        },
    }  # fmt: skip
    return options[name]


CASES = [
    "full", "causal", "window", "packed", "lengths", "padding mask", "bias of heads", "bias of keys", "dropout",
    "alibi", "softcap", "everything",
]  # fmt: skip
QUICK = [("sm_90", "causal", 64), ("sm_90", "causal", 128), ("sm_80", "window", 128), ("sm_100", "packed", 128),
         ("sm_90", "everything", 128), ("sm_80", "everything", 64), ("sm_90", "full", 192)]  # fmt: skip


def check(target: str, name: str, width: int, dtype: torch.dtype, **shape: Any) -> None:
    dim, dim_v = WIDTHS[width]
    made = plans(target, dtype, case(name, dtype), dim, dim_v, **shape)
    problems = []
    for plan in made:
        found = compile_plan(target, plan)
        has_products = plan.kernel.__name__ not in ("attention_delta", "attention_merge")
        what = f"{plan.kernel.__name__} {name} D{width} {dtype} {plan.options}"
        try:
            found.check(tensor_cores=has_products and dtype != torch.float32)
            assert found.shared <= tuning_attention.SHARED[target], f"{found.shared} bytes of shared memory"
        except AssertionError as error:
            problems.append(f"{what}: {error}")
        if has_products and target == "sm_90" and dtype == HALF and plan.arguments["BLOCK_M"] >= 64:
            reads_rows = plan.kernel.__name__ in ("attention_forward", "attention_backward_queries")
            if reads_rows and "wgmma.mma_async" not in found.products:
                problems.append(f"{what}: no wgmma")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("target", "name", "width"), QUICK)
def test_tiles_fit_their_machine(target: str, name: str, width: int) -> None:
    check(target, name, width, HALF)


@pytest.mark.tiles
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", NVIDIA)
def test_every_tile_fits_its_machine(target: str, name: str, width: int) -> None:
    check(target, name, width, HALF)


@pytest.mark.tiles
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["causal", "window", "everything"])
def test_every_tile_fits_its_machine_in_other_dtypes(name: str, width: int) -> None:
    for target in ("sm_80", "sm_90"):
        check(target, name, width, torch.float16)
        check(target, name, width, torch.float32)


@pytest.mark.parametrize("name", ["causal", pytest.param("everything", marks=pytest.mark.tiles)])
def test_decoding_fits_its_machine(name: str) -> None:
    for target in NVIDIA:
        for heads in (2, 4):  # of the query; 2 of the key
            options = case(name)
            for key in options.keys() & {"bias", "mask"}:
                options[key] = options[key][:, :heads, :4]
            for key in options.keys() & {"sinks", "alibi_slopes"}:
                options[key] = options[key][:heads]
            for dim in (64, 128, 256):
                for plan in plans(target, HALF, options, dim, dim, queries=4, heads=heads, backward=False):
                    found = compile_plan(target, plan)
                    found.check(tensor_cores=plan.kernel.__name__ == "attention_decode")
                    assert found.shared <= tuning_attention.SHARED[target]


@pytest.mark.tiles
@pytest.mark.parametrize("width", [64, 128])
def test_a_few_tiles_compile_for_amd(width: int) -> None:
    for name in ("causal", "everything"):
        check("gfx942", name, width, HALF)


def test_rows_are_read_sixteen_bytes_at_a_time_and_ahead() -> None:
    forward = plans("sm_90", HALF, case("causal"), 128, 128, backward=False)[0]
    assert forward.arguments["ALIGN"] == 8
    text = compile_plan("sm_90", forward).text
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", text), "no copy of 16 bytes ahead"


def test_a_feature_that_is_off_is_no_code() -> None:
    plain = plans("sm_90", HALF, case("full"), 64, 64, backward=False)[0]
    text = compile_plan("sm_90", plain).text
    assert "mul.hi.u32" not in text  # of Philox
    with_dropout = plans("sm_90", HALF, case("dropout"), 64, 64, backward=False)[0]
    assert "mul.hi.u32" in compile_plan("sm_90", with_dropout).text


def test_no_new_variant_for_another_length_batch_or_stride() -> None:
    for name in ("full", "causal", "lengths", "dropout", "packed"):
        seen = set()
        for batch in (1, 2, 3):
            options = {k: v if "seqlens" not in k and "lengths" not in k else v.new_empty(batch + ("seqlens" in k))
                       for k, v in case(name).items() if isinstance(v, torch.Tensor)}  # fmt: skip
            options = {**{k: v for k, v in case(name).items() if not isinstance(v, torch.Tensor)}, **options}
            for queries, keys, heads in ((17, 33, 4), (64, 1024, 8), (4096, 129, 6)):
                made = plans("sm_90", HALF, {**options, "sinks": None}, 64, 64, batch=batch, queries=queries, keys=keys,
                             heads=heads)  # fmt: skip
                seen |= {variant(plan) for plan in made}
        assert len(seen) == 4, f"{name}: {len(seen)} variants of the four kernels"


def test_the_number_of_variants_is_known() -> None:
    """Of one dtype and head dimension: one a feature set, however it is called."""
    names = ["full", "causal", "window", "lengths", "padding mask", "dropout", "alibi", "everything"]
    found = {variant(plan) for name in names for plan in plans("sm_90", HALF, case(name), 128, 128)}
    # Delta and two gradients and the forward for each set of features, and the bias of the last.
    assert len(found) == 4 * len(names) + 1
