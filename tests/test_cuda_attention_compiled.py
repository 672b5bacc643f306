"""The CUDA kernels of attention as nvcc compiles them, for GPUs that are not there."""

from __future__ import annotations

import cuda_attention_resources as resources
import pytest
from cuda_attention_resources import BEGIN, DOCUMENT, END, SHARED_LIMIT, TARGETS

pytestmark = [pytest.mark.full, pytest.mark.skipif(resources.nvcc() is None, reason="there is no nvcc here")]


@pytest.mark.parametrize("target", TARGETS)
def test_no_variant_spills_and_no_warning_is_given(target: str) -> None:
    variants, warnings = resources.everything(target)
    assert warnings == []
    assert {v: made.spilled for v, made in variants.items() if made.spilled} == {}
    kinds = {v.heads for v in variants if v.heads}
    for kernel in ("forward", "decode", "keys", "queries"):
        assert {(v.heads, v.general) for v in variants if v.kernel == kernel} == {
            (heads, general) for heads in kinds for general in (False, True)
        }


def test_shared_memory_is_within_every_targets_limit() -> None:
    assert max(resources.shared_bytes().values()) <= min(SHARED_LIMIT.values())


def test_the_table_in_the_documentation_is_true() -> None:
    assert DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0] == resources.table()
