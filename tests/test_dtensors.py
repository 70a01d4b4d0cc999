"""DTensors of every placement, in processes of their own: as the reference of whole tensors."""

import pytest
import torch
from oracle import random_logits, random_targets, random_weight
from ranks import CUDA, on_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_ce import (
    fused_cross_entropy,
    fused_linear_cross_entropy,
    reference_cross_entropy,
    reference_linear_cross_entropy,
)

DTYPE = torch.float64
TWO = pytest.param(2, marks=pytest.mark.slow)  # three have all that two have
ON_HOST = ("cpu", CUDA)  # what placements mean does not depend on who computes
PLACEMENTS = [Replicate(), Shard(2), Shard(-1), Shard(0), Shard(1)]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(weight=True, label_smoothing=0.1), id="weight"),
    pytest.param(dict(weight=True, sample_weight=True), id="sample-weight"),
    pytest.param(dict(sample_weight=True, return_stats=True, z_loss=0.1), id="stats"),
    pytest.param(dict(normalizer=5.0, softcap=3.0), id="normalizer"),
]


def mesh_of(here):
    return init_device_mesh(torch.device(here.device).type, (here.n_ranks,))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def made(n_classes, device, weight=False, sample_weight=False, **options):
    """(targets, class weights, sample weights, options) of (3, 4) rows."""
    targets = random_targets(3, 4, classes=n_classes, device=device)
    targets[0, 1] = -100
    weight = random_weight(n_classes, DTYPE, device) if weight else None
    of_rows = random_weight(12, DTYPE, device, seed=4).view(3, 4) if sample_weight else None
    return targets, weight, of_rows, options


def check(ours, theirs, of_ours, of_theirs):
    """All results, and the gradients of leaves through those that have one."""
    ours, theirs = (r if isinstance(r, tuple) else (r,) for r in (ours, theirs))
    ours, theirs = ((r[0], *r[1]) if len(r) == 2 else r for r in (ours, theirs))
    for values in (ours, theirs):
        sum(value.sum() * (0.7 + at) for at, value in enumerate(values[:4])).backward()
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(whole(mine), right)
    for leaf, right in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(whole(leaf.grad), right.grad)


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("n_classes", [33, 2])  # of 2 the third rank has none
@on_ranks(TWO, 3, backends=ON_HOST)
def test_logits(here, placement, n_classes, options):
    mesh = mesh_of(here)
    logits = random_logits(3, 4, n_classes, dtype=DTYPE, device=here.device)
    targets, weight, of_rows, options = made(n_classes, here.device, **options)
    for reduction in ("mean",) if "normalizer" in options else ("mean", "sum", "none"):
        call = dict(options, reduction=reduction, dim=-1)
        theirs, ours = leaves(logits, of_rows), leaves(logits, of_rows)
        ours[0] = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        weights = [dict(sample_weight=given[1]) if given[1:] else {} for given in (ours, theirs)]
        check(
            fused_cross_entropy(ours[0], targets, weight, **weights[0], **call),
            reference_cross_entropy(theirs[0], targets, weight, **weights[1], **call),
            ours, theirs,
        )  # fmt: skip


@on_ranks(2)
def test_everything_may_be_a_dtensor(here):
    """Targets and weights replicated, or placed as the logits are."""
    mesh = mesh_of(here)
    logits = random_logits(4, 33, dtype=DTYPE, device=here.device)
    targets = random_targets(4, classes=33, device=here.device)
    weight = random_weight(33, DTYPE, here.device)
    right = reference_cross_entropy(logits, targets, weight)
    for placement, of_targets, of_weight in (
        (Shard(1), Replicate(), Shard(0)), (Shard(1), Replicate(), Replicate()),
        (Shard(0), Shard(0), Replicate()), (Shard(0), Replicate(), Replicate()),
    ):  # fmt: skip
        given = [
            distribute_tensor(tensor, mesh, [place])
            for tensor, place in ((logits, placement), (targets, of_targets), (weight, of_weight))
        ]
        torch.testing.assert_close(fused_cross_entropy(*given).full_tensor(), right)


@pytest.mark.parametrize("placements", [
    (Replicate(), Shard(0)), (Replicate(), Replicate()), (Shard(0), Replicate()),
    (Shard(1), Replicate()),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", OPTIONS)
@on_ranks(TWO, 3, backends=ON_HOST)
def test_hidden_states(here, placements, options):
    mesh = mesh_of(here)
    head = [
        random_logits(*shape, dtype=DTYPE, device=here.device, seed=seed, scale=1.0)
        for seed, shape in enumerate([(3, 4, 5), (33, 5), (33,)])
    ]
    targets, weight, of_rows, options = made(33, here.device, **options)
    for reduction in ("mean",) if "normalizer" in options else ("mean", "sum", "none"):
        call = dict(options, reduction=reduction, weight=weight, chunk_size=2)
        theirs, ours = leaves(*head, of_rows), leaves(*head, of_rows)
        for at, placement in enumerate((placements[0], *placements[1:] * 2)):
            ours[at] = distribute_tensor(head[at], mesh, [placement]).requires_grad_()
        results = []
        for function, given in (
            (fused_linear_cross_entropy, ours), (reference_linear_cross_entropy, theirs),
        ):  # fmt: skip
            of_these = dict(sample_weight=given[3]) if given[3:] else {}
            results.append(
                function(given[0], given[1], targets, linear_bias=given[2], **of_these, **call)
            )
        check(*results, ours, theirs)


@on_ranks(2)
def test_code_for_loss_parallel(here):
    """Its F.cross_entropy replaced by ours, with an option that it lacks."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = mesh_of(here)
    logits = random_logits(6, 33, device=here.device)
    targets = random_targets(6, classes=33, device=here.device)
    ours, theirs = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_(), leaves(logits)
    with loss_parallel():
        loss = fused_cross_entropy(ours, targets, label_smoothing=0.1)
        assert loss.placements == (Replicate(),)
        loss.backward()
    right = torch.nn.functional.cross_entropy(theirs[0], targets, label_smoothing=0.1)
    right.backward()
    torch.testing.assert_close(loss.full_tensor(), right)
    torch.testing.assert_close(ours.grad.full_tensor(), theirs[0].grad)


@on_ranks(2)
def test_what_is_refused_is_named(here):
    mesh = mesh_of(here)
    logits = random_logits(4, 6, device=here.device)
    targets = random_targets(4, classes=6, device=here.device)
    hidden, weight = random_logits(4, 3, device=here.device), random_logits(6, 3)
    weight = weight.to(here.device)

    def placed(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement])

    with pytest.raises(ValueError, match=r"logits must be Replicate\(\) or Shard\(\), got .*sum"):
        fused_cross_entropy(DTensor.from_local(logits, mesh, [Partial()]), targets)
    with pytest.raises(TypeError, match="plain logits"):
        fused_cross_entropy(logits, placed(targets, Replicate()))
    with pytest.raises(ValueError, match=r"targets must be plain or Replicate\(\)"):
        fused_cross_entropy(placed(logits, Shard(1)), placed(targets, Shard(0)))
    with pytest.raises(TypeError, match="got probabilities: redistribute"):
        fused_cross_entropy(placed(logits, Shard(1)), logits.softmax(1))
    with pytest.raises(TypeError, match="linear_weight must be a plain tensor .* unshard"):
        fused_linear_cross_entropy(hidden, placed(weight, Shard(0)), targets)
    with pytest.raises(TypeError, match="linear_weight must be a DTensor"):
        fused_linear_cross_entropy(placed(hidden, Replicate()), weight, targets)
    for places in ((Shard(0), Shard(0)), (Replicate(), Shard(1)), (Shard(1), Replicate())):
        with pytest.raises(ValueError, match=r"need hidden Replicate\(\) with linear_weight Sh"):
            fused_linear_cross_entropy(
                placed(hidden, places[0]), placed(weight, places[1]), targets
            )
    with pytest.raises(TypeError, match="linear_bias must be a DTensor"):
        fused_linear_cross_entropy(
            placed(hidden, Replicate()), placed(weight, Shard(0)), targets, linear_bias=weight[:, 0]
        )
    with pytest.raises(ValueError, match=r"a mesh of ascending ranks, got \[1, 0\]"):
        fused_cross_entropy(
            distribute_tensor(logits, DeviceMesh(mesh.device_type, [1, 0]), [Shard(1)]), targets
        )
    mesh = init_device_mesh(mesh.device_type, (1, 2))
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        fused_cross_entropy(distribute_tensor(logits, mesh, [Replicate(), Shard(1)]), targets)
