"""Any layout of logits and targets as rows: a (n_groups, rows_per_group, vocab_size) view, no copy.

One level of row stride is not enough: `logits[:, :-1]` of a (B, T, V) tensor, the usual shift of
language models, cannot be viewed as (rows, V). Two levels hold every such slice, and what is
contiguous becomes a single group.
"""

import torch


def as_rows(
    logits: torch.Tensor, targets: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (n_groups, rows_per_group, vocab_size) and (n_groups, rows_per_group), row-major.

    Targets are copied where their layout does not fit that of the logits (8 bytes a row); the
    logits only where their batch axes need three or more levels of stride.
    """
    if logits.dim() == 2 and dim == 1:  # nothing to find out, on the path where microseconds show
        return logits[None], targets[None]
    logits = logits.movedim(dim, -1)
    split = _common_split(logits, targets)
    if split is None:
        targets = targets.contiguous()
        split = _common_split(logits, targets)
    if split is None:
        logits = logits.contiguous()
        split = 0
    n_groups = targets.shape[:split].numel()
    rows_per_group = targets.shape[split:].numel()
    return (
        logits.view(n_groups, rows_per_group, logits.shape[-1]),
        targets.view(n_groups, rows_per_group),
    )


def _common_split(logits: torch.Tensor, targets: torch.Tensor) -> int | None:
    """The first axis from which the batch axes of both collapse, as do the axes before it."""
    sizes = targets.shape
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


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient for rows of logits, laid out as they are.

    Where the vocabulary is dense, every row lies at the same address modulo 16 bytes as its logits.
    The kernels split a row at 16-byte boundaries once, for loads and stores alike, so a gradient
    row must be skewed as its logits row is. Contiguous logits get a contiguous gradient; rows
    sliced from a padded matrix, and groups of rows, get less than 16 bytes of padding each.
    """
    if not is_dense(logits) or logits.is_contiguous() and logits.data_ptr() % 16 == 0:
        return torch.empty_like(logits)
    n_groups, rows_per_group, vocab_size = logits.shape
    vector = 16 // logits.element_size()
    group_stride, row_stride, _ = logits.stride()
    skew = logits.data_ptr() % 16 // logits.element_size()
    row_stride = _at_least(vocab_size, row_stride, vector)
    group_stride = _at_least(max(rows_per_group, 1) * row_stride, group_stride, vector)
    storage = logits.new_empty(skew + n_groups * group_stride)
    return storage.as_strided(logits.shape, (group_stride, row_stride, 1), skew)


def _at_least(minimum: int, like: int, modulus: int) -> int:
    """The smallest number from `minimum` that is congruent to `like`."""
    return minimum + (like - minimum) % modulus
