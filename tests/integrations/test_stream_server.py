"""examples/stream_server.py: clients over loopback get what the model gives each of them alone."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastseq

PATH = Path(__file__).resolve().parents[2] / "examples" / "stream_server.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stream_server", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chunks(count: int, inputs: int, seed: int) -> list[torch.Tensor]:
    return list(0.1 * torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)))


async def served(own: Any, streams: fastseq.Streams, inputs: int, size: int, clients: int, most: int) -> list[Any]:
    """What each client got, one of whom hangs up in the middle of a chunk."""
    server = own.Server(streams, inputs, most)
    listener = await asyncio.start_server(server.client, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    _, leaver = await asyncio.open_connection("127.0.0.1", port)
    leaver.write(b"12345")
    sent = [[x.numpy().tobytes() for x in chunks(6, inputs, seed)] for seed in range(clients)]
    found = asyncio.gather(*[own.talk(port, own_chunks, size, 0.0) for own_chunks in sent])
    await asyncio.sleep(0.01)
    leaver.close()
    answers = [answers for _, answers in await found]
    for _ in range(200):  # the server hears of the last goodbye a little later
        if len(streams) == 0:
            break
        await asyncio.sleep(0.01)
    listener.close()
    return answers


@pytest.mark.parametrize("most", [1, 3, 100])
def test_each_client_gets_what_the_model_gives_it_alone(most: int) -> None:
    own = example()
    model, inputs = fastseq.nn.LSTM(16, 24).eval(), 16
    streams = fastseq.Streams(model, 9)
    found = asyncio.run(served(own, streams, inputs, 4 * 24, 8, most))
    for seed, answers in enumerate(found):
        with torch.no_grad():
            want = model(torch.stack(chunks(6, inputs, seed)))[0]
        got = torch.stack([torch.frombuffer(bytearray(answer), dtype=torch.float32) for answer in answers])
        torch.testing.assert_close(got, want)
    assert len(streams) == 0  # all have hung up


def test_the_load_test_prints_a_line_for_batches_and_one_for_single_calls() -> None:
    command = [sys.executable, str(PATH), "--clients", "6", "--seconds", "0.3"]
    package = str(Path(fastseq.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    number = r" +[\d.,]+"
    for title in ("batches of up to 6", "one call a session"):
        assert re.search(rf"^{title}{number} ms{number} ms{number}{number}$", done.stdout, re.M), done.stdout


def test_the_detector_of_the_package_gives_what_the_package_gives() -> None:
    package = importlib.util.find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package silero-vad, whose trained weights this is about, is not installed")
    model, inputs = example().build()
    theirs = torch.jit.load(Path(package.submodule_search_locations[0], "data", "silero_vad.jit"))
    streams = fastseq.Streams(model, 3)
    ids = [streams.open() for _ in range(3)]
    sound = torch.nn.functional.pad(torch.stack(chunks(3, 512 * 10, 0)), (64, 0))
    with torch.no_grad():
        for start in range(64, sound.shape[1], 512):
            want = theirs(sound[:, start : start + 512], 16000)
            torch.testing.assert_close(
                streams.step(sound[:, start - 64 : start + 512], ids), want, rtol=1e-4, atol=1e-5
            )
    assert inputs == 576
