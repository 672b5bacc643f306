"""The tables of cells, one a language, agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastseq import ops
from fastseq.recurrent.cells import CELLS

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "recurrent" / "cells.h"


def test_python_and_cpp_have_the_same_cells() -> None:
    text = HEADER.read_text()
    enumerators = re.search(r"enum class Cell : int \{ (.*?) \}", text)
    assert enumerators is not None
    assert enumerators[1].split(", ") == [cell.name for cell in CELLS]
    rows = re.findall(r'\{"(\w+)", (\d+), (\d+), (true|false)\}', text)
    found = [(name, int(gates), int(tape), has_c == "true") for name, gates, tape, has_c in rows]
    assert found == [cell[:4] for cell in CELLS]


def test_triton_kernels_have_the_same_cells() -> None:
    pytest.importorskip("triton")
    from fastseq.kernels.recurrent import tuning as tuning_recurrent

    assert tuning_recurrent.GATES == ops.GATES


def test_no_operator_that_computes_takes_text() -> None:
    """torch's stable ABI never frees the copy that it makes of a text argument."""
    for name in ("scan_forward", "scan_backward", "layers_forward", "layers_backward",
                 "attention_forward", "attention_backward"):  # fmt: skip
        packet = getattr(torch.ops.fastseq, name)
        for overload in packet.overloads():
            types = [str(argument.type) for argument in getattr(packet, overload)._schema.arguments]
            assert "str" not in types, f"{name}.{overload}"
