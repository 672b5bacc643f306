"""The reader of machine code finds a register that a path leaves unset, and nothing in code that is right."""

from __future__ import annotations

import pytest
from sass import unset_registers


def listing(*instructions: str) -> str:
    lines = [f"        /*{16 * n:04x}*/                   {x} ;   /* 0x0 */" for n, x in enumerate(instructions)]
    return "\tcode for sm_90a\n\t\tFunction : kernel\n" + "\n".join(lines)


# A loop from 0x0020 on, which a branch may pass over.
LOOP = ["UMOV UR7, 0x400", "@!P0 BRA 0x70", "UIADD3 UR4, UP0, UR7, 0x20, URZ", "UIADD3.X UR5, URZ, URZ, URZ, UP0, !UPT"]
PRODUCT = "HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56"
RIGHT = {
    "a loop": [*LOOP, "IMAD.U32 R1, RZ, RZ, UR4", "@P1 BRA 0x20", "NOP", "EXIT", "BRA 0x80"],
    "b alone is described": ["UMOV UR10, 0x4", "UMOV UR11, 0x4", PRODUCT, "EXIT"],
    "set on both ways": ["@P0 BRA 0x30", "UMOV UR4, 0x1", "BRA 0x40", "UMOV UR4, 0x2", "S2R R1, UR4", "EXIT"],
    "a pair at once": ["ULDC.64 UR4, c[0x0][0x208]", "LDG.E R1, desc[UR4][R2.64]", "EXIT"],
    "factors of 32 bits": ["UMOV UR4, 0x1", "UIMAD.WIDE UR6, UR4, UR4, URZ", "UIADD3.64 UR8, UR6, 0x2, URZ", "EXIT"],
    "after the end": ["EXIT", "UIADD3 UR4, UR4, 0x1, URZ"],
}
WRONG = {
    "never set": (["UIADD3 UR4, UP0, UR4, 0x20, URZ", "EXIT"], ["UIADD3 UR4"]),
    "passed over": ([*LOOP, "NOP", "NOP", "NOP", "MOV R1, UR5", "EXIT"], ["MOV R1"]),
    "half a pair": (["UMOV UR4, 0x1", "LDG.E R1, desc[UR4][R2.64]", "EXIT"], ["LDG.E R1"]),
    "half a descriptor": (["UMOV UR10, 0x4", PRODUCT, "EXIT"], ["HGMMA"]),
    "a is described too": (["UMOV UR10, 0x4", "UMOV UR11, 0x4", PRODUCT.replace("R24, ", ""), "EXIT"], ["HGMMA"]),
    "an addend of 64 bits": (["UMOV UR4, 0x1", "UIMAD.WIDE UR6, UR4, UR4, UR4", "EXIT"], ["UIMAD"]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_code_that_is_right(name: str) -> None:
    assert unset_registers(listing(*RIGHT[name])) == []


@pytest.mark.parametrize("name", WRONG)
def test_code_that_reads_an_unset_register(name: str) -> None:
    instructions, expected = WRONG[name]
    found = unset_registers(listing(*instructions))
    assert len(found) == len(expected)
    assert all(f"kernel: {start}" in text for text, start in zip(found, expected, strict=True))
