"""The CUDA kernels of attention as nvcc compiles them, for GPUs that are not there."""

from __future__ import annotations

import cuda_attention_resources as resources
import pytest
from cuda_attention_resources import BEGIN, CUDA, DOCUMENT, END, HOPPER, SHARED_LIMIT, TARGETS

pytestmark = [pytest.mark.full, pytest.mark.skipif(resources.nvcc() is None, reason="there is no nvcc here")]


@pytest.mark.parametrize("target", TARGETS)
def test_no_variant_spills_and_no_warning_is_given(target: str) -> None:
    variants, warnings = resources.everything(target)
    assert warnings == []
    assert {v: made.spilled for v, made in variants.items() if made.spilled} == {}
    kinds = {v.heads for v in variants if v.kernel == "forward"}
    for kernel in ("forward", "decode", "keys", "queries"):
        assert {(v.heads, v.flag) for v in variants if v.kernel == kernel} == {
            (heads, general) for heads in kinds for general in (False, True)
        }
    hopper = {v: made.registers for v, made in variants.items() if v.kernel.startswith(HOPPER)}
    assert {v.heads for v in hopper} == kinds - {(96, 96)}
    assert target == "sm_90a" or max(hopper.values()) < 16, "no more than a trap"


# Columns of a tile of scores, of which a thread has one in two, by the features of q.
COLUMNS = {
    "hopper_forward": {64: 128, 128: 128, 192: 128, 256: 80},
    "hopper_keys": {64: 128, 128: 64, 192: 32, 256: 32},
    "hopper_queries": {64: 128, 128: 128, 192: 64, 256: 32},
}


@pytest.mark.skipif(resources.disassembler() is None, reason="there is no cuobjdump here")
@pytest.mark.parametrize("source", ["attention_hopper_forward.cu", "attention_hopper_backward.cu"])
def test_on_hopper_products_of_warpgroups_run_under_the_exponentials(source: str) -> None:
    """The compiler may move the wait for a product to before the arithmetic that it was to run under."""
    for variant, code in resources.machine_code(CUDA / source, "sm_90a").items():
        assert any(i.startswith("HGMMA") for i in code)
        assert not any(i.startswith("HMMA") for i in code)
        first = next(n for n, i in enumerate(code) if i.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1"))
        last = next(n for n in range(first, len(code)) if code[n].startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"))
        large = variant.flag and variant.heads[0] == 128
        columns = 176 if large else COLUMNS[variant.kernel][variant.heads[0]]
        assert sum(i.startswith("MUFU.EX2") for i in code[first:last]) >= columns // 2, variant


def test_shared_memory_is_within_every_targets_limit() -> None:
    for variant, size in resources.shared_bytes().items():
        targets = ["sm_90a"] if variant.kernel.startswith(HOPPER) else TARGETS
        assert size <= min(SHARED_LIMIT[t] for t in targets), variant


def test_the_table_in_the_documentation_is_true() -> None:
    assert DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0] == resources.table()
