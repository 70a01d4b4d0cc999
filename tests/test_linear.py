"""From hidden states to the loss: as the whole logits have it, a chunk of them at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_near, random_logits, random_targets, random_upstream, random_weight
from test_cpu import peak_memory
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fused_ce import (
    FusedLinearCrossEntropyLoss,
    fused_linear_cross_entropy,
    linear_products,
    reference_linear_cross_entropy,
)
from fused_ce.cpu import machine
from fused_ce.linear_chunks import rows_at_once
from fused_ce.linear_products import Gradients

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
    # The same numbers in every precision.
    upstream = [random_upstream(v, seed=i).float().to(v.dtype) for i, v in enumerate(used)]
    leaves = [leaf for leaf in leaves if leaf is not None]
    return values, torch.autograd.grad(used, leaves, upstream, allow_unused=True)


def assert_same(ours, theirs, **tolerance):
    for mine, others in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, others, **tolerance)


def check_option(device, options, reduction, chunk_size, skip_ignored):
    head, targets = a_head(device=device), some_targets(device=device)
    call = dict(options, reduction=reduction)
    ours = all_of(
        fused_linear_cross_entropy, head, targets, chunk_size=chunk_size,
        skip_ignored=skip_ignored, **call,
    )  # fmt: skip
    theirs = all_of(reference_linear_cross_entropy, head, targets, **call)
    for mine, others in zip(ours, theirs, strict=True):
        assert_same(mine, others)


class TestAsTheReference:
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("chunk_size", [4, None])
    @pytest.mark.parametrize("skip_ignored", [False, True], ids=["", "skip"])
    def test_every_option(self, compiled_device, options, reduction, chunk_size, skip_ignored):
        check_option(compiled_device, options, reduction, chunk_size, skip_ignored)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("skip_ignored", [False, True], ids=["", "skip"])
    def test_every_option_on_the_kernels(self, interpreter, options, reduction, skip_ignored):
        check_option(interpreter, options, reduction, 4, skip_ignored)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_options_on_the_kernels(self, interpreter, options):
        check_option(interpreter, options, "mean", 4, False)

    @pytest.mark.thinned
    @pytest.mark.parametrize("vocab_size", VOCABS)
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("through", [None, (0,), (2, 3)], ids=str)
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
        if dtype == torch.float32:  # in 16 bits the reference rounds its logits otherwise
            wide = [tensor.double() for tensor in head]
            (right,), in_float64 = all_of(reference_linear_cross_entropy, wide, targets, **call)
            for grad, of_reference, best in zip(grads, exact, in_float64, strict=True):
                assert_as_near(grad, of_reference, best)
            return
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

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_no_features(self, device, reduction):
        """What is left is the bias; an upstream gradient still has to reach it."""
        head, targets = a_head(n_features=0, device=device), some_targets(device=device)
        ours = all_of(fused_linear_cross_entropy, head, targets, reduction=reduction, chunk_size=4)
        theirs = all_of(reference_linear_cross_entropy, head, targets, reduction=reduction)
        for mine, others in zip(ours, theirs, strict=True):
            assert_same(mine, others)

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


class TestRowsThatDoNotCount:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("skip_ignored", [False, True])
    @pytest.mark.parametrize("grad_in_forward", [True, False])
    def test_nan_in_ignored_hidden_states_reaches_no_gradient(
        self, device, bad, skip_ignored, grad_in_forward
    ):
        head, targets = a_head(device=device), some_targets(device=device)
        call = dict(skip_ignored=skip_ignored, grad_in_forward=grad_in_forward, chunk_size=4)
        right = all_of(fused_linear_cross_entropy, head, targets, **call)
        hidden = head[0].masked_fill((targets == -100)[:, None], bad)
        ours = all_of(fused_linear_cross_entropy, (hidden, *head[1:]), targets, **call)
        for mine, others in zip(ours, right, strict=True):
            assert_same(mine, others, rtol=0, atol=0)

    def test_leaving_them_out_changes_nothing(self, fused_device):
        """Zero loss of the ignored, and no share of theirs in the mean."""
        head, targets = a_head(device=fused_device), some_targets(device=fused_device)
        counted = targets != -100
        (loss,), (grad_hidden, *rest) = all_of(fused_linear_cross_entropy, head, targets)
        only = (head[0][counted], *head[1:])
        (right,), (of_counted, *of_rest) = all_of(
            fused_linear_cross_entropy, only, targets[counted]
        )
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(grad_hidden[counted], of_counted)
        assert (grad_hidden[~counted] == 0).all()
        assert_same(rest, of_rest)

    @pytest.mark.parametrize("skip_ignored, rows", [(None, 8), (True, 8), (False, 11)])
    def test_a_cpu_makes_no_logits_of_them(self, skip_ignored, rows):
        head, targets = a_head(dtype=torch.float32), some_targets()
        seen = products_of(lambda: fused_linear_cross_entropy(
            *head[:2], targets, skip_ignored=skip_ignored, chunk_size=5
        ))  # fmt: skip
        assert sum(shapes[0][0] for _, shapes in seen) == rows

    @pytest.mark.parametrize("at", [0, 7])
    @pytest.mark.parametrize("wrong", [33, -1])
    def test_out_of_range_names_the_row_of_the_call(self, host_device, at, wrong):
        head, targets = a_head(), some_targets()
        targets[at] = wrong
        with pytest.raises(IndexError, match=f"target {wrong} of row {at} "):
            fused_linear_cross_entropy(*head[:2], targets, chunk_size=2)

    def test_out_of_range_is_nan_in_kernels(self, kernel_device):
        head, targets = a_head(device=kernel_device), some_targets(device=kernel_device)
        targets[4] = 99
        losses, grads = all_of(fused_linear_cross_entropy, head, targets, reduction="none")
        assert losses[0].isnan().nonzero().flatten().tolist() == [4]
        assert grads[0].isnan().all(dim=1).nonzero().flatten().tolist() == [4]


def products_of(function):
    """(name, shapes) of the matrix products that a call makes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    return [
        (event.name, [shape for shape in event.input_shapes if len(shape) == 2])
        for event in profiler.events()
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul")
    ]


class TestProducts:
    @pytest.mark.parametrize("frozen, in_forward, expected", [
        pytest.param((), True, 3, id="all"),
        pytest.param((), False, 4, id="all-in-backward"),
        pytest.param((0,), True, 2, id="frozen-body"),
        pytest.param((1, 2), True, 2, id="frozen-head"),
        pytest.param((0, 1), True, 1, id="bias-alone"),
        pytest.param((0, 1, 2), True, 1, id="nothing"),
    ])  # fmt: skip
    def test_none_that_nobody_needs(self, frozen, in_forward, expected):
        head = [t.requires_grad_(i not in frozen) for i, t in enumerate(a_head())]
        targets = random_targets(11, classes=33)

        def step():
            loss = fused_linear_cross_entropy(
                *head[:2], targets, linear_bias=head[2], chunk_size=4, grad_in_forward=in_forward
            )
            if loss.requires_grad:
                loss.backward()

        assert len(products_of(step)) == 3 * expected  # of three chunks
        assert [t.grad is None for t in head] == [i in frozen for i in range(3)]

    def test_no_gradient_work_under_no_grad(self):
        head, targets = [t.requires_grad_() for t in a_head()], random_targets(11, classes=33)
        with torch.no_grad():
            seen = products_of(lambda: fused_linear_cross_entropy(*head[:2], targets))
        assert len(seen) == 1


class TestProductsOf16Bits:
    """On a CPU they are its own, or those of copies in float32, a block of classes at a time."""

    @pytest.fixture(params=[True, False], ids=["of-its-own", "copies"], autouse=True)
    def multiplies(self, request, monkeypatch):
        monkeypatch.setattr(machine, "multiplies", lambda dtype: request.param)
        monkeypatch.setattr(linear_products, "BLOCK", 10)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("chunk_size", [4, 11])
    @pytest.mark.parametrize(
        "call", [{}, dict(reduction="none"), dict(skip_ignored=False)], ids=str
    )
    def test_as_whole_logits(self, dtype, logits_dtype, chunk_size, call):
        head, targets = a_head(dtype=dtype), some_targets()
        call = dict(call, logits_dtype=logits_dtype)
        ours = all_of(fused_linear_cross_entropy, head, targets, chunk_size=chunk_size, **call)
        right = all_of(reference_linear_cross_entropy, head, targets, **call)
        eps = torch.finfo(dtype).eps
        for mine, other in zip(ours[0] + list(ours[1]), right[0] + list(right[1]), strict=True):
            assert mine.dtype == other.dtype
            atol = 4 * eps * other.abs().max().item()
            torch.testing.assert_close(mine, other, rtol=4 * eps, atol=atol)

    @pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)], ids=str)
    def test_frozen_parts(self, frozen):
        head, targets = a_head(dtype=torch.bfloat16), some_targets()
        found = []
        for part in (frozen, ()):
            leaves = [t.clone().requires_grad_(i not in part) for i, t in enumerate(head)]
            fused_linear_cross_entropy(
                *leaves[:2], targets, linear_bias=leaves[2], chunk_size=4
            ).backward()
            found.append([t.grad for t in leaves])
        for i, (mine, right) in enumerate(zip(*found, strict=True)):
            assert (mine is None) == (i in frozen)
            if mine is not None:
                torch.testing.assert_close(mine, right, rtol=0, atol=0)


class TestAlignment:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_of_a_gradient_lie_as_those_of_padded_logits(self, dtype, monkeypatch):
        """Rounded too: on a GPU products of rows that are not aligned take several times longer."""
        seen = []
        monkeypatch.setattr(machine, "multiplies", lambda dtype: True)
        monkeypatch.setattr(Gradients, "_add", lambda self, chunk, grad: seen.append(grad))
        head = [t.bfloat16() for t in a_head(5, 33)]
        logits = random_logits(5, 64, dtype=dtype)[:, :33]
        Gradients(*head, (True, True, False), 1, True).add(None, logits)
        assert seen[0].dtype == torch.bfloat16 and seen[0].stride() == (64, 1)
        torch.testing.assert_close(seen[0], logits.bfloat16(), rtol=0, atol=0)


class TestNumbers:
    """Against whole logits in float64: not further away than F.linear + F.cross_entropy."""

    @pytest.mark.thinned
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("chunk_size", [5, 16, None])
    def test_as_exact_as_torch(self, fused_device, dtype, reduction, chunk_size):
        head = a_head(48, 301, 32, dtype=dtype, device=fused_device)
        targets = random_targets(48, classes=301, device=fused_device)

        def by_torch(hidden, weight, targets, linear_bias, **options):
            logits = F.linear(hidden, weight, linear_bias)
            compute = torch.promote_types(hidden.dtype, torch.float32)
            return F.cross_entropy(logits.to(compute), targets, reduction=reduction)

        def results(function, head, **options):
            leaves = [t.detach().requires_grad_() for t in head]
            loss = function(
                *leaves[:2], targets, linear_bias=leaves[2], reduction=reduction, **options
            )
            upstream = random_upstream(loss.float()).to(loss.dtype)
            return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

        ours = results(fused_linear_cross_entropy, head, chunk_size=chunk_size)
        theirs = results(by_torch, head)
        right = results(by_torch, [t.double() for t in head])
        for mine, other, exact in zip(ours, theirs, right, strict=True):
            assert_as_near(mine, other, exact)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_logits_in_float32(self, fused_device, dtype):
        head = a_head(48, 301, 32, dtype=dtype, device=fused_device)
        targets = random_targets(48, classes=301, device=fused_device)
        call = dict(linear_bias=head[2], chunk_size=16)
        loss = fused_linear_cross_entropy(*head[:2], targets, logits_dtype=torch.float32, **call)
        exact = F.cross_entropy(F.linear(*(t.double() for t in head)), targets)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        rounded = fused_linear_cross_entropy(*head[:2], targets, **call)
        assert (rounded - exact).abs() > 10 * (loss - exact).abs()

    @pytest.mark.parametrize("grad_in_forward", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_gradients_of_logits_in_float32(self, device, grad_in_forward, reduction):
        head = a_head(48, 301, 32, dtype=torch.bfloat16, device=device)
        targets = some_targets(48, 301, device)
        call = dict(
            logits_dtype=torch.float32, grad_in_forward=grad_in_forward, reduction=reduction
        )
        _, grads = all_of(fused_linear_cross_entropy, head, targets, chunk_size=16, **call)
        _, right = all_of(reference_linear_cross_entropy, head, targets, **call)
        for grad, of_reference in zip(grads, right, strict=True):
            assert grad.dtype == torch.bfloat16
            atol = 0.01 * of_reference.abs().max().item()
            torch.testing.assert_close(grad, of_reference, rtol=0.01, atol=atol)

    def test_the_weight_gradient_is_not_summed_in_16_bits(self, fused_device):
        """A hundred chunks lose no more digits than one: rounded once."""
        head = a_head(200, 17, 8, dtype=torch.bfloat16, device=fused_device)
        targets = random_targets(200, classes=17, device=fused_device)
        exact = all_of(reference_linear_cross_entropy, [t.double() for t in head], targets)[1][1]
        errors = []
        for chunk_size in (200, 2):
            call = dict(chunk_size=chunk_size, logits_dtype=torch.float32)
            grads = all_of(fused_linear_cross_entropy, head, targets, **call)[1]
            errors.append((grads[1].double() - exact).abs().max())
        assert errors[1] <= 1.5 * errors[0]

    @pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
    def test_permuted_tokens_permute_losses(self, compiled_device, chunk_size):
        head, targets = a_head(device=compiled_device), some_targets(device=compiled_device)
        order = torch.randperm(11).to(compiled_device)
        call = dict(linear_bias=head[2], reduction="none", chunk_size=chunk_size)
        losses = fused_linear_cross_entropy(*head[:2], targets, **call)
        permuted = fused_linear_cross_entropy(head[0][order], head[1], targets[order], **call)
        torch.testing.assert_close(permuted, losses[order])
        assert (losses >= 0).all()


class TestGraphs:
    def leaves_and_loss(self, device, **options):
        leaves = [t.requires_grad_() for t in a_head(device=device)]
        targets = some_targets(device=device)
        call = dict(linear_bias=leaves[2], chunk_size=4, **options)
        return leaves, fused_linear_cross_entropy(*leaves[:2], targets, **call)

    @pytest.mark.parametrize("grad_in_forward", [True, False])
    def test_a_retained_graph_gives_the_same_twice(self, device, grad_in_forward):
        leaves, loss = self.leaves_and_loss(device, grad_in_forward=grad_in_forward)
        first = torch.autograd.grad(loss, leaves, loss.new_tensor(0.3), retain_graph=True)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(loss, leaves, loss.new_tensor(0.6))
        assert_same(first, kept, rtol=0, atol=0)
        assert_same(second, [2 * grad for grad in kept])

    def test_an_upstream_of_one_multiplies_nothing(self, fused_device, monkeypatch):
        leaves, loss = self.leaves_and_loss(fused_device)
        finished = loss.grad_fn.saved_tensors[-3:-1]
        places = [grad.data_ptr() for grad in finished]
        grads = torch.autograd.grad(loss, leaves[:2])
        assert [grad.data_ptr() for grad in grads] == places

    def test_who_holds_a_gradient_sees_that_it_changes(self, fused_device):
        """A hook may hand out what it was given; autograd then knows that it is another."""
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            leaves, loss = self.leaves_and_loss(fused_device)
        before = [(t, t._version, t.clone()) for t in held]
        torch.autograd.grad(loss, leaves, loss.new_tensor(0.5))
        changed = [version < t._version for t, version, was in before if not torch.equal(t, was)]
        assert len(changed) == 3 and all(changed)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_checkpoint(self, device, reduction):
        head, targets = a_head(device=device), some_targets(device=device)
        leaves = [t.requires_grad_() for t in head[:2]]
        call = dict(chunk_size=4, reduction=reduction)
        loss = fused_linear_cross_entropy(*leaves, targets, **call)
        right = torch.autograd.grad(loss.sum(), leaves)
        loss = checkpoint(fused_linear_cross_entropy, *leaves, targets, use_reentrant=False, **call)
        assert_same(torch.autograd.grad(loss.sum(), leaves), right)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("return_stats", [False, True])
    def test_second_derivatives(self, compiled_device, reduction, return_stats):
        head = [t.requires_grad_() for t in a_head(4, 5, 3, device=compiled_device)]
        targets = torch.tensor([0, -100, 4, 2], device=compiled_device)
        factor = torch.ones(4, dtype=torch.float64, device=compiled_device).requires_grad_()

        def call(hidden, weight, bias, factor):
            result = fused_linear_cross_entropy(
                hidden, weight, targets, linear_bias=bias, sample_weight=factor, chunk_size=3,
                reduction=reduction, return_stats=return_stats,
            )  # fmt: skip
            return (result[0], *result[1][:3]) if return_stats else result

        assert torch.autograd.gradcheck(call, (*head, factor))
        assert torch.autograd.gradgradcheck(call, (*head, factor))

    def test_func_vmap_and_forward_mode(self, compiled_device):
        head, targets = a_head(device=compiled_device), some_targets(device=compiled_device)

        def ours(hidden, weight):
            return fused_linear_cross_entropy(hidden, weight, targets, chunk_size=4)

        def whole(hidden, weight):
            return reference_linear_cross_entropy(hidden, weight, targets)

        many = torch.stack([head[0], head[0] + 1])
        for transform in (
            lambda f: torch.func.grad(f, argnums=(0, 1))(*head[:2]),
            lambda f: torch.func.vmap(f, in_dims=(0, None))(many, head[1]),
            lambda f: torch.func.jvp(f, head[:2], head[:2]),
            lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(many, head[1]),
        ):
            torch.testing.assert_close(transform(ours), transform(whole))

    def test_inputs_are_as_they_were(self, device):
        head, targets = a_head(device=device), some_targets(device=device)
        before = [t.clone() for t in (*head, targets)]
        all_of(fused_linear_cross_entropy, head, targets, chunk_size=4)
        assert_same((*head, targets), before, rtol=0, atol=0)

    def test_a_jit_trace_takes_other_sizes(self, compiled_device):
        head, targets = a_head(device=compiled_device), some_targets(device=compiled_device)
        traced = torch.jit.trace(
            lambda *tensors: fused_linear_cross_entropy(*tensors), (*head[:2], targets)
        )
        other = a_head(17, device=compiled_device)[0]
        targets = some_targets(17, device=compiled_device)
        right = reference_linear_cross_entropy(other, head[1], targets)
        torch.testing.assert_close(traced(other, head[1], targets), right)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
@pytest.mark.filterwarnings("ignore")
class TestBesideTorch:
    """What docs/guide.md says of F.linear_cross_entropy, and that we agree where it is right."""

    def both(self, head, targets, **call):
        torchs = torch.nn.LinearCrossEntropyOptions()
        theirs = F.linear_cross_entropy(*head[:2], targets, options=torchs, **call)
        return fused_linear_cross_entropy(*head[:2], targets, **call), theirs

    @pytest.mark.parametrize(
        "call", [{}, dict(reduction="none"), dict(label_smoothing=0.1)], ids=str
    )
    def test_the_same_numbers(self, call):
        head = [t.requires_grad_() for t in a_head(dtype=torch.float32)[:2]]
        losses = self.both(head, some_targets(), **call)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), head) for loss in losses))

    def test_whole_logits_for_smoothing(self):
        with pytest.warns(UserWarning, match="options.. ignored"):
            self.both(a_head(dtype=torch.float32), some_targets(), label_smoothing=0.1)

    def test_ignored_rows_with_nan(self):
        head, targets = a_head(dtype=torch.float32), some_targets()
        head[0][targets == -100] = torch.nan
        ours, theirs = self.both(head, targets)
        assert ours.isfinite() and theirs.isnan()

    def test_shapes_and_dtypes(self):
        head, targets = a_head(dtype=torch.bfloat16), some_targets()
        ours, theirs = self.both(head, targets)
        assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dimensionality"):
            self.both((head[0][None], head[1]), targets[None])
        assert fused_linear_cross_entropy(head[0][None], head[1], targets[None]) == ours


class TestAutocast:
    @pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_as_linear(self, fused_device, logits_dtype, reduction):
        head = a_head(device=fused_device, dtype=torch.float32)
        targets = some_targets(device=fused_device)
        with torch.autocast(torch.device(fused_device).type, torch.bfloat16):
            ours = all_of(
                fused_linear_cross_entropy, head, targets, chunk_size=4, reduction=reduction,
                logits_dtype=logits_dtype,
            )  # fmt: skip
        low = [t.bfloat16() for t in head]
        theirs = all_of(
            fused_linear_cross_entropy, low, targets, chunk_size=4, reduction=reduction,
            logits_dtype=logits_dtype,
        )  # fmt: skip
        assert all(grad.dtype == torch.float32 for grad in ours[1])
        assert_same(ours[0], theirs[0], rtol=0, atol=0)
        assert_same(ours[1], [grad.float() for grad in theirs[1]], rtol=0, atol=0)

    def test_backward_inside(self, fused_device):
        """A product of float32 operands is not autocast's there either."""
        head = [t.requires_grad_() for t in a_head(device=fused_device, dtype=torch.float32)]
        targets, grads = some_targets(device=fused_device), []
        for enabled in (False, True):
            loss = fused_linear_cross_entropy(*head[:2], targets, reduction="none", chunk_size=4)
            with torch.autocast(torch.device(fused_device).type, torch.bfloat16, enabled=enabled):
                grads.append(torch.autograd.grad(loss.sum(), head[:2]))
        assert_same(*grads, rtol=0, atol=0)


class TestMemory:
    def test_what_is_chosen(self, monkeypatch):
        """A quarter of the logits on a CPU from 4,096 rows on; 2,048 rows or a GiB on a GPU."""
        for n_rows in (4096, 5000, 16384, 100_000):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                assert rows_at_once(n_rows, 50257, dtype, "cpu") <= n_rows / 8
        assert rows_at_once(100, 50257, torch.float32, "cpu") == 100
        assert rows_at_once(0, 50257, torch.float32, "cpu") == 1
        for natively, rows in ((True, 2048), (False, 256)):
            monkeypatch.setattr(machine, "multiplies", lambda _, natively=natively: natively)
            assert rows_at_once(2048, 50257, torch.bfloat16, "cpu") == rows
            assert rows_at_once(0, 50257, torch.bfloat16, "cpu") == 1
        half = torch.bfloat16
        assert rows_at_once(16384, 248_320, half, "cuda") == 2048
        assert 2048 <= rows_at_once(16384, 128_256, half, "cuda") <= 2**30 / 128_256 / 2
        assert rows_at_once(1000, 128_256, half, "cuda") == 1000

    @pytest.mark.parametrize("call, limit", [
        pytest.param({}, 0.25, id="chosen"),
        pytest.param(dict(chunk_size=128), 0.06, id="given"),
        pytest.param(dict(reduction="none"), 0.25, id="none"),
        pytest.param(dict(return_stats=True), 0.25, id="stats"),
        pytest.param(dict(grad_in_forward=False), 0.25, id="in-backward"),
        pytest.param(dict(dtype=torch.bfloat16), 0.25, id="16-bits"),
        pytest.param(dict(dtype=torch.bfloat16, copies=True), 0.25, id="copies"),
        pytest.param(dict(dtype=torch.bfloat16, copies=True, chunk_size=64), 0.06, id="given-16"),
    ])  # fmt: skip
    def test_peak_is_that_of_a_chunk(self, call, limit, monkeypatch):
        """Beside the gradients; of 16 bits the sum of the weight's is V * H * 4 bytes more."""
        call = dict(call)
        dtype, copies = call.pop("dtype", torch.float32), call.pop("copies", False)
        monkeypatch.setattr(machine, "multiplies", lambda dtype: not copies)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        head = a_head(4096, 4000, 16, dtype=dtype)
        leaves = [t.requires_grad_() for t in head[:2]]
        targets = random_targets(4096, classes=4000)

        def step():
            loss = fused_linear_cross_entropy(*leaves, targets, **call)
            loss = loss[0] + loss[1].entropy.sum() if call.get("return_stats") else loss
            loss.sum().backward()

        try:
            peak = peak_memory(step)
        finally:
            torch.set_num_threads(threads)
        gradients = sum(t.numel() for t in leaves) * dtype.itemsize
        sums = leaves[1].numel() * 4 if dtype.itemsize < 4 else 0
        assert peak - gradients - sums <= limit * 4096 * 4000 * dtype.itemsize


class TestErrors:
    @pytest.mark.parametrize("change, error, message", [
        (dict(linear_weight=torch.ones(6, 33)), ValueError, r"pass its transpose"),
        (dict(linear_weight=torch.ones(0)), ValueError, r"an empty \(0,\).*ZeRO-3"),
        (dict(linear_weight=torch.ones(33, 6).half()), TypeError, r"hidden of torch.float32 needs"),
        (dict(linear_weight=torch.ones(33, dtype=torch.long)), TypeError, "exchanged"),
        (dict(linear_bias=torch.ones(6)), ValueError, r"needs linear_bias \(33,\), got \(6,\)"),
        (dict(targets=torch.zeros(10, dtype=torch.long)), ValueError, r"needs targets \(11,\)"),
        (dict(targets=torch.ones(11)), ValueError, r"needs probabilities \(11, 33\)"),
        (dict(hidden=torch.tensor(1.0)), ValueError, "0-d"),
        (dict(hidden=torch.ones(11, 6, dtype=torch.long)), TypeError, "hidden must be float16"),
        (dict(hidden=[1.0]), TypeError, "hidden must be a torch.Tensor, got list"),
        (dict(logits_dtype=torch.float16), TypeError, "logits_dtype must be None, torch.float32"),
        (dict(chunk_size=0), ValueError, "at least 1"),
        (dict(chunk_size=2.0), TypeError, "chunk_size must be an int"),
        (dict(skip_ignored=1), TypeError, "skip_ignored must be None, True or False"),
        (dict(reduction="avg"), ValueError, "reduction"),
        (dict(sample_weight=torch.ones(3)), ValueError, "one factor per target"),
        (dict(weight=torch.ones(3)), ValueError, "33 classes need weight"),
    ])  # fmt: skip
    @pytest.mark.parametrize(
        "function", [fused_linear_cross_entropy, reference_linear_cross_entropy]
    )
    def test_what_is_needed_and_what_came(self, function, change, error, message):
        call = dict(hidden=torch.ones(11, 6), linear_weight=torch.ones(33, 6))
        call |= dict(targets=some_targets()) | change
        with pytest.raises(error, match=message):
            function(**call)

    def test_a_shard_is_refused(self):
        """An FSDP shard of the weight looks just like a shard of the vocabulary."""
        from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

        head, targets = a_head(), some_targets()
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            mesh = init_device_mesh("cpu", (1,))
            for placement in (Shard(0), Replicate()):
                shard = DTensor.from_local(head[1], mesh, [placement])
                for weight in (shard, torch.nn.Parameter(shard)):
                    with pytest.raises(TypeError, match="linear_weight must be a plain.*unshard"):
                        fused_linear_cross_entropy(head[0], weight, targets)
        finally:
            torch.distributed.destroy_process_group()

    def test_function_modes_see_one_function(self):
        head, targets, seen = a_head(), some_targets(), []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        with Mode():
            fused_linear_cross_entropy(*head[:2], targets)
        assert seen[0] is fused_linear_cross_entropy


class TestModule:
    def test_as_the_function(self, device):
        head, targets = a_head(device=device), some_targets(device=device)
        weight = random_weight(33, device=device)
        module = FusedLinearCrossEntropyLoss(weight=weight, label_smoothing=0.1, chunk_size=4)
        factors = random_weight(11, device=device)
        torch.testing.assert_close(
            module(*head[:2], targets, head[2], factors),
            fused_linear_cross_entropy(
                *head[:2], targets, linear_bias=head[2], weight=weight, label_smoothing=0.1,
                sample_weight=factors,
            ),
        )  # fmt: skip
        assert "label_smoothing=0.1" in repr(module) and "weight" in module.state_dict()
        for bad in (dict(reduction="avg"), dict(chunk_size=0), dict(skip_ignored=3)):
            with pytest.raises((TypeError, ValueError)):
                FusedLinearCrossEntropyLoss(**bad)
