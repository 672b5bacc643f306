"""The signatures of the Triton kernels of normalised layers, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastseq.kernels.recurrent import normed_tuning, tuning
from triton_recurrent_support import kernel_named
from triton_support import SHARED_LIMIT, Compiled, compile_for

_LONG = {"lengths": "*i64", "reset": "*u1"}
_WIDE = {"states", "dstates", "dh_n", "dc_n", "stats", "product", "back", "h_in", "h_out", "found"}
_NUMBERS = {"T", "B", "t", "later", "given", "first", "direction", "x_t", "x_b", "reset_t", "reset_b", "H", "R", "N",
            "width"}  # fmt: skip


@dataclass(frozen=True)
class NormVariant:
    """One kernel with its constants, as a launch would compile it."""

    kernel: str
    cell: str
    joint: bool
    dtype: str
    tile: tuning.Sequence | None = None
    hidden: int = 0  # of the step role
    save: bool = True
    masked: bool = False
    of_c: bool = False

    def __str__(self) -> str:
        size = f"H{self.tile.units}s{self.tile.stages}" if self.tile else f"H{self.hidden}"
        flags = [n for n in ("joint", "save", "masked", "of_c") if getattr(self, n)]
        return "-".join([self.kernel, self.cell, self.dtype, size, *flags])

    def compile(self, target: str) -> Compiled:
        kernel, types, constants, options = self.source(target)
        return compile_for(target, kernel, types, constants, **options)

    def source(self, target: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        """The kernel, the types of its run-time arguments, its constants, and the compiler's options."""
        kernel = kernel_named(self.kernel)
        exact = self.dtype == "fp32" and not target.startswith("gfx")
        constants: dict[str, Any] = {
            "CELL": self.cell, "JOINT": self.joint, "SAVE": self.save, "UPCAST": False,
            "PRECISION": "tf32x3" if exact else "ieee",
            "OF_C": self.of_c, "RESET_GATE": self.cell == "gru" and not self.joint,
        }  # fmt: skip
        options: dict[str, Any] = {"num_warps": 4}
        if self.tile is not None:
            constants |= {"BLOCK_B": self.tile.block_b, "BLOCK_H": self.tile.block_h, "STAGES": self.tile.stages}
            options = {"num_warps": self.tile.num_warps}
            if not target.startswith("gfx"):
                options["maxnreg"] = tuning.MAX_REGISTERS
        elif self.kernel == "gain_gradients":
            constants |= dict(zip(("BLOCK_R", "BLOCK_N"), normed_tuning.GAIN_TILE, strict=True))
        else:
            constants["BLOCK_N"], options["num_warps"] = normed_tuning.step(self.hidden)
        names = kernel.arg_names
        if not self.masked:
            constants["state_mask"] = None
        constants = {name: value for name, value in constants.items() if name in names}
        return kernel, {name: self._type(name) for name in names if name not in constants}, constants, options

    def _type(self, name: str) -> str:
        if name in _NUMBERS:
            return "i32:16" if name in ("H", "N", "width") else "i32"
        if name in _LONG:
            return _LONG[name] + ":16"
        wide = name in _WIDE or (name == "normal" and self.of_c)
        return ("*fp32" if wide else f"*{self.dtype}") + ":16"


def sequence_variants(target: str, dtype: str) -> Iterator[NormVariant]:
    """Every variant of the sequence role that the tables can ask for on a target, of layers whose H 16 divides."""
    for cell, joint in normed_tuning.FORMS:
        for backward in (False, True):
            for tile in normed_tuning.sequence_tiles(cell, dtype, SHARED_LIMIT[target], backward):
                for masked in (False, True):
                    kernel = f"normed_{'backward' if backward else 'forward'}_sequence"
                    for save in (True,) if backward else (True, False):
                        yield NormVariant(kernel, cell, joint, dtype, tile, save=save, masked=masked)


def step_variants(dtype: str) -> Iterator[NormVariant]:
    """The step role's variants at some sizes, of one block of units and of several."""
    for cell, joint in normed_tuning.FORMS:
        for hidden in (32, 512, 4096):
            for masked in (False, True):
                for save in (True, False):
                    yield NormVariant("normed_forward_step", cell, joint, dtype, None, hidden, save, masked)
                yield NormVariant("normed_backward_step", cell, joint, dtype, None, hidden, True, masked)
        yield NormVariant("gain_gradients", cell, joint, dtype)
        if tuning.HAS_C[cell]:
            yield NormVariant("gain_gradients", cell, joint, dtype, of_c=True)
