"""Few plain rows, as a small model has them: there calls of PyTorch cost more than arithmetic.

A block of rows takes some thirty calls, with all that options may ask for; PyTorch's own four
operations of a cross-entropy are as exact where nothing is asked for.
"""

import torch

from fused_ce.cpu.blocks import LEAST_ELEMENTS
from fused_ce.options import LossOptions
from fused_ce.rows import Result, Rows, compute_dtype

REDUCTIONS = {"mean": 1, "sum": 2}  # as ATen counts them


def are_few(rows: Rows, options: LossOptions) -> bool:
    """Whether there is one small block of classes, and nothing but their loss is asked for."""
    n_groups, n_rows, vocab_size = rows.logits.shape
    return (
        0 < n_rows * vocab_size <= LEAST_ELEMENTS
        and n_groups == 1
        and options.reduction in REDUCTIONS
        and options[2:] == (0.0, options.inplace, options.grad_in_forward, *LossOptions()[5:])
        and rows[2:] == (None, None, None)
        and not rows.has_probabilities
    )


def loss_of_few(
    rows: Rows, options: LossOptions, grad_logits: torch.Tensor | None
) -> Result | None:
    """The loss; fills its gradient where there is a place for it, which may be the logits'.

    None, and nothing is written, where a target is ignored (NaN in its row) or out of range.
    """
    logits, targets = rows.logits[0], rows.targets.reshape(-1).long()
    reduction = REDUCTIONS[options.reduction]
    log_probs = torch.log_softmax(logits, 1, dtype=compute_dtype(logits))
    try:
        loss, n_counted = torch.ops.aten.nll_loss_forward(
            log_probs, targets, None, reduction, options.ignore_index
        )
    except IndexError:
        return None
    if float(n_counted) != targets.shape[0]:
        return None
    if grad_logits is not None:
        of_log_probs = torch.ops.aten.nll_loss_backward(
            torch.ones_like(loss), log_probs, targets, None, reduction, options.ignore_index,
            n_counted,
        )  # fmt: skip
        given = of_log_probs, log_probs, 1, log_probs.dtype
        # It writes as if its place were contiguous.
        if grad_logits.dtype == log_probs.dtype and grad_logits.is_contiguous():
            torch._log_softmax_backward_data(*given, out=grad_logits[0])
        else:
            grad_logits[0] = torch._log_softmax_backward_data(*given)
    return Result(loss)
