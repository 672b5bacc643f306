"""torch's FlopCounterMode counts our layers and attention as it counts torch's products."""

import subprocess
import sys

import pytest
import torch
from support import NATIVE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq import flops


@pytest.fixture(autouse=True, scope="module")
def registered():
    """An operator to which an overload is added has another hash, and torch's registry does not find it: the tests on
    emulated GPUs add some, and may have run in this process."""
    flops._register(flop_counter)


def counted(run, *sources):
    """FLOPs of a call, forward and back."""
    with FlopCounterMode(display=False) as forward:
        results = run()
    results = [y for y in (results if isinstance(results, tuple) else (results,)) if isinstance(y, torch.Tensor)]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(results[0].sum(), sources)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("shape", [(2, 4, 4, 9, 9, 8), (2, 4, 2, 5, 70, 16)], ids=str)
def test_attention_counts_as_torchs_products(backend, shape):
    batch, heads, heads_k, queries, keys, dim = shape
    q = torch.randn(batch, heads, queries, dim, requires_grad=True)
    k, v = (torch.randn(batch, heads_k, keys, dim, requires_grad=True) for _ in range(2))
    product = 2 * batch * heads * queries * keys * dim
    got = counted(lambda: fastseq.attention(q, k, v, backend=backend), q, k, v)
    assert got[0] == 2 * product
    assert got[1] in (4 * product, 5 * product)  # a kernel that stores no scores computes them again
    if backend == "native":
        assert got[1] == 5 * product
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
            nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert got[0] == theirs.get_total_flops()


def test_packed_sequences_count_their_own_pairs():
    lengths_q, lengths_k = torch.tensor([3, 0, 6]), torch.tensor([5, 4, 2])
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths_q, lengths_k)]
    q, k = torch.randn(9, 2, 8), torch.randn(11, 2, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fastseq.attention(q, k, k, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], backend="native")
    assert counter.get_total_flops() == 2 * 2 * int((lengths_q * lengths_k).sum()) * (8 + 8)


LAYERS = {
    "rnn": lambda: fastseq.nn.RNN(5, 7, bias=False),
    "gru": lambda: fastseq.nn.GRU(5, 7, num_layers=2),
    "lstm": lambda: fastseq.nn.LSTM(5, 7, num_layers=2, bidirectional=True),
    "projected": lambda: fastseq.nn.LSTM(5, 7, num_layers=2, proj_size=3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reset", [False, True], ids=["plain", "reset"])
def test_layers_count_every_matrix_at_every_step(name, reset):
    layer, steps, batch = LAYERS[name](), 6, 3
    x = torch.randn(steps, batch, 5, requires_grad=True)
    options = {"reset": torch.zeros(steps, batch, dtype=torch.bool)} if reset else {}
    matrices = [w for w in layer.parameters() if w.dim() == 2]
    once = 2 * steps * batch * sum(w.numel() for w in matrices)
    assert counted(lambda: layer(x, **options), x, *layer.parameters()) == (once, 2 * once)
    first = 2 * steps * batch * sum(w.numel() for n, w in layer.named_parameters() if n.startswith("weight_ih_l0"))
    without_dx = counted(lambda: layer(x.detach(), **options), *layer.parameters())
    assert without_dx == (once, 2 * once - first)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x, **options)
    assert counter.get_total_flops() == once


def test_a_scan_alone_counts_the_same():
    layer = fastseq.nn.GRU(5, 7)
    x = torch.randn(4, 6, 3, 5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.vmap(lambda x: layer(x)[0])(x)
    assert counter.get_total_flops() == 2 * 4 * 6 * 3 * (3 * 7 * (5 + 7))


@pytest.mark.parametrize(
    "order", ["import fastseq, torch.utils.flop_counter", "import torch.utils.flop_counter, fastseq"]
)
def test_formulas_are_there_whichever_is_imported_first(order):
    code = f"""
{order}
import sys, torch
counter = sys.modules["torch.utils.flop_counter"]
assert torch.ops.fastseq.layers_forward in counter.flop_registry
assert sum("fastseq" in type(finder).__module__ for finder in sys.meta_path) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
