"""fused_ce: cross-entropy for PyTorch in one pass over the logits."""

__version__ = "0.1.0"
