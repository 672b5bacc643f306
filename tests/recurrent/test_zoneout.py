"""zoneout: units that keep their old value at a step; and reset_state: what a reset puts in the state's place."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from loop_support import (
    LAYERS,
    assert_as_near,
    assert_gradients_of_many_are_those_of_each,
    by_loop,
    drawn,
    function_of,
    gradients,
)  # fmt: skip
from support import DTYPES, ISAS, NATIVE, flat, needs_native
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import functional
from fastseq.backend import BackendError
from fastseq.checks import ArgumentError
from fastseq.recurrent.call import RecurrentCall

BOTH = ["reference", NATIVE]
P = 0.3, 0.4


def zoneout_of(name: str) -> Any:
    """Of both states where the layer has them and the native kernels take it."""
    if name in ("LSTM", "coupled"):
        return P
    return (P[0], 0.0) if name == "projected" else P[0]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, ...]]:
    """What calls draw."""
    made: list[tuple[Tensor | None, ...]] = []
    draw = RecurrentCall.zoneout_shares

    def recorded(self: RecurrentCall, *sizes: int) -> tuple[Tensor | None, ...]:
        made.append(draw(self, *sizes))
        return made[-1]

    monkeypatch.setattr(RecurrentCall, "zoneout_shares", recorded)
    return made


def of_rows(made: list[tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    """Those of h and c ``[rows, T, B, n]``: a backend draws for all rows at once, or for one after the other."""
    found = []
    for own in zip(*made, strict=True):
        parts = [s if s.dim() == 4 else s[None] for s in own if s is not None]
        found.append(torch.cat(parts) if parts else None)
    return found


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.full) for n in range(3, 12))])
def test_values_and_gradients_are_those_of_a_loop(
    name: str, number: int, training: bool, backend: str, shares: list[Any]
) -> None:
    if not training and backend == "native" and name in ("RNN", "relu"):
        backend = "reference"  # AUTO's choice: below
    layer, x, hx, lengths, reset, mask = drawn(name, number)
    layer.zoneout = zoneout_of(name)  # type: ignore[assignment]
    layer.train(training)
    more: dict[str, Any] = {}
    leaves = [x, *flat(hx), *layer.parameters()]
    if reset is not None and number % 3:
        more["reset_state"] = copy.deepcopy(hx)
        leaves += flat(more["reset_state"])
    call = {"lengths": lengths, "reset": reset, "state_mask": mask if number % 2 else None}
    with fastseq.use_backend(backend):
        found = function_of(layer)(x, hx, **call, **more)
        found = [*flat(found), *gradients(found, leaves)]
    kept = of_rows(shares)
    want = by_loop(layer, x, hx, lengths, reset, call["state_mask"], more.get("reset_state"), kept)
    want += gradients(want, leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if not training:
        with torch.no_grad(), fastseq.use_backend("native" if backend != "reference" else backend):
            for a, b in zip(flat(function_of(layer)(x, hx, **call, **more)), want, strict=False):
                torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYERS)
def test_the_native_kernels_are_as_near_the_truth_as_the_reference(
    name: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    # Both backends are given the same shares, whatever they would draw.
    monkeypatch.setattr(RecurrentCall, "zoneout_shares", fixed_shares)
    for (steps, batch, hidden), threads in zip([(12, 6, 40), (3, 1, 17), (2, 19, 7)], (2, 1, 3), strict=True):
        torch.set_num_threads(threads)
        layer = LAYERS[name](9, hidden, bidirectional=True, zoneout=zoneout_of(name), dtype=torch.float64)
        x, reset = torch.randn(steps, batch, 9, dtype=torch.float64), torch.rand(steps, batch) < 0.3
        rows, outputs = 2, getattr(layer, "proj_size", 0) or hidden
        sizes = (outputs, hidden)[: 1 + isinstance(layer, nn.RNNBase) * (layer.mode == "LSTM")]
        starts = [torch.randn(rows, batch, n, dtype=torch.float64) for n in sizes]

        def found(dtype: torch.dtype, backend: str) -> list[Tensor]:
            own = copy.deepcopy(layer).to(dtype)  # noqa: B023 - called at once
            leaves = [t.to(dtype).requires_grad_() for t in (x, *starts)]  # noqa: B023
            state: Any = tuple(leaves[1:]) if len(leaves) > 2 else leaves[1]
            with fastseq.use_backend(backend):
                results = own(leaves[0], state, reset=reset, reset_state=state)  # noqa: B023
                every = (*flat(results), *gradients(results, [*leaves, *own.parameters()]))
                return [t.detach() for t in every]

        ways = found(dtype, "native"), found(dtype, "reference"), found(torch.float64, "reference")
        for each in zip(*ways, strict=True):
            assert_as_near(*each)


def fixed_shares(call: RecurrentCall, steps: int, batch: int, *rows: int) -> tuple[Tensor | None, ...]:
    """Shares of 0 and 1 that hang on the place of a unit alone, the same in each row."""
    found: list[Tensor | None] = []
    for p, size in zip(call.zoneout, (call.weights[1].shape[1], call.hidden), strict=True):
        one = (torch.arange(steps * batch * size) * 7919 % 1000 < 1000 * p).to(call.x.dtype).view(steps, batch, size)
        found.append(one.expand(*rows, *one.shape) if p else None)
    return tuple(found)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_without_zoneout_a_layer_is_the_plain_one(name: str, backend: str) -> None:
    torch.manual_seed(2)
    plain = LAYERS[name](5, 8, num_layers=2)
    layer = LAYERS[name](5, 8, num_layers=2, zoneout=0.0)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, 5)
    with fastseq.use_backend(backend):
        for a, b in zip(flat(layer(x)), flat(plain(x)), strict=True):
            assert torch.equal(a, b)
        layer.zoneout = (0.5, 0.0) if name == "projected" else 0.5
        assert not torch.equal(layer(x)[0], plain(x)[0])
        with torch.no_grad():
            assert not torch.equal(layer.eval()(x)[0], plain(x)[0])
    assert f"zoneout={layer.zoneout}" in repr(layer)
    assert "zoneout" not in repr(plain)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_each_unit_and_step_is_drawn_for_itself(backend: str, grad: bool) -> None:
    """Without weights a unit is 0 after a step, or what it was: it stays at 1 for as many steps as it is kept."""
    layer = fastseq.nn.RNN(3, 50, 2, bias=False, bidirectional=True, zoneout=0.75)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    with fastseq.use_backend(backend), torch.set_grad_enabled(grad):
        y, h_n = layer(torch.zeros(4, 40, 3), torch.ones(4, 40, 50))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    forth, back = y.split(50, -1)
    for step, kept in enumerate(forth):
        assert abs(float(kept.mean()) - 0.75 ** (step + 1)) < 0.04
    assert (forth[1:] <= forth[:-1]).all()
    assert (back[:-1] <= back[1:]).all()
    assert torch.equal(h_n[2], forth[-1])
    rows = h_n.reshape(-1, 50)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows), "each sequence, layer and direction its own"


@pytest.mark.parametrize("backend", BOTH)
def test_evaluation_moves_by_the_expectation(backend: str) -> None:
    """The mean over draws of one step, in which the state is not yet part of a product."""
    torch.manual_seed(3)
    layer, x = fastseq.nn.LSTM(3, 6, zoneout=P), torch.randn(1, 1, 3)
    start = torch.randn(1, 1, 6), torch.randn(1, 1, 6)
    with fastseq.use_backend(backend), torch.no_grad():
        _, drawn = layer(x.expand(-1, 4000, -1), tuple(s.expand(-1, 4000, -1).contiguous() for s in start))
        _, expected = layer.eval()(x, start)
    for s, mean in zip(drawn, expected, strict=True):
        torch.testing.assert_close(s.mean(1, keepdim=True), mean, rtol=0, atol=0.06)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_backward_has_the_draws_of_forward_and_can_be_differentiated(name: str, backend: str) -> None:
    layer = LAYERS[name](2, 3, bidirectional=True, zoneout=zoneout_of(name)).double()
    if name == "relu":
        nn.init.uniform_(layer.weight_hh_l0, 0.5, 1.0)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    put_in = [
        torch.randn(2, 2, n, dtype=torch.float64, requires_grad=True) for n in (getattr(layer, "proj_size", 0) or 3, 3)
    ]
    put_in = put_in[: 1 + (layer.mode == "LSTM")]
    reset = torch.tensor([[False, True], [True, False], [False, False]])

    def run(x: Tensor, *own: Tensor) -> Tensor:
        torch.manual_seed(7)
        state: Any = own[: len(put_in)] if len(put_in) > 1 else own[0]
        return layer(x, reset=reset, reset_state=state)[0]

    with fastseq.use_backend(backend):
        assert torch.autograd.gradcheck(run, (x, *put_in, *layer.parameters()))
        assert torch.autograd.gradgradcheck(run, (x, *put_in, *list(layer.parameters())[:2]))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_a_reset_to_a_state_is_a_sequence_that_begins_with_it(name: str, backend: str) -> None:
    torch.manual_seed(4)
    layer = LAYERS[name](3, 5).double()
    x, reset = torch.randn(7, 2, 3, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.bool)
    reset[4] = True
    outputs = getattr(layer, "proj_size", 0) or 5
    states = [torch.randn(1, 1, n, dtype=torch.float64, requires_grad=True) for n in (outputs, 5)]
    learned: Any = tuple(s.expand(-1, 2, -1) for s in states) if layer.mode == "LSTM" else states[0].expand(-1, 2, -1)
    with fastseq.use_backend(backend):
        y, last = layer(x, reset=reset, reset_state=learned)
        want, end = layer(x[4:], learned)
        torch.testing.assert_close(y[4:], want)
        for a, b in zip(flat(last), flat(end), strict=True):
            torch.testing.assert_close(a, b)
        leaves = states if layer.mode == "LSTM" else states[:1]
        found = torch.autograd.grad(y[4:].square().sum(), [*leaves, *layer.parameters()])
        alone = torch.autograd.grad(want.square().sum(), [*leaves, *layer.parameters()])
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BOTH)
def test_of_a_state_that_is_cleared_nothing_is_left(backend: str) -> None:
    """Neither zoneout nor anything else carries it over a reset, in value or gradient."""
    torch.manual_seed(5)
    layer = fastseq.nn.LSTM(3, 9, zoneout=(0.9, 0.9))
    h = torch.randn(1, 4, 9, requires_grad=True)
    c = torch.randn(1, 4, 9, requires_grad=True)
    reset = torch.tensor([[True] * 4, [False] * 4])
    with fastseq.use_backend(backend):
        found = []
        for factor in (1, 1e6):
            torch.manual_seed(6)
            found.append(layer(torch.ones(2, 4, 3), (factor * h, factor * c), reset=reset))
        assert all(torch.equal(a, b) for a, b in zip(*map(flat, found), strict=True))
        assert not any(d.any() for d in torch.autograd.grad(found[0][0].sum(), (h, c)))


# --- Other forms of a call.


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("longest", [6, 300])  # of one part, and of several
def test_packed_and_unbatched_sequences_and_all_options_together(name: str, longest: int, backend: str) -> None:
    torch.manual_seed(8)
    every = {"zoneout": zoneout_of(name), "recurrent_dropout": 0.2, "weight_dropout": 0.2, "dropout": 0.2}
    layer = LAYERS[name](4, 6, num_layers=2, bidirectional=True, **every)
    packed = pack_sequence([torch.randn(n, 4) for n in (2, longest, 1, longest // 2)], enforce_sorted=False)
    x = torch.randn(5, 4)
    with fastseq.use_backend(backend):
        y, _ = layer(packed)
        assert y.batch_sizes is packed.batch_sizes
        assert not torch.equal(y.data, layer(packed)[0].data)
        y.data.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        layer.eval()
        with torch.no_grad():
            for a, b in zip(flat(layer(x)), flat(layer(x[:, None])), strict=True):
                torch.testing.assert_close(a, b.squeeze(1))
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x)[0].isfinite().all()


@pytest.mark.parametrize("backend", BOTH)
def test_compiles_whole_exports_and_maps(backend: str) -> None:
    torch.manual_seed(9)
    layer = fastseq.nn.LSTM(4, 6, bidirectional=True, zoneout=P)
    x, reset = torch.randn(3, 3, 4, requires_grad=True), torch.rand(3, 3) < 0.3
    state = tuple(torch.randn(2, 3, 6, requires_grad=True) for _ in range(2))

    def call(x: Tensor, *state: Tensor) -> Tensor:
        return layer(x, reset=reset, reset_state=state)[0]

    with fastseq.use_backend(backend):
        found = []
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(8)
            y = function(x, *state)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *state, *layer.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        layer.eval()
        program = torch.export.export(layer, (x.detach(),), {"reset": reset, "reset_state": state})
        torch.testing.assert_close(
            program.module()(x, reset=reset, reset_state=state), layer(x, reset=reset, reset_state=state)
        )
        xs, states = torch.randn(5, 3, 3, 4), tuple(torch.randn(5, 2, 3, 6) for _ in range(2))
        gradient = torch.func.grad(lambda *own: call(*own).sum(), (0, 1, 2))
        for each in (call, gradient):
            mapped = torch.func.vmap(each)(xs, *states)
            want = [each(*own) for own in zip(xs, *states, strict=True)]
            for a, *b in zip(flat(mapped), *map(flat, want), strict=True):
                torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_many_outputs_at_once_are_those_of_each(name: str, backend: str) -> None:
    torch.manual_seed(12)
    layer = LAYERS[name](3, 4, 2, bidirectional=True, zoneout=zoneout_of(name))
    put_in = [torch.randn(4, 2, n, requires_grad=True) for n in (getattr(layer, "proj_size", 0) or 4, 4)]
    put_in = put_in[: 1 + (layer.mode == "LSTM")]
    leaves = [*put_in, *layer.parameters()]
    with fastseq.use_backend(backend):
        state: Any = tuple(put_in) if len(put_in) > 1 else put_in[0]
        y = layer(torch.randn(5, 2, 3), reset=torch.rand(5, 2) < 0.3, reset_state=state)[0]
        assert_gradients_of_many_are_those_of_each(y, leaves)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_has_the_bits_of_the_sequence_alone_under_deterministic_algorithms(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(9)
    torch.use_deterministic_algorithms(True)
    try:
        layer = LAYERS[name](11, 34, num_layers=2, bidirectional=True, dtype=dtype, zoneout=zoneout_of(name)).eval()
        for steps, batch, threads in ((9, 13, 2), (1, 3, 1), (2, 2, 3)):
            torch.set_num_threads(threads)
            x, reset = torch.randn(steps, batch, 11).to(dtype), torch.rand(steps, batch) < 0.3
            sizes = (getattr(layer, "proj_size", 0) or 34, 34)[: 1 + (layer.mode == "LSTM")]
            states = [torch.randn(4, batch, n).to(dtype) for n in sizes]

            def run(rows: slice) -> Any:
                own = [s[:, rows].contiguous() for s in states]  # noqa: B023
                state: Any = tuple(own) if len(own) > 1 else own[0]
                return flat(layer(x[:, rows].contiguous(), reset=reset[:, rows], reset_state=state))  # noqa: B023

            with torch.no_grad():
                whole = run(slice(None))
                for b in range(min(batch, 3)):
                    for a, o in zip(whole, run(slice(b, b + 1)), strict=True):
                        assert torch.equal(a[:, b : b + 1], o)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
def test_smaller_copies_serve_no_call_that_they_do_not_have() -> None:
    torch.manual_seed(12)
    x, reset = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.4
    state = torch.randn(1, 3, 6)
    for options in ({"weights": "int8"}, {"compute": "bfloat16"}):
        plain, kept = fastseq.nn.GRU(4, 6), fastseq.nn.GRU(4, 6, zoneout=0.3).eval()
        report = fastseq.patch(nn.Sequential(kept), **options)
        assert "1 layer not, having no float32 weights, a norm or zoneout" in str(report)
        with torch.no_grad():
            want, moved = plain(x, reset=reset, reset_state=state), kept(x)
            fastseq.patch(nn.Sequential(plain), **options)
            for a, b in zip(plain(x, reset=reset, reset_state=state), want, strict=True):
                assert torch.equal(a, b)
            plain.zoneout = 0.3  # after it was patched
            plain.load_state_dict(kept.state_dict())
            assert torch.equal(plain.eval()(x)[0], moved[0])


def test_an_rnn_with_zoneout_is_exported_for_any_length() -> None:
    layer, x = fastseq.nn.RNN(4, 6, zoneout=0.1).eval(), torch.randn(6, 2, 4)
    steps = torch.export.Dim("steps", min=2, max=100)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: steps}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x.repeat(2, 1, 1))[0], layer(x.repeat(2, 1, 1))[0])


def test_a_stream_steps_with_zoneout() -> None:
    torch.manual_seed(10)
    layer = fastseq.nn.LSTM(4, 6, num_layers=2, zoneout=P).eval()
    streams = fastseq.Streams(layer, 3)
    ids = [streams.open() for _ in range(3)]
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        found = torch.stack([streams.step(step, torch.tensor(ids)) for step in x])
        torch.testing.assert_close(found, layer(x)[0])


# --- What does not fit.


@needs_native
def test_what_the_native_kernels_do_not_have_runs_on_the_reference() -> None:
    x = torch.randn(3, 2, 4)
    for layer, reason in (
        (fastseq.nn.RNN(4, 6, zoneout=0.3).eval(), "no gradient of an RNN with zoneout in evaluation"),
        (fastseq.nn.LSTM(4, 6, zoneout=0.3, proj_size=2), r"no zoneout of c beside a projection"),
    ):
        assert "reference" in fastseq.explain(layer, x).splitlines()[0]
        assert layer(x)[0].isfinite().all()
        with fastseq.use_backend("native"), pytest.raises(BackendError, match=reason):
            layer(x)
        with fastseq.use_backend("torch"), pytest.raises(BackendError, match="torch has no zoneout"):
            layer(x)
    with torch.no_grad(), fastseq.use_backend("native"):
        fastseq.nn.RNN(4, 6, zoneout=0.3).eval()(x)


@pytest.mark.parametrize("bad", [1, -0.1, float("nan"), True, "0.5", None, (0.1, 0.2, 0.3), (0.1, 1.0)])
def test_a_probability_out_of_range_is_refused(bad: Any) -> None:
    for make in (fastseq.nn.RNN, fastseq.nn.GRU, fastseq.nn.LSTM):
        with pytest.raises(ArgumentError, match=r"zoneout.* must be a number in"):
            make(3, 4, zoneout=bad)
    with pytest.raises(TypeError, match="recompute must be True or False"):
        fastseq.nn.GRU(3, 4, recompute=bad and str(bad))  # type: ignore[arg-type]
    layer = fastseq.nn.LSTM(3, 4)
    layer.zoneout = bad
    if not bad:
        return
    with pytest.raises(ArgumentError, match=r"zoneout.* must be a number in"):
        layer(torch.randn(2, 2, 3))


def test_zoneout_of_c_is_an_lstms() -> None:
    for make in (fastseq.nn.RNN, fastseq.nn.GRU):
        with pytest.raises(ArgumentError, match=r"zoneout must be a number in \[0, 1\), got \(0.1, 0.2\)"):
            make(3, 4, zoneout=(0.1, 0.2))


def test_wrong_states_are_named() -> None:
    x, reset = torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)
    gru, lstm = fastseq.nn.GRU(4, 6), fastseq.nn.LSTM(4, 6)
    state = torch.zeros(1, 3, 6)
    for call, message in (
        (lambda: gru(x, reset_state=state), "reset_state is what reset puts in the state's place: give reset too"),
        (lambda: gru(x, reset=reset, reset_state=state[0]), r"reset_state must be .*\[1, 3, 6\] .* got \[3, 6\]"),
        (lambda: gru(x, reset=reset, reset_state=state.to_sparse()), "reset_state must be a dense Tensor"),
        (lambda: gru(x, reset=reset, reset_state=state.double()), "reset_state is torch.float64 but input is"),
        (lambda: lstm(x, reset=reset, reset_state=state), "reset_state of an LSTM must be a pair"),
        (lambda: lstm(x, reset=reset, reset_state=(state, None)), "reset_state must be a pair"),
        (lambda: lstm(x, reset=reset, reset_state=(state, state[..., :2])), "reset_state's c must be"),
        (lambda: gru(pack_sequence([x[:, 0]]), reset_state=state), "go with a Tensor input"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(TypeError, match="reset_state must be a Tensor, got float"):
        functional.gru(x, None, gru._weights(), reset=reset, reset_state=0.5)  # type: ignore[arg-type]


def test_copies_keep_the_options() -> None:
    layer = copy.deepcopy(fastseq.nn.LSTM(3, 4, zoneout=(0.1, 0.0), recompute=True))
    assert (layer.zoneout, layer.recompute) == ((0.1, 0.0), True)
    report = fastseq.unpatch(nn.Sequential(layer))
    assert [left.reason for left in report.left] == ["zoneout=(0.1, 0.0): torch.nn.LSTM has no such option"]
    for zoneout, recompute in itertools.product((0.0, (0.0, 0.0)), (False,)):
        assert repr(fastseq.nn.LSTM(3, 4, zoneout=zoneout, recompute=recompute)) == "LSTM(3, 4)"


@needs_native
@pytest.mark.parametrize(("name", "form"), [("RNN", "layer"), ("GRU", "layer"), ("GRU", "joint"), ("LSTM", "layer")])
def test_a_normalised_layer_has_zoneout_and_states_to_reset_to_on_the_reference(name: str, form: str) -> None:
    torch.manual_seed(11)
    layer = LAYERS[name](3, 6, norm=form, dtype=torch.float64)
    x, reset = torch.randn(7, 2, 3, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.bool)
    reset[4] = True
    states = [torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
    state: Any = tuple(states) if len(states) > 1 else states[0]
    y, last = layer(x, reset=reset, reset_state=state)
    want, end = layer(x[4:], state)
    torch.testing.assert_close(y[4:], want)
    for a, b in zip(flat(last), flat(end), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(y[4:].square().sum(), [*states, *layer.parameters()]),
        torch.autograd.grad(want.square().sum(), [*states, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    layer.zoneout = 0.9
    layer.eval()
    plain = LAYERS[name](3, 6, norm=form, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    (moved, _), (whole, _) = layer(x[:1], state), plain(x[:1], state)
    torch.testing.assert_close(moved[0], 0.9 * states[0][0] + 0.1 * whole[0])
    with fastseq.use_backend("native"), pytest.raises(BackendError, match="no zoneout and no reset_state beside norm="):
        layer(x)
