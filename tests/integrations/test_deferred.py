"""Deferred logits: right for whoever looks at them, and never made for whoever does not."""

import copy
import pickle

import pytest
import torch
from oracle import SEED
from torch import nn

pytest.importorskip("transformers", reason='pip install "fused_ce[hf]"')

from fused_ce.integrations.deferred import KNOWN, REMEMBERED, DeferredLogits  # noqa: E402
from fused_ce.integrations.head_calls import Origin  # noqa: E402

B, T, H, V = 2, 5, 8, 11
F = nn.functional


def a_head(bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(SEED + seed)
    shapes = [(B, T, H), (V, H), *([(V,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors] + [None] * (not bias)


def gradients(make, use, leaves):
    """The gradients of what `use` makes of logits, by a random upstream gradient."""
    result = use(make(*leaves))
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(SEED)).to(result)
    leaves = [leaf for leaf in leaves if leaf is not None]
    for leaf in leaves:
        leaf.grad = None
    result.backward(upstream)
    return result.detach(), *(leaf.grad for leaf in leaves)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# What models do to logits before their loss, and what it is as (logit_scale, softcap).
REMEMBERED_USES = [
    pytest.param(lambda x: x * 0.25, 0.25, None, id="times"),
    pytest.param(lambda x: 3 * x, 3.0, None, id="times-from-the-left"),
    pytest.param(lambda x: torch.mul(x, other=3), 3.0, None, id="mul"),
    pytest.param(lambda x: x / 8.0, 0.125, None, id="divided"),
    pytest.param(lambda x: torch.div(x, 8), 0.125, None, id="div"),
    pytest.param(lambda x: x * -2.0, -2.0, None, id="negative"),
    pytest.param(lambda x: torch.tanh(x / 30.0) * 30.0, 1.0, 30.0, id="cap"),
    pytest.param(lambda x: 30.0 * (x * 0.5 / 30.0).tanh(), 0.5, 30.0, id="scale-and-cap"),
    pytest.param(lambda x: torch.tanh(x / 30.0) * 30.0 / 2.0, 0.5, 15.0, id="cap-and-temperature"),
    pytest.param(lambda x: torch.tanh(x), 1.0, 1.0, id="tanh"),
    pytest.param(lambda x: x.float(), 1.0, None, id="float"),
    pytest.param(lambda x: x.to(torch.float32).to(x.device), 1.0, None, id="to"),
    pytest.param(lambda x: x.contiguous(), 1.0, None, id="contiguous"),
    pytest.param(lambda x: x.clone() * 2, 2.0, None, id="clone"),
    pytest.param(lambda x: x[:, :-1], 1.0, None, id="slice"),
    pytest.param(lambda x: x[..., 1:, :], 1.0, None, id="slice-behind-dots"),
    pytest.param(lambda x: x[1], 1.0, None, id="one-sequence"),
    pytest.param(lambda x: x[:, ::2].contiguous() * 2, 2.0, None, id="slice-copied"),
    pytest.param(lambda x: x[None, :, -3:, :], 1.0, None, id="a-further-axis"),
    pytest.param(lambda x: x[..., None, :], 1.0, None, id="an-axis-before-the-classes"),
    pytest.param(lambda x: x.view(-1, V), 1.0, None, id="view"),
    pytest.param(lambda x: x.reshape((T, B, V)), 1.0, None, id="reshape"),
    pytest.param(lambda x: x[:, 1:].contiguous().view(-1, V), 1.0, None, id="flat-slice"),
    pytest.param(lambda x: x[torch.arange(B * T).view(B, T) % 3 > 0], 1.0, None, id="mask"),
    pytest.param(lambda x: x[torch.tensor([1, 0]), torch.tensor([4, 2])], 1.0, None, id="indices"),
    pytest.param(lambda x: x[:, torch.tensor([4, 2, 4])], 1.0, None, id="indices-of-tokens"),
]


@pytest.mark.parametrize("use, scale, softcap", REMEMBERED_USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_remembered_makes_no_logits(use, scale, softcap, dtype):
    leaves = a_head(dtype=dtype)
    right = use(F.linear(*leaves))
    logits = DeferredLogits.of(*leaves)
    used = use(logits)
    assert isinstance(used, DeferredLogits) and not used.is_made() and not logits.is_made()
    assert (used.shape, used.dtype) == (right.shape, right.dtype)
    strides = [x.stride(axis) for x in (used, right) for axis, n in enumerate(x.shape) if n > 1]
    assert strides[: len(strides) // 2] == strides[len(strides) // 2 :]
    origin, options = used.for_loss()
    assert options["logit_scale"] == pytest.approx(scale, rel=1e-12)
    assert options["softcap"] == (softcap and pytest.approx(softcap, rel=1e-12))
    made = F.linear(*origin.tensors).float() * scale
    made = made if softcap is None else softcap * torch.tanh(made / softcap)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(made, right.float(), rtol=rounding, atol=rounding)
    assert not logits.is_made()


@pytest.mark.parametrize("use, scale, softcap", REMEMBERED_USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_remembered_can_be_made(use, scale, softcap, dtype):
    leaves = a_head(dtype=dtype)
    right = gradients(F.linear, use, leaves)
    rounded = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    for look in (lambda x: use(x).clone(), lambda x: Doubled.apply(use(x)) / 2):
        found = gradients(DeferredLogits.of, look, leaves)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, **rounded)


class Doubled(torch.autograd.Function):
    """Functions do not ask __torch_function__, nor do DataParallel's and DDP's."""

    @staticmethod
    def forward(ctx, logits):
        return logits * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Returned(Doubled):
    @staticmethod
    def forward(ctx, logits):
        return logits


class Viewed(Doubled):
    @staticmethod
    def forward(ctx, logits):
        return logits.view_as(logits)


class Cloned(Doubled):
    """As DistributedDataParallel has it: nothing is made, but for those who look at the result."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()


class Changed(Doubled):
    """In place."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        logits.mul_(2)
        return logits


def test_a_function_that_copies_makes_nothing():
    leaves = a_head()
    logits = DeferredLogits.of(*leaves)
    copied = Cloned.apply(logits * 3)
    assert isinstance(copied, DeferredLogits) and not copied.is_made() and not logits.is_made()
    assert copied.for_loss() is None  # it would go around the Function
    with torch.no_grad():
        logits.zero_()
    with torch.no_grad():
        assert torch.equal(copied, F.linear(*leaves) * 3)
        clone = DeferredLogits.of(*leaves).clone()
        assert torch.equal(clone, F.linear(*leaves)) and not clone.requires_grad


def test_a_weight_that_hidden_states_come_from_too():
    """Tied: its gradient through a Function is that of both places, each once."""
    found = []
    for make in (DeferredLogits.of, F.linear):
        _, weight, _ = a_head()
        hidden = weight[torch.tensor([[1, 4, 4], [7, 0, 2]])].tanh()
        Doubled.apply(make(hidden, weight, None)).exp().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_no_logits_for_a_gradient_that_never_came(monkeypatch):
    """DDP gives the loss and the logits to one Function, and takes a gradient of the loss alone."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, logits):
            ctx.set_materialize_grads(False)
            return loss.clone(), logits.clone()

        @staticmethod
        def backward(ctx, grad_loss, grad_logits):
            return grad_loss, grad_logits

    leaves = a_head()
    monkeypatch.setattr(Origin, "logits", None)
    loss, logits = Sink.apply(sum(leaf.sum() for leaf in leaves), DeferredLogits.of(*leaves))
    loss.backward()
    assert all((leaf.grad == 1).all() for leaf in leaves) and not logits.is_made()


def odd(x):
    x[:, :, 2] = -30.0
    return x


# Whatever else is done, is done to the real logits.
LOOKS = [
    pytest.param(lambda x: x.log_softmax(-1), id="log-softmax"),
    pytest.param(lambda x: torch.where(x > 0, x, -1.0), id="where"),
    pytest.param(lambda x: torch.cat([x, x[:, :1]], 1), id="cat"),
    pytest.param(lambda x: x + torch.ones(V), id="add"),
    pytest.param(lambda x: x * torch.full((V,), 2.0), id="times-a-tensor"),
    pytest.param(lambda x: x * torch.tensor(2.0, requires_grad=True), id="times-a-parameter"),
    pytest.param(lambda x: x * 0.0, id="times-0"),
    pytest.param(lambda x: x / float("inf"), id="divided-by-inf"),
    pytest.param(lambda x: torch.div(x, 3.0, rounding_mode="floor") + x, id="floor"),
    pytest.param(lambda x: torch.mul(input=x, other=3), id="by-name"),
    pytest.param(lambda x: x + torch.mul(x.detach(), 2, out=torch.empty(0)), id="out"),
    pytest.param(lambda x: torch.reshape(x, shape=(B * T, V)), id="reshape-by-name"),
    pytest.param(lambda x: x.tanh().tanh(), id="two-caps"),
    pytest.param(lambda x: -3.0 * x.tanh(), id="negative-cap"),
    pytest.param(lambda x: x.double(), id="double"),
    pytest.param(lambda x: x.bfloat16().float(), id="rounded"),
    pytest.param(lambda x: x[..., :7], id="some-classes"),
    pytest.param(lambda x: x[:, :, 3], id="one-class"),
    pytest.param(lambda x: x[..., None], id="an-axis-after-the-classes"),
    pytest.param(lambda x: x[..., :, None], id="an-axis-after-all-classes"),
    pytest.param(lambda x: x[[1, 0]], id="a-list"),
    pytest.param(lambda x: x[True], id="a-bool"),
    pytest.param(lambda x: x[torch.tensor(1)], id="an-index-without-axes"),
    pytest.param(lambda x: x[x > 0], id="mask-of-classes"),
    pytest.param(lambda x: x.view(-1), id="flat"),
    pytest.param(lambda x: x.view(B, -1), id="classes-of-several-tokens"),
    pytest.param(lambda x: x[:, 1:].reshape(-1, V), id="reshape-of-a-slice"),
    pytest.param(lambda x: x.transpose(0, 1), id="transpose"),
    pytest.param(lambda x: x.to(torch.zeros(1, dtype=torch.float64)), id="to-a-tensor"),
    pytest.param(lambda x: x.to(torch.float32, copy=True), id="copy"),
    pytest.param(lambda x: x.mul_(2), id="in-place"),
    pytest.param(lambda x: x.add_(1), id="in-place-add"),
    pytest.param(odd, id="assigned"),
    pytest.param(lambda x: F.cross_entropy(x.view(-1, V), torch.arange(B * T)), id="loss"),
    pytest.param(lambda x: torch.stack(list(x)), id="iterated"),
    pytest.param(lambda x: Doubled.apply(x), id="function"),
    pytest.param(lambda x: Doubled.apply(x)[:, 1:] * 3, id="function-and-more"),
    pytest.param(lambda x: Returned.apply(x * 2)[:, 1:], id="function-that-returns-it"),
    pytest.param(lambda x: Viewed.apply(x) * 2, id="function-that-views-it"),
    pytest.param(lambda x: Cloned.apply(x * 3)[:, 1:] * 2, id="function-that-copies"),
    pytest.param(lambda x: Changed.apply(x * 3) * 1.5, id="function-that-changes-it"),
    pytest.param(lambda x: torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=True),
                 id="checkpoint-reentrant"),
    pytest.param(lambda x: torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=False),
                 id="checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("use", LOOKS)
def test_whoever_looks_sees_the_real_logits(use, bias):
    leaves = a_head(bias)
    ours, theirs = (gradients(make, use, leaves) for make in (DeferredLogits.of, F.linear))
    assert type(ours[0]) is torch.Tensor
    assert_same(ours, theirs)


def test_logits_are_made_once():
    logits = DeferredLogits.of(*a_head())
    assert logits.made() is logits.made() and logits.exp().grad_fn is not None
    assert logits.is_made() and logits.for_loss() is None
    logits.data.fill_(7)  # what somebody has changed counts from then on
    assert (logits * 2 == 14).all() and logits.for_loss() is None


def test_made_logits_are_what_somebody_made_of_them():
    logits = DeferredLogits.of(*a_head())
    place = hash(logits)
    logits.exp()
    logits.retain_grad()
    logits.sum().backward()
    assert torch.equal(logits.grad, torch.ones(B, T, V)) and hash(logits) == place
    with torch.no_grad():
        logits = DeferredLogits.of(*a_head())
    logits.requires_grad_().exp().sum().backward()
    assert logits.requires_grad and torch.equal(logits.grad, logits.exp())
    logits.data = torch.ones(3)
    assert logits.shape == (3,) and len(logits) == 3


def test_views_are_of_the_logits_that_somebody_changed():
    logits = DeferredLogits.of(*a_head(bias=False))
    row, scaled = logits[:, 1], logits * 2
    assert isinstance(row, DeferredLogits)
    with torch.no_grad():
        logits.zero_()
    assert row.for_loss() is None and (row == 0).all()
    assert scaled.for_loss() is not None and (scaled != 0).any()
    logits = DeferredLogits.of(*a_head(bias=False))
    with torch.no_grad():
        logits[:, 1].fill_(3)
    assert logits.is_made() and (logits[:, 1] == 3).all() and (logits[:, 0] != 3).any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    leaves = a_head()
    with mode():
        logits = DeferredLogits.of(*leaves)
        assert not logits.requires_grad and isinstance(logits[:, 1:].float() * 2, DeferredLogits)
        right = F.linear(*leaves)
        assert torch.equal(logits * 2, right * 2)
        later = DeferredLogits.of(*leaves)
    assert not later.exp().requires_grad and torch.equal(later.detach(), right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use", [
    pytest.param(lambda x: x, id="itself"),
    pytest.param(lambda x: x[:, 1:], id="view"),
    pytest.param(lambda x: Cloned.apply(x), id="function"),
])  # fmt: skip
def test_logits_that_are_looked_at_without_gradients_have_them_still(use, mode):
    leaves = a_head()
    logits = use(DeferredLogits.of(*leaves))
    with mode():
        assert not (logits + 2).requires_grad and not logits.argmax(-1).requires_grad
    rights = gradients(F.linear, lambda x: use(x).exp(), leaves)
    assert_same(gradients(lambda *_: logits, torch.exp, leaves), rights)


def test_autocast_of_the_call_counts():
    leaves = a_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right, logits = F.linear(*leaves), DeferredLogits.of(*leaves)
        other = DeferredLogits.of(*leaves)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits.detach(), right)
    assert (other.float() * 2).dtype == torch.float32
    other = DeferredLogits.of(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = other.detach()
    assert found.dtype == torch.float32 and torch.equal(found, F.linear(*leaves))


def test_double_backward_through_functions():
    leaves = a_head()
    found = []
    for make in (DeferredLogits.of, F.linear):
        logits = Doubled.apply(make(*leaves).tanh())
        (grad,) = torch.autograd.grad(logits.square().sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_are_real():
    with torch.no_grad():
        logits = DeferredLogits.of(*a_head())
        right = F.linear(*a_head())
        for again in (copy.deepcopy(logits), pickle.loads(pickle.dumps(logits)), logits.clone()):
            assert type(again) is torch.Tensor and torch.equal(again, right)
    assert repr(logits) == repr(right) and logits.tolist() == right.tolist()
    assert torch.from_numpy(logits.numpy()).equal(right)


def test_what_is_known_makes_nothing():
    logits, right = DeferredLogits.of(*a_head()), F.linear(*a_head())
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_leaf",
        "layout",
        "nbytes",
    ):
        assert getattr(logits, name) == getattr(right, name), name
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "element_size", "get_device"):
        assert getattr(logits, name)() == getattr(right, name)(), name
    assert len(logits) == B and logits.grad_fn is not None and isinstance(logits, torch.Tensor)
    assert {logits: 1}[logits] == 1 and torch.is_tensor(logits) and torch.is_floating_point(logits)
    assert not logits.is_made()
    assert not KNOWN & set(REMEMBERED)


def test_a_gradient_that_is_never_made_is_no_silent_nothing():
    logits = DeferredLogits.of(*a_head())
    seen = []
    logits.register_hook(seen.append)  # before the loss: the loss is that of the real logits then
    assert logits.for_loss() is None
    (logits * 2).sum().backward()
    assert len(seen) == 1 and (seen[0] == 2).all()
    logits = DeferredLogits.of(*a_head())
    logits.for_loss()
    for look in (lambda: logits.register_hook(print), logits.retain_grad):
        with pytest.raises(RuntimeError, match="without logits .* no gradient of them"):
            look()
    assert not logits.is_made()


def test_what_cannot_be_made_any_more_says_so():
    leaves = a_head()
    for at, name in enumerate(("hidden states", "head's weight", "head's bias")):
        logits = DeferredLogits.of(*leaves)
        with torch.no_grad():
            leaves[at].mul_(2)
        for look in (logits.argmax, lambda x=logits: x[:, 1:], logits.for_loss):
            with pytest.raises(RuntimeError, match=f"{name} changed since, in an optimizer"):
                look()
    logits = DeferredLogits.of(*leaves)
    leaves[1].untyped_storage().resize_(0)  # as FSDP2 does
    with pytest.raises(ValueError, match="need the head's weight whole.* FSDP and ZeRO-3"):
        logits.sum()
    leaves = a_head()
    logits = DeferredLogits.of(*leaves)
    leaves[1].data = torch.empty(0)  # as ZeRO-3 does
    with pytest.raises(ValueError, match="need the head's weight whole.* FSDP and ZeRO-3"):
        logits.for_loss()
