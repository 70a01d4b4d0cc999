"""Accelerate: `accelerator.backward` divides by the accumulation steps, and processes are averaged.

The normalizer has counted the tokens of all of them already: multiply both back. Factor and
division meet in the upstream gradient, which is 1 again, so that they cost no pass over a gradient.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import contextlib
import itertools

import torch
from accelerate import Accelerator
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
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=4.0),
        DataLoader(dataset, batch_size=8),
    )
    divided_by = accelerator.gradient_accumulation_steps * accelerator.num_processes
    iterator = iter(loader)
    losses = []
    # not under `accelerator.accumulate`: it steps early where the end of the data is read ahead
    while micro_batches := list(itertools.islice(iterator, accumulate)):
        n_tokens = sum((targets != -100).sum() for _, targets in micro_batches)
        n_tokens = accelerator.reduce(n_tokens).clamp(min=1)  # of all processes
        loss_of_step = 0.0
        for i, (inputs, targets) in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = fused_cross_entropy(model(inputs), targets, normalizer=n_tokens)
                accelerator.backward(loss * divided_by)
            loss_of_step += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss_of_step))
    return torch.stack(losses).tolist()  # one wait for the device, at the end


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(new_model(), data(3208))
    Accelerator().print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
