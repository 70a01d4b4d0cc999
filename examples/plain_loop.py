"""A loop of one's own: micro-batches that add up to the gradient of one batch of them all.

A mean divides by the tokens of its micro-batch, so that tokens in short ones weigh more. The
normalizer is the number of tokens of all micro-batches of a step instead.

    python examples/plain_loop.py
"""

import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_ce import fused_cross_entropy

VOCAB_SIZE = 64


def data(n_sequences: int) -> TensorDataset:
    """(inputs, targets) of sequences that end somewhere: -100 is not to be learnt."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(VOCAB_SIZE, (n_sequences, 32), generator=generator)
    lengths = torch.randint(1, 33, (n_sequences, 1), generator=generator)
    targets = (5 * inputs + 3) % VOCAB_SIZE  # what follows a token here
    return TensorDataset(inputs, targets.masked_fill(torch.arange(32) >= lengths, -100))


def new_model() -> nn.Module:
    """Logits (B, T, V) of what follows each token; enough for these data."""
    return nn.Sequential(nn.Embedding(VOCAB_SIZE, 32), nn.Linear(32, VOCAB_SIZE))


def train(model: nn.Module, dataset: TensorDataset, accumulate: int = 4) -> list[float]:
    """A step of SGD per `accumulate` micro-batches, the last of which may be fewer; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    loader = iter(DataLoader(dataset, batch_size=8))
    losses = []
    while micro_batches := list(itertools.islice(loader, accumulate)):
        n_tokens = sum((targets != -100).sum() for _, targets in micro_batches)
        loss_of_step = 0.0
        for inputs, targets in micro_batches:
            loss = fused_cross_entropy(model(inputs), targets, normalizer=n_tokens.clamp(min=1))
            loss.backward()  # gradients add up: they are not divided by the micro-batches as well
            loss_of_step += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    return torch.stack(losses).tolist()  # one wait for the device, at the end


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(new_model(), data(3208))
    print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
