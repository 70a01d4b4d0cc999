"""DTensors: which of the losses their placements ask for.

Logits on a one-dimensional mesh may be replicated, sharded over their classes (each rank then reads
its own columns) or over a batch axis (each rank then has its own rows, and all of them one
divisor). Everything else is refused by name: gathering is the caller's to decide.
"""

from typing import Any

import torch
import torch.distributed as dist

from fused_ce.arguments import class_axis, prepare
from fused_ce.options import LossOptions
from fused_ce.row_losses import mean_divisor
from fused_ce.rows import compute_dtype
from fused_ce.stats import CrossEntropyStats
from fused_ce.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)


def is_dtensor(tensor: object) -> bool:
    """Whether it is one, without an import that nobody else needs."""
    kind = type(tensor)
    return (
        kind is not torch.Tensor
        and kind.__name__ == "DTensor"
        and kind.__module__.startswith("torch.distributed.")
    )


def cross_entropy_of_dtensors(local_loss, logits, targets, weight, *, dim, **options):
    """`fused_cross_entropy` of DTensors; local_loss is the same of plain tensors."""
    if not is_dtensor(logits):
        raise TypeError(
            "targets, weights and normalizer may be DTensors only where the logits are one, got "
            "plain logits: pass to_local() or full_tensor() of them"
        )
    mesh, kind, axis = _placement("logits", logits)
    dim = class_axis(logits.shape, targets.shape, dim, targets.is_floating_point())
    if kind == "shard" and axis == dim:
        if targets.is_floating_point():
            raise TypeError(
                "targets must be class indices where the logits are sharded over classes, got "
                "probabilities: redistribute the logits to Replicate()"
            )
        options = _whole_options(mesh, options)
        result = vocab_parallel_cross_entropy(
            logits.to_local(),
            _whole("targets", targets, mesh),
            _cut("weight", weight, mesh, 0, logits.shape[dim]),
            group=mesh.get_group(),
            dim=dim,
            shard_sizes=_chunk_sizes(logits.shape[dim], mesh.size()),
            **options,
        )
        return _everywhere(result, mesh)
    weight = _whole("weight", weight, mesh)
    if kind == "replicate":
        options = _whole_options(mesh, options)
        targets = _whole("targets", targets, mesh)
        return _everywhere(local_loss(logits.to_local(), targets, weight, dim=dim, **options), mesh)
    has_classes = targets.is_floating_point()
    of_targets = axis if has_classes or axis < dim else axis - 1
    of_rows = axis if axis < dim else axis - 1
    given = _BatchShard(mesh, of_rows, logits.shape[:dim] + logits.shape[dim + 1 :])
    targets = _cut("targets", targets, mesh, of_targets, targets.shape[of_targets])
    local = logits.to_local()

    def divisor_of(options):
        call = prepare(local, targets, weight, options["sample_weight"], dim, _numbers(options))
        return mean_divisor(call.rows, call.options, compute_dtype(local))

    def loss(**options):
        return local_loss(local, targets, weight, dim=dim, **options)

    return given.loss(loss, divisor_of, options)


def linear_cross_entropy_of_dtensors(
    local_loss, hidden, linear_weight, targets, *, linear_bias, weight, **options
):
    """`fused_linear_cross_entropy` of DTensors; local_loss is the same of plain tensors."""
    _check_head(hidden, linear_weight, linear_bias)
    mesh, kind, axis = _placement("hidden", hidden)
    _, weight_kind, weight_axis = _placement("linear_weight", linear_weight)
    n_classes = linear_weight.shape[0]
    if weight_kind == "shard" and weight_axis == 0 and kind == "replicate":
        options = _whole_options(mesh, options)
        result = vocab_parallel_linear_cross_entropy(
            hidden.to_local(),
            linear_weight.to_local(),
            _whole("targets", targets, mesh),
            linear_bias_shard=None if linear_bias is None else linear_bias.to_local(),
            weight=_cut("weight", weight, mesh, 0, n_classes),
            group=mesh.get_group(),
            shard_sizes=_chunk_sizes(n_classes, mesh.size()),
            **options,
        )
        return _everywhere(result, mesh)
    if weight_kind != "replicate" or kind == "shard" and axis == hidden.dim() - 1:
        raise ValueError(
            f"hidden {hidden.placements} with linear_weight {linear_weight.placements}: need "
            "hidden Replicate() with linear_weight Shard(0) or Replicate(), or hidden sharded on a "
            "batch axis with linear_weight Replicate()"
        )
    weight = _whole("weight", weight, mesh)
    if kind == "replicate":
        options = _whole_options(mesh, options)
        result = local_loss(
            hidden.to_local(), linear_weight.to_local(), _whole("targets", targets, mesh),
            linear_bias=None if linear_bias is None else linear_bias.to_local(), weight=weight,
            **options,
        )  # fmt: skip
        return _everywhere(result, mesh)
    from torch.distributed.tensor import Partial

    given = _BatchShard(mesh, axis, hidden.shape[:-1])
    targets = _cut("targets", targets, mesh, axis, targets.shape[axis])
    local, head = hidden.to_local(), linear_weight.to_local(grad_placements=[Partial()])
    bias = None if linear_bias is None else linear_bias.to_local(grad_placements=[Partial()])

    def divisor_of(options):
        stand_in = local.detach().new_zeros(()).expand(*local.shape[:-1], n_classes)
        call = prepare(stand_in, targets, weight, options["sample_weight"], -1, _numbers(options))
        return mean_divisor(call.rows, call.options, compute_dtype(local))

    def loss(**options):
        return local_loss(local, head, targets, linear_bias=bias, weight=weight, **options)

    return given.loss(loss, divisor_of, options)


class _BatchShard:
    """Rows that lie on the ranks of a mesh."""

    def __init__(self, mesh, axis, batch_shape):
        self.mesh, self.axis, self.batch_shape = mesh, axis, batch_shape

    def loss(self, local_loss, divisor_of, options):
        """Of these rows, with the divisor of all: summed over ranks, the loss."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, options = self.mesh, _whole_options(self.mesh, options, cut=self)
        divisor = None
        if options["reduction"] == "mean" and options["normalizer"] is None:
            divisor = divisor_of(options)
        if divisor is not None and divisor.requires_grad:  # sample_weight moves it
            result = local_loss(**options | dict(reduction="sum"))
            result, stats = result if options["return_stats"] else (result, None)
            total, divisor = (
                DTensor.from_local(number, mesh, [Partial()]).redistribute(mesh, [Replicate()])
                for number in (result, divisor)
            )
            loss = total / divisor
        else:
            if divisor is not None:
                dist.all_reduce(divisor, group=mesh.get_group())
                options["normalizer"] = divisor
            result = local_loss(**options)
            result, stats = result if options["return_stats"] else (result, None)
            of_rows = options["reduction"] == "none"
            loss = self.placed(result) if of_rows else DTensor.from_local(result, mesh, [Partial()])
        if stats is None:
            return loss
        return loss, CrossEntropyStats(*map(self.placed, stats))

    def placed(self, of_rows):
        """Of each row, where it lies."""
        from torch.distributed.tensor import DTensor, Shard

        shape = self.batch_shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            of_rows, self.mesh, [Shard(self.axis)], shape=shape, stride=stride
        )


def _placement(name, tensor) -> tuple[Any, str, Any]:
    """(mesh, "replicate" or "shard", axis) of a DTensor on a mesh of one dimension."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must lie on a mesh of one dimension, got {mesh.ndim} ({placements}): pass "
            "to_local() of the dimensions over which the loss is local, as a DTensor of the other"
        )
    ranks = mesh.mesh.tolist()
    if ranks != sorted(ranks):  # groups are sorted: PyTorch's own ways to cut then disagree
        raise ValueError(f"{name} must lie on a mesh of ascending ranks, got {ranks}")
    (placement,) = placements
    if type(placement) is Replicate:
        return mesh, "replicate", None
    if type(placement) is Shard:
        return mesh, "shard", placement.dim % tensor.dim()
    raise ValueError(
        f"{name} must be Replicate() or Shard(), got {placement}: redistribute it first"
    )


def _check_head(hidden, linear_weight, linear_bias) -> None:
    """All of them DTensors, on one mesh, and the bias placed as the weight."""
    if not is_dtensor(hidden) and not is_dtensor(linear_weight):
        raise TypeError(
            "targets, weights and normalizer may be DTensors only where hidden and linear_weight "
            "are, got plain ones: pass to_local() or full_tensor() of them"
        )
    if not is_dtensor(hidden):
        raise TypeError(
            "linear_weight must be a plain tensor beside plain hidden states, got a DTensor: a "
            "shard of FSDP looks just like one of the vocabulary. Call the loss where the weight "
            "is whole (inside the forward of an FSDP module, or under unshard()) or pass its "
            "full_tensor(); for a vocabulary in shards pass hidden as a DTensor, Replicate() on "
            "the same mesh"
        )
    if not is_dtensor(linear_weight):
        raise TypeError(
            "linear_weight must be a DTensor where hidden is one, got a plain tensor: pass "
            "DTensor.from_local(linear_weight, mesh, [Replicate()])"
        )
    mesh, weight_mesh = hidden.device_mesh, linear_weight.device_mesh
    if weight_mesh != mesh:
        raise ValueError(f"hidden on {mesh} needs linear_weight there, got {weight_mesh}")
    if linear_bias is None:
        return
    if not is_dtensor(linear_bias):
        raise TypeError("linear_bias must be a DTensor where linear_weight is one, got a plain one")
    if linear_bias.device_mesh != mesh or linear_bias.placements != linear_weight.placements:
        raise ValueError(
            f"linear_bias must be placed as linear_weight, {linear_weight.placements}, got "
            f"{linear_bias.placements}"
        )


def _whole(name, tensor, mesh):
    """A plain tensor that every rank has whole."""
    if not is_dtensor(tensor):
        return tensor
    if tensor.device_mesh != mesh:
        raise ValueError(f"{name} must lie on {mesh} or be plain, got {tensor.device_mesh}")
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(f"{name} must be plain or Replicate(), got {tensor.placements}")
    return tensor.to_local()


def _cut(name, tensor, mesh, axis, size) -> Any:
    """This rank's part of an axis, of a tensor that is whole or cut there already."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if tensor is None:
        return None
    if is_dtensor(tensor) and tensor.device_mesh == mesh:
        if tensor.placements == (Shard(axis),) or tensor.placements == (
            Shard(axis - tensor.dim()),
        ):
            return tensor.to_local()
    tensor = _whole(name, tensor, mesh)
    if tensor.shape[axis] != size:
        raise ValueError(f"{name} needs {size} on axis {axis}, got {tuple(tensor.shape)}")
    tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return tensor.redistribute(mesh, [Shard(axis)]).to_local()


def _whole_options(mesh, options, cut=None):
    """The options with plain tensors; sample_weight cut where the rows are."""
    options = dict(options)
    if options["sample_weight"] is not None and cut is not None:
        size = cut.batch_shape[cut.axis]
        options["sample_weight"] = _cut(
            "sample_weight", options["sample_weight"], mesh, cut.axis, size
        )
    for name in ("sample_weight", "normalizer"):
        options[name] = _whole(name, options[name], mesh)
    return options


def _numbers(options) -> LossOptions:
    return LossOptions(**{name: options[name] for name in LossOptions._fields if name in options})


def _everywhere(result, mesh):
    """A loss, or loss and stats, that every rank has."""
    from torch.distributed.tensor import DTensor, Replicate

    def of_all(tensor):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    if isinstance(result, tuple):
        loss, stats = result
        return of_all(loss), CrossEntropyStats(*map(of_all, stats))
    return of_all(result)


def _chunk_sizes(size: int, n_ranks: int) -> tuple[int, ...]:
    """How DTensor cuts an axis: as torch.chunk, with nothing for the last ranks if need be."""
    chunk = -(-size // n_ranks)
    return tuple(max(0, min(chunk, size - rank * chunk)) for rank in range(n_ranks))
