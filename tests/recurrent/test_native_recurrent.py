"""The native scan on the CPU against the reference: every cell, dtype, instruction set and option, odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from recurrent_support import (
    INPUTS,
    OPTIONS,
    SHAPES,
    assert_within_budget,
    backward,
    compare,
    draw,
    forward,
    options,
    options_of,
    seed,
    walked_gradients,
    whole_gradient,
)
from support import CELLS, DTYPES, PROJECTED, needs_native
from torch import Tensor

from fastseq import ops
from fastseq.recurrent.autograd import Inputs, Kept, Walk, torch_products

pytestmark = needs_native


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_values_and_gradients_match_the_reference(cell: str, dtype: torch.dtype, isa: str) -> None:
    plain = cell.removesuffix("_projected")
    for shape, option, threads in zip(SHAPES, itertools.cycle(OPTIONS), itertools.cycle([2, 1, 3]), strict=False):
        for biases in (True, False) if shape == SHAPES[-2] else (True,):
            seed(cell, dtype, shape)
            torch.set_num_threads(threads)
            projected = max(1, shape[3] // 2) if cell != plain else 0
            inputs = draw(plain, *shape, projected=projected, biases=biases, dtype=dtype)
            lengths, reset, reverse = options(option, *shape[:2])
            compare(inputs, lengths, reset, plain, reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_any_few_rows_meet_weights_as_they_lie(dtype: torch.dtype, isa: str) -> None:
    cells, threads = itertools.cycle(CELLS), itertools.cycle([1, 2, 3, 1])
    for steps, rows in itertools.product((1, 2), range(1, 14)):
        cell = next(cells)
        seed(cell, dtype, steps, rows)
        torch.set_num_threads(next(threads))
        inputs = draw(cell, steps, rows, 71, 37, dtype=dtype)
        compare(inputs, None, None, cell, False)
        if rows % 4 == 1:  # columns of weights that are apart: these have to be packed, however few the rows
            inputs[1:3] = [w.t().contiguous().t() for w in inputs[1:3]]
            compare(inputs, None, None, cell, False)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_every_option_on_every_cell(cell: str, option: str) -> None:
    plain = cell.removesuffix("_projected")
    for threads, given in [(1, (True, False, False, True)), (2, (False, True, True, False)), (3, (True,) * 4)]:
        seed(cell, option, threads)
        torch.set_num_threads(threads)
        inputs = draw(plain, 17, 7, 17, 33, projected=9 if cell != plain else 0, dtype=torch.float32)
        lengths, reset, reverse = options(option, 17, 7)
        compare(inputs, lengths, reset, plain, reverse, given)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "shape", [(5, 1, 129, 256), (9, 2, 33, 300), (3, 4, 16, 512), (2, 40, 65, 128), (4, 17, 7, 65)]
)
def test_work_split_among_threads(cell: str, shape: tuple[int, int, int, int]) -> None:
    for threads in (1, 2, 3, 4):
        seed(cell, shape)
        torch.set_num_threads(threads)
        compare(draw(cell, *shape, dtype=torch.float32), None, None, cell, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_of_few_rows(cell: str, dtype: torch.dtype, isa: str) -> None:
    for batch, threads, features, hidden in ((1, 2, 130, 301), (2, 3, 131, 300), (3, 1, 64, 33), (5, 2, 300, 257)):
        seed(cell, dtype, batch)
        torch.set_num_threads(threads)
        inputs = draw(cell, 1, batch, features, hidden, dtype=dtype)
        compare(inputs, None, None, cell, False)
        strided = [None if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
        given = [inputs[0], *inputs[1:6], strided[6], strided[7]]
        want = forward(inputs, None, None, cell, False)
        for same in (given, [strided[0], *inputs[1:]]):
            assert all(torch.equal(a, b) for a, b in zip(forward(same, None, None, cell, False), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_strides_do_not_matter(cell: str, dtype: torch.dtype) -> None:
    seed(cell, dtype)
    inputs = draw(cell, 13, 3, 17, 33, dtype=dtype)  # enough rows for weights to be packed whatever their strides
    lengths, reset, _ = options("lengths+reset", 13, 3)
    assert lengths is not None
    assert reset is not None
    grads = [torch.randn(13, 3, 33).to(dtype), torch.randn(3, 33).to(dtype), None, None]

    def strange(t: Tensor | None) -> Tensor | None:  # every second element of a transposed, larger tensor
        if t is None:
            return None
        big = torch.full([2 * size for size in reversed(t.shape)], float("nan")).to(t.dtype)
        view = big.permute(*reversed(range(t.dim())))[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    want = forward(inputs, lengths, reset, cell, False)
    want_back = backward(grads, want, inputs, lengths, reset, cell, False)
    odd_inputs = [strange(t) for t in inputs]
    got = forward(odd_inputs, lengths.repeat_interleave(2)[::2], reset.t().contiguous().t(), cell, False)
    odd_out = tuple(strange(t) if t.dim() > 1 else t for t in want)
    got_back = backward([strange(g) for g in grads], odd_out, odd_inputs, lengths, reset, cell, False)
    for a, b in zip((*want, *want_back), (*got, *got_back), strict=True):
        assert torch.equal(a, b)
        assert b.is_contiguous()


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_and_expanded_gradients(cell: str) -> None:
    seed(cell)
    inputs = draw(cell, 9, 5, 16, 24, dtype=torch.float32)
    want = forward(inputs, None, None, cell, False)
    got = forward([inputs[0].transpose(0, 1).contiguous().transpose(0, 1), *inputs[1:]], None, None, cell, False)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    one = torch.ones(())
    full = backward([torch.ones(9, 5, 24), None, None, None], want, inputs, None, None, cell, False)
    expanded = backward([one.expand(9, 5, 24), None, None, None], want, inputs, None, None, cell, False)
    assert all(torch.equal(a, b) for a, b in zip(full, expanded, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_every_time(cell: str, threads: int) -> None:
    seed(cell)
    torch.set_num_threads(threads)
    inputs = draw(cell, 20, 9, 33, 65, dtype=torch.float32)
    lengths, reset, reverse = options("lengths+reset+reverse", 20, 9)
    grads = [torch.randn(20, 9, 65), None, None, None]

    def run() -> tuple[Tensor, ...]:
        out = forward(inputs, lengths, reset, cell, reverse)
        return (*out, *backward(grads, out, inputs, lengths, reset, cell, reverse))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    lean = forward(inputs, lengths, reset, cell, reverse, False, False)
    assert torch.equal(lean[0], first[0])
    assert torch.equal(lean[1], first[1])
    assert lean[3].shape == lean[4].shape == (0,)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_do_not_touch_each_other(cell: str) -> None:
    seed(cell)
    inputs = draw(cell, 6, 9, 17, 33, dtype=torch.float32)
    clean = forward(inputs, None, None, cell, False)
    inputs[0][2, 4] = float("nan")
    y, h_n, *_ = forward(inputs, None, None, cell, False)
    others = [b for b in range(9) if b != 4]
    assert torch.equal(y[:, others], clean[0][:, others])
    assert torch.equal(y[:2], clean[0][:2])
    assert y[2:, 4].isnan().all()
    assert h_n[4].isnan().all()


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str) -> None:
    seed(cell)
    inputs = draw(cell, 8, 4, 5, 17, dtype=torch.float32)
    lengths = torch.tensor([8, 3, 0, 5])
    dy = torch.randn(8, 4, 17)
    grads: list[Tensor | None] = [dy, None, None, None]
    for reverse in (False, True):
        want = forward(inputs, lengths, None, cell, reverse)
        want_back = backward(grads, want, inputs, lengths, None, cell, reverse)
        past = torch.arange(8)[:, None] >= lengths
        poisoned = [inputs[0].masked_fill(past[:, :, None], float("nan")), *inputs[1:]]
        got = forward(poisoned, lengths, None, cell, reverse)
        dirty: list[Tensor | None] = [dy.masked_fill(past[:, :, None], float("nan")), None, None, None]
        got_back = backward(dirty, got, poisoned, lengths, None, cell, reverse)
        for a, b in zip((*want, *want_back), (*got, *got_back), strict=True):
            assert torch.equal(a, b)
            assert not b.isnan().any()
        if got[4].dim() == 3:
            assert not got[4][past].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_products_are_those_of_their_own_inputs(cell: str, dtype: torch.dtype, isa: str) -> None:
    plain = cell.removesuffix("_projected")
    shapes = [*SHAPES, (300, 2, 5, 9), (9, 7, 130, 50)]
    for shape, option, threads in zip(shapes, itertools.cycle(OPTIONS), itertools.cycle([2, 1, 3]), strict=False):
        seed(cell, dtype, shape)
        torch.set_num_threads(threads)
        projected = max(1, shape[3] // 2) if cell != plain else 0
        inputs = draw(plain, *shape, projected=projected, dtype=dtype)
        lengths, reset, reverse = options(option, *shape[:2])
        grads: list[Tensor | None] = [torch.randn(*shape[:2], projected or shape[3]).to(dtype), None, None, None]
        out, want = walked_gradients(inputs, grads, lengths, reset, plain, reverse)
        x, w_hh = inputs[0], inputs[2]
        if lengths is not None:  # padding may hold anything
            x = x.masked_fill((torch.arange(shape[0])[:, None] >= lengths)[:, :, None], float("nan"))
        fixed = (grads, out, [x, *inputs[1:]], lengths, reset, plain, reverse)
        found = whole_gradient(*fixed)
        for name, f, w in zip(INPUTS[:5], found[:5], want, strict=False):
            # Each is one sum of T * B (dx: G * H) terms, in the accumulator's dtype, rounded once.
            floor = 4 + (shape[0] * shape[1] + w_hh.shape[0]) ** 0.5
            assert_within_budget(f, w.to(dtype), w, f"gradient of {name}", floor)
        only_dx = whole_gradient(*fixed, with_weights=False)
        assert torch.equal(only_dx[0], found[0])
        assert all(t.shape == (0,) for t in only_dx[1:5])
        only_weights = whole_gradient(*fixed, with_dx=False)
        assert all(a is b or torch.equal(a, b) for a, b in zip(only_weights[1:], found[1:], strict=True))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_absent_states_are_zeros(cell: str, option: str) -> None:
    plain = cell.removesuffix("_projected")
    for steps, batch in ((1, 1), (1, 3), (4, 3)):
        seed(cell, option, steps, batch)
        inputs = draw(plain, steps, batch, 16, 17, projected=9 if cell != plain else 0, dtype=torch.float32)
        absent = [*inputs[:6], None, None]
        zeros = [*inputs[:6], *(None if s is None else torch.zeros_like(s) for s in inputs[6:])]
        lengths, reset, reverse = options(option, steps, batch)
        out, same = (forward(given, lengths, reset, plain, reverse) for given in (absent, zeros))
        assert all(torch.equal(a, b) for a, b in zip(out, same, strict=True))
        y, _, _, states, tape = out
        grads: list[Tensor | None] = [torch.randn_like(y), torch.randn_like(y[0]), None, None]
        back, want = (backward(grads, out, given, lengths, reset, plain, reverse) for given in (absent, zeros))
        assert all(torch.equal(a, b) for a, b in zip(back[:2], want[:2], strict=True))
        assert all(d.shape == (0,) for d in back[2:])
        x, w_ih, w_hh, _, _, w_hr = inputs[:6]
        own, theirs = (
            whole_gradient(grads, out, given, lengths, reset, plain, reverse) for given in (absent, zeros)
        )  # fmt: skip
        assert all(a is b or torch.equal(a, b) for a, b in zip(own[:6], theirs[:6], strict=True))
        torches, again = (
            torch_products(
                back[0],
                back[1],
                Inputs(x, w_ih, w_hh, None, None, w_hr, given[6], None, *options_of(lengths, reset)),
                Kept(y, states, tape),
                Walk(plain, reverse, "native"),
                True,
                True,
            )
            for given in (absent, zeros)
        )
        for a, b in zip(torches, again, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b)


def test_an_empty_batch_gives_empty_results() -> None:
    for cell in CELLS:
        inputs = draw(cell, 4, 0, 5, 6, dtype=torch.float32)
        out = forward(inputs, None, None, cell, False)
        assert out[0].shape == (4, 0, 6)
        assert out[1].shape == (0, 6)
        back = backward([torch.empty(4, 0, 6), None, None, None], out, inputs, None, None, cell, False)
        assert back[0].shape == (4, 0, 6 * ops.GATES[cell])
        assert back[2].shape == (0, 6)
        found = whole_gradient([None] * 4, out, inputs, None, None, cell, False)
        assert found[0].shape == (4, 0, 5)
        assert all(t is None or not t.any() for t in found[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_cell_state_survives_16_bits(dtype: torch.dtype) -> None:
    inputs = draw("lstm", 50, 2, 4, 8, dtype=dtype)
    inputs[1].zero_()
    inputs[2].zero_()
    inputs[3].copy_(torch.tensor([30.0, 30.0, 30.0, 0.0]).repeat_interleave(8))  # i = f = g = 1
    inputs[4].zero_()
    inputs[7].fill_(1e4)
    *_, states, _ = forward(inputs, None, None, "lstm", False)
    torch.testing.assert_close(states[-1], torch.full((2, 8), 1e4).to(dtype).float() + 50, rtol=1e-6, atol=0)


def test_wrong_arguments_are_named() -> None:
    inputs = draw("gru", 4, 2, 5, 6, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"b_ih must be .* shape"):
        forward([*inputs[:3], torch.zeros(5), *inputs[4:]], None, None, "gru", False)
    with pytest.raises(RuntimeError, match="lengths must be an int64"):
        forward(inputs, torch.ones(2), None, "gru", False)
    with pytest.raises(RuntimeError, match="needs its tape"):
        backward([None] * 4, (torch.zeros(4, 2, 6), *(None,) * 4), inputs, None, None, "gru", False)
    last = len(CELLS) - 1
    with pytest.raises(RuntimeError, match=rf"cell must be a number from 0 to {last} .*, not {last + 1}"):
        torch.ops.fastseq.scan_forward.native(*inputs, *options_of(), last + 1, False, True, True)
