"""Derivatives along a direction, beside those that autograd finds of the reference in float64."""

import itertools

import pytest
import torch
from oracle import inside, random_logits, random_targets, random_weight, untouched

pytest.importorskip("triton")
from fused_ce import cpu  # noqa: E402
from fused_ce.kernels import launch  # noqa: E402
from fused_ce.kernels.arguments import is_congruent  # noqa: E402
from fused_ce.options import LossOptions  # noqa: E402
from fused_ce.reference import reference  # noqa: E402
from fused_ce.rows import Direction, Rows, Upstream, empty_gradient, is_dense  # noqa: E402

PLAIN = LossOptions(reduction="none")
EVERYTHING = LossOptions(
    reduction="none", label_smoothing=0.1, z_loss=0.3, logit_scale=0.7, softcap=4.0
)


def problem(shape, kind, dtype, device, weighted=True):
    """(rows, direction, upstream), random; of probabilities, or of classes, of which one is
    ignored where there are several rows."""
    logits, direction = (random_logits(*shape, dtype=dtype, device=device, seed=s) for s in (0, 5))
    weight = random_weight(shape[2], device=device) if weighted else None
    n_rows = shape[0] * shape[1]
    upstream = Upstream(*random_logits(3, n_rows, device=device, seed=6, scale=1.0))
    if kind == "probabilities":
        probs = random_logits(*shape, device=device, seed=7).softmax(dim=2).to(dtype)
        moves = random_logits(*shape, dtype=dtype, device=device, seed=8, scale=1 / shape[2])
        return Rows(logits, probs, weight), Direction(logits=direction, targets=moves), upstream
    targets = random_targets(*shape[:2], classes=shape[2], device=device)
    if n_rows > 1:
        targets[-1, 0] = -100
    return Rows(logits, targets, weight), Direction(direction), upstream


def right_tangents(rows, direction, upstream, options):
    """(tangents, the tangents of the gradients of what has a direction) by autograd, in float64."""
    options = options._replace(reduction="none", return_stats=True)
    logits, targets, weight = (
        t.detach().cpu().double() if t is not None and t.is_floating_point() else t
        for t in (rows.logits, rows.targets.cpu(), rows.weight)
    )
    inputs = (logits, targets) if rows.has_probabilities else (logits,)
    along = tuple(
        torch.zeros_like(i) if d is None else d.detach().cpu().double()
        for i, d in zip(inputs, direction, strict=False)
    )
    ups = tuple(
        logits.new_zeros(logits.shape[:2].numel()) if up is None else up.cpu().double()
        for up in upstream
    )

    def outputs(logits, targets=targets):
        found = reference(Rows(logits, targets, weight), options)
        return found[0], found[2], found[3]

    def gradient(*inputs):
        return torch.func.vjp(outputs, *inputs)[1](ups)

    return torch.func.jvp(outputs, inputs, along)[1], torch.func.jvp(gradient, inputs, along)[1]


def check(rows, direction, upstream, options, results, gradients=()):
    """All results to a few eps of the largest, and to the rounding of a gradient."""
    right, right_gradients = right_tangents(rows, direction, upstream, options)
    compute = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    names = (*results._fields, "grad_logits", "grad_targets")
    found = (*results, *gradients)
    for name, value, exact in zip(names, found, (*right, *right_gradients), strict=False):
        if value is None:
            continue
        assert value.dtype == (compute if value.dim() == 1 else getattr(rows, name[5:]).dtype), name
        # what an ulp of the logits changes, an ulp of the scaled and capped ones and of the sums
        size = 1.0 + exact.nan_to_num().abs().max()
        error = (value.cpu().double() - exact).abs()
        limit = 24 * torch.finfo(compute).eps * size + torch.finfo(value.dtype).eps * exact.abs()
        same = (error <= limit) | (value.isnan().cpu() & exact.isnan())
        assert same.all(), f"{name}: {error.nan_to_num(torch.inf).max():.2e} beside {size:.2e}"


def tangents(rows, direction, upstream, options, implementation=launch):
    """(results, gradients), the latter of all inputs that can have one."""
    inputs = (rows.logits, rows.targets) if rows.has_probabilities else (rows.logits,)
    gradients = [empty_gradient(tensor) for tensor in inputs]
    found = implementation.tangents(direction, upstream, rows, options, *gradients)
    return found, gradients


def compare(rows, direction, upstream, options):
    check(rows, direction, upstream, options, *tangents(rows, direction, upstream, options))


KINDS = ["classes", "probabilities"]
SMOOTH = PLAIN._replace(label_smoothing=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_combinations_of_options(kernel_device, kind):
    """All of the four, and weight with every three of them."""
    cases = [problem((1, 2, 65), kind, torch.float32, kernel_device, w) for w in (False, True)]
    for chosen in itertools.product((0, 1), repeat=4):
        smoothing, z_loss, scale, cap = chosen
        options = LossOptions(
            reduction="none", label_smoothing=(0.0, 0.2)[smoothing], z_loss=(0.0, 0.1)[z_loss],
            logit_scale=(1.0, -0.6)[scale], softcap=(None, 3.0)[cap],
        )  # fmt: skip
        compare(*cases[sum(chosen) % 2], options)


@pytest.mark.parametrize("dtype, vocab_sizes", [
    pytest.param(torch.bfloat16, (1, 3, 65, 2500), id="bfloat16"),
    pytest.param(torch.float16, (1100,), id="float16"),
    pytest.param(torch.float32, (1, 3, 1024, 1025, 2500), id="float32"),
    pytest.param(torch.float64, (65, 1100), id="float64"),
])  # fmt: skip
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_dtypes(kernel_device, kind, options, dtype, vocab_sizes):
    """Edges alone, tiles that are masked, and several steps of those that are not."""
    for vocab_size in vocab_sizes:
        case = problem((1, 2, vocab_size), kind, dtype, kernel_device, options is EVERYTHING)
        compare(*case, options)


def test_upstream_gradients_that_are_none(kernel_device):
    rows, direction, upstream = problem((1, 3, 67), "classes", torch.float32, kernel_device)
    loss, lse, entropy = upstream
    for some in ((None, None, None), (loss, None, None), (None, lse, None), (None, None, entropy)):
        compare(rows, direction, Upstream(*some), EVERYTHING)
    scalar = Upstream(upstream.loss[0])
    same = Upstream(upstream.loss[:1].expand(3))
    found, expected = (tangents(rows, direction, up, EVERYTHING)[1] for up in (scalar, same))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_directions_that_are_none(kernel_device):
    rows, direction, upstream = problem((1, 2, 1100), "probabilities", torch.float32, kernel_device)
    for some in (Direction(), direction._replace(logits=None), direction._replace(targets=None)):
        compare(rows, some, upstream, EVERYTHING)
    found, _ = tangents(rows, Direction(), upstream, EVERYTHING)
    assert not any(values.any() for values in found)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_nobody_wants(kernel_device, kind):
    rows, direction, upstream = problem((1, 2, 67), kind, torch.bfloat16, kernel_device)
    _, gradients = tangents(rows, direction, upstream, EVERYTHING)
    for kept in itertools.product((False, True), repeat=len(gradients)):
        places = [
            torch.full_like(gradient, torch.nan) if keep else None
            for gradient, keep in zip(gradients, kept, strict=True)
        ]
        results = launch.tangents(direction, upstream, rows, EVERYTHING, *places)
        # not bit for bit: each set of gradients is a binary of its own, which rounds as it likes
        check(rows, direction, upstream, EVERYTHING, results, places)


def test_reduction_and_sample_weight_do_not_matter(kernel_device):
    rows, direction, upstream = problem((1, 3, 65), "classes", torch.float32, kernel_device)
    sampled = rows._replace(sample_weight=upstream.lse, normalizer=upstream.lse[0])
    results, (gradient,) = tangents(sampled, direction, upstream, PLAIN._replace(reduction="mean"))
    check(rows, direction, upstream, PLAIN, results, (gradient,))


@pytest.mark.parametrize("shape", [(0, 1, 65), (1, 0, 1100)], ids=str)
def test_no_rows(kernel_device, shape):
    logits = torch.empty(shape, device=kernel_device)
    targets = torch.empty(shape[:2], dtype=torch.long, device=kernel_device)
    results = launch.tangents(
        Direction(logits), Upstream(None), Rows(logits, targets), PLAIN, torch.empty_like(logits)
    )
    assert [tuple(values.shape) for values in results] == [(0,)] * 3


class TestRowsOfAKind:
    @pytest.mark.parametrize("vocab_size", [65, 1100])
    def test_ignored_rows_are_not_read(self, kernel_device, vocab_size):
        """Neither their logits nor their direction, nor what reaches them from above."""
        rows, direction, upstream = problem((1, 3, vocab_size), "classes", torch.float32,
                                            kernel_device)  # fmt: skip
        right = tangents(rows, direction, upstream, EVERYTHING)
        rows.logits[0, 0], direction.logits[0, 0] = torch.inf, torch.nan
        rows.targets[0, 0] = -100
        for up in upstream:
            up[0] = torch.nan
        results, (gradient,) = tangents(rows, direction, upstream, EVERYTHING)
        for values in (*results, gradient[0]):
            assert not values[0].any()
        for values, others in zip((*results, gradient[0]), (*right[0], right[1][0][0]),
                                  strict=True):  # fmt: skip
            assert torch.equal(values[1:], others[1:])

    @pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
    def test_targets_out_of_range_are_nan_in_their_rows(self, kernel_device, options):
        rows, direction, upstream = problem((1, 4, 1100), "classes", torch.float32, kernel_device)
        rows.targets[0, :3] = torch.tensor([1100, 3, -1])
        results, (gradient,) = tangents(rows, direction, upstream, options)
        check(rows, direction, upstream, options, results)
        assert results.losses.isnan().tolist() == [True, False, True, False]
        assert gradient[0, [0, 2]].isnan().all() and gradient[0, [1, 3]].isfinite().all()

    @pytest.mark.parametrize("options", [
        pytest.param(PLAIN, id="plain"),
        pytest.param(PLAIN._replace(z_loss=0.1, logit_scale=2.0), id="scale"),
    ])  # fmt: skip
    def test_logits_of_minus_infinity(self, kernel_device, options):
        """All but the last few, for one; a whole step of them comes first in any dtype."""
        rows, direction, upstream = problem((1, 4, 2500), "classes", torch.float32, kernel_device)
        rows.logits[0, 0, :2490] = -torch.inf
        rows.logits[0, 1, 7:] = -torch.inf
        rows.logits[0, 2, ::3] = -torch.inf
        rows.targets[0] = torch.tensor([2495, 3, 1, 2])
        compare(rows, direction, upstream, options)
        check(
            rows, direction, upstream, options, *tangents(rows, direction, upstream, options, cpu)
        )

    def test_rows_of_nothing_but_minus_infinity(self, kernel_device):
        rows, direction, upstream = problem((1, 3, 65), "classes", torch.float32, kernel_device)
        rows.logits[0, 1] = -torch.inf
        results, (gradient,) = tangents(rows, direction, upstream, PLAIN)
        for values in (*results, gradient[0]):
            assert values[1].isnan().all() and values[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_common_offset_changes_nothing(self, kernel_device, kind):
        case = problem((1, 3, 1100), kind, torch.float32, kernel_device)
        logits = case[0].logits.mul_(256).round_().div_(256)  # exact at the offset
        results, gradients = tangents(*case, PLAIN)
        for offset in (1e4, -2e4):
            logits += offset
            again, others = tangents(*case, PLAIN)
            assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))
            assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))
        check(*case, PLAIN, results, gradients)

    def test_a_maximum_that_moves(self, kernel_device):
        """Rows that ascend and descend: it is found late, or early, or in an edge."""
        rows, direction, upstream = problem((1, 4, 2501), "probabilities", torch.float32,
                                            kernel_device)  # fmt: skip
        rows.logits[0, :2] = torch.linspace(-30, 30, 2501)
        rows.logits[0, 2:] = torch.linspace(30, -30, 2501)
        rows.logits[0, 1, 0] = rows.logits[0, 3, 2500] = 31.0
        compare(rows, direction, upstream, PLAIN)


def apart(tensor, gap, offset, fill=torch.nan):
    """(view, storage): rows `gap` elements and groups a row apart; `fill` is around them."""
    n, row = tensor.shape[1], tensor.shape[2] + gap
    return inside(tensor, fill, strides=((n + 1) * row, row, 1), offset=offset)


def strided(tensor, gap, offset):
    return apart(tensor, gap, offset)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gap, offset", [(5, 3), (8, 0)], ids=str)
def test_between_guard_bands(kernel_device, kind, dtype, gap, offset):
    """Groups of rows; what lies beside them is not read (NaN) and not written (a sentinel).

    All begin alike, counted from a 16-byte boundary, and none as far apart as another.
    """
    for vocab_size in (11, 1109):
        rows, direction, upstream = problem((2, 2, vocab_size), kind, dtype, kernel_device)
        rows = rows._replace(logits=strided(rows.logits, gap, offset))
        direction = direction._replace(logits=strided(direction.logits, gap + 16, offset))
        inputs = [rows.logits]
        if kind == "probabilities":
            rows = rows._replace(targets=strided(rows.targets, gap + 32, offset))
            direction = direction._replace(targets=strided(direction.targets, gap + 48, offset))
            inputs.append(rows.targets)
        places = [
            apart(torch.full(t.shape, torch.nan).to(t), gap + 64 + 16 * i, offset, fill=7.0)
            for i, t in enumerate(inputs)
        ]
        gradients = [gradient for gradient, _ in places]
        results = launch.tangents(direction, upstream, rows, SMOOTH, *gradients)
        check(rows, direction, upstream, SMOOTH, results, gradients)
        assert all(untouched(storage, gradient, 7.0) for gradient, storage in places)


@pytest.mark.parametrize("vocab_size", [65, 1109])
def test_tensors_that_lie_otherwise(kernel_device, vocab_size):
    """Rows that begin elsewhere in a vector, that are all one row, and classes that are not dense:
    of the directions, of the probabilities and of the logits."""
    shape = (2, 2, vocab_size)
    rows, direction, upstream = problem(shape, "probabilities", torch.float32, kernel_device)
    one = direction.logits[:1, :1].expand(shape)
    for some_rows, along in [
        (rows, Direction(strided(direction.logits, 3, 1), one)),
        (rows, Direction(one, strided(direction.targets, 3, 1))),
        (rows._replace(targets=strided(rows.targets, 2, 1)), direction),
        (rows._replace(logits=not_dense(rows.logits)), direction),
        (rows._replace(targets=not_dense(rows.targets)), Direction(not_dense(one))),
    ]:
        compare(some_rows, along, upstream, SMOOTH)
    rows, direction, upstream = problem(shape, "classes", torch.bfloat16, kernel_device)
    compare(rows._replace(logits=not_dense(rows.logits)), direction, upstream, EVERYTHING)


def not_dense(tensor):
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("logits, targets", [
    (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)
], ids=str)  # fmt: skip
def test_probabilities_of_another_dtype(kernel_device, logits, targets):
    rows, direction, upstream = problem((1, 2, 1100), "probabilities", logits, kernel_device)
    rows = rows._replace(targets=rows.targets.to(targets))
    direction = direction._replace(targets=direction.targets.to(targets))
    compare(rows, direction, upstream, EVERYTHING)


def test_directions_that_lie_as_the_logits_are_never_copied(kernel_device, monkeypatch):
    rows, direction, upstream = problem((2, 2, 1100), "probabilities", torch.float32, kernel_device)
    monkeypatch.setattr(launch, "empty_gradient", lambda _: pytest.fail("a copy"))
    launch.tangents(direction, upstream, rows, PLAIN, torch.empty_like(rows.logits))


@pytest.mark.parametrize("gap, offset", [(0, 3), (5, 0), (8, 0)], ids=str)
def test_directions_come_to_lie_as_the_logits(kernel_device, monkeypatch, gap, offset):
    """The kernel is told so, and a 16-byte load elsewhere is an error on a GPU."""
    rows, direction, upstream = problem((2, 2, 1101), "classes", torch.bfloat16, kernel_device)
    rows = rows._replace(logits=strided(rows.logits, 2, 1))
    given, run = [], launch.launch_tangents
    monkeypatch.setattr(launch, "launch_tangents", lambda *a: given.append(a[0]) or run(*a))
    for logits in (
        strided(direction.logits, gap, offset),
        direction.logits[:1, :1].expand(2, 2, -1),
    ):
        launch.tangents(Direction(logits), upstream, rows, PLAIN)
        assert is_dense(given[-1].logits) and is_congruent(rows.logits, given[-1].logits)
        assert torch.equal(given[-1].logits, logits)
