"""How rows are cut into blocks, and what belongs to the rows of a block."""

from typing import TypeVar

import torch

Value = TypeVar("Value", bound=torch.Tensor | float | None)

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32, for each thread
FEW_ELEMENTS = 1 << 23  # of a call: not worth that threads of ours wake up
LEAST_ELEMENTS = 1 << 17  # of a block


def block_rows(n_rows: int, vocab_size: int, n_threads: int, n_buffers: int) -> int:
    """How many rows a thread works on at once: the one place that decides.

    So many that ten calls from Python are little beside the work; but that they stay in its cache,
    with the buffers of their size that a block needs beside the gradient (for 16-bit logits and
    some options), and that every thread gets some. Of few elements a block is for all threads, see
    `in_turn`.
    """
    if n_rows * vocab_size <= FEW_ELEMENTS:
        return max(1, min(n_rows, BLOCK_ELEMENTS // vocab_size))
    elements = BLOCK_ELEMENTS >> min(n_buffers, 2)
    share = -(-n_rows // n_threads)
    return max(4, LEAST_ELEMENTS // vocab_size, min(elements // vocab_size, share))


def in_turn(logits: torch.Tensor) -> bool:
    """Whether the blocks are computed one by one, each by PyTorch's own parallel loops.

    A loop hands out work in microseconds, as its threads still spin when the next one comes; and to
    a thread that wakes up beside them they leave half a core, for milliseconds. A call of a few
    million elements is over by then. With more loops than that, and another process on a core, each
    of them may wait for it.
    """
    return logits.numel() <= FEW_ELEMENTS


def rows_at_once(logits: torch.Tensor, n_buffers: int) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    n_groups, rows_per_group, vocab_size = logits.shape
    rows_per_group = max(rows_per_group, 1)
    n_threads = torch.get_num_threads()
    rows = block_rows(n_groups * rows_per_group, vocab_size, n_threads, n_buffers)
    return rows if rows <= rows_per_group else rows // rows_per_group * rows_per_group


def blocks(logits: torch.Tensor, rows: int) -> list[tuple[slice, slice, slice]]:
    """Slices of flat rows, groups and rows within a group that cover (n_groups, rows_per_group)."""
    n_groups, rows_per_group, _ = logits.shape
    if n_groups * rows_per_group == 0:
        return []
    groups = max(1, rows // rows_per_group)
    rows = min(rows, rows_per_group)
    parts = []
    for group in range(0, n_groups, groups):
        group_stop = min(group + groups, n_groups)
        for row in range(0, rows_per_group, rows):
            row_stop = min(row + rows, rows_per_group)
            first = group * rows_per_group + row
            count = (group_stop - group) * (row_stop - row)
            parts.append(
                (slice(first, first + count), slice(group, group_stop), slice(row, row_stop))
            )
    return parts


def at(value: Value, rows: slice) -> Value:
    """The value of these rows: of a number for all, or of a (n_rows, 1) tensor."""
    if not isinstance(value, torch.Tensor) or value.shape[0] == rows.stop - rows.start:
        return value  # a single block needs no slices, in calls so small that they show
    return value[rows]  # type: ignore[return-value]  # a tensor, as the value
