"""A server that steps one recurrent model for many clients at once, and a load test of it over loopback.

    python examples/stream_server.py --clients 256 --seconds 5

Each connection is a session. A client sends a chunk of float32, waits for the model's answer to it, and goes on. The
server steps all chunks that have come while it computed the step before as one batch of fastseq.Streams; the load test
shows that beside one call a session. The model is Silero's voice activity detector where its package is installed
(pip install --no-deps silero-vad), which has a chunk each 32 ms, else an LSTM of random weights, taken to have as many.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

import fastseq

PERIOD = 512 / 16000  # seconds of sound in a chunk


class Voice(nn.Module):
    """How likely it is that somebody speaks: chunks [n, 576] of sound of 16 kHz, of which the first 64 samples are the
    last of the chunk before, to [n, 1]. The architecture is that of the package silero-vad (MIT licence)."""

    inputs = 576

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        sizes, strides = (129, 128, 64, 64, 128), (1, 2, 2, 1)
        for i, stride in enumerate(strides):
            self.add_module(f"conv{i + 1}", nn.Conv1d(sizes[i], sizes[i + 1], 3, stride, 1))
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = self.stft_conv(nn.functional.pad(x, (0, 64), mode="reflect").unsqueeze(1)).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for i in range(1, 5):
            x = self.get_submodule(f"conv{i}")(x).relu()
        h, _ = self.lstm_cell(x.squeeze(-1))
        return self.final_conv(h.relu().unsqueeze(-1)).sigmoid().squeeze(-1)


def build() -> tuple[nn.Module, int]:
    """A model, and the floats of a chunk."""
    package = importlib.util.find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        return fastseq.nn.LSTM(64, 128).eval(), 64
    saved = torch.jit.load(Path(package.submodule_search_locations[0], "data", "silero_vad.jit")).state_dict()
    weights = [weight for name, weight in saved.items() if name.startswith("_model.")]  # of 16 kHz, in forward's order
    model = Voice().eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    fastseq.patch(model)
    return model, model.inputs


class Server:
    """Steps what its clients send; ``most`` sessions at a time."""

    def __init__(self, streams: fastseq.Streams, inputs: int, most: int) -> None:
        self.streams, self.size, self.most = streams, 4 * inputs, most
        self.waiting: deque[tuple[int, bytes, asyncio.Future[bytes]]] = deque()
        self.stepping: asyncio.Task | None = None

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection. Its next chunk is read when the last one is answered: no session is twice in a batch, and none
        is closed within a step."""
        with contextlib.closing(writer), contextlib.ExitStack() as at_the_end:
            session = self.streams.open()
            at_the_end.callback(self.streams.close, session)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # it hung up
                while chunk := await reader.readexactly(self.size):
                    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
                    self.waiting.append((session, chunk, answer))
                    if self.stepping is None:
                        self.stepping = asyncio.create_task(self.step())
                    writer.write(await answer)

    async def step(self) -> None:
        """Step until nobody waits. What comes during a step is the next batch: no timer, and no idling at work."""
        while self.waiting:
            await asyncio.sleep(0)  # for all that has come already
            batch = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
            ids, chunks, answers = zip(*batch, strict=True)
            x = torch.frombuffer(bytearray().join(chunks), dtype=torch.float32).view(len(ids), -1)
            try:
                one = len(ids) == 1  # it is over sooner than a thread would begin it
                y = (self.streams.step(x, ids) if one else await asyncio.to_thread(self.streams.step, x, ids)).numpy()
            except Exception as error:  # no session has changed; the clients of this batch are hung up on
                for answer in answers:
                    answer.set_exception(error)
            else:
                for answer, row in zip(answers, y, strict=True):
                    answer.set_result(row.tobytes())
        self.stepping = None


async def talk(port: int, chunks: list[bytes], size: int, until: float) -> tuple[list[float], list[bytes]]:
    """A client that sends its chunks in turn, until a time of time.monotonic(): how long each answer took, and it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took: list[float] = []
    answers: list[bytes] = []
    while len(took) < len(chunks) or time.monotonic() < until:
        sent = time.perf_counter()
        writer.write(chunks[len(took) % len(chunks)])
        answers.append(await reader.readexactly(size))
        took.append(time.perf_counter() - sent)
    writer.close()
    return took, answers


def load(port: int, clients: int, chunks: list[bytes], size: int, seconds: float) -> list[float]:
    """Seconds that each answer took, of so many clients at once."""

    async def together() -> list[float]:
        until = time.monotonic() + seconds
        done = await asyncio.gather(*[talk(port, chunks, size, until) for _ in range(clients)])
        return [one for took, _ in done for one in took]

    return asyncio.run(together())


async def measure(most: int, clients: int, seconds: float) -> str:
    """A line of the table. The clients are in a process of their own, so that the server's time is this one's."""
    model, inputs = build()
    streams, loop = fastseq.Streams(model, 2 * clients), asyncio.get_running_loop()
    session = streams.open()
    size = streams.step(torch.zeros(1, inputs), [session]).nbytes
    streams.close(session)
    server = await asyncio.start_server(Server(streams, inputs, most).client, "127.0.0.1", 0, backlog=clients)
    chunks = [torch.randn(inputs).mul(0.1).numpy().tobytes() for _ in range(4)]
    given = server.sockets[0].getsockname()[1], clients, chunks, size
    with ProcessPoolExecutor(1, get_context("spawn")) as others:
        await loop.run_in_executor(others, load, *given, 0.2)  # what first calls cost does not count
        begun = time.process_time()
        took = sorted(await loop.run_in_executor(others, load, *given, seconds))
        cpu = time.process_time() - begun
    server.close()
    p50, p99 = (1e3 * took[int(len(took) * p)] for p in (0.5, 0.99))
    title = "one call a session" if most == 1 else f"batches of up to {most}"
    return f"{title:22}{p50:10.1f} ms{p99:10.1f} ms{len(took) / seconds:12,.0f}{len(took) / cpu * PERIOD:18,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of the two measurements")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{type(build()[0]).__name__}, {options.clients} clients, each of which waits for its answer; one thread")
    print(f"{'':22}{'p50':>13}{'p99':>13}{'steps / s':>12}{'sessions a core':>18}")
    for most in (options.clients, 1):
        print(asyncio.run(measure(most, options.clients, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
