"""Few plain rows, as a small model has them: there calls from Python cost more than arithmetic.

A block of rows takes some thirty calls, with all that options may ask for, and a Function around
them fifty microseconds. PyTorch's own two operations of a cross-entropy, and its gradient of them,
are as exact where nothing is asked for.
"""

import torch

from fused_ce.cpu.blocks import LEAST_ELEMENTS
from fused_ce.options import LossOptions
from fused_ce.rows import Rows, compute_dtype

REDUCTIONS = {"mean": 1, "sum": 2}  # as ATen counts them


def are_few(rows: Rows, options: LossOptions) -> bool:
    """Whether there is one small block of classes, and nothing but their loss is asked for."""
    n_groups, n_rows, vocab_size = rows.logits.shape
    return (
        0 < n_rows * vocab_size <= LEAST_ELEMENTS
        and n_groups == 1
        and options.reduction in REDUCTIONS
        and options[2:] == (0.0, False, options.grad_in_forward, *LossOptions()[5:])
        and rows[2:] == (None, None, None)
        and not rows.has_probabilities
    )


def loss_of_few(
    source: torch.Tensor, targets: torch.Tensor, options: LossOptions
) -> torch.Tensor | None:
    """The loss, which PyTorch's autograd differentiates; source is (n_rows, V) or (1, n_rows, V).

    None where a target is ignored (PyTorch spreads the NaN of its row) or out of range.
    """
    logits = source if source.dim() == 2 else source[0]
    # A copy, which stays as it is until backward.
    targets = targets.reshape(-1).to(torch.int64, copy=True)
    log_probs = torch.log_softmax(logits, 1, dtype=compute_dtype(logits))
    try:
        loss, n_counted = torch.ops.aten.nll_loss_forward(
            log_probs, targets, None, REDUCTIONS[options.reduction], options.ignore_index
        )
    except IndexError:
        return None
    return loss if float(n_counted) == targets.shape[0] else None
