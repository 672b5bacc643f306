"""The Triton kernels of normalised layers under Triton's interpreter against the reference: every form, dtype and role.

Runs in a process of its own, with TRITON_INTERPRET=1: ``make test`` starts it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastseq.kernels.recurrent import normed_launch, normed_tuning
from recurrent_support import assert_within_budget, seed
from support import flat
from torch import Tensor
from triton_support import interpreter_only, needs_interpreter

import fastseq
from fastseq import ops
from fastseq.recurrent import normed_reference as reference

pytestmark = needs_interpreter

ROLES = ["sequence", "step"]
forms = pytest.mark.parametrize(("cell", "joint"), normed_tuning.FORMS)
FORWARD, BACKWARD = torch.ops.fastseq.normed_forward, torch.ops.fastseq.normed_backward


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    normed_launch.role = None


Call = tuple[list[Any], list[Any]]
"""The operators' tensors: gates_x to c0, of which there are gradients; lengths, reset and state_mask."""


def draw(cell: str, dtype: torch.dtype, steps: int, batch: int, hidden: int, pick: random.Random | None = None) -> Call:
    """All of them; with ``pick`` some of those that may be absent are None."""
    gates, lstm = ops.GATES[cell] * hidden, ops.HAS_C[cell]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)

    def given(t: Tensor) -> Tensor | None:
        return t if pick is None or pick.random() < 0.7 else None

    of_c = [1 + normal(hidden, scale=0.3), normal(hidden)] if lstm else [None, None]
    states = [given(normal(batch, hidden).tanh()), given(normal(batch, hidden)) if lstm else None]
    parameters = [normal(gates, hidden, scale=hidden**-0.5), 1 + normal(gates, scale=0.3), given(normal(gates)), *of_c]
    mask = F.dropout(torch.ones(batch, hidden, dtype=torch.float64), 0.4, True).to(dtype)
    lengths, reset = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.3
    return [normal(steps, batch, gates), *parameters, *states], [given(lengths), given(reset), given(mask)]


def by_operators(call: Call, grads: list[Any], cell: str, joint: bool, reverse: bool) -> tuple[list[Any], list[Any]]:
    """y, h_n, c_n and states, and gradients of the eight tensors but W_hh, of which there is that of its product."""
    tensors, options = call
    numbers = ops.NUMBER[cell], joint, reverse
    y, h_n, c_n, states, tape, stats = FORWARD.triton(*tensors, *options, *numbers, True, True)
    kept = y, states if ops.HAS_C[cell] else None, tape, stats
    dgates_x, dproduct, *found = BACKWARD.triton(*grads, *kept, *tensors[1:], *options, *numbers)
    return [y, h_n, c_n, states], [dproduct if joint else dgates_x, dproduct, *found]


def by_reference(
    call: Call, grads: list[Any], cell: str, joint: bool, reverse: bool, dtype: torch.dtype
) -> tuple[list[Any], list[Any]]:
    """The same, computed in ``dtype``; None in the place of W_hh's."""
    tensors = [None if t is None else t.detach().to(dtype).requires_grad_() for t in call[0]]
    options = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in call[1]]
    form = "joint" if joint else "layer"
    results = reference.walk(*tensors, *options, cell=cell, form=form, reverse=reverse)
    pairs = [(r, d.to(r.dtype)) for r, d in zip(results, grads, strict=True) if d is not None]
    leaves = [t for t in tensors if t is not None]
    outputs, incoming = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, leaves, incoming, allow_unused=True))
    return list(results), [None if t is None else next(found) for t in tensors]


NAMES = ["gates_x", "w_hh", "gain", "shift", "gain_c", "shift_c", "h0", "c0"]


def compare(call: Call, cell: str, joint: bool, reverse: bool, given: tuple[bool, ...] = (True,) * 4) -> None:
    """Results and gradients beside the reference's, which has them of the same dtype and of float64."""
    gates_x = call[0][0]
    dtype, (steps, batch) = gates_x.dtype, gates_x.shape[:2]
    hidden, lstm = call[0][1].shape[1], ops.HAS_C[cell]
    shapes = [(steps, batch, hidden), (batch, hidden), (batch, hidden), (steps, batch, hidden)]
    grads: list[Any] = [torch.randn(shape).to(dtype) for shape in shapes]
    grads[3] = grads[3].float()
    grads = [d if g and (lstm or n < 2) else None for n, (d, g) in enumerate(zip(grads, given, strict=True))]
    own, gradients = by_operators(call, grads, cell, joint, reverse)
    peer, peer_gradients = by_reference(call, grads, cell, joint, reverse, dtype)
    want, want_gradients = by_reference(call, grads, cell, joint, reverse, torch.float64)
    floor = 16 if dtype.itemsize == 2 else 64  # roundings; 16 bits are rounded on the tape too, as W_hh's operands are
    for name, a, p, t in zip(["y", "h_n", "c_n", "states"], own, peer, want, strict=True):
        if t is None:
            assert a.shape == (0,), name
        else:  # states as layers hand them out: what W_hh multiplies is rounded, which the reference never does
            assert_within_budget(a.to(dtype), p.to(dtype), t, name, floor)
    if cell == "rnn_relu" and dtype.itemsize == 2:
        return  # rounding moves units across the kink, where gradients jump
    for name, a, p, t in zip(NAMES, gradients, peer_gradients, want_gradients, strict=True):
        if name == "w_hh":
            assert a.shape == gates_x.shape
        elif call[0][NAMES.index(name)] is None:
            assert a.shape == (0,), name
        else:
            zero = torch.zeros_like(a, dtype=torch.float64)
            assert_within_budget(a, torch.zeros_like(a) if p is None else p, zero if t is None else t, name, floor)


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.full) for n in range(4, 48))])
@forms
def test_values_and_gradients_are_the_references(cell: str, joint: bool, number: int) -> None:
    """Of drawn sizes, options, directions and gradients that come in."""
    seed(cell, joint, number)
    pick = random.Random(f"{cell} {joint} {number}")
    role, dtype = ROLES[number % 2], [torch.float32, torch.bfloat16, torch.float16][number % 3]
    # Of fewer units a row may be all but constant: its normalisation then multiplies what 16 bits rounded by hundreds.
    hidden = pick.choice([1, 3, 17, 32]) if dtype is torch.float32 else pick.choice([17, 40])
    normed_launch.role = role
    call = draw(cell, dtype, pick.choice([1, 3, 4]), pick.choice([1, 2, 3]), hidden, pick)
    given = (pick.random() < 0.8, pick.random() < 0.6, pick.random() < 0.6, pick.random() < 0.6)
    compare(call, cell, joint, pick.random() < 0.5, given if any(given[:2]) else (True, *given[1:]))


@pytest.mark.parametrize("role", ROLES)
@forms
def test_all_options_at_once(cell: str, joint: bool, role: str) -> None:
    normed_launch.role = role
    compare(draw(cell, torch.float32, 3, 2, 17), cell, joint, role == "step")


@pytest.mark.parametrize(("cell", "joint"), [("lstm", False), ("gru", True)])
def test_a_row_in_several_blocks(cell: str, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of each block reaches the sums of all others; the last block is not full."""
    normed_launch.role = "step"
    monkeypatch.setattr(normed_tuning, "step", lambda _: (16, 1))
    compare(draw(cell, torch.float32, 2, 2, 40), cell, joint, True)


def test_several_programs_share_the_batch_and_the_rows_of_gains() -> None:
    normed_launch.role = "sequence"
    compare(draw("gru", torch.float32, 3, 18, 5), "gru", False, False)  # 54 rows: 4 tiles of rows, the last not full
    compare(draw("lstm", torch.float32, 2, 33, 3), "lstm", False, True)


def test_the_ways_there_and_back_may_have_different_roles() -> None:
    x = torch.empty(3, 1, 1)
    assert normed_launch.tile("lstm", x, 33, False)[0] is not None
    found, reason = normed_launch.tile("lstm", x, 33, True)
    assert found is None
    assert reason == "H = 33 is above 32, the most units of a normalised lstm in fp32 that one SM holds"
    assert normed_launch.tile("lstm", torch.empty(1, 1, 1), 3, True)[1] == "one step is one product either way"
    normed_launch.role = "sequence"
    with pytest.raises(ValueError, match="H = 33 is above 32"):
        normed_launch.tile("lstm", x, 33, True)
    normed_launch.role = None
    compare(draw("lstm", torch.float32, 2, 2, 33), "lstm", False, False)


@pytest.mark.parametrize(("cell", "joint", "role"), [("lstm", False, "step"), ("gru", True, "sequence")])
def test_rows_do_not_touch_each_other_and_padding_is_never_read(cell: str, joint: bool, role: str) -> None:
    normed_launch.role = role
    call = draw(cell, torch.float32, 2, 3, 9)
    call[1][0] = torch.tensor([2, 0, 1])
    dy = torch.randn(2, 3, 9)
    want = by_operators(call, [dy, None, None, None], cell, joint, True)
    bad = [t if t is None else t.clone() for t in call[0]]
    bad[0][1, 2] = float("nan")  # past the length
    past = dy.clone()
    past[:, 1] = past[1, 2] = float("nan")
    found = by_operators((bad, call[1]), [past, None, None, None], cell, joint, True)
    for a, b in zip(flat(want), flat(found), strict=True):
        assert torch.equal(a, b)
    bad[0][0, 0] = float("nan")  # of one row
    y, *_ = FORWARD.triton(*bad, *call[1], ops.NUMBER[cell], joint, True, False, False)
    assert y[0, 0].isnan().all()
    assert torch.equal(y[:, 1:], want[0][0][:, 1:])


@forms
def test_an_empty_batch(cell: str, joint: bool) -> None:
    call = draw(cell, torch.float32, 3, 0, 5)
    results, gradients = by_operators(call, [torch.empty(3, 0, 5), None, None, None], cell, joint, False)
    assert results[0].shape == (3, 0, 5)
    assert not gradients[2].any()


def test_strides_do_not_matter() -> None:
    call = draw("gru", torch.float32, 3, 2, 5)
    dy, wide = torch.randn(3, 2, 5), torch.full((3, 2, 10), float("nan"))
    wide[..., 5:] = dy
    normed_launch.role = "sequence"
    want = by_operators(call, [dy, None, None, None], "gru", False, False)

    def strange(t: Any) -> Any:
        return t if t is None else torch.stack([t, t], -1)[..., 0]

    odd = [strange(t) for t in call[0]], [strange(t) for t in call[1]]
    odd[0][0] = call[0][0].transpose(0, 1).contiguous().transpose(0, 1)
    for role in ROLES:
        normed_launch.role = role
        found = by_operators(odd, [wide[..., 5:], None, None, None], "gru", False, False)
        for a, b in zip(flat(want), flat(found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    (tensors, options), numbers = draw("lstm", torch.float32, 1, 1, 5), (ops.NUMBER["lstm"], False, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD.triton, (*tensors, *options, *numbers, False, False), test_utils=tests)
    y, _, _, states, tape, stats = FORWARD.triton(*tensors, *options, *numbers, True, True)
    kept = y, states, tape, stats
    args = (torch.randn_like(y), None, None, None, *kept, *tensors[1:], *options, *numbers)
    torch.library.opcheck(BACKWARD.triton, args, test_utils=tests)


# --- Layers.


def layer_of(name: str, *sizes: int, **more: Any) -> Any:
    """A layer whose gains and shifts are drawn: those of a new one would hide where they act."""
    kind, own = {
        "relu": ("RNN", {"nonlinearity": "relu"}), "coupled": ("LSTM", {"input_forget": True}),
        "joint": ("GRU", {"norm": "joint"}),
    }.get(name, (name, {}))  # fmt: skip
    layer = getattr(fastseq.nn, kind)(*sizes, **{"norm": "layer", **own, **more})
    with torch.no_grad():
        for weight in layer._norm_weights():
            weight += 0.3 * torch.randn_like(weight)
    return layer


layers = pytest.mark.parametrize("name", ["RNN", "relu", "LSTM", "coupled", "GRU", "joint"])


@layers
def test_layers_reach_the_kernels(name: str) -> None:
    """Both directions, and a stack, with lengths, resets and masks of states; gradients of every parameter."""
    layer = layer_of(name, 4, 6, 2 if name == "GRU" else 1, bidirectional=True, recurrent_dropout=0.3)
    x, lengths = torch.randn(3, 3, 4, requires_grad=True), torch.tensor([3, 1, 2])
    reset = torch.tensor([[False] * 3, [True, False, True], [False] * 3])
    found = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(4)
        with fastseq.use_backend(backend), torch.profiler.profile() as profile:
            results = flat(layer(x, lengths=lengths, reset=reset))
            loss = sum((r.sin() * (n + 1)).sum() for n, r in enumerate(results))
            found[backend] = [*results, *torch.autograd.grad(loss, [x, *layer.parameters()])]
        ran = {event.key for event in profile.key_averages()}
        assert ({"fastseq::normed_forward", "fastseq::normed_backward"} <= ran) == (backend == "triton")
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("role", ROLES)
def test_programs_that_hold_the_operator_call_it_on_parameters(role: str) -> None:
    """Which require gradients, where gradients are on."""
    normed_launch.role = role
    layer, x = layer_of("joint", 3, 4), torch.randn(2, 1, 3)
    with fastseq.use_backend("triton"):
        program = torch.export.export(layer, (x, torch.zeros(1, 1, 4)))
        assert "fastseq.normed_forward.triton" in str(program.graph)
        torch.testing.assert_close(program.module()(x, torch.zeros(1, 1, 4))[0], layer(x)[0])


@layers
def test_constant_rows_are_finite_in_value_and_gradient(name: str) -> None:
    """Where all gates of a row are equal their variance is 0: nothing but the shifts is left."""
    layer = layer_of(name, 3, 5)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(0.25)
        layer.weight_ih_l0.fill_(-0.5)
        layer.bias_ih_l0.zero_()  # which the joint form normalises too
        layer.bias_hh_l0.zero_()
    x = torch.randn(2, 1, 3, requires_grad=True)
    for role in ROLES:
        normed_launch.role = role
        with fastseq.use_backend("triton"):
            y, _ = layer(x)
            found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        with fastseq.use_backend("reference"):
            want, _ = layer(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        assert all(d.isfinite().all() for d in found)


def test_second_derivatives_are_the_references() -> None:
    layer, x = layer_of("joint", 2, 3), torch.randn(3, 2, 2, requires_grad=True)
    found = []
    for backend in ("reference", "triton"):
        with fastseq.use_backend(backend):
            (d,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(d.square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@interpreter_only
def test_what_the_kernels_do_not_have_is_refused() -> None:
    x, reset = torch.randn(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool)
    with fastseq.use_backend("triton"):
        assert layer_of("GRU", 3, 4)(x)[0].shape == (2, 1, 4)
        beside = "the Triton kernels have no zoneout and no reset_state beside norm="
        with pytest.raises(fastseq.BackendError, match=beside):
            layer_of("GRU", 3, 4, zoneout=0.1)(x)
        with pytest.raises(fastseq.BackendError, match=beside):
            layer_of("GRU", 3, 4)(x, reset=reset, reset_state=torch.zeros(1, 1, 4))
        mask = torch.ones(1, 1, 4, requires_grad=True)
        with pytest.raises(fastseq.BackendError, match="the Triton kernels compute no gradient of state_mask"):
            layer_of("GRU", 3, 4)._function(x, None, state_mask=mask)
        with pytest.raises(fastseq.BackendError, match="not float64"):
            layer_of("LSTM", 3, 4).double()(x.double())
    with pytest.raises(RuntimeError, match="lstm has no joint normalised form"):
        FORWARD.triton(*draw("lstm", torch.float32, 2, 1, 3)[0], None, None, None, 2, True, False, False, False)
