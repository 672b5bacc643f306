"""What torch's ``FlopCounterMode`` counts of our operators: twice the multiplications of their matrix products.

As torch counts attention: all pairs of queries and keys, whatever limits hide; and no gates and no softmax. Importing
torch's module costs more than importing this package, so the formulas are registered when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall

_COUNTER = "torch.utils.flop_counter"


def _pairs(call: AttentionCall) -> int:
    """Pairs of a query and a key, over all heads."""
    q, k = call.q, call.k
    if call.cu_seqlens_q is None:
        keys = k.shape[2] if call.block_table is None else call.block_table.shape[1] * k.shape[1]
        return q.shape[0] * q.shape[1] * q.shape[2] * keys
    of_q = call.cu_seqlens_q.diff()
    of_k = call.lengths_k if call.cu_seqlens_k is None else call.cu_seqlens_k.diff()
    assert of_k is not None
    return q.shape[1] * int((of_q.long() * of_k).sum())


def attention_forward(*args: Any, out_val: Any = None) -> int:
    """q kᵀ and p v."""
    call = AttentionCall(*args)
    return 2 * _pairs(call) * (call.q.shape[-1] + call.v.shape[-1])


def attention_backward(*args: Any, out_val: Any = None) -> int:
    """Scores again, and the gradients of p, q, k and v."""
    _, _, q, k, v, _, _, *options, _ = args
    call = AttentionCall(q, k, v, *options)
    return 2 * _pairs(call) * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def _products(x: Tensor, weights: Sequence[Tensor | None]) -> int:
    """Of these matrices with every step of x [T,B,I]."""
    return 2 * x.shape[0] * x.shape[1] * sum(w.numel() for w in weights if w is not None)


def _matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for w in weights if w.dim() == 2]


def layers_forward(x: Tensor, weights: Sequence[Tensor], *rest: Any, out_val: Any = None) -> int:
    return _products(x, _matrices(weights))


def layers_backward(*args: Any, out_val: Any = None) -> int:
    """The gradient through time, dx, and the gradients of the weights."""
    x, weights, num_layers, bidirectional, with_dx, with_weights = (args[n] for n in (4, 5, 20, 21, 23, 24))
    directions = 2 if bidirectional else 1
    width = len(weights) // (num_layers * directions)
    w_ih = weights[::width]
    back = [w for w in _matrices(weights) if not any(w is own for own in w_ih)]
    back += w_ih if with_dx else w_ih[directions:]
    return _products(x, back) + (_products(x, _matrices(weights)) if with_weights else 0)


def scan_forward(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, w_hr: Tensor | None, *rest: Any,
                 out_val: Any = None) -> int:  # fmt: skip
    return _products(x, [w_ih, w_hh, w_hr])


def scan_backward(*args: Any, out_val: Any = None) -> int:
    """The gradient through time: the other products are torch's."""
    y, w_hh, w_hr = (args[n] for n in (4, 7, 8))
    return _products(y, [w_hh, w_hr])


def normed_forward(gates_x: Tensor, w_hh: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The recurrence: the product with x is torch's."""
    return _products(gates_x, [w_hh])


def normed_backward(*args: Any, out_val: Any = None) -> int:
    """The gradient through time, as :func:`scan_backward`."""
    y, w_hh = args[4], args[8]
    return _products(y, [w_hh])


def _register(counter: Any) -> None:
    for formula in (
        attention_forward, attention_backward, layers_forward, layers_backward, scan_forward, scan_backward,
        normed_forward, normed_backward,
    ):  # fmt: skip
        packet = getattr(torch.ops.fastseq, formula.__name__)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's module has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register(module)

        loader.exec_module = exec_module
        return spec


def register() -> None:
    """Now where torch's module is imported already, else when it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
