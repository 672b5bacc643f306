"""What a call may have besides, in the scan's CUDA kernels against the reference on the emulated machine: a mask of the
state, zoneout, states to reset to, in any combination with lengths, resets and directions, in each role.

With ``--device cuda --kernels native`` on a GPU.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from cuda_recurrent_support import CUDA, emulation_only, hook, library, machine, missing, plan
from devices import operator
from emulation import build
from recurrent_support import assert_within_budget, draw, seed
from support import CELLS
from torch import Tensor

from fastseq import ops
from fastseq.recurrent import autograd, reference

pytestmark = [pytest.mark.device("native"), missing]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks, threads, rows: one block and one warp; clusters and grids of more; two tiles of rows.
SHAPES = {
    "step": [(0, 0, 0)],
    "grid": [(1, 32, 8), (2, 96, 8)],
    "cluster": [(1, 64, 8), (2, 96, 8), (4, 32, 8)],
}
OPTIONS = ["state_mask", "zoneout_h", "zoneout_c", "reset_h", "reset_c"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan's function takes the kernels under test."""
    if devices.DEVICE == "cpu":
        library()
    monkeypatch.setitem(autograd.FORWARD, "native", operator("scan_forward", "emulated"))
    monkeypatch.setitem(autograd.BACKWARD, "native", operator("scan_backward", "emulated"))


def drawn_options(pick: random.Random, cell: str, steps: int, batch: int, hidden: int) -> dict[str, Any]:
    """Some of a call's options, as float64, by the names of :class:`fastseq.recurrent.autograd.Inputs`."""
    names = [n for n in OPTIONS if n[-2:] != "_c" or ops.HAS_C[cell]]
    given = set(pick.sample(names, pick.randint(1, len(names))))
    found: dict[str, Any] = {}
    if "state_mask" in given:
        found["state_mask"] = (torch.rand(batch, hidden) < 0.6).double() / 0.6
    for name in ("zoneout_h", "zoneout_c"):
        if name not in given:
            continue
        if pick.random() < 0.4 and not cell.startswith("rnn"):  # as in evaluation: one number for all
            found[name] = torch.full((), 0.25, dtype=torch.float64).expand(steps, batch, hidden)
        else:
            found[name] = (torch.rand(steps, batch, hidden) < 0.4).double()
    for name in ("reset_h", "reset_c"):
        if name in given:
            found[name] = torch.randn(batch, hidden, dtype=torch.float64)
    if "reset_h" in given or "reset_c" in given or pick.random() < 0.5:
        found["reset"] = torch.rand(steps, batch) < 0.4
    if pick.random() < 0.5:
        found["lengths"] = torch.randint(0, steps + 1, (batch,))
    return found


def gradients(way: Any, inputs: dict[str, Any], dtype: torch.dtype, cell: str, reverse: bool) -> list[Tensor]:
    """Results, and the gradients of all that has one, of sums that weigh each element by another number."""
    own = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    leaves = [own[n].requires_grad_() for n in autograd.Inputs._fields[: autograd.DIFFERENTIABLE] if n in own]
    out = way(autograd.Inputs(**own), cell, reverse)
    results = [t for t in out[: 4 if ops.HAS_C[cell] else 2] if t is not None]
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    # Rounded as y is: that c stays float32 is the scan's promise, and tested elsewhere.
    return [*(r.detach().to(dtype) for r in results), *found]


def by_reference(given: autograd.Inputs, cell: str, reverse: bool) -> Any:
    return reference.scan(*given, cell=cell, reverse=reverse)


def by_kernels(given: autograd.Inputs, cell: str, reverse: bool) -> Any:
    return autograd.Scan.apply(*given, cell, reverse, "native")


def check(cell: str, role: str, dtype: torch.dtype, number: int) -> None:
    pick = random.Random(f"{cell} {role} {dtype} {number}")
    seed(cell, role, dtype, number)
    steps, batch, hidden = pick.randint(1, 5), pick.choice((1, 3, 9)), pick.choice((5, 17, 20))
    names = autograd.Inputs._fields[:8]
    inputs = dict(zip(names, draw(cell, steps, batch, 3, hidden, biases=number % 3 > 0), strict=True))
    inputs |= drawn_options(pick, cell, steps, batch, hidden)
    absent = {"h0", "c0"} if pick.random() < 0.3 else set()
    inputs = {n: t for n, t in inputs.items() if t is not None and n not in absent}
    # Numbers that the dtype has, so that all compute from the same ones.
    inputs = {n: t.to(dtype).double() if t.is_floating_point() else t for n, t in inputs.items()}
    reverse, blocks = pick.random() < 0.5, pick.choice(SHAPES[role])
    truth, peer = (gradients(by_reference, inputs, d, cell, reverse) for d in (torch.float64, dtype))
    schedule = pick.choice((build.IN_ORDER, build.UNIFORM, build.STICKY, build.PRIORITY))
    with machine(role, *blocks, seed=number, schedule=schedule):
        ours = gradients(by_kernels, inputs, dtype, cell, reverse)
    for i, (a, b, c) in enumerate(zip(ours, peer, truth, strict=True)):
        assert_within_budget(a, b, c, f"{i} of {cell}, {role}, {dtype}, draw {number}: {[*inputs]}", 16)


# A ReLU's gradient jumps where rounding moves a unit across its kink: in float32 alone no draw does.
DRAWS = [(c, r, d) for c in CELLS for r in SHAPES for d in DTYPES if c != "rnn_relu" or d is torch.float32]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_options_match_the_reference_in_value_and_gradient(cell: str, role: str) -> None:
    for n, dtype in enumerate(d for c, r, d in DRAWS if (c, r) == (cell, role)):
        for number in (n, 3 + n):
            check(cell, role, dtype, number)


@pytest.mark.full
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("cell", "role", "dtype"), DRAWS)
def test_many_options_match_the_reference_in_value_and_gradient(cell: str, role: str, dtype: torch.dtype) -> None:
    for number in range(10, 30):
        check(cell, role, dtype, number)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", SHAPES)
def test_every_schedule_gives_the_same_bits(role: str) -> None:
    torch.manual_seed(3)
    steps, batch, hidden = 4, 9, 17
    drawn = zip(autograd.Inputs._fields[:8], draw("lstm", steps, batch, 3, hidden), strict=True)
    inputs = {n: t for n, t in drawn if t is not None}
    inputs |= {
        "reset": torch.rand(steps, batch) < 0.5,
        "reset_h": torch.randn(batch, hidden),
        "reset_c": torch.randn(batch, hidden),
        "state_mask": torch.rand(batch, hidden),
        "zoneout_h": torch.rand(steps, batch, hidden),
        "zoneout_c": torch.rand(steps, batch, hidden),
    }
    found = []
    for number, schedule in ((0, build.IN_ORDER), (1, build.STICKY), (2, build.PRIORITY)):
        with machine(role, *SHAPES[role][-1], seed=number, schedule=schedule):
            found.append(gradients(by_kernels, inputs, torch.bfloat16, "lstm", True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.usefixtures("emulated")
def test_options_that_change_nothing_change_no_bit() -> None:
    """A mask of ones, zoneout of zeros, zeros to reset to: the same as none of them."""
    steps, batch, hidden = 4, 5, 17
    for cell in CELLS:
        seed(cell)
        drawn = zip(autograd.Inputs._fields[:8], draw(cell, steps, batch, 3, hidden), strict=True)
        inputs = {n: t for n, t in drawn if t is not None}
        inputs |= {"reset": torch.rand(steps, batch) < 0.4, "lengths": torch.tensor([4, 0, 2, 3, 4])}
        zeros, lstm = torch.zeros(batch, hidden), ops.HAS_C[cell]
        more = {
            "state_mask": torch.ones(batch, hidden),
            "zoneout_h": torch.zeros(()).expand(steps, batch, hidden),
        }
        put_in = {"reset_h": zeros}
        if lstm:
            more["zoneout_c"], put_in["reset_c"] = torch.zeros(steps, batch, hidden), zeros
        with machine("step"):
            plain = gradients(by_kernels, inputs, torch.float32, cell, False)
            for options, count in ((more, len(plain)), (more | put_in, 2 + 2 * lstm)):
                found = gradients(by_kernels, inputs | options, torch.float32, cell, False)
                for a, b in zip(found[:count], plain[:count], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("role", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_of_the_first_step_is_a_start_from_what_it_puts_in(cell: str, role: str) -> None:
    """In value and gradient, where nothing else asks for what reaches the state before the first step."""
    steps, batch, hidden = 2, 3, 9
    seed(cell, role, "first")
    drawn = dict(zip(autograd.Inputs._fields[:8], draw(cell, steps, batch, 3, hidden), strict=True))
    reset = torch.tensor([[True] * batch, [False] * batch])
    started = {n: t for n, t in drawn.items() if t is not None}
    put_in = {{"h0": "reset_h", "c0": "reset_c"}.get(n, n): t for n, t in started.items()}
    with machine(role, *SHAPES[role][-1]):
        found = gradients(by_kernels, put_in | {"reset": reset}, torch.float32, cell, False)
        want = gradients(by_kernels, started, torch.float32, cell, False)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@emulation_only
def test_a_role_without_options_is_not_taken() -> None:
    """The barrier of a whole cluster is there to be measured, and its walk has no options."""
    inputs = draw("gru", 2, 3, 3, 9, dtype=torch.float32)
    mask = torch.ones(3, 9)
    with machine("cluster_barrier", 2, 64):
        assert plan("gru", torch.float32, 9, 3)["role"] == "cluster_barrier"
        options = (None, None, None, None, mask, None, None, ops.NUMBER["gru"], False, False, False)
        y = operator("scan_forward", "emulated")(*inputs, *options)[0]
    with machine("step"):
        want = operator("scan_forward", "emulated")(*inputs, *options)[0]
    assert torch.equal(y, want)


@emulation_only
def test_wrong_options_are_named() -> None:
    hook("plan")
    gru, ones = draw("gru", 2, 3, 3, 9, dtype=torch.float32), torch.ones(3, 9)
    op = operator("scan_forward", "emulated")
    for place, bad, message in (
        (4, torch.ones(3, 8), r"state_mask must be of shape \[3, 9\]"),
        (0, ones.double(), r"reset_h must be of shape \[3, 9\].*of x's dtype"),
        (5, torch.ones(2, 3, 8), r"zoneout_h must be of shape \[2, 3, 9\]"),
        (1, ones, "only an LSTM has c0, reset_c and zoneout_c"),
        (6, torch.ones(2, 3, 9), "only an LSTM has c0, reset_c and zoneout_c"),
    ):
        options: list[Any] = 7 * [None]
        options[place] = bad
        with pytest.raises(RuntimeError, match=message):
            op(*gru, *options, ops.NUMBER["gru"], False, False, False)


# ---- Planted faults


T, B, H = 5, 5, 19
WALKS = {"lstm": 2, "gru": 3, "gru_reset_before": 4}
ENTRIES = build.HERE / "recurrent_options_entries.cpp"


class Walk:
    """One draw of a cell with all options, what the right kernels give, and walks of others to hold to it. Without h0,
    so that nothing but the states to reset to asks for the last step's product."""

    def __init__(self, cell: str) -> None:
        torch.manual_seed(5)
        lstm, number = ops.HAS_C[cell], ops.NUMBER[cell]
        self.numbers = [T, B, H, False, WALKS[cell], 1, 2, 96, 8]
        inputs = draw(cell, T, B, 3, H, dtype=torch.bfloat16)
        x, w_ih, w_hh, b_ih, b_hh = inputs[:5]
        lengths, reset = torch.tensor([5, 3, 0, 5, 4]), torch.rand(T, B) < 0.4
        reset[0, :2] = True
        put_in = [torch.randn(B, H).bfloat16(), torch.randn(B, H).bfloat16() if lstm else None]
        mask, shares = torch.rand(B, H).bfloat16(), [torch.rand(T, B, H).bfloat16(), None]
        if lstm:
            shares[1] = torch.rand(T, B, H).bfloat16()
        options = (*put_in, lengths, reset, mask, *shares, number, False)
        dy, dh_n, dc_n = torch.ones(T, B, H).bfloat16(), *torch.ones(2, B, H).bfloat16()
        with machine("grid", 2, 96, 8):
            out = operator("scan_forward", "emulated")(*inputs[:6], None, None, *options, True, True)
            y, h_n, c_n, states, tape = out
            c_n, states, dc_n = (t if lstm else None for t in (c_n, states, dc_n))
            found = operator("scan_backward", "emulated")(
                dy, dh_n, dc_n, None, y, states, tape, w_hh, None, None, None, *options
            )
        dgates, dhidden, _, _, dreset_h, dreset_c = found
        beside = [mask, *put_in, *shares]
        self.calls = {
            "walk_options_forward": (
                [torch.nn.functional.linear(x, w_ih, b_ih), w_hh, b_hh, lengths, reset, *beside],
                [y, h_n, c_n, states, tape],
            ),
            "walk_options_backward": (
                [dy, dh_n, dc_n, y, tape, w_hh, states, lengths, reset, *beside],
                [dgates, dhidden if cell == "gru" else None, dreset_h, dreset_c if lstm else None],
            ),
        }

    def fault(self, kernels: build.Library) -> str | None:
        """What is wrong with the walks of these kernels, or None."""
        for name, (given, expected) in self.calls.items():
            results = [None if t is None else torch.zeros_like(t) for t in expected]
            sums = [None if t is None else t.float() for t in results[2:]]
            made = [*results[:2], *sums] if name.endswith("backward") else results
            if (error := kernels.call(name, [*given, *made], self.numbers)) is not None:
                return error
            for ours, wanted in zip(made, expected, strict=True):
                if wanted is not None and not torch.equal(ours.to(wanted.dtype), wanted):
                    return "other bits"
        return None


# file, what stands there, what is put in its place
FAULTS = {
    "no mask": ("cell", "a.options.mask ? v * read<T>(a.options.mask, element(a, at)) : v", "v"),
    "zeros in place of a state to reset to": ("cell", "if (clear && put_in)", "if (false)"),
    "zoneout's shares swapped": ("cell", "(to_float(share), made, old)", "(to_float(share), old, made)"),
    "h of the c that zoneout kept": ("cell", "lstm_hidden(s.o(), c_new)", "lstm_hidden(s.o(), c_now)"),
    "what zoneout passes on counted twice": ("cell", "  d -= passed;\n", ""),
    "what zoneout of h passes on lost": ("cell", "  if constexpr (kOptions) beside += passed;\n", ""),
    "what zoneout of c passes on lost": ("cell", "      dc_prev += passed_c;\n", ""),
    "tanh of the c that zoneout kept": (
        "cell",
        "      if (a.options.zoneout_c.data) c = baseline::lstm_state(gates, s.c_prev);\n",
        "",
    ),
    "h before a reset in the gradient": ("cell", "if (clear) s.h = start_of(a.options.reset_h)", ""),
    "c before a reset in the gradient": ("cell", "if (clear) s.c_prev = to_float(start_of(a.options.reset_c))", ""),
    "no gradient of reset_h": ("cell", "if (a.options.dreset_h) a.options", "if (false) a.options"),
    "no gradient of reset_c": ("cell", "if (live && clear && a.options.dreset_c)", "if (false)"),
    "a gradient that crosses a reset": ("cell", "+= dh;\n    dh = 0.0f;\n", "+= dh;\n"),
    "no product for reset_h": ("cell", "!clear || (kOptions && a.options.reset_h)", "!clear"),
    "no mask in the gradient through r * h": ("cell", "dq = masked<T>(a, at, dq)", ""),
    "no product after the last step": ("resident", " || (kOptions && a.options.dreset_h)", ""),
    "resets of another step in backward": ("resident", "uint32_t replaced = clear;", "uint32_t replaced = 0;"),
    "resets of another step in forward": (
        "resident",
        "kOptions>(a, own.at[e], clear_next >>",
        "kOptions>(a, own.at[e], clear >>",
    ),
    "shares of the first step alone": (
        "resident",
        "x[e]);\n          read_extras<C>(a, t, own.at[e], extras[e]);\n",
        "x[e]);\n",
    ),
}


def mutated(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc with a fault in it; returns the folder of the scan's kernels."""
    shutil.copytree(build.ROOT / "csrc", folder / "csrc")
    target = folder / "csrc" / CUDA.relative_to(build.ROOT / "csrc") / file
    text = target.read_text()
    assert old in text, "the fault has no place any more"
    target.write_text(text.replace(old, new))
    return target.parent


@emulation_only
@pytest.mark.full
@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_planted_fault_is_found(name: str | None, tmp_path: Path) -> None:
    """And none in the kernels as they are."""
    folder, quote = CUDA, []
    if name is not None:
        file, old, new = FAULTS[name]
        folder, quote = mutated(tmp_path, f"{file}.cuh", old, new), [tmp_path, tmp_path / "csrc"]
    kernels = build.Library([ENTRIES, folder / "plan.cpp"], quote=quote)
    assert any(Walk(cell).fault(kernels) for cell in WALKS) == (name is not None)


# file, what stands there, what is put in its place
OF_OPERATORS = {
    "no mask of h before": ("layers", "? masked(rows_of(y, at * B, whole * B), i)", "? rows_of(y, at * B, whole * B)"),
    "no mask of h0": (
        "layers",
        "masked(torch::stable::select(*h0_tensor, 0, i), i)",
        "torch::stable::select(*h0_tensor, 0, i)",
    ),
    "no mask of reset_h": (
        "layers",
        "masked(torch::stable::select(*reset_h, 0, i), i)",
        "torch::stable::select(*reset_h, 0, i)",
    ),
    "no reset_h in a gradient of W_hh": ("layers", "if (resets && reset_h)", "if (false)"),
    "no q of a reset in a gradient of W_hn": (
        "layers",
        "columns_of(d, 2 * H, H)), q",
        "columns_of(kept, 2 * H, H)), q",
    ),
    "options of the first layer in all": (
        "layers",
        "a.options = options[p.layer * D + p.direction]",
        "a.options = options[0]",
    ),
    "gradients of reset_h of the first layer": ("layers", "dreset_h->from(i * B * H)", "dreset_h->from(0)"),
    "no last product in the role step": (
        "ops",
        "if (s.step + 1 < a.T || a.dh0 || a.options.dreset_h)",
        "if (s.step + 1 < a.T || a.dh0)",
    ),
    "no last launch in the role step": ("ops", "if (a.dh0 || a.dc0 || a.options.dreset_h)", "if (a.dh0 || a.dc0)"),
}

RUN = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, "tests")
import cuda_recurrent_support
cuda_recurrent_support.CUDA = Path(sys.argv[1])
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@emulation_only
@pytest.mark.full
@pytest.mark.parametrize("name", OF_OPERATORS)
def test_a_fault_planted_in_an_operator_is_found(name: str, tmp_path: Path) -> None:
    file, old, new = OF_OPERATORS[name]
    folder = mutated(tmp_path, f"{file}.cpp", old, new)
    suite, chosen = ("layers", "zoneout") if file == "layers" else ("options", "first_step and step")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), f"tests/recurrent/test_cuda_recurrent_{suite}.py", "-k", chosen],
        capture_output=True, text=True, cwd=build.ROOT, timeout=900,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "over the budget" in done.stdout or "not close" in done.stdout, done.stdout
