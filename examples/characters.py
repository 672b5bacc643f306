"""A character model that learns Python from the standard library's own sources, and writes some of its own.

    pip install torch .
    python examples/characters.py

The layer of torch.nn is patched by one line; training and the writing, a character at a time, are as they were.
"""

import argparse

import torch
from torch import Tensor, nn

import fastseq
from fastseq.demo.data import Text, load


class Model(nn.Module):
    """Characters in, scores of the next one out."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.read = nn.Linear(width, symbols)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ids [B,T] -> scores [B,T,symbols], and the state to go on from."""
        y, state = self.lstm(self.embed(ids), state)
        return self.read(y), state


@torch.inference_mode()
def write(model: Model, text: Text, prompt: str, count: int) -> str:
    """Go on from a prompt: each step takes one character and the state that the step before has left."""
    scores, state = model(text.ids(prompt)[None])
    written = []
    for _ in range(count):
        drawn = torch.multinomial(torch.softmax(scores[:, -1] / 0.6, -1), 1)
        written.append(text.symbols[int(drawn)])
        scores, state = model(drawn, state)
    return prompt + "".join(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=96)
    options = parser.parse_args()
    torch.manual_seed(0)
    text = load(None, 65)
    model = Model(len(text.symbols), options.width)
    print(fastseq.patch(model))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(options.steps):
        ids, following = text.batch(16, 64, generator)
        loss = nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss, nats a character: {losses[0]:.2f} at first, {sum(losses[-10:]) / 10:.2f} after {len(losses)} steps")
    print(f"\n{write(model, text, 'def ', 160)}")


if __name__ == "__main__":
    main()
