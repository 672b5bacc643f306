"""Layers side by side on the emulated machine: whole schedules, the numbers of any order they allow, and gradients.

With ``--device cuda --kernels native`` on a GPU, in whatever order its streams take.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import devices
import pytest
import torch
from cuda_recurrent_support import emulation_only, hook, library, machine, missing
from emulation import build
from recurrent_support import assert_within_budget, forward, options, options_of, seed
from support import CELLS
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastseq import ops
from fastseq.ops import layers as ops_layers
from fastseq.recurrent import recompute, reference, stack
from fastseq.recurrent.call import RecurrentCall
from fastseq.recurrent.stack import Kind, Layers

pytestmark = [pytest.mark.device("native"), missing]

# ---- Schedules


class Piece(NamedTuple):
    """One line of a schedule."""

    work: str
    layer: int
    direction: int
    window: int
    lane: int
    after: tuple[int, ...]


def schedule(backward: bool, *sizes: int, products: float = 1.0, wanted: bool = True) -> tuple[dict, list[Piece]]:
    """Of steps, layers, directions, and walks that fit the device at once."""
    head, *lines = hook("schedule")(backward, *sizes, wanted, wanted, products).splitlines()
    pieces = []
    for line in lines:
        work, *numbers = line.split()
        layer, direction, window, lane, *after = map(int, numbers)
        pieces.append(Piece(work, layer, direction, window, lane, tuple(after)))
    return {k: int(v) for k, v in (part.split("=") for part in head.split())}, pieces


def ordered(pieces: list[Piece]) -> list[set[int]]:
    """For each piece, those that end before it begins: earlier ones of its lane, those it waits for, and so on."""
    before: list[set[int]] = []
    last: dict[int, int] = {}
    for n, piece in enumerate(pieces):
        direct = {*piece.after, *([last[piece.lane]] if piece.lane in last else [])}
        before.append(direct.union(*(before[d] for d in direct)))
        last[piece.lane] = n
    return before


def missing(head: dict, pieces: list[Piece], backward: bool, layers: int, directions: int) -> list[str]:
    """What a schedule lacks: pieces, or an order that data or a buffer in use asks for."""
    place = {piece[:4]: n for n, piece in enumerate(pieces)}
    before, lacking = ordered(pieces), []
    windows, slots = head["windows"], head["slots"]

    def need(second: tuple, first: tuple) -> None:
        if first in place and second in place and place[first] not in before[place[second]]:
            lacking.append(f"{second} does not wait for {first}")

    every = list(itertools.product(range(layers), range(directions), range(windows)))
    works = {"walk", "weight_gradient"} if backward else {"walk", "project"}
    lacking += [f"no {(work, *at)}" for work in works for at in every if (work, *at) not in place]
    assert len(place) == len(pieces), "a piece occurs twice"
    readers: dict[tuple, list[tuple]] = {}  # walks that read what lies in a lane's buffer
    lane = {piece[:4]: piece.lane for piece in pieces}
    for layer, direction, window in every:
        walk = ("walk", layer, direction, window)
        if not backward:
            need(walk, ("project", layer, direction, window))
            need(walk, ("walk", layer, direction, window - 1))
            for d in range(directions):
                need(("project", layer, direction, window), ("walk", layer - 1, d, window))
            continue
        need(walk, ("walk", layer, direction, window + 1))
        need(walk, ("input_gradient", layer + 1, 0, window))
        need(("input_gradient", layer, 0, window), walk)
        need(("weight_gradient", layer, direction, window), walk)
        need(("weight_gradient", layer, direction, window), ("weight_gradient", layer, direction, window + 1))
        for earlier in range(windows):  # whose dgates lie where this walk puts its own
            need(walk, ("input_gradient", layer + slots, 0, earlier))
            need(walk, ("weight_gradient", layer + slots, direction, earlier))
    for piece in pieces:
        if piece.work == "input_gradient" and piece.layer:
            buffer, walks = (piece.lane,), [("walk", piece.layer - 1, d, piece.window) for d in range(directions)]
        elif piece.work == "project":
            walks = [("walk", *piece[1:4])]
            buffer = (lane[walks[0]], piece.window % 2)
        else:
            continue
        for walk in readers.get(buffer, []):
            need(piece[:4], walk)
        readers[buffer] = walks
    return lacking


SIZES = [
    (steps, layers, directions, beside)
    for steps, layers, directions, beside in itertools.product((1, 40, 700), (1, 2, 3, 6), (1, 2), (0, 1, 2, 4))
    if beside <= (2 if directions == 2 else 4)
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_schedule_keeps_every_order_and_waits_for_nothing_else(backward: bool) -> None:
    for sizes in SIZES:
        head, pieces = schedule(backward, *sizes)
        assert missing(head, pieces, backward, *sizes[1:3]) == [], sizes
        for n, piece in enumerate(pieces):
            for wait in piece.after:
                assert pieces[wait].lane != piece.lane
                less = [*pieces]
                less[n] = piece._replace(after=tuple(w for w in piece.after if w != wait))
                if ordered(less)[n] != ordered(pieces)[n]:  # not told by another wait as well
                    assert missing(head, less, backward, *sizes[1:3]), f"{sizes}: {piece} need not wait for {wait}"


def test_what_is_independent_may_run_at_once() -> None:
    def unordered(pieces: list[Piece], first: tuple, second: tuple) -> bool:
        place = {piece[:4]: n for n, piece in enumerate(pieces)}
        before = ordered(pieces)
        a, b = place[first], place[second]
        return a not in before[b] and b not in before[a]

    head, pieces = schedule(False, 700, 2, 1, 2, products=0)
    assert (head["windows"], head["walkers"]) == (9, 2)
    assert unordered(pieces, ("walk", 0, 0, 5), ("walk", 1, 0, 4))
    head, pieces = schedule(False, 700, 2, 2, 2)
    assert unordered(pieces, ("walk", 1, 0, 0), ("walk", 1, 1, 0))
    head, pieces = schedule(False, 700, 1, 1, 1, products=0.5)
    assert unordered(pieces, ("project", 0, 0, 4), ("walk", 0, 0, 3))
    head, pieces = schedule(True, 700, 1, 1, 1)
    assert unordered(pieces, ("weight_gradient", 0, 0, 8), ("walk", 0, 0, 0))
    head, pieces = schedule(True, 700, 3, 2, 2)
    assert unordered(pieces, ("weight_gradient", 2, 1, 0), ("walk", 1, 0, 0))
    head, pieces = schedule(True, 700, 2, 1, 2)
    assert unordered(pieces, ("walk", 1, 0, 2), ("walk", 0, 0, 4))


def test_a_device_without_room_and_a_short_sequence_get_one_walk_after_another() -> None:
    for sizes in ((1, 3, 1, 4), (31, 3, 1, 4), (700, 3, 1, 1), (700, 3, 1, 0), (700, 3, 2, 1)):
        head, pieces = schedule(False, *sizes, products=0.01)
        assert (head["windows"], head["walkers"]) == (1, 1), sizes
        assert {piece.lane for piece in pieces} == {0}


# ---- Numbers

SCHEDULES = [(build.IN_ORDER, 0), *itertools.product((build.UNIFORM, build.PRIORITY), range(1, 4))]


def stack_of(cell: str, num_layers: int, bidirectional: bool) -> Kind:
    return Kind(cell, num_layers, bidirectional, want_states=True)


def draw_stack(
    kind: Kind, batch: int, inputs: int, hidden: int, steps: int, dtype: torch.dtype, has_biases: bool = True
) -> tuple:
    """x, h0, c0 and the weights."""
    directions, gates = 1 + kind.bidirectional, ops.GATES[kind.cell]
    rows, lstm = kind.num_layers * directions, ops.HAS_C[kind.cell]
    weights = []
    for row in range(rows):
        width = inputs if row < directions else directions * hidden
        shapes = [(gates * hidden, width), (gates * hidden, hidden), *2 * [(gates * hidden,)]]
        weights += [(torch.rand(s) * 2 - 1) / hidden**0.5 for s in shapes[: 2 + 2 * has_biases]]
    x, h0, c0 = torch.randn(steps, batch, inputs), *torch.randn(2, rows, batch, hidden)
    return x.to(dtype), h0.to(dtype), c0.to(dtype) if lstm else None, [w.to(dtype) for w in weights]


def layer_by_layer(kind: Kind, x: Tensor, h0, c0, weights: list[Tensor], lengths, reset) -> list[Tensor]:
    """y, h_n and an LSTM's c_n by the emulated scan of each layer and direction."""
    directions, width = 1 + kind.bidirectional, len(weights) // kind.rows
    h_n, c_n = [], []
    for layer in range(kind.num_layers):
        outputs = []
        for d in range(directions):
            i = layer * directions + d
            own = [*weights[i * width : (i + 1) * width], None, None][:4]
            states = [None if s is None else s[i] for s in (h0, c0)]
            y, h, c, *_ = forward([x, *own, None, *states], lengths, reset, kind.cell, d == 1, backend="emulated")
            outputs.append(y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(outputs, -1)
    return [x, torch.stack(h_n), *([torch.stack(c_n)] if ops.HAS_C[kind.cell] else [])]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", ["step", "grid", "cluster"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stack_in_any_order_gives_what_its_layers_give_one_by_one(cell: str, bidirectional: bool, role: str) -> None:
    dtype = (torch.float32, torch.bfloat16)[CELLS.index(cell) % 2]
    kind = stack_of(cell, 4, bidirectional)
    x, h0, c0, weights = draw_stack(kind, 5, 6, 9, 7, dtype, cell != "gru")
    lengths, reset, _ = options("lengths+reset" if role != "grid" else "plain", 7, 5)
    if role == "grid":
        h0 = c0 = None
    blocks = 2 * (role != "step")
    with machine(role, blocks, 64):
        expected = layer_by_layer(kind, x, h0, c0, weights, lengths, reset)
    for (order, number), windows in itertools.product(SCHEDULES, (1, 3)):
        with machine(role, blocks, 64, seed=number, schedule=order, windows=windows, walkers=2 * (role != "step")):
            found = stack.FORWARD(x, weights, h0, c0, *options_of(lengths, reset), *kind.numbers(), False, False)
        for ours, wanted in zip(found, expected, strict=False):
            assert torch.allclose(ours, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps), (order, number, windows)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if devices.DEVICE == "cuda":
        return
    library()
    monkeypatch.setattr(stack, "FORWARD", torch.ops.fastseq.layers_forward.emulated)

    def backward(*args: Any) -> Any:
        x, lengths, bidirectional = args[4], args[10], args[21]
        starts = None
        if lengths is not None:  # as on CUDA
            x, starts = stack.with_lengths(x, lengths, bidirectional)
        return torch.ops.fastseq.layers_backward.emulated(*args[:4], x, *args[5:15], starts, *args[16:])

    monkeypatch.setattr(stack, "BACKWARD", backward)


def gradients(function, kind: Kind, dtype: torch.dtype, x, h0, c0, weights, lengths, reset) -> list[Tensor]:
    """A stack's results, and the gradients of all that goes in, of sums that weigh each element by another number."""
    own = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, h0, c0, *weights)]
    results = function(kind, *own[:3], lengths, reset, own[3:])
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    wanted = [t for t in own if t is not None]
    # Rounded as y is: that c stays float32 is the scan's promise, and tested there.
    return [*(r.to(dtype) for r in results), *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def by_reference(kind: Kind, x, h0, c0, lengths, reset, weights) -> tuple[Tensor, ...]:
    return reference.layers(x, h0, c0, None, None, weights, options_of(lengths, reset)[2:], *kind[:3])


def fused(kind: Kind, x, h0, c0, lengths, reset, weights) -> tuple[Tensor, ...]:
    return Layers.apply(x, h0, c0, *options_of(lengths, reset), kind, *weights)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", ["step", "grid", "cluster"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
def test_gradients_of_a_stack_match_the_reference(cell: str, bidirectional: bool, role: str) -> None:
    for n, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        seed(cell, bidirectional, role, n)
        kind = stack_of(cell, 1 + n, bidirectional)
        drawn = draw_stack(kind, 5, 6, 9, 7, dtype, n != 1)
        lengths, reset, _ = options(("plain", "lengths", "lengths+reset")[n], 7, 5)
        if n == 1:
            drawn = (drawn[0], None, None, drawn[3])
        truth, peer = (
            gradients(by_reference, kind, d, *drawn, lengths, reset) for d in (torch.float64, dtype)
        )  # fmt: skip
        for (order, number), windows in itertools.product(SCHEDULES[:: 1 + n], (1, 3)):
            parts = 2 * (role != "step")
            with machine(role, parts, 64, seed=number, schedule=order, windows=windows, walkers=parts):
                ours = gradients(fused, kind, dtype, *drawn, lengths, reset)
            for i, (a, b, c) in enumerate(zip(ours, peer, truth, strict=True)):
                assert_within_budget(a, b, c, f"{i} of {dtype}, {windows} windows, order {order}", 16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", ["step", "cluster"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
def test_a_stack_with_a_mask_zoneout_and_states_to_reset_to_matches_the_reference(
    cell: str, bidirectional: bool, role: str
) -> None:
    """With and without each, layers and directions of their own, over windows of time."""
    for n, dtype in enumerate((torch.float32, torch.bfloat16)):
        seed(cell, bidirectional, role, n, "options")
        kind = stack_of(cell, 2 - n, bidirectional)
        x, h0, c0, weights = draw_stack(kind, 3, 4, 9, 5, dtype, n == 0)
        lengths, reset, _ = options(("lengths+reset", "reset")[n], 5, 3)
        places, lstm = (kind.rows, 5, 3, 9), ops.HAS_C[cell]
        put_in = [torch.randn(kind.rows, 3, 9).to(dtype), torch.randn(kind.rows, 3, 9).to(dtype) if lstm else None]
        mask = (torch.rand(kind.rows, 3, 9) < 0.6).to(dtype) if n == 0 or bidirectional else None
        shares = [(torch.rand(places) < 0.4).to(dtype), torch.full((), 0.25).to(dtype).expand(places) if lstm else None]
        if n == 1 and not bidirectional:
            h0 = c0 = put_in[1] = None

        def run(function, d: torch.dtype) -> list[Tensor]:
            given = (x, h0, c0, *put_in, *weights)  # noqa: B023 - called at once
            own = [None if t is None else t.detach().to(d).requires_grad_() for t in given]
            more = [None if t is None else t.to(d) for t in (mask, *shares)]  # noqa: B023
            results = function(own[:5], (lengths, reset, *more), own[5:])  # noqa: B023
            loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
            leaves = [t for t in own if t is not None]
            return [*(r.to(d) for r in results), *torch.autograd.grad(loss, leaves, materialize_grads=True)]

        def expected(starts, given, weights) -> tuple[Tensor, ...]:
            return reference.layers(*starts, weights, given, *kind[:3])  # noqa: B023

        def found(starts, given, weights) -> tuple[Tensor, ...]:
            return Layers.apply(*starts, *given, kind, *weights)  # noqa: B023

        truth, peer = (run(expected, d) for d in (torch.float64, dtype))
        for (order, number), windows in ((SCHEDULES[0], 3), (SCHEDULES[1], 3), (SCHEDULES[-1], 1)):
            parts = 2 * (role != "step")
            with machine(role, parts, 64, seed=number, schedule=order, windows=windows, walkers=parts):
                ours = run(found, dtype)
            for i, (a, b, c) in enumerate(zip(ours, peer, truth, strict=True)):
                assert_within_budget(a, b, c, f"{i} of {dtype}, {windows} windows, order {order}", 16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_gradients_of_a_stack_that_is_walked_again_match_the_reference(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "FEWEST_ROWS", 4)
    kind = stack_of(cell, 2, False)
    drawn, (lengths, reset, _) = draw_stack(kind, 5, 6, 9, 7, torch.float32), options("lengths+reset", 7, 5)

    def again(kind: Kind, x, h0, c0, lengths, reset, weights) -> tuple[Tensor, ...]:
        return recompute.Recomputed.apply(kind, x, h0, c0, *options_of(lengths, reset), *weights)

    def without_states(*args) -> tuple[Tensor, ...]:
        return by_reference(*args)[: 2 + ops.HAS_C[cell]]

    truth, peer = (gradients(without_states, kind, d, *drawn, lengths, reset) for d in (torch.float64, torch.float32))
    with machine("cluster", 1, 64):
        ours = gradients(again, kind, torch.float32, *drawn, lengths, reset)
    for i, (a, b, c) in enumerate(zip(ours, peer, truth, strict=True)):
        assert_within_budget(a, b, c, str(i), 16)


@pytest.mark.usefixtures("emulated")
def test_sums_over_windows_have_the_same_bits_in_every_order() -> None:
    kind = stack_of("lstm", 3, False)
    drawn = draw_stack(kind, 5, 6, 9, 12, torch.bfloat16)
    found = []
    for order, number in SCHEDULES:
        with machine("cluster", 2, 64, seed=number, schedule=order, windows=4, walkers=2):
            found.append(gradients(fused, kind, torch.bfloat16, *drawn, None, None))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_what_nobody_wants_changes_nothing_else(bidirectional: bool) -> None:
    """Gradients of x, of the states, of the weights, of some weights, each without the others."""
    kind = stack_of("gru", 2, bidirectional)
    x, h0, _, weights = draw_stack(kind, 5, 6, 9, 12, torch.float32)

    def found(wanted: list[bool]) -> list[Tensor | None]:
        own = [t.clone().requires_grad_(w) for t, w in zip((x, h0, *weights), wanted, strict=True)]
        with machine("cluster", 2, 64, windows=3, walkers=2):
            y, h_n = fused(kind, own[0], own[1], None, None, None, own[2:])
            (y.square().sum() + h_n.sum()).backward()
        return [t.grad for t in own]

    whole = found([True] * (2 + len(weights)))
    for first in (0, 1, 2, 5):
        wanted = [n == first or (first == 2 and n > 2) for n in range(2 + len(weights))]
        for ours, expected, w in zip(found(wanted), whole, wanted, strict=True):
            assert torch.equal(ours, expected) if w else ours is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_strides_do_not_matter(bidirectional: bool, windows: int) -> None:
    kind = stack_of("gru", 2, bidirectional)
    x, h0, _, weights = draw_stack(kind, 5, 6, 9, 7, torch.float32)
    dy = torch.randn(7, 5, 9 * (1 + bidirectional))

    def batch_first(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def found(x: Tensor, dy: Tensor, h0: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        own = [t.detach().requires_grad_() for t in (x, h0, *weights)]
        with machine("cluster", 2, 64, windows=windows, walkers=2):
            y, _ = fused(kind, own[0], own[1], None, None, None, own[2:])
            return y, *torch.autograd.grad(y, own, dy)

    plain = found(x, dy, h0, weights)
    strided = [w.t().contiguous().t() for w in weights]
    for others in ((batch_first(x), batch_first(dy)), (x, torch.stack([dy, dy], 3)[..., 0])):
        for a, b in zip(found(*others, batch_first(h0), strided), plain, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=2e-6)  # the input's product is torch's, whose order may differ


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_results_have_the_shapes_that_are_promised(cell: str) -> None:
    def shapes(results: object) -> list[tuple]:
        return [(t.shape, t.dtype, t.stride()) for t in tree_flatten(results)[0]]

    for bidirectional, save, states in itertools.product((False, True), repeat=3):
        kind = stack_of(cell, 2, bidirectional)
        x, h0, c0, weights = draw_stack(kind, 3, 4, 5, 6, torch.bfloat16, save)
        given = (x, weights, h0, None if states else c0, *options_of(), *kind.numbers(), save, states)
        with machine("cluster", 1, 64):
            y, h_n, _, ys, all_c, tapes = found = stack.FORWARD(*given)
            assert shapes(found) == shapes(ops_layers.fake_layers_forward(*given))
            if save:
                dc = c0 if states and ops.HAS_C[cell] else None
                last = [torch.randn_like(c) for c in all_c[-1 - bidirectional :]] if dc is not None else []
                given = (y, h_n, dc, last, *given[:11], None, [*ys, y], all_c, tapes, *kind.numbers(), states, True)
                assert shapes(stack.BACKWARD(*given)) == shapes(ops_layers.fake_layers_backward(*given))


@pytest.mark.skipif(devices.DEVICE != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_a_cuda_graph_holds_a_stack_and_nothing_waits_for_the_host(bidirectional: bool) -> None:
    kind = stack_of("lstm", 3, bidirectional)
    x, h0, c0, weights = draw_stack(kind, 16, 64, 128, 96, torch.bfloat16)
    other = torch.randn_like(x)
    own = [t.requires_grad_() for t in (x, h0, c0, *weights)]

    def step() -> list[Tensor]:
        results = fused(kind, *own[:3], None, None, own[3:])
        return [*results, *torch.autograd.grad(sum(r.float().sum() for r in results), own)]

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with machine(windows=4):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                held = step()
            with torch.no_grad():
                x.copy_(other)
            graph.replay()
            expected = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", ["grid", "cluster"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_walk_in_windows_has_the_bits_of_a_whole_one(cell: str, role: str) -> None:
    kind = stack_of(cell, 1, False)
    x, h0, c0, weights = draw_stack(kind, 5, 6, 9, 7, torch.bfloat16)
    x = torch.zeros_like(x)  # so that its product, which is torch's, is exact
    lengths, reset, _ = options("lengths+reset", 7, 5)
    found = []
    for windows in (1, 2, 7):
        with machine(role, 2, 64, windows=windows):
            out = stack.FORWARD(x, weights, h0, c0, *options_of(lengths, reset), *kind.numbers(), True, True)
            y, h_n, c_n, _, states, tapes = out
            dc = torch.ones_like(c_n) if ops.HAS_C[cell] else None
            given = (torch.ones_like(y), torch.ones_like(h_n), dc, [], x, weights, h0, c0, *options_of(lengths, reset))
            back = stack.BACKWARD(*given, None, [y], states, tapes, *kind.numbers(), False, True)
        found.append([*tree_flatten(out)[0], *back[:3], back[-1][0]])
    for other in found[1:]:
        for ours, whole in zip(other, found[0], strict=True):
            assert torch.equal(ours, whole)


@emulation_only
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_lanes_that_do_not_wait_are_noticed(bidirectional: bool) -> None:
    kind = stack_of("lstm", 3, bidirectional)
    drawn = draw_stack(kind, 5, 6, 9, 12, torch.float32)

    def found(order: int, number: int) -> list[Tensor]:
        with machine("cluster", 2, 64, seed=number, schedule=order, windows=4, walkers=2):
            return gradients(fused, kind, torch.float32, *drawn, None, None)

    expected = found(*SCHEDULES[0])
    library().fastseq_lanes_deaf(1)
    try:
        other = [found(*schedule) for schedule in SCHEDULES[1:]]
    finally:
        library().fastseq_lanes_deaf(0)
    y, dx = 0, -1 - 4 * 3 * (1 + bidirectional) - 2  # forward alone, and what comes last in backward
    for place in (y, dx):
        assert sum(not torch.equal(o[place], expected[place]) for o in other) > len(other) // 2


@pytest.mark.usefixtures("emulated")
def test_second_derivatives_are_the_references() -> None:
    kind = stack_of("gru", 2, False)
    x, h0, _, weights = draw_stack(kind, 2, 3, 4, 3, torch.float32)

    def norm(function) -> list[Tensor]:
        own = [t.clone().requires_grad_() for t in (x, h0, *weights)]
        y, h_n = function(kind, own[0], own[1], None, None, None, own[2:])
        first = torch.autograd.grad(y.square().sum() + h_n.sum(), own, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), own))

    with machine("cluster", 1, 64):
        for a, b in zip(norm(fused), norm(by_reference), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_what_the_layers_of_the_package_call(grad: bool) -> None:
    """Results and states of a stack, whole and where dropout (here of nothing) parts it."""
    kind = stack_of("lstm", 2, True)
    x, h0, c0, weights = draw_stack(kind, 3, 4, 5, 6, torch.float32)
    expected = by_reference(kind, x, h0, c0, None, None, weights)
    whole = [*expected[:3], torch.cat(expected[3:], -1)]
    for w in weights:
        w.requires_grad_(grad)
    for dropout in (0.0, 1e-12):
        tensors = ("lstm", x, h0, c0, weights)
        options = {"num_layers": 2, "dropout": dropout, "training": True, "bidirectional": True}
        with machine("cluster", 1, 64):
            found = stack.run(RecurrentCall(*tensors, want_states=True, **options))
            assert stack.run(RecurrentCall(*tensors, **options))[3] is None
        for ours, wanted in zip(found, whole, strict=True):
            assert ours.requires_grad == grad
            assert torch.allclose(ours, wanted, rtol=0, atol=1e-6)
