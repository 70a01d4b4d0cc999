"""docs/migrating.md: functions with the names of other libraries, against those' formulas."""

import re

import guide
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import generator, random_logits, random_targets, random_weight
from ranks import on_ranks
from torch.distributed.tensor import Shard, distribute_tensor

PAGE = "docs/migrating.md"
N_CLASSES, N_FEATURES = 41, 8
SECTIONS = [
    "F.cross_entropy", "F.linear_cross_entropy", "loss_parallel", "Liger", "flash-attention",
    "quack", "cut-cross-entropy", "Apex", "Transformer Engine", "Megatron", "TRL", "Unsloth",
]  # fmt: skip
of_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
of_reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def theirs(section, name):
    """What the page has in the place of a library's function."""
    return guide.run(section, PAGE)[name]


def tokens(*shape, ignored=-100):
    """Of which the last row's first three are ignored."""
    targets = random_targets(*shape, classes=N_CLASSES)
    targets[-1, :3] = ignored
    return targets


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return random_logits(*shape, dtype=dtype, seed=seed, scale=scale).requires_grad_()


def a_head(*shape, dtype):
    """Hidden states and the weight of the head."""
    return random(*shape, N_FEATURES, dtype=dtype), random(N_CLASSES, N_FEATURES, dtype=dtype)


def check(ours, formula, leaves, returned=torch.float32, rounded=torch.float32):
    """Results and gradients against a formula in float64; None is without a gradient.

    `returned` is the dtype of the results, `rounded` that of logits within them.
    """
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mine, right = ours(*leaves), formula(*doubles)
    mine, right = ((r,) if isinstance(r, torch.Tensor) else r for r in (mine, right))
    eps = max(torch.finfo(dtype).eps for dtype in (returned, rounded))
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == returned and a.shape == b.shape and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a.double(), b, rtol=32 * eps, atol=32 * eps)
    pairs = [(a, b) for a, b in zip(mine, right, strict=True) if b.requires_grad]
    upstreams = [torch.randn(a.shape, generator=generator(5)).to(returned) for a, _ in pairs]
    grads = torch.autograd.grad([a for a, _ in pairs], leaves, upstreams)
    expected = torch.autograd.grad(
        [b for _, b in pairs], doubles, [upstream.double() for upstream in upstreams]
    )
    for a, b, leaf in zip(grads, expected, leaves, strict=True):
        largest = b.abs().max().item()
        assert a.dtype == leaf.dtype and largest > 0
        eps = max(torch.finfo(dtype).eps for dtype in (leaf.dtype, rounded))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * eps * largest)


def reduced(losses, counted, reduction):
    return dict(none=losses, sum=losses.sum(), mean=losses.sum() / counted.sum())[reduction]


def rows(logits, targets, smoothing=0.0, weight=None, ignored=-100):
    """F.cross_entropy of the last axis, without a reduction."""
    return F.cross_entropy(
        logits.movedim(-1, 1) if logits.dim() > 2 else logits, targets, weight,
        ignore_index=ignored, label_smoothing=smoothing, reduction="none",
    )  # fmt: skip


def z_losses(logits, counted, scale):
    return scale * logits.logsumexp(-1).square() * counted


def test_every_section_has_its_function():
    """As one pastes it: without the names of other sections."""
    text = (guide.ROOT / PAGE).read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Which has what", *SECTIONS]
    for section in SECTIONS:
        assert guide.run(section, PAGE)["n_blocks"] >= 1, section


@of_dtypes
@of_reductions
@pytest.mark.parametrize("shape", [(6,), (4, 5)], ids=["rows", "an-axis-more"])
def test_torch(dtype, reduction, shape):
    """The arguments in torch's order, the dtype of its loss, and gradients; one row alone too."""
    logits = random(shape[0], N_CLASSES, *shape[1:], dtype=dtype)
    targets = random_targets(*shape, classes=N_CLASSES)
    weight = random_weight(N_CLASSES)
    ours = theirs("F.cross_entropy", "cross_entropy")
    options = dict(ignore_index=targets.flatten()[0].item(), reduction=reduction)
    check(
        lambda x: ours(x, targets, weight, label_smoothing=0.1, **options),
        lambda x: F.cross_entropy(x, targets, weight.double(), label_smoothing=0.1, **options),
        [logits], dtype, dtype,
    )  # fmt: skip
    one, target = random(N_CLASSES, dtype=dtype), torch.tensor(3)
    check(lambda x: ours(x, target), lambda x: F.cross_entropy(x, target), [one], dtype, dtype)


@of_dtypes
@of_reductions
def test_torch_linear(dtype, reduction):
    ours = theirs("F.linear_cross_entropy", "linear_cross_entropy")
    targets, chunks = random_targets(7, classes=N_CLASSES), torch.nn.LinearCrossEntropyOptions
    targets[0] = -100
    weight, leaves = random_weight(N_CLASSES), a_head(7, dtype=dtype)
    for options in (None, chunks(batch_chunk_size=3)):
        check(
            lambda h, w, b, o=options: ours(
                h, w, targets, linear_bias=b, weight=weight, reduction=reduction, options=o
            ),
            lambda h, w, b: F.linear_cross_entropy(
                h, w, targets, linear_bias=b, weight=weight.double(), reduction=reduction
            ),
            [*leaves, random(N_CLASSES, dtype=dtype)], rounded=dtype,
        )  # fmt: skip


def liger(logits, targets, reduction, scale=0.0, smoothing=0.0, weight=None):
    """Loss, z-loss, accuracy: its kernel's comments as code."""
    counted = targets != -100
    z = z_losses(logits, counted, scale)
    divides = counted if weight is None else weight[targets.clamp(min=0)] * counted
    loss = reduced(rows(logits, targets, smoothing, weight), divides, reduction)
    z, right = reduced(z, counted, reduction), (logits.argmax(-1) == targets).double()
    return loss + z, z.detach(), right if reduction == "none" else right.sum() / counted.sum()


@of_dtypes
@of_reductions
def test_liger(dtype, reduction):
    """Everything it returns, with a cap, smoothing and a z-loss; class weights without a z-loss."""
    ours = theirs("Liger", "liger_cross_entropy")
    targets, logits = tokens(2, 5)[1], random(5, N_CLASSES, dtype=dtype, scale=5.0)
    targets[4] = logits[4].argmax()
    options = dict(reduction=reduction, label_smoothing=0.1)
    flags = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)

    def output(x):
        out = ours(x, targets, lse_square_scale=0.01, softcap=3.0, **options, **flags)
        kept = torch.where(targets == -100, -1, logits.argmax(-1))
        assert torch.equal(out.predicted_tokens, kept)
        return out.loss, out.z_loss, out.token_accuracy

    check(output, lambda x: liger(3 * (x / 3).tanh(), targets, reduction, 0.01, 0.1), [logits])
    weight = random_weight(N_CLASSES)
    check(
        lambda x: ours(x, targets, weight, **options),
        lambda x: liger(x, targets, reduction, smoothing=0.1, weight=weight.double())[0],
        [logits],
    )
    out = ours(logits, targets, return_token_accuracy=True)
    assert out.z_loss is None and out.predicted_tokens is None
    out = ours(logits, targets[:1].fill_(-1).expand(5), ignore_index=-1, reduction="none",
               return_token_accuracy=True)  # fmt: skip
    assert not out.token_accuracy.any()  # predictions of ignored rows are -1 as well


@of_dtypes
@of_reductions
def test_liger_linear(dtype, reduction):
    names = guide.run("Liger", PAGE)
    ours, token_scaled = names["liger_fused_linear_cross_entropy"], names["token_scaled_loss"]
    targets, leaves = tokens(2, 5)[1], a_head(5, dtype=dtype)
    options = dict(label_smoothing=0.1, reduction=reduction, lse_square_scale=0.01)

    def output(h, w, b):
        out = ours(h, w, targets, b, return_z_loss=True, return_token_accuracy=True, **options)
        return out.loss, out.z_loss, out.token_accuracy

    check(
        output, lambda h, w, b: liger(h @ w.T + b, targets, reduction, 0.01, 0.1),
        [*leaves, random(N_CLASSES, dtype=dtype)], rounded=dtype,
    )  # fmt: skip

    def scaled(h, w):
        losses = rows(h @ w.T, targets)
        return (losses * (-losses).exp().detach()).sum() / (targets != -100).sum()

    check(lambda h, w: token_scaled(h, w, targets), scaled, leaves, rounded=dtype)
    with pytest.raises(NotImplementedError, match="token_scaled_loss"):
        ours(*leaves, targets, use_token_scaling=True)


@of_dtypes
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "overwritten"])
def test_flash_attention(dtype, inplace):
    ours = theirs("flash-attention", "cross_entropy_loss")
    targets = tokens(2, 5)[1]
    logits = random(5, N_CLASSES, dtype=dtype)

    def formula(x):
        z = z_losses(2 * x, targets != -100, 0.01)
        return rows(2 * x, targets, 0.1) + z, z.detach()

    check(
        lambda x: ours(
            x if not inplace else x * 1, targets, None, 0.1, 2.0, 0.01, inplace_backward=inplace
        ),
        formula, [logits],
    )  # fmt: skip


@of_dtypes
@of_reductions
def test_quack(dtype, reduction):
    names = guide.run("quack", PAGE)
    targets, weight = tokens(2, 5)[1], random_weight(N_CLASSES)
    divides = weight.double()[targets.clamp(min=0)] * (targets != -100)
    check(
        lambda x: names["cross_entropy"](x, targets, None, weight, reduction=reduction),
        lambda x: reduced(rows(x, targets, weight=weight.double()), divides, reduction),
        [random(5, N_CLASSES, dtype=dtype)],
    )
    check(
        lambda h, w: names["chunked_linear_cross_entropy"](h, w, targets, 8, reduction=reduction),
        lambda h, w: reduced(rows(h @ w.T, targets), targets != -100, reduction),
        a_head(5, dtype=dtype), rounded=dtype,
    )  # fmt: skip


def cut(e, c, targets, bias, reduction, shift, softcap):
    """Its documented formula, and the lse of what counts."""
    e, targets = e[:, : e.shape[1] - shift], targets[:, shift:]
    logits = softcap * ((e @ c.T + bias) / softcap).tanh()
    counted = targets != -100
    losses = reduced(rows(logits, targets), counted, reduction)
    return losses, logits.logsumexp(-1) * counted


@of_dtypes
@of_reductions
@pytest.mark.parametrize("shift", [False, True, 2])
def test_cut_cross_entropy(dtype, reduction, shift):
    """Logits of 16-bit operands in float32, as there."""
    ours = theirs("cut-cross-entropy", "linear_cross_entropy")
    targets = tokens(3, 5)
    options = dict(reduction=reduction, shift=shift, softcap=4.0)
    leaves = [*a_head(3, 5, dtype=dtype), random(N_CLASSES, dtype=dtype)]
    check(
        lambda e, c, b: ours(e, c, targets, b, return_lse=True, filter_eps=None, **options),
        lambda e, c, b: cut(e, c, targets, b, **options), leaves,
    )  # fmt: skip
    assert isinstance(ours(*leaves[:2], targets, shift=shift), torch.Tensor)


@of_dtypes
def test_apex(dtype):
    """Class 0 is padding, unless one says otherwise."""
    ours = theirs("Apex", "SoftmaxCrossEntropyLoss").apply
    targets = torch.tensor([0, 3, 0, 40, 7])
    for padding, given in ((0, ()), (7, (7,)), (-100, (-100,))):
        check(
            lambda x, g=given: ours(x, targets, 0.1, *g),
            lambda x, p=padding: rows(x, targets, 0.1, ignored=p),
            [random(5, N_CLASSES, dtype=dtype)],
        )


@of_dtypes
@pytest.mark.parametrize("reduce_loss", [False, True], ids=["rows", "mean"])
def test_transformer_engine(dtype, reduce_loss):
    ours = theirs("Transformer Engine", "parallel_cross_entropy")
    targets = tokens(3, 5)

    def formula(x):
        losses = rows(x, targets, 0.1)
        return (losses.sum() / (targets != -100).sum()).reshape(1) if reduce_loss else losses

    logits = random(3, 5, N_CLASSES, dtype=dtype)
    check(lambda x: ours(x, targets.flatten(), 0.1, reduce_loss), formula, [logits])
    nothing = torch.full((3, 5), -100)
    assert torch.equal(ours(logits, nothing, 0.1, True), torch.zeros(1))


def shard(here, logits):
    """This rank's columns of as many for each, as the libraries have them; gradients are those."""
    return logits.tensor_split(here.n_ranks, -1)[here.rank]


@on_ranks(2, backends=("cpu",))
def test_over_ranks(here):
    """Loss and gradient of the whole: flash-attention, Transformer Engine, Megatron."""
    flash = theirs("flash-attention", "cross_entropy_loss")
    engine = theirs("Transformer Engine", "parallel_cross_entropy")
    megatron = theirs("Megatron", "vocab_parallel_cross_entropy")
    n, group = 42, dist.group.WORLD
    targets = random_targets(3, 5, classes=n)
    upstream = torch.randn(3, 5, generator=generator(5))
    alpha = 0.1 * n / (n - 1)
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(3, 5, n, dtype=dtype, scale=1.0)
        for ours, smoothing, z in (
            (lambda x: flash(x, targets, None, 0.1, 1.0, 0.01, process_group=group)[0], 0.1, 0.01),
            (lambda x: engine(x, targets, 0.1, False, group), 0.1, 0.0),
            (lambda x: megatron(x, targets, 0.1), alpha, 0.0),
            (lambda x: megatron(x, targets, tp_group=group), 0.0, 0.0),
        ):
            mine = shard(here, logits).clone().requires_grad_()
            whole = logits.double().requires_grad_()
            losses = ours(mine)
            right = rows(whole, targets, smoothing) + z_losses(whole, True, z)
            assert losses.dtype == torch.float32
            torch.testing.assert_close(losses.double(), right, rtol=1e-6, atol=1e-6)
            losses.backward(upstream), right.backward(upstream.double())
            expected = shard(here, whole.grad)
            atol = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(mine.grad.double(), expected, rtol=0, atol=atol)


@on_ranks(2, backends=("cpu",))
def test_loss_parallel(here):
    """A DTensor with label smoothing, which the context of torch does not take."""
    ours = theirs("loss_parallel", "loss_of_shards")
    mesh = dist.init_device_mesh("cpu", (here.n_ranks,))
    targets, logits = random_targets(6, classes=N_CLASSES), random_logits(6, N_CLASSES)
    shards = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    logits.requires_grad_()
    loss, right = ours(shards, targets), F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss.full_tensor(), right)
    loss.backward(), right.backward()
    torch.testing.assert_close(shards.grad.full_tensor(), logits.grad)


def chosen(logits, targets):
    counted = targets != -100
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    of_targets = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return of_targets * counted, entropy * counted


@of_dtypes
def test_trl(dtype):
    names = guide.run("TRL", PAGE)
    index, mask = random_targets(3, 5, classes=N_CLASSES), torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = 0
    targets = index.masked_fill(mask == 0, -100)
    leaves = [random(3, 5, N_CLASSES, dtype=dtype)]
    both = names["selective_log_softmax_and_entropy"]
    options = dict(temperature=0.7, row_mask=mask)
    check(lambda x: both(x, index, **options), lambda x: chosen(x / 0.7, targets), leaves)
    check(
        lambda x: names["selective_log_softmax"](x, index, **options),
        lambda x: chosen(x / 0.7, targets)[0], leaves,
    )  # fmt: skip
    assert not both(*leaves, index, entropy_requires_grad=False)[1].requires_grad


@of_dtypes
def test_unsloth(dtype):
    ours = theirs("Unsloth", "fast_cross_entropy_loss")
    targets, logits = tokens(3, 5), random(3, 5, N_CLASSES, dtype=dtype)
    for n_items in (None, 40, torch.tensor(40)):
        divisor = (targets != -100).sum() if n_items is None else 40
        check(
            lambda x, n=n_items: ours(x, targets, 4.0, 0.5, n),
            lambda x, d=divisor: rows(4 * (x / 8).tanh(), targets).sum() / d, [logits],
        )  # fmt: skip
    check(lambda x: ours(x, targets), lambda x: rows(x, targets).sum() / 12, [logits])
    for n_items in (None, 0):
        assert ours(logits, torch.full((3, 5), -100), n_items=n_items) == 0
