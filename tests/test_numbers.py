"""Numbers: known values, and the regimes in which cross-entropy kernels go wrong."""

import math

import pytest
import torch
from oracle import (
    FLOATS,
    assert_as_exact_as_torch,
    assert_as_near,
    by_torch,
    exact,
    fused,
    random_logits,
    random_targets,
    random_weight,
    worst,
)

from fused_ce import fused_cross_entropy

SMALL, LONG = 65, 5001  # a tile of whole rows; a full step of the stream, a tail and edges
VOCABS = [pytest.param(SMALL, id="small"), pytest.param(LONG, id="long")]
ROUTES = [pytest.param(True, id="in-forward"), pytest.param(False, id="in-backward")]
COURSE_INPUTS = [
    [[.1088, .1060, .6683, .5131, .0645], [.4538, .6852, .2520, .3792, .2675],
     [.4578, .3357, .6384, .0481, .5612], [.9639, .8864, .1585, .3038, .0350]],
    [[.3356, .9013, .7052, .8294, .8334], [.6333, .4434, .1428, .5739, .3810],
     [.9476, .5917, .7037, .2987, .6208], [.8541, .1803, .2054, .4775, .8199]],
]  # fmt: skip
COURSE_TARGETS = [[1, 0, 2, 2], [4, 1, 4, 0]]


@pytest.mark.parametrize("factor, right", [(1, 1.609473), (1000, 272.962498)], ids=str)
def test_course_batch(device, factor, right):
    logits = torch.tensor(COURSE_INPUTS, device=device) * factor
    loss = fused_cross_entropy(logits, torch.tensor(COURSE_TARGETS, device=device))
    assert loss.item() == pytest.approx(right, rel=1e-6)
    assert_as_exact_as_torch(logits, torch.tensor(COURSE_TARGETS, device=device))


@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_single_row(device, grad_in_forward):
    one = torch.ones((), device=device)
    loss, gradient, _ = fused(
        torch.tensor([1, 2, 3, 0.5], device=device), torch.tensor(2, device=device),
        upstream=one, grad_in_forward=grad_in_forward,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.460773, abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.085369, 0.232057, -0.369204, 0.051779], abs=1e-6)


@pytest.mark.parametrize("p, right", [(0.6, 0.510826), (0.05, 2.995732), (0.9, 0.105361),
                                      (0.1, 2.302585), (0.01, 4.605170)])  # fmt: skip
def test_loss_is_in_nats(device, p, right):
    logits = torch.tensor([p, 1 - p], device=device).log()
    loss = fused_cross_entropy(logits, torch.tensor(0, device=device))
    assert loss.item() == pytest.approx(right, abs=1e-6)


def test_uniform_logits_cost_the_logarithm_of_the_classes(device):
    loss, gradient, _ = fused(
        torch.zeros(2, LONG, device=device), torch.tensor([0, LONG - 1], device=device),
        upstream=torch.ones((), device=device),
    )  # fmt: skip
    assert loss.item() == pytest.approx(math.log(LONG), rel=1e-6)
    assert gradient[0, 1:].tolist() == pytest.approx([0.5 / LONG] * (LONG - 1), rel=1e-5)


class TestMaskedLogits:
    """-inf is how a caller forbids a class."""

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_first_block_all_minus_inf(self, device, dtype, grad_in_forward):
        logits = random_logits(2, LONG, dtype=dtype, device=device)
        logits[0, :4500] = -torch.inf  # more than any kernel reads in one step
        logits[1, 3:] = -torch.inf
        targets = torch.tensor([4700, 1], device=device)
        assert_as_exact_as_torch(logits, targets, reduction="none", grad_in_forward=grad_in_forward)

    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothing"])
    @pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_infinities_and_nan_are_as_torch(
        self, device, vocab_size, smoothing, weighted, grad_in_forward
    ):
        logits = random_logits(8, vocab_size, device=device)
        logits[0] = -torch.inf
        logits[1, 7] = -torch.inf  # the target
        logits[2, 5] = torch.inf
        logits[3, 7] = torch.inf  # the target
        logits[4, -1] = torch.nan
        logits[5] = torch.nan
        logits[6, ::2] = -torch.inf
        logits[7] = -torch.inf
        logits[7, 7] = 1.0  # nothing but the target
        targets = torch.full((8,), 7, device=device)
        weight = random_weight(vocab_size, device=device) if weighted else None
        options = dict(label_smoothing=smoothing, reduction="none")
        losses, gradient, upstream = fused(
            logits, targets, weight, grad_in_forward=grad_in_forward, **options
        )
        theirs = by_torch(logits, targets, weight, upstream=upstream, **options)
        weight = None if weight is None else weight.double()
        right = by_torch(logits.double(), targets, weight, upstream=upstream, **options)
        assert_as_near(losses, theirs[0], right[0])
        assert_as_near(gradient, theirs[1], right[1])
        assert losses[[0, 4, 5]].isnan().all() and not losses[[1, 6, 7]].isnan().any()
        assert losses[1] == torch.inf

    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_rows_after_a_bad_one_are_right(self, device, vocab_size, grad_in_forward):
        logits = random_logits(3, vocab_size, device=device)
        targets = random_targets(3, classes=vocab_size, device=device)
        options = dict(reduction="none", grad_in_forward=grad_in_forward)
        right, right_gradient, upstream = fused(logits, targets, **options)
        logits[1] = torch.nan
        losses, gradient, _ = fused(logits, targets, upstream=upstream, **options)
        assert torch.equal(losses[[0, 2]], right[[0, 2]])
        assert torch.equal(gradient[[0, 2]], right_gradient[[0, 2]])

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_rows_filled_with_the_lowest_number(self, device, dtype, vocab_size, grad_in_forward):
        """The usual mask of a language model; a maximum that starts at -1e38 loses it."""
        lowest = torch.finfo(dtype).min
        logits = torch.full((3, vocab_size), lowest, dtype=dtype, device=device)
        logits[1, ::2] = -torch.inf
        logits[2] = random_logits(vocab_size, dtype=dtype, device=device)
        logits[2, 9:] = lowest
        targets = torch.tensor([0, 3, 8], device=device)
        assert_as_exact_as_torch(logits, targets, reduction="none", grad_in_forward=grad_in_forward)

    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("smoothing", [0.1, 1.0])
    @pytest.mark.parametrize("masked", [-1e4, -1e9], ids=str)
    def test_smoothing_with_a_masked_target(self, device, vocab_size, smoothing, masked):
        """One row at a time: losses of 1e9 would hide an error in one of 1e5."""
        for columns, target in (
            ([7], 7),
            (range(0, vocab_size, 2), 7),
            (range(1, vocab_size, 2), 7),
        ):
            logits = random_logits(1, vocab_size, device=device, scale=1.0)
            logits[0, list(columns)] = masked
            assert_as_exact_as_torch(
                logits, torch.tensor([target], device=device), label_smoothing=smoothing
            )


class TestOffsetsAndConfidence:
    """Where lse and logits are large and their difference is not."""

    @pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothing"])
    def test_common_offset(self, device, offset, vocab_size, grad_in_forward, smoothing):
        """lse - x_y and exp(x - lse) lose 5e-4 here, a folded x * LOG2E - m * LOG2E 1e-3."""
        logits = random_logits(3, vocab_size, device=device) + offset
        targets = random_targets(3, classes=vocab_size, device=device)
        assert_as_exact_as_torch(
            logits, targets, reduction="none", grad_in_forward=grad_in_forward,
            label_smoothing=smoothing,
        )  # fmt: skip

    @pytest.mark.parametrize("offset", [4096.0, -1e4])
    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_offset_loses_nothing_at_all(self, device, offset, vocab_size, grad_in_forward):
        """Logits on a grid that survives the offset: bit for bit the same loss and gradient."""
        logits = (random_logits(3, vocab_size, device=device) * 8).round() / 8
        targets = random_targets(3, classes=vocab_size, device=device)
        options = dict(reduction="none", grad_in_forward=grad_in_forward)
        losses, gradient, upstream = fused(logits, targets, **options)
        moved, moved_gradient, _ = fused(logits + offset, targets, upstream=upstream, **options)
        assert torch.equal(losses, moved)
        assert torch.equal(gradient, moved_gradient)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("gap", [14.0, 200.0])
    @pytest.mark.parametrize("vocab_size", VOCABS)
    def test_confident_rows(self, device, dtype, gap, vocab_size):
        logits = random_logits(3, vocab_size, dtype=dtype, device=device, scale=0.1)
        targets = random_targets(3, classes=vocab_size, device=device)
        logits[torch.arange(3), targets] += gap
        for route in (True, False):
            assert_as_exact_as_torch(
                logits, targets, reduction="none", grad_in_forward=route, ulps_of_one=2
            )

    @pytest.mark.parametrize("vocab_size", VOCABS)
    def test_confident_rows_keep_small_probabilities(self, device, vocab_size):
        """Relative to each probability, and not to the largest."""
        logits = random_logits(2, vocab_size, device=device)
        logits[:, 3] += 40.0
        targets = torch.tensor([3, 4], device=device)
        upstream = torch.ones(2, device=device)
        for route in (True, False):
            _, gradient, _ = fused(
                logits, targets, reduction="none", grad_in_forward=route, upstream=upstream
            )
            _, right = exact(logits.cpu(), targets.cpu(), reduction="none", upstream=upstream.cpu())
            off = torch.ones(vocab_size, dtype=torch.bool)
            off[[3, 4]] = False
            ratio = gradient.cpu()[:, off].double().numpy() / right[:, off].astype(float)
            assert abs(ratio - 1).max() <= 64 * torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("vocab_size", VOCABS)
    def test_confident_and_wrong(self, device, vocab_size):
        logits = random_logits(3, vocab_size, device=device)
        targets = random_targets(3, classes=vocab_size, device=device)
        logits[:, 11] += 1000.0
        assert_as_exact_as_torch(logits, targets, label_smoothing=0.1)

    def test_maximum_in_every_part_of_a_row(self, fused_device):
        """A rescaled sum: the maximum comes first, last, in an edge, in the bulk, in the tail."""
        places = torch.tensor([0, 5, 2000, 4095, 4999, 5000], device=fused_device)
        logits = random_logits(6, LONG, device=fused_device)
        logits[torch.arange(6), places] += 50.0
        targets = random_targets(6, classes=LONG, device=fused_device)
        for route in (True, False):
            assert_as_exact_as_torch(logits, targets, reduction="none", grad_in_forward=route)

    @pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
    def test_monotone_rows(self, fused_device, order):
        """Rising logits rescale the sum at every step, falling ones never."""
        logits = torch.linspace(-60.0, 60.0, LONG, device=fused_device)[None] * order
        assert_as_exact_as_torch(logits, torch.tensor([40], device=fused_device))


class TestHalfPrecision:
    """Arithmetic in float32, whatever the logits are."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_loss_is_not_rounded_to_the_dtype_of_the_logits(self, device, dtype):
        logits = random_logits(4, SMALL, dtype=dtype, device=device)
        targets = random_targets(4, classes=SMALL, device=device)
        loss = fused_cross_entropy(logits, targets)
        assert loss.dtype == torch.float32
        one = torch.ones(())
        right = exact(logits.cpu(), targets.cpu(), upstream=one)[0]
        assert worst(loss, right) <= 1e-6 * right

    def test_float16_gradient_survives_a_loss_scale(self, device):
        """1 / n_rows of a probability is below float16; the scale lifts it before the rounding."""
        logits = random_logits(64, SMALL, dtype=torch.float16, device=device, scale=1e-2)
        logits[:, 0] -= 10.0
        targets = random_targets(64, classes=SMALL - 1, device=device) + 1
        _, gradient, _ = fused(logits, targets, upstream=torch.tensor(65536.0, device=device))
        _, right = exact(logits.cpu(), targets.cpu(), upstream=torch.tensor(65536.0))
        tiny = gradient[:, 0].double().cpu().numpy()
        assert (abs(tiny - right[:, 0].astype(float)) <= 2e-3 * right[:, 0].astype(float)).all()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_bitwise_equal_from_run_to_run(fused_device, vocab_size, grad_in_forward):
    logits = random_logits(9, vocab_size, dtype=torch.bfloat16, device=fused_device)
    targets = random_targets(9, classes=vocab_size, device=fused_device)
    options = dict(label_smoothing=0.1, ignore_index=3, grad_in_forward=grad_in_forward)
    loss, gradient, upstream = fused(logits, targets, **options)
    again, gradient_again, _ = fused(logits, targets, upstream=upstream, **options)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_both_routes_give_the_same_numbers(fused_device, dtype, vocab_size):
    """But for the order of a row's sum, which the tiles of a route decide."""
    logits = random_logits(4, vocab_size, dtype=dtype, device=fused_device)
    targets = random_targets(4, classes=vocab_size, device=fused_device)
    one = torch.ones((), device=fused_device)
    options = dict(label_smoothing=0.1, upstream=one, reduction="sum")
    loss, gradient, _ = fused(logits, targets, grad_in_forward=True, **options)
    loss_again, gradient_again, _ = fused(logits, targets, grad_in_forward=False, **options)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, loss_again, rtol=4 * torch.finfo(loss.dtype).eps, atol=0.0)
    torch.testing.assert_close(gradient, gradient_again, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("vocab_size", [65, 1100, 9001])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_smoothing_of_a_huge_logit(device, vocab_size, weighted):
    """Its distance from where the running maximum starts overflows.

    In a call of its own, or its loss of 1e30 would hide the others. A constant is no tolerance:
    torch adds a row up in lanes as wide as the vectors of the CPU, and its gradient is 90 eps off
    with AVX2, 50 with AVX-512.
    """
    weight = random_weight(vocab_size, device=device) if weighted else None
    logits = random_logits(3, vocab_size, device=device)
    logits[0, 5] = 1e32
    targets = random_targets(3, classes=vocab_size, device=device)
    for rows in (slice(0, 1), slice(1, 3)):
        for route in (True, False):
            assert_as_exact_as_torch(
                logits[rows], targets[rows], weight, label_smoothing=0.1, grad_in_forward=route
            )
