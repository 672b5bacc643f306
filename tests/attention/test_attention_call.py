"""The options of attention are listed once: every other place that must name them in order is held to that list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from fastseq.attn.call import OPTIONS, TENSORS, AttentionCall, settings_of, tensors_of

ROOT = Path(__file__).resolve().parents[2]


def names(operator: str, backend: str = "native") -> list[str]:
    """Arguments of an operator, in its own order."""
    return [argument.name for argument in getattr(getattr(torch.ops.fastseq, operator), backend)._schema.arguments]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_operators_take_a_calls_fields_in_order(backend):
    assert names("attention_forward", backend) == list(AttentionCall._fields)
    before = ["d_o", "dlse", "q", "k", "v", "o", "lse"]
    assert names("attention_backward", backend) == [*before, *OPTIONS, "bias_grad"]


def test_cpp_names_the_options_in_order():
    text = (ROOT / "csrc" / "attention" / "call.h").read_text()
    fields = text[text.index("#define FASTSEQ_ATTENTION_FIELDS") :].partition("\n\n")[0]
    assert tuple(re.findall(r"(?:tensor\(|setting\(\w+, )(\w+)\)", fields)) == OPTIONS


def test_triton_names_the_arguments_in_order():
    tree = ast.parse((ROOT / "kernels" / "attention" / "problem.py").read_text())
    (problem,) = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Problem"]
    (start,) = [x for x in problem.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
    assert [a.arg for a in start.args.args][1 : 1 + len(AttentionCall._fields)] == list(AttentionCall._fields)


def test_tensors_come_first():
    q = torch.ones(1, 1, 2, 4)
    call = AttentionCall(q, q, q, mask=q > 0, scale=0.5, causal=True)
    assert AttentionCall._fields[: len(TENSORS)] == TENSORS
    assert AttentionCall(*tensors_of(call), *settings_of(call)) == call


def test_cpp_has_one_enum_of_dtypes():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    found = [path.name for path in files if re.search(r"enum (class )?\w+[^{};]*\{[^}]*\bbf16\b", path.read_text())]
    assert found == ["dtype.h"]
