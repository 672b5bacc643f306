"""Causal attention over a sequence that is divided among processes, two ways, compared with one process's result.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Each process has an equal block of queries, keys and values. `all_gather` collects the keys and values of all; `ring`
passes them on from process to process and merges what its queries saw of each block. NCCL where there are GPUs, gloo
elsewhere.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

import fastseq


class Gather(torch.autograd.Function):
    """The blocks of all processes, [world, ...]; backward each gets the sum of all gradients of its own block."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        blocks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, x.contiguous())
        return torch.stack(blocks)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # a reduce_scatter moves half as much, but gloo has none
        return grad[dist.get_rank()]


class Pass(torch.autograd.Function):
    """A block goes to the next process, and the previous one's comes; backward its gradient returns the same way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return Pass.exchange(x, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Pass.exchange(grad, -1)

    @staticmethod
    def exchange(x: Tensor, step: int) -> Tensor:
        rank, world = dist.get_rank(), dist.get_world_size()
        x, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        send = dist.P2POp(dist.isend, x, (rank + step) % world)
        receive = dist.P2POp(dist.irecv, received, (rank - step) % world)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        return received


def all_gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query of the block sees the last key of the block, so the keys after it are cut off."""
    seen = [torch.cat(Gather.apply(x)[: dist.get_rank() + 1].unbind(), 2) for x in (k, v)]
    return fastseq.attention(q, *seen, causal=True)


def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A block of an earlier process is seen whole, one's own under the causal limit, a later one not at all: it has no
    valid keys then, so that its lse is -inf. It takes part all the same, or its gradient would not be sent on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = []
    block = torch.stack((k, v))  # one message
    for step in range(world):
        if step > 0:
            block = Pass.apply(block)
        owner = (rank - step) % world
        valid = torch.full((q.shape[0],), 0 if owner > rank else k.shape[2], device=q.device)
        parts.append(fastseq.attention(q, *block, causal=step == 0, lengths_k=valid, return_lse=True))
    return fastseq.merge_attention(*zip(*parts, strict=True))[0]


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit("start it with: torchrun --nproc-per-node 2 examples/context_parallel.py")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same tensors in every process
    whole = [torch.randn(2, heads, 64 * world, 32, device=device, requires_grad=True) for heads in (8, 2, 2)]
    o = fastseq.attention(*whole, causal=True)
    o.square().sum().backward()
    for way in (all_gather, ring):
        own = [x.detach().chunk(world, 2)[rank].clone().requires_grad_() for x in whole]
        part = way(*own)
        part.square().sum().backward()
        torch.testing.assert_close(part, o.chunk(world, 2)[rank], atol=1e-4, rtol=1e-4)
        for x, mine in zip(whole, own, strict=True):
            assert x.grad is not None
            torch.testing.assert_close(mine.grad, x.grad.chunk(world, 2)[rank], atol=1e-4, rtol=1e-4)
        if rank == 0:
            print(f"{way.__name__}: output and gradients equal those of one process", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
