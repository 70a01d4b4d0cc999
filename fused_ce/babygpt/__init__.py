"""BabyGPT: a small GPT that trains on this project's cross-entropy."""

from fused_ce.babygpt.config import PRESETS, ModelConfig, TrainConfig
from fused_ce.babygpt.data import get_batch, load_dataset
from fused_ce.babygpt.evaluate import estimate_loss
from fused_ce.babygpt.model import BabyGPT

__all__ = [
    "PRESETS",
    "BabyGPT",
    "ModelConfig",
    "TrainConfig",
    "estimate_loss",
    "get_batch",
    "load_dataset",
]
