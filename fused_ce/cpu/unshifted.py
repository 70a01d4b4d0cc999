"""Powers of x itself, where no maximum need be subtracted: two passes over a block are spared.

The sum of them over the power of the target's x is the loss's exponential. The target's power is a
term of that sum, rounded alike, so this is as exact as with the maximum, as long as nothing
overflows. That the sums show, afterwards; where powers overwrite x, x is looked at first.
"""

import torch

from fused_ce.cpu import machine
from fused_ce.cpu.blocks import at
from fused_ce.cpu.statistics import RowStats, RowSums
from fused_ce.cpu.terms import RowTerms
from fused_ce.options import LossOptions
from fused_ce.rows import Rows

LARGE = 35.0  # exp(2 * LARGE) times a million classes is finite in float32


def can_be_unshifted(rows: Rows, options: LossOptions, sums: RowSums) -> bool:
    """Only classes, and logits as they are: statistics and smoothing ask for differences."""
    return (
        not rows.has_probabilities
        and sums.mean is None
        and options.label_smoothing == 0.0
        and options.logit_scale == 1.0
        and options.softcap is None
        and machine.exponential(rows.logits.numel())[1] == 1.0
    )


def sum_powers(x, block, sums) -> RowStats:
    """Of a block; leaves the powers in exp, and in the sums that of the target for its x."""
    torch.exp(x, out=block.exp)
    total = torch.sum(block.exp, dim=1, keepdim=True)
    of_target = block.exp.gather(1, block.targets)
    sums.exp[block.rows] = total
    if sums.x_target is not None:
        sums.x_target[block.rows] = of_target
    return RowStats(torch.zeros_like(total), total, 1.0, p_target=of_target / total)


def sum_powers_in_place(x, block, sums) -> RowStats | None:
    """The same where powers overwrite x: None, and x is as it was, where they are too far apart."""
    largest, of_targets = x.amax(), x.gather(1, block.targets)
    if not (float(largest) <= LARGE and float(of_targets.amin()) >= -LARGE):
        return None
    stats = sum_powers(x, block, sums)
    _divide(RowSums._make(None if of is None else at(of, block.rows) for of in sums))
    return stats


def are_in_range(sums: RowSums, terms: RowTerms) -> bool:
    """Make of powers what `sum_up` finds; False, and nothing is right, if one is out of range."""
    fine = sums.exp >= torch.finfo(sums.exp.dtype).tiny
    if sums.x_target is not None:
        fine &= sums.x_target >= torch.finfo(sums.exp.dtype).tiny
        _divide(sums)
    fine &= sums.exp.isfinite()
    return bool((fine if terms.ignored is None else fine | terms.ignored).all())


def _divide(sums) -> None:
    """With the target's x in the place of the maximum."""
    if sums.x_target is None:
        return
    if sums.maximum is not None:
        torch.log(sums.x_target, out=sums.maximum)
    sums.exp.div_(sums.x_target)
    sums.x_target.zero_()
