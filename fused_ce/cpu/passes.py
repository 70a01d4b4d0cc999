"""Loss and gradient of rows: one pass over them, a block at a time."""

from collections.abc import Callable

import torch

from fused_ce.cpu.blocks import at, blocks, in_turn, rows_at_once
from fused_ce.cpu.gradient import grad_of_soft, make_gradient
from fused_ce.cpu.machine import ask_for_huge_pages
from fused_ce.cpu.statistics import (
    Block,
    Buffers,
    RowSums,
    empty_sums,
    load,
    load_soft,
    log_probabilities,
    result_of,
    sum_up,
    with_mean,
)
from fused_ce.cpu.terms import GradTerms, RowTerms, grad_terms, row_terms
from fused_ce.cpu.unshifted import are_in_range, can_be_unshifted, sum_powers, sum_powers_in_place
from fused_ce.cpu.workers import share
from fused_ce.options import LossOptions
from fused_ce.rows import Result, Rows, Upstream, compute_dtype, is_dense


def forward(
    rows: Rows, options: LossOptions, unweighted: bool = False, keep: bool = False
) -> Result:
    """The loss of rows, and what else options ask for; see rows.py. There is nothing to `keep`."""
    terms = row_terms(rows, options)
    sums = empty_sums(rows, options)
    pass_over_rows(rows, options, terms, sums)
    return result_of(terms, sums, options, unweighted)


def forward_with_grad(
    rows: Rows, options: LossOptions, grad_logits: torch.Tensor, unweighted: bool = False
) -> Result:
    """As forward; fills grad_logits (like the logits, or they themselves) for an upstream of 1."""
    terms = row_terms(rows, options)
    sums = empty_sums(rows, options)
    grads = grad_terms(terms, Upstream(1.0), sums, options)
    pass_over_rows(rows, options, terms, sums, grads, grad_logits)
    return result_of(terms, sums, options, unweighted)


def backward(
    upstream: Upstream,
    rows: Rows,
    saved: tuple[()],
    options: LossOptions,
    grad_logits: torch.Tensor | None,
    grad_targets: torch.Tensor | None,
) -> None:
    """Fills grad_logits (like the logits, or they themselves) and grad_targets, where given."""
    terms = row_terms(rows, options)
    sums = empty_sums(rows, options, finds_loss=False)
    grads = grad_terms(terms, upstream, sums, options)
    pass_over_rows(rows, options, terms, sums, grads, grad_logits, grad_targets)


def pass_over_rows(rows, options, terms, sums, grads=None, grad_logits=None, grad_targets=None):
    """Fills the sums and the gradients that are given; of powers of x itself, if that can be."""
    unshifted = can_be_unshifted(rows, options, sums) and (grads is None or grads.entropy is None)
    if unshifted and not _is_over(grad_logits, rows.logits):
        pass_over_blocks(rows, options, terms, sums, grads, grad_logits, None, sum_powers)
        if are_in_range(sums, terms):
            return
        unshifted = False  # the logits are there still

    def sum_block(x, block, sums):
        stats = sum_powers_in_place(x, block, sums) if unshifted else None
        return stats or sum_up(x, block, terms, sums)

    pass_over_blocks(rows, options, terms, sums, grads, grad_logits, grad_targets, sum_block)


def _is_over(grad_logits, logits) -> bool:
    return grad_logits is not None and grad_logits.data_ptr() == logits.data_ptr()


def pass_over_blocks(
    rows: Rows,
    options: LossOptions,
    terms: RowTerms,
    sums: RowSums,
    grads: GradTerms | None,
    grad_logits: torch.Tensor | None,
    grad_targets: torch.Tensor | None,
    sum_block: Callable,
) -> None:
    """With what sums up a block: with or without the maximum subtracted."""
    logits, vocab_size = rows.logits, rows.logits.shape[2]
    needs_mean = sums.mean is not None or grads is not None and grads.entropy is not None
    needs = _buffers(rows, options, needs_mean, grad_logits)
    is_plain = grads is None and sums.is_plain and not rows.has_probabilities
    for gradient, of in ((grad_logits, logits), (grad_targets, rows.targets)):
        if gradient is not None and gradient.data_ptr() != of.data_ptr():
            ask_for_huge_pages(gradient)
    parts = blocks(logits, rows_at_once(logits, sum(needs)))
    largest = max((part.stop - part.start for part, *_ in parts), default=0)

    def worker():
        scratch = _scratch(logits, largest, needs)

        def compute(where):
            part, groups, columns = where
            n = part.stop - part.start
            work = scratch.work
            if work is None:
                of_block = grad_logits[groups, columns]  # type: ignore[index]  # or there is scratch
                work = of_block.view(n, vocab_size)
            block = _block(part, work, scratch, terms)
            x = load(logits[groups, columns], block, options)
            if is_plain and sum_block is not sum_powers:
                log_probabilities(x, block, sums)
                return
            if block.soft is not None:
                load_soft(rows.targets[groups, columns], block, terms, options)
            stats = sum_block(x, block, sums)
            if grad_targets is not None:
                out = grad_targets[groups, columns]
                out.copy_(grad_of_soft(block, stats, terms, grads, options).view(out.shape))
            if needs_mean:
                stats = with_mean(block, stats, sums)
            if grad_logits is not None:
                make_gradient(block, stats, terms, grads, options)
                if scratch.work is not None:
                    out = grad_logits[groups, columns]
                    out.copy_(block.work.view(out.shape))

        return compute

    share(parts, worker, in_turn(logits))


def _buffers(rows, options, needs_mean, grad_logits) -> tuple[bool, bool, bool, bool]:
    """Which buffers a pass needs: of work, exp, soft and slope."""
    soft = rows.has_probabilities
    work = grad_logits is None or not _can_hold_work(grad_logits, compute_dtype(rows.logits))
    slope = options.softcap is not None and grad_logits is not None
    return work, soft or needs_mean, soft, slope


def _scratch(logits, n_rows, needs) -> Buffers:
    """The buffers of a thread."""
    size, dtype = (n_rows, logits.shape[2]), compute_dtype(logits)
    return Buffers(*(logits.new_empty(size, dtype=dtype) if needed else None for needed in needs))


def _block(rows, work, scratch, terms) -> Block:
    n, (_, exp, soft, slope) = rows.stop - rows.start, scratch
    work = work[:n]
    return Block(
        rows,
        at(terms.targets, rows),
        work,
        work if exp is None else exp[:n],
        soft if soft is None else soft[:n],
        slope if slope is None else slope[:n],
    )


def _can_hold_work(grad_logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a block of the gradient is itself a place to compute in: no scratch, no copy back."""
    one_level = grad_logits.shape[0] == 1 and is_dense(grad_logits)
    return grad_logits.dtype == dtype and (one_level or grad_logits.is_contiguous())
