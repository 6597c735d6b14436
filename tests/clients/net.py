"""A small regression problem for every client: two matrices, batches that follow from step and rank."""
import torch
from torch import Tensor, nn

from muon import Muon

LR = 0.02
SETTINGS = dict(lr=LR, weight_decay=0.1, ns_dtype=torch.float32, deterministic=True)


class Net(nn.Module):
    """Maps 16 numbers to 8; returns what the Hugging Face Trainer expects, a dict with the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(16, 24, bias=False)
        self.outer = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.outer(torch.tanh(self.inner(x)))
        return dict(loss=(y - labels).square().mean(), logits=y)


def batch(step: int, rank: int = 0, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(size, 16, generator=generator)
    return dict(x=x, labels=x[:, :8].sin())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps, rank: int = 0) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(**batch(step, rank))["loss"].backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def straight(num_steps: int, **settings) -> list[Tensor]:
    """Return the weights after these steps of one process in a plain loop."""
    model = Net()
    train(model, Muon(model.parameters(), **SETTINGS | settings), range(num_steps))
    return weights(model)
