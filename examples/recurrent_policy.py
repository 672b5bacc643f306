"""Reinforcement learning with a memory: an agent that must remember, trained on pieces that hold ends of episodes.

    pip install torch .
    python examples/recurrent_policy.py

An episode shows +1 or -1 at its first step, then nothing for 2 to 8 steps; at the last one the agent is asked which it
was, and is paid if it is right. Many environments run side by side, and their episodes end at different steps. With
`reset=` the state is cleared where an episode begins, so that a piece of experience is trained on in one call.
"""

import argparse

import torch
from torch import Tensor, nn

import fastseq


class Corridors:
    """Environments side by side. What each shows: the cue, and whether this step asks."""

    def __init__(self, count: int) -> None:
        self.left, self.cue, self.shown = (torch.zeros(count, dtype=torch.int64) for _ in range(3))

    def observe(self) -> tuple[Tensor, Tensor]:
        """float [count, 2], and bool [count]: an episode begins with this step. One begins where the last one ended."""
        begins = self.left == 0
        self.left = torch.where(begins, torch.randint(3, 10, begins.shape), self.left)
        self.cue = torch.where(begins, torch.randint(0, 2, begins.shape), self.cue)
        cue = torch.where(begins, 2.0 * self.cue - 1, 0.0)
        return torch.stack((cue, (self.left == 1).float()), -1), begins

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each is asked, and whether its action is right."""
        asked, right = self.left == 1, action == self.cue
        self.left = self.left - 1
        return asked, right


class Policy(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = fastseq.nn.GRU(2, width)
        self.read = nn.Linear(width, 2)

    def forward(self, x: Tensor, state: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """x [T,B,2], state [1,B,width], reset bool [T,B] -> log-probabilities [T,B,2] and the new state."""
        y, state = self.gru(x, state, reset=reset)
        return torch.log_softmax(self.read(y), -1), state


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pieces", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    environments, policy, length, count = Corridors(64), Policy(), 16, 64
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    state = torch.zeros(1, count, policy.gru.hidden_size)
    for piece in range(options.pieces):
        before, steps = state, []
        with torch.no_grad():  # the agent acts, a step at a time
            for _ in range(length):
                x, begins = environments.observe()
                scores, state = policy(x[None], state, begins[None])
                action = torch.multinomial(scores[0].exp(), 1)[:, 0]
                steps.append((x, begins, action, *environments.act(action)))
        x, begins, action, asked, right = map(torch.stack, zip(*steps, strict=True))
        scores, _ = policy(x, before, begins)  # the same steps in one call, with gradients
        chosen = scores.gather(2, action[..., None])[..., 0]
        advantage = right.float() - right[asked].float().mean()
        loss = -(chosen * advantage)[asked].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if piece in (0, options.pieces // 2, options.pieces - 1):
            print(f"piece {piece + 1:4}: {right[asked].float().mean():.0%} of {int(asked.sum())} answers are right")


if __name__ == "__main__":
    main()
