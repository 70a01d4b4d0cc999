"""Any layout of logits and targets as rows: a (n_groups, rows_per_group, vocab_size) view, no copy.

One level of row stride is not enough: `logits[:, :-1]` of a (B, T, V) tensor, the usual shift of
language models, cannot be viewed as (rows, V). Two levels hold every such slice, and what is
contiguous becomes a single group.
"""

import math
from typing import NamedTuple, TypeVar

import torch

Given = TypeVar("Given", bound=torch.Tensor | None)


class Rows(NamedTuple):
    """The tensors of a call, checked and seen as rows; n_rows is n_groups * rows_per_group."""

    logits: torch.Tensor  # (n_groups, rows_per_group, vocab_size)
    targets: torch.Tensor  # (n_groups, rows_per_group), or probabilities like the logits
    weight: torch.Tensor | None = None  # (vocab_size,)
    sample_weight: torch.Tensor | None = None  # (n_rows,)
    normalizer: torch.Tensor | None = None  # (), where it is a tensor

    @property
    def has_probabilities(self) -> bool:
        """Whether the targets are probabilities, not class indices."""
        return self.targets.dim() == 3

    @property
    def has_no_classes(self) -> bool:
        """Whether V is 0; a jit trace, which cannot ask, takes none of these."""
        return not torch.jit.is_tracing() and self.logits.shape[2] == 0


class Result(NamedTuple):
    """What an implementation's forward finds; all but the loss only where it was asked for.

    `losses` are those of "none" whatever the reduction, `unweighted` the same without
    sample_weight, `divisor` is what "mean" divided by.
    """

    loss: torch.Tensor  # () or (n_rows,); float32, float64 for float64; so are the next four
    losses: torch.Tensor | None = None  # (n_rows,)
    unweighted: torch.Tensor | None = None  # (n_rows,)
    lse: torch.Tensor | None = None  # (n_rows,)
    entropy: torch.Tensor | None = None  # (n_rows,)
    predictions: torch.Tensor | None = None  # (n_rows,), int64
    divisor: torch.Tensor | None = None  # ()
    saved: tuple[torch.Tensor | None, ...] = ()  # for the implementation's own backward


class Upstream(NamedTuple):
    """The gradients that reach backward; `loss` is () or (n_rows,), the others (n_rows,).

    None stands for no gradient.
    """

    loss: torch.Tensor | float | None  # the number 1 on a CPU
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class Direction(NamedTuple):
    """Where to differentiate along: tangents, laid out in any way; None stands for 0."""

    logits: torch.Tensor | None = None  # of the logits' shape and dtype
    targets: torch.Tensor | None = None  # the same, of probabilities


class Tangents(NamedTuple):
    """Derivatives along a direction, (n_rows,): of what `Result` calls unweighted, lse, entropy."""

    losses: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


def as_rows(
    logits: torch.Tensor, targets: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (n_groups, rows_per_group, vocab_size) and (n_groups, rows_per_group), row-major.

    Targets of the logits' shape are probabilities and seen as the logits are. Targets are copied
    where their layout does not fit that of the logits (8 bytes a row, or all probabilities); the
    logits only where their batch axes need three or more levels of stride.
    """
    if logits.dim() == 2 and dim == 1:  # nothing to find out, on the path where microseconds show
        return logits[None], targets[None]
    vocab_size = logits.shape[dim]
    classes = (vocab_size,) if targets.dim() == logits.dim() else ()
    logits = logits.movedim(dim, -1)
    targets = targets.movedim(dim, -1) if classes else targets
    split = _common_split(logits, targets)
    if split is None:
        targets = targets.contiguous()
        split = _common_split(logits, targets)
    if split is None:
        logits = logits.contiguous()
        split = 0
    batch = logits.shape[:-1]
    n_groups, rows_per_group = math.prod(batch[:split]), math.prod(batch[split:])
    return (
        logits.view(n_groups, rows_per_group, vocab_size),
        targets.view(n_groups, rows_per_group, *classes),
    )


def _common_split(logits: torch.Tensor, targets: torch.Tensor) -> int | None:
    """The first axis from which the batch axes of both collapse, as do the axes before it."""
    sizes = logits.shape[:-1]
    strides = [tensor.stride()[: len(sizes)] for tensor in (logits, targets)]
    for split in range(len(sizes) + 1):
        if all(
            _collapses(sizes[:split], stride[:split]) and _collapses(sizes[split:], stride[split:])
            for stride in strides
        ):
            return split
    return None


def _collapses(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether axes of these sizes and strides are one axis to `Tensor.view`."""
    if 0 in sizes:
        return True
    axes = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(
        outer == inner * inner_size
        for (_, outer), (inner_size, inner) in zip(axes, axes[1:], strict=False)
    )


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """That of the arithmetic and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def in_memory(tensor: Given) -> Given:
    """The tensor with its elements where they say they are, which a pointer can follow.

    A lazy negative bit (of `x.conj().imag`) stands for elements of the other sign, and a zero
    tensor, as derivatives hand on, has none at all.
    """
    if tensor is None or not (tensor.is_neg() or tensor._is_zerotensor()):
        return tensor
    return tensor.clone().resolve_neg()  # type: ignore[return-value]  # a tensor, as it was given


def is_dense(rows: torch.Tensor) -> bool:
    """Whether the vocabulary is the contiguous axis, as the kernels' wide accesses need."""
    return rows.stride(-1) == 1 or rows.shape[-1] == 1


def overlaps(rows: torch.Tensor) -> bool:
    """Whether elements may share memory (expanded or sliding-window logits): no place to write."""
    axes = [
        (stride, size) for stride, size in zip(rows.stride(), rows.shape, strict=True) if size > 1
    ]
    extent = 1  # elements spanned by the axes seen so far, smallest stride first
    for stride, size in sorted(axes):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def is_packed(rows: torch.Tensor) -> bool:
    """Whether the elements fill their storage without gaps, in whatever order."""
    if rows.is_contiguous():
        return True
    last = sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
    return last + 1 == rows.numel() and not overlaps(rows)


def empty_gradient(logits: torch.Tensor, skew: int | None = None) -> torch.Tensor:
    """An uninitialised gradient for rows of logits, laid out as they are.

    Where the vocabulary is dense, every row lies at the same address modulo 16 bytes as its logits.
    The kernels split a row at 16-byte boundaries once, for loads and stores alike, so a gradient
    row must be skewed as its logits row is. Contiguous logits get a contiguous gradient; rows
    sliced from a padded matrix, and groups of rows, get less than 16 bytes of padding each.

    `skew` is where logits without memory of their own begin, in elements after a 16-byte boundary;
    shape and strides do not depend on it.
    """
    if skew is None:
        skew = logits.data_ptr() % 16 // logits.element_size()
    if not is_dense(logits) or logits.is_contiguous() and skew == 0:
        return torch.empty_like(logits)
    n_groups, rows_per_group, vocab_size = logits.shape
    vector = 16 // logits.element_size()
    group_stride, row_stride, _ = logits.stride()
    row_stride = _at_least(vocab_size, row_stride, vector)
    group_stride = _at_least(max(rows_per_group, 1) * row_stride, group_stride, vector)
    storage = logits.new_empty(skew + n_groups * group_stride)
    return storage.as_strided(logits.shape, (group_stride, row_stride, 1), skew)


def _at_least(minimum: int, like: int, modulus: int) -> int:
    """The smallest number from `minimum` that is congruent to `like`."""
    return minimum + (like - minimum) % modulus
