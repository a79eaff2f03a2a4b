"""A maze whose exit was shown at its entrance: actor-critic, with episodes that end anywhere."""

from collections.abc import Iterator
from types import ModuleType

import torch
from compare import Figure, compare
from torch import Tensor, nn

import fusedrnn

B, T, HIDDEN, LONGEST, DISCOUNT = 64, 48, 64, 12, 0.95


class Mazes:
    """B corridors. The first observation shows a side, the last one asks for it."""

    def __init__(self) -> None:
        self.left = torch.zeros(B, dtype=torch.int64)  # steps to the end of the corridor
        self.side = torch.zeros(B, dtype=torch.int64)
        self.begin(torch.ones(B, dtype=torch.bool))

    def begin(self, where: Tensor) -> None:
        self.left = torch.where(where, torch.randint(3, LONGEST, (B,)), self.left)
        self.side = torch.where(where, torch.randint(2, (B,)), self.side)
        self.new = where

    def observe(self) -> Tensor:
        """(B, 3): the side where an episode begins, whether this is the end, noise."""
        shown = torch.where(self.new, 2.0 * self.side - 1, 0.0)
        return torch.stack([shown, (self.left == 0).float(), torch.randn(B)], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (B,) of 1 for the right side, and where an episode ended."""
        end = self.left == 0
        reward = torch.where(end, 2.0 * (action == self.side) - 1, 0.0)
        self.left = self.left - 1
        self.begin(end)
        return reward, end


class Agent(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.gru = library.GRU(3, HIDDEN)
        self.head = nn.Linear(HIDDEN, 3)  # two actions and the value

    def forward(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, B, 3), bools (T, B): True where an episode begins -> (T, B, 3), state."""
        if isinstance(self.gru, fusedrnn.GRU):
            output, state = self.gru(x, state, resets=begins)
        else:  # torch.nn has to go step by step
            outputs = []
            for step, new in zip(x.split(1), begins, strict=True):
                output, state = self.gru(step, state * ~new[:, None])
                outputs.append(output)
            output = torch.cat(outputs)
        return self.head(output), state


def main(updates: int = 150) -> Figure:
    final: dict[nn.Module, float] = {}

    def train(agent: Agent) -> Iterator[None]:
        optimizer = torch.optim.Adam(agent.parameters(), 5e-3)
        mazes, state = Mazes(), torch.zeros(1, B, HIDDEN)
        solved, gamma = 0.5, torch.full((B,), DISCOUNT)
        for _ in range(updates):
            start, steps = state, []
            with torch.no_grad():
                for _ in range(T):
                    x, begins = mazes.observe(), mazes.new
                    out, state = agent(x[None], state, begins[None])
                    action = torch.multinomial(out[0, :, :2].softmax(-1), 1)[:, 0]
                    steps.append((x, begins, action, *mazes.step(action)))
                value = agent(mazes.observe()[None], state, mazes.new[None])[0][0, :, 2]
            x, begins, actions, rewards, ends = map(torch.stack, zip(*steps, strict=True))
            returns = []
            for reward, end in zip(rewards.flip(0), ends.flip(0), strict=True):
                value = reward + gamma * ~end * value
                returns.append(value)
            target = torch.stack(returns[::-1])

            out, _ = agent(x, start, begins)  # the whole rollout in one call
            policy = torch.distributions.Categorical(logits=out[..., :2])
            advantage = target - out[..., 2]
            gain = policy.log_prob(actions) * advantage.detach() + 0.01 * policy.entropy()
            (0.5 * advantage.square() - gain).mean().backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            solved += 0.1 * ((rewards > 0).sum().item() / ends.sum().item() - solved)
            final[agent] = solved
            yield

    def score(agent: Agent) -> dict[str, float]:
        return {"mazes solved, %": 100 * final[agent]}

    title = f"reinforcement learning: GRU of {HIDDEN}, {B} mazes, rollouts of {T} steps"
    return compare(title, Agent, train, score)


if __name__ == "__main__":
    main()
