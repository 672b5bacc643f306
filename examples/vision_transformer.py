"""A vision transformer of timm, patched before it is trained on drawn pictures.

    pip install torch timm .
    python examples/vision_transformer.py

timm's blocks call torch's scaled_dot_product_attention themselves: `functional=True` sends those calls to fastseq.
"""

import argparse

import timm
import torch
from torch import Tensor, nn

import fastseq

SHAPES = ("ring", "square", "cross")


def draw(count: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Pictures [count, 1, size, size] in noise, of shapes of any place and size; and which shape, int64 [count]."""
    shape = torch.randint(len(SHAPES), (count, 1, 1))
    axis = torch.arange(size, dtype=torch.float32)
    at, radius = 8 + 8 * torch.rand(2, count, 1, 1), 4 + 4 * torch.rand(count, 1, 1)
    y, x = (axis[:, None] - at[0]).abs(), (axis - at[1]).abs()
    ring = ((x * x + y * y).sqrt() - radius).abs() < 1.5
    square = (torch.maximum(x, y) - radius).abs() < 1.5
    cross = ((x - y).abs() < 2) & (x < radius)
    picture = torch.stack((ring, square, cross)).gather(0, shape.expand(1, count, size, size))[0]
    return picture[:, None].float() + 0.3 * torch.randn(count, 1, size, size), shape.flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=24, patch_size=4, in_chans=1, num_classes=len(SHAPES), embed_dim=64, depth=2, num_heads=4, mlp_ratio=2,
    )  # fmt: skip
    pictures, shapes = draw(256)
    model.eval()
    with torch.no_grad():
        before = model(pictures)
        print(fastseq.patch(model, functional=True))
        print(f"largest change of the model's answers: {(model(pictures) - before).abs().max():.1e}")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(options.steps):
        x, wanted = draw(32)
        loss = nn.functional.cross_entropy(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, options.steps - 1):
            print(f"step {step + 1:4}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        right = (model(pictures).argmax(1) == shapes).float().mean()
    print(f"{right:.0%} of {len(shapes)} other pictures are named right")


if __name__ == "__main__":
    main()
