"""Layer normalisation within recurrent layers: norm="layer" (Ba et al. 2016), and a GRU's norm="joint" (Dreamer)."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import loop_support
import pytest
import torch
import torch.nn.functional as F
from loop_support import assert_gradients_of_many_are_those_of_each, gradients
from recurrent_support import assert_within_budget
from support import DTYPES, ISAS, NATIVE, flat, needs_native
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq import flops, functional, ops
from fastseq.backend import BackendError
from fastseq.checks import ArgumentError

BOTH = ["reference", NATIVE]


def maker(make: Any, norm: str = "layer", **own: Any) -> Callable[..., Any]:
    """Makes a layer, whose gains and shifts are drawn: those of a new one would hide where they act."""

    def made(*sizes: int, **more: Any) -> Any:
        layer = make(*sizes, norm=norm, **own, **more)
        with torch.no_grad():
            for weight in layer._norm_weights():
                weight += 0.3 * torch.randn(weight.shape, dtype=torch.float64).to(weight.dtype)
        return layer

    return made


LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": maker(fastseq.nn.RNN),
    "relu": maker(fastseq.nn.RNN, nonlinearity="relu"),
    "LSTM": maker(fastseq.nn.LSTM),
    "coupled": maker(fastseq.nn.LSTM, input_forget=True),
    "GRU": maker(fastseq.nn.GRU),
    "joint": maker(fastseq.nn.GRU, "joint"),
}
names = pytest.mark.parametrize("name", LAYERS)
backends = pytest.mark.parametrize("backend", BOTH)


# --- The truth: a loop over cells that normalise with torch's function.


def one_step(
    layer: Any, x: Tensor, h: Tensor, c: Tensor | None, m: Tensor, w: list[Tensor], norms: list[Tensor]
) -> Any:
    """One step of one layer and direction, as its equations are written."""

    def normed(a: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.layer_norm(a, a.shape[-1:], gain, shift, 1e-5)

    w_ih, w_hh, *biases = w
    b_ih, b_hh = biases if biases else (w_ih.new_zeros(len(w_ih)),) * 2
    if layer.norm == "joint":
        r, z, n = normed(x @ w_ih.T + b_ih + (m * h) @ w_hh.T + b_hh, *norms).chunk(3, -1)
        return [z.sigmoid() * h + (1 - z.sigmoid()) * (r.sigmoid() * n).tanh()]
    a, u = normed(x @ w_ih.T, norms[0]) + b_ih, normed((m * h) @ w_hh.T, norms[1]) + b_hh
    if isinstance(layer, fastseq.nn.RNN):
        return [(a + u).relu() if layer.nonlinearity == "relu" else (a + u).tanh()]
    if isinstance(layer, fastseq.nn.GRU):
        (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, -1), u.chunk(3, -1)
        r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
        return [z * h + (1 - z) * (a_n + r * u_n).tanh()]
    gates = (a + u).chunk(3 if layer.input_forget else 4, -1)
    i, g, o = gates[0].sigmoid(), gates[-2].tanh(), gates[-1].sigmoid()
    assert c is not None
    c = (1 - i if layer.input_forget else gates[1].sigmoid()) * c + i * g
    return [o * normed(c, *norms[2:]).tanh(), c]


def by_loop(
    layer: Any, x: Tensor, hx: Any = None, lengths: Any = None, reset: Any = None, mask: Any = None
) -> list[Tensor]:
    """y, the last states, and an LSTM's c_t of the last layer, on x [T,B,I], a step at a time."""
    if hx is None:
        zeros = x.new_zeros(layer.num_layers * (1 + layer.bidirectional), x.shape[1], layer.hidden_size)
        hx = (zeros, zeros) if isinstance(layer, fastseq.nn.LSTM) else zeros
    norms, lstm = layer._norm_weights(), isinstance(layer, fastseq.nn.LSTM)
    return loop_support.by_loop(layer, x, hx, lengths, reset, mask, step=one_step, norms=norms, with_c=lstm)


def call(layer: Any, x: Tensor, hx: Any = None, **more: Any) -> list[Tensor]:
    """y, the last states and an LSTM's c_t."""
    if isinstance(layer, fastseq.nn.LSTM):
        more["return_all_states"] = True
    return flat(layer._function(x, hx, batch_first=layer.batch_first, **more))


def drawn(name: str, number: int) -> tuple[Any, Tensor, Any, dict[str, Any]]:
    """A layer of float64, and a call: x, hx, lengths, reset, state_mask."""
    pick = random.Random(f"{name} {number}")
    torch.manual_seed(number)
    inputs, hidden = pick.choice([1, 3, 17]), pick.choice([1, 3, 8, 17, 40])
    steps, batch = pick.choice([1, 2, 5, 9]), pick.choice([1, 1, 3, 7, 18])
    stack = {"num_layers": pick.choice([1, 1, 2, 3]), "bidirectional": pick.random() < 0.5, "bias": pick.random() < 0.7}
    layer = LAYERS[name](inputs, hidden, **stack, dtype=torch.float64)
    state = layer.num_layers * (1 + layer.bidirectional), batch, hidden
    x = torch.randn(steps, batch, inputs, dtype=torch.float64, requires_grad=True)
    hx: Any = None
    if pick.random() < 0.7:
        hx = torch.randn(state, dtype=torch.float64).tanh().requires_grad_()
        if isinstance(layer, fastseq.nn.LSTM):
            hx = (hx, torch.randn(state, dtype=torch.float64, requires_grad=True))
    given = {
        "lengths": torch.randint(0, steps + 1, (batch,)),
        "reset": torch.rand(steps, batch) < 0.3,
        "state_mask": F.dropout(torch.ones(state, dtype=torch.float64), 0.4, True),
    }
    torch.set_num_threads(pick.choice([1, 2, 3]))
    return layer, x, hx, {key: value for key, value in given.items() if pick.random() < 0.5}


@backends
@names
@pytest.mark.parametrize("number", [*range(8), *(pytest.param(n, marks=pytest.mark.full) for n in range(8, 60))])
def test_values_and_gradients_are_those_of_a_loop_over_cells(name: str, number: int, backend: str) -> None:
    layer, x, hx, given = drawn(name, number)
    leaves = [x, *flat(hx), *layer.parameters()]
    with fastseq.use_backend(backend):
        found = call(layer, x, hx, **given)
        found += gradients(found, leaves)
        with torch.no_grad():
            same = call(layer, x, hx, **given)
    want = by_loop(layer, x, hx, given.get("lengths"), given.get("reset"), given.get("state_mask"))
    want += gradients(want, leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    for a, b in zip(same, want, strict=False):
        torch.testing.assert_close(a, b.detach(), rtol=1e-8, atol=1e-9)


# T, B, H, threads: few rows with many units, which threads share; many rows; sizes that no vector divides. Of fewer
# units a row may be all but constant: its normalisation then multiplies what 16 bits rounded by hundreds.
SHAPES = [(4, 3, 7, 2), (3, 1, 200, 2), (4, 2, 131, 3), (2, 33, 64, 1)]


@needs_native
@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=pytest.mark.full) if isa in ("avx2", "avx512") else isa for isa in ISAS],
    indirect=True,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@names
def test_the_native_kernels_are_as_near_the_truth_as_the_reference(name: str, dtype: torch.dtype, isa: str) -> None:
    floor = 64 if dtype.itemsize > 2 else 8  # roundings of the largest value
    for steps, batch, hidden, threads in SHAPES:
        torch.manual_seed(hidden)
        torch.set_num_threads(threads)
        layer = LAYERS[name](9, hidden, bidirectional=True, dtype=torch.float64).to(dtype)
        x = torch.randn(steps, batch, 9, dtype=torch.float64).to(dtype)
        given: dict[str, Any] = {
            "lengths": torch.randint(0, steps + 1, (batch,)),
            "reset": torch.rand(steps, batch) < 0.2,
        }
        given["lengths"][0] = steps

        def found(
            dtype: torch.dtype, backend: str, layer: Any = layer, x: Tensor = x, given: Any = given
        ) -> list[Tensor]:
            own, leaf = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
            with fastseq.use_backend(backend):
                results = call(own, leaf, **given)
                if name == "relu" and dtype.itemsize == 2:
                    return results  # rounding moves units across the kink, where gradients jump
                return [*results, *gradients(results, [leaf, *own.parameters()])]

        ways = found(dtype, "native"), found(dtype, "reference"), found(torch.float64, "reference")
        for a, peer, truth in zip(ways[0], ways[1], ways[2][: len(ways[0])], strict=True):
            assert_within_budget(a, peer, truth, str((steps, batch, hidden, threads)), floor)


@backends
@names
def test_derivatives_of_both_orders(name: str, backend: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name](2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    reset, lengths = torch.tensor([[False, False]] * 2 + [[True, False]]), torch.tensor([3, 2])

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, reset=reset, lengths=lengths)[0]

    with fastseq.use_backend(backend):
        assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
        if name != "relu":  # whose kink finite differences of a gradient may meet
            assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True, atol=1e-4)


# --- Other forms of a call.


@backends
@names
def test_layouts_packed_sequences_and_one_sequence(name: str, backend: str) -> None:
    torch.manual_seed(2)
    layer = LAYERS[name](4, 6, 2, bidirectional=True, dtype=torch.float64)
    for longest in (6, 300):  # of one part, and of several
        xs = [torch.randn(n, 4, dtype=torch.float64) for n in (longest, longest // 2, 3, 1)]
        padded = nn.utils.rnn.pad_sequence(xs)
        lengths = torch.tensor([len(x) for x in xs])
        with fastseq.use_backend(backend):
            want, last = layer(padded, lengths=lengths)
            y, packed_last = layer(pack_sequence(xs[::-1], enforce_sorted=False))
            alone, _ = layer(xs[1])
        torch.testing.assert_close(pad_packed_sequence(y)[0].flip(1), want)
        for a, b in zip(flat(packed_last), flat(last), strict=True):
            torch.testing.assert_close(a.flip(1), b)
        torch.testing.assert_close(alone, want[: len(xs[1]), 1])
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with fastseq.use_backend(backend):
        want = layer(x)[0]
        layer.batch_first = True
        torch.testing.assert_close(layer(x.transpose(0, 1))[0], want.transpose(0, 1))


@backends
def test_an_lstm_returns_the_c_that_is_not_normalised(backend: str) -> None:
    layer = LAYERS["LSTM"](3, 5, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with fastseq.use_backend(backend):
        y, (h_n, c_n), c = layer(x, return_all_states=True)
        again, _ = layer(x[3:], (y[2:3], c[2:3]))
    torch.testing.assert_close(c[-1:], c_n)
    torch.testing.assert_close(again, y[3:])
    torch.testing.assert_close(y[-1:], h_n)


@names
def test_dropouts_of_all_kinds_draw_as_on_the_reference(name: str) -> None:
    torch.manual_seed(3)
    everything: dict[str, Any] = {"dropout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3}
    layer = LAYERS[name](4, 6, 2, bidirectional=True, **everything, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(4)
        with fastseq.use_backend(backend):
            return flat(layer(x))

    for backend in ("reference", *("native",) * (ops.NATIVE_MISSING is None)):
        for a, b in zip(run(backend), run("reference"), strict=True):
            torch.testing.assert_close(a, b)
    assert not torch.equal(run("reference")[0], layer.eval()(x)[0])


@backends
@names
def test_padding_has_no_influence_and_no_gradient(name: str, backend: str) -> None:
    torch.manual_seed(5)
    layer = LAYERS[name](4, 6, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(5, 3, 4, dtype=torch.float64), torch.tensor([5, 0, 3])
    bad = torch.where((torch.arange(5)[:, None] < lengths)[:, :, None], x, float("nan")).requires_grad_()
    with fastseq.use_backend(backend):
        y, _ = layer(bad, lengths=lengths)
        found = torch.autograd.grad(y.square().sum(), [bad, *layer.parameters()])
    torch.testing.assert_close(y, layer(x, lengths=lengths)[0])
    assert all(d.isfinite().all() for d in found)
    assert not found[0][3:, 2].any()
    assert not y[3:, 2].any()


@backends
@names
def test_autocast_computes_as_the_layer_in_its_dtype(name: str, backend: str) -> None:
    layer, x = LAYERS[name](4, 6, 2), torch.randn(5, 3, 4)
    plain = fastseq.nn.GRU(4, 6) if name == "joint" else type(layer)(4, 6)
    with fastseq.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x)
            packed, _ = layer(pack_sequence([x[:, 0], x[:3, 1]]))
            dtype = plain(x)[0].dtype
        (y.float().sum() + packed.data.float().sum()).backward()
        assert y.dtype == dtype
        assert torch.equal(y, copy.deepcopy(layer).to(dtype)(x.to(dtype))[0])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@needs_native
@names
def test_tensors_of_any_strides(name: str) -> None:
    torch.manual_seed(6)
    layer = LAYERS[name](4, 6, dtype=torch.float64)
    x, hx = (
        torch.randn(3, 5, 4, dtype=torch.float64).transpose(0, 1),
        torch.randn(6, 3, 1, dtype=torch.float64).permute(2, 1, 0),
    )
    hx = (hx, hx) if isinstance(layer, fastseq.nn.LSTM) else hx
    with torch.no_grad():
        want = by_loop(layer, x, hx)
        for weight in (layer.weight_hh_l0, layer.weight_ih_l0):
            weight.set_(weight.t().contiguous().t())
        for weight in layer._norm_weights():
            weight.set_(torch.stack([weight, weight], 1)[:, 0])
        for a, b in zip(call(layer, x, hx), want, strict=True):
            torch.testing.assert_close(a, b)
    y = call(layer, x, hx)[0]
    layer_of = copy.deepcopy(layer)
    found = torch.autograd.grad(y.sin().sum(), list(layer.parameters()))
    with fastseq.use_backend("reference"):
        want_d = torch.autograd.grad(call(layer_of, x, hx)[0].sin().sum(), list(layer_of.parameters()))
    for a, b in zip(found, want_d, strict=True):
        torch.testing.assert_close(a, b)


# --- Promises (docs/mathematics.md).


@backends
@names
def test_constant_rows_are_finite_in_value_and_gradient(name: str, backend: str) -> None:
    """Where all gates of a row are equal their variance is 0: nothing but the shifts is left."""
    layer = LAYERS[name](3, 5, dtype=torch.float32)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(0.25)
        layer.weight_ih_l0.fill_(-0.5)
        layer.bias_ih_l0.zero_()  # which the joint form normalises too
        layer.bias_hh_l0.zero_()
    x = torch.randn(4, 2, 3, requires_grad=True)
    with fastseq.use_backend(backend):
        y, _ = layer(x)
        found = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert y.isfinite().all()
    assert all(d.isfinite().all() for d in found)
    one = LAYERS["RNN"](3, 1)  # of one unit: LN(a) is 0
    with fastseq.use_backend(backend):
        y, _ = one(torch.randn(4, 2, 3))
    torch.testing.assert_close(y, torch.tanh(one.bias_ih_l0 + one.bias_hh_l0).expand_as(y), rtol=0, atol=1e-5)


@backends
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "joint"])
def test_the_scale_of_a_matrix_has_no_influence(name: str, backend: str) -> None:
    """As long as eps is small beside the variance."""
    layer = LAYERS[name](4, 20, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    with torch.no_grad(), fastseq.use_backend(backend):
        layer.weight_hh_l0 *= 1e3
        layer.weight_ih_l0 *= 1e3
        want = call(layer, x, reset=None)
        layer.weight_hh_l0 *= 7.0
        found = call(layer, x)
        layer.weight_ih_l0 *= 0.3
        both = call(layer, x)
    # The first step has no state: its product is 0, and so is what LN makes of it.
    for a, b, c in zip(want, found, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


@backends
@names
def test_a_number_that_all_gates_have_more_has_no_influence(name: str, backend: str) -> None:
    """A row added to every row of W_hh (or of W_ih) gives all gates of a step the same number more."""
    layer = LAYERS[name](4, 20, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    with torch.no_grad(), fastseq.use_backend(backend):
        want = call(layer, x)
        layer.weight_hh_l0 += torch.randn(20, dtype=torch.float64)
        layer.weight_ih_l0 += torch.randn(4, dtype=torch.float64)
        for a, b in zip(call(layer, x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def drawn_arguments(cell: str, joint: bool, dtype: torch.dtype, *sizes: int) -> tuple[list[Any], Tensor]:
    """What the operators take from gates_x to state_mask, of T, B and H, and lengths beside a reset and a mask."""
    steps, batch, hidden = sizes
    gates, lstm = ops.GATES[cell] * hidden, ops.HAS_C[cell]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    of_c = [normal(hidden), normal(hidden)] if lstm else [None, None]
    state = [normal(batch, hidden), normal(batch, hidden) if lstm else None]
    lengths, reset = torch.randint(1, steps + 1, (batch,)), torch.rand(steps, batch) < 0.2
    mask = F.dropout(torch.ones(batch, hidden), 0.5, True).to(dtype)
    own = [normal(steps, batch, gates), normal(gates, hidden), normal(gates), normal(gates), *of_c]
    return [*own, *state, lengths, reset, mask], normal(steps, batch, hidden)


FORMS = [
    ("rnn_tanh", False),
    ("rnn_relu", False),
    ("lstm", False),
    ("lstm_coupled", False),
    ("gru", False),
    ("gru", True),
]


def walked(arguments: list[Any], dy: Any, cell: str, joint: bool) -> list[Tensor]:
    """Of every sequence, [B, ..]: all results forward, and of the gradients those that are of a sequence."""
    numbers = ops.NUMBER[cell], joint, False
    made = torch.ops.fastseq.normed_forward.native(*arguments, *numbers, True, True)
    y, h_n, c_n, states, tape, stats = made
    kept = y, states if ops.HAS_C[cell] else None, tape, stats
    found = torch.ops.fastseq.normed_backward.native(dy, None, None, None, *kept, *arguments[1:], *numbers)
    of_steps, of_state = [y, states, tape, stats, *found[:2]], [h_n, c_n, *found[6:]]
    return [t.transpose(0, 1) for t in of_steps if t.numel()] + [t for t in of_state if t.numel()]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("cell", "joint"), FORMS)
def test_a_sequence_has_the_bits_of_the_sequence_alone_under_deterministic_algorithms(
    cell: str, joint: bool, dtype: torch.dtype
) -> None:
    """In the recurrence, on any number of threads. The products with x are torch's."""
    torch.use_deterministic_algorithms(True)
    try:
        for steps, batch, hidden, threads in ((9, 13, 34, 2), (1, 3, 34, 1), (3, 2, 130, 3), (2, 1, 200, 2)):
            arguments, dy = drawn_arguments(cell, joint, dtype, steps, batch, hidden)
            gates_x, *parameters, h0, c0, lengths, reset, mask = arguments
            torch.set_num_threads(threads)
            together = walked(arguments, dy, cell, joint)
            torch.set_num_threads(1)
            for b in range(min(batch, 3)):
                own = [None if t is None else t[b : b + 1] for t in (h0, c0, lengths)]
                alone = [gates_x[:, b : b + 1], *parameters, *own, reset[:, b : b + 1], mask[b : b + 1]]
                for a, o in zip(together, walked(alone, dy[:, b : b + 1], cell, joint), strict=True):
                    assert torch.equal(a[b : b + 1], o)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Modules.


def test_parameters_come_after_torchs_and_start_at_1_and_0() -> None:
    layer = fastseq.nn.LSTM(3, 4, 2, bidirectional=True, norm="layer")
    plain = fastseq.nn.LSTM(3, 4, 2, bidirectional=True)
    own = ["norm_ih", "norm_hh", "norm_c", "norm_c_bias"]
    ends = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert list(layer.state_dict()) == [*plain.state_dict(), *(f"{n}{end}" for end in ends for n in own)]
    assert (layer.norm_ih_l0 == 1).all()
    assert layer.norm_hh_l1_reverse.shape == (16,)
    assert layer.norm_c_l1.shape == layer.norm_c_bias_l1.shape == (4,)
    assert not layer.norm_c_bias_l0.any()
    assert list(fastseq.nn.GRU(3, 4, norm="joint").state_dict())[4:] == ["norm_l0", "norm_bias_l0"]
    assert list(fastseq.nn.GRU(3, 4, norm="layer").state_dict())[4:] == ["norm_ih_l0", "norm_hh_l0"]
    assert fastseq.nn.RNN(3, 4, norm="layer").norm_hh_l0.shape == (4,)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(3.0)
    layer.reset_parameters()
    assert (layer.norm_c_l1_reverse == 1).all()
    assert not layer.norm_c_bias_l1_reverse.any()
    assert float(layer.weight_ih_l0.detach().abs().max()) <= 0.5
    assert repr(layer) == "LSTM(3, 4, num_layers=2, bidirectional=True, norm='layer')"
    assert fastseq.nn.GRU(3, 4, norm="joint", dtype=torch.float16, device="meta").norm_l0.dtype is torch.float16
    for seed in (1, 2):  # the plain layer's weights, of the same seed
        torch.manual_seed(seed)
        layer = fastseq.nn.GRU(3, 4, norm="layer")
        torch.manual_seed(seed)
        assert torch.equal(layer.weight_hh_l0, fastseq.nn.GRU(3, 4).weight_hh_l0)


@backends
@names
def test_a_layer_is_copied_pickled_cast_loaded_and_called_with_other_parameters(name: str, backend: str) -> None:
    layer, x = LAYERS[name](3, 4, 2), torch.randn(5, 2, 3)
    with fastseq.use_backend(backend):
        want = layer(x)[0]
        fresh = LAYERS[name](3, 4, 2)
        fresh.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
            assert torch.equal(other(x)[0], want)
            assert other.norm == layer.norm
        doubled = copy.deepcopy(layer).double()
        torch.testing.assert_close(doubled(x.double())[0].float(), want)
        assert copy.deepcopy(layer).half()(x.half())[0].dtype is torch.float16
        others = {key: 1.5 * value for key, value in layer.state_dict().items()}
        found = torch.func.functional_call(layer, others, (x,))[0]
        fresh.load_state_dict(others)
        torch.testing.assert_close(found, fresh(x)[0])
        gain = "norm_l0" if name == "joint" else "norm_hh_l0"

        class Halved(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return w / 2

        nn.utils.parametrize.register_parametrization(layer, gain, Halved())
        nn.utils.parametrize.register_parametrization(layer, "weight_hh_l1", Halved())
        halved = {
            key: value / 2 if key in (gain, "weight_hh_l1") else value for key, value in doubled.state_dict().items()
        }
        fresh.load_state_dict(halved)
        torch.testing.assert_close(layer(x)[0], fresh(x)[0])


def test_unpatch_leaves_a_layer_whose_norm_torch_does_not_have() -> None:
    report = fastseq.unpatch(nn.Sequential(fastseq.nn.GRU(3, 4, norm="joint"), fastseq.nn.GRU(4, 4)))
    assert [left.reason for left in report.left] == ["norm='joint': torch.nn.GRU has no such option"]


@needs_native
def test_patch_makes_no_smaller_copies_of_a_layer_with_a_norm() -> None:
    model = nn.Sequential(fastseq.nn.GRU(3, 4, norm="layer"))
    want = model(torch.ones(2, 1, 3))[0]
    report = fastseq.patch(model, weights="int8")
    assert "1 layer not, having no float32 weights, a norm or zoneout" in str(report)
    assert torch.equal(model(torch.ones(2, 1, 3))[0], want)


# --- Compilers, transforms and others.


@needs_native
@pytest.mark.parametrize(("cell", "joint"), FORMS)
def test_the_operators_pass_opcheck(cell: str, joint: bool) -> None:
    arguments, dy = drawn_arguments(cell, joint, torch.float32, 4, 3, 5)
    op, back = torch.ops.fastseq.normed_forward.native, torch.ops.fastseq.normed_backward.native
    tests, numbers = ("test_schema", "test_faketensor"), (ops.NUMBER[cell], joint, True)
    few = [*arguments[:3], None, *arguments[4:6], *5 * [None]]
    torch.library.opcheck(op, (*few, *numbers, False, False), test_utils=tests)
    torch.library.opcheck(op, (*arguments, *numbers, True, True), test_utils=tests)
    y, _, _, states, tape, stats = op(*arguments, *numbers, True, True)
    kept = (y, states if ops.HAS_C[cell] else None, tape, stats)
    torch.library.opcheck(back, (dy, None, None, None, *kept, *arguments[1:], *numbers), test_utils=tests)


@backends
@names
def test_compiles_whole_and_trains(name: str, backend: str) -> None:
    torch._dynamo.reset()  # the layers share a forward, which is compiled for each of them
    torch.manual_seed(7)
    layer = LAYERS[name](4, 6, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    with fastseq.use_backend(backend):
        found = []
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            y = flat(run(x, lengths=torch.tensor([3, 1, 2])))[0]
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], layer(x)[0])


@backends
@names
def test_exports(name: str, backend: str) -> None:
    layer, x = LAYERS[name](4, 6, 2).eval(), torch.randn(5, 3, 4)
    with fastseq.use_backend(backend):
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x)[0], layer(x)[0])
    assert ("normed_forward" in str(program.graph)) == (backend == "native")


@needs_native
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator() -> None:
    layer, x = LAYERS["LSTM"](4, 6).eval(), torch.randn(5, 3, 4)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(traced(x)[0], layer(x)[0])
    assert "normed_forward" in str(traced.inlined_graph)


@backends
@names
def test_transforms(name: str, backend: str) -> None:
    torch.manual_seed(8)
    layer = LAYERS[name](3, 4, bidirectional=True, dtype=torch.float64)
    own, xs = dict(layer.named_parameters()), torch.randn(2, 5, 3, 3, dtype=torch.float64)

    def run(own: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, own, (x,))[0].sin().sum()

    with fastseq.use_backend(backend):
        found = torch.func.vmap(torch.func.grad(run), (None, 0))(own, xs)
        for key, d in found.items():
            want = [torch.autograd.grad(run(own, x), own[key])[0] for x in xs]
            torch.testing.assert_close(d, torch.stack(want))
        tangent = torch.func.jvp(lambda x: run(own, x), (xs[0],), (torch.ones_like(xs[0]),))[1]
        leaf = xs[0].clone().requires_grad_()
        torch.testing.assert_close(tangent, torch.autograd.grad(run(own, leaf), leaf)[0].sum())
        y = layer(leaf)[0]
        assert_gradients_of_many_are_those_of_each(y, list(layer.parameters()))


@names
def test_streams_are_steps_of_the_layer(name: str) -> None:
    layer, x = LAYERS[name](3, 5, 2, dtype=torch.float64).eval(), torch.randn(6, 2, 3, dtype=torch.float64)
    want = layer(x)[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[None])[0][0]

    streams = fastseq.Streams(Model().eval(), capacity=3)
    ids = [streams.open(), streams.open()]
    torch.testing.assert_close(torch.stack([streams.step(step, ids) for step in x]), want)


@needs_native
@names
def test_products_are_counted_as_torchs(name: str) -> None:
    flops._register(torch.utils.flop_counter)
    layer, x = LAYERS[name](5, 7, 2, bidirectional=True), torch.randn(6, 3, 5, requires_grad=True)
    once = 2 * 6 * 3 * sum(w.numel() for w in layer.parameters() if w.dim() == 2)
    with FlopCounterMode(display=False) as forward:
        y, _ = layer(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert forward.get_total_flops() == once
    # The first step's state is zeros, and torch's product of dW_hh leaves it out or not: the rest is the same.
    assert abs(backward.get_total_flops() - 2 * once) <= 2 * 3 * sum(
        w.numel() for n, w in layer.named_parameters() if "weight_hh" in n
    )


# --- What does not fit.


def test_forms_that_there_are_not_are_refused() -> None:
    for make in (fastseq.nn.RNN, fastseq.nn.LSTM):
        with pytest.raises(ValueError, match=r"norm must be None or 'layer' \(a GRU's may be 'joint'\), got 'joint'"):
            make(3, 4, norm="joint")
    with pytest.raises(ValueError, match="norm must be None, 'layer' or 'joint', got 'batch'"):
        fastseq.nn.GRU(3, 4, norm="batch")
    with pytest.raises(ValueError, match="norm must be None, 'layer' or 'joint', got True"):
        fastseq.nn.GRU(3, 4, norm=True)
    for norm in ("layer", "joint"):
        with pytest.raises(ValueError, match=r"no form with reset_after=False.* leave reset_after=True"):
            fastseq.nn.GRU(3, 4, norm=norm, reset_after=False)
    with pytest.raises(ValueError, match="no form with a projection"):
        fastseq.nn.LSTM(3, 4, norm="layer", proj_size=2)
    with pytest.raises(TypeError):
        fastseq.nn.GRU(3, 4, 1, True, False, 0.0, False, None, None, "layer")


def test_wrong_norm_weights_are_named() -> None:
    x, weights, gain = torch.randn(5, 3, 4), [torch.randn(18, 4), torch.randn(18, 6)], torch.ones(18)

    def run(norm: Any, norms: Any, **more: Any) -> None:
        functional.gru(x, None, weights, has_biases=False, norm=norm, norm_weights=norms, **more)

    run("layer", [gain, gain])
    with pytest.raises(ArgumentError, match=r"needs 2 norm_weights \(norm_ih, norm_hh each\), but there are 1"):
        run("layer", [gain])
    with pytest.raises(ArgumentError, match=r"norm_weights\[1\] \(norm_bias\) must be \[18\], got \[6\]"):
        run("joint", [gain, gain[:6]])
    with pytest.raises(ArgumentError, match=r"norm_weights\[0\] \(norm\) is torch.float64 but input is torch.float32"):
        run("joint", [gain.double(), gain])
    with pytest.raises(TypeError, match=r"norm_weights\[1\] must be a Tensor, got int"):
        run("joint", [gain, 1])
    with pytest.raises(ArgumentError, match="there are 2 norm_weights but norm is None"):
        run(None, [gain, gain])
    with pytest.raises(ArgumentError, match="norm must be None, 'layer' or 'joint'"):
        run("batch", [])
    with pytest.raises(ArgumentError, match="no form with reset_after=False"):
        run("layer", [gain, gain], reset_after=False)
    projected = [torch.randn(16, 4), torch.randn(16, 2), torch.randn(2, 4)]
    with pytest.raises(ArgumentError, match="no form with a projection"):
        functional.lstm(x, None, projected, has_biases=False, projected=True, norm="layer", norm_weights=[])


def test_backends_without_norms_say_so() -> None:
    layer, x = fastseq.nn.GRU(4, 6, norm="joint"), torch.randn(5, 3, 4)
    said = fastseq.explain(layer, x)
    assert "torch: torch has no layer normalisation within its recurrent layers (norm=)" in said
    assert "triton: the Triton kernels have no layer normalisation (norm=)" in said
    for name, reason in (("torch", "torch has no layer normal"), ("triton", "the Triton kernels have no layer normal")):
        with fastseq.use_backend(name), pytest.raises(BackendError, match=reason):
            layer(x)
