"""The loss on the CPU: the rows of the reference, a block at a time, so that it stays in cache.

Eager `F.cross_entropy` streams tensors of the size of the logits through memory several times and
holds three of them at its peak. Here every pass over a block but the first runs in cache, and the
only tensor of the size of the logits is the gradient. The arithmetic is that of the kernels:
subtract the row's maximum first (exact at any offset of the logits), then powers of two, which
PyTorch computes four times as fast as those of e.

The public functions are those of kernels/launch.py; autograd.py calls either.
"""

from fused_ce.cpu.gradient import scale
from fused_ce.cpu.passes import backward, forward, forward_with_grad
from fused_ce.cpu.shards import shard_gradient, shard_statistics
from fused_ce.cpu.tangents import tangents

__all__ = [
    "backward",
    "forward",
    "forward_with_grad",
    "scale",
    "shard_gradient",
    "shard_statistics",
    "tangents",
]
