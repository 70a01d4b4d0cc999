"""Lightning: it divides the loss by `accumulate_grad_batches`, and averages over processes.

The normalizer has counted the tokens of all of them already: multiply both back. Factor and
division meet in the upstream gradient, which is 1 again, so that they cost no pass over a gradient.

    python examples/lightning_module.py
"""

import itertools

import lightning
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


def with_token_counts(loader: DataLoader, accumulate: int) -> list[tuple[torch.Tensor, ...]]:
    """Each micro-batch with the tokens of its step, which a training_step does not see."""
    iterator = iter(loader)
    counted = []
    while micro_batches := list(itertools.islice(iterator, accumulate)):
        n_tokens = sum((targets != -100).sum() for _, targets in micro_batches).clamp(min=1)
        counted += [(inputs, targets, n_tokens) for inputs, targets in micro_batches]
    return counted


class Module(lightning.LightningModule):
    """A model that is trained by SGD."""

    def __init__(self, model: nn.Module) -> None:
        """Train this model."""
        super().__init__()
        self.model = model
        self.losses = []

    def training_step(self, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        """The part of the loss of the step that this micro-batch has."""
        inputs, targets, n_tokens = batch
        # with several processes: their sum, and * self.trainer.world_size
        loss = fused_cross_entropy(self.model(inputs), targets, normalizer=n_tokens)
        self.losses.append(loss.detach())
        return loss * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As Lightning asks for it."""
        return torch.optim.SGD(self.parameters(), lr=4.0)


def train(model: nn.Module, dataset: TensorDataset, accumulate: int = 4) -> list[float]:
    """A step of SGD per `accumulate` micro-batches, the last of which may be fewer; the losses."""
    module = Module(model)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=accumulate,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    micro_batches = with_token_counts(DataLoader(dataset, batch_size=8), accumulate)
    trainer.fit(module, DataLoader(micro_batches, batch_size=None))
    steps = torch.stack(module.losses).split(accumulate)
    return [step.sum().item() for step in steps]


if __name__ == "__main__":
    torch.manual_seed(0)
    losses = train(new_model(), data(3208))
    print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
