"""Train one of the demo's models on several processes, with DDP or FSDP2, and go on from a distributed checkpoint.

    torchrun --nproc-per-node 2 examples/distributed.py --model lstm --steps 200

With `--steps 400 --fsdp` it then goes on from step 200. Ctrl-C ends all processes after the same step, and saves.
NCCL where there are GPUs, gloo elsewhere.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastseq
from fastseq.demo.data import load
from fastseq.demo.models import KINDS


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint that is complete; returns its step, 0 where there is none."""
    newest = max((int(path.parent.name[5:]) for path in folder.glob("step-*/.metadata")), default=0)  # written last
    if newest:
        state = state_of(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder / f"step-{newest:06}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return newest


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world, kind = dist.get_rank(), dist.get_world_size(), KINDS[args.model]
    text = load(None, kind.length + 1)
    torch.manual_seed(0)
    model = kind.build(len(text.symbols)).to(device)
    report = fastseq.patch(model)
    if args.fsdp:
        fully_shard([m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.MultiheadAttention))])
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), kind.learning_rate)
    first = resume(args.checkpoints, model, optimizer)
    batch = max(1, kind.batch // world)
    if rank == 0:
        how = f"{'FSDP2' if args.fsdp else 'DDP'} on {world} processes of {device.type}, {batch} rows each"
        print(f"{kind.title}, {len(report)} on fastseq; {how}; steps {first} to {args.steps}", flush=True)
    stops: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):  # torchrun passes on what it gets
        signal.signal(name, lambda number, frame: stops.append(number))
    start = time.perf_counter()
    for step in range(first + 1, args.steps + 1):
        drawn = torch.Generator().manual_seed(step * world + rank)  # the same batches when a run goes on
        ids, following = (x.to(device) for x in text.batch(batch, kind.length, drawn))
        loss = nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told = torch.stack((loss.detach(), torch.tensor(float(len(stops) > 0), device=device)))
        dist.all_reduce(told)  # so that all processes end after the same step
        last = step == args.steps or told[1].item() > 0
        if rank == 0 and (step % 10 == 0 or last):
            speed = (step - first) * world * ids.numel() / (time.perf_counter() - start)
            print(f"step {step:5}/{args.steps}  loss {told[0] / world:.4f}  {speed:9,.0f} characters/s", flush=True)
        if last or step % 100 == 0:
            checkpoint.save(state_of(model, optimizer), checkpoint_id=args.checkpoints / f"step-{step:06}")
        if last:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=KINDS, default="gru")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder to go on from")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with: torchrun --nproc-per-node 2 examples/distributed.py")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    train(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
