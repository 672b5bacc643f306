"""The CUDA kernels of attention as nvcc compiles them, for GPUs that are not there."""

from __future__ import annotations

import collections
import json
import re

import cuda_attention_resources as resources
import cuda_library
import pytest
from cuda_attention_resources import DOCUMENT, HOPPER, SHARED_LIMIT, TABLES
from cuda_library import TARGETS

pytestmark = [cuda_library.needs_library, cuda_library.needs_cuobjdump]


def test_the_compiler_had_nothing_to_remark() -> None:
    """Such as that it lets products of warpgroups wait for each other (C7510)."""
    assert (cuda_library.OBJECTS / "attention-cuda-hopper_forward.cu.o").exists(), "the library was built elsewhere"
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


# What each kernel is made of: copies, matrices from shared memory, products; TMA, barriers, products, registers given.
PORTABLE = {"LDGSTS", "LDSM", "HMMA.16816"}
WARPGROUPS = {"UTMALDG.4D", "SYNCS.EXCH", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "HGMMA.64x", "USETMAXREG.DEALLOC",
              "USETMAXREG.TRY_ALLOC"}  # fmt: skip
MADE_OF = {"forward_": PORTABLE, "decode_": PORTABLE, "keys_": PORTABLE, "queries_": PORTABLE, "bias_kernel": PORTABLE,
           "hopper_": WARPGROUPS, "rows_": set(), "sink_rows_": set(), "sinks_": set(), "bias_sum_": set(),
           "merge_": set()}  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "target"), [(k, t) for t in ("sm_80", "sm_90a") for k in MADE_OF if t == "sm_90a" or k != "hopper_"]
)
def test_kernels_are_made_of_the_instructions_that_they_are_for_and_of_no_atomics(kernel: str, target: str) -> None:
    code_of = resources.machine_code(kernel, target)
    assert code_of
    for variant, code in code_of.items():
        opcodes = {re.sub(r"^@!?U?P\w+ ", "", i).split()[0] for i in code}
        assert {x for x in MADE_OF[kernel] if not any(o.startswith(x) for o in opcodes)} == set(), variant
        assert {o for o in opcodes if re.match(r"ATOM|RED(?!UX)", o)} == set(), variant


def test_the_documented_number_of_kernels_is_what_is_compiled() -> None:
    counted = collections.Counter(
        (kernel.target, HOPPER in kernel.function)
        for kernel in cuda_library.kernels()
        if re.search(resources.NAME, kernel.function)
    )
    (portable, hopper) = map(int, re.findall(r"\b(\d+) kernels\b", DOCUMENT.read_text()))
    assert counted == {
        (t, of_hopper): hopper if of_hopper else portable for t in TARGETS for of_hopper in (False, True)
    }


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_in_the_documentation_are_true(name: str) -> None:
    (documented,) = re.findall(r"nvcc (\d+\.\d+)", DOCUMENT.read_text())
    built_by = json.loads(cuda_library.LIBRARY.with_name("_build.json").read_text())["nvcc"]
    if built_by != f"release {documented}":
        pytest.skip(f"the tables are of nvcc {documented}, the library is of {built_by}: other numbers")
    assert resources.documented(name) == TABLES[name]()
