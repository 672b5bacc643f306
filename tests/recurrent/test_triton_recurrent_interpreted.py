"""The Triton scan under Triton's interpreter against the reference: every cell, dtype, role and option, odd shapes.

Runs in a process of its own, with TRITON_INTERPRET=1: ``make test`` starts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from fastseq.kernels.recurrent import launch as recurrent_launch
from fastseq.kernels.recurrent import tuning
from recurrent_support import OPTIONS, SHAPES, backward, compare, draw, forward, options, options_of, seed
from support import CELLS, PROJECTED
from triton_support import needs_interpreter

import fastseq
from fastseq import ops

pytestmark = needs_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROLES = ["sequence", "step"]
EVERY = [*CELLS, *PROJECTED]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    recurrent_launch.role = None


def use_role(role: str, cell: str = "") -> None:
    if role == "sequence" and cell.endswith("_projected"):
        pytest.skip("a projection has the step role only")
    recurrent_launch.role = role


def inputs_of(cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype, **kwargs):
    projected = max(1, shape[3] // 2) if cell.endswith("_projected") else 0
    return draw(cell.removesuffix("_projected"), *shape, projected=projected, dtype=dtype, **kwargs)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", EVERY)
def test_values_and_gradients_match_the_reference(cell: str, dtype: torch.dtype, role: str) -> None:
    use_role(role, cell)
    plain = cell.removesuffix("_projected")
    for shape, option in zip(SHAPES, itertools.cycle(OPTIONS), strict=False):
        # Interpreting large tiles and bfloat16 is slow; test_the_largest and test_several_tiles have a few.
        if tuning.padded(shape[3]) > 64 or (dtype is torch.bfloat16 and shape[2] > 60):
            continue
        if (cell, dtype, role) == ("lstm", torch.float32, "sequence") and shape[3] > 32:
            continue  # whose backward has the step role: test_the_ways_there_and_back_may_have_different_roles
        for biases in (True, False) if shape == SHAPES[-3] else (True,):
            seed(cell, dtype, shape)
            lengths, reset, reverse = options(option, *shape[:2])
            compare(
                inputs_of(cell, shape, dtype, biases=biases), lengths, reset, plain, reverse, backend="triton"
            )  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", EVERY)
def test_every_option_on_every_cell(cell: str, option: str, role: str) -> None:
    use_role(role, cell)
    for given in [(True, False, False, True), (False, True, True, False), (True,) * 4]:
        seed(cell, option, given)
        lengths, reset, reverse = options(option, 4, 5)
        compare(
            inputs_of(cell, (4, 5, 3, 17), torch.float32), lengths, reset, cell.removesuffix("_projected"), reverse,
            given, backend="triton",
        )  # fmt: skip


@pytest.mark.parametrize("cell", EVERY)
def test_several_tiles_of_units_batch_and_product(cell: str) -> None:
    use_role("step")
    for shape in [(2, 65, 5, 18), (2, 3, 130, 140), (1, 2, 7, 65)]:
        seed(cell, shape)
        compare(
            inputs_of(cell, shape, torch.float16), None, None, cell.removesuffix("_projected"), True, backend="triton"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_the_largest_of_the_sequence_role(cell: str, dtype: torch.dtype) -> None:
    use_role("sequence")
    name = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    shared, _ = recurrent_launch.properties(torch.empty(0).device)
    for hidden in sorted({tile.units for tile in tuning.sequence_tiles(cell, name, shared, True)})[-2:]:
        seed(cell, dtype, hidden)
        compare(inputs_of(cell, (2, 3, 4, hidden - 3), dtype), None, None, cell, False, backend="triton")
    largest = tuning.largest_sequence(cell, name, True)
    with pytest.raises(ValueError, match=rf"H = {largest + 1} is above {largest}"):
        recurrent_launch.tile(cell, torch.empty(2, 1, 1, dtype=dtype), largest + 1, False, True)


@pytest.mark.parametrize("option", ["plain", "lengths+reset+reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_units_in_two_parts(cell: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit, of either part, gets from every unit of both; the second part is full, or begins."""
    use_role("sequence")
    tile = tuning.Sequence(tuning.BLOCK_B, 16, 1, 1, 16)
    monkeypatch.setattr(tuning, "sequence", lambda *_: tile)
    for hidden, dtype, given in ((32, torch.float16, (True,) * 4), (17, torch.float32, (True, True, True, False))):
        seed(cell, option, hidden)
        lengths, reset, reverse = options(option, 3, 18)
        compare(
            inputs_of(cell, (3, 18, 4, hidden), dtype), lengths, reset, cell, reverse, given, backend="triton"
        )  # fmt: skip


def test_the_ways_there_and_back_may_have_different_roles() -> None:
    x = torch.empty(3, 1, 1)
    assert isinstance(recurrent_launch.tile("lstm", x, 33, False, False)[0], tuning.Sequence)
    assert isinstance(recurrent_launch.tile("lstm", x, 33, False, True)[0], tuning.Step)
    lengths, reset, reverse = options("lengths+reset+reverse", 3, 4)
    compare(inputs_of("lstm", (3, 4, 5, 33), torch.float32), lengths, reset, "lstm", reverse, backend="triton")


@pytest.mark.parametrize("biases", ["b_ih", "b_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_bias_alone(cell: str, biases: str) -> None:
    inputs = inputs_of(cell, (3, 2, 4, 5), torch.float32)
    inputs[4 if biases == "b_ih" else 3] = None
    for role in ROLES:
        use_role(role)
        compare(inputs, None, None, cell, False, backend="triton")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", EVERY)
def test_states_that_are_absent_are_zero(cell: str, role: str) -> None:
    use_role(role, cell)
    plain = cell.removesuffix("_projected")
    inputs = inputs_of(cell, (4, 3, 5, 9), torch.float32)
    lengths, reset, _ = options("lengths+reset", 4, 3)
    absent = [*inputs[:6], None, None]
    zeros = [*inputs[:6], *(None if t is None else torch.zeros_like(t) for t in inputs[6:])]
    for reverse in (False, True):
        want = forward(zeros, lengths, reset, plain, reverse, backend="triton")
        got = forward(absent, lengths, reset, plain, reverse, backend="triton")
        grads = [torch.randn_like(want[0]), None, None, None]
        want_back = backward(grads, want, zeros, lengths, reset, plain, reverse, "triton")
        got_back = backward(grads, got, absent, lengths, reset, plain, reverse, "triton")
        for a, b in zip((*want, *want_back[:2]), (*got, *got_back[:2]), strict=True):
            assert torch.equal(a, b)
        assert got_back[2].shape == got_back[3].shape == (0,)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_strides_do_not_matter(cell: str, role: str) -> None:
    use_role(role)
    inputs = inputs_of(cell, (4, 3, 7, 9), torch.float32)
    lengths, reset, _ = options("lengths+reset", 4, 3)
    assert lengths is not None
    assert reset is not None
    grads = [torch.randn(4, 3, 9), torch.randn(3, 9), None, None]

    def strange(t):  # every second element of a transposed, larger tensor
        if t is None:
            return None
        big = torch.full([2 * size for size in reversed(t.shape)], float("nan")).to(t.dtype)
        view = big.permute(*reversed(range(t.dim())))[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    def batch_first(t):
        return None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t

    def half(t):  # of a wider tensor, as of both directions' outputs
        if t is None or t.dim() != 3:
            return t
        return torch.cat((torch.full_like(t, float("nan")), t), -1)[..., t.shape[-1] :]

    want = forward(inputs, lengths, reset, cell, False, backend="triton")
    want_back = backward(grads, want, inputs, lengths, reset, cell, False, "triton")
    odd_lengths, odd_reset = lengths.repeat_interleave(2)[::2], reset.t().contiguous().t()
    for change in (strange, batch_first, half):
        odd = [change(t) for t in inputs]
        got = forward(odd, odd_lengths, odd_reset, cell, False, backend="triton")
        kept = tuple(change(t) if t.dim() > 1 else t for t in want)
        got_back = backward([change(g) for g in grads], kept, odd, odd_lengths, odd_reset, cell, False, "triton")
        for a, b in zip((*want, *want_back), (*got, *got_back), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # torch's own product may sum in another order
            assert b.is_contiguous()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_do_not_touch_each_other_and_the_bits_repeat(cell: str, role: str) -> None:
    use_role(role)
    inputs = inputs_of(cell, (4, 18, 5, 17), torch.float32)
    clean = forward(inputs, None, None, cell, False, backend="triton")
    for a, b in zip(clean, forward(inputs, None, None, cell, False, backend="triton"), strict=True):
        assert torch.equal(a, b)
    lean = forward(inputs, None, None, cell, False, False, False, "triton")
    assert torch.equal(lean[0], clean[0])
    assert lean[3].shape == lean[4].shape == (0,)
    inputs[0][2, 4] = float("nan")
    y, h_n, *_ = forward(inputs, None, None, cell, False, backend="triton")
    others = [b for b in range(18) if b != 4]
    assert torch.equal(y[:, others], clean[0][:, others])
    assert torch.equal(y[:2], clean[0][:2])
    assert y[2:, 4].isnan().all()
    assert h_n[4].isnan().all()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str, role: str) -> None:
    use_role(role)
    inputs = inputs_of(cell, (5, 4, 5, 9), torch.float32)
    lengths = torch.tensor([5, 3, 0, 4])
    dy = torch.randn(5, 4, 9)
    past = torch.arange(5)[:, None] >= lengths
    for reverse in (False, True):
        want = forward(inputs, lengths, None, cell, reverse, backend="triton")
        want_back = backward([dy, None, None, None], want, inputs, lengths, None, cell, reverse, "triton")
        poisoned = [inputs[0].masked_fill(past[:, :, None], float("nan")), *inputs[1:]]
        got = forward(poisoned, lengths, None, cell, reverse, backend="triton")
        dirty = [dy.masked_fill(past[:, :, None], float("nan")), None, None, None]
        got_back = backward(dirty, got, poisoned, lengths, None, cell, reverse, "triton")
        for a, b in zip((*want, *want_back), (*got, *got_back), strict=True):
            assert torch.equal(a, b)
            assert not b.isnan().any()
        if got[4].dim() == 3:
            assert not got[4][past].any()


def test_an_empty_batch() -> None:
    for cell in CELLS:
        inputs = inputs_of(cell, (3, 0, 5, 6), torch.float32)
        out = forward(inputs, None, None, cell, False, backend="triton")
        assert out[0].shape == (3, 0, 6)
        back = backward([None] * 4, out, inputs, None, None, cell, False, "triton")
        assert back[0].shape == (3, 0, 6 * ops.GATES[cell])


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "before", "coupled"])
def test_layers_stacks_and_cells_reach_the_kernels(name: str) -> None:
    kind, kwargs = {"before": ("GRU", {"reset_after": False}), "coupled": ("LSTM", {"input_forget": True})}.get(
        name, (name, {})
    )
    layer = getattr(fastseq.nn, kind)(5, 9, num_layers=2, bidirectional=True, batch_first=True, **kwargs)
    cell = getattr(fastseq.nn, f"{kind}Cell")(5, 9, **kwargs)
    x = torch.randn(3, 4, 5, requires_grad=True)
    lengths = torch.tensor([4, 2, 3])
    found = {}
    for backend in ("reference", "triton"):
        with fastseq.use_backend(backend), torch.profiler.profile() as profile:
            y, _ = layer(x, lengths=lengths)
            h = cell(x[:, 0])
            h = h[0] if isinstance(h, tuple) else h
            found[backend] = [y, h, *torch.autograd.grad(y.sin().sum() + h.cos().sum(), [x, *layer.parameters()])]
        ran = "fastseq::scan_forward" in {event.key for event in profile.key_averages()}
        assert ran == (backend == "triton")
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_reasons_are_true() -> None:
    assert fastseq.backends()["triton"] is None
    double = fastseq.nn.GRU(3, 5).double()
    with fastseq.use_backend("triton"), pytest.raises(fastseq.BackendError, match="not float64"):
        double(torch.randn(2, 1, 3).double())
    reason = recurrent_launch.tile("lstm", torch.empty(9, 1, 1), 65, False, False)[1]
    assert reason == "H = 65 is above 64, the most units of a lstm in fp32 that one SM holds"
    small = tuning.sequence("gru", "bf16", 128, 64 * 1024, True)
    assert small == "H = 128 (gru, bf16) needs 114688 bytes of shared memory a program; this device has 65536"
    assert recurrent_launch.tile("gru", torch.empty(9, 1, 1), 64, False, False)[1] is None


@pytest.mark.parametrize("role", ROLES)
def test_torch_func_sees_through(role: str) -> None:
    use_role(role)
    layer = fastseq.nn.GRU(3, 5)
    x = torch.randn(2, 3, 4, 3)

    def loss(sequence: torch.Tensor) -> torch.Tensor:
        return layer(sequence)[0].sin().sum()

    found = []
    for backend in ("reference", "triton"):
        with fastseq.use_backend(backend):
            found.append(torch.func.vmap(torch.func.grad(loss))(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str) -> None:
    inputs = inputs_of(cell, (2, 3, 4, 5), torch.float32)
    lengths, reset, _ = options("lengths+reset", 2, 3)
    args = (*inputs, *options_of(lengths, reset), ops.NUMBER[cell], False, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastseq.scan_forward.triton, args, test_utils=tests)
    y, _, _, states, tape = torch.ops.fastseq.scan_forward.triton(*args)
    dy = torch.randn_like(y)
    back = (dy, None, None, None, y, states if ops.HAS_C[cell] else None, tape if ops.TAPE[cell] else None)
    torch.library.opcheck(
        torch.ops.fastseq.scan_backward.triton,
        (*back, inputs[2], None, inputs[6], inputs[7], *options_of(lengths, reset), ops.NUMBER[cell], False),
        test_utils=tests,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_cell_state_survives_16_bits(dtype: torch.dtype) -> None:
    inputs = inputs_of("lstm", (50, 2, 4, 8), dtype)
    inputs[1].zero_()
    inputs[2].zero_()
    inputs[3].copy_(torch.tensor([30.0, 30.0, 30.0, 0.0]).repeat_interleave(8))  # i = f = g = 1
    inputs[4].zero_()
    inputs[7].fill_(1e4)
    for role in ROLES:
        use_role(role)
        *_, states, _ = forward(inputs, None, None, "lstm", False, backend="triton")
        torch.testing.assert_close(
            states[-1], torch.full((2, 8), 1e4).to(dtype).float() + 50, rtol=1e-6, atol=0
        )  # fmt: skip
