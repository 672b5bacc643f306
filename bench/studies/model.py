"""The least time a step of the Triton recurrent kernels can take on an H200, from counted bytes, products, barriers.

A floor to compare a measured time with, not a prediction: every part runs at its limit, and of two that can overlap the
longer one counts. The counts come from the kernels (kernels/recurrent/*.py) and their tiles, the limits are below.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from fastseq.kernels.recurrent import tuning

from bench.cases import DTYPES
from bench.formats import NONE, duration, markdown, time_of
from bench.gpu.auto import OURS
from bench.gpu.cases import Heads
from bench.gpu.report import best_peer, load
from bench.gpu.tables import NOTHING
from bench.report import Document
from bench.studies import model_attention


@dataclass(frozen=True)
class Machine:
    """Limits of a GPU. Measured on one: copy and product. The others follow from its architecture, or are assumed."""

    name: str = "H200"
    shared: int = 227 * 1024  # bytes that a program may have
    sms: int = 132
    clock: float = 1.755e9  # Hz
    copy: float = 4.3e12  # bytes/s from memory, read and written (measured)
    l2: float = 5.5e12  # bytes/s from L2 (assumed)
    shared_bytes: float = 128.0  # bytes a clock from an SM's shared memory
    latency_l2: float = 0.6e-6  # s to read what another SM has just written (assumed)
    barrier: float = 30.0  # clocks of one barrier among the warps of a program (assumed)
    gates: float = 150.0  # clocks from the product to h: sigmoid, tanh, and their dependencies (assumed)
    launch: float = 1.6e-6  # s between kernels that follow each other in a CUDA graph (assumed)
    host: float = 3.4e-6 + 2.0e-6  # s of the host for a launch: ours and Triton's (measured), the driver's (assumed)

    def operations(self, dtype: str) -> float:
        """Operations a second: 16 bits as measured; float32 as three TF32 products, at half of that each."""
        return 780e12 if dtype != "fp32" else 780e12 / 2 / 3


H200 = Machine()

BARRIERS = {"rnn_tanh": 4, "rnn_relu": 4, "lstm": 6, "gru": 4, "gru_reset_before": 6, "lstm_coupled": 6}
"""Barriers of one step of the sequence role as compiled for sm_90: bf16, H = 128, without a tape (8 more with it)."""


@dataclass(frozen=True)
class Floor:
    """Seconds of one step, part by part."""

    role: str
    product: float
    weights: float
    traffic: float
    synchronisation: float
    host: float = 0.0  # of the host, which launches while the GPU works

    @property
    def step(self) -> float:
        """Products, weights and the traffic of gates and outputs overlap; what synchronises does not."""
        return max(self.product, self.weights, self.traffic) + self.synchronisation


def floor(
    cell: str, dtype: str, batch: int, hidden: int, machine: Machine = H200, role: str | None = None
) -> Floor | None:
    """The floor of one forward step, in the role that the tables give this layer on that machine, or in a named one.

    None where the machine cannot give it that role.
    """
    size, gates = tuning.BYTES[dtype], tuning.GATES[cell]
    tile = tuning.sequence(cell, dtype, hidden, machine.shared, False)
    traffic = batch * hidden * (gates + 1) * size / machine.copy  # gates_x in, y out
    if role == "sequence" and isinstance(tile, str):
        return None
    if role in (None, "sequence") and isinstance(tile, tuning.Sequence):
        programs = -(-batch // tile.block_b)
        waves = -(-programs // machine.sms)
        a_sm = machine.operations(dtype) / machine.sms / 2  # 16 rows of mma.sync reach half of the peak
        product = waves * 2 * tile.block_b * gates * tile.units**2 / a_sm
        weights = waves * gates * tile.units**2 * size / machine.shared_bytes / machine.clock
        synchronisation = waves * (BARRIERS[cell] * machine.barrier + machine.gates) / machine.clock
        return Floor("sequence", product, weights, traffic, synchronisation)
    persistent = tuning.persistent(dtype, batch, hidden, machine.sms)
    if role == "persistent" and isinstance(persistent, str):
        return None
    step = persistent if role == "persistent" and not isinstance(persistent, str) else tuning.step(dtype, batch)
    meetings = 2 if cell == "gru_reset_before" else 1
    over_batch = -(-batch // step.block_b)
    programs = -(-hidden // step.block_n) * over_batch
    used = min(programs, machine.sms)
    rows = over_batch * step.block_b
    product = 2 * rows * gates * hidden**2 / (machine.operations(dtype) * used / machine.sms)
    weights = over_batch * gates * hidden**2 * size / (machine.l2 * used / machine.sms)
    between = machine.launch if role != "persistent" else 0.0  # there only what another program has written must arrive
    synchronisation = meetings * (between + machine.latency_l2 + machine.gates / machine.clock)
    if role == "persistent":
        return Floor(role, product, weights, traffic, synchronisation)
    return Floor("step", product, weights, traffic, synchronisation, meetings * machine.host)


# --- beside what was measured ---------------------------------------------------------------------------------------


def floors(results: Path) -> str:
    """Measured times beside the floors, for the GPU that these are of: the tables of docs/gpu.md."""
    documents = next((d for name, d in load(results).items() if H200.name in name), {})
    out = []
    if steps := list(_steps(documents.get("recurrent", {"cases": []}))):
        out += ["A step of a layer; the floor, that of the Triton role, has no product of x, the times have it:", ""]
        out += [*markdown(["", "floor", "C++", "Triton", "best peer"], steps, right=True), ""]
    if calls := list(_calls(documents.get("attention", {"cases": []}))):
        shares = [head for name in ("C++", "Triton", "best peer") for head in (name, "of the floor")]
        out += ["A call of attention:", "", *markdown(["", "floor", "bound by", *shares], calls, right=True)]
    return "\n".join(out).strip() or NOTHING


def _steps(document: Document) -> Iterator[list[str]]:
    for case in document["cases"]:
        shape = case.get("shape")
        if not shape or shape["mode"] != "inference" or shape["packed"]:
            continue
        if shape["layers"] > 1 or shape["bidirectional"]:
            continue
        cell = "rnn_tanh" if shape["cell"] == "rnn" else shape["cell"]
        least, peer = floor(cell, DTYPES[shape["dtype"]], shape["batch"], shape["hidden"]), best_peer(case)
        assert least is not None
        ours = [time_of(case["contestants"].get(name), shape["steps"]) for name in OURS]
        theirs = NONE if peer is None else duration(peer[1] / 1e6 / shape["steps"])
        yield [f"`{case['name']}`", duration(least.step), *ours, theirs]


def _calls(document: Document) -> Iterator[list[str]]:
    names = {field.name for field in fields(Heads)}
    for case in document["cases"]:
        if "shape" not in case:
            continue
        least = model_attention.floor(Heads(**{name: case["shape"][name] for name in names}))
        peer = best_peer(case)
        row = [f"`{case['name']}`", duration(least.seconds), least.bound]
        ours = [case["contestants"].get(name, {}).get("median_us") for name in OURS]
        for median in (*ours, peer[1] if peer else None):
            row += [NONE, NONE] if median is None else [duration(median / 1e6), f"{1e8 * least.seconds / median:.0f} %"]
        yield row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench model", description=__doc__)
    parser.add_argument("--dtype", choices=tuning.BYTES, default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 192, 256, 512, 768, 1024])
    parser.add_argument("--role", choices=("sequence", "step", "persistent"), help="by default as the tables choose")
    parser.add_argument("--attention", choices=("core", "all"), nargs="?", const="core",
                        help="attention's cases alone; without options they follow")  # fmt: skip
    options = parser.parse_args(argv)
    if options.attention:
        print("\n".join(model_attention.lines(model_attention.cases(options.attention == "all"))))
        return 0
    print(f"floor of one forward step on an {H200.name}, {options.dtype}, microseconds (product of x not included);")
    print("host: what the host takes to launch it, where no CUDA graph does that, at the same time")
    widths = {"product": 9, "weights": 9, "traffic": 9, "sync": 7, "step": 8, "host": 7}
    print(f"{'cell':18}{'B':>5}{'H':>6}  {'role':11}" + "".join(f"{name:>{n}}" for name, n in widths.items()))
    for cell in tuning.GATES:
        if cell == "rnn_relu":  # as rnn_tanh
            continue
        for batch in options.batch:
            for hidden in options.hidden:
                f = floor(cell, options.dtype, batch, hidden, role=options.role)
                if f is None:
                    continue
                parts = (f.product, f.weights, f.traffic)
                print(
                    f"{cell:18}{batch:5}{hidden:6}  {f.role:11}"
                    + "".join(f"{1e6 * part:9.3f}" for part in parts)
                    + f"{1e6 * f.synchronisation:7.2f}{1e6 * f.step:8.2f}{1e6 * f.host:7.1f}"
                )
    if not argv:
        print("\n" + "\n".join(model_attention.lines(model_attention.cases(False))))
    return 0
