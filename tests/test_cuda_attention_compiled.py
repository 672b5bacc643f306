"""The CUDA kernels of attention as nvcc compiles them, for GPUs that are not there."""

from __future__ import annotations

import cuda_attention_resources as resources
import cuda_library
import pytest
from cuda_attention_resources import BEGIN, DOCUMENT, END, HOPPER, SHARED_LIMIT
from cuda_library import TARGETS

pytestmark = [cuda_library.needs_library, cuda_library.needs_cuobjdump]


def test_the_compiler_had_nothing_to_remark() -> None:
    """Such as that it lets products of warpgroups wait for each other (C7510)."""
    assert (cuda_library.OBJECTS / "attention_hopper_forward.cu.o").exists(), "the library was built elsewhere"
    assert cuda_library.remarks() == {}


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_is_there_and_none_spills(target: str) -> None:
    variants = resources.variants(target)
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


@pytest.mark.parametrize("kernel", ["hopper_forward", "hopper_gradient"])
def test_on_hopper_products_of_warpgroups_run_under_the_exponentials(kernel: str) -> None:
    """The compiler may move the wait for a product to before the arithmetic that it was to run under."""
    code_of = resources.machine_code(kernel, "sm_90a")
    assert len(code_of) == {"hopper_forward": 6, "hopper_gradient": 8}[kernel]
    for variant, code in code_of.items():
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


@pytest.mark.full  # another compiler has other numbers
def test_the_table_in_the_documentation_is_true() -> None:
    assert DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0] == resources.table()
