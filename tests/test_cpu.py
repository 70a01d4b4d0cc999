"""The CPU path: blocks of rows of any shape, and no memory beyond the gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    assert_as_exact_as_torch,
    fused,
    random_logits,
    random_targets,
    random_upstream,
    random_weight,
)

from fused_ce import autograd, backend, cpu, fused_cross_entropy, reference_cross_entropy
from fused_ce.cpu import machine, passes


@pytest.fixture(autouse=True)
def on_the_cpu():
    with backend("cpu"):
        yield


BATCHES = [
    pytest.param((11,), id="one-group"),
    pytest.param((5, 3), id="groups-smaller-than-a-block"),
    pytest.param((2, 9), id="groups-larger-than-a-block"),
    pytest.param((7, 1), id="groups-of-one"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_any_block_size_gives_the_same(monkeypatch, batch, rows, dtype, inplace):
    options = dict(label_smoothing=0.1, ignore_index=3, reduction="none", inplace=inplace)
    padded = random_logits(*batch[:-1], batch[-1] + 1, 19, dtype=dtype)[..., :-1, :17]
    targets = random_targets(*batch, classes=17)
    weight = random_weight(17)
    for route in (True, False):
        results = []
        for size in (1000, rows):
            monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_, size=size: size)
            logits = padded.clone(memory_format=torch.preserve_format)
            results.append(fused(logits, targets, weight, grad_in_forward=route, **options))
        (losses, gradient, _), (again, gradient_again, _) = results
        torch.testing.assert_close(losses, again)
        torch.testing.assert_close(gradient, gradient_again)
        monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: rows)
        if not inplace:
            assert_as_exact_as_torch(padded, targets, weight, grad_in_forward=route, **options)


OPTIONS = [
    pytest.param(dict(return_stats=True), id="stats"),
    pytest.param(dict(z_loss=0.01, logit_scale=-0.7), id="z-loss-and-scale"),
    pytest.param(dict(softcap=5.0, logit_scale=0.7), id="softcap"),
    pytest.param(dict(softcap=5.0, z_loss=0.01, return_stats=True), id="all"),
]


def results_and_gradients(logits, targets, weight, sample_weight, **options):
    """All that a call finds, and its gradients for random upstream ones, of the inputs' layout."""
    leaves = [tensor.detach().requires_grad_() for tensor in (logits, sample_weight)]
    if targets.is_floating_point():
        targets = targets.detach().requires_grad_()
        leaves.append(targets)
    else:
        options["ignore_index"] = 3
    results = fused_cross_entropy(
        leaves[0], targets, weight, sample_weight=leaves[1], label_smoothing=0.1, dim=-1, **options
    )
    results = [results[0], *results[1]] if options.get("return_stats") else [results]
    upstream = [random_upstream(result) for result in results[:4]]
    return results, torch.autograd.grad(results[:4], leaves, upstream)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch, rows", [((11,), 4), ((5, 3), 1), ((2, 9), 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_any_block_size_gives_the_same_with_every_option(
    monkeypatch, options, batch, rows, dtype, probabilities, inplace
):
    targets = random_targets(*batch, classes=17)
    if probabilities:  # their axes in another order than those of the logits
        targets = random_logits(17, *batch, seed=4).softmax(0).movedim(0, -1)
    weight = random_weight(17)
    sample_weight = random_weight(math.prod(batch)).view(batch)

    def call(**options):
        logits = random_logits(*batch[:-1], batch[-1] + 1, 19, dtype=dtype)[..., :-1, :17]
        return results_and_gradients(logits, targets, weight, sample_weight, **options)

    options = options | dict(inplace=inplace, grad_in_forward=False if inplace else None)
    for reduction in ("none", "mean"):
        monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: 1000)
        at_once = call(reduction=reduction, **options)
        monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: rows)
        in_blocks = call(reduction=reduction, **options)
        torch.testing.assert_close(in_blocks, at_once)
        with backend("reference"):
            right = call(reduction=reduction, **options)
        torch.testing.assert_close(in_blocks[0], right[0], rtol=1e-5, atol=1e-5)
        eps = torch.finfo(dtype).eps
        for gradient, expected in zip(in_blocks[1], right[1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=2 * eps, atol=max(eps**2, 1e-5))


def test_predictions_are_the_first_largest():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1, 3, 3, 2], [5, 5, 5, 5], [1, nan, 7, nan], [0, 1, inf, inf]])
    _, stats = fused_cross_entropy(logits, torch.zeros(4, dtype=torch.long), return_stats=True)
    assert stats.predictions.tolist() == logits.argmax(dim=1).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 10), (10, 1), (3, 4), (4, 3), (2, 7), (0, 3), (3, 0)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12, 100])
def test_blocks_cover_every_row_once(monkeypatch, shape, rows):
    monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: rows)
    logits = torch.zeros(*shape, 5)
    numbers = torch.arange(shape[0] * shape[1]).view(shape)
    seen = []
    for flat, groups, columns in cpu.blocks.blocks(logits, cpu.blocks.rows_at_once(logits, 0)):
        block = numbers[groups, columns].flatten()
        assert 0 < len(block) <= max(rows, 1)
        assert block.tolist() == list(range(flat.start, flat.stop))
        seen += block.tolist()
    assert seen == numbers.flatten().tolist()


@pytest.mark.parametrize("n_threads", [1, 2, 64])
@pytest.mark.parametrize("n_buffers", [0, 1, 2, 3])
@pytest.mark.parametrize("n_rows", [1, 100, 100_000])
def test_a_block_is_small_and_every_thread_gets_one(n_rows, n_threads, n_buffers):
    for vocab_size in (1, 2, 65, 1000, 50257, 1_000_000):
        rows = cpu.blocks.block_rows(n_rows, vocab_size, n_threads, n_buffers)
        megabytes = rows * vocab_size * 4 / 2**20
        if n_rows * vocab_size <= 2**23:  # all threads work on one
            assert rows == n_rows or megabytes <= 4 or rows == 1
            continue
        assert megabytes <= (4, 2, 1, 1)[n_buffers] or rows == 4
        assert rows * n_threads <= n_rows + n_threads or rows == 4 or megabytes <= 0.5


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_do_not_change_the_numbers(n_threads):
    logits, targets = random_logits(40, 301), random_targets(40, classes=301)
    right, right_gradient, upstream = fused(logits, targets)
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        loss, gradient, _ = fused(logits, targets, upstream=upstream)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, right_gradient)


def peak_memory(function):
    """Bytes that the CPU allocator holds at most during a call, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_peak_memory_is_measured():
    assert peak_memory(lambda: torch.ones(1000) + torch.ones(1000)) >= 3 * 4000


@pytest.mark.parametrize("options", [
    pytest.param({}, id="plain", marks=pytest.mark.slow),
    pytest.param(dict(softcap=5.0, z_loss=0.1, return_stats=True), id="all"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [
    torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("route, inplace, reduction, limit", [
    pytest.param(True, False, "mean", 1.1, id="in-forward"),
    pytest.param(False, False, "mean", 1.1, id="in-backward"),
    pytest.param(False, False, "none", 1.1, id="none"),
    pytest.param(True, True, "mean", 0.1, id="in-forward-inplace"),
    pytest.param(False, True, "mean", 0.1, id="in-backward-inplace"),
    pytest.param(None, False, None, 0.1, id="no-gradient"),
])  # fmt: skip
def test_peak_memory_is_one_gradient(options, dtype, route, inplace, reduction, limit):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a block is a megabyte or two a thread
    logits = random_logits(3000, 8000, dtype=dtype)
    targets = random_targets(3000, classes=8000)
    leaf = logits.requires_grad_(reduction is not None)

    def step():
        loss = fused_cross_entropy(
            leaf, targets, reduction=reduction or "mean", grad_in_forward=route, inplace=inplace,
            **options,
        )  # fmt: skip
        loss = loss[0] if options else loss
        if reduction is not None:
            torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.3))

    try:
        peak = peak_memory(step)
    finally:
        torch.set_num_threads(threads)
    assert peak <= limit * logits.numel() * logits.element_size()


class TestFewPlainRows:
    """They take PyTorch's own four operations: the same numbers as blocks of rows."""

    def results(self, logits, targets, **options):
        logits = logits.clone().requires_grad_()
        source = logits * 1 if options.get("inplace") else logits
        loss = fused_cross_entropy(source, targets, **options)
        return loss.detach(), torch.autograd.grad(loss, logits, random_upstream(loss))[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("route", [True, False])
    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "inplace"])
    def test_as_blocks_of_rows(self, dtype, reduction, route, layout, monkeypatch):
        logits = random_logits(20, 65, dtype=dtype)
        if layout == "transposed":
            logits = random_logits(65, 20, dtype=dtype).T
        elif layout == "strided":
            logits = random_logits(40, 70, dtype=dtype)[::2, 3:-2]
        call = dict(
            reduction=reduction, grad_in_forward=route, ignore_index=-1,
            inplace=layout == "inplace",
        )  # fmt: skip
        targets = random_targets(20, classes=65)
        found = self.results(logits, targets, **call)
        monkeypatch.setattr(autograd, "are_few", lambda *_: False)
        right = self.results(logits, targets, **call)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], right[1], rtol=4 * eps, atol=1e-7)

    @pytest.mark.parametrize("at", [0, 19])
    def test_ignored_rows_keep_their_nan(self, at):
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        right = self.results(logits, targets.index_fill(0, torch.tensor(at), -100))
        logits[at], targets[at] = torch.nan, -100
        torch.testing.assert_close(self.results(logits, targets), right, rtol=0, atol=0)
        targets[:] = -100
        loss, grad = self.results(logits, targets)
        assert loss.isnan() and (grad == 0).all()

    @pytest.mark.parametrize("wrong", [65, -1])
    def test_out_of_range(self, wrong):
        targets = random_targets(20, classes=65).index_fill(0, torch.tensor(3), wrong)
        with pytest.raises(IndexError, match=f"target {wrong} of row 3"):
            fused_cross_entropy(random_logits(20, 65), targets)

    @pytest.mark.parametrize("index", [0, 7])
    def test_an_ignored_class(self, index):
        """ignore_index may be a class."""
        logits, targets = random_logits(20, 9), random_targets(20, classes=9)
        assert (targets == index).any()
        loss, grad = self.results(logits, targets, ignore_index=index)
        right = F.cross_entropy(logits, targets, ignore_index=index)
        torch.testing.assert_close(loss, right)
        assert (grad[targets == index] == 0).all()

    @pytest.mark.parametrize("options", [
        dict(label_smoothing=0.1), dict(z_loss=0.1), dict(logit_scale=2.0), dict(softcap=3.0),
        dict(normalizer=7.0), dict(normalizer=torch.tensor(7.0)), dict(return_stats=True),
        dict(weight=random_weight(65)), dict(sample_weight=random_weight(20)),
        dict(reduction="none"),
    ], ids=lambda options: next(iter(options)))  # fmt: skip
    def test_whoever_asks_for_more_gets_it(self, options, monkeypatch):
        monkeypatch.setattr(autograd, "loss_of_few", None)
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        torch.testing.assert_close(
            fused_cross_entropy(logits, targets, **options),
            reference_cross_entropy(logits, targets, **options),
        )


class TestUnshiftedPowers:
    """Where no logit is large, powers are those of the logits themselves."""

    @pytest.fixture(autouse=True)
    def whatever_the_size(self, monkeypatch):
        """And whatever the processor; several blocks."""
        monkeypatch.setattr(machine, "exponential", lambda n_elements: (torch.exp, 1.0))
        monkeypatch.setattr(autograd, "are_few", lambda *_: False)
        monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: 3)

    @pytest.fixture
    def summed(self, monkeypatch):
        """How often rows were summed with their maximum subtracted."""
        calls = []
        for name in ("sum_up", "log_probabilities"):
            function = getattr(passes, name)
            monkeypatch.setattr(passes, name, lambda *args, f=function: calls.append(1) or f(*args))
        return calls

    @pytest.mark.parametrize("options", [
        {}, dict(reduction="sum", grad_in_forward=False), dict(reduction="none"),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
    def test_as_exact_as_torch(self, options, dtype, weighted, summed):
        logits, targets = random_logits(20, 65, dtype=dtype), random_targets(20, classes=65)
        weight = random_weight(65) if weighted else None
        assert_as_exact_as_torch(logits, targets, weight, **options)
        assert not summed

    @pytest.mark.parametrize("options", [
        dict(z_loss=0.1), dict(sample_weight=random_weight(20), z_loss=0.01), dict(inplace=True),
        dict(normalizer=7.0, ignore_index=3), dict(reduction="none", grad_in_forward=True),
    ], ids=lambda options: "-".join(options))  # fmt: skip
    def test_as_the_reference(self, options, summed):
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        found = []
        for function in (fused_cross_entropy, reference_cross_entropy):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf * 1, targets, **options)
            grad = torch.autograd.grad(loss, leaf, random_upstream(loss))[0]
            found.append((loss.detach(), grad))
        torch.testing.assert_close(*found)
        assert not summed

    @pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
    @pytest.mark.parametrize("value, at", [
        (200.0, "all"), (-200.0, "all"), (200.0, "one"), (-200.0, "target"), (60.0, "one"),
        (-torch.inf, "one"), (-torch.inf, "target"), (torch.nan, "one"), (-1e4, "all"),
    ])  # fmt: skip
    def test_large_logits_have_their_maximum_subtracted(self, value, at, inplace):
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        if at == "all":
            logits += value
        else:
            logits[4, targets[4] if at == "target" else (targets[4] + 1) % 65] = value
        found = []
        for function in (fused_cross_entropy, F.cross_entropy):
            leaf = logits.clone().requires_grad_()
            call = dict(inplace=inplace) if function is fused_cross_entropy else {}
            loss = function(leaf * 1, targets, reduction="sum", **call)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*found, equal_nan=True)
        with torch.no_grad():
            loss = fused_cross_entropy(logits, targets, reduction="sum")
        torch.testing.assert_close(loss, found[1][0], equal_nan=True)

    @pytest.mark.parametrize("confidence", [5.0, 12.0, 25.0])
    def test_a_confident_row_loses_nothing(self, confidence):
        """Of a loss of 1e-10, and of a gradient that a difference from 1 would round to 0."""
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        logits[torch.arange(20), targets] = confidence
        assert_as_exact_as_torch(logits, targets, reduction="none")
        losses = fused_cross_entropy(logits, targets, reduction="none")
        assert (losses >= 0).all()

    def test_one_class_has_neither_loss_nor_gradient(self):
        logits = random_logits(20, 1).requires_grad_()
        loss = fused_cross_entropy(logits, torch.zeros(20, dtype=torch.long))
        assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 300.0])
    def test_ignored_rows_may_hold_anything(self, value):
        logits, targets = random_logits(20, 65), random_targets(20, classes=65)
        targets[::3] = -100
        right = F.cross_entropy(logits, targets)
        logits[::3] = value
        logits.requires_grad_()
        loss = fused_cross_entropy(logits, targets)
        torch.testing.assert_close(loss, right)
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[::3] == 0).all() and grad.isfinite().all()

    @pytest.mark.parametrize("options", [
        dict(label_smoothing=0.1), dict(softcap=3.0), dict(logit_scale=2.0),
    ], ids=str)  # fmt: skip
    def test_not_where_differences_are_asked_for(self, options, summed):
        logits, targets = random_logits(20, 65).requires_grad_(), random_targets(20, classes=65)
        for route, n_passes in ((True, 1), (False, 2)):
            summed.clear()
            fused_cross_entropy(logits, targets, grad_in_forward=route, **options).backward()
            assert len(summed) == n_passes * 7
