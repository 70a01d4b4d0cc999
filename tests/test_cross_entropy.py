"""The public function: values, shapes, dtypes and errors."""

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    FLOATS,
    assert_as_exact_as_torch,
    by_torch,
    fused,
    random_logits,
    random_targets,
    random_weight,
)

from fused_ce import backend, fused_cross_entropy, reference_cross_entropy

SMALL, LONG = 65, 1100  # several rows a program; a row in several steps
VOCABS = [pytest.param(SMALL, id="small"), pytest.param(LONG, id="long")]
REDUCTIONS = ["mean", "sum", "none"]
ROUTES = [pytest.param(True, id="in-forward"), pytest.param(False, id="in-backward")]


def everything(vocab_size, dtype, device):
    return dict(
        weight=random_weight(vocab_size, dtype, device), ignore_index=3, label_smoothing=0.2
    )


def a_batch(vocab_size, dtype=torch.float32, device="cpu", n_rows=6):
    logits = random_logits(n_rows, vocab_size, dtype=dtype, device=device)
    targets = random_targets(n_rows, classes=vocab_size, device=device)
    targets[1] = 3  # what `everything` ignores
    targets[2], targets[3] = 0, vocab_size - 1
    return logits, targets


@pytest.mark.thinned
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_loss_and_gradient_are_as_exact_as_torch(
    device, vocab_size, dtype, reduction, grad_in_forward
):
    logits, targets = a_batch(vocab_size, dtype, device)
    options = dict(reduction=reduction, grad_in_forward=grad_in_forward)
    assert_as_exact_as_torch(logits, targets, **options)
    assert_as_exact_as_torch(logits, targets, **options, **everything(vocab_size, dtype, device))


@pytest.mark.thinned
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(ignore_index=3), id="ignore-inside-the-vocabulary"),
        pytest.param(dict(ignore_index=0), id="ignore-class-0"),
        pytest.param(dict(label_smoothing=0.1), id="smoothing"),
        pytest.param(dict(label_smoothing=1.0), id="only-smoothing"),
        pytest.param(dict(label_smoothing=0.3, ignore_index=3), id="smoothing-and-ignore"),
        pytest.param(dict(weighted=True), id="weight"),
        pytest.param(dict(weighted=True, ignore_index=3), id="weight-and-ignore"),
        pytest.param(dict(weighted=True, label_smoothing=0.3), id="weight-and-smoothing"),
    ],
)
def test_options_one_by_one(device, options, vocab_size, grad_in_forward):
    logits, targets = a_batch(vocab_size, device=device)
    options = dict(options, grad_in_forward=grad_in_forward)
    weight = random_weight(vocab_size, device=device) if options.pop("weighted", False) else None
    assert_as_exact_as_torch(logits, targets, weight, **options)


# one vector and its neighbours; a power of two and one more, where the kernel changes;
# two steps of the stream with edges
@pytest.mark.parametrize("vocab_size", [2, 31, 33, 1024, 1025, 5001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_vocabulary_size(device, vocab_size, dtype):
    logits = random_logits(3, vocab_size, dtype=dtype, device=device)
    targets = random_targets(3, classes=vocab_size, device=device)
    for route in (True, False):
        assert_as_exact_as_torch(
            logits, targets, reduction="none", label_smoothing=0.1, grad_in_forward=route
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_class_has_neither_loss_nor_gradient(device, dtype):
    logits = random_logits(3, 1, dtype=dtype, device=device)
    targets = torch.tensor([0, -100, 0], device=device)
    losses, gradient, _ = fused(logits, targets, reduction="none")
    assert (losses == 0).all() and (gradient == 0).all()
    losses, gradient, upstream = fused(logits, targets, reduction="none", label_smoothing=0.1)
    assert (losses == 0).all()
    # what rounding leaves of 1 - (1 - s) - s
    assert gradient.abs().max() <= torch.finfo(losses.dtype).eps * upstream.abs().max()


@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_vocabulary_of_gpt2(device, grad_in_forward):
    logits = random_logits(2, 50257, dtype=torch.bfloat16, device=device)
    targets = torch.tensor([50256, 17], device=device)
    assert_as_exact_as_torch(logits, targets, grad_in_forward=grad_in_forward)


@pytest.mark.parametrize("vocab_size", [8, 100])
def test_more_rows_than_one_program_holds(device, vocab_size):
    logits = random_logits(150, vocab_size, device=device)
    targets = random_targets(150, classes=vocab_size, device=device)
    assert_as_exact_as_torch(logits, targets, ignore_index=3)


@pytest.mark.thinned
@pytest.mark.parametrize("position", range(20))
def test_every_column_can_be_the_target(fused_device, position):
    """Edges, interior and tail of a row that is misaligned by one element more each time."""
    vocab_size = 1031
    logits = random_logits(3, vocab_size, dtype=torch.bfloat16, device=fused_device)
    first = torch.tensor([position, vocab_size - 1 - position, 50 * position], device=fused_device)
    for route in (True, False):
        assert_as_exact_as_torch(logits, first, reduction="sum", grad_in_forward=route)


@pytest.mark.parametrize(
    "shape, dim",
    [
        pytest.param((7,), None, id="C"),
        pytest.param((5, 7), None, id="N-C"),
        pytest.param((2, 3, 7), None, id="B-T-V"),
        pytest.param((2, 3, 4, 7), None, id="batch-of-three-axes"),
        pytest.param((5, 7), 0, id="classes-on-axis-0"),
        pytest.param((2, 7, 3), 1, id="N-C-d1"),
        pytest.param((2, 7, 3, 4), 1, id="N-C-d1-d2"),
        pytest.param((2, 3, 7, 4), -2, id="negative-dim"),
        pytest.param((3, 3, 3), 1, id="all-axes-equal-axis-1"),
        pytest.param((3, 3, 3), -1, id="all-axes-equal-last-axis"),
        pytest.param((1, 1, 1), -1, id="one-of-everything"),
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes(device, shape, dim, reduction):
    axis = (-1 if dim is None else dim) % len(shape)
    logits = random_logits(*shape, device=device)
    targets = random_targets(*shape[:axis], *shape[axis + 1 :], classes=shape[axis], device=device)
    assert_as_exact_as_torch(logits, targets, dim=dim, reduction=reduction)


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 7, 3, 4)], ids=["N-C-d1", "N-C-d1-d2"])
def test_torch_shapes_need_no_dim(device, shape):
    logits = random_logits(*shape, device=device)
    targets = random_targets(shape[0], *shape[2:], classes=7, device=device)
    losses = fused_cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize(
    "shape, targets_shape",
    [((4, 3, 3), (4, 3)), ((2, 5, 5, 5), (2, 5, 5)), ((1, 1, 1), (1, 1))],
    ids=str,
)
def test_ambiguous_shapes_are_refused(device, shape, targets_shape):
    logits, targets = (
        random_logits(*shape, device=device),
        random_targets(*targets_shape, classes=1),
    )
    for function in (fused_cross_entropy, reference_cross_entropy):
        with pytest.raises(ValueError, match="dim=1 or dim=-1"):
            function(logits, targets.to(device))


@pytest.mark.parametrize("shape", [(0, 5), (0, 1500), (2, 0, 5), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_no_rows(device, shape, reduction, grad_in_forward):
    logits = random_logits(*shape, device=device)
    targets = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    loss, gradient, _ = fused(
        logits, targets, dim=-1, reduction=reduction, grad_in_forward=grad_in_forward
    )
    assert gradient.shape == shape
    if reduction == "none":
        assert loss.shape == targets.shape
    else:
        assert loss.isnan() if reduction == "mean" else loss == 0


NO_CLASSES = [
    pytest.param((5, 0), "probabilities", id="N-0"),
    pytest.param((5, 0, 3), "probabilities", id="N-0-d1"),
    pytest.param((0, 0), "probabilities", id="0-0"),
    pytest.param((0,), "probabilities", id="0"),
    pytest.param((5, 0), "ignored", id="N-0-ignored"),
    pytest.param((0, 0), "ignored", id="0-0-ignored"),
    pytest.param((0,), "ignored", id="0-ignored"),
]


@pytest.mark.parametrize("shape, kind", NO_CLASSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_classes_are_as_torch(device, shape, kind, reduction):
    dim = min(1, len(shape) - 1)
    batch_shape = shape[:dim] + shape[dim + 1 :]
    logits = torch.zeros(shape, device=device, requires_grad=True)
    targets = torch.zeros(shape, device=device)
    if kind == "ignored":
        targets = torch.full(batch_shape, -100, device=device)
    right = F.cross_entropy(logits, targets, reduction=reduction)
    loss, stats = fused_cross_entropy(
        logits, targets, dim=dim, reduction=reduction, return_stats=True
    )
    torch.testing.assert_close(loss, right, equal_nan=True)
    assert (stats.losses == 0).all() and (stats.predictions == -1).all()
    assert all(stat.shape == batch_shape for stat in stats)
    loss.sum().backward()
    assert logits.grad.shape == shape


def test_every_index_is_out_of_range_without_classes(host_device, kernel_device):
    logits, targets = torch.zeros(2, 0), torch.tensor([-100, 0])
    with backend("cpu"), pytest.raises(IndexError, match="target 0 of row 1"):
        fused_cross_entropy(logits, targets)
    losses = fused_cross_entropy(
        logits.to(kernel_device), targets.to(kernel_device), reduction="none"
    )
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_with_one_target_on_an_axis(device, reduction):
    """(C,) logits with (1,) targets: torch's loss has no axes then."""
    logits = random_logits(7, device=device)
    for target in (4, -100):
        targets = torch.tensor([target], device=device)
        right = F.cross_entropy(logits, targets, reduction=reduction)
        loss = fused_cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(loss, right, equal_nan=True)
    loss, gradient, _ = fused(
        logits, torch.tensor([4], device=device), reduction=reduction, label_smoothing=0.1,
        sample_weight=torch.tensor([2.0], device=device), normalizer=None,
    )  # fmt: skip
    right, right_gradient, _ = fused(
        logits, torch.tensor(4, device=device), reduction=reduction, label_smoothing=0.1,
        sample_weight=torch.tensor(2.0, device=device), normalizer=None,
    )  # fmt: skip
    assert torch.equal(loss, right) and torch.equal(gradient, right_gradient)


def test_ignore_index_is_anything_with_an_index(device):
    logits, targets = a_batch(SMALL, device=device)
    for value in (torch.tensor(3), torch.tensor([3], dtype=torch.int8)):
        loss = fused_cross_entropy(logits, targets, ignore_index=value)
        torch.testing.assert_close(loss, F.cross_entropy(logits, targets, ignore_index=3))


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_all_rows_ignored(device, vocab_size, reduction, grad_in_forward):
    logits = random_logits(3, vocab_size, device=device)
    targets = torch.full((3,), -100, device=device)
    for smoothing in (0.0, 0.1):
        loss, gradient, _ = fused(
            logits, targets, reduction=reduction, grad_in_forward=grad_in_forward,
            label_smoothing=smoothing, upstream=torch.full((3,) if reduction == "none" else (), 2.0,
                                                           device=device),
        )  # fmt: skip
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_ignored_rows_may_hold_anything(device, vocab_size, grad_in_forward, inplace):
    logits, targets = a_batch(vocab_size, device=device)
    targets[[0, 2, 4]] = -1
    logits[0], logits[2, ::2], logits[4] = torch.nan, torch.inf, -torch.inf
    expected = logits.clone()
    options = dict(
        ignore_index=-1, label_smoothing=0.1, reduction="none", grad_in_forward=grad_in_forward
    )
    assert_as_exact_as_torch(expected, targets, **options)
    losses, gradient, _ = fused(logits, targets, inplace=inplace, **options)
    assert (losses[[0, 2, 4]] == 0).all()
    assert (gradient[[0, 2, 4]] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64,
     torch.uint8, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_targets_of_any_integer_dtype(device, dtype, vocab_size):
    logits = random_logits(4, vocab_size, device=device)
    targets = torch.tensor([0, 64, 5, 7])
    typed = targets.to(dtype).to(device)
    assert_as_exact_as_torch(logits, typed, ignore_index=5)
    if dtype.is_signed:
        typed = torch.tensor([0, 64, -1, 7]).to(dtype).to(device)
        assert_as_exact_as_torch(logits, typed, ignore_index=-1)


@pytest.mark.parametrize("other", ["weight", "probabilities"])
def test_the_logits_alone_decide_the_dtype_of_the_loss(device, other):
    """torch promotes it to float64, of log-probabilities in float32."""
    logits, double = random_logits(3, 65, device=device), torch.float64
    weight = random_weight(65, device=device).to(double) if other == "weight" else None
    probabilities = random_logits(3, 65, device=device, dtype=double, seed=1).softmax(-1)
    loss, right = (
        fused_cross_entropy(logits, probabilities, weight),
        F.cross_entropy(logits, probabilities, weight),
    )
    assert (loss.dtype, right.dtype) == (torch.float32, double)
    torch.testing.assert_close(loss, right.float())


def test_uint8_targets_are_not_signed(device):
    """200 is a class, and 156 is not -100."""
    logits = random_logits(3, 256, device=device)
    targets = torch.tensor([200, 156, 255], dtype=torch.uint8, device=device)
    assert_as_exact_as_torch(logits, targets)
    assert_as_exact_as_torch(logits, targets, ignore_index=255)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_of_any_dtype_and_stride(device, dtype):
    logits, targets = a_batch(SMALL, device=device)
    weight = random_weight(2 * SMALL, dtype, device)[::2]
    assert_as_exact_as_torch(logits, targets, weight.float().to(dtype), label_smoothing=0.1)
    assert_as_exact_as_torch(logits, targets, weight, label_smoothing=0.1)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_expanded_and_zero_weights(device, vocab_size):
    logits, targets = a_batch(vocab_size, device=device)
    expanded = torch.full((1,), 0.7, device=device).expand(vocab_size)
    assert_as_exact_as_torch(logits, targets, expanded, label_smoothing=0.1)
    some = random_weight(vocab_size, device=device)
    some[::2] = 0.0
    assert_as_exact_as_torch(logits, targets, some, label_smoothing=0.1)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
def test_weights_that_sum_to_zero_are_as_torch(device, vocab_size, grad_in_forward):
    logits, targets = a_batch(vocab_size, device=device)
    weight = torch.zeros(vocab_size, device=device)
    one = torch.ones((), device=device)
    loss, gradient, _ = fused(
        logits, targets, weight, upstream=one, grad_in_forward=grad_in_forward
    )
    torch_loss, torch_gradient = by_torch(logits, targets, weight, upstream=one)
    assert loss.isnan() and torch_loss.isnan()
    assert torch.equal(gradient.isnan(), torch_gradient.isnan())


def test_reference_has_the_arguments_of_the_operator():
    logits, targets = a_batch(SMALL)
    options = dict(weight=random_weight(SMALL), ignore_index=3, reduction="none",
                   label_smoothing=0.1, dim=-1, inplace=True, grad_in_forward=True)  # fmt: skip
    before = logits.clone()
    losses = reference_cross_entropy(logits, targets, **options)
    assert torch.equal(logits, before)
    options.update(inplace=False)
    torch.testing.assert_close(losses, fused_cross_entropy(logits, targets, **options))


def test_reference_can_be_differentiated_twice():
    logits = random_logits(3, 5, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, -100, 4])
    weight = random_weight(5, torch.float64)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x: fused_cross_entropy(x, targets, weight, label_smoothing=0.1), logits
        )


class TestTargetsOutOfRange:
    """Loud on the host, poison on the GPU, never memory that belongs to someone else."""

    WRONG = [
        pytest.param(5, id="one-too-many"),
        pytest.param(-1, id="negative"),
        pytest.param(2**31 + 1, id="beyond-32-bit"),
        pytest.param(2**40, id="far-away"),
        pytest.param(-(2**63), id="lowest"),
    ]

    @pytest.mark.parametrize("wrong", WRONG)
    def test_host_names_row_and_value(self, host_device, wrong):
        targets = torch.tensor([[0, 4], [wrong, -100]])
        for function in (fused_cross_entropy, reference_cross_entropy):
            with pytest.raises(IndexError) as error:
                function(random_logits(2, 2, 5), targets, dim=-1)
            assert f"target {wrong} of row 2" in str(error.value)
            assert "0 <= target < 5" in str(error.value)
            assert "-100" in str(error.value)

    def test_host_accepts_an_ignored_value_beyond_the_classes(self, host_device):
        logits = random_logits(3, 5)
        assert_as_exact_as_torch(logits, torch.tensor([1, 999, 4]), ignore_index=999)

    @pytest.mark.thinned
    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("wrong", [*WRONG[1:], pytest.param("V", id="one-too-many")])
    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    def test_kernels_poison_the_row_and_no_other(
        self, kernel_device, vocab_size, wrong, grad_in_forward
    ):
        wrong = vocab_size if wrong == "V" else wrong
        logits, targets = a_batch(vocab_size, device=kernel_device)
        bad = targets.clone()
        bad[4] = wrong
        options = dict(reduction="none", grad_in_forward=grad_in_forward)
        for more in ({}, everything(vocab_size, torch.float32, kernel_device)):
            right, right_gradient, upstream = fused(logits, targets, **options, **more)
            losses, gradient, _ = fused(logits, bad, upstream=upstream, **options, **more)
            assert losses[4].isnan() and gradient[4].isnan().all()
            others = [0, 1, 2, 3, 5]
            assert torch.equal(losses[others], right[others])
            assert torch.equal(gradient[others], right_gradient[others])

    def test_kernels_raise_when_asked(self, kernel_device, monkeypatch):
        monkeypatch.setenv("FUSED_CE_DEBUG", "1")
        targets = torch.tensor([0, 77], device=kernel_device)
        with pytest.raises(IndexError, match="target 77 of row 1"):
            fused_cross_entropy(random_logits(2, 5, device=kernel_device), targets)
        monkeypatch.setenv("FUSED_CE_DEBUG", "0")
        assert fused_cross_entropy(random_logits(2, 5, device=kernel_device), targets).isnan()


LOGITS, TARGETS = torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
ERRORS = [
    pytest.param(TypeError, ([1.0], TARGETS), {}, ["logits", "Tensor", "list"], id="logits-list"),
    pytest.param(TypeError, (LOGITS, [1]), {}, ["targets", "Tensor", "list"], id="targets-list"),
    pytest.param(TypeError, (TARGETS[:, None], TARGETS), {}, ["float32", "int64"], id="logits-int"),
    pytest.param(TypeError, (LOGITS.to(torch.complex64), TARGETS), {}, ["float32", "complex64"],
                 id="logits-complex"),
    pytest.param(ValueError, (LOGITS, TARGETS.float()), {}, ["integer", "float32", "(4, 5)",
                                                             "(4,)", "targets.long()"],
                 id="targets-float"),
    pytest.param(ValueError, (LOGITS, torch.ones(4, 6)), {}, ["(4, 5)", "(4, 6)", "probabilities"],
                 id="probabilities-of-more-classes"),
    pytest.param(ValueError, (LOGITS, LOGITS.long()), {},
                 ["(4,)", "one-hot", "argmax(-1)", ".float()"], id="one-hot"),
    pytest.param(TypeError, (TARGETS, LOGITS), {}, ["int64", "float32", "exchanged"],
                 id="exchanged"),
    pytest.param(TypeError, (LOGITS, TARGETS.bool()), {}, ["integer", "bool", "targets.float()"],
                 id="targets-bool"),
    pytest.param(TypeError, (LOGITS, TARGETS, 0.5), {}, ["weight", "Tensor", "float"],
                 id="weight-number"),
    pytest.param(TypeError, (LOGITS, TARGETS, torch.ones(5).long()), {},
                 ["weight", "floating", "int64", "weight.float()"], id="weight-int"),
    pytest.param(TypeError, (LOGITS, TARGETS), dict(ignore_index=1.0),
                 ["ignore_index", "int", "float"], id="ignore-index-float"),
    pytest.param(TypeError, (LOGITS, TARGETS), dict(ignore_index=torch.tensor(1.0)),
                 ["ignore_index", "int", "1.0"], id="ignore-index-floating-tensor"),
    pytest.param(TypeError, (LOGITS, TARGETS), dict(ignore_index=torch.tensor([1, 2])),
                 ["ignore_index", "int", "tensor([1, 2])"], id="ignore-index-two"),
    pytest.param(TypeError, (LOGITS, TARGETS), dict(ignore_index=True),
                 ["ignore_index", "int", "bool"], id="ignore-index-bool"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(ignore_index=2**63),
                 ["ignore_index", "64 bits", str(2**63)], id="ignore-index-too-large"),
    pytest.param(ValueError, (torch.zeros(2, 3, 5), torch.zeros(2, 3).long()),
                 dict(sample_weight=torch.ones(2)),
                 ["(2, 3)", "(2,)", "sample_weight[:, None].expand(2, 3)"],
                 id="sample-weight-of-sequences"),
    pytest.param(TypeError, (LOGITS, TARGETS), dict(ignore_index=None),
                 ["ignore_index", "int", "None"], id="ignore-index-none"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(reduction="average"),
                 ["reduction", '"mean", "sum" or "none"', "'average'"], id="reduction"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(reduction=None),
                 ["reduction", '"mean", "sum" or "none"', "None"], id="reduction-none"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(label_smoothing=1.5), ["[0, 1]", "1.5"],
                 id="smoothing-above-1"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(label_smoothing=-0.1), ["[0, 1]", "-0.1"],
                 id="smoothing-below-0"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(label_smoothing=float("nan")),
                 ["[0, 1]", "nan"], id="smoothing-nan"),
    pytest.param(ValueError, (LOGITS, TARGETS[:3]), {}, ["(4, 5)", "(4,)", "(3,)"],
                 id="too-few-targets"),
    pytest.param(ValueError, (LOGITS, TARGETS[:, None]), {}, ["(4, 5)", "(4,)", "(4, 1)"],
                 id="targets-with-an-axis-of-1"),
    pytest.param(ValueError, (torch.zeros(2, 3, 4), torch.zeros(2, 2).long()), {},
                 ["(2, 3, 4)", "(2, 3)", "(2, 4)", "(2, 2)"], id="targets-fit-neither-reading"),
    pytest.param(ValueError, (torch.zeros(2, 3, 4), torch.zeros(2, 3).long()), dict(dim=1),
                 ["dim=1", "(2, 4)", "(2, 3)"], id="targets-do-not-fit-dim"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(dim=2), ["dim=2", "(4, 5)"], id="dim-2"),
    pytest.param(ValueError, (LOGITS, TARGETS), dict(dim=-3), ["dim=-3", "(4, 5)"], id="dim--3"),
    pytest.param(ValueError, (torch.zeros(()), TARGETS), {}, ["class axis", "0-d"], id="0-d"),
    pytest.param(ValueError, (LOGITS, TARGETS, torch.ones(4)), {}, ["5", "(5,)", "(4,)"],
                 id="weight-too-short"),
    pytest.param(ValueError, (LOGITS, TARGETS, torch.ones(1, 5)), {}, ["(5,)", "(1, 5)"],
                 id="weight-2-d"),
    pytest.param(ValueError, (LOGITS, TARGETS, torch.ones(5, requires_grad=True)), {},
                 ["weight", "gradient", "detach"], id="weight-requires-grad"),
    pytest.param(ValueError, (LOGITS, TARGETS.to("meta")), {}, ["cpu", "targets", "meta"],
                 id="targets-elsewhere"),
    pytest.param(ValueError, (LOGITS, TARGETS, torch.ones(5, device="meta")), {},
                 ["cpu", "weight", "meta"], id="weight-elsewhere"),
]  # fmt: skip


@pytest.mark.parametrize("error, arguments, options, words", ERRORS)
def test_errors_say_what_is_needed_and_what_came(error, arguments, options, words):
    for function in (fused_cross_entropy, reference_cross_entropy):
        with pytest.raises(error) as raised:
            function(*arguments, **options)
        for word in words:
            assert word in str(raised.value)


def test_weight_that_requires_grad_is_fine_where_no_gradient_is_made(device):
    weight = torch.ones(5, device=device, requires_grad=True)
    with torch.no_grad():
        loss = fused_cross_entropy(LOGITS.to(device), TARGETS.to(device), weight)
    torch.testing.assert_close(loss, torch.tensor(5.0, device=device).log())


def test_numpy_integers_are_integers(device):
    """As for torch: an index that comes out of an array is often one."""
    numpy = pytest.importorskip("numpy")
    logits, targets = a_batch(SMALL, device=device)
    loss = fused_cross_entropy(
        logits, targets, ignore_index=numpy.int64(3), label_smoothing=numpy.float32(0.5)
    )
    right = F.cross_entropy(
        logits, targets, ignore_index=numpy.int64(3), label_smoothing=numpy.float32(0.5)
    )
    torch.testing.assert_close(loss, right)
