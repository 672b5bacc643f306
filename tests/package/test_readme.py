"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq

README = (Path(__file__).resolve().parents[1].parent / "README.md").read_text(encoding="utf-8")


def test_every_python_example_runs_and_prints_what_it_says(capsys):
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^# (.*)", block, re.MULTILINE):
            assert line in printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [fastseq.nn.GRU(3, 4), fastseq.nn.LSTM(3, 4)], ids=["gru", "lstm"])
def test_the_limits_are_still_limits(layer):
    with pytest.raises(Exception, match=r"."):
        torch.jit.script(layer)
    assert not isinstance(layer, (torch.nn.GRU, torch.nn.LSTM))
    assert isinstance(layer, torch.nn.RNNBase)
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    y, _ = layer(torch.randn(5, 2, 3))
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["GRU", "LSTM", "LSTMCell"])
def test_a_graph_of_fx_is_patched_after_it_was_traced(name):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(torch.nn, name)(3, 4)

        def forward(self, x):
            return self.layer(x)[0]

    traced, x = torch.fx.symbolic_trace(Model()), torch.randn(5, 3)
    before = traced(x)
    assert len(fastseq.patch(traced)) == 1
    torch.testing.assert_close(traced(x), before)
