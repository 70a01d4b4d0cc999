"""How rows are cut into blocks, and what belongs to the rows of a block."""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS_PER_THREAD = 1 << 19  # 2 MiB of float32


def block_rows(vocab_size: int, n_threads: int, in_scratch: bool) -> int:
    """How many rows to work on at once: the one place that decides.

    Measured with two threads, V = 65 to 128,256, float32 and bfloat16: smaller blocks lose up to a
    fifth in the start of their operations, larger ones win nothing. Where a block needs scratch
    memory (16-bit logits, some options) it is half as large: 1 MiB a thread, or four rows.
    """
    elements = BLOCK_ELEMENTS_PER_THREAD // (2 if in_scratch else 1)
    return max(4 * n_threads, elements * n_threads // vocab_size)


def rows_at_once(logits: torch.Tensor, in_scratch: bool) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    rows_per_group = max(logits.shape[1], 1)
    rows = block_rows(logits.shape[2], torch.get_num_threads(), in_scratch)
    return rows if rows <= rows_per_group else rows // rows_per_group * rows_per_group


def blocks(logits: torch.Tensor, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of flat rows, groups and rows within a group that cover (n_groups, rows_per_group)."""
    n_groups, rows_per_group, _ = logits.shape
    if n_groups * rows_per_group == 0:
        return
    groups = max(1, rows // rows_per_group)
    rows = min(rows, rows_per_group)
    for group in range(0, n_groups, groups):
        group_stop = min(group + groups, n_groups)
        for row in range(0, rows_per_group, rows):
            row_stop = min(row + rows, rows_per_group)
            first = group * rows_per_group + row
            count = (group_stop - group) * (row_stop - row)
            yield slice(first, first + count), slice(group, group_stop), slice(row, row_stop)


def at(value: torch.Tensor | float, rows: slice) -> torch.Tensor | float:
    """The value of these rows: of a number for all, or of a (n_rows, 1) tensor."""
    if not isinstance(value, torch.Tensor) or value.shape[0] == rows.stop - rows.start:
        return value  # a single block needs no slices, in calls so small that they show
    return value[rows]
