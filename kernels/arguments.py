"""What a call is to a kernel: its outputs in the order of the arguments, options as numbers and as
the constants that choose code."""

from typing import NamedTuple

import torch

from ..options import LossOptions
from ..rows import Rows


class Outputs(NamedTuple):
    """Where a kernel leaves what it finds of its rows; None where nobody asked."""

    losses: torch.Tensor  # (n_rows,), with the sample weights
    loss: torch.Tensor | None = None  # ()
    unweighted: torch.Tensor | None = None  # (n_rows,), without them
    lse: torch.Tensor | None = None  # (n_rows,), as are the next two
    entropy: torch.Tensor | None = None
    predictions: torch.Tensor | None = None  # int64


class RowStatistics(NamedTuple):
    """What the separate backward needs of each row, (n_rows,); see `row_statistics`."""

    row_max: torch.Tensor | None = None
    row_sum: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None  # where shares are loaded


NO_STATISTICS = RowStatistics()


def loads_shares(rows: Rows, options: LossOptions) -> bool:
    """Whether every class has a share in a target, and it takes a load to know it."""
    is_weighted = rows.weight is not None and options.label_smoothing > 0.0
    return rows.has_probabilities or is_weighted


def numbers(options: LossOptions) -> tuple[int, float, float, float, float]:
    """(ignore_index, label_smoothing, z_loss, logit_scale, softcap), as the kernels take them."""
    softcap = 1.0 if options.softcap is None else options.softcap
    scale = options.logit_scale / softcap  # one product before the tanh
    return options.ignore_index, options.label_smoothing, options.z_loss, scale, softcap


def constants(rows: Rows, options: LossOptions) -> dict[str, bool]:
    """Those of every kernel that knows of the reduction."""
    return {"MEAN": options.reduction == "mean", **row_constants(rows, options)}


def row_constants(rows: Rows, options: LossOptions) -> dict[str, bool]:
    """Those that every kernel has; what is off costs nothing.

    SOFT: targets have a share in every class, as probabilities or smoothed class indices.
    """
    return {
        "SOFT": rows.has_probabilities or options.label_smoothing > 0.0,
        "HAS_SMOOTHING": options.label_smoothing > 0.0,
        "HAS_Z_LOSS": options.z_loss != 0.0,
        "HAS_SCALE": options.logit_scale != 1.0,
        "HAS_SOFTCAP": options.softcap is not None,
    }


def has_congruent_targets(rows: Rows, *others: torch.Tensor | None) -> bool:
    """`is_congruent` of probabilities, and of others like them; False of class indices."""
    return rows.has_probabilities and is_congruent(rows.logits, rows.targets, *others)


def is_congruent(logits: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether rows of the others begin where those of the logits do, counted in elements from a
    16-byte boundary: what starts a vector of one then starts a vector of the other."""
    vector = 16 // logits.element_size()
    return all(
        other is None
        or all((a - b) % vector == 0 for a, b in zip(_places(logits), _places(other), strict=True))
        for other in others
    )


def _places(rows: torch.Tensor) -> tuple[int, int, int]:
    """The first element and the strides of groups and rows, in elements; 0 where there is one."""
    n_groups, rows_per_group, _ = rows.shape
    group_stride, row_stride, _ = rows.stride()
    return (
        rows.data_ptr() // rows.element_size(),
        group_stride if n_groups > 1 else 0,
        row_stride if rows_per_group > 1 else 0,
    )
