"""Shards of the classes, rank by rank in one process: the exchange is a stack of tensors here."""

import itertools

import pytest
import torch
from oracle import assert_as_near, derived, random_logits, random_targets, random_weight, worst

from fused_ce import reference_cross_entropy
from fused_ce.backend import choose, implementation
from fused_ce.options import LossOptions
from fused_ce.rows import Rows, Upstream, empty_gradient
from fused_ce.sharded_autograd import statistics_of
from fused_ce.shards import Shard, ShardStatistics, combined, targets_of

SIZES = [(33,), (20, 13), (1, 31, 1), (7, 0, 26), (1025, 3), (600, 1300, 7)]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(label_smoothing=0.1), id="smoothing"),
    pytest.param(dict(weight=True), id="weight"),
    pytest.param(dict(weight=True, label_smoothing=0.1, return_stats=True), id="weighted-stats"),
    pytest.param(dict(return_stats=True), id="stats"),
    pytest.param(dict(z_loss=0.1, logit_scale=0.7, softcap=4.0), id="softcap"),
    pytest.param(
        dict(
            weight=True,
            label_smoothing=0.2,
            z_loss=0.1,
            logit_scale=-0.7,
            softcap=4.0,
            return_stats=True,
        ),
        id="everything",
    ),  # fmt: skip
]


def by_shards(logits, targets, sizes, upstream, weight=None, **options):
    """(what all ranks know of the rows, the gradient of the logits) of ranks one after another."""
    options = LossOptions(reduction="none", **options)
    device, dtype = logits.device, torch.promote_types(logits.dtype, torch.float32)
    backend = choose(device)
    bounds = [0, *itertools.accumulate(sizes)]
    found, weights, rows_of = [], [], []
    for first, last in itertools.pairwise(bounds):
        of_mine = None if weight is None else weight[first:last]
        rows = Rows(logits[None, :, first:last], targets[None], of_mine)
        mine, of_targets = statistics_of(rows, options, backend)(Shard(first, bounds[-1]))
        found.append(mine)
        weights.append(of_targets)
        rows_of.append(rows)
    parts = ShardStatistics(
        *(None if of[0] is None else torch.stack(of) for of in zip(*found, strict=True))
    )
    of_classes = torch.ones(bounds[-1]) if weight is None else weight.to(dtype)
    sums = [of_classes[a:b].sum().item() for a, b in itertools.pairwise(bounds)]
    known = targets_of(
        targets, None if weight is None else torch.stack(weights).sum(0),
        torch.tensor(sums, dtype=dtype, device=device), torch.tensor(bounds, device=device),
        options,
    )  # fmt: skip
    whole = combined(parts, known, options)
    statistics = whole.row_max, whole.row_sum, known.share, whole.entropy
    grads = []
    for first, rows in zip(bounds, rows_of, strict=False):
        grad = empty_gradient(rows.logits)
        implementation(backend).shard_gradient(
            Upstream(*upstream), rows, statistics, options, Shard(first, bounds[-1]), grad
        )
        grads.append(grad[0])
    return whole, torch.cat(grads, dim=1)


def some_rows(sizes, dtype, device, n_rows=5):
    logits = random_logits(n_rows, sum(sizes), dtype=dtype, device=device)
    targets = random_targets(n_rows, classes=sum(sizes), device=device)
    targets[1] = -100
    targets[2] = sum(sizes) - 1
    logits[1] = torch.nan
    return logits, targets


@pytest.mark.thinned
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ranks_know_together_what_one_device_knows(fused_device, sizes, dtype, options):
    logits, targets = some_rows(sizes, dtype, fused_device)
    options = dict(options)
    has_weight = options.pop("weight", False)
    weight = random_weight(sum(sizes), dtype, fused_device) if has_weight else None
    compute = torch.promote_types(dtype, torch.float32)
    n_upstream = 3 if options.get("return_stats") else 1
    upstream = [
        random_logits(5, seed=seed, dtype=compute, device=fused_device, scale=1.0)
        for seed in range(n_upstream)
    ]
    whole, grad = by_shards(logits, targets, sizes, upstream, weight, **options)

    names = ("loss", "lse", "entropy")[:n_upstream]
    right, rounding = derived(
        logits.masked_fill((targets == -100)[:, None], 0.0), targets.cpu(),
        None if weight is None else weight.cpu(),
        upstreams=dict(zip(names, upstream, strict=True)), reduction="none",
        **{name: value for name, value in options.items() if name != "return_stats"},
    )  # fmt: skip
    eps = torch.finfo(compute).eps
    assert worst(whole.losses, right["loss"]) <= 8 * eps * rounding["loss"]
    assert worst(whole.lse, right["lse"]) <= 8 * eps * rounding["lse"]
    # The interpreter rounds to bfloat16 towards zero.
    slack = 8 * eps + (0 if dtype == compute else torch.finfo(dtype).eps)
    assert worst(grad, right["grad_logits"]) <= slack * rounding["grad_logits"]
    assert (grad[1] == 0.0).all()
    if options.get("return_stats"):
        assert worst(whole.entropy, right["entropy"]) <= 8 * eps * rounding["entropy"]
        assert whole.predictions.tolist() == right["predictions"].tolist()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_no_digits_are_lost_at_an_offset(fused_device, offset):
    """As near to float64 as one device is."""
    sizes = (40, 1, 23)
    logits = random_logits(6, 64, device=fused_device).mul(64).round().div(64) + offset
    targets = random_targets(6, classes=64, device=fused_device)
    upstream = [torch.ones(6, device=fused_device)]
    for smoothing in (0.0, 0.1):
        whole, grad = by_shards(logits, targets, sizes, upstream, label_smoothing=smoothing)
        leaves = [logits.detach().to(kind).requires_grad_() for kind in (None, torch.float64)]
        of_one = [
            reference_cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
            for leaf in leaves
        ]
        assert_as_near(whole.losses, *(losses.detach() for losses in of_one))
        theirs = [
            torch.autograd.grad(losses.sum(), leaf)[0]
            for losses, leaf in zip(of_one, leaves, strict=True)
        ]
        assert_as_near(grad, *theirs)


INF, LOWEST = torch.inf, torch.finfo(torch.float32).min


@pytest.mark.thinned
@pytest.mark.parametrize("row", [
    pytest.param([-INF, -INF, -INF, 1.0, 2.0, 0.5], id="a-shard-of-inf"),
    pytest.param([1.0, 2.0, 0.5, -INF, -INF, -INF], id="the-last-shard-of-inf"),
    pytest.param([-INF, -INF, -INF, LOWEST, LOWEST, -INF], id="the-lowest"),
    pytest.param([LOWEST] * 6, id="all-the-lowest"),
    pytest.param([0.0, INF, 1.0, 2.0, 1.0, 0.0], id="inf"),
    pytest.param([0.0, 1.0, 1.0, 2.0, torch.nan, 0.0], id="nan"),
    pytest.param([-INF] * 6, id="nothing"),
    pytest.param([1.0, 3.0, 2.0, 3.0, 3.0, 0.0], id="ties"),
    pytest.param([200.0, 0.0, 0.0, -300.0, 0.0, 0.0], id="far-apart"),
])  # fmt: skip
@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3), (6,)], ids=str)
@pytest.mark.parametrize("target", [0, 4])
def test_infinities(fused_device, row, sizes, target):
    logits = torch.tensor([row, [0.0] * 6], device=fused_device)
    targets = torch.tensor([target, 1], device=fused_device)
    upstream = [torch.ones(2, device=fused_device), *([torch.zeros(2, device=fused_device)] * 2)]
    whole, grad = by_shards(logits, targets, sizes, upstream, return_stats=True)
    leaf = logits.detach().requires_grad_()
    losses, stats = reference_cross_entropy(leaf, targets, reduction="none", return_stats=True)
    (right,) = torch.autograd.grad(losses.sum(), leaf)
    same = dict(equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.losses, losses, **same)
    torch.testing.assert_close(grad, right, **same)
    torch.testing.assert_close(whole.entropy, stats.entropy, **same)
    if not (logits.isnan().any() or (logits[0] == -INF).all()):
        torch.testing.assert_close(whole.lse, stats.lse, **same)
        assert whole.predictions.tolist() == stats.predictions.tolist()


def test_a_target_that_nobody_has_poisons_its_row(fused_device):
    logits, targets = some_rows((20, 13), torch.float32, fused_device)
    targets[3], targets[4] = 33, -1
    upstream = [torch.ones(5, device=fused_device)]
    weight = random_weight(33, device=fused_device)
    for of_classes in (None, weight):
        whole, grad = by_shards(logits, targets, (20, 13), upstream, of_classes)
        assert whole.losses.isnan().tolist() == [False, False, False, True, True]
        assert grad.isnan().all(dim=1).tolist() == [False, False, False, True, True]
        assert not grad[:3].isnan().any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned"])
def test_layouts(fused_device, layout):
    sizes = (40, 24)
    dense = random_logits(5, 64, device=fused_device)
    targets = random_targets(5, classes=64, device=fused_device)
    upstream = [torch.ones(5, device=fused_device)]
    right = by_shards(dense, targets, sizes, upstream)
    if layout == "transposed":
        logits = dense.T.contiguous().T
    elif layout == "sliced":
        logits = torch.full((5, 70), torch.nan, device=fused_device)[:, 3:67].copy_(dense)
    else:
        logits = dense.new_empty(5 * 64 + 1)[1:].view(5, 64).copy_(dense)
    whole, grad = by_shards(logits, targets, sizes, upstream)
    torch.testing.assert_close(whole.losses, right[0].losses)
    torch.testing.assert_close(grad, right[1])
