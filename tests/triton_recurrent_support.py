"""The signatures of the recurrent Triton kernels, for compiling every variant in the tables ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastseq.kernels.recurrent import (
    backward as recurrent_backward,
)
from fastseq.kernels.recurrent import (
    forward as recurrent,
)
from fastseq.kernels.recurrent import normed as recurrent_normed
from fastseq.kernels.recurrent import normed_backward as recurrent_normed_backward
from fastseq.kernels.recurrent import (
    persistent as recurrent_persistent,
)
from fastseq.kernels.recurrent import (
    persistent_backward as recurrent_persistent_backward,
)
from fastseq.kernels.recurrent import tuning
from triton_support import SHARED_LIMIT, Compiled, compile_for

# What every argument points at, or is: "x" the dtype of x, "w" what widens to fp32.
_LONG = {"lengths": "*i64", "reset": "*u1", "arrived": "*i32"}
_WIDE = {"states", "dstates", "dh_n", "dc_n", "carry", "dc_carry", "carry_in", "carry_out", "z"}
# What few calls have, with what the launches make of it; None where it is absent.
OPTIONS = {
    "mask": ("state_mask", "read_in", "read_out"),
    "zoneout": ("zoneout_h", "zoneout_c"),
    "state": ("reset_h", "reset_c", "put_in", "dreset_h", "dreset_c"),
}
_NUMBERS = {"T", "B", "t", "later", "given", "first", "direction", "x_t", "x_b", "reset_t", "reset_b", "I", "H", "P"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants, as a launch would compile it."""

    kernel: str
    cell: str
    dtype: str
    tiles: tuning.Sequence | tuning.Step
    save: bool = True
    phase: int = 0
    fused: bool = False
    projected: bool = False
    final: bool = False
    aligned: bool = True
    precision: str = ""
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        t = self.tiles
        wide = "" if self.aligned else "-odd"
        shape = f"H{t.units}s{t.stages}" if isinstance(t, tuning.Sequence) else f"{t.block_b}x{t.block_n}x{t.block_k}"
        flags = [n for n in ("save", "fused", "projected", "final") if getattr(self, n)]
        parts = [self.kernel, self.cell, self.dtype, shape, *flags, *(["phase1"] if self.phase else []), *self.options]
        return "-".join(parts) + wide + (f"-{self.precision}" if self.precision else "")

    def compile(self, target: str) -> Compiled:
        kernel, types, constants, options = self.source(target)
        return compile_for(target, kernel, types, constants, **options)

    def source(self, target: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        """The kernel, the types of its run-time arguments, its constants, and the compiler's options."""
        kernel = kernel_named(self.kernel)
        t = self.tiles
        precision = self.precision or ("tf32x3" if self.dtype == "fp32" and not target.startswith("gfx") else "ieee")
        constants: dict[str, Any] = {
            "CELL": self.cell,
            "SAVE": self.save,
            "PHASE": self.phase,
            "FUSE_X": self.fused,
            "PROJECTED": self.projected,
            "FINAL": self.final,
            "BLOCK_B": t.block_b,
            "PRECISION": precision,
            "UPCAST": False,
        }
        options: dict[str, Any] = {"num_warps": t.num_warps}
        if isinstance(t, tuning.Sequence):
            constants |= {"BLOCK_H": t.block_h, "TAIL": t.tail, "STAGES": t.stages}
        else:
            constants |= {"BLOCK_N": t.block_n, "BLOCK_K": t.block_k}
            options["num_stages"] = t.num_stages
        if isinstance(t, tuning.Persistent):
            options["launch_cooperative_grid"] = True
        if not target.startswith("gfx"):
            options["maxnreg"] = tuning.MAX_REGISTERS
        names = kernel.arg_names
        if self.fused or tuning.GATES[self.cell] == 1:  # nothing is carried in float32 to a later step
            constants["carry_out"] = None
        constants |= dict.fromkeys(self._absent())
        constants = {name: value for name, value in constants.items() if name in names}
        types = {name: self._type(name) for name in names if name not in constants}
        return kernel, types, constants, options

    def _absent(self) -> Iterator[str]:
        """Which arguments of options are None."""
        for option, names in OPTIONS.items():
            yield from names if option not in self.options else ()
        if self.fused:
            yield "read_out"
        if self.kernel == "forward_projection" and "zoneout" not in self.options:
            yield from ("reset", "reset_t", "reset_b")
        if self.projected and self.kernel == "forward_step":
            yield "read_out"
        if self.projected or not tuning.HAS_C[self.cell]:
            yield "zoneout_c"
        if not tuning.HAS_C[self.cell]:
            yield from ("reset_c", "dreset_c")
        if self.kernel == "backward_state" and not self.projected:
            yield "zoneout_h"

    def _type(self, name: str) -> str:
        if name in _NUMBERS:
            return "i32:16" if self.aligned and name in ("I", "H", "P") else "i32"
        if name in _LONG:
            return _LONG[name] + ":16"
        wide = name in _WIDE and not (self.fused and name == "carry_in")
        wide = wide or (name.startswith("dreset") and not isinstance(self.tiles, tuning.Sequence | tuning.Persistent))
        return ("*fp32" if wide else f"*{self.dtype}") + ":16"


def kernel_named(name: str) -> Any:
    modules = (
        recurrent, recurrent_backward, recurrent_persistent, recurrent_persistent_backward, recurrent_normed,
        recurrent_normed_backward,
    )  # fmt: skip
    return next(getattr(m, name) for m in modules if hasattr(m, name))


def shares_of(cell: str, options: Sequence[str]) -> int | None:
    """How many of zoneout's shares a step reads, as the tables of tiles have it."""
    return (1 + tuning.HAS_C[cell]) * ("zoneout" in options) if options else None


def variants(
    target: str, dtypes: Sequence[str] = ("bf16", "fp16", "fp32"), options: tuple[str, ...] = ()
) -> Iterator[Variant]:
    """Every variant that the tables can ask for on a target, of layers whose H, P and I are multiples of 16, with some
    of OPTIONS."""
    yield from (replace(v, options=options) for v in _variants(target, dtypes, options))


def _variants(target: str, dtypes: Sequence[str], options: tuple[str, ...]) -> Iterator[Variant]:
    shared = SHARED_LIMIT[target]
    for dtype in dtypes:
        for cell in tuning.GATES:
            gated, shares = tuning.GATES[cell] > 1, shares_of(cell, options)
            for tile in tuning.sequence_tiles(cell, dtype, shared, False, shares):
                for save in (True, False) if gated else (False,):
                    yield Variant("forward_sequence", cell, dtype, tile, save)
            for tile in tuning.sequence_tiles(cell, dtype, shared, True, shares):
                yield Variant("backward_sequence", cell, dtype, tile)
            for tile in tuning.persistent_tiles(dtype, shares) if not target.startswith("gfx") else ():
                for save in (True, False) if gated else (False,):
                    yield Variant("forward_persistent", cell, dtype, tile, save)
                yield Variant("backward_persistent", cell, dtype, tile)
            for step in tuning.step_tiles(dtype):
                phases = (0, 1) if cell == "gru_reset_before" else (0,)
                for projected in (False, True) if tuning.HAS_C[cell] else (False,):
                    for phase in phases:
                        for save in (True, False) if gated else (False,):
                            for fused in (False, True):
                                yield Variant("forward_step", cell, dtype, step, save, phase, fused, projected)
                        yield Variant("backward_step", cell, dtype, step, phase=phase, projected=projected)
                yield Variant("backward_state", cell, dtype, step, final=True)
                if tuning.HAS_C[cell]:
                    yield Variant("backward_state", cell, dtype, step, projected=True)
                    yield Variant("forward_projection", cell, dtype, step)
