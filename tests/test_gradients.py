"""Gradients as autograd users meet them: graphs kept, shared, checkpointed; storage reused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from oracle import fused, random_logits, random_targets, random_upstream, random_weight
from torch.utils.checkpoint import checkpoint

import fused_ce.autograd
from fused_ce import backend, cpu, fused_cross_entropy
from fused_ce.backend import choose, implementation

SMALL, LONG = 65, 1100
VOCABS = [pytest.param(SMALL, id="small"), pytest.param(LONG, id="long")]
ROUTES = [pytest.param(True, id="in-forward"), pytest.param(False, id="in-backward")]


def a_batch(device, vocab_size=LONG, n_rows=4, dtype=torch.float32):
    logits = random_logits(n_rows, vocab_size, dtype=dtype, device=device)
    targets = random_targets(n_rows, classes=vocab_size, device=device)
    targets[1] = -100
    return logits, targets


@pytest.fixture
def work(monkeypatch):
    """Names of the four functions of the implementations, as they are called."""
    calls = []
    for module in [cpu, *([implementation("triton")] if has_triton() else [])]:
        for name in ("forward", "forward_with_grad", "backward", "scale"):
            monkeypatch.setattr(module, name, recorded(getattr(module, name), name, calls))
    return calls


def has_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def recorded(function, name, calls):
    def record(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return record


class TestRoutes:
    """Which of the four functions run."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_scalars_make_their_gradient_in_forward(self, fused_device, work, dtype, reduction):
        logits, targets = a_batch(fused_device, SMALL, dtype=dtype)
        fused(logits, targets, reduction=reduction)
        assert work == ["forward_with_grad", "scale"]

    @pytest.mark.parametrize("dtype, reduction", [
        pytest.param(torch.float16, "mean", id="float16-underflows-without-its-scale"),
        pytest.param(torch.float32, "none", id="none-has-a-factor-per-row"),
    ])  # fmt: skip
    def test_others_make_it_in_backward(self, fused_device, work, dtype, reduction):
        logits, targets = a_batch(fused_device, SMALL, dtype=dtype)
        fused(logits, targets, reduction=reduction)
        assert work == ["forward", "backward"]

    @pytest.mark.parametrize("grad_in_forward", ROUTES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_the_caller_may_choose(self, fused_device, work, grad_in_forward, dtype):
        logits, targets = a_batch(fused_device, SMALL, dtype=dtype)
        for reduction in ("none", "sum"):
            fused(logits, targets, reduction=reduction, grad_in_forward=grad_in_forward)
        once = ["forward_with_grad", "scale"] if grad_in_forward else ["forward", "backward"]
        assert work == 2 * once

    @pytest.mark.parametrize("grad_in_forward", [None, True, False])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_no_gradient_work_where_none_is_needed(
        self, fused_device, work, grad_in_forward, inplace
    ):
        logits, targets = a_batch(fused_device, SMALL)
        before = logits.clone()
        options = dict(grad_in_forward=grad_in_forward, inplace=inplace)
        loss = fused_cross_entropy(logits, targets, **options)
        assert not loss.requires_grad
        leaf = logits.requires_grad_()
        with torch.no_grad():
            assert not fused_cross_entropy(leaf, targets, **options).requires_grad
        with torch.inference_mode():
            fused_cross_entropy(leaf, targets, **options)
        assert work == ["forward"] * 3
        assert torch.equal(leaf.detach(), before)

    def test_no_backward_where_nothing_needs_it(self, fused_device, work):
        """needs_input_grad: a gradient for another leaf does not make one for the logits."""
        logits, targets = a_batch(fused_device, SMALL)
        factor = torch.ones((), device=fused_device, requires_grad=True)
        (fused_cross_entropy(logits, targets) * factor).backward()
        assert work == ["forward"]
        assert factor.grad.isfinite()

    @pytest.mark.parametrize("vocab_size", VOCABS)
    def test_an_upstream_of_one_touches_nothing(self, kernel_device, vocab_size):
        """The scale kernel leaves the gradient alone where the factor is 1, NaN or not."""
        launch = implementation("triton")
        gradient = random_logits(1, 3, vocab_size, device=kernel_device)
        gradient[0, 1, 5] = torch.nan
        before = gradient.clone()
        launch.scale(gradient, torch.ones((), device=kernel_device), gradient)
        torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)
        out = torch.empty_like(gradient)
        launch.scale(gradient, torch.ones((), device=kernel_device), out)
        torch.testing.assert_close(out, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
class TestGraphs:
    """What autograd does with a loss, on both routes."""

    def test_two_losses_on_the_same_logits(self, device, vocab_size, grad_in_forward):
        logits, targets = a_batch(device, vocab_size)
        other = random_targets(4, classes=vocab_size, device=device, seed=9)
        leaf = logits.clone().requires_grad_()
        options = dict(grad_in_forward=grad_in_forward)
        first = fused_cross_entropy(leaf, targets, **options)
        second = fused_cross_entropy(leaf, other, reduction="sum", **options)
        (0.3 * first + 1.7 * second).backward()
        right = logits.clone().requires_grad_()
        (
            0.3 * F.cross_entropy(right, targets)
            + 1.7 * F.cross_entropy(right, other, reduction="sum")
        ).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    @pytest.mark.thinned
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
    def test_kept_graph_twice_with_other_upstreams(
        self, device, vocab_size, grad_in_forward, reduction, inplace
    ):
        logits, targets = a_batch(device, vocab_size)
        options = dict(reduction=reduction, grad_in_forward=grad_in_forward)
        leaf = logits.clone().requires_grad_()
        if inplace and not grad_in_forward:
            pytest.skip("the second backward is an error: see TestInplace")
        losses = fused_cross_entropy(leaf, targets, inplace=inplace, **options)
        ups = [random_upstream(losses, seed=s) for s in range(3)]
        got = [
            torch.autograd.grad(losses, leaf, up, retain_graph=i < 2)[0].clone()
            for i, up in enumerate(ups)
        ]
        for gradient, up in zip(got, ups, strict=True):
            _, right, _ = fused(logits, targets, upstream=up, **options)
            torch.testing.assert_close(gradient, right)

    def test_first_gradient_survives_the_second(self, device, vocab_size, grad_in_forward):
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()
        loss = fused_cross_entropy(leaf, targets, grad_in_forward=grad_in_forward)
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = first.clone()
        torch.autograd.grad(2 * loss, leaf)
        assert torch.equal(first, kept)

    def test_second_backward_without_a_kept_graph_raises(self, device, vocab_size, grad_in_forward):
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()
        loss = fused_cross_entropy(leaf, targets, grad_in_forward=grad_in_forward)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_accumulation(self, device, vocab_size, grad_in_forward):
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()
        for factor in (0.5, 1.0, 3.0):
            loss = fused_cross_entropy(leaf, targets, grad_in_forward=grad_in_forward)
            (loss * factor).backward()
        up = torch.tensor(4.5, device=device)
        _, right, _ = fused(logits, targets, upstream=up)
        torch.testing.assert_close(leaf.grad, right)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint(self, device, vocab_size, grad_in_forward, use_reentrant):
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()

        def loss_of(x):
            return fused_cross_entropy(2 * x, targets, grad_in_forward=grad_in_forward)

        loss = checkpoint(loss_of, leaf, use_reentrant=use_reentrant)
        (0.3 * loss).backward()
        right = logits.clone().requires_grad_()
        (0.3 * F.cross_entropy(2 * right, targets)).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_saved_tensor_hooks(self, device, vocab_size, grad_in_forward):
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            loss = fused_cross_entropy(leaf, targets, grad_in_forward=grad_in_forward)
        (0.3 * loss).backward()
        _, right, _ = fused(logits, targets, upstream=torch.tensor(0.3, device=device))
        torch.testing.assert_close(leaf.grad, right)

    def test_logits_that_are_not_a_leaf(self, device, vocab_size, grad_in_forward):
        hidden = random_logits(4, 8, device=device).requires_grad_()
        matrix = random_logits(vocab_size, 8, device=device, seed=5).requires_grad_()
        targets = random_targets(4, classes=vocab_size, device=device)
        loss = fused_cross_entropy(hidden @ matrix.t(), targets, grad_in_forward=grad_in_forward)
        got = torch.autograd.grad(loss, (hidden, matrix))
        right = torch.autograd.grad(F.cross_entropy(hidden @ matrix.t(), targets), (hidden, matrix))
        torch.testing.assert_close(got, right)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_inputs_are_unchanged(self, device, vocab_size, grad_in_forward, reduction):
        logits, targets = a_batch(device, vocab_size)
        weight = random_weight(vocab_size, device=device)
        leaf = logits.clone().requires_grad_()
        losses = fused_cross_entropy(
            leaf, targets, weight, reduction=reduction, label_smoothing=0.1,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
        upstream = random_upstream(losses)
        inputs = (leaf.detach(), targets, weight, upstream)
        before = [tensor.clone() for tensor in inputs]
        versions = [tensor._version for tensor in inputs]
        losses.backward(upstream, retain_graph=True)
        losses.backward(upstream)
        for tensor, copy, version in zip(inputs, before, versions, strict=True):
            assert torch.equal(tensor, copy)
            assert tensor._version == version
        assert torch.equal(leaf.detach(), logits)

    def test_losses_may_be_changed_in_place(self, device, vocab_size, grad_in_forward):
        """As torch's: `losses.mul_(mask)` is a usual way to weigh tokens."""
        logits, targets = a_batch(device, vocab_size)
        factors = torch.tensor([1.0, 2.0, 0.0, -3.0], device=device)
        options = dict(reduction="none", grad_in_forward=grad_in_forward)
        for shape in ((4,), (2, 2)):
            leaf = logits.clone().requires_grad_()
            losses = fused_cross_entropy(
                leaf.view(*shape, vocab_size), targets.view(shape), dim=-1, **options
            )
            losses.mul_(factors.view(shape)).add_(1.0)
            losses.sum().backward()
            _, right, _ = fused(logits, targets, upstream=factors, **options)
            torch.testing.assert_close(leaf.grad, right)

    def test_logits_changed_before_backward_are_not_used(self, device, vocab_size, grad_in_forward):
        """Right (the gradient is already there) or an error, never the gradient of other logits."""
        logits, targets = a_batch(device, vocab_size)
        leaf = logits.clone().requires_grad_()
        loss = fused_cross_entropy(leaf, targets, grad_in_forward=grad_in_forward)
        with torch.no_grad():
            leaf.mul_(2)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            assert not grad_in_forward or choose(leaf.device) == "reference"
        else:
            one = torch.ones((), device=device)
            torch.testing.assert_close(leaf.grad, fused(logits, targets, upstream=one)[1])

    @pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
    def test_upstream_of_an_ignored_row_does_not_matter(
        self, device, vocab_size, grad_in_forward, value
    ):
        """As torch: sqrt(losses) sends inf to a row whose loss is 0."""
        logits, targets = a_batch(device, vocab_size)
        upstream = torch.tensor([0.5, value, 2.0, -1.0], device=device)
        _, gradient, _ = fused(
            logits, targets, reduction="none", upstream=upstream, grad_in_forward=grad_in_forward
        )
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()

    def test_an_infinite_upstream_shows(self, device, vocab_size, grad_in_forward):
        """A GradScaler looks for it."""
        logits, targets = a_batch(device, vocab_size)
        upstream = torch.tensor(torch.inf, device=device)
        _, gradient, _ = fused(logits, targets, upstream=upstream, grad_in_forward=grad_in_forward)
        assert not gradient[[0, 2, 3]].isfinite().any()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("grad_in_forward", ROUTES)
class TestInplace:
    """The gradient over the logits: the same numbers, and no silent reuse."""

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_same_numbers_in_the_same_storage(
        self, fused_device, vocab_size, grad_in_forward, reduction, dtype
    ):
        logits, targets = a_batch(fused_device, vocab_size, dtype=dtype)
        options = dict(reduction=reduction, grad_in_forward=grad_in_forward, label_smoothing=0.1)
        loss, right, upstream = fused(logits, targets, **options)
        copy = logits.clone()
        same, gradient, _ = fused(copy, targets, upstream=upstream, inplace=True, **options)
        assert torch.equal(loss, same)
        assert torch.equal(gradient, right)
        assert gradient.data_ptr() == copy.data_ptr()

    def test_second_use_of_the_logits_raises(self, fused_device, vocab_size, grad_in_forward):
        logits, targets = a_batch(fused_device, vocab_size)
        leaf = logits.clone().requires_grad_()
        x = 1 * leaf
        before = x._version
        square = (x * x).sum()
        loss = fused_cross_entropy(x, targets, inplace=True, grad_in_forward=grad_in_forward)
        loss.backward()
        assert x._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()

    def test_second_loss_on_the_logits_raises_or_is_right(
        self, fused_device, vocab_size, grad_in_forward
    ):
        logits, targets = a_batch(fused_device, vocab_size)
        leaf = logits.clone().requires_grad_()
        x = 1 * leaf
        first = fused_cross_entropy(x, targets, grad_in_forward=False)
        second = fused_cross_entropy(x, targets, inplace=True, grad_in_forward=grad_in_forward)
        second.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()

    def test_second_backward_raises_or_is_right(self, fused_device, vocab_size, grad_in_forward):
        logits, targets = a_batch(fused_device, vocab_size)
        up = torch.tensor(0.5, device=fused_device)
        _, right, _ = fused(logits, targets, upstream=up)
        leaf = logits.clone().requires_grad_()
        loss = fused_cross_entropy(leaf, targets, inplace=True, grad_in_forward=grad_in_forward)
        torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=fused_device), retain_graph=True)
        try:
            (gradient,) = torch.autograd.grad(loss, leaf, up)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(gradient, right)

    def test_logits_changed_before_backward_raise(self, fused_device, vocab_size, grad_in_forward):
        """They are the gradient by then, or what it will be made of."""
        logits, targets = a_batch(fused_device, vocab_size)
        leaf = logits.clone().requires_grad_()
        x = 1 * leaf
        loss = fused_cross_entropy(x, targets, inplace=True, grad_in_forward=grad_in_forward)
        with torch.no_grad():
            x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("view", ["itself", "of-a-view"])
    def test_logits_that_somebody_keeps_are_refused(
        self, fused_device, vocab_size, grad_in_forward, view
    ):
        """tanh and the like need their result for their own gradient, which comes after ours."""
        logits, targets = a_batch(fused_device, vocab_size)
        options = dict(inplace=True, grad_in_forward=grad_in_forward)
        for keeps in (torch.tanh, torch.sigmoid, lambda x: x.log_softmax(-1)):
            x = keeps(logits.clone().requires_grad_())
            given = x if view == "itself" else x.view(1, *x.shape)[0]
            with pytest.raises(ValueError, match="Backward0 keeps .* inplace=False"):
                fused_cross_entropy(given, targets, **options)
            with torch.no_grad():  # nobody will ask
                fused_cross_entropy(given, targets, **options)
        leaf = logits.clone().requires_grad_()
        fused_cross_entropy(30 * torch.tanh(leaf / 30), targets, **options).backward()
        right = logits.clone().requires_grad_()
        fused_cross_entropy(30 * torch.tanh(right / 30), targets).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_a_checkpoint_keeps_what_it_recomputes(self, fused_device, vocab_size, grad_in_forward):
        """It saves without a version: overwritten, its logits would give a wrong gradient."""
        logits, targets = a_batch(fused_device, vocab_size)

        def loss_of(x, function, **options):
            z = 2 * x
            return z.square().sum() + function(z, targets, **options)

        leaf, right = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss_of(right, F.cross_entropy).backward()
        checkpoint(
            loss_of, leaf, fused_cross_entropy, use_reentrant=False,
            inplace=True, grad_in_forward=grad_in_forward,
        ).backward()  # fmt: skip
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_hooks_keep_what_they_have_saved(self, fused_device, vocab_size, grad_in_forward):
        """They may have saved the logits themselves, as save_on_cpu does on a CPU."""
        logits, targets = a_batch(fused_device, vocab_size)
        leaf, right = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        F.cross_entropy(right.tanh(), targets).backward()
        with torch.autograd.graph.save_on_cpu():
            fused_cross_entropy(
                leaf.tanh(), targets, inplace=True, grad_in_forward=grad_in_forward
            ).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_expanded_logits_are_not_corrupted(self, fused_device, vocab_size, grad_in_forward):
        row = random_logits(vocab_size, device=fused_device)
        before = row.clone()
        targets = random_targets(4, classes=vocab_size, device=fused_device)
        options = dict(grad_in_forward=grad_in_forward)
        leaf = row.clone().requires_grad_()
        loss = fused_cross_entropy(leaf.expand(4, -1), targets, inplace=True, **options)
        loss.backward()
        assert torch.equal(leaf.detach(), before)
        right = row.clone().requires_grad_()
        F.cross_entropy(right.expand(4, -1), targets).backward()
        torch.testing.assert_close(leaf.grad, right.grad)

    def test_gradient_in_the_padded_matrix(self, fused_device, vocab_size, grad_in_forward):
        padded = random_logits(4, vocab_size + 7, device=fused_device)
        targets = random_targets(4, classes=vocab_size, device=fused_device)
        leaf = padded.clone().requires_grad_()
        x = 1 * leaf
        loss = fused_cross_entropy(
            x[:, :vocab_size], targets, inplace=True, grad_in_forward=grad_in_forward
        )
        loss.backward()
        right = padded.clone().requires_grad_()
        F.cross_entropy(right[:, :vocab_size], targets).backward()
        torch.testing.assert_close(leaf.grad, right.grad)
        torch.testing.assert_close(x.detach()[:, :vocab_size], right.grad[:, :vocab_size])
        assert torch.equal(x.detach()[:, vocab_size:], padded[:, vocab_size:])

    def test_ignored_and_confident_rows(self, fused_device, vocab_size, grad_in_forward):
        logits, targets = a_batch(fused_device, vocab_size)
        logits[0, targets[0]] += 100.0
        logits[1] = torch.nan
        options = dict(grad_in_forward=grad_in_forward, reduction="sum")
        _, right, upstream = fused(logits, targets, **options)
        _, gradient, _ = fused(logits.clone(), targets, inplace=True, upstream=upstream, **options)
        assert torch.equal(gradient, right)


def test_a_gradient_that_is_not_kept_needs_no_second_buffer(fused_device, monkeypatch):
    """In-forward: backward multiplies where the gradient lies."""
    logits, targets = a_batch(fused_device)
    leaf = logits.clone().requires_grad_()
    loss = fused_cross_entropy(leaf, targets)
    monkeypatch.setattr(
        fused_ce.autograd, "empty_gradient", lambda _: pytest.fail("a second gradient buffer")
    )
    (0.5 * loss).backward()


def test_autocast_changes_nothing(device):
    """The arithmetic is float32 whatever autocast would like, the weighted sum of logits too."""
    logits, targets = a_batch(device)
    weight = random_weight(LONG, device=device)
    options = dict(label_smoothing=0.5, reduction="none")
    right, right_gradient, upstream = fused(logits, targets, weight, **options)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = fused_cross_entropy(leaf, targets, weight, **options)
        losses.backward(upstream)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, right)
    torch.testing.assert_close(leaf.grad, right_gradient)


def test_a_default_device_elsewhere_changes_nothing(device):
    logits, targets = a_batch(device)
    for options in (dict(), dict(reduction="none"), dict(label_smoothing=0.1)):
        right, right_gradient, upstream = fused(logits, targets, **options)
        with torch.device("meta"):
            loss, gradient, _ = fused(logits, targets, upstream=upstream, **options)
        assert torch.equal(loss, right)
        assert torch.equal(gradient, right_gradient)


def test_a_default_dtype_elsewhere_changes_nothing(device):
    logits, targets = a_batch(device)
    right, right_gradient, upstream = fused(logits, targets, label_smoothing=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        loss, gradient, _ = fused(logits, targets, upstream=upstream, label_smoothing=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, right)
    assert torch.equal(gradient, right_gradient)


def test_deterministic_mode_is_accepted(fused_device):
    logits, targets = a_batch(fused_device)
    right, right_gradient, upstream = fused(logits, targets)
    torch.use_deterministic_algorithms(True)
    try:
        loss, gradient, _ = fused(logits, targets, upstream=upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, right)
    assert torch.equal(gradient, right_gradient)


def test_backends_agree(fused_device):
    logits, targets = a_batch(fused_device)
    loss, gradient, upstream = fused(logits, targets, label_smoothing=0.1)
    with backend("reference"):
        right, right_gradient, _ = fused(logits, targets, label_smoothing=0.1, upstream=upstream)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient, right_gradient)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_backward_in_another_thread(fused_device, vocab_size):
    """The choice of a backend is a thread's own; the graph carries its implementation along."""
    import threading

    logits, targets = a_batch(fused_device, vocab_size)
    one = torch.ones((), device=fused_device)
    _, right, _ = fused(logits, targets, upstream=one)
    leaf = logits.clone().requires_grad_()
    loss = fused_cross_entropy(leaf, targets)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(leaf.grad, right)


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_the_triton_route_never_asks_the_device(kernel_device, monkeypatch):
    """No operation that a GPU would have to be waited for, in forward, in backward or twice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    # a mode would be shown our operators only
    for module in ("cross_entropy", "row_losses", "row_tangents"):
        monkeypatch.setattr(f"fused_ce.{module}.is_traced", lambda logits: False)

    class NoSynchronisation(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            assert name not in {
                "_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique",
                "masked_select", "_to_cpu",
            }, name  # fmt: skip
            return function(*args, **(kwargs or {}))

    further = dict(z_loss=0.1, logit_scale=0.5, softcap=5.0, return_stats=True)
    for vocab_size in (SMALL, LONG):
        logits, classes = a_batch(kernel_device, vocab_size)
        weight = random_weight(vocab_size, device=kernel_device)
        sample_weight = random_weight(len(logits), device=kernel_device)
        normalizer = torch.tensor(3, device=kernel_device)
        for targets, options in (
            (classes, dict()),
            (classes, dict(label_smoothing=0.1)),
            (classes, dict(reduction="none")),
            (classes, dict(sample_weight=sample_weight, **further)),
            (classes, dict(normalizer=normalizer)),
            (logits.softmax(dim=1), dict(sample_weight=sample_weight, **further)),
            (logits.softmax(dim=1), dict(normalizer=normalizer)),
        ):
            for route in (True, False):
                leaves = [logits.clone().requires_grad_(), sample_weight.requires_grad_()]
                if targets.is_floating_point():
                    leaves.append(targets.detach().clone().requires_grad_())
                with NoSynchronisation(), no_cuda_synchronisation():
                    outputs = fused_cross_entropy(
                        leaves[0], leaves[2] if len(leaves) > 2 else targets, weight,
                        grad_in_forward=route, **options,
                    )  # fmt: skip
                    outputs = (outputs[0], *outputs[1][:3]) if "softcap" in options else [outputs]
                    upstreams = [torch.full_like(output, 0.5) for output in outputs]
                    gradients = torch.autograd.grad(
                        outputs, leaves, upstreams, allow_unused=True, create_graph=True
                    )
                    torch.autograd.grad(gradients[0].sum(), leaves[0])
                    outputs = fused_cross_entropy(
                        leaves[0], leaves[2] if len(leaves) > 2 else targets, weight,
                        grad_in_forward=route, **options,
                    )  # fmt: skip
                    outputs = (outputs[0], *outputs[1][:3]) if "softcap" in options else [outputs]
                    torch.autograd.grad(outputs, leaves, upstreams, allow_unused=True)


@contextlib.contextmanager
def no_cuda_synchronisation():
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
