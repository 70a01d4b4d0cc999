"""Derivatives of every order and mode: create_graph, forward-mode AD, torch.func, vmap.

The oracle is `reference_cross_entropy`, which autograd differentiates by itself.
"""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from oracle import SEED, generator, random_logits, random_targets, random_weight
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fused_ce import cpu, fused_cross_entropy, reference_cross_entropy
from fused_ce.backend import choose, implementation

N, V = 4, 6
WEIGHT = random_weight(V, torch.float64)
EVERYTHING = dict(label_smoothing=0.1, z_loss=0.2, logit_scale=0.7, softcap=1.5, normalizer=3.0)
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(dict(grad_in_forward=False), id="in-backward"),
    pytest.param(dict(reduction="none"), id="none"),
    pytest.param(dict(weight=WEIGHT), id="weight"),
    pytest.param(dict(label_smoothing=0.1, weight=WEIGHT), id="smoothing"),
    pytest.param(dict(z_loss=0.3, reduction="sum"), id="z-loss"),
    pytest.param(dict(softcap=1.3, logit_scale=0.8), id="softcap"),
    pytest.param(dict(EVERYTHING, weight=WEIGHT), id="everything"),
]
WITH_STATS = [*OPTIONS, pytest.param(dict(return_stats=True), id="stats")]
TARGETS = [pytest.param(False, id="classes"), pytest.param(True, id="probabilities")]


def inputs(device, probabilities=False):
    """(logits, targets, sample_weight) in float64; a row of classes is ignored."""
    logits = random_logits(N, V, dtype=torch.float64, scale=1.5)
    sample_weight = torch.rand(N, generator=generator(5), dtype=torch.float64) + 0.2
    if probabilities:
        targets = torch.rand(N, V, generator=generator(4), dtype=torch.float64)
    else:
        targets = random_targets(N, classes=V, seed=7)
        targets[1] = -100
    return logits.to(device), targets.to(device), sample_weight.to(device)


def scalar_of(function, options, targets):
    """f(logits[, probabilities], sample_weight): a number made of all that has a derivative."""
    options = dict(options)
    weight = options.pop("weight", None)
    weight = None if weight is None else weight.to(targets.device)

    def scalar(logits, *others):
        *soft, sample_weight = others
        result = function(
            logits, soft[0] if soft else targets, weight, sample_weight=sample_weight, **options
        )
        values = [result]
        if options.get("return_stats"):
            loss, stats = result
            values = [loss, stats.losses, stats.lse, stats.entropy]
        return sum((value * factors(value)).sum() for value in values)

    return scalar


def factors(value):
    """Numbers that no two elements share; not random ones, which vmap refuses."""
    return torch.arange(1.0, value.numel() + 1, device=value.device).cos().view(value.shape)


def compared(device, options, probabilities=False):
    """(ours, the reference's, their arguments) of options and a kind of targets."""
    logits, targets, sample_weight = inputs(device, probabilities)
    arguments = (logits, targets, sample_weight) if probabilities else (logits, sample_weight)
    functions = (fused_cross_entropy, reference_cross_entropy)
    return *(scalar_of(function, options, targets) for function in functions), arguments


@pytest.mark.parametrize("probabilities", TARGETS)
@pytest.mark.parametrize("options", WITH_STATS)
class TestEveryOption:
    def test_gradcheck(self, compiled_device, options, probabilities):
        ours, _, arguments = compared(compiled_device, options, probabilities)
        leaves = [argument.requires_grad_() for argument in arguments]
        assert torch.autograd.gradcheck(ours, leaves, fast_mode=True, check_forward_ad=True)

    def test_gradgradcheck(self, compiled_device, options, probabilities):
        ours, _, arguments = compared(compiled_device, options, probabilities)
        leaves = [argument.requires_grad_() for argument in arguments]
        assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)

    def test_grad_and_jvp(self, compiled_device, options, probabilities):
        ours, right, arguments = compared(compiled_device, options, probabilities)
        every = tuple(range(len(arguments)))
        torch.testing.assert_close(grad(ours, every)(*arguments), grad(right, every)(*arguments))
        directions = tuple(argument.cos() for argument in arguments)
        torch.testing.assert_close(
            jvp(ours, arguments, directions), jvp(right, arguments, directions)
        )

    def test_hessian(self, compiled_device, options, probabilities):
        """Forward over reverse, with the mixed second derivatives of all arguments."""
        ours, right, arguments = compared(compiled_device, options, probabilities)
        every = tuple(range(len(arguments)))
        torch.testing.assert_close(
            hessian(ours, every)(*arguments), hessian(right, every)(*arguments)
        )


@pytest.mark.parametrize("probabilities", TARGETS)
class TestInterpretedKernels:
    """With everything on; tests/kernels/test_tangents.py has each option."""

    options = dict(EVERYTHING, weight=WEIGHT, return_stats=True)

    def test_second_derivatives(self, interpreter, probabilities):
        ours, right, arguments = compared(interpreter, self.options, probabilities)
        directions = tuple(argument.cos() for argument in arguments)
        every = tuple(range(len(arguments)))
        torch.testing.assert_close(
            jvp(grad(ours, every), arguments, directions),
            jvp(grad(right, every), arguments, directions),
        )

    def test_gradgradcheck(self, interpreter, probabilities):
        ours, _, arguments = compared(interpreter, self.options, probabilities)
        leaves = [argument[:2].clone().requires_grad_() for argument in arguments]
        _, targets, _ = inputs(interpreter, probabilities)
        ours = scalar_of(fused_cross_entropy, self.options, targets[:2])
        assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)


@pytest.mark.parametrize("outer, inner", [
    pytest.param(jacrev, jacrev, id="reverse-over-reverse"),
    pytest.param(jacrev, jacfwd, id="reverse-over-forward"),
    pytest.param(jacfwd, jacfwd, id="forward-over-forward"),
])  # fmt: skip
def test_hessian_in_any_mode(compiled_device, outer, inner):
    ours, right, arguments = compared(compiled_device, EVERYTHING)
    torch.testing.assert_close(outer(inner(ours))(*arguments), hessian(right)(*arguments))


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("probabilities", TARGETS)
def test_third_derivatives(compiled_device, outer, probabilities):
    options = dict(EVERYTHING, return_stats=True)
    ours, right, arguments = compared(compiled_device, options, probabilities)
    torch.testing.assert_close(outer(hessian(ours))(*arguments), jacrev(hessian(right))(*arguments))


def test_third_derivative_by_autograd(device):
    ours, right, (logits, sample_weight) = compared(device, {})

    def third(function):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, sample_weight)
        for order in range(3):
            (value,) = torch.autograd.grad(value, leaf, create_graph=order < 2)
            value = (value * torch.arange(N * V, device=value.device).view(N, V)).sum()
        return value

    torch.testing.assert_close(third(ours), third(right))


@pytest.mark.parametrize("shape, dim", [
    pytest.param((3, 5, V), -1, id="grouped"),
    pytest.param((3, V, 5), 1, id="channels-first"),
])  # fmt: skip
def test_layouts(device, shape, dim):
    logits = random_logits(*shape, dtype=torch.float64, device=device)
    sliced = logits[:, :, :-1] if dim == 1 else logits[:, :-1]
    targets = random_targets(3, 4, classes=V, device=device)

    def second(function):
        first = grad(lambda x: function(x, targets, dim=dim, z_loss=0.1))
        return jvp(first, (sliced,), (sliced.cos(),))

    torch.testing.assert_close(second(fused_cross_entropy), second(reference_cross_entropy))


@pytest.mark.parametrize("vocab_size", [3, 65, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hessian_vector_product_is_as_exact_as_torch(fused_device, vocab_size, dtype):
    logits = random_logits(3, vocab_size, dtype=dtype, device=fused_device, scale=2.0)
    targets = random_targets(3, classes=vocab_size, device=fused_device)
    direction = random_logits(3, vocab_size, dtype=dtype, device=fused_device, seed=8)

    def product(function, compute):
        leaf = logits.to(compute).requires_grad_()
        loss = function(leaf, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient, leaf, direction.to(compute))[0]

    exact = product(F.cross_entropy, torch.float64)
    ours = (product(fused_cross_entropy, dtype) - exact).abs().max()
    theirs = (product(F.cross_entropy, torch.float32).to(dtype) - exact).abs().max()
    assert ours <= theirs + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_masked_classes_do_not_count(fused_device):
    """Logits of -inf have derivatives of 0, and the others those that they have alone."""
    logits, _, _ = inputs(fused_device)
    targets = random_targets(N, classes=V - 1, device=fused_device)
    masked = torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)], dim=1)

    def second(x):
        def gradient(x):
            return grad(scalar_of(fused_cross_entropy, options, targets))(x, sample_weight)

        return jvp(gradient, (x,), (x.nan_to_num(neginf=9.0).cos() * 30.0,))

    options = dict(return_stats=True, z_loss=0.1)
    sample_weight = torch.ones(N, dtype=torch.float64, device=fused_device)
    for values, right in zip(second(masked), second(logits[:, :-1]), strict=True):
        torch.testing.assert_close(values[:, :-1], right)
        assert (values[:, -1] == 0).all()


def test_of_an_ignored_row_nothing_counts(device):
    """Not its logits, not its sample_weight, whatever they hold."""
    logits, targets, sample_weight = inputs(device)

    def found(function):
        scalar = scalar_of(function, {}, targets)
        both = (0, 1)
        return (
            torch.func.grad_and_value(scalar, both)(logits, sample_weight),
            jvp(grad(scalar, both), (logits, sample_weight), (direction, sample_direction)),
        )

    direction, sample_direction = logits.cos(), sample_weight.cos()
    clean = found(reference_cross_entropy)
    logits[1, 3], sample_weight[1] = torch.nan, torch.nan
    torch.testing.assert_close(found(fused_cross_entropy), clean)


def test_a_second_derivative_is_one_call_in_closed_form(fused_device, monkeypatch):
    """Not the dense reference."""
    module = implementation(choose(torch.device(fused_device)))
    calls, tangents = [], module.tangents
    monkeypatch.setattr(module, "tangents", lambda *a: calls.append(1) or tangents(*a))
    for caller in ("autograd", "row_tangents"):
        monkeypatch.setattr(f"fused_ce.{caller}.reference", None)
    logits, targets, _ = inputs(fused_device)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(fused_cross_entropy(leaf, targets), leaf, create_graph=True)
    gradient.square().sum().backward()
    assert calls == [1]


def test_a_second_derivative_holds_no_dense_softmax():
    """On the CPU nothing but the product is as large as the logits."""
    logits = random_logits(8192, 1000).requires_grad_()
    targets = random_targets(8192, classes=1000)
    loss = fused_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    direction = torch.ones_like(gradient)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(gradient, logits, direction)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size >= logits.nbytes for size in sizes) == 1


class TestVmap:
    """The batch becomes more rows."""

    @pytest.mark.parametrize("dim", [0, 1, 2])
    @pytest.mark.parametrize("options", OPTIONS)
    def test_logits_of_any_axis(self, compiled_device, options, dim):
        ours, right, (_, sample_weight) = compared(compiled_device, options)
        logits = random_logits(3, N, V, dtype=torch.float64, device=sample_weight.device)
        for mapped, one in ((ours, right), (grad(ours), grad(right))):
            got = vmap(mapped, in_dims=(dim, None))(logits.movedim(0, dim), sample_weight)
            torch.testing.assert_close(got, torch.stack([one(x, sample_weight) for x in logits]))

    @pytest.mark.parametrize("batched", ["targets", "weight", "targets and weight"])
    def test_targets_and_weights(self, device, batched):
        logits, targets, _ = inputs(device)
        targets = torch.stack([targets, targets.roll(1), targets.roll(2)])
        weight = random_weight(3 * V, torch.float64, device).view(3, V)
        dims = (None, 0 if "targets" in batched else None, 0 if "weight" in batched else None)
        given = logits, targets, weight
        given = (
            logits,
            *(g if dim == 0 else g[0] for g, dim in zip(given[1:], dims[1:], strict=True)),
        )
        for ours, right in (
            (fused_cross_entropy, reference_cross_entropy),
            (grad(fused_cross_entropy), grad(reference_cross_entropy)),
        ):
            got = vmap(ours, in_dims=dims)(*given)
            expected = [
                right(*(g[i] if dim == 0 else g for g, dim in zip(given, dims, strict=True)))
                for i in range(3)
            ]
            torch.testing.assert_close(got, torch.stack(expected))

    def test_nested(self, device):
        logits = random_logits(2, 3, N, V, dtype=torch.float64, device=device)
        targets = random_targets(3, N, classes=V, device=device)
        got = vmap(vmap(fused_cross_entropy), in_dims=(0, None))(logits, targets)
        expected = [
            [reference_cross_entropy(x, t) for x, t in zip(xs, targets, strict=True)]
            for xs in logits
        ]
        torch.testing.assert_close(got, torch.stack([torch.stack(losses) for losses in expected]))

    def test_no_rows(self, device):
        empty = torch.zeros(3, 0, V, dtype=torch.float64, device=device)
        targets = torch.zeros(0, dtype=torch.long, device=device)
        got = vmap(lambda x: fused_cross_entropy(x, targets, reduction="sum"))(empty)
        torch.testing.assert_close(got, torch.zeros_like(got))

    def test_an_empty_batch(self, device):
        logits = torch.zeros(0, N, V, dtype=torch.float64, device=device)
        targets = torch.zeros(0, N, dtype=torch.long, device=device)
        weight = torch.ones(0, V, dtype=torch.float64, device=device)
        assert vmap(fused_cross_entropy)(logits, targets).shape == (0,)
        assert vmap(grad(fused_cross_entropy))(logits, targets, weight).shape == (0, N, V)

    def test_stats(self, device):
        logits = random_logits(3, N, V, device=device)
        targets = random_targets(N, classes=V, device=device)
        _, stats = vmap(lambda x: fused_cross_entropy(x, targets, return_stats=True))(logits)
        _, right = reference_cross_entropy(logits, targets.expand(3, N), return_stats=True, dim=-1)
        for values, expected in zip(stats, right, strict=True):
            torch.testing.assert_close(values, expected)

    def test_gradients_per_sample_of_a_model(self, device):
        """What differential privacy does with it."""
        model = torch.nn.Linear(5, V, dtype=torch.float64).to(device)
        x = torch.randn(N, 5, dtype=torch.float64).to(device)
        targets = random_targets(N, classes=V, device=device)
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters, x, target):
            logits = torch.func.functional_call(model, parameters, (x[None],))
            return fused_cross_entropy(logits, target[None])

        got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, targets)
        for i in range(N):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), targets[i : i + 1]).backward()
            torch.testing.assert_close(got["weight"][i], model.weight.grad)

    def test_a_target_out_of_range(self, host_device):
        """Plain PyTorch does not see the values there, and poisons the row."""
        logits, targets = random_logits(3, N, V), torch.zeros(3, N, dtype=torch.long)
        targets[2, 1] = V
        if choose(logits.device) == "cpu":
            with pytest.raises(IndexError, match=f"target {V} of row {2 * N + 1} is out of range"):
                vmap(fused_cross_entropy)(logits, targets)
        else:
            losses = vmap(fused_cross_entropy)(logits, targets)
            assert losses.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("options", [{}, dict(reduction="none"), dict(return_stats=True)], ids=str)
def test_batched_upstream_gradients(fused_device, options):
    """Of autograd.grad, and of torch.vmap around it, both old and new."""
    logits, targets, _ = inputs(fused_device)

    def gradients(function):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets, **options)
        if options.get("return_stats"):
            loss = loss[1].entropy
        ups = torch.eye(N, dtype=torch.float64, device=fused_device)[:, : max(loss.numel(), 1)]
        ups = ups.reshape(N, *loss.shape)
        batched = torch.autograd.grad(loss, leaf, ups, is_grads_batched=True, retain_graph=True)

        def one(up):
            return torch.autograd.grad(loss, leaf, up, retain_graph=True)[0]

        return batched[0], vmap(one)(ups)

    torch.testing.assert_close(gradients(fused_cross_entropy), gradients(reference_cross_entropy))


def test_vectorized_jacobian_and_hessian(fused_device):
    logits, targets, _ = inputs(fused_device)
    of = torch.autograd.functional
    for derivative, reduction in ((of.jacobian, "none"), (of.hessian, "mean")):
        functions = [
            partial(function, reduction=reduction, **{name: targets})
            for function, name in ((fused_cross_entropy, "targets"), (F.cross_entropy, "target"))
        ]
        got, right = (derivative(function, logits, vectorize=True) for function in functions)
        torch.testing.assert_close(got, right)


class TestForwardMode:
    """Dual numbers without torch.func."""

    @pytest.mark.parametrize("options", WITH_STATS)
    def test_dual_logits(self, compiled_device, options):
        ours, right, (logits, sample_weight) = compared(compiled_device, options)
        direction = logits.cos()
        _, expected = jvp(lambda x: right(x, sample_weight), (logits,), (direction,))
        with forward_ad.dual_level():
            loss = ours(forward_ad.make_dual(logits, direction), sample_weight)
            torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, expected)

    def test_dual_upstream_gradients(self, fused_device):
        logits, targets, _ = inputs(fused_device)
        up, direction = torch.ones(N, dtype=torch.float64), torch.arange(N, dtype=torch.float64)
        found = []
        for function in (fused_cross_entropy, F.cross_entropy):
            leaf = logits.clone().requires_grad_()
            losses = function(leaf, targets, reduction="none")
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(up.to(fused_device), direction.to(fused_device))
                (gradient,) = torch.autograd.grad(losses, leaf, dual)
                found.append(forward_ad.unpack_dual(gradient).tangent)
        torch.testing.assert_close(*found)

    def test_a_level_without_duals_changes_nothing(self, fused_device):
        logits, targets, _ = inputs(fused_device)
        with forward_ad.dual_level():
            loss = fused_cross_entropy(logits.requires_grad_(), targets)
        assert type(loss.grad_fn).__name__ == "FusedCrossEntropyBackward"

    def test_a_weight_has_no_derivative(self, fused_device):
        logits, targets, _ = inputs(fused_device)
        weight = WEIGHT.to(fused_device)
        with pytest.raises(RuntimeError, match="weight gets no derivative"):
            jvp(lambda w: fused_cross_entropy(logits, targets, w), (weight,), (weight,))


class TestInplace:
    """What overwrites the logits refuses what reads them again, and says what to pass."""

    @pytest.mark.parametrize("grad_in_forward", [None, False])
    def test_create_graph(self, fused_device, grad_in_forward):
        logits, targets, _ = inputs(fused_device)
        logits = logits.requires_grad_() * 1.0
        loss = fused_cross_entropy(logits, targets, inplace=True, grad_in_forward=grad_in_forward)
        with pytest.raises(RuntimeError, match="create_graph.*pass inplace=False"):
            loss.backward(create_graph=True)

    @pytest.mark.parametrize("transform", [grad, hessian, vmap])
    def test_func(self, fused_device, transform):
        logits, targets, _ = inputs(fused_device)
        if transform is vmap:
            logits = logits.expand(3, N, V)
        before = logits.clone()
        with pytest.raises(RuntimeError, match="torch.func.*pass inplace=False"):
            transform(lambda x: fused_cross_entropy(x, targets, inplace=True))(logits)
        assert torch.equal(logits, before)


class TestWhatIsKept:
    """A second derivative reads logits that the first does not."""

    @pytest.mark.parametrize("changed", ["logits", "targets"])
    def test_changed_inputs_matter_to_the_second_only(self, fused_device, changed):
        logits, targets, _ = inputs(fused_device)
        expected = grad(reference_cross_entropy)(logits, targets)
        for create_graph in (False, True):
            leaf = logits.clone().requires_grad_()
            x, y = leaf * 1.0, targets.clone()
            loss = fused_cross_entropy(x, y)
            with torch.no_grad():
                (x if changed == "logits" else y).zero_()
            if create_graph:
                with pytest.raises(RuntimeError, match="changed in place"):
                    loss.backward(create_graph=True)
            else:
                loss.backward()
                torch.testing.assert_close(leaf.grad, expected)

    def test_backward_lets_go_of_the_logits(self, fused_device):
        logits, targets, _ = inputs(fused_device)
        loss = fused_cross_entropy(logits.requires_grad_(), targets)
        assert loss.grad_fn.unsaved is not None
        loss.backward()
        assert loss.grad_fn.unsaved is None

    def test_so_does_a_second_derivative(self, fused_device):
        logits, targets, _ = inputs(fused_device)
        leaf = logits.requires_grad_()
        loss = fused_cross_entropy(leaf, targets)
        torch.autograd.grad(loss, leaf, create_graph=True, retain_graph=False)
        assert loss.grad_fn.unsaved is None

    def test_hooks_see_the_logits(self, fused_device):
        """So that a checkpoint drops them, and save_on_cpu moves them."""
        logits, targets, _ = inputs(fused_device)
        leaf, packed = logits.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            loss = fused_cross_entropy(leaf, targets)
        assert any(x.data_ptr() == leaf.data_ptr() for x in packed)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        right = grad(lambda x: grad(reference_cross_entropy)(x, targets).square().sum())
        torch.testing.assert_close(second, right(logits))


def test_gradient_penalty_trains_as_with_torch(fused_device):
    """The usual use of a second derivative."""

    def trained(function):
        torch.manual_seed(SEED)
        model = torch.nn.Linear(8, V, dtype=torch.float64).to(fused_device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        x = torch.randn(N, 8, dtype=torch.float64).to(fused_device).requires_grad_()
        targets = random_targets(N, classes=V, device=fused_device)
        for _ in range(5):
            loss = function(model(x), targets)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            optimizer.zero_grad()
            (loss + 3.0 * gradient.square().sum()).backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(trained(fused_cross_entropy), trained(F.cross_entropy))


def test_a_weight_of_fewer_digits_gets_its_gradient_rounded_once(device):
    """It is a difference, of the loss and of what moves the mean's divisor, of nearly one size."""
    targets = random_targets(6, classes=9, device=device)
    logits = random_logits(6, 9, dtype=torch.float64, device=device)
    logits.scatter_add_(1, targets[:, None], torch.full_like(logits, -1000.0))
    logits.requires_grad_()
    factors = torch.rand(6, generator=generator(3)).to(device).requires_grad_()
    loss = fused_cross_entropy(logits, targets, sample_weight=factors)
    (found,) = torch.autograd.grad(loss, factors, create_graph=True)
    wide = factors.detach().double().requires_grad_()
    loss = fused_cross_entropy(logits, targets, sample_weight=wide)
    (right,) = torch.autograd.grad(loss, wide)
    torch.testing.assert_close(found, right.float(), rtol=2e-7, atol=0)


def test_several_blocks_are_as_one(monkeypatch):
    logits, targets, _ = inputs("cpu")

    def second():
        return jvp(grad(lambda x: fused_cross_entropy(x, targets)), (logits,), (logits.cos(),))[1]

    whole = second()
    monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: 1)
    torch.testing.assert_close(second(), whole)
