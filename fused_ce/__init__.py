"""fused_ce: cross-entropy for PyTorch in one pass over the logits."""

from fused_ce.backend import backend
from fused_ce.cross_entropy import fused_cross_entropy
from fused_ce.modules import FusedCrossEntropyLoss
from fused_ce.reference import reference_cross_entropy

__version__ = "0.1.0"
__all__ = [
    "FusedCrossEntropyLoss",
    "backend",
    "fused_cross_entropy",
    "reference_cross_entropy",
]
