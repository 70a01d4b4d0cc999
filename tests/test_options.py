"""The whole loss: one class for each option that torch does not have, or not on this route."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    FLOATS,
    STATS,
    assert_all_as_exact_as_torch,
    computed,
    fused,
    inside,
    random_logits,
    random_targets,
    random_weight,
)

from fused_ce import CrossEntropyStats, fused_cross_entropy, reference_cross_entropy

SMALL, LONG, SPLIT = (65, 6), (1500, 2), (9000, 2)  # (V, rows): each is a kernel of its own
VOCABS = [
    pytest.param(*SMALL, id="small"),
    pytest.param(*LONG, id="long"),
    pytest.param(*SPLIT, id="split"),
]
ROUTES = [pytest.param(True, id="in-forward"), pytest.param(False, id="in-backward")]
REDUCTIONS = ["mean", "sum", "none"]
EVERYTHING = dict(label_smoothing=0.1, z_loss=0.05, logit_scale=0.7, softcap=9.0)


def a_batch(vocab_size, n_rows, device, dtype=torch.float32):
    logits = random_logits(n_rows, vocab_size, dtype=dtype, device=device)
    targets = random_targets(n_rows, classes=vocab_size, device=device)
    targets[1] = -100
    return logits, targets


def only_if_small(vocab_size, cases, otherwise):
    """All cases where a row is short: an interpreted long one takes a second."""
    return cases if vocab_size == SMALL[0] else otherwise


def some_probabilities(*shape, device, dtype=torch.float32, seed=5):
    return random_logits(*shape, device=device, seed=seed).softmax(dim=-1).to(dtype)


def factors(*shape, device, dtype=torch.float32):
    """Positive, negative and zero: what masks and advantages look like."""
    values = random_logits(*shape, dtype=dtype, device=device, seed=8, scale=1.0) + 0.5
    if values.numel() > 2:
        values.view(-1)[2] = 0.0
    return values


def scalar(value, device, **kwargs):
    return torch.tensor(value, device=device, **kwargs)


def close(left, right, dtype=torch.float32):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(left, right, rtol=32 * eps, atol=32 * eps, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("grad_in_forward", [None, True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
class TestEverythingTogether:
    """Also in place: what is read again (the slope of a cap) is read before it is overwritten."""

    def test_classes(self, device, dtype, grad_in_forward, inplace):
        logits, targets = a_batch(*SMALL, device, dtype)
        assert_all_as_exact_as_torch(
            logits, targets, random_weight(65, dtype, device), inplace=inplace,
            sample_weight=factors(6, device=device), grad_in_forward=grad_in_forward,
            **EVERYTHING,
        )  # fmt: skip

    def test_probabilities(self, device, dtype, grad_in_forward, inplace):
        logits, _ = a_batch(*SMALL, device, dtype)
        assert_all_as_exact_as_torch(
            logits, some_probabilities(6, 65, device=device, dtype=dtype),
            random_weight(65, dtype, device), sample_weight=factors(6, device=device),
            grad_in_forward=grad_in_forward, inplace=inplace, reduction="none", **EVERYTHING,
        )  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("vocab_size, n_rows", VOCABS[1:])
class TestEverythingTogetherOnLongRows:
    def test_classes(self, device, vocab_size, n_rows, grad_in_forward, inplace):
        logits, targets = a_batch(vocab_size, n_rows, device, torch.bfloat16)
        stats_too = not (inplace and grad_in_forward)
        assert_all_as_exact_as_torch(
            logits, targets, random_weight(vocab_size, device=device), inplace=inplace,
            sample_weight=factors(n_rows, device=device), return_stats=stats_too,
            grad_in_forward=grad_in_forward, **EVERYTHING,
        )  # fmt: skip

    def test_probabilities(self, device, vocab_size, n_rows, grad_in_forward, inplace):
        logits, _ = a_batch(vocab_size, n_rows, device)
        assert_all_as_exact_as_torch(
            logits, some_probabilities(n_rows, vocab_size, device=device),
            random_weight(vocab_size, device=device), sample_weight=factors(n_rows, device=device),
            grad_in_forward=grad_in_forward, inplace=inplace, **EVERYTHING,
        )  # fmt: skip


class TestProbabilities:
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    @pytest.mark.parametrize("needs", [
        pytest.param(("logits",), id="to-logits"),
        pytest.param(("targets",), id="to-probabilities"),
        pytest.param(("logits", "targets"), id="to-both"),
    ])  # fmt: skip
    def test_gradients(self, device, vocab_size, n_rows, grad_in_forward, needs):
        for reduction in only_if_small(vocab_size, REDUCTIONS, ["mean"]):
            logits, _ = a_batch(vocab_size, n_rows, device)
            assert_all_as_exact_as_torch(
                logits, some_probabilities(n_rows, vocab_size, device=device),
                reduction=reduction, grad_in_forward=grad_in_forward, needs=needs,
            )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
    @pytest.mark.parametrize("factor", [
        pytest.param(3.0, id="unnormalised"), pytest.param(-0.5, id="negative"),
        pytest.param(0.0, id="all-zero"),
    ])  # fmt: skip
    def test_any_row_sum(self, device, factor, weighted, label_smoothing, grad_in_forward):
        vocab_size, n_rows = SMALL
        logits, _ = a_batch(vocab_size, n_rows, device)
        probabilities = factor * some_probabilities(n_rows, vocab_size, device=device)
        weight = random_weight(vocab_size, device=device) if weighted else None
        assert_all_as_exact_as_torch(
            logits, probabilities, weight, label_smoothing=label_smoothing,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_mixed_signs(self, device, grad_in_forward):
        vocab_size, n_rows = SMALL
        logits, _ = a_batch(vocab_size, n_rows, device)
        signed = random_logits(n_rows, vocab_size, device=device, seed=4, scale=1.0)
        assert_all_as_exact_as_torch(
            logits, signed, random_weight(vocab_size, device=device), label_smoothing=0.1,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_one_hot_is_the_class(self, device, reduction, grad_in_forward):
        vocab_size, n_rows = SMALL
        logits = random_logits(n_rows, vocab_size, device=device)
        targets = random_targets(n_rows, classes=vocab_size, device=device)
        one_hot = F.one_hot(targets, vocab_size).float()
        options = dict(reduction=reduction, label_smoothing=0.1, grad_in_forward=grad_in_forward)
        soft, _ = computed(logits, one_hot, needs=("logits",), **options)
        hard, _ = computed(logits, targets, **options)
        close(soft["loss"], hard["loss"])
        close(soft["grad_logits"], hard["grad_logits"])

    def test_weight_moves_no_divisor(self, device):
        """As torch: "mean" divides by the rows, not by their class weights."""
        logits, _ = a_batch(*SMALL, device)
        probabilities = some_probabilities(6, 65, device=device)
        weight = random_weight(65, device=device)
        loss = fused_cross_entropy(logits, probabilities, weight)
        close(loss, F.cross_entropy(logits, probabilities, weight))
        close(loss, fused_cross_entropy(logits, probabilities, weight, reduction="sum") / 6)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("targets_dtype", FLOATS, ids=str)
    def test_dtypes_may_differ(self, device, dtype, targets_dtype):
        logits, _ = a_batch(*SMALL, device, dtype)
        probabilities = some_probabilities(6, 65, device=device, dtype=targets_dtype)
        for route in (True, False):
            assert_all_as_exact_as_torch(logits, probabilities, grad_in_forward=route)

    @pytest.mark.parametrize("strides", [
        pytest.param((1, 6), id="classes-outermost"), pytest.param((131, 2), id="every-second"),
        pytest.param((71, 1), id="padded-rows"),
    ])  # fmt: skip
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_strided_and_misaligned(self, device, strides, grad_in_forward):
        logits, _ = a_batch(*SMALL, device)
        probabilities = some_probabilities(6, 65, device=device)
        strided, _ = inside(probabilities, torch.nan, strides=strides, offset=1)
        assert_all_as_exact_as_torch(logits, strided, grad_in_forward=grad_in_forward)
        logits, _ = inside(logits, torch.nan, strides=strides, offset=3)
        assert_all_as_exact_as_torch(logits, probabilities, grad_in_forward=grad_in_forward)

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_expanded(self, device, grad_in_forward):
        """One teacher for all rows, and the even distribution that costs a single number."""
        logits, _ = a_batch(*SMALL, device)
        one_row = some_probabilities(1, 65, device=device).expand(6, 65)
        even = scalar(1 / 65, device).expand(6, 65)
        for probabilities in (one_row, even):
            assert_all_as_exact_as_torch(logits, probabilities, grad_in_forward=grad_in_forward)

    @pytest.mark.parametrize("shape, dim", [
        pytest.param((65,), None, id="C"), pytest.param((4, 65), None, id="N-C"),
        pytest.param((2, 65, 3), 1, id="N-C-d1"), pytest.param((2, 65, 3, 2), 1, id="N-C-d1-d2"),
        pytest.param((2, 3, 65), -1, id="B-T-V"), pytest.param((65, 3), 0, id="C-N"),
    ])  # fmt: skip
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_shapes(self, device, shape, dim, reduction):
        logits = random_logits(*shape, device=device)
        probabilities = random_logits(*shape, device=device, seed=5).abs()
        assert_all_as_exact_as_torch(
            logits, probabilities, dim=dim, reduction=reduction, return_stats=True
        )

    def test_dim_of_torch(self, device):
        logits = random_logits(2, 7, 3, device=device)
        probabilities = random_logits(2, 7, 3, device=device, seed=5).softmax(dim=1)
        loss = fused_cross_entropy(logits, probabilities, dim=1)
        close(loss, F.cross_entropy(logits, probabilities))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_no_rows(self, device, reduction):
        logits = random_logits(0, 5, device=device)
        values, _ = computed(logits, logits.clone(), reduction=reduction)
        assert values["grad_logits"].shape == values["grad_targets"].shape == (0, 5)
        if reduction == "none":
            assert values["loss"].shape == (0,)
        else:
            assert values["loss"].isnan() if reduction == "mean" else values["loss"] == 0

    def test_a_masked_class_without_probability_is_as_torch(self, device):
        logits, _ = a_batch(*SMALL, device)
        probabilities = some_probabilities(6, 65, device=device)
        logits[0, 3], probabilities[0, 3] = -torch.inf, 0.0
        logits[1, 4] = -torch.inf
        losses = fused_cross_entropy(logits, probabilities, reduction="none")
        close(losses, F.cross_entropy(logits, probabilities, reduction="none"))


class TestSampleWeight:
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_gradients(self, device, vocab_size, n_rows, grad_in_forward):
        """Of a mean, the divisor depends on sample_weight, too."""
        both = ("logits", "sample_weight")
        for needs in only_if_small(vocab_size, (both[:1], both[1:], both), (both,)):
            for reduction in only_if_small(vocab_size, REDUCTIONS, ["mean"]):
                logits, targets = a_batch(vocab_size, n_rows, device)
                assert_all_as_exact_as_torch(
                    logits, targets, random_weight(vocab_size, device=device),
                    sample_weight=factors(n_rows, device=device), reduction=reduction,
                    grad_in_forward=grad_in_forward, needs=needs,
                )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_any_dtype(self, device, dtype, logits_dtype, grad_in_forward):
        logits, targets = a_batch(*SMALL, device, logits_dtype)
        sample_weight = factors(6, device=device, dtype=dtype)
        assert_all_as_exact_as_torch(
            logits, targets, sample_weight=sample_weight, grad_in_forward=grad_in_forward
        )

    @pytest.mark.parametrize("shape, dim", [
        pytest.param((65,), None, id="C"), pytest.param((2, 3, 65), None, id="B-T-V"),
        pytest.param((2, 65, 3), 1, id="N-C-d1"), pytest.param((65, 4), 0, id="C-N"),
    ])  # fmt: skip
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_shapes(self, device, shape, dim, reduction):
        axis = (-1 if dim is None else dim) % len(shape)
        batch = (*shape[:axis], *shape[axis + 1 :])
        for targets in (random_targets(*batch, classes=65), random_logits(*shape, seed=5).abs()):
            if targets.is_floating_point() and dim is None and len(shape) > 2:
                continue  # the caller has to say
            assert_all_as_exact_as_torch(
                random_logits(*shape, device=device), targets.to(device), dim=dim,
                sample_weight=factors(*batch, device=device) + 2.0, reduction=reduction,
            )  # fmt: skip

    def test_strided_and_expanded(self, device):
        logits = random_logits(3, 4, 65, device=device)
        targets = random_targets(3, 4, classes=65, device=device)
        transposed = factors(4, 3, device=device).t()
        per_sequence = factors(3, 1, device=device).expand(3, 4)
        for sample_weight in (transposed, per_sequence, scalar(0.5, device).expand(3, 4)):
            for route in (True, False):
                assert_all_as_exact_as_torch(
                    logits, targets, sample_weight=sample_weight, grad_in_forward=route
                )

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
    def test_ignore_index_is_not_wrapped_to_the_dtype_of_targets(self, device, dtype):
        """A class that equals it modulo 2**8 (2**16, 2**32) counts."""
        logits, _ = a_batch(200, 3, device)
        targets = torch.tensor([5, 100, 60], device=device).to(dtype)
        sample_weight = factors(3, device=device)
        for ignore_index in (5 + 2**8, 5 + 2**16, 5 + 2**32):
            values, _ = computed(
                logits, targets, sample_weight=sample_weight, ignore_index=ignore_index
            )
            right, _ = computed(logits, targets.long(), sample_weight=sample_weight)
            close(values["grad_sample_weight"], right["grad_sample_weight"])

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_the_loss_may_be_changed_in_place(self, device, reduction, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        sample_weight = factors(len(targets), device=device).requires_grad_()
        options = dict(reduction=reduction, grad_in_forward=grad_in_forward)
        loss = fused_cross_entropy(logits, targets, sample_weight=sample_weight, **options)
        (right,) = torch.autograd.grad(loss.sum() / 4, sample_weight)
        loss = fused_cross_entropy(logits, targets, sample_weight=sample_weight, **options)
        loss /= 4
        close(torch.autograd.grad(loss.sum(), sample_weight)[0], right)

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_of_ignored_rows_counts_nothing(self, device, vocab_size, n_rows, grad_in_forward):
        logits, targets = a_batch(vocab_size, n_rows, device)
        kept = torch.arange(n_rows, device=device) != 1
        sample_weight = factors(n_rows, device=device)
        logits[1] = torch.nan
        options = dict(z_loss=0.1, grad_in_forward=grad_in_forward)
        rest, _ = computed(
            logits[kept], targets[kept], sample_weight=sample_weight[kept], **options
        )
        for anything in (1e30, torch.inf, torch.nan):
            sample_weight[1] = anything
            whole, _ = computed(logits, targets, sample_weight=sample_weight, **options)
            close(whole["loss"], rest["loss"])
            for name in ("grad_logits", "grad_sample_weight"):
                assert (whole[name][1] == 0).all()
                close(whole[name][kept], rest[name])

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_all_zero(self, device, reduction, grad_in_forward):
        """0 / 0, as class weights that sum to 0; but a sum of nothing is 0."""
        logits, targets = a_batch(*SMALL, device)
        zeros = torch.zeros(6, device=device)
        values, _ = computed(
            logits, targets, sample_weight=zeros, reduction=reduction, needs=("logits",),
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
        if reduction == "mean":
            assert values["loss"].isnan()
        else:
            assert (values["loss"] == 0).all() and (values["grad_logits"] == 0).all()
        assert (values["grad_logits"][1] == 0).all()
        assert fused_cross_entropy(logits, targets, sample_weight=zeros, normalizer=3) == 0

    def test_zero_is_not_ignored(self, device):
        """A factor of 0 leaves its gradient: the loss without it."""
        logits, targets = a_batch(*SMALL, device)
        sample_weight = factors(6, device=device).requires_grad_()
        fused_cross_entropy(
            logits, targets, sample_weight=sample_weight, reduction="sum"
        ).backward()
        losses = fused_cross_entropy(logits, targets, reduction="none")
        assert losses[2] > 0
        close(sample_weight.grad, losses)

    def test_kept_graph_gives_the_gradient_again(self, device):
        logits, targets = a_batch(*SMALL, device)
        for route in (True, False):
            leaf = logits.clone().requires_grad_()
            v = factors(6, device=device).requires_grad_()
            loss = fused_cross_entropy(leaf, targets, sample_weight=v, grad_in_forward=route)
            once = torch.autograd.grad(loss, (leaf, v), retain_graph=True)
            twice = torch.autograd.grad(loss, (leaf, v), scalar(2.0, device))
            for first, second in zip(once, twice, strict=True):
                assert torch.equal(2 * first, second)


class TestNormalizer:
    NUMBERS = [
        pytest.param(7, id="int"), pytest.param(6.5, id="float"),
        pytest.param(torch.int64, id="int64-tensor"), pytest.param(torch.int32, id="int32-tensor"),
        pytest.param(torch.float32, id="float32-tensor"),
        pytest.param(torch.float64, id="float64-tensor"),
        pytest.param(torch.bfloat16, id="bfloat16-tensor"),
    ]  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_divides_the_sum(self, device, vocab_size, n_rows, grad_in_forward):
        logits, targets = a_batch(vocab_size, n_rows, device)
        normalizer = scalar(7.0, device)
        assert_all_as_exact_as_torch(
            logits, targets, random_weight(vocab_size, device=device), normalizer=normalizer,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("number", NUMBERS)
    def test_any_kind_of_number(self, device, number, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        if isinstance(number, torch.dtype):
            number = scalar(7, device, dtype=number)
        assert_all_as_exact_as_torch(
            logits, targets, normalizer=number, grad_in_forward=grad_in_forward
        )

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_gradient_of_sample_weight_knows_that_nothing_moves(self, device, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        probabilities = some_probabilities(6, 65, device=device)
        for number in (7.0, scalar(7.0, device)):
            for y in (targets, probabilities):
                assert_all_as_exact_as_torch(
                    logits, y, sample_weight=factors(6, device=device), normalizer=number,
                    grad_in_forward=grad_in_forward, return_stats=True,
                )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
    def test_all_ignored_is_zero(self, device, as_tensor, grad_in_forward):
        vocab_size, n_rows = SMALL
        logits = random_logits(n_rows, vocab_size, device=device)
        targets = torch.full((n_rows,), -100, device=device)
        normalizer = scalar(5.0, device) if as_tensor else 5.0
        values, _ = computed(
            logits, targets, normalizer=normalizer, z_loss=0.1, grad_in_forward=grad_in_forward
        )
        assert values["loss"] == 0
        assert (values["grad_logits"] == 0).all()

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
    def test_no_rows_is_zero(self, device, as_tensor):
        logits = random_logits(0, 5, device=device)
        targets = torch.zeros(0, dtype=torch.long, device=device)
        normalizer = scalar(5.0, device) if as_tensor else 5.0
        values, _ = computed(logits, targets, normalizer=normalizer)
        assert values["loss"] == 0
        assert values["grad_logits"].shape == (0, 5)

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_micro_batches_add_up_to_the_batch(self, device, grad_in_forward):
        """Unevenly filled: a mean of means would be another number."""
        logits, targets = a_batch(*SMALL, device)
        targets[:3] = -100
        count = (targets != -100).sum()
        whole = logits.clone().requires_grad_()
        loss = fused_cross_entropy(whole, targets)
        loss.backward()
        parts, total = logits.clone().requires_grad_(), 0.0
        for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
            part = fused_cross_entropy(
                parts[rows], targets[rows], normalizer=count, grad_in_forward=grad_in_forward
            )
            part.backward()
            total = total + part.detach()
        close(total, loss.detach())
        close(parts.grad, whole.grad)

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_belongs_to_mean(self, device, reduction):
        logits, targets = a_batch(*SMALL, device)
        for normalizer in (3, scalar(3, device)):
            with pytest.raises(ValueError, match=f"normalizer.*reduction='{reduction}'"):
                fused_cross_entropy(logits, targets, normalizer=normalizer, reduction=reduction)

    def test_a_tensor_that_requires_grad_is_fine_where_no_gradient_is_made(self, device):
        logits, targets = a_batch(*SMALL, device)
        normalizer = scalar(3.0, device, requires_grad=True)
        with torch.no_grad():
            loss = fused_cross_entropy(logits, targets, normalizer=normalizer)
        close(loss, fused_cross_entropy(logits, targets, normalizer=3))

    def test_a_tensor_is_not_changed(self, device):
        logits, targets = a_batch(*SMALL, device)
        normalizer = scalar(3.0, device)
        computed(logits, targets, normalizer=normalizer)
        assert normalizer == 3.0 and normalizer._version == 0

    def test_numpy_numbers_are_numbers(self, device):
        numpy = pytest.importorskip("numpy")
        logits, targets = a_batch(*SMALL, device)
        loss = fused_cross_entropy(
            logits, targets, normalizer=numpy.int64(3), z_loss=numpy.float32(0.5),
            logit_scale=numpy.float64(2), softcap=numpy.int32(7),
        )  # fmt: skip
        right = fused_cross_entropy(
            logits, targets, normalizer=3, z_loss=0.5, logit_scale=2.0, softcap=7.0
        )
        assert torch.equal(loss, right)


class TestZLoss:
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_values_and_gradient(self, device, vocab_size, n_rows, grad_in_forward):
        for z_loss in only_if_small(vocab_size, (1e-4, 0.5, -0.1), (0.5,)):
            for reduction in only_if_small(vocab_size, REDUCTIONS, ["mean"]):
                logits, targets = a_batch(vocab_size, n_rows, device)
                assert_all_as_exact_as_torch(
                    logits, targets, reduction=reduction, z_loss=z_loss,
                    grad_in_forward=grad_in_forward,
                )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_sees_the_offset_that_cross_entropy_does_not(self, device, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        for offset in (-100.0, 100.0):
            assert_all_as_exact_as_torch(
                logits + offset, targets, z_loss=1e-3, grad_in_forward=grad_in_forward
            )

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_by_hand_from_lse(self, device, grad_in_forward):
        vocab_size, n_rows = SMALL
        logits, targets = a_batch(vocab_size, n_rows, device)
        leaf, count = logits.clone().requires_grad_(), n_rows - 1
        loss, stats = fused_cross_entropy(
            leaf, targets, return_stats=True, grad_in_forward=grad_in_forward
        )
        loss = loss + 0.3 * stats.lse.square().sum() / count
        (3.0 * loss).backward()
        whole = logits.clone().requires_grad_()
        right = fused_cross_entropy(whole, targets, z_loss=0.3, grad_in_forward=grad_in_forward)
        (3.0 * right).backward()
        close(loss.detach(), right.detach())
        close(leaf.grad, whole.grad)

    def test_weighs_by_sample_and_not_by_class(self, device):
        logits, targets = a_batch(*SMALL, device)
        v, lse = factors(6, device=device), logits.logsumexp(dim=1)
        none = torch.zeros(65, device=device)
        losses = fused_cross_entropy(
            logits, targets, none, sample_weight=v, z_loss=0.3, reduction="none"
        )
        close(losses, 0.3 * v * lse.square() * (targets != -100))


class TestLogitScale:
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("logit_scale", [0.125, 1.7, -2.0, 0.0])
    def test_values_and_gradient(self, device, logit_scale, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        for y in (targets, some_probabilities(6, 65, device=device)):
            assert_all_as_exact_as_torch(
                logits, y, logit_scale=logit_scale, label_smoothing=0.1, return_stats=True,
                grad_in_forward=grad_in_forward,
            )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_alone(self, device, vocab_size, n_rows, grad_in_forward):
        """Negative: the maximum of the scaled logits is not that of the logits, scaled."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        assert_all_as_exact_as_torch(
            logits, targets, logit_scale=-1.3, grad_in_forward=grad_in_forward
        )

    def test_zero_makes_all_classes_equal(self, device):
        logits, targets = a_batch(*SMALL, device)
        loss, stats = fused_cross_entropy(logits, targets, logit_scale=0.0, return_stats=True)
        close(loss, scalar(math.log(65), device))
        counts = targets != -100
        close(stats.entropy, math.log(65) * counts)
        assert (stats.predictions[counts] == 0).all()

    def test_negative_turns_the_order_around(self, device):
        logits, targets = a_batch(*LONG, device)
        _, stats = fused_cross_entropy(logits, targets, logit_scale=-1.0, return_stats=True)
        counts = targets != -100
        assert torch.equal(stats.predictions[counts], logits.argmin(dim=1)[counts])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_scales_in_float32(self, device, dtype):
        """The product of two float16 numbers overflows, that of two bfloat16 is rounded."""
        logits, targets = a_batch(*SMALL, device, dtype)
        for route in (True, False):
            assert_all_as_exact_as_torch(
                1000 * logits, targets, logit_scale=123.4, grad_in_forward=route
            )

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_large_common_offset(self, device, vocab_size, n_rows):
        """A power of two rounds nothing: not a bit of the loss may move with the offset."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        logits = (logits * 8).round() / 8
        options = dict(logit_scale=0.5, reduction="none", needs=("logits",))
        for route in (True, False):
            plain, _ = computed(logits, targets, grad_in_forward=route, **options)
            moved, _ = computed(logits - 1e4, targets, grad_in_forward=route, **options)
            close(plain["loss"], moved["loss"])
            close(plain["grad_logits"], moved["grad_logits"])


class TestSoftcap:
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_values_and_gradient(self, device, vocab_size, n_rows, grad_in_forward):
        for dtype in only_if_small(vocab_size, FLOATS, [torch.float32]):
            for softcap in only_if_small(vocab_size, (0.5, 5.0, 30.0), (5.0,)):
                logits, targets = a_batch(vocab_size, n_rows, device, dtype)
                assert_all_as_exact_as_torch(
                    logits, targets, softcap=softcap, grad_in_forward=grad_in_forward
                )

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_with_probabilities_scale_and_stats(self, device, grad_in_forward):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, _ = a_batch(vocab_size, n_rows, device)
            assert_all_as_exact_as_torch(
                logits, some_probabilities(n_rows, vocab_size, device=device), softcap=4.0,
                logit_scale=-1.5, return_stats=True, grad_in_forward=grad_in_forward,
            )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_huge_logits_are_flat(self, device, vocab_size, n_rows, grad_in_forward):
        """tanh is 1 and its slope 0: no NaN from exp(2x) / exp(2x), no gradient."""
        dtypes = (torch.float16, torch.float32, torch.float64)
        for dtype in only_if_small(vocab_size, dtypes, [torch.float32]):
            logits = torch.full((n_rows, vocab_size), 1e4, dtype=dtype, device=device)
            logits[:, ::2] *= -1
            targets = random_targets(n_rows, classes=vocab_size, device=device)
            values, _ = computed(
                logits, targets, softcap=30.0, reduction="none", grad_in_forward=grad_in_forward
            )
            loss = values["loss"]
            right = math.log(vocab_size // 2) + 60.0 * (targets % 2 == 0).to(loss.dtype)
            torch.testing.assert_close(loss, right, rtol=1e-5, atol=0.0)
            assert (values["grad_logits"].abs() <= 1e-30).all()

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_infinities_are_capped(self, device, vocab_size, n_rows, grad_in_forward):
        """tanh(inf) is 1: as the composition in torch, and a masked class is -softcap, not -inf."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        targets[1] = 5
        logits[0, 7:] = -torch.inf
        logits[1, 9] = torch.inf
        assert_all_as_exact_as_torch(
            logits, targets, softcap=3.0, reduction="none", return_stats=True,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_nan_stays_in_its_row(self, device, vocab_size, n_rows):
        logits, targets = a_batch(vocab_size, n_rows, device)
        targets[1] = 5
        for route in (True, False):
            options = dict(softcap=3.0, reduction="none", grad_in_forward=route)
            right, _ = computed(logits, targets, **options)
            poisoned = logits.clone()
            poisoned[0, 3] = torch.nan
            values, _ = computed(poisoned, targets, **options)
            assert values["loss"][0].isnan() and values["grad_logits"][0].isnan().any()
            assert torch.equal(values["loss"][1:], right["loss"][1:])
            assert torch.equal(values["grad_logits"][1:], right["grad_logits"][1:])

    @pytest.mark.parametrize("vocab_size", [1, 65, 1500, 9000])
    @pytest.mark.parametrize("tiny", [1e-3, -1e-8], ids=str)
    def test_tiny_logits_keep_their_relative_exactness(self, device, vocab_size, tiny):
        """1 - 2 / (exp(2x) + 1) leaves two digits of 1e-5, and nothing of 1e-10.

        All others are -200, whose exponentials are 0: the lse is the capped logit.
        """
        logits = torch.full((1, vocab_size), -torch.inf, device=device)
        logits[0, -1] = tiny
        target = torch.tensor([vocab_size - 1], device=device)
        _, stats = fused_cross_entropy(logits, target, softcap=200.0, return_stats=True)
        assert stats.lse.item() == pytest.approx(tiny, rel=1e-6)

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_a_far_cap_costs_no_digit(self, device, vocab_size, n_rows):
        """Cap times tanh of tiny: an absolute error of tanh would be multiplied by the cap."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        for softcap in only_if_small(vocab_size, (1e3, 1e6), (1e6,)):
            for route in (True, False):
                assert_all_as_exact_as_torch(
                    logits, targets, softcap=softcap, reduction="none", grad_in_forward=route
                )

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
    @pytest.mark.parametrize("vocab_size", [1, 3, 33, 65, 129, 1025, 8193])
    def test_lanes_beyond_the_vocabulary_do_not_count(
        self, device, vocab_size, probabilities, grad_in_forward
    ):
        """Logits far below -softcap: a padded lane that is capped, or 0, would win the row."""
        logits = random_logits(2, vocab_size, device=device) - 400.0
        targets = random_targets(2, classes=vocab_size, device=device)
        if probabilities:
            targets = some_probabilities(2, vocab_size, device=device)
        values, _ = computed(
            logits, targets, softcap=50.0, return_stats=True, reduction="none",
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
        right = torch.full((2,), math.log(vocab_size), device=device)
        for name, value in (("loss", right), ("lse", right - 50.0), ("entropy", right)):
            torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-4)
        assert (values["predictions"] < vocab_size).all()
        assert values["grad_logits"].isfinite().all()


class TestStats:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_values(self, device, dtype, reduction):
        logits, targets = a_batch(*SMALL, device, dtype)
        assert_all_as_exact_as_torch(logits, targets, reduction=reduction, return_stats=True)

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_values_without_a_gradient(self, device, vocab_size, n_rows):
        """The same numbers where nothing is saved."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        loss, stats = fused_cross_entropy(logits, targets, return_stats=True)
        assert isinstance(stats, CrossEntropyStats)
        assert not any(value.requires_grad for value in (loss, *stats))
        values, _ = computed(logits, targets, return_stats=True, grad_in_forward=False)
        close(loss, values["loss"])
        for name, value in stats._asdict().items():
            close(value, values[name])

    @pytest.mark.parametrize("shape, dim", [
        pytest.param((65,), None, id="C"), pytest.param((4, 65), None, id="N-C"),
        pytest.param((2, 3, 65), None, id="B-T-V"), pytest.param((2, 65, 3), 1, id="N-C-d1"),
        pytest.param((0, 65), None, id="no-rows"), pytest.param((4, 1), None, id="one-class"),
    ])  # fmt: skip
    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_shapes_are_those_of_the_targets(self, device, shape, dim, reduction):
        axis = (-1 if dim is None else dim) % len(shape)
        batch = (*shape[:axis], *shape[axis + 1 :])
        logits = random_logits(*shape, device=device)
        targets = random_targets(*batch, classes=shape[axis], device=device)
        _, stats = fused_cross_entropy(
            logits, targets, dim=dim, reduction=reduction, return_stats=True
        )
        assert all(value.shape == batch for value in stats)
        assert_all_as_exact_as_torch(
            logits, targets, dim=dim, reduction=reduction, return_stats=True
        )

    def test_fields_in_their_order(self, device):
        result = fused_cross_entropy(*a_batch(*SMALL, device), return_stats=True)
        loss, (losses, lse, entropy, predictions) = result
        assert loss.shape == () and losses.shape == (6,)
        assert result[1]._fields == ("losses", "lse", "entropy", "predictions")
        assert result[1].lse is lse and result[1].entropy is entropy
        assert predictions.dtype == torch.int64

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_the_loss_is_the_same(self, device, vocab_size, n_rows, grad_in_forward):
        """To rounding: with stats a kernel may add up in another order."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        for reduction in only_if_small(vocab_size, REDUCTIONS, ["mean"]):
            for more in only_if_small(vocab_size, ({}, EVERYTHING), ({},)):
                options = dict(reduction=reduction, grad_in_forward=grad_in_forward, **more)
                plain, _ = computed(logits, targets, **options)
                values, _ = computed(
                    logits, targets, return_stats=True, through=("loss",), **options
                )
                for name, value in plain.items():
                    torch.testing.assert_close(value, values[name], rtol=1e-6, atol=1e-9)

    def test_losses_are_those_of_none(self, device):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, targets = a_batch(vocab_size, n_rows, device)
            v = factors(n_rows, device=device)
            losses = fused_cross_entropy(logits, targets, sample_weight=v, reduction="none")
            for reduction in REDUCTIONS:
                _, stats = fused_cross_entropy(
                    logits, targets, sample_weight=v, reduction=reduction, return_stats=True
                )
                close(stats.losses, losses)

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_ignored_rows(self, device, vocab_size, n_rows):
        """0 and -1 whatever they hold, and no gradient through any of them."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        for value in only_if_small(vocab_size, (torch.nan, torch.inf, -torch.inf), (torch.nan,)):
            logits[1] = value
            for route in (True, False):
                values, _ = computed(logits, targets, return_stats=True, grad_in_forward=route)
                assert values["predictions"][1] == -1
                assert all(values[name][1] == 0 for name in STATS)
                assert (values["grad_logits"][1] == 0).all()
                assert values["grad_logits"].isfinite().all()

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_ties_take_the_first(self, device, vocab_size, n_rows):
        """Within a vector, a tile, and between the parts of a row; on either route."""
        places = sorted([3, 4, 40, vocab_size // 2, vocab_size - 1])
        targets = random_targets(n_rows, classes=vocab_size, device=device)
        logits = random_logits(n_rows, vocab_size, device=device)
        logits[0, places[1:]], logits[1, places[2:]] = 50.0, 50.0
        for leaf in (logits, logits.clone().requires_grad_()):
            _, stats = fused_cross_entropy(leaf, targets, return_stats=True)
            assert stats.predictions[:2].tolist() == places[1:3]
        _, stats = fused_cross_entropy(torch.zeros_like(logits), targets, return_stats=True)
        assert (stats.predictions == 0).all()

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_predictions_in_every_part_of_a_row(self, device, vocab_size, n_rows):
        for place in (5, vocab_size // 3, vocab_size - 1):
            logits, targets = a_batch(vocab_size, n_rows, device)
            logits[:, place] = 60.0
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            assert (stats.predictions[targets != -100] == place).all()

    def test_predictions_of_masked_rows_are_as_torch(self, device):
        """Leading -inf: a running argmax that starts at -inf must move on."""
        for vocab_size, n_rows in (SMALL, LONG, SPLIT):
            logits, targets = a_batch(vocab_size, n_rows, device)
            targets[1] = vocab_size - 1
            logits[:, : vocab_size - 3] = -torch.inf
            logits[0, vocab_size // 2 :] = torch.finfo(logits.dtype).min
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            assert torch.equal(stats.predictions, logits.argmax(dim=1))

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_nan_in_any_part_of_a_row_is_seen(self, device, vocab_size, n_rows):
        """A clamp that takes the number of a number and a NaN would lose it."""
        for place in (5, vocab_size // 3, vocab_size - 1):
            logits, targets = a_batch(vocab_size, n_rows, device)
            targets[1] = 7
            logits[1, place] = torch.nan
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            for value in (stats.losses, stats.lse, stats.entropy):
                assert value[1].isnan() and not value[0].isnan()

    @pytest.mark.parametrize("through", [
        pytest.param(("losses",), id="losses-alone"), pytest.param(("lse",), id="lse-alone"),
        pytest.param(("entropy",), id="entropy-alone"),
        pytest.param(("loss", "losses"), id="loss-and-losses"),
        pytest.param(("loss", "lse"), id="loss-and-lse"),
        pytest.param(("loss", "entropy"), id="loss-and-entropy"),
        pytest.param(STATS, id="all-but-the-loss"), pytest.param(("loss", *STATS), id="all"),
    ])  # fmt: skip
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_gradients(self, device, grad_in_forward, through):
        for reduction in REDUCTIONS:
            logits, targets = a_batch(*SMALL, device)
            assert_all_as_exact_as_torch(
                logits, targets, return_stats=True, through=through, reduction=reduction,
                grad_in_forward=grad_in_forward,
            )  # fmt: skip

    @pytest.mark.parametrize("through", [("entropy",), ("loss", *STATS)], ids=["entropy", "all"])
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[1:])
    def test_gradients_of_long_rows(self, device, vocab_size, n_rows, grad_in_forward, through):
        logits, targets = a_batch(vocab_size, n_rows, device)
        assert_all_as_exact_as_torch(
            logits, targets, return_stats=True, through=through, grad_in_forward=grad_in_forward
        )

    @pytest.mark.parametrize("through", [("losses",), ("lse",), ("entropy",), STATS], ids="-".join)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_gradients_to_probabilities_and_sample_weight(self, device, grad_in_forward, through):
        logits, targets = a_batch(*SMALL, device)
        v = factors(6, device=device)
        for y in (targets, some_probabilities(6, 65, device=device)):
            needs = ("logits", "targets", "sample_weight")
            if "losses" not in through:
                needs = ("logits",)  # lse and entropy depend on nothing else
            for reduction in ("mean", "none"):
                assert_all_as_exact_as_torch(
                    logits, y, sample_weight=v, needs=needs, return_stats=True,
                    reduction=reduction, through=through, grad_in_forward=grad_in_forward,
                )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_lse_and_entropy_have_no_gradient_of_sample_weight(self, device, grad_in_forward):
        logits, targets = a_batch(*SMALL, device)
        leaf, v = logits.requires_grad_(), factors(6, device=device).requires_grad_()
        _, stats = fused_cross_entropy(
            leaf, targets, sample_weight=v, return_stats=True, grad_in_forward=grad_in_forward
        )
        (stats.lse.sum() + stats.entropy.sum()).backward()
        assert v.grad is None or (v.grad == 0).all()
        assert leaf.grad.abs().max() > 0

    def test_predictions_have_no_gradient(self, device):
        logits, targets = a_batch(*SMALL, device)
        _, stats = fused_cross_entropy(logits.requires_grad_(), targets, return_stats=True)
        assert not stats.predictions.requires_grad
        assert stats.losses.requires_grad and stats.lse.requires_grad
        assert stats.entropy.requires_grad

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_entropy_of_masked_classes(self, device, vocab_size, n_rows, grad_in_forward):
        """0 * log(0) is 0, and has no gradient: -inf is how a caller forbids a class."""
        logits = random_logits(n_rows, vocab_size, device=device)
        logits[0, 9:] = -torch.inf
        logits[-1, : vocab_size - 5] = -torch.inf
        targets = torch.full((n_rows,), 3, device=device)
        targets[-1] = vocab_size - 2
        assert_all_as_exact_as_torch(
            logits, targets, return_stats=True, reduction="none", grad_in_forward=grad_in_forward
        )

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_entropy_of_masked_classes_may_have_a_large_gradient(self, device, vocab_size, n_rows):
        """Beside a confident class it reaches the masked ones undivided, and 0 times inf is NaN."""
        gradients = []
        for factor in (1.0, 2.0**14):
            logits = torch.full((n_rows, vocab_size), -torch.inf, device=device)
            logits[:, :3] = torch.tensor([9.0, 0.0, 1.0])
            logits.requires_grad_()
            targets = torch.zeros(n_rows, dtype=torch.long, device=device)
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            (factor * stats.entropy.sum()).backward()
            gradients.append(logits.grad / factor)
        close(*gradients)

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS)
    def test_entropy_of_one_possible_class_is_zero(self, device, vocab_size, n_rows):
        logits = torch.full((n_rows, vocab_size), -torch.inf, device=device)
        logits[:, 7] = 2.5
        targets = torch.full((n_rows,), 7, device=device)
        for route in (True, False):
            values, _ = computed(logits, targets, return_stats=True, grad_in_forward=route)
            assert (values["entropy"] == 0).all() and (values["losses"] == 0).all()
            assert (values["predictions"] == 7).all()
            close(values["lse"], torch.full((n_rows,), 2.5, device=device))

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_entropy_does_not_see_an_offset(self, device, vocab_size, n_rows):
        """lse - sum(p * x) would lose three digits here."""
        logits, targets = a_batch(vocab_size, n_rows, device)
        logits = (logits * 8).round() / 8
        for route in (True, False):
            options = dict(return_stats=True, through=("entropy",), grad_in_forward=route)
            plain, _ = computed(logits, targets, **options)
            moved, _ = computed(logits - 1e4, targets, **options)
            close(plain["entropy"], moved["entropy"])
            close(plain["grad_logits"], moved["grad_logits"])

    def test_entropy_is_at_most_the_logarithm_of_the_classes(self, device):
        for vocab_size, n_rows in (SMALL, LONG, SPLIT):
            logits = torch.zeros(n_rows, vocab_size, device=device)
            targets = torch.zeros(n_rows, dtype=torch.long, device=device)
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            right = torch.full_like(stats.entropy, math.log(vocab_size))
            torch.testing.assert_close(stats.entropy, right, rtol=1e-5, atol=0.0)

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_stats_alone_know_nothing_of_a_divisor_of_0(self, device, vocab_size, n_rows):
        logits, targets = a_batch(vocab_size, n_rows, device)
        nothing = torch.zeros(n_rows, device=device)
        for names in (("entropy",), ("lse",), ("lse", "entropy")):
            values, _ = computed(
                logits, targets, sample_weight=nothing, needs=("logits",), through=names,
                return_stats=True,
            )  # fmt: skip
            right, _ = computed(
                logits, targets, needs=("logits",), through=names, return_stats=True
            )
            close(values["grad_logits"], right["grad_logits"])

    @pytest.mark.parametrize("vocab_size, n_rows", VOCABS[:2])
    def test_stats_alone_know_nothing_of_probabilities(self, device, vocab_size, n_rows):
        logits, _ = a_batch(vocab_size, n_rows, device)
        logits[:, 0] = -torch.inf
        leaf = logits.requires_grad_()
        probabilities = some_probabilities(n_rows, vocab_size, device=device).requires_grad_()
        _, stats = fused_cross_entropy(leaf, probabilities, return_stats=True)
        gradients = torch.autograd.grad(
            stats.entropy.sum(), [leaf, probabilities], allow_unused=True
        )
        assert gradients[0].isfinite().all() and gradients[1] is None

    def test_of_infinite_logits(self, device):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, targets = a_batch(vocab_size, n_rows, device)
            logits[0, 7], logits[1] = torch.inf, -torch.inf
            targets[:2] = 3
            _, stats = fused_cross_entropy(logits, targets, return_stats=True)
            assert stats.lse[0] == torch.inf and stats.lse[1] == -torch.inf
            assert stats.entropy[:2].isnan().all() and stats.lse[2:].isfinite().all()
            assert stats.predictions[:2].tolist() == [7, 0]

    @pytest.mark.parametrize("name", ["losses", "lse", "entropy", "predictions"])
    def test_may_be_changed_in_place(self, device, name):
        logits, targets = a_batch(*SMALL, device)
        for reduction in REDUCTIONS:
            options = dict(reduction=reduction, grad_in_forward=False)
            _, right, upstream = fused(logits, targets, **options)
            leaf = logits.clone().requires_grad_()
            loss, stats = fused_cross_entropy(leaf, targets, return_stats=True, **options)
            getattr(stats, name).mul_(2)
            loss.backward(upstream)
            close(leaf.grad, right)

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_kept_graph_and_separate_backwards(self, device, grad_in_forward):
        """Loss first, then each stat: every backward stands alone."""
        logits, targets = a_batch(*SMALL, device)
        leaf = logits.clone().requires_grad_()
        loss, stats = fused_cross_entropy(
            leaf, targets, return_stats=True, grad_in_forward=grad_in_forward
        )
        outputs = [loss, stats.losses.sum(), stats.lse.sum(), stats.entropy.sum()]
        for output in outputs:
            output.backward(retain_graph=True)
        together = logits.clone().requires_grad_()
        loss, stats = fused_cross_entropy(
            together, targets, return_stats=True, grad_in_forward=grad_in_forward
        )
        (loss + stats.losses.sum() + stats.lse.sum() + stats.entropy.sum()).backward()
        close(leaf.grad, together.grad)

    def test_nothing_used_is_no_gradient(self, device):
        """A stat that is returned but not used costs nothing and changes nothing."""
        logits, targets = a_batch(*SMALL, device)
        leaf = logits.clone().requires_grad_()
        _, stats = fused_cross_entropy(leaf, targets, return_stats=True)
        (0.0 * stats.lse.sum()).backward()
        assert (leaf.grad == 0).all()

    def test_the_loss_may_be_changed_in_place(self, device):
        """`losses.mul_(mask)` is a usual way to weigh tokens."""
        logits, targets = a_batch(*SMALL, device)
        factor = factors(6, device=device)
        for route in (True, False):
            leaf, right = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            losses, _ = fused_cross_entropy(
                leaf, targets, return_stats=True, reduction="none", grad_in_forward=route
            )
            losses.mul_(factor).sum().backward()
            (F.cross_entropy(right, targets, reduction="none") * factor).sum().backward()
            close(leaf.grad, right.grad)


class TestStatsInplace:
    @pytest.mark.parametrize("through", STATS)
    def test_overwritten_logits_raise(self, fused_device, through):
        logits, targets = a_batch(*SMALL, fused_device)
        _, stats = fused_cross_entropy(
            logits.requires_grad_(), targets, return_stats=True, inplace=True,
            grad_in_forward=True,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="inplace=True has overwritten"):
            getattr(stats, through).sum().backward()

    @pytest.mark.parametrize("grad_in_forward", [None, False])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_unless_asked_for_they_are_there(self, fused_device, reduction, grad_in_forward):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, targets = a_batch(vocab_size, n_rows, fused_device)
            assert_all_as_exact_as_torch(
                logits, targets, return_stats=True, inplace=True, reduction=reduction,
                grad_in_forward=grad_in_forward,
            )  # fmt: skip

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_values_and_the_gradient_of_the_loss(self, fused_device, grad_in_forward):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, targets = a_batch(vocab_size, n_rows, fused_device)
            assert_all_as_exact_as_torch(
                logits, targets, return_stats=True, inplace=True, through=("loss",),
                grad_in_forward=grad_in_forward,
            )  # fmt: skip


def test_inputs_are_unchanged(device):
    """Logits, probabilities and factors, whichever route, and their versions."""
    vocab_size, n_rows = SMALL
    inputs = dict(
        logits=random_logits(n_rows, vocab_size, device=device),
        targets=some_probabilities(n_rows, vocab_size, device=device),
        weight=random_weight(vocab_size, device=device),
        sample_weight=factors(n_rows, device=device),
    )
    before = {name: (tensor.clone(), tensor._version) for name, tensor in inputs.items()}
    for route in (True, False):
        computed(**inputs, return_stats=True, grad_in_forward=route, **EVERYTHING)
    for name, (values, version) in before.items():
        assert torch.equal(inputs[name], values), name
        assert inputs[name]._version == version, name


def test_bitwise_equal_from_run_to_run(fused_device):
    for vocab_size, n_rows in (SMALL, LONG, SPLIT):
        logits, targets = a_batch(vocab_size, n_rows, fused_device, torch.bfloat16)
        for route in (True, False):
            options = dict(return_stats=True, grad_in_forward=route, **EVERYTHING)
            v = factors(n_rows, device=fused_device)
            values, _ = computed(logits, targets, sample_weight=v, **options)
            again, _ = computed(logits, targets, sample_weight=v, **options)
            for name, value in values.items():
                assert torch.equal(value, again[name]), name


def test_reference_has_every_option():
    for y in (random_targets(6, classes=65), some_probabilities(6, 65, device="cpu")):
        options = dict(weight=random_weight(65), sample_weight=factors(6, device="cpu"),
                       normalizer=3.0, return_stats=True, **EVERYTHING)  # fmt: skip
        loss, stats = reference_cross_entropy(random_logits(6, 65), y, **options)
        right, right_stats = fused_cross_entropy(random_logits(6, 65), y, **options)
        close(loss, right)
        for value, other in zip(stats, right_stats, strict=True):
            close(value, other)


class TestOutOfRangeTargets:
    """On a GPU a row of a wrong target is NaN, and nothing else is."""

    @pytest.mark.parametrize("wrong", [9000, -1, 2**40])
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_poison_their_row_and_no_other(self, kernel_device, wrong, grad_in_forward):
        for vocab_size, n_rows in (SMALL, LONG):
            logits, targets = a_batch(vocab_size, n_rows, kernel_device)
            v = factors(n_rows, device=kernel_device)
            bad = targets.clone()
            bad[0] = wrong
            options = dict(
                reduction="none", return_stats=True, grad_in_forward=grad_in_forward,
                sample_weight=v, through=("loss", "losses"), **EVERYTHING,
            )  # fmt: skip
            values, _ = computed(logits, bad, **options)
            right, _ = computed(logits, targets, **options)
            for name in ("loss", "losses", "grad_logits"):
                assert values[name][0].isnan().all(), name
                assert torch.equal(values[name][1:], right[name][1:]), name


LOGITS, TARGETS, SOFT = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), torch.zeros(4, 5)
META, NAN, INF = torch.ones(4, device="meta"), float("nan"), float("inf")
NUMBER = torch.tensor(3.0)


def refused(error, name, value, words, y=TARGETS, logits=LOGITS, **more):
    options = {name: value, **more}
    return pytest.param(error, logits, y, options, words, id=f"{name}-{words[-1]}")


ERRORS = [
    refused(TypeError, "z_loss", "1", ["z_loss", "number", "'1'"]),
    refused(TypeError, "z_loss", None, ["z_loss", "number", "None"]),
    refused(TypeError, "z_loss", True, ["z_loss", "number", "True"]),
    refused(TypeError, "z_loss", NUMBER, ["z_loss", "number", "a Tensor", ".item()"]),
    refused(ValueError, "z_loss", NAN, ["z_loss", "finite", "nan"]),
    refused(ValueError, "z_loss", -INF, ["z_loss", "finite", "-inf"]),
    refused(TypeError, "logit_scale", None, ["logit_scale", "number", "None"]),
    refused(TypeError, "logit_scale", False, ["logit_scale", "number", "False"]),
    refused(TypeError, "logit_scale", 1j, ["logit_scale", "number", "1j"]),
    refused(ValueError, "logit_scale", NAN, ["logit_scale", "finite", "nan"]),
    refused(ValueError, "logit_scale", INF, ["logit_scale", "finite", "inf"]),
    refused(TypeError, "softcap", "30", ["softcap", "number or None", "'30'"]),
    refused(TypeError, "softcap", True, ["softcap", "number or None", "True"]),
    refused(ValueError, "softcap", 0.0, ["softcap", "positive and finite", "0.0"]),
    refused(ValueError, "softcap", -30.0, ["softcap", "positive and finite", "-30.0"]),
    refused(ValueError, "softcap", NAN, ["softcap", "positive and finite", "nan"]),
    refused(ValueError, "softcap", INF, ["softcap", "positive and finite", "inf"]),
    refused(TypeError, "normalizer", "3", ["normalizer", "number or a 0-d tensor", "'3'"]),
    refused(TypeError, "normalizer", True, ["normalizer", "number or a 0-d tensor", "True"]),
    refused(ValueError, "normalizer", 0, ["normalizer", "positive and finite", "got 0"]),
    refused(ValueError, "normalizer", -2.0, ["normalizer", "positive and finite", "-2.0"]),
    refused(ValueError, "normalizer", NAN, ["normalizer", "positive and finite", "nan"]),
    refused(ValueError, "normalizer", INF, ["normalizer", "positive and finite", "inf"]),
    refused(ValueError, "normalizer", NUMBER[None], ["normalizer", "0-d", "(1,)"]),
    refused(TypeError, "normalizer", NUMBER > 0, ["normalizer", "real", "bool"]),
    refused(TypeError, "normalizer", 1j * NUMBER, ["normalizer", "real", "complex64"]),
    refused(ValueError, "normalizer", NUMBER.clone().requires_grad_(),
            ["normalizer", "no gradient", "detach"]),
    refused(ValueError, "normalizer", META[0], ["normalizer", "cpu", "meta"]),
    refused(ValueError, "normalizer", 3, ["normalizer", '"mean"', "'sum'"], reduction="sum"),
    refused(ValueError, "normalizer", 3, ["normalizer", '"mean"', "'none'"], reduction="none"),
    refused(TypeError, "sample_weight", 0.5, ["sample_weight", "Tensor or None", "float"]),
    refused(TypeError, "sample_weight", [1.0], ["sample_weight", "Tensor or None", "list"]),
    refused(TypeError, "sample_weight", TARGETS, ["floating", "int64", "sample_weight.float()"]),
    refused(TypeError, "sample_weight", TARGETS > 0, ["sample_weight", "floating", "torch.bool"]),
    refused(ValueError, "sample_weight", NUMBER, ["sample_weight", "(4, 5)", "(4,)", "got ()"]),
    refused(ValueError, "sample_weight", LOGITS, ["sample_weight", "(4,)", "got (4, 5)"]),
    refused(ValueError, "sample_weight", SOFT, ["one factor per target", "(4,)", "(4, 5)"], y=SOFT),
    refused(ValueError, "sample_weight", LOGITS[:3, 0], ["sample_weight", "(4,)", "(3,)"]),
    refused(ValueError, "sample_weight", META, ["sample_weight", "cpu", "meta"]),
    refused(TypeError, "return_stats", 1, ["return_stats", "True or False", "got 1"]),
    refused(TypeError, "return_stats", None, ["return_stats", "True or False", "None"]),
    refused(TypeError, "inplace", 1, ["inplace", "True or False", "got 1"]),
    refused(TypeError, "grad_in_forward", 0, ["grad_in_forward", "None, True or False", "got 0"]),
    refused(TypeError, "label_smoothing", True, ["label_smoothing", "number", "True"]),
    refused(TypeError, "label_smoothing", torch.tensor(0.1), ["label_smoothing", ".item()"]),
    refused(TypeError, "logit_scale", torch.nn.Parameter(torch.ones(())), ["a Parameter", "item"]),
    refused(TypeError, "ignore_index", True, ["ignore_index", "int", "bool"]),
    refused(TypeError, "dim", 1.0, ["dim", "int or None", "1.0"]),
    refused(TypeError, "dim", True, ["dim", "int or None", "True"]),
    refused(ValueError, "ignore_index", 0, ["ignore_index", "probabilities", "got 0"], y=SOFT),
    refused(ValueError, "ignore_index", 3, ["ignore_index", "probabilities", "got 3"], y=SOFT),
    refused(ValueError, "dim", None, ["probabilities", "dim=1 or dim=-1", "(2, 3, 4)"],
            y=torch.zeros(2, 3, 4), logits=torch.zeros(2, 3, 4)),
    refused(ValueError, "dim", 2, ["(4, 5)", "dim=2"], y=SOFT),
    refused(ValueError, "weight", None, ["probabilities", "(4, 5)", "float32", "(4, 4)"],
            y=torch.zeros(4, 4)),
    refused(TypeError, "weight", None, ["class indices", "probabilities", "complex64"],
            y=SOFT.to(torch.complex64)),
    refused(TypeError, "weight", None, ["class indices", "probabilities", "float8_e4m3fn"],
            y=SOFT.to(torch.float8_e4m3fn)),
    refused(ValueError, "weight", None, ["targets", "cpu", "meta"], y=SOFT.to("meta")),
]  # fmt: skip


@pytest.mark.parametrize("error, logits, targets, options, words", ERRORS)
def test_errors_say_what_is_needed_and_what_came(error, logits, targets, options, words):
    for function in (fused_cross_entropy, reference_cross_entropy):
        with pytest.raises(error) as raised:
            function(logits, targets, **options)
        for word in words:
            assert word in str(raised.value)
