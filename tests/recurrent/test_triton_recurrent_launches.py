"""What the recurrent Triton kernels are launched with, on a GPU that is not there.

How many variants, how many launches; nothing copied, nothing waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import triton
from fastseq.kernels.recurrent import launch, tuning
from support import CELLS, PROJECTED, cell_inputs
from triton_recurrent_driver import Launch, Log, Made, Operations, device
from triton_recurrent_support import OPTIONS, Variant, variants
from triton_support import needs_compiler

pytestmark = needs_compiler

ROLES = ["sequence", "step", "persistent"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    launch.role = None


def there_and_back(
    cell: str, steps: int, batch: int, hidden: int, dtype=torch.bfloat16, features: int = 32, *, options: bool = False,
    reverse: bool = False, save: bool = True, absent: bool = False, projected: int = 0, more: tuple[str, ...] = (),
):  # fmt: skip
    """One scan forward and one back; whatever they return holds nothing."""
    inputs = cell_inputs(cell, steps, batch, features, hidden, projected=projected, dtype=dtype)
    if absent:
        inputs[6] = inputs[7] = None
    lengths = torch.full((batch,), steps) if options else None
    reset = torch.zeros(steps, batch, dtype=torch.bool) if options or "state" in more else None
    lstm, state = tuning.HAS_C[cell], projected or hidden
    h, c = torch.empty(batch, state, dtype=dtype), torch.empty(batch, hidden, dtype=dtype) if lstm else None
    put_in = (h, c) if "state" in more else (None, None)
    mask = h if "mask" in more else None
    shares = [None, None]
    if "zoneout" in more:
        sizes = (state, hidden if lstm and not projected else 0)
        shares = [torch.empty(steps, batch, n, dtype=dtype) if n else None for n in sizes]
    given = (*put_in, lengths, reset, mask, *shares)
    out = launch.scan_forward(*inputs, *given, cell, reverse, save, save)
    if save:
        y, h_n, c_n, states, tape = out
        gated = tuning.GATES[cell] > 1
        grads = [torch.empty_like(y), torch.empty_like(h_n), torch.empty_like(c_n) if options and lstm else None, None]
        launch.scan_backward(
            *grads, y, states if lstm else None, tape if gated else None, inputs[2], inputs[5], inputs[6], inputs[7],
            *given, cell, reverse,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_no_other_length_batch_or_option_compiles_anything(cell: str, role: str) -> None:
    launch.role = role
    with device() as log:
        for batch in (3, 16, 17):  # a tile of the batch and more: two variants of the step role
            there_and_back(cell, 5, batch, 64)
        made = len(log.made)
        for steps, batch in ((2, 1), (3, 16), (16, 8), (17, 33), (128, 64), (40, 130)):
            for options, reverse, absent in ((False, False, False), (True, True, False), (True, False, True)):
                there_and_back(cell, steps, batch, 64, options=options, reverse=reverse, absent=absent)
        assert len(log.made) == made, [m.kernel for m in log.made[made:]]
        assert len(log.launches) >= 36


def expected(variant: Variant) -> tuple:
    """What Triton would look a variant up by: its kernel, types, constants, what divides by 16, and options."""
    kernel, types, constants, options = variant.source("sm_90")
    signature = {n: types[n].partition(":")[0] if n in types else "constexpr" for n in kernel.arg_names}
    aligned = {(i,) for i, n in enumerate(kernel.arg_names) if types.get(n, "").endswith(":16")}
    return kernel.__name__, signature, constants, aligned, {k: v for k, v in options.items() if k != "maxnreg"}


def found(made: Made) -> tuple:
    aligned = {i for i, value in made.attributes.items() if value == [["tt.divisibility", 16]]}
    names = ["num_warps"]
    if "BLOCK_N" in made.constants:
        names.append("num_stages")
    if made.kernel.endswith("persistent"):
        names.append("launch_cooperative_grid")
    options = {name: getattr(made.options, name) for name in names}
    return made.kernel, made.signature, made.constants, aligned, options


@pytest.mark.parametrize("role", [*ROLES, None])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(cell: str, role: str | None) -> None:
    """The tables of variants that the tests compile have every variant that launches ask for."""
    known = [expected(v) for v in variants("sm_90", ["bf16", "fp32"]) if v.cell == cell]
    launch.role = role
    with device() as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "precision", lambda dtype, hip: "tf32x3" if dtype is torch.float32 else "ieee")
        for dtype in (torch.bfloat16, torch.float32):
            for steps, batch, save in itertools.product(
                (1, 4) if role in (None, "step") else (4,), (16, 17), (True, False)
            ):
                there_and_back(cell, steps, batch, 32, dtype, save=save)
                if dtype is torch.bfloat16 and role != "persistent":  # as many as are in two parts
                    there_and_back(cell, steps, batch, 160 if tuning.GATES[cell] > 1 else 288, dtype, save=save)
                if tuning.HAS_C[cell] and role in (None, "step"):
                    there_and_back(cell, steps, batch, 64, dtype, save=save, projected=32)
        unknown = [found(made) for made in log.made if found(made) not in known]
        assert not unknown, unknown[:2]
        assert log.made


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_launched_with_options_is_what_is_compiled_ahead_of_time(cell: str, role: str) -> None:
    """One variant for each set of options, whichever of a state's two parts they are of."""
    sets = [some for n in (1, 2, 3) for some in itertools.combinations(OPTIONS, n)]
    known = [expected(v) for some in [(), *sets] for v in variants("sm_90", ["bf16"], some) if v.cell == cell]
    launch.role = role
    with device() as log:
        for some in sets:
            for steps, save in ((1, True), (5, True), (5, False)) if role == "step" else ((5, True), (5, False)):
                there_and_back(cell, steps, 16, 64, save=save, more=some)
                if tuning.HAS_C[cell] and role == "step":
                    there_and_back(cell, steps, 16, 64, save=save, more=some, projected=32)
        unknown = [found(made) for made in log.made if found(made) not in known]
        assert not unknown, unknown[:2]


def test_one_number_for_all_units_or_a_share_of_one_state_alone_compile_nothing_else() -> None:
    launch.role = "sequence"
    inputs = cell_inputs("lstm", 3, 2, 16, 32, dtype=torch.bfloat16)
    share, number = torch.empty(3, 2, 32, dtype=torch.bfloat16), torch.empty((), dtype=torch.bfloat16).expand(3, 2, 32)
    with device() as log:
        for shares in ((share, share), (number, number), (share, None), (None, number), (number, share)):
            launch.scan_forward(*inputs, *5 * [None], *shares, "lstm", False, True, True)
        assert len(log.made) == 1
        bits = [at.arguments["given"] & (launch.SHARES_H | launch.SHARES_C) for at in log.launches]
        at = [launch.SHARES_H | launch.SHARES_C, 0, launch.SHARES_H, 0, launch.SHARES_C]
        assert bits == at


def test_a_step_of_a_cell_is_one_launch() -> None:
    """Both products, gates and state; two where the second product needs all units of the first."""
    with device() as log, torch.no_grad():
        for cell in CELLS:
            log.launches.clear()
            there_and_back(cell, 1, 64, 512, save=False)
            assert len(log.launches) == (2 if cell == "gru_reset_before" else 1)


@pytest.mark.parametrize("cell", CELLS)
def test_one_launch_walks_all_steps(cell: str) -> None:
    for role in ("sequence", "persistent"):
        launch.role = role
        with device() as log:
            there_and_back(cell, 1000, 16, 64)
            assert [at.made.kernel for at in log.launches] == [f"forward_{role}", f"backward_{role}"]
            cooperative = [at.made.options.launch_cooperative_grid for at in log.launches]
            assert cooperative == [role == "persistent"] * 2
            assert all(at.stream == 7 for at in log.launches)


def test_all_programs_that_wait_for_each_other_fit_at_once() -> None:
    launch.role = "persistent"
    for batch, hidden in ((1, 17), (64, 1024), (128, 1000), (512, 256), (130, 520)):
        with device() as log:
            there_and_back("gru", 3, batch, hidden)
            for at in log.launches:
                x, y, z = at.grid
                assert x * y * z <= 132
                assert x * at.arguments["BLOCK_N"] >= hidden
                assert y * at.arguments["BLOCK_B"] >= batch
                assert at.arguments["arrived"].shape == (y, 32)


def address(at: Launch, name: str) -> int:
    return launch.address(at.arguments[name])


def walked(log: Log, name: str) -> list[Launch]:
    return [at for at in log.launches if at.made.kernel == name]


def test_steps_are_launched_as_compiled_without_asking_again() -> None:
    """From the third step on Triton no longer looks at every argument; what arrives is the same chain of states."""
    launch.role = "step"
    with device() as log:
        _, h_n, *_ = there_and_back("lstm", 9, 4, 200, reverse=True)
        forward, backward = walked(log, "forward_step"), walked(log, "backward_step")
        assert len(forward) == len(backward) == 9
        assert log.bound == 2 + 2 + 1  # and the gradient of h0
    assert [at.arguments["t"] for at in forward] == list(reversed(range(9)))
    assert [at.arguments["t"] for at in backward] == list(range(9))
    for before, after in itertools.pairwise(forward):
        assert address(after, "h_in") == address(before, "h_out")
        assert address(after, "h_in") != address(after, "h_out")
    assert address(forward[-1], "h_out") == h_n.data_ptr()
    assert {at.arguments["BLOCK_N"] for at in forward} == {forward[0].made.constants["BLOCK_N"]}


@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_what_a_step_is_launched_with_is_what_it_was_asked_for(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the second take over what does not change; nothing else may."""
    launch.role = "step"
    asked: list[list] = []
    call = launch.Repeated.__call__

    def noted(self, *args):
        asked.append([launch.address(value) for value in args])
        call(self, *args)

    monkeypatch.setattr(launch.Repeated, "__call__", noted)
    for options, absent, reverse in ((False, False, False), (True, True, True)):
        asked.clear()
        with device() as log:
            there_and_back(
                cell.removesuffix("_projected"), 7, 5, 48, options=options, absent=absent, reverse=reverse,
                projected=32 if cell.endswith("_projected") else 0, more=tuple(OPTIONS) if absent else (),
            )  # fmt: skip
        assert len(asked) == len(log.launches) >= 14
        for args, at in zip(asked, log.launches, strict=True):
            got = [launch.address(value) for value in list(at.arguments.values())[: len(args)]]
            assert got == args, at.made.kernel


def test_a_profiler_sees_every_launch() -> None:
    """Triton's hooks are called for each, also from the third step on."""
    launch.role = "step"
    chain = triton.knobs.runtime.launch_enter_hook

    def hook(metadata: object) -> None: ...

    chain.add(hook)
    try:
        with device() as log:
            there_and_back("gru", 6, 4, 32)
            assert all(at.hooks[0] is chain for at in log.launches)
    finally:
        chain.remove(hook)
    with device() as log:
        there_and_back("gru", 6, 4, 32)
        assert [at.hooks[0] is None for at in log.launches[:6]] == [False, False, True, True, True, True]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_for_the_device(cell: str, role: str) -> None:
    """No number is read back from a tensor, so that the call can be captured in a CUDA graph."""
    launch.role = role
    with device(), Operations() as operations:
        there_and_back(cell, 6, 5, 48, options=True)
    found = {name for name in operations.seen if any(w in name for w in ("_local_scalar", "item", "nonzero", "equal"))}
    assert not found
    assert not any("_to_copy" in name and "device" in name for name in operations.seen)


def copies(operations: Operations) -> list[str]:
    """Copies in the same dtype; a state that is carried in float32 is made so."""
    return [name for name in operations.seen if any(word in name for word in ("clone", "copy_", "contiguous"))]


def test_strides_that_a_stack_makes_are_read_where_they_lie() -> None:
    """x batch first or sliced from a wider tensor, and dy as one direction's half of both, without a copy."""
    inputs = cell_inputs("gru", 5, 3, 16, 32, dtype=torch.bfloat16)
    both = torch.empty(5, 3, 64, dtype=torch.bfloat16)
    first = torch.empty(3, 5, 64, dtype=torch.bfloat16)
    wider = [both[..., 32:48], both[:, :, :16], first.transpose(0, 1)[..., :16], both[:, 1:2, 16:32], both[2:3, :, :16]]
    for role in ROLES:
        launch.role = role
        for x in wider:
            inputs[0], batch = x, x.shape[1]
            inputs[6] = torch.empty(batch, 32, dtype=torch.bfloat16)
            with device() as log, Operations() as operations:
                if x.shape[0] == 1 and role == "step":
                    continue  # whose product is part of the step, and takes x as it is asked for: in whole rows
                y, _, _, _, tape = launch.scan_forward(*inputs, *7 * [None], "gru", False, True, True)
                assert not copies(operations)
                for dy in (both[: x.shape[0], :batch, 32:], first.transpose(0, 1)[: x.shape[0], :batch, :32]):
                    operations.seen.clear()
                    launch.scan_backward(
                        dy, None, None, None, y, None, tape, inputs[2], None, inputs[6], *8 * [None], "gru", False
                    )
                    assert not copies(operations)
                    at = log.launches[-1] if role != "step" else walked(log, "backward_step")[-1]
                    assert address(at, "dy") == dy.data_ptr()
                    assert at.arguments["x_t"] * 32 == dy.stride(0)
                    assert at.arguments["x_b"] * 32 == dy.stride(1)


def multiplied_as(dtype: torch.dtype) -> set[str]:
    with device() as log:
        there_and_back("lstm", 3, 2, 32, dtype)
    return {made.constants["PRECISION"] for made in log.made}


def test_tf32_only_where_torch_allows_it() -> None:
    """By either of torch's two names for it."""
    try:
        for setting, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "tf32x3")):
            torch.set_float32_matmul_precision(setting)
            assert multiplied_as(torch.float32) == {expected}, setting
        for setting, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert multiplied_as(torch.float32) == {expected}, setting
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert multiplied_as(torch.float16) == {"ieee"}
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shared", [48, 64, 99, 163, 227])
def test_no_tile_asks_for_more_memory_than_the_device_has(shared: int) -> None:
    for cell, dtype, backward in itertools.product(CELLS, ("bf16", "fp16", "fp32"), (False, True)):
        for hidden in (1, 16, 17, 64, 128, 200, 256, 1000):
            tile = tuning.sequence(cell, dtype, hidden, shared * 1024, backward)
            if isinstance(tile, str):
                assert f"H = {hidden}" in tile
                continue
            assert tuning.sequence_bytes(cell, dtype, tile, backward) <= shared * 1024
            assert tile.units >= hidden
