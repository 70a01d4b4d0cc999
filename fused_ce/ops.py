"""The operators of torch.library: what a compiler sees of a loss, instead of its kernels.

`torch.ops.fused_ce.row_losses`, `.row_gradients` and `.row_tangents` are the three functions of
row_losses.py, with their derivatives; `.linear_losses` and `.linear_gradients` the two of
linear_autograd.py. Their results are told from shapes alone.
"""

import torch

from fused_ce.linear_autograd import LinearLosses, kinds_of_linear_results, linear_gradients
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

HEAD = (
    "Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor targets, Tensor? weight, "
    "Tensor? sample_weight, Tensor? normalizer"
)
NEEDS_HEAD = "bool needs_hidden, bool needs_weight, bool needs_bias"
PLAN = (
    "SymInt ignore_index, str reduction, float label_smoothing, float z_loss, float logit_scale, "
    "float? softcap, bool return_stats, str backend, ScalarType logits_dtype, bool skip_ignored, "
    "SymInt? chunk_size"
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


def _linear_losses(*args):
    kinds = kinds_of_linear_results(*args)
    return tuple(args[0].new_empty(shape, dtype=dtype) for shape, dtype in kinds)


def _linear_gradients(*args):
    hidden, weight, bias, targets = args[3:7]
    *needs_head, needs_targets = args[14:18]
    made = [
        like.new_empty(like.shape) if needed else hidden.new_empty(0)
        for like, needed in zip((hidden, weight, bias), needs_head, strict=True)
    ]
    return *made, empty_gradient(targets, 0) if needs_targets else hidden.new_empty(0)


def _operator(name, arguments, n_results, function, fake):
    results = ", ".join(["Tensor"] * n_results)
    operator = torch.library.custom_op(
        f"fused_ce::{name}", _aligned(function), mutates_args=(),
        schema=f"({arguments}) -> ({results})",
        tags=(torch.Tag.needs_exact_strides,),  # a gradient lies as its logits do
    )  # fmt: skip
    operator.register_fake(fake)
    return operator


def _of_rows(name, arguments, n_results, function, fake):
    operator = _operator(name, f"{arguments}, {OPTIONS}", n_results, function.forward, fake)
    operator.register_vmap(
        lambda info, in_dims, *args: folded(operator, info, in_dims, args, function.weight_at)
    )
    operator.register_autograd(function.backward, setup_context=function.setup_context)


_of_rows("row_losses", ROWS, 7, RowLosses, _row_losses)
_of_rows("row_gradients", f"{UPSTREAM}, {ROWS}, {KEPT}, {NEEDS}", 2, RowGradients, _row_gradients)
_of_rows(
    "row_tangents",
    f"Tensor? logits_direction, Tensor? targets_direction, {UPSTREAM}, {ROWS}, {NEEDS}",
    5, RowTangents, _row_tangents,
)  # fmt: skip
_operator(
    "linear_losses", f"{HEAD}, {NEEDS_HEAD}, bool unweighted, {PLAN}", 13,
    LinearLosses.forward, _linear_losses,
).register_autograd(LinearLosses.backward, setup_context=LinearLosses.setup_context)  # fmt: skip
_operator(
    "linear_gradients",
    f"{UPSTREAM}, {HEAD}, Tensor entropy, Tensor row_max, Tensor row_sum, Tensor row_weight, "
    f"{NEEDS_HEAD}, bool needs_targets, {PLAN}",
    4, linear_gradients, _linear_gradients,
)  # fmt: skip
