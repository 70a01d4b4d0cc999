"""From hidden states to the loss: as the whole logits have it, a chunk of them at a time."""

import math

import pytest
import torch
from oracle import random_logits, random_targets, random_upstream, random_weight

from fused_ce import (
    fused_linear_cross_entropy,
    reference_linear_cross_entropy,
)

OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(label_smoothing=0.1, weight=True), id="smoothing-and-weight"),
    pytest.param(dict(z_loss=0.01, logit_scale=-0.7), id="z-loss-and-scale"),
    pytest.param(dict(softcap=5.0, sample_weight=True), id="softcap-and-sample-weight"),
    pytest.param(dict(weight=True, sample_weight=True, z_loss=0.01), id="both-weights"),
    pytest.param(dict(probabilities=True, label_smoothing=0.1, sample_weight=True), id="soft"),
]
REDUCTIONS = ["mean", "sum", "none"]
VOCABS = [pytest.param(33, id="small"), pytest.param(1100, id="long")]


def a_head(n_rows=11, vocab_size=33, n_features=6, dtype=torch.float64, device="cpu"):
    """(hidden, weight, bias) whose logits are of a few units."""
    make = dict(dtype=dtype, device=device)
    return (
        random_logits(n_rows, n_features, seed=5, scale=1.0, **make),
        random_logits(vocab_size, n_features, seed=6, scale=1.0, **make),
        random_logits(vocab_size, seed=7, scale=1.0, **make),
    )


def some_targets(n_rows=11, vocab_size=33, device="cpu"):
    targets = random_targets(n_rows, classes=vocab_size, device=device)
    targets[1::4] = -100
    return targets


def all_of(function, head, targets, *, weight=None, sample_weight=None, probabilities=False,
           through=None, **options):  # fmt: skip
    """All values and all gradients that a call has, for random upstream gradients."""
    n_rows, vocab_size = head[0].shape[:-1].numel(), head[1].shape[0]
    dtype, device = head[0].dtype, head[0].device
    leaves = [None if t is None else t.detach().requires_grad_() for t in head]
    hidden, linear_weight, bias = leaves
    if probabilities:
        targets = random_logits(n_rows, vocab_size, seed=8, dtype=dtype, device=device).exp()
        targets = targets.view(*head[0].shape[:-1], vocab_size).requires_grad_()
        leaves.append(targets)
    if sample_weight:
        sample_weight = random_weight(n_rows, dtype, device, seed=9).view(head[0].shape[:-1])
        leaves.append(sample_weight.requires_grad_())
    weight = random_weight(vocab_size, dtype, device) if weight else None
    result = function(
        hidden, linear_weight, targets, linear_bias=bias, weight=weight,
        sample_weight=sample_weight, **options,
    )  # fmt: skip
    values = [result[0], *result[1]] if options.get("return_stats") else [result]
    used = [v for i, v in enumerate(values[:4]) if through is None or i in through]
    upstream = [random_upstream(value, seed=i) for i, value in enumerate(used)]
    leaves = [leaf for leaf in leaves if leaf is not None]
    return values, torch.autograd.grad(used, leaves, upstream, allow_unused=True)


def assert_same(ours, theirs, **tolerance):
    for mine, others in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, others, **tolerance)


class TestAsTheReference:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("chunk_size", [1, 4, None])
    @pytest.mark.parametrize("skip_ignored", [False, True], ids=["", "skip"])
    def test_every_option(self, device, options, reduction, chunk_size, skip_ignored):
        head, targets = a_head(device=device), some_targets(device=device)
        call = dict(options, reduction=reduction)
        ours = all_of(
            fused_linear_cross_entropy, head, targets, chunk_size=chunk_size,
            skip_ignored=skip_ignored, **call,
        )  # fmt: skip
        theirs = all_of(reference_linear_cross_entropy, head, targets, **call)
        for mine, others in zip(ours, theirs, strict=True):
            assert_same(mine, others)

    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("through", [None, (0,), (0, 1), (2, 3)], ids=str)
    def test_stats(self, device, vocab_size, options, reduction, through):
        head = a_head(7, vocab_size, device=device)
        targets = some_targets(7, vocab_size, device=device)
        call = dict(options, reduction=reduction, return_stats=True, through=through)
        ours = all_of(fused_linear_cross_entropy, head, targets, chunk_size=3, **call)
        theirs = all_of(reference_linear_cross_entropy, head, targets, **call)
        assert_same(ours[0], theirs[0])
        for mine, others in zip(ours[1], theirs[1], strict=True):
            zero = torch.zeros(())
            mine, others = (zero if grad is None else grad for grad in (mine, others))
            torch.testing.assert_close(*torch.broadcast_tensors(mine, others))

    @pytest.mark.parametrize("grad_in_forward", [None, False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("vocab_size", VOCABS)
    def test_dtypes(self, device, dtype, grad_in_forward, vocab_size):
        head = a_head(9, vocab_size, dtype=dtype, device=device)
        targets = some_targets(9, vocab_size, device)
        call = dict(grad_in_forward=grad_in_forward)
        (loss,), grads = all_of(fused_linear_cross_entropy, head, targets, chunk_size=4, **call)
        (right,), exact = all_of(reference_linear_cross_entropy, head, targets, **call)
        assert loss.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(loss, right, rtol=2 * eps, atol=0)
        for grad, of_reference in zip(grads, exact, strict=True):
            atol = 4 * eps * of_reference.abs().max().item()
            torch.testing.assert_close(grad, of_reference, rtol=4 * eps, atol=atol)

    @pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (0, 6), (2, 0, 6)], ids=str)
    @pytest.mark.parametrize("vocab_size", [1, 33])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_shapes(self, device, shape, vocab_size, reduction):
        head = a_head(math.prod(shape[:-1]), vocab_size, device=device)
        head = (head[0].view(shape), *head[1:])
        targets = random_targets(*shape[:-1], classes=vocab_size, device=device)
        call = dict(reduction=reduction, return_stats=True)
        for index, grads in zip(
            all_of(fused_linear_cross_entropy, head, targets, **call),
            all_of(reference_linear_cross_entropy, head, targets, **call),
            strict=True,
        ):
            assert_same(index, grads, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint16], ids=str)
    def test_targets_of_any_integer_dtype(self, device, dtype):
        head, targets = a_head(device=device), random_targets(11, classes=33, device=device)
        ours = fused_linear_cross_entropy(*head[:2], targets.to(dtype), ignore_index=3)
        theirs = reference_linear_cross_entropy(*head[:2], targets, ignore_index=3)
        torch.testing.assert_close(ours, theirs)

    def test_any_strides(self, device):
        hidden = random_logits(6, 5, 4, dtype=torch.float64, device=device).permute(2, 1, 0)[:, 1:]
        weight = random_logits(6, 66, dtype=torch.float64, device=device)[:, ::2].T
        bias = torch.ones((), dtype=torch.float64, device=device).expand(33)
        targets = random_targets(5, 4, classes=33, device=device).T[:, 1:]
        ours = all_of(fused_linear_cross_entropy, (hidden, weight, bias), targets, chunk_size=5)
        theirs = all_of(reference_linear_cross_entropy, (hidden, weight, bias), targets)
        for mine, others in zip(ours, theirs, strict=True):
            assert_same(mine, others)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("skip_ignored", [False, True])
    def test_all_ignored(self, device, reduction, skip_ignored):
        """As torch: a mean is NaN, its gradient 0."""
        head, targets = a_head(device=device), torch.full((11,), -100, device=device)
        (loss,), grads = all_of(
            fused_linear_cross_entropy, head, targets, reduction=reduction, chunk_size=4,
            skip_ignored=skip_ignored,
        )  # fmt: skip
        assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
        assert all((grad == 0).all() for grad in grads)

    @pytest.mark.parametrize("normalizer", [7.0, torch.tensor(7.0)], ids=["number", "tensor"])
    def test_normalizer(self, device, normalizer):
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.to(device)
        head, targets = a_head(device=device), some_targets(device=device)
        ours = all_of(
            fused_linear_cross_entropy, head, targets, normalizer=normalizer, chunk_size=4
        )
        theirs = all_of(reference_linear_cross_entropy, head, targets, normalizer=normalizer)
        for mine, others in zip(ours, theirs, strict=True):
            assert_same(mine, others)
