"""Launches of the recurrent kernels: tensors as in the schemas ``scan_forward`` and ``scan_backward``.

The products over all steps are torch's. A role is chosen by what fits on the device: *sequence* where W_hh fits one
SM and there is more than one step, else *step*; *persistent* where it is asked for. All launches go to the current
stream, the host waits for none of them, and all may be captured in a CUDA graph: nothing depends on what a tensor
holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..precision import one_tf32_product
from . import tuning
from .backward import backward_sequence, backward_state, backward_step
from .forward import forward_projection, forward_sequence, forward_step
from .persistent import forward_persistent
from .persistent_backward import backward_persistent

INTERPRETED = bool(triton.knobs.runtime.interpret)
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Bits of `given`, as the kernels have them.
BIAS, H0, C0, LENGTHS, RESET, STATES, LAST, DY, DSTATES, CARRY, DC, LATER, SHARES_H, SHARES_C = (
    1 << bit for bit in range(14)
)

role: str | None = None
"""For tests and measurements: ``"sequence"``, ``"persistent"`` or ``"step"``, not what :func:`tile` would choose."""


@lru_cache
def properties(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that one program may have on a device, and its processors; an H200's for the CPU."""
    if device.type == "cpu":
        return 227 * 1024, 132
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return found["max_shared_mem"], found["multiprocessor_count"]


@lru_cache
def persistent_first(device: torch.device) -> bool:
    """Whether the tables prefer the persistent role to the step role on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in tuning.PERSISTENT_FIRST


def tile(
    cell: str, x: Tensor, hidden: int, projected: bool, backward: bool, shares: int | None = None
) -> tuple[Any, str | None]:
    """The tile of the role that a call gets, and why it is not the sequence role (None where it is).

    Raises:
        ValueError: the role that was asked for cannot be had; says why.
    """
    name = _NAMES[x.dtype]
    shared, processors = properties(x.device)
    reasons: list[str] = []
    if projected:
        reasons.append("a projected state needs two products a step")
    elif x.shape[0] == 1 and role in (None, "step"):
        reasons.append("one step is one launch either way, and the step role takes both products into it")
    elif role == "step":
        reasons.append("asked for")
    else:
        if role != "persistent":
            found: Any = tuning.sequence(cell, name, hidden, shared, backward, shares)
            if not isinstance(found, str):
                return found, None
            reasons.append(found)
        if role == "persistent" or (role is None and persistent_first(x.device)):
            if torch.version.hip is None:
                found = tuning.persistent(name, x.shape[1], hidden, processors, shares)
            else:
                found = "the persistent role is for CUDA GPUs: compiled for others it spills registers"
            if not isinstance(found, str):
                return found, reasons[0] if reasons else "asked for"
            reasons.append(found)
        if role is not None:
            raise ValueError(reasons[0])
    return tuning.step(name, x.shape[1]), "; ".join(reasons)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How tl.dot multiplies: float32 by three TF32 products, which keep its digits, or one if torch may use TF32."""
    if dtype is not torch.float32 or hip:
        return "ieee"
    return "tf32" if one_tf32_product() else "tf32x3"


def common(tiles: Any, x: Tensor) -> dict[str, Any]:
    """Constants and launch options that every kernel takes."""
    found = {
        "BLOCK_B": tiles.block_b,
        "PRECISION": precision(x.dtype, torch.version.hip is not None),
        "UPCAST": INTERPRETED and x.dtype is not torch.float32,
        "num_warps": tiles.num_warps,
    }
    if x.is_cuda and torch.version.hip is None:
        found["maxnreg"] = tuning.MAX_REGISTERS
    if isinstance(tiles, tuning.Sequence):
        return {**found, "BLOCK_H": tiles.block_h, "TAIL": tiles.tail, "STAGES": tiles.stages}
    if isinstance(tiles, tuning.Persistent):
        found["launch_cooperative_grid"] = True
    return {**found, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "num_stages": tiles.num_stages}


@lru_cache
def absent(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Something to point at in place of a tensor that is not there; no kernel follows the pointer."""
    return torch.empty(16, dtype=dtype, device=device)


def rows(t: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A [T, B, N] tensor and its strides in rows of N: a half of a wider one too; copied where it has no such rows."""
    if t is None:
        return None, 0, 0
    width = t.shape[2]
    if t.stride(2) != 1 or t.stride(0) % width or t.stride(1) % width:
        t = t.contiguous()
    return t, t.stride(0) // width, t.stride(1) // width


def project(x: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> tuple[Tensor, int, int]:
    """gates_x = x · W_ihᵀ + b_ih, [T, B, G*H] or [B, T, G*H] as x lies, and its strides in rows of T and B.

    One product. Rows of x at one distance from each other, in either order, are not copied: a slice of a wider tensor
    is read where it lies.
    """
    steps, batch, _ = x.shape
    swapped = x.stride(1) == steps * x.stride(0) and x.stride(0) != batch * x.stride(1)
    order = x.transpose(0, 1) if swapped else x
    gates_x = torch.nn.functional.linear(order.reshape(-1, x.shape[2]), w_ih, b_ih)
    return (gates_x, 1, steps) if swapped else (gates_x, batch, 1)


def walk(t: Tensor, reverse: bool) -> tuple[int, int]:
    """The first step of the forward walk, and its direction."""
    return (t.shape[0] - 1, -1) if reverse else (0, 1)


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class Options(NamedTuple):
    """What few calls have, as the kernels take it, None where it is not there; of the schemas' arguments."""

    state_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    given: int = 0
    """Bits: of which state zoneout has a share for each unit."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def shares(self) -> int | None:
        """How many of zoneout's shares a step reads, as the tables of tiles have it; None where nothing is there."""
        if all(t is None for t in self.tensors):
            return None
        return sum(t is not None for t in (self.zoneout_h, self.zoneout_c))


def options_of(
    x: Tensor, hidden: int, lstm: bool, w_hr: Tensor | None, reset_h: Tensor | None, reset_c: Tensor | None,
    reset: Tensor | None, state_mask: Tensor | None, zoneout_h: Tensor | None, zoneout_c: Tensor | None,
) -> Options:  # fmt: skip
    """Of a call over x ``[T, B, _]``; of an LSTM each option is there for h and c, or for neither: that makes fewer
    variants."""
    if zoneout_c is not None and w_hr is not None:
        raise RuntimeError("scan: the Triton kernels have no zoneout of c beside a projection")
    batch, given = x.shape[1], 0
    if reset is None:
        reset_h = reset_c = None
    if lstm and (reset_h is None) != (reset_c is None):
        width = hidden if w_hr is None else w_hr.shape[0]
        reset_h = x.new_zeros(batch, width) if reset_h is None else reset_h
        reset_c = x.new_zeros(batch, hidden) if reset_c is None else reset_c
    if lstm and w_hr is None and (zoneout_h is None) != (zoneout_c is None):
        nothing = x.new_zeros(()).expand(x.shape[0], batch, hidden)
        zoneout_h, zoneout_c = (nothing if s is None else s for s in (zoneout_h, zoneout_c))
    if zoneout_h is not None and any(zoneout_h.stride()):  # else one number, expanded
        zoneout_h, given = zoneout_h.contiguous(), given | SHARES_H
    if zoneout_c is not None and any(zoneout_c.stride()):
        zoneout_c, given = zoneout_c.contiguous(), given | SHARES_C
    return Options(dense(state_mask), zoneout_h, zoneout_c, dense(reset_h), dense(reset_c), given)


def times(state: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What the products read of a state."""
    return state if state is None or mask is None else state * mask


def on_its_device(launch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Triton launches on the current device: make it that of the tensors."""

    @wraps(launch)
    def wrapped(*args: Any) -> tuple[Tensor, ...]:
        device = next(a for a in args if isinstance(a, Tensor)).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return wrapped


CHANGING = frozenset({"h_in", "carry_in", "h_out", "read_in", "read_out", "t", "later", "given"})
"""The arguments that a step's launch may get other values for than the step before."""


class Repeated:
    """A kernel that is launched at every step of a walk, as compiled once.

    Triton looks at each argument of each launch, to find what was compiled for such ones, and its launcher asks the
    driver about each tensor. What the first launch gets may differ (a caller's h0 may lie at any address); all later
    ones get tensors of our own, of one kind, and other values only in CHANGING. So from the third on the compiled
    kernel is called without asking, on the stream of the first, with addresses.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any):
        self.launch = kernel[grid]
        self.grid = grid + (1,) * (3 - len(grid))
        self.constants = constants
        self.names = kernel.arg_names
        self.changing = [place for place, name in enumerate(self.names) if name in CHANGING]
        self.launched = 0
        self.compiled: Callable[..., None] | None = None
        self.values: list[Any] = []  # arguments by position, the constants too, which a compiled kernel ignores

    def __call__(self, *args: Any) -> None:
        if self.compiled is not None:
            for place in self.changing:
                self.values[place] = address(args[place])
            self.compiled(*self.values)
            return
        made = self.launch(*args, **self.constants)
        self.launched += 1
        if self.launched == 2 and made is not None:  # None: interpreted
            self.values = [*map(address, args), *(self.constants[name] for name in self.names[len(args) :])]
            self.compiled = launcher(made, self.grid, args[0].device)


def launcher(made: Any, grid: tuple[int, ...], device: torch.device) -> Callable[..., None]:
    """What launches a compiled kernel on the current stream; past the hooks of a profiler only where there are none."""
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    if any(getattr(hook, "calls", hook) for hook in hooks):  # a chain, which may be empty, or one, or None
        return made[grid]
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    return partial(made.run, *grid, stream, made.function, made.packed_metadata, None, None, None)


def address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


@on_its_device
def scan_forward(
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c, cell,
    reverse, save, states,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``fastseq::scan_forward.triton``."""
    steps, batch, _ = x.shape
    state, hidden, lstm = w_hh.shape[1], w_hh.shape[0] // tuning.GATES[cell], tuning.HAS_C[cell]
    save_tape = save and tuning.TAPE[cell] > 0
    with_states = lstm and (save or states)
    y, h_n = x.new_empty(steps, batch, state), x.new_empty(batch, state)
    c_n = x.new_empty(batch, hidden) if lstm else x.new_empty(0)
    all_c = x.new_empty((steps, batch, hidden) if with_states else 0, dtype=torch.float32 if with_states else x.dtype)
    tape = x.new_empty((steps, batch, tuning.TAPE[cell] * hidden) if save_tape else 0)
    if batch == 0:
        return y, h_n, c_n, all_c, tape

    def there(t: Tensor | None, dtype: torch.dtype = x.dtype) -> Tensor:
        return absent(dtype, x.device) if t is None else t

    w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths = (dense(t) for t in (w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths))
    if b_hh is None and b_ih is not None:  # the kernels take both or neither
        b_hh = torch.zeros_like(b_ih)
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    own = options_of(x, hidden, lstm, w_hr, reset_h, reset_c, reset, state_mask, zoneout_h, zoneout_c)
    put_in = times(own.reset_h, own.state_mask)
    given = own.given | (
        BIAS * (b_hh is not None) | H0 * (h0 is not None) | C0 * (c0 is not None)
        | LENGTHS * (lengths is not None) | RESET * (reset is not None) | STATES * with_states
    )  # fmt: skip
    reset_t, reset_b = (0, 0) if reset is None else reset.stride()
    lengths, reset = there(lengths, torch.int64), there(reset, torch.bool)
    first, direction = walk(x, reverse)
    tiles, _ = tile(cell, x, hidden, w_hr is not None, False, own.shares)
    shared = {"CELL": cell, "SAVE": save_tape, **common(tiles, x)}
    states_or = there(all_c if with_states else None, torch.float32)
    tape_or = there(tape if save_tape else None)

    if not isinstance(tiles, tuning.Step) or isinstance(tiles, tuning.Persistent):  # one launch for all steps
        gates_x, x_t, x_b = project(x, w_ih, b_ih)
        over_batch = triton.cdiv(batch, tiles.block_b)
        meeting: tuple[Tensor, ...] = ()
        if isinstance(tiles, tuning.Persistent):
            exchange = x.new_empty(3 if cell == "gru_reset_before" else 2, batch, hidden)
            meeting = (exchange, x.new_zeros(over_batch, 32, dtype=torch.int32))
            beside: tuple[Tensor | None, ...] = (*own.tensors, put_in)
            launch = forward_persistent[(triton.cdiv(hidden, tiles.block_n), over_batch)]
        else:
            beside = own.tensors
            launch = forward_sequence[(over_batch,)]
        launch(
            gates_x, w_hh, there(b_hh), there(h0), there(c0), lengths, reset, *beside, y, h_n, c_n, states_or, tape_or,
            *meeting, steps, batch, given, first, direction, x_t, x_b, reset_t, reset_b, hidden, **shared,
        )  # fmt: skip
        return y, h_n, c_n, all_c, tape

    fused = steps == 1
    source, x_t, x_b = (x.contiguous(), 0, 0) if fused else project(x, w_ih, b_ih)
    two = cell == "gru_reset_before"
    projected = w_hr is not None
    kept = cell != "rnn_tanh" and cell != "rnn_relu"  # whether something is carried in fp32: c, or a GRU's h
    start = (c0 if lstm else h0) if kept else None
    carry_out = x.new_empty(batch, hidden, dtype=torch.float32) if kept and not fused else None
    carry_in = there(start) if fused else there(None if start is None else start.float(), torch.float32)
    scratch = x.new_empty(batch, hidden) if two or projected else absent(x.dtype, x.device)
    update = x.new_empty(batch, hidden, dtype=torch.float32) if two else absent(torch.float32, x.device)
    between = [x.new_empty(batch, state) for _ in range(min(2, steps - 1))]
    is_masked = own.state_mask is not None
    between_read = [x.new_empty(batch, state) if is_masked and not fused else None for _ in range(2)]
    read_in = there(times(h0, own.state_mask)) if is_masked else None
    grid = (triton.cdiv(hidden, tiles.block_n), triton.cdiv(batch, tiles.block_b))
    phases = [
        Repeated(forward_step, grid, PHASE=phase, FUSE_X=fused, PROJECTED=projected, **shared)
        for phase in ((0, 1) if two else (0,))
    ]
    options = {name: value for name, value in shared.items() if name not in ("CELL", "SAVE")}
    projection = Repeated(forward_projection, (triton.cdiv(state, tiles.block_n), grid[1]), **options)
    b_ih, b_hh, h_in = there(b_ih), there(b_hh), there(h0)
    for step in range(steps):
        t = first + step * direction
        last = step == steps - 1
        h_out, read_out = h_n if last else between[step % 2], between_read[step % 2]
        given |= LAST * last
        for launch in phases:
            launch(
                source, w_ih, b_ih, h_in, carry_in, w_hh, b_hh, lengths, reset, *own.tensors, read_in,
                None if projected else read_out, put_in, y, h_out, carry_out, c_n, states_or, tape_or, scratch,
                update, t, batch, given, x_t, x_b, reset_t, reset_b, x.shape[2], hidden, state,
            )  # fmt: skip
        if projected:
            resets = (None, None, None) if own.zoneout_h is None else (reset, reset_t, reset_b)
            projection(
                scratch, w_hr, h_in, lengths, y, h_out, *resets,
                None if read_out is None else own.state_mask, own.zoneout_h, own.reset_h, read_out,
                t, batch, given, hidden, state,
            )  # fmt: skip
        h_in, given = h_out, given | H0 | C0
        read_in = read_out if is_masked else None
        carry_in = carry_in if carry_out is None else carry_out
    return y, h_n, c_n, all_c, tape


@on_its_device
def scan_backward(
    dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, reset_h, reset_c, lengths, reset, state_mask,
    zoneout_h, zoneout_c, cell, reverse,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``fastseq::scan_backward.triton``."""
    steps, batch, state = y.shape
    gates, lstm = tuning.GATES[cell], tuning.HAS_C[cell]
    hidden, projected = w_hh.shape[0] // gates, w_hr is not None
    if (tuning.TAPE[cell] > 0 and tape is None) or (lstm and states is None):
        raise RuntimeError("scan: this cell's backward pass needs its tape, an LSTM's its states")
    dgates = y.new_empty(steps, batch, gates * hidden)
    dhidden = y.new_empty((steps, batch, state if projected else hidden) if projected or cell == "gru" else 0)
    dh0 = y.new_empty((batch, state) if h0 is not None else 0)
    dc0 = y.new_empty((batch, hidden) if c0 is not None else 0)
    resets = [s is not None for s in (reset_h, reset_c)]
    own = options_of(y, hidden, lstm, w_hr, reset_h, reset_c, reset, state_mask, zoneout_h, zoneout_c)

    def found(*to_resets: Tensor | None) -> tuple[Tensor, ...]:
        """The results, with a gradient for each state to reset to that the caller gave."""
        sums = []
        for d, is_given, width in zip(to_resets, resets, (state, hidden), strict=True):
            if is_given:
                sums.append(y.new_zeros(batch, width) if d is None else d.to(y.dtype))
            else:
                sums.append(y.new_empty(0))
        return dgates, dhidden, dh0 if has_h0 else y.new_empty(0), dc0, *sums

    has_h0 = h0 is not None
    if batch == 0:
        return found(None, None)
    if own.reset_h is not None and h0 is None:  # the kernels end with the product that reaches the first state
        h0, dh0 = y.new_zeros(batch, state), y.new_empty(batch, state)

    def there(t: Tensor | None, dtype: torch.dtype = y.dtype) -> Tensor:
        return absent(dtype, y.device) if t is None else t

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(torch.float32).contiguous()

    dy, x_t, x_b = rows(dy)
    y, w_hh = y.contiguous(), w_hh.contiguous()
    dstates, states, tape, w_hr, h0, c0, lengths = (
        dense(t) for t in (dstates, states, tape, w_hr, h0, c0, lengths)
    )  # fmt: skip
    given = own.given | (
        H0 * (h0 is not None) | C0 * (c0 is not None) | LENGTHS * (lengths is not None) | RESET * (reset is not None)
        | DY * (dy is not None) | DSTATES * (dstates is not None)
        | CARRY * (dh_n is not None) | DC * (dc_n is not None)
    )  # fmt: skip
    reset_t, reset_b = (0, 0) if reset is None else reset.stride()
    lengths, reset = there(lengths, torch.int64), there(reset, torch.bool)
    first, direction = walk(y, reverse)
    tiles, _ = tile(cell, y, hidden, projected, True, own.shares)
    shared = {"CELL": cell, **common(tiles, y)}
    saved = (there(states, torch.float32), there(tape))
    dstates = there(dstates, torch.float32)

    if not isinstance(tiles, tuning.Step) or isinstance(tiles, tuning.Persistent):  # one launch for all steps
        over_batch = triton.cdiv(batch, tiles.block_b)
        to_resets = [None if s is None else torch.empty_like(s) for s in (own.reset_h, own.reset_c)]
        meeting: tuple[Tensor, ...] = ()
        if isinstance(tiles, tuning.Persistent):
            meeting = (y.new_zeros(over_batch, 32, dtype=torch.int32),)
            launch = backward_persistent[(triton.cdiv(hidden, tiles.block_n), over_batch)]
        else:
            launch = backward_sequence[(over_batch,)]
        launch(
            there(dy), there(wide(dh_n), torch.float32), there(wide(dc_n), torch.float32), dstates,
            y, *saved, w_hh, there(h0), there(c0), lengths, reset, *own.tensors, dgates, dhidden, dh0, dc0, *to_resets,
            *meeting, steps, batch, given, first, direction, x_t, x_b, reset_t, reset_b, hidden, **shared,
        )  # fmt: skip
        return found(*to_resets)

    def carried(t: Tensor | None, width: int) -> Tensor:
        return y.new_empty(batch, width, dtype=torch.float32) if t is None else t.to(torch.float32, copy=True)

    carry = carried(dense(dh_n), state)
    dc = carried(dense(dc_n), hidden) if lstm else absent(torch.float32, y.device)
    to_resets = [None if s is None else s.new_zeros(s.shape, dtype=torch.float32) for s in (own.reset_h, own.reset_c)]
    two = cell == "gru_reset_before"
    grid, state_grid = (
        (triton.cdiv(n, tiles.block_n), triton.cdiv(batch, tiles.block_b)) for n in (hidden, state)
    )  # fmt: skip
    phases = [
        Repeated(backward_step, grid, PHASE=phase, PROJECTED=projected, **shared) for phase in ((0, 1) if two else (0,))
    ]
    projection = Repeated(backward_state, state_grid, FINAL=False, **shared)
    dy, w_hr, start = there(dy), there(w_hr), (there(h0), there(c0))

    def state_gradient(launch: Callable[..., None], zoneout: Tensor | None, t: int, later: int) -> None:
        launch(
            dy, w_hh, lengths, reset, own.state_mask, zoneout, dgates, dhidden, carry, dh0, to_resets[0],
            t, later, batch, given, x_t, x_b, reset_t, reset_b, hidden, state,
        )  # fmt: skip

    for step in reversed(range(steps)):
        t = first + step * direction
        later = t + direction if step + 1 < steps else t  # the last has none, and its place is read without LATER too
        if projected:
            state_gradient(projection, own.zoneout_h, t, later)
        for launch in phases:
            launch(
                dy, dstates, y, *saved, w_hh, w_hr, *start, lengths, reset, *own.tensors, dgates, dhidden, carry, dc,
                *to_resets, t, later, batch, given, first, direction, x_t, x_b, reset_t, reset_b, steps, hidden, state,
            )  # fmt: skip
        given |= CARRY | DC | LATER
    if h0 is not None:
        state_gradient(Repeated(backward_state, state_grid, FINAL=True, **shared), None, first, first)
    if c0 is not None:
        dc0 = dc.to(y.dtype)
    return found(*to_resets)
