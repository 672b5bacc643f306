"""What machine code of NVIDIA GPUs says: uniform registers that are read before anything has been put in them.

A compiler that makes such code has lost a value. ptxas of CUDA 12.8 does, with the descriptors that wgmma reads shared
memory by, where two layouts follow each other in one place: nothing is said, and the product is of the wrong memory.
"""

from __future__ import annotations

import re

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"(\bg?desc\[)?\bUR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P[T\d]")
_WRITES = ("U", "R2UR", "S2UR", "CS2UR", "REDUX", "CREDUX", "VOTEU", "LDCU", "ELECT")
_WRITES_NOT = ("UISETP", "UPLOP", "UTMA", "UBLK", "UTC", "UCGABAR", "UCP", "USETMAXREG", "USETP")


def registers(opcode: str, operands: list[str]) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads, and those that it writes."""
    wide, product = ".64" in opcode, ".WIDE" in opcode  # whose factors are of 32 bits
    reads: set[int] = set()
    writes: set[int] = set()
    if opcode.startswith(_WRITES) and not opcode.startswith(_WRITES_NOT):
        place = next((n for n, x in enumerate(operands) if not _PREDICATE.match(x)), len(operands))
        if place < len(operands) and (found := re.fullmatch(r"UR(\d+)", operands[place])):
            first = int(found[1])
            count = 2 if wide or product else 4 if ".128" in opcode else 1
            writes = set(range(first, first + count))
            operands = operands[place + 1 :]
    for place, operand in enumerate(operands):
        for kind, number in _REGISTER.findall(operand):
            first = int(number)
            if kind == "gdesc[" and opcode.startswith("HGMMA"):  # of a and of b, 64 bits each; b's alone where a is in
                reads |= {first + 2, first + 3}  # registers
                if not re.match(r"R\d", operands[1]):
                    reads |= {first, first + 1}
            else:
                pair = kind or (writes and (wide or (product and place == 2)))
                reads |= {first, first + 1} if pair else {first}
    return reads, writes


def unset_registers(listing: str) -> list[str]:
    """Instructions of a listing by ``cuobjdump -sass`` that some path reaches with a register unset."""
    found = []
    parts = _FUNCTION.split(listing)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        code = [(int(address, 16), guard, opcode, rest) for address, guard, opcode, rest in _INSTRUCTION.findall(body)]
        places = {address: n for n, (address, *_) in enumerate(code)}
        effects = [registers(opcode, re.split(r",\s*", rest)) for _, _, opcode, rest in code]
        surely: list[set[int] | None] = [None] * len(code)  # what has been set by every path to an instruction
        waiting: list[tuple[int, set[int]]] = [(0, set())]
        while waiting:
            n, have = waiting.pop()
            while n < len(code):
                before = surely[n]
                have = set(have) if before is None else before & have
                if have == before:
                    break
                surely[n] = have
                have = have | effects[n][1]
                _, guard, opcode, rest = code[n]
                always = not guard and not _PREDICATE.match(rest) and ".DIV" not in opcode and ".CONV" not in opcode
                if opcode.startswith(("BRA", "CALL", "JMP")) and (target := re.search(r"\b0x([0-9a-f]+)$", rest)):
                    waiting.append((places[int(target[1], 16)], have))
                if always and opcode.startswith(("BRA", "JMP", "EXIT", "RET")):
                    break
                n += 1
        found += [
            f"{name}: {code[n][2]} {code[n][3]}"
            for n, have in enumerate(surely)
            if have is not None and not effects[n][0] <= have
        ]
    return found
