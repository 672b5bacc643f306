"""fastseq.Streams: many live sessions of one model equal each session run alone, whatever happens to the others."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NATIVE, needs_native
from torch import Tensor, nn

import fastseq
from fastseq import ArgumentError, Streams, direct
from fastseq.recurrent import sessions

I, H = 5, 7


class Voice(nn.Module):
    """A whole module of torch's layers: two recurrent ones, one inside another module, and what stands around them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(I, H), nn.Tanh())
        self.rnn = nn.GRU(H, H, batch_first=True)
        self.inner = nn.ModuleDict({"lstm": nn.LSTM(H, H, num_layers=2)})
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [n, T, I]"""
        y, _ = self.rnn(self.encode(x))
        y, (h_n, _) = self.inner["lstm"](y.transpose(0, 1))
        return {"y": self.head(y.transpose(0, 1)), "last": h_n[-1]}


class Loop(nn.Module):
    """A cell, and a layer, called step by step with the state that they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = fastseq.nn.LSTMCell(I, H), fastseq.nn.GRU(H, H)

    def forward(self, x: Tensor) -> Tensor:
        hx = state = None
        ys = []
        for x_t in x.unbind(1):
            hx = self.cell(x_t, hx)
            y, state = self.layer(hx[0][None], state)
            ys.append(y[0])
        return torch.stack(ys, 1)


def compressed() -> nn.Module:
    layer = fastseq.nn.LSTM(I, H, num_layers=2)
    fastseq.patch(layer, weights="bfloat16")
    return layer


def patched(model: nn.Module) -> nn.Module:
    fastseq.patch(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: fastseq.nn.RNN(I, H, nonlinearity="relu"),
    "gru": lambda: fastseq.nn.GRU(I, H, num_layers=2, batch_first=True),
    "gru_reset_before": lambda: fastseq.nn.GRU(I, H, reset_after=False, bias=False),
    "lstm": lambda: fastseq.nn.LSTM(I, H, num_layers=3, batch_first=True),
    "lstm_projected": lambda: fastseq.nn.LSTM(I, H, num_layers=2, proj_size=3),
    "lstm_coupled": lambda: fastseq.nn.LSTM(I, H, input_forget=True),
    "lstm_patched": lambda: patched(nn.LSTM(I, H)),
    "lstm_compressed": compressed,
    "rnn_cell": lambda: fastseq.nn.RNNCell(I, H),
    "gru_cell": lambda: patched(nn.GRUCell(I, H)),
    "lstm_cell": lambda: fastseq.nn.LSTMCell(I, H),
    "module": lambda: patched(Voice()),
    "loop": Loop,
}
BACKENDS = [NATIVE, "torch", "reference"]


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().to(dtype).eval()


def values(y: Any) -> list[Tensor]:
    return list(y.values()) if isinstance(y, dict) else [y]


class Alone:
    """One session of a model by itself: every step runs the whole of its inputs again, from zeros."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.xs = model, []

    def step(self, x: Tensor) -> list[Tensor]:
        """The results of the newest inputs x [T, I]."""
        self.xs.append(x)
        whole = torch.cat(self.xs)
        with torch.no_grad():
            if isinstance(self.model, nn.RNNCellBase):
                hx, ys = None, []
                for x_t in whole:
                    hx = self.model(x_t[None], hx)
                    ys.append((hx[0] if isinstance(hx, tuple) else hx)[0])
                return [torch.stack(ys)[-len(x) :]]
            if isinstance(self.model, nn.RNNBase):
                return [self.model(whole)[0][-len(x) :]]
            y = self.model(whole[None])
            if isinstance(y, dict):
                return [y["y"][0, -len(x) :], y["last"][0]]
            return [y[0, -len(x) :]]


def close_to(got: Tensor, want: Tensor) -> None:
    loose = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5)}
    rtol, atol = loose.get(want.dtype, (2e-2, 2e-2))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, None) for name in MODELS] + [("lstm_projected", "reference"), ("gru_cell", "torch"), ("module", "torch")],
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_equals_each_session_run_alone(name: str, backend: str | None, data: st.DataObject) -> None:
    dtype = torch.float32 if name == "lstm_compressed" else torch.float64
    model, capacity = build(name, dtype), data.draw(st.integers(1, 6))
    streams, alone, closed = Streams(model, capacity), {}, []
    drawn = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with fastseq.use_backend(backend):
        for _ in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(["open", "step", "step", "step", "reset", "close"]))
            if action == "open" and len(alone) < capacity:
                alone[streams.open()] = Alone(model)
            elif action != "open" and alone:
                ids = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, unique=True))
                if action == "close":
                    streams.close(ids[0])
                    closed.append(ids[0])
                    del alone[ids[0]]
                elif action == "reset":
                    streams.reset(torch.tensor(ids))
                    alone |= {own: Alone(model) for own in ids}
                else:
                    steps = data.draw(st.integers(1, 3))
                    x = torch.randn(len(ids), steps, I, generator=drawn, dtype=dtype)
                    single = steps == 1 and name not in ("module", "loop")
                    found = values(streams.step(x[:, 0] if single else x, torch.tensor(ids)))
                    for b, own in enumerate(ids):
                        for got, want in zip(found, alone[own].step(x[b]), strict=True):
                            close_to(got[b], want[0] if single else want)
            assert len(streams) == len(alone)
            for own in closed:
                with pytest.raises(ArgumentError, match=f"id {own} is not open here"):
                    streams.reset([own])


@needs_native
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 4, 150])
def test_a_step_has_the_bits_of_the_same_batch_with_its_states_handed_on(cell: str, dtype: torch.dtype, n: int) -> None:
    """Few rows read the weights unpacked, many packed ones; several steps are scanned."""
    torch.manual_seed(0)
    layer = getattr(fastseq.nn, cell)(40, 33, num_layers=2, dtype=dtype).eval()
    streams, state = Streams(layer, 200), None
    ids = torch.tensor([streams.open() for _ in range(200)])[torch.randperm(200)[:n]]
    with torch.no_grad():
        for steps in (1, 1, 6, 1):
            x = torch.randn(n, steps, 40, dtype=dtype)
            want, state = layer(x.transpose(0, 1), state)
            assert torch.equal(streams.step(x, ids), want.transpose(0, 1))


@needs_native
def test_a_step_is_one_native_call_a_layer_without_gather_and_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = direct.infer

    def counted(*call: Any) -> Any:
        done = infer(*call)
        taken.append(done is not None and call[15] is not None)  # the block, where the states lie
        return done

    monkeypatch.setattr(direct, "infer", counted)
    monkeypatch.setattr(sessions.Step, "_by_copies", lambda *call: pytest.fail("the rows were gathered"))
    for name in MODELS:
        taken: list[bool] = []
        model = build(name)
        streams = Streams(model, 9)
        ids = [streams.open() for _ in range(9)][::2]
        streams.step(torch.randn(5, 1, I) if name in ("module", "loop") else torch.randn(5, I), ids)
        assert taken == [True] * len(streams._blocks), name


def test_autocast_and_inference_mode_give_what_they_give_alone() -> None:
    model = build("lstm")
    streams = Streams(model, 3)
    a, b = streams.open(), streams.open()
    x, state = torch.randn(4, 2, 1, I), None
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        for x_t in x:
            want, state = model(x_t, state)
            assert torch.equal(streams.step(x_t, [b, a]), want)
    y = streams.step(x[0], [a, b])  # and outside of them the states go on
    assert y.isfinite().all()
    assert not y.requires_grad
    assert not y.is_inference()


def test_the_layers_of_a_step_take_lengths_and_resets_and_return_all_states() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.lstm = fastseq.nn.GRU(I, H, batch_first=True), fastseq.nn.LSTM(H, H, batch_first=True)

        def forward(self, x: Tensor, hx: Any = (None, None)) -> Any:
            y, h = self.gru(x, hx[0], lengths=torch.tensor([1, 2]), reset=torch.tensor([[0, 0], [0, 1]]).bool())
            y, pair, c_all = self.lstm(y, hx[1], return_all_states=True)
            return y, c_all, (h, pair)

    model = Options().double().eval()
    streams, hx = Streams(model, 5), (None, None)
    ids = [streams.open() for _ in range(5)][3:1:-1]
    for _ in range(3):
        x = torch.randn(2, 2, I, dtype=torch.float64)
        *want, hx = model(x, hx)
        for got, own in zip(streams.step(x, ids), want, strict=False):
            close_to(got, own)


def test_a_step_of_no_session_returns_an_empty_result() -> None:
    streams = Streams(build("lstm"), 3)
    assert streams.step(torch.randn(0, I), []).shape == (0, H)
    assert streams.step(torch.randn(0, 2, I), torch.zeros(0, dtype=torch.int64)).shape == (0, 2, H)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "written in place": lambda model: model.weight_ih_l0.detach().mul_(2),
    "another parameter": lambda model: setattr(model, "weight_ih_l0", nn.Parameter(model.weight_ih_l0 * 2)),
    "loaded": lambda model: model.load_state_dict({name: w * 2 for name, w in model.state_dict().items()}),
    "of another type and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gru", "lstm_compressed"])
def test_changed_weights_are_seen(name: str, change: str) -> None:
    model = build(name)
    streams = Streams(model, 1)
    ids, x = [streams.open()], torch.randn(1, 1, I)
    before = streams.step(x, ids)
    CHANGES[change](model)
    streams.reset(ids)
    with torch.no_grad():
        want = model(x if name == "gru" else x.transpose(0, 1))[0].view(1, 1, H)
    assert torch.equal(streams.step(x, ids), want)
    assert not torch.equal(before, want)


def test_a_model_of_another_type_is_refused_until_it_is_converted_back() -> None:
    model = build("gru")
    streams = Streams(model, 1)
    ids, x = [streams.open()], torch.randn(1, I)
    want = streams.step(x, ids)
    streams.reset(ids)
    model.double()
    with pytest.raises(ArgumentError, match=r"float32|float64"):
        streams.step(x.double(), ids)
    model.float()
    assert torch.equal(streams.step(x, ids), want)


# --- nothing leaks, nothing is lost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lstm", "gru_cell", "module"])
def test_no_state_reaches_another_session_or_the_next_one(name: str, backend: str) -> None:
    """One session's states are NaN: its neighbours', and its successors' in the same place, are not."""
    streams = Streams(build(name), 3)
    x = torch.randn(3, 1, I)
    with fastseq.use_backend(backend):
        a, b, c = (streams.open() for _ in range(3))
        want = values(streams.step(x, [a, b, c]))
        streams.step(x[:1] * float("nan"), [b])
        assert all(y.isnan().any() for y in values(streams.step(x[:1], [b])))
        assert all(y.isfinite().all() for y in values(streams.step(x[:2], [a, c])))
        streams.close(b)
        streams.close(a)
        d, e = streams.open(), streams.open()
        assert len({a, b, c, d, e}) == 5
        streams.reset([c])
        for got, own in zip(values(streams.step(x, [d, e, c])), want, strict=True):
            torch.testing.assert_close(got, own)


def snapshot(streams: Streams) -> bytes:
    file = io.BytesIO()
    torch.save(streams.state_dict(), file)
    return file.getvalue()


def opened(name: str = "lstm", capacity: int = 4) -> tuple[Streams, list[int]]:
    """A Streams with three sessions that have a state."""
    streams = Streams(build(name), capacity)
    ids = [streams.open() for _ in range(3)]
    streams.step(torch.randn(3, 1, I), ids)
    return streams, ids


def test_wrong_ids_are_refused_and_leave_every_session_as_it_was() -> None:
    (streams, ids), (_, others) = opened(), opened()
    gone = streams.open()
    streams.close(gone)
    again = streams.open()
    assert again & 0xFFFFFF == gone & 0xFFFFFF  # in the same place
    before = snapshot(streams)
    for wrong in (gone, others[0], -1, 0, 5, 2**62, ids[0] + 1, 2**24 - 1):
        for call in (lambda own: streams.step(torch.randn(2, I), own), streams.reset):
            with pytest.raises(ArgumentError, match=f"id {wrong} is not open here"):
                call([ids[0], wrong])
        with pytest.raises(ArgumentError, match="is not open here"):
            streams.close(wrong)
    for call in (lambda own: streams.step(torch.randn(3, I), own), streams.reset):
        with pytest.raises(ArgumentError, match=f"id {ids[1]} comes twice"):
            call(torch.tensor([ids[1], ids[0], ids[1]]))
        for bad in (torch.zeros(3, dtype=torch.int32), torch.tensor([ids]), [0.5], "abc", None, [2**70], [ids, ids]):
            with pytest.raises(ArgumentError, match=r"ids must be int64 \[n\]"):
                call(bad)
    assert snapshot(streams) == before


def test_wrong_inputs_and_a_full_server_are_refused_and_leave_every_session_as_it_was() -> None:
    streams, ids = opened()
    before = snapshot(streams)
    for x, message in (
        (torch.randn(2, I), r"x must be \[3, I\] or \[3, T, I\] for 3 ids, got \[2, 5\]"),
        (torch.randn(3), r"x must be \[3, I\]"),
        (torch.randn(3, I + 1), "input has 6 features"),
        (torch.randn(3, 0, I), "no time steps"),
        (torch.randn(3, I).double(), "float64"),
        (torch.zeros(3, I, dtype=torch.int64), "int64"),
    ):
        with pytest.raises(ArgumentError, match=message):
            streams.step(x, ids)
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        streams.step([1.0], ids)
    assert snapshot(streams) == before
    streams.open()
    with pytest.raises(ArgumentError, match="all 4 sessions are open"):
        streams.open()
    assert len(streams) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_raises_half_way_leaves_every_session_as_it_was(backend: str) -> None:
    streams, ids = opened("module")
    before = snapshot(streams)
    hook = streams.model.head.register_forward_hook(lambda *_: 1 / 0)
    with fastseq.use_backend(backend):
        with pytest.raises(ZeroDivisionError):
            streams.step(torch.randn(2, 3, I), ids[:2])
        hook.remove()
        assert snapshot(streams) == before
        x = torch.randn(3, 1, I)
        again, _ = opened("module")
        again.load_state_dict(torch.load(io.BytesIO(before)))
        for got, want in zip(values(streams.step(x, ids)), values(again.step(x, ids)), strict=True):
            assert torch.equal(got, want)


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_a_snapshot_goes_on_elsewhere_under_the_same_ids_and_does_not_follow_what_comes_after() -> None:
    streams, ids = opened("module", 4)
    streams.close(ids[1])
    kept, x = snapshot(streams), torch.randn(2, 3, I)
    want = values(streams.step(x, [ids[2], ids[0]]))
    late = streams.open()
    other = Streams(build("module"), 100)
    lost = other.open()
    for target in (other, streams):
        target.load_state_dict(torch.load(io.BytesIO(kept), weights_only=True))
        assert len(target) == 2
        for own in (ids[1], lost, late):
            with pytest.raises(ArgumentError, match="is not open here"):
                target.reset([own])
        for got, own in zip(values(target.step(x, [ids[2], ids[0]])), want, strict=True):
            assert torch.equal(got, own)
        new = [target.open() for _ in range(2)]
        assert not {*new} & {*ids, late, lost}
        assert all(y.isfinite().all() for y in values(target.step(torch.randn(2, 1, I), new)))


def test_a_snapshot_that_does_not_fit_changes_nothing() -> None:
    streams, ids = opened()
    state, before = streams.state_dict(), snapshot(streams)
    for change, message in (
        (
            {"h": state["h"][:, :2]},
            r"the snapshot's h must be torch.float32 \[3, 3, 7\], got torch.float32 \[3, 2, 7\]",
        ),
        ({"c": state["c"].double()}, "the snapshot's c must be torch.float32"),
        ({"ids": state["ids"].int()}, "ids must be an int64"),
        ({"ids": state["ids"][[0, 0, 1]]}, "none of a Streams"),
        ({"ids": -state["ids"]}, "none of a Streams"),
        ({"x": state["c"]}, r"the snapshot has \['c', 'h', 'ids', 'x'\], but this model's has \['c', 'h', 'ids'\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            streams.load_state_dict({**state, **change})
    with pytest.raises(ArgumentError, match="place 2, beyond capacity=2: make a Streams of capacity=3 or more"):
        Streams(build("lstm"), 2).load_state_dict(state)
    assert snapshot(streams) == before
    streams.step(torch.randn(3, I), ids)


# --- models -----------------------------------------------------------------------------------------------------------


def calling(forward: Callable[[Any, Any, Tensor], Any], layer: nn.Module | None = None) -> nn.Module:
    """A module with one recurrent layer, whose forward is ``forward(self, layer, x)``."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer or fastseq.nn.GRU(I, H, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return forward(self, self.rnn, x)

    return Model().eval()


def packed(x: Tensor) -> Any:
    return nn.utils.rnn.pack_sequence(list(x))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda _, rnn, x: (rnn(x), rnn(x)), "'rnn' was called twice in one step"),
        (lambda _, rnn, x: rnn(x, torch.zeros(1, 2, H)), "'rnn' was called with a state of the model's own"),
        (lambda _, rnn, x: rnn(x, rnn(x)[1] * 1), "'rnn' was called with a state of the model's own"),
        (lambda _, rnn, x: x, "the model did not call 'rnn' in this step"),
        (lambda _, rnn, x: rnn(x.repeat(2, 1, 1)), r"'rnn' was called with \[4, 1, 5\].*must be \[n, T, I\]"),
        (lambda _, rnn, x: rnn(x[:, 0]), r"'rnn' was called with \[2, 5\]"),
        (lambda _, rnn, x: rnn(packed(x)), "'rnn' was called with a PackedSequence"),
        (lambda _, rnn, x: (rnn(x), fastseq.nn.GRU(I, H, batch_first=True)(x)), "this GRU was not in the model"),
        (lambda _, rnn, x: torch.compile(rnn, backend="eager")(x), "did not call 'rnn' in this step, or where"),
    ],
)  # fmt: skip
def test_a_model_whose_states_would_go_wrong_is_refused(forward: Any, message: str) -> None:
    streams = Streams(calling(forward), 2)
    ids = [streams.open(), streams.open()]
    before = snapshot(streams)
    with pytest.raises(ArgumentError, match=message):
        streams.step(torch.randn(2, 1, I), ids)
    assert snapshot(streams) == before
    assert sessions.current.get() is None


def test_models_that_keep_no_state_of_a_stream_are_refused() -> None:
    for model, message in (
        (fastseq.nn.LSTM(I, H, bidirectional=True), "the model is bidirectional"),
        (nn.ModuleDict({"a": fastseq.nn.GRU(I, H, bidirectional=True)}), "'a' is bidirectional"),
        (nn.Sequential(nn.LSTM(I, H)), r"'0' is torch's LSTM: call fastseq.patch\(model\)"),
        (nn.GRUCell(I, H), "the model is torch's GRUCell"),
        (nn.Linear(I, H), "Linear has no recurrent layer"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Streams(model, 3)
    with pytest.raises(TypeError, match="Module, got type"):
        Streams(fastseq.nn.LSTM, 3)  # type: ignore[arg-type]
    for capacity in (0, -1, 2.5, 2**24 + 1, None):
        with pytest.raises(ArgumentError, match="capacity must be an int from 1 to"):
            Streams(build("lstm"), capacity)  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_refused() -> None:
    streams, ids = opened("module")
    streams.model.inner["lstm"].train()
    with pytest.raises(ArgumentError, match=r"its 'inner.lstm' is in training mode: call model.eval\(\)"):
        streams.step(torch.randn(3, 1, I), ids)
    streams.model.eval()
    streams.step(torch.randn(3, 1, I), ids)


# --- threads and processes --------------------------------------------------------------------------------------------


def run(*functions: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a caller is stuck"
    if failures:
        raise failures[0]


def test_threads_share_a_server_and_its_model() -> None:
    model = build("lstm", torch.float64)
    streams = Streams(model, 12)
    x = torch.randn(30, I, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)[0]

    def client() -> None:
        for _ in range(3):
            ids = [streams.open(), streams.open()]
            for t in range(30):
                y = streams.step(torch.stack([x[t], x[0]]), ids)
                close_to(y[0], want[t])
            for own in ids:
                streams.close(own)

    def user() -> None:
        with torch.no_grad():
            for _ in range(60):
                close_to(model(x)[0], want)

    run(*[client] * 5, user)
    assert len(streams) == 0


def test_another_thread_uses_the_model_while_a_step_runs_in_it() -> None:
    inside, done, found = threading.Event(), threading.Event(), []

    def forward(self: nn.Module, rnn: nn.Module, x: Tensor) -> Any:
        if x.shape[0] == 2:
            inside.set()
            assert done.wait(60)
        return rnn(x)[0]

    model = calling(forward)
    streams, x = Streams(model, 2), torch.randn(3, 2, I)
    ids = [streams.open(), streams.open()]

    def other() -> None:
        assert inside.wait(60)
        found.append(model(x))  # an ordinary call: three sequences, from zeros
        done.set()

    run(lambda: found.append(streams.step(x[:2], ids)), other)
    for y in found:
        torch.testing.assert_close(y, model.rnn(x[: len(y)])[0])


def test_a_call_from_within_a_step_is_refused() -> None:
    model = calling(lambda self, rnn, x: (rnn(x), self.streams[0].open()))
    streams = Streams(model, 2)
    model.streams = [streams]
    with pytest.raises(RuntimeError, match="called within a step of the same Streams"):
        streams.step(torch.randn(1, 1, I), [streams.open()])
    assert len(streams) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_is_told_to_make_its_own_and_the_parent_goes_on() -> None:
    """The fork comes while another thread is in a step: in the child nobody would ever give the lock back."""
    streams, ids = opened("module")
    kept, x = streams.state_dict(), torch.randn(3, 1, I)
    inside = threading.Event()
    hook = streams.model.head.register_forward_hook(lambda *_: (inside.set(), time.sleep(0.5))[0])
    thread = threading.Thread(target=streams.step, args=(x, ids))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        hook.remove()
        status = 1
        try:
            calls = [streams.open, streams.state_dict, lambda: streams.step(x, ids), lambda: streams.close(ids[0])]
            for call in calls:
                with pytest.raises(RuntimeError, match=r"belongs to process .* load the parent's state_dict"):
                    call()
            own = Streams(streams.model, 4)
            own.load_state_dict(kept)
            own.step(x, ids)
            own.open()
            status = 0
        finally:
            os._exit(status)
    thread.join(60)
    hook.remove()
    assert os.waitpid(child, 0)[1] == 0
    streams.step(x, ids)
