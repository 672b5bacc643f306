"""The role of the Triton scan whose programs wait for each other, run as it is: together on a GPU, one alone without.

How programs interpreted side by side may meet is in test_triton_recurrent_persistent_interpreted.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import devices
import pytest
import torch
from fastseq.kernels.recurrent import launch as recurrent_launch
from recurrent_support import backward, compare, draw, forward, options, seed
from support import CELLS
from triton_support import INTERPRETED, needs_interpreter

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(devices.KERNELS != "triton", reason="it is about a role of the Triton kernels"),
]

# T, B, I, H: one program; many of them over units, and over units and batch in tiles of 16 and of 64 rows. Few
# variants, as each of them is compiled meanwhile.
ONE = (5, 3, 7, 16)
SIZES = [ONE] if INTERPRETED else [ONE, (33, 5, 20, 208), (9, 130, 33, 512)]
OPTIONS = ["lengths+reset+reverse"] if INTERPRETED else ["plain", "lengths+reset+reverse"]
RAGGED = ONE if INTERPRETED else (20, 33, 40, 515)


@pytest.fixture(autouse=True)
def persistent() -> Iterator[None]:
    recurrent_launch.role = "persistent"
    yield
    recurrent_launch.role = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_match_the_reference(cell: str, dtype: torch.dtype) -> None:
    for shape in SIZES:
        for option in OPTIONS:
            seed(cell, dtype, shape)
            lengths, reset, reverse = options(option, *shape[:2])
            compare(draw(cell, *shape, dtype=dtype), lengths, reset, cell, reverse, backend="triton")


@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_repeat(cell: str) -> None:
    """Whoever comes first: a race would show sooner or later."""
    steps, batch, _, hidden = RAGGED
    inputs = draw(cell, *RAGGED, dtype=torch.float16)
    grads = [torch.randn(steps, batch, hidden).half(), torch.randn(batch, hidden).half(), None, None]
    want = None
    for _ in range(2 if INTERPRETED else 20):
        out = forward(inputs, None, None, cell, False, backend="triton")
        found = (*out, *backward(grads, out, inputs, None, None, cell, False, "triton"))
        for a, b in zip(want or found, found, strict=True):
            assert torch.equal(a, b)
        want = found
    compare(inputs, None, None, cell, False, backend="triton")
