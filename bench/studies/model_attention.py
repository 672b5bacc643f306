"""The least time attention can take on an H200, case by case: products, exponentials, bytes (python -m bench model).

Each part runs at its limit, and on Hopper the three overlap, so the floor is the longest of them. No kernel is faster
than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu.cases import Heads, attention_core, attention_grid


@dataclass(frozen=True)
class Limits:
    """Of an H200: product and copy measured on one, exponentials by its architecture (16 a clock in each SM)."""

    name: str = "H200"
    product: float = 780e12  # operations a second, 16 bits
    exponentials: float = 132 * 16 * 1.755e9  # a second
    copy: float = 4.3e12  # bytes a second, read and written


H200 = Limits()


@dataclass(frozen=True)
class Floor:
    """Seconds, part by part."""

    products: float
    exponentials: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.exponentials, self.bytes)

    @property
    def bound(self) -> str:
        parts = {"products": self.products, "exponentials": self.exponentials, "bytes": self.bytes}
        return max(parts, key=lambda name: parts[name])


def floor(case: Heads, limits: Limits = H200) -> Floor:
    """The floor of one call. The backward pass has two kernels, for dK with dV and for dQ. Both need every exponential,
    and the products of the scores and of dP: seven in all, where a single kernel would have five."""
    kernels = 2 if case.training else 1
    products = case.operations * (7 / 5 if case.training else 1)
    exponentials = case.pairs * case.heads * kernels
    return Floor(products / limits.product, exponentials / limits.exponentials, case.bytes / limits.copy)


def cases(everything: bool) -> list[Heads]:
    """Those that a run on a GPU begins with, or all of the grid."""
    found: list[Heads] = list(dict.fromkeys(attention_core()))
    return list(dict.fromkeys([*found, *attention_grid()])) if everything else found


def lines(found: Sequence[Heads]) -> list[str]:
    """The table, a line a case, microseconds; with the rate that the floor comes to, as kernels are quoted."""
    width = max(len(case.name) for case in found)
    out = [f"floor of attention on an {H200.name}, 16 bits, microseconds"]
    out.append(f"{'case':{width}}{'products':>10}{'exp':>10}{'bytes':>10}{'floor':>10}  {'bound by':13}{'TFLOP/s':>8}")
    for case in found:
        f = floor(case)
        parts = "".join(f"{1e6 * part:10.1f}" for part in (f.products, f.exponentials, f.bytes, f.seconds))
        out.append(f"{case.name:{width}}{parts}  {f.bound:13}{case.operations / f.seconds / 1e12:8.0f}")
    return out
