"""AdamW with decay on matrices only, and its learning rate: warm-up, then half a cosine."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fused_ce.babygpt.config import TrainConfig


def cosine_schedule(
    step: int, *, max_lr: float, min_lr: float, warmup_steps: int, decay_steps: int
) -> float:
    """Return the learning rate of a step.

    It rises from 0 at step 0 to max_lr at warmup_steps, falls along half a cosine to min_lr at
    decay_steps (warm-up counted), and stays there.
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW for the model; embeddings count as matrices, norms and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, fused=True
    )


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """Return the schedule of a run: `cosine_schedule` with the configuration's numbers."""
    min_lr = config.lr if config.min_lr is None else config.min_lr

    def factor(step: int) -> float:
        return cosine_schedule(
            step,
            max_lr=1.0,
            min_lr=min_lr / config.lr,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_end,
        )

    return LambdaLR(optimizer, factor)
