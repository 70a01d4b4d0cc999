"""The operators of torch.library: what a compiler sees of a loss, instead of its kernels.

`torch.ops.fused_ce.row_losses`, `.row_gradients` and `.row_tangents` are the three functions of
row_losses.py, with their derivatives. Their results are told from shapes alone.
"""

import torch

from fused_ce.options import RowOptions
from fused_ce.row_losses import RowGradients, RowLosses, kinds_of_results
from fused_ce.row_tangents import RowTangents, folded
from fused_ce.rows import compute_dtype, empty_gradient

ROWS = "Tensor logits, Tensor targets, Tensor? weight"
UPSTREAM = "Tensor? grad_losses, Tensor? grad_lse, Tensor? grad_entropy"
KEPT = "Tensor row_max, Tensor row_sum, Tensor row_weight, Tensor entropy"
NEEDS = "bool needs_logits, bool needs_targets"
OPTIONS = (
    "SymInt ignore_index, float label_smoothing, float z_loss, float logit_scale, float? softcap, "
    "bool return_stats, str backend"
)


def _row_losses(logits, targets, weight, *options):
    kinds = kinds_of_results(logits, targets, weight, RowOptions(*options))
    return tuple(logits.new_empty(size, dtype=dtype) for size, dtype in kinds)


def _row_gradients(grad_losses, grad_lse, grad_entropy, logits, targets, weight, *rest):
    return _gradients(logits, targets, *rest[4:6])


def _row_tangents(
    logits_direction, targets_direction, grad_losses, grad_lse, grad_entropy,
    logits, targets, weight, needs_logits, needs_targets, *options,
):  # fmt: skip
    n_rows, dtype = logits.shape[0] * logits.shape[1], compute_dtype(logits)
    return (
        *(logits.new_empty(n_rows, dtype=dtype) for _ in range(3)),
        *_gradients(logits, targets, needs_logits, needs_targets),
    )


def _gradients(logits, targets, needs_logits, needs_targets):
    return (
        empty_gradient(logits, 0) if needs_logits else logits.new_empty(0),
        empty_gradient(targets, 0) if needs_targets else logits.new_empty(0),
    )


def _aligned(function):
    """The function, its results where a compiler may expect them: at a multiple of 16 bytes.

    Only gradients of misaligned logits are elsewhere: they cost a copy.
    """

    def aligned(*args):
        return tuple(
            result if result.data_ptr() % 16 == 0 else _moved(result) for result in function(*args)
        )

    return aligned


def _moved(tensor):
    """A copy with the same strides, which those of `clone` need not be."""
    place = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return place.copy_(tensor)


def _register(name, arguments, n_results, function, fake):
    results = ", ".join(["Tensor"] * n_results)
    operator = torch.library.custom_op(
        f"fused_ce::{name}", _aligned(function.forward), mutates_args=(),
        schema=f"({arguments}, {OPTIONS}) -> ({results})",
        tags=(torch.Tag.needs_exact_strides,),  # a gradient lies as its logits do
    )  # fmt: skip
    operator.register_fake(fake)
    operator.register_vmap(
        lambda info, in_dims, *args: folded(operator, info, in_dims, args, function.weight_at)
    )
    operator.register_autograd(function.backward, setup_context=function.setup_context)


_register("row_losses", ROWS, 7, RowLosses, _row_losses)
_register("row_gradients", f"{UPSTREAM}, {ROWS}, {KEPT}, {NEEDS}", 2, RowGradients, _row_gradients)
_register(
    "row_tangents",
    f"Tensor? logits_direction, Tensor? targets_direction, {UPSTREAM}, {ROWS}, {NEEDS}",
    5, RowTangents, _row_tangents,
)  # fmt: skip
