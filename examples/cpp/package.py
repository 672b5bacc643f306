"""Packs a model of fastseq's layers with AOTInductor, for main.cpp: python package.py FOLDER"""

import sys
from pathlib import Path

import torch
from torch.export import Dim

import fastseq


class Tagger(torch.nn.Module):
    """Attention over what a bidirectional LSTM read."""

    def __init__(self, features: int = 16, hidden: int = 32, tags: int = 5) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(features, hidden, bidirectional=True, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(2 * hidden, 4, batch_first=True)
        self.out = torch.nn.Linear(2 * hidden, tags)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, features] -> [B, T, tags]."""
        y, _ = self.lstm(x)
        return self.out(self.attention(y, y, y, need_weights=False)[0])


def main(folder: Path) -> None:
    """Writes model.pt2, for any batch and length, and example.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Tagger().eval()
    fastseq.patch(model)
    batch, steps = Dim("batch", min=1, max=64), Dim("steps", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 7, 16),), dynamic_shapes=({0: batch, 1: steps},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        x = torch.randn(3, 50, 16)  # another batch and length
        torch.save({"x": x, "y": model(x)}, folder / "example.pt")
    print(f"{folder / 'model.pt2'} and {folder / 'example.pt'}; fastseq's library is", end=" ")
    print(Path(fastseq.__file__).with_name("libfastseq.so"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
