"""One problem for every rank, of which each takes its own classes, and what is right of it."""

import itertools

import torch
import torch.distributed as dist
from oracle import (
    assert_as_near,
    random_logits,
    random_targets,
    random_upstream,
    random_weight,
)

from fused_ce import (
    fused_cross_entropy,
    fused_linear_cross_entropy,
    reference_cross_entropy,
    reference_linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

N_ROWS, N_CLASSES, N_FEATURES = 7, 33, 5
SIZES = {2: (21, 12), 3: (1, 20, 12)}
OUTPUTS = ("loss", "losses", "lse", "entropy")
NOT_OF_REFERENCE = ("inplace", "grad_in_forward", "skip_ignored", "chunk_size", "logits_dtype")


def classes_of(here, sizes=None):
    """The slice of the vocabulary that a rank has."""
    bounds = [0, *itertools.accumulate(sizes or SIZES[here.n_ranks])]
    return slice(bounds[here.rank], bounds[here.rank + 1])


def some_targets(n_classes=N_CLASSES, ignore_index=-100, device="cpu"):
    """The first class, the last, one ignored row, any others."""
    targets = random_targets(N_ROWS, classes=n_classes)
    targets[0], targets[1], targets[2] = 0, n_classes - 1, ignore_index
    return targets.to(device)


def some_logits(*shape, dtype=torch.float64, device="cpu"):
    return random_logits(*(shape or (N_ROWS, N_CLASSES)), dtype=dtype, device=device)


def some_head(dtype=torch.float64, device="cpu", n_classes=N_CLASSES):
    """Hidden states, weight and bias."""
    return tuple(
        random_logits(*shape, dtype=dtype, device=device, seed=seed, scale=1.0)
        for seed, shape in enumerate(((N_ROWS, N_FEATURES), (n_classes, N_FEATURES), (n_classes,)))
    )


def named(result):
    """The outputs of a call by their names."""
    if not isinstance(result, tuple):
        return dict(loss=result)
    return dict(loss=result[0], **result[1]._asdict())


def differentiated(result, leaves, through=OUTPUTS):
    """The outputs, and their gradients from upstream ones that no two rows or outputs share."""
    found = named(result)
    used = [name for name in through if name in found]
    upstreams = [
        random_upstream(found[name].double(), seed=3 + len(name)).to(found[name]) for name in used
    ]
    gradients = torch.autograd.grad(
        [found[name] for name in used], list(leaves.values()), upstreams
    )
    found = {name: value.detach() for name, value in found.items()}
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def with_tensors(options, dtype, device, ignore_index=-100):
    """Options in which True stands for tensors that every rank has whole."""
    made = dict(options)
    if made.get("weight") is True:
        made["weight"] = random_weight(N_CLASSES, dtype, device)
    if made.get("sample_weight") is True:
        made["sample_weight"] = random_weight(N_ROWS, dtype, device, seed=9)
    if made.get("normalizer") is True:
        made["normalizer"] = torch.tensor(4.5, device=device)
    return made


def in_float64(options):
    """For the reference: what says how to compute says nothing to it."""
    kept = {name: value for name, value in options.items() if name not in NOT_OF_REFERENCE}
    for name in ("weight", "sample_weight"):
        if kept.get(name) is not None:
            kept[name] = kept[name].double()
    return kept


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def _of(function, tensors, targets, options, through):
    """What a function of leaves (logits, or hidden, weight, bias) finds."""
    leaves = {name: leaf(tensor) for name, tensor in tensors.items()}
    options = dict(options)
    inputs = dict(leaves)
    if options.get("sample_weight") is not None:
        leaves["sample_weight"] = options["sample_weight"] = leaf(options["sample_weight"])
    if options.get("inplace"):
        inputs["logits"] = leaves["logits"] * 1
    return differentiated(function(*inputs.values(), targets, options), leaves, through)


def compared(here, linear, dtype, options, *, through=OUTPUTS, sizes=None, group=None):
    """Every value and gradient of this rank is as near to the right one as that of one device."""
    mine, ignore_index = classes_of(here, sizes), options.get("ignore_index", -100)
    targets = some_targets(ignore_index=ignore_index, device=here.device)
    options = with_tensors(options, dtype, here.device)
    if linear:
        tensors = dict(
            zip(("hidden", "weight", "bias"), some_head(dtype, here.device), strict=True)
        )
        shards = {n: t if n == "hidden" else t[mine] for n, t in tensors.items()}
        functions = _linear, _fused_linear, _reference_linear
    else:
        tensors = dict(logits=some_logits(dtype=dtype, device=here.device))
        shards = dict(logits=tensors["logits"][:, mine])
        functions = _logits, _fused, _reference
    of_mine = dict(options, group=group)
    if options.get("weight") is not None:
        of_mine["weight"] = options["weight"][mine]
    ours = _of(functions[0], shards, targets, of_mine, through)
    theirs = _of(functions[1], tensors, targets, options, through)
    right = _of(
        functions[2], {n: t.double() for n, t in tensors.items()}, targets, in_float64(options),
        through,
    )  # fmt: skip
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        if name == "predictions":
            assert torch.equal(value, right[name]), name
            continue
        try:
            assert_as_near(_whole(name, value, theirs[name], mine), theirs[name], right[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _whole(name, value, whole, mine):
    """Where a rank has a part of a gradient, the rest as of one device."""
    if name not in ("grad_logits", "grad_weight", "grad_bias"):
        assert value.shape == whole.shape, name
        return value
    made = whole.clone()
    place = made[:, mine] if name == "grad_logits" else made[mine]
    assert value.shape == place.shape, name
    place.copy_(value)
    return made


def _logits(logits, targets, options):
    return vocab_parallel_cross_entropy(logits, targets, **options)


def _fused(logits, targets, options):
    return fused_cross_entropy(logits, targets, **options)


def _reference(logits, targets, options):
    return reference_cross_entropy(logits, targets, **options)


def _linear(hidden, weight, bias, targets, options):
    return vocab_parallel_linear_cross_entropy(
        hidden, weight, targets, linear_bias_shard=bias, **options
    )


def _fused_linear(hidden, weight, bias, targets, options):
    return fused_linear_cross_entropy(hidden, weight, targets, linear_bias=bias, **options)


def _reference_linear(hidden, weight, bias, targets, options):
    return reference_linear_cross_entropy(hidden, weight, targets, linear_bias=bias, **options)


def same_everywhere(values, group=None):
    """Fail unless all ranks have the same bits."""
    found = [None] * dist.get_world_size(group)
    bits = [value.detach().cpu().reshape(-1).view(torch.uint8).tolist() for value in values]
    dist.all_gather_object(found, bits, group=group)
    assert all(of_rank == found[0] for of_rank in found)
