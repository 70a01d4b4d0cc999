"""How rows are cut into blocks, and what belongs to the rows of a block."""

import torch

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32, for each thread
FEW_ELEMENTS = 1 << 20  # of a call: not worth that threads of ours wake up
LEAST_ELEMENTS = 1 << 17  # of a block


def block_rows(n_rows: int, vocab_size: int, n_threads: int, in_scratch: bool) -> int:
    """How many rows a thread works on at once: the one place that decides.

    So many that they stay in its cache, with what a block needs of scratch memory (16-bit logits,
    some options); and so few that every thread gets some. Where all rows are few they are one
    block, which PyTorch's own loops share out: handing it over takes longer than it does.
    """
    if n_rows * vocab_size <= FEW_ELEMENTS:
        return max(n_rows, 1)
    elements = BLOCK_ELEMENTS // (2 if in_scratch else 1)
    share = -(-n_rows // n_threads)
    return max(4, LEAST_ELEMENTS // vocab_size, min(elements // vocab_size, share))


def rows_at_once(logits: torch.Tensor, in_scratch: bool) -> int:
    """`block_rows`, in whole groups where a group is smaller than a block."""
    n_groups, rows_per_group, vocab_size = logits.shape
    rows_per_group = max(rows_per_group, 1)
    n_threads = torch.get_num_threads()
    rows = block_rows(n_groups * rows_per_group, vocab_size, n_threads, in_scratch)
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


def at(value: torch.Tensor | float, rows: slice) -> torch.Tensor | float:
    """The value of these rows: of a number for all, or of a (n_rows, 1) tensor."""
    if not isinstance(value, torch.Tensor) or value.shape[0] == rows.stop - rows.start:
        return value  # a single block needs no slices, in calls so small that they show
    return value[rows]
