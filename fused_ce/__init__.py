"""fused_ce: cross-entropy for PyTorch, with its gradient in one pass over the logits."""

from fused_ce import ops as ops  # registers the operators
from fused_ce.backend import backend
from fused_ce.cross_entropy import fused_cross_entropy
from fused_ce.linear_cross_entropy import fused_linear_cross_entropy
from fused_ce.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from fused_ce.reference import reference_cross_entropy, reference_linear_cross_entropy
from fused_ce.stats import CrossEntropyStats
from fused_ce.version import __version__
from fused_ce.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "CrossEntropyStats",
    "FusedCrossEntropyLoss",
    "FusedLinearCrossEntropyLoss",
    "__version__",
    "backend",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "reference_cross_entropy",
    "reference_linear_cross_entropy",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
