"""Rows of a sharded vocabulary: laid out in any way, with any numbers in them, or none at all."""

import pytest
import torch
import torch.nn.functional as F
from oracle import random_logits, random_targets, random_upstream
from ranks import CUDA, on_ranks
from sharded import (
    N_CLASSES,
    N_FEATURES,
    N_ROWS,
    classes_of,
    compared,
    differentiated,
    leaf,
    named,
    same_everywhere,
    some_head,
    some_logits,
    some_targets,
)

from fused_ce import (
    fused_cross_entropy,
    reference_cross_entropy,
    reference_linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

EVERY = dict(return_stats=True, label_smoothing=0.1, z_loss=0.01)
LOW = torch.finfo(torch.float32).min


def checked(here, logits, targets, *, mine=None, shard=None, **options):
    """Values and gradient of this rank's columns of (N, V) float64 logits, as the reference's."""
    mine = mine or classes_of(here)
    shard = leaf(logits[:, mine] if shard is None else shard)
    ours = differentiated(
        vocab_parallel_cross_entropy(shard, targets, **options), dict(logits=shard)
    )
    whole = leaf(logits)
    right = differentiated(reference_cross_entropy(whole, targets, **options), dict(logits=whole))
    right["grad_logits"] = right["grad_logits"][:, mine]
    for name, value in ours.items():
        torch.testing.assert_close(value, right[name], equal_nan=True, msg=lambda m, n=name: n + m)
    return ours


# How (..., V) numbers lie in memory, and which axis has the classes.
LAYOUTS = {
    "columns-of-wider": lambda x: (F.pad(x, (3, 1))[..., 3:-1], -1),
    "every-second-row": lambda x: (x.repeat_interleave(2, 0)[::2], -1),
    "every-second-class": lambda x: (x.repeat_interleave(2, -1)[..., ::2], -1),
    "transposed": lambda x: (x.transpose(0, -1).contiguous().transpose(0, -1), -1),
    "channels-first": lambda x: (x.movedim(-1, 1).contiguous(), 1),
    "channels-last": lambda x: (x.movedim(-1, 1), 1),
    "shifted": lambda x: (torch.cat([x, x[:, :1]], 1)[:, :-1] if x.dim() > 2 else x, -1),
}


@pytest.mark.thinned
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(3)
def test_layouts(here, layout, inplace):
    mine = classes_of(here)
    for shape in ((6,), (2, 3), (2, 1, 3)) if here.on_host else ((2, 3),):
        values = some_logits(*shape, N_CLASSES, dtype=torch.float32, device=here.device)
        targets = random_targets(*shape, classes=N_CLASSES).to(here.device)
        place, dim = LAYOUTS[layout](values[..., mine])
        assert torch.equal(place.movedim(dim, -1), values[..., mine])
        shard = place.detach().requires_grad_()
        source = shard
        if inplace:  # a view of what autograd has copied, laid out in the same way
            copy = torch.empty_strided(place.shape, place.stride(), device=here.device)
            source = copy.copy_(shard)
        result = vocab_parallel_cross_entropy(
            source, targets, dim=dim, inplace=inplace, reduction="none", grad_in_forward=False
        )
        whole = leaf(values)
        right = reference_cross_entropy(whole, targets, dim=-1, reduction="none")
        upstream = random_upstream(right)
        (grad,) = torch.autograd.grad(result, shard, upstream)
        (right_grad,) = torch.autograd.grad(right, whole, upstream)
        torch.testing.assert_close(result, right)
        torch.testing.assert_close(grad.movedim(dim, -1), right_grad[..., mine])


def compared_sizes(here, sizes):
    options = dict(EVERY, weight=True, sample_weight=True)
    compared(here, False, torch.float64, options, sizes=sizes)
    compared(here, False, torch.float32, dict(reduction="none"), sizes=sizes)
    if 0 not in sizes:
        compared(here, True, torch.float64, options, sizes=sizes)


@pytest.mark.thinned
@pytest.mark.parametrize("sizes", [(1, 32), (32, 1), (0, 33), (33, 0)], ids=str)
@on_ranks(2)
def test_uneven_shards(here, sizes):
    compared_sizes(here, sizes)


@pytest.mark.thinned
@pytest.mark.parametrize("sizes", [(0, 32, 1), (31, 1, 1), (11, 11, 11), (0, 0, 33)], ids=str)
@on_ranks(3)
def test_uneven_shards_of_three(here, sizes):
    compared_sizes(here, sizes)


@on_ranks(2)
def test_a_shard_without_classes_has_no_maximum(here):
    """Not 0, which the others' logits may be far below."""
    logits = some_logits(device=here.device) - 1e4
    mine = slice(0, N_CLASSES) if here.rank == 0 else slice(N_CLASSES, N_CLASSES)
    targets = some_targets(device=here.device)
    checked(here, logits, targets, mine=mine, reduction="none", return_stats=True)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@on_ranks(2, 3)
def test_a_rank_without_a_row_of_the_head(here, reduction, weighted):
    """As torch.chunk leaves the last, where there are few classes."""
    hidden, head, bias = some_head(torch.float32, here.device)
    targets = some_targets(device=here.device)
    n_classes = len(head)
    mine = slice(0, n_classes) if here.rank == 0 else slice(n_classes, n_classes)
    weight = torch.linspace(0.5, 2.0, n_classes, device=here.device) if weighted else None
    leaves = [leaf(hidden), leaf(head[mine]), leaf(bias[mine])]
    whole = [leaf(hidden), leaf(head), leaf(bias)]
    loss = vocab_parallel_linear_cross_entropy(
        *leaves[:2], targets, linear_bias_shard=leaves[2], chunk_size=3, reduction=reduction,
        weight=None if weight is None else weight[mine], label_smoothing=0.1,
    )  # fmt: skip
    right = reference_linear_cross_entropy(
        *whole[:2], targets, linear_bias=whole[2], reduction=reduction, weight=weight,
        label_smoothing=0.1,
    )  # fmt: skip
    torch.testing.assert_close(loss, right)
    loss.sum().backward()
    right.sum().backward()
    torch.testing.assert_close(leaves[0].grad, whole[0].grad)
    for of_mine, of_all in zip(leaves[1:], whole[1:], strict=True):
        torch.testing.assert_close(of_mine.grad, of_all.grad[mine])


@pytest.mark.thinned
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, LOW], ids=str)
@on_ranks(2)
def test_ignored_rows_may_hold_anything(here, value):
    targets = some_targets(device=here.device)
    clean = some_logits(dtype=torch.float32, device=here.device)
    dirty = clean.clone()
    dirty[2] = value
    found = []
    for logits in (clean, dirty):
        shard = leaf(logits[:, classes_of(here)])
        for route in (True, False):
            result = vocab_parallel_cross_entropy(shard, targets, grad_in_forward=route, **EVERY)
            found.append(differentiated(result, dict(logits=shard)))
    for of_dirty in found[1:]:
        for name, of_name in of_dirty.items():
            torch.testing.assert_close(of_name, found[0][name], msg=name)
    assert (found[-1]["grad_logits"][2] == 0).all() and found[-1]["predictions"][2] == -1

    hidden, weight, bias = some_head(torch.float32, here.device)
    hidden[2] = value
    for skips in (True, False):
        leaves = [leaf(hidden), leaf(weight[classes_of(here)])]
        loss = vocab_parallel_linear_cross_entropy(*leaves, targets, skip_ignored=skips)
        for grad in torch.autograd.grad(loss, leaves):
            assert grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@on_ranks(2)
def test_all_rows_ignored_and_no_rows(here, reduction):
    for n_rows in (3, 0):
        targets = torch.full((n_rows,), -100, device=here.device)
        logits = some_logits(n_rows, N_CLASSES, device=here.device)
        checked(here, logits, targets, reduction=reduction, return_stats=True)
        hidden = torch.ones(n_rows, N_FEATURES, device=here.device).requires_grad_()
        weight = some_head(torch.float32, here.device)[1][classes_of(here)].requires_grad_()
        for skips in (True, False):
            loss = vocab_parallel_linear_cross_entropy(
                hidden, weight, targets, skip_ignored=skips, reduction=reduction
            )
            right = loss.new_zeros(n_rows) if reduction == "none" else loss.new_zeros(())
            right = right + torch.nan if reduction == "mean" else right
            torch.testing.assert_close(loss, right, equal_nan=True)
            for grad in torch.autograd.grad(loss.sum(), (hidden, weight)):
                assert (grad == 0).all()


def strange_logits():
    """Rows of numbers that a shard alone, or a target, has."""
    logits = some_logits(dtype=torch.float32)
    rows = torch.cat([logits] * 2)
    rows[0, :21] = -torch.inf  # all of one rank
    rows[1, 21:] = -torch.inf
    rows[2, :21] = LOW
    rows[3] = LOW
    rows[4, 1:] = -torch.inf  # one class is left
    rows[5] += 1e4
    rows[7, :21] -= 1e4
    rows[8, 21:] += 1e4
    rows[9, 5] = rows[9, 25] = rows[9].max() + 1  # a tie across ranks
    rows[10, 7] = rows[10, 12] = rows[10].max() + 1
    rows[11] = 2.0
    rows[12, 0] = 80.0  # confident, and right
    rows[13, :21], rows[13, 25] = -torch.inf, 3e38  # their maxima are further apart than numbers go
    rows[6, :21], rows[6, 21:] = -torch.inf, LOW  # of equal maxima, as they are told
    targets = torch.cat([some_targets()] * 2)
    targets[[6, 13]] = torch.tensor([22, 25])
    targets[[0, 1, 2, 4, 7, 8, 12]] = torch.tensor([25, 3, 30, 0, 3, 22, 0])
    targets[3], targets[9] = 4, 30
    return rows, targets


@pytest.mark.parametrize("options", [
    dict(return_stats=True), dict(return_stats=True, grad_in_forward=False), {},
], ids=["stats", "in-backward", "loss"])  # fmt: skip
@on_ranks(2)
def test_extreme_rows(here, options):
    logits, targets = (tensor.to(here.device) for tensor in strange_logits())
    options = dict(options)
    mine = classes_of(here)
    shard, whole = leaf(logits[:, mine]), leaf(logits)
    through = ("loss",)
    ours = differentiated(
        vocab_parallel_cross_entropy(shard, targets, reduction="none", **options),
        dict(logits=shard), through,
    )  # fmt: skip
    right = differentiated(
        fused_cross_entropy(whole, targets, reduction="none", **options),
        dict(logits=whole), through,
    )  # fmt: skip
    right["grad_logits"] = right["grad_logits"][:, mine]
    for name, value in ours.items():
        torch.testing.assert_close(value, right[name], msg=lambda m, n=name: f"{n}: {m}")
    if "predictions" in ours:
        assert ours["predictions"][9] == 5 and ours["predictions"][11] == 0
        assert ours["predictions"][10] == 7 and ours["predictions"][6] == 21


@pytest.mark.thinned
@pytest.mark.parametrize("value, at", [
    (torch.nan, (1, 2)), (torch.nan, (1, 30)), (torch.inf, (1, 2)), (torch.inf, (1, 30)),
    (-torch.inf, (1, slice(None))), (-torch.inf, (1, N_CLASSES - 1)),
], ids=str)  # fmt: skip
@on_ranks(2)
def test_a_row_that_has_no_loss_spoils_no_other(here, value, at):
    """NaN, or infinite where only the target is -inf, as on one device."""
    logits = some_logits(dtype=torch.float32, device=here.device)
    logits[at] = value
    targets = some_targets(device=here.device)
    for route in (True, False):
        shard, whole = leaf(logits[:, classes_of(here)]), leaf(logits)
        call = dict(reduction="none", return_stats=True, grad_in_forward=route)
        ours = differentiated(
            vocab_parallel_cross_entropy(shard, targets, **call), dict(logits=shard), ("loss",)
        )
        right = differentiated(
            reference_cross_entropy(whole, targets, **call), dict(logits=whole), ("loss",)
        )
        right["grad_logits"] = right["grad_logits"][:, classes_of(here)]
        if torch.isfinite(torch.tensor(value)) or value != -torch.inf or at[1] == slice(None):
            del ours["predictions"]  # any, of NaN
        for name, of_name in ours.items():
            torch.testing.assert_close(of_name, right[name], equal_nan=True, msg=name)
        same_everywhere([ours["loss"], ours["lse"], ours["entropy"]])


@pytest.mark.parametrize("wrong", [N_CLASSES, -1, 2**40], ids=str)
@on_ranks(2, 3)
def test_targets_out_of_range(here, wrong):
    """IndexError on every rank where the host looks, NaN in the row where it does not."""
    targets = some_targets(device=here.device)
    targets[4] = wrong
    logits = some_logits(dtype=torch.float32, device=here.device)
    hidden, weight, _ = some_head(torch.float32, here.device)
    shard, mine = leaf(logits[:, classes_of(here)]), leaf(weight[classes_of(here)])
    hidden = leaf(hidden)
    calls = (
        lambda: vocab_parallel_cross_entropy(shard, targets, reduction="none"),
        lambda: vocab_parallel_linear_cross_entropy(
            hidden, mine, targets, reduction="none", chunk_size=3
        ),
    )
    for call, leaves in zip(calls, ((shard,), (hidden, mine)), strict=True):
        if here.on_host:
            with pytest.raises(IndexError, match=f"target {wrong} of row 4 is out of range.* < 33"):
                call()
            continue
        losses = call()
        assert losses.isnan().tolist() == [row == 4 for row in range(N_ROWS)]
        grads = torch.autograd.grad(losses.sum(), leaves)
        assert grads[0].isnan().any(dim=1).tolist() == [row == 4 for row in range(N_ROWS)]


@pytest.mark.parametrize("route", [True, False], ids=["in-forward", "in-backward"])
@on_ranks(2)
def test_in_place(here, route):
    mine, targets = classes_of(here), some_targets(device=here.device)
    shard = leaf(some_logits(dtype=torch.float32, device=here.device)[:, mine])
    apart = vocab_parallel_cross_entropy(shard, targets)
    (right,) = torch.autograd.grad(apart, shard)
    source = shard * 1
    before = source._version
    loss = vocab_parallel_cross_entropy(source, targets, inplace=True, grad_in_forward=route)
    assert (source._version > before) == route
    assert torch.equal(loss, apart)
    loss.backward(retain_graph=not route)
    torch.testing.assert_close(source.detach(), right)  # the storage is the gradient's
    torch.testing.assert_close(shard.grad, right)
    assert source._version > before
    if not route:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@on_ranks(2)
def test_without_gradients_nothing_is_overwritten(here, inplace):
    targets = some_targets(device=here.device)
    values = some_logits(dtype=torch.float32, device=here.device)
    shard = values[:, classes_of(here)].clone().requires_grad_()
    before = shard.detach().clone()
    for route in (None, True, False):
        with torch.no_grad():
            loss = vocab_parallel_cross_entropy(
                shard, targets, inplace=inplace, grad_in_forward=route
            )
        assert not loss.requires_grad and shard._version == 0
        assert torch.equal(shard.detach(), before)
        torch.testing.assert_close(loss, reference_cross_entropy(values, targets))
        hidden, weight, _ = some_head(torch.float32, here.device)
        hidden.requires_grad_()
        with torch.no_grad():
            loss = vocab_parallel_linear_cross_entropy(
                hidden, weight[classes_of(here)], targets, grad_in_forward=route
            )
        assert not loss.requires_grad


@on_ranks(2, backends=["cpu", CUDA])
def test_in_place_needs_logits_that_nobody_keeps(here):
    shard = leaf(some_logits(dtype=torch.float32, device=here.device)[:, classes_of(here)])
    with pytest.raises(ValueError, match="inplace=True would overwrite logits"):
        vocab_parallel_cross_entropy(shard.tanh(), some_targets(device=here.device), inplace=True)


@on_ranks(2)
def test_predictions_are_of_the_whole_vocabulary(here):
    """The first of ties, on whatever rank."""
    logits = torch.zeros(5, N_CLASSES, device=here.device)
    for row, classes in enumerate(((30, 32), (20, 21), (21, 22), (0, 20, 21, 32), ())):
        logits[row, list(classes)] = 1.0
    targets = torch.zeros(5, dtype=torch.long, device=here.device)
    _, stats = vocab_parallel_cross_entropy(logits[:, classes_of(here)], targets, return_stats=True)
    assert stats.predictions.tolist() == [30, 20, 21, 0, 0]


@on_ranks(3)
def test_equal_bits_everywhere_and_every_time(here):
    targets = random_targets(16, classes=N_CLASSES).to(here.device)
    logits = random_logits(16, N_CLASSES, device=here.device)[:, classes_of(here)]
    calls = [dict(reduction=reduction, **EVERY) for reduction in ("mean", "none")]
    for call in calls:
        once, again = (
            list(named(vocab_parallel_cross_entropy(logits, targets, **call)).values())
            for _ in range(2)
        )
        same_everywhere(once)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    hidden = random_logits(16, N_FEATURES, device=here.device)
    weight = some_head(torch.float32, here.device)[1][classes_of(here)]
    factors = torch.rand(N_CLASSES, generator=torch.Generator().manual_seed(5)).to(here.device)
    for call in calls:
        found = named(
            vocab_parallel_linear_cross_entropy(
                hidden, weight, targets, weight=factors[classes_of(here)], chunk_size=8, **call
            )
        )
        same_everywhere(list(found.values()))
