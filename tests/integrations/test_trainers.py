"""docs/guide.md, "In other people's trainers": each library's own loss, by other means."""

from types import SimpleNamespace

import guide
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import generator, random_targets, random_upstream
from ranks import CUDA, on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_ce import fused_cross_entropy

N_CLASSES, N_FEATURES = 37, 8
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def recipes():
    return guide.run("In other people's trainers")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def states(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, N_FEATURES, generator=generator(seed)).to(dtype).requires_grad_()


def a_head(dtype=torch.float32, n_classes=N_CLASSES, bias=False):
    head = nn.Linear(N_FEATURES, n_classes, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(head.parameters(), start=5):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    return head.to(dtype)


def some_targets(*shape, ignore_index=-100):
    """Of which the second row's last three, and nothing else, are ignored."""
    targets = random_targets(*shape, classes=N_CLASSES)
    targets[1, -3:] = ignore_index
    return targets


def check(ours, theirs, leaves, dtype=None):
    """Losses, and gradients by one random upstream gradient.

    They are sums that are rounded in more places than one, in 16 bits only at the end.
    """
    upstream = random_upstream(ours.detach())
    torch.testing.assert_close(ours, theirs.to(ours.dtype))
    mine = torch.autograd.grad(ours, leaves, upstream)
    right = torch.autograd.grad(theirs, leaves, upstream.to(theirs.dtype))
    for a, b in zip(mine, right, strict=True):
        steps = {torch.bfloat16: 4, torch.float32: 32}[dtype or a.dtype]
        atol = steps * torch.finfo(dtype or a.dtype).eps * b.abs().max().item()
        assert a.dtype == b.dtype and atol > 0
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def micro_batches_and_their_gradients(model):
    """Three of unequal length, and the gradients of the mean over the tokens of all."""
    inputs = [torch.randint(N_CLASSES, (2, n), generator=generator(n)) for n in (3, 9, 4)]
    targets = [some_targets(2, n) for n in (3, 9, 4)]
    logits = model.head(model.body(torch.cat(inputs, dim=1)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(targets, dim=1).flatten())
    return list(zip(inputs, targets, strict=True)), torch.autograd.grad(loss, model.parameters())


@pytest.fixture
def model(recipes):
    return recipes["ModelWithLoss"](nn.Embedding(N_CLASSES, N_FEATURES), a_head())


@pytest.mark.filterwarnings("ignore")
def test_accelerate(recipes, model):
    accelerate = pytest.importorskip("accelerate")
    micro_batches, right = micro_batches_and_their_gradients(model)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3)
    prepared = accelerator.prepare(model)
    recipes["accelerate_backward"](accelerator, prepared, micro_batches)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(right))


@pytest.mark.filterwarnings("ignore")
def test_lightning(recipes, model):
    lightning = pytest.importorskip("lightning")
    micro_batches, right = micro_batches_and_their_gradients(model)

    class Module(lightning.LightningModule):
        training_step = recipes["training_step"]

        def __init__(self):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_before_optimizer_step(self, optimizer):
            self.gradients = [p.grad.clone() for p in model.parameters()]

    module = Module()
    n_tokens = sum((targets != -100).sum() for _, targets in micro_batches)
    batches = [(inputs, targets, n_tokens) for inputs, targets in micro_batches]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    torch.testing.assert_close(module.gradients, list(right))


def torchtitans(logits, targets, n_tokens):
    """The sum in float32, divided; its own where it is installed."""
    try:
        from torchtitan.components.loss import CrossEntropyLoss
    except ImportError:
        flat = logits.float().flatten(0, -2), targets.flatten()
        loss = F.cross_entropy(*flat, reduction="sum")
        return loss if n_tokens is None else loss / n_tokens
    loss, metrics = CrossEntropyLoss.Config().build()(logits, targets, n_tokens)
    assert metrics == {}
    return loss


@pytest.mark.parametrize("n_tokens", [torch.tensor(40), None], ids=["training", "validation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchtitan(recipes, dtype, n_tokens):
    hidden, head, targets = states(2, 7, dtype=dtype), a_head(dtype), some_targets(2, 7)
    leaves = hidden, head.weight
    loss, metrics = recipes["FusedLoss"].Config().build()(head(hidden), targets, n_tokens)
    assert metrics == {} and loss.dtype == torch.float32
    check(loss, torchtitans(head(hidden), targets, n_tokens), leaves)

    logits = head(hidden)
    loss_of = recipes["FusedLinearLoss"].Config().build(compile_config=None)
    loss_of.set_lm_head(head)
    loss, metrics = loss_of(hidden, targets, n_tokens)
    assert metrics == {}
    check(loss, torchtitans(logits, targets, n_tokens), leaves)


class NormAndHead(nn.Module):
    """A decoder's end, as torchtitan's `_skip_lm_head` leaves it."""

    def __init__(self):
        """Equal on every rank."""
        super().__init__()
        self.body, self.norm = nn.Embedding(N_CLASSES, N_FEATURES), nn.RMSNorm(N_FEATURES)
        self.lm_head = a_head()
        with torch.no_grad():
            shape = self.body.weight.shape
            self.body.weight.copy_(torch.randn(shape, generator=generator(9)))

    def forward(self, tokens):
        return self.norm(self.body(tokens))


@on_ranks(2, backends=("cpu", CUDA))
def test_torchtitan_from_hidden_states_with_fsdp(here):
    """Norm and head in one group, gradients added and not averaged."""
    whole, sharded = NormAndHead().to(here.device), NormAndHead().to(here.device)
    fully_shard(sharded.body)
    fully_shard([sharded.norm, sharded.lm_head])
    fully_shard(sharded)
    for module in (sharded.body, sharded.norm, sharded):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        module.set_gradient_divide_factor(1.0)
    tokens = torch.randint(N_CLASSES, (4, 6), generator=generator()).to(here.device)
    targets = some_targets(4, 6).to(here.device)
    n_tokens = (targets != -100).sum()
    right = torchtitans(whole.lm_head(whole(tokens)), targets, n_tokens)
    right.backward()

    loss_of = guide.run("In other people's trainers")["FusedLinearLoss"].Config().build()
    loss_of.set_lm_head(sharded.lm_head)
    rows = slice(2 * here.rank, 2 * here.rank + 2)
    for _ in range(2):  # the second step finds what the first has left
        sharded.zero_grad()
        loss, _ = loss_of(sharded(tokens[rows]), targets[rows], n_tokens)
        loss.backward()
    dist.all_reduce(total := loss.detach().clone())
    torch.testing.assert_close(total, right.detach())
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def litgpts(logits, targets, **options):
    """The mean over what is not ignored, 0 of nothing; its own where it is installed."""
    try:
        from litgpt.utils import chunked_cross_entropy
    except ImportError:
        logits = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
        keep = {key: options[key] for key in options if key == "ignore_index"}
        flat = logits.flatten(0, -2), targets.flatten()
        n_tokens = (targets != keep.get("ignore_index", -100)).sum().clamp(min=1)
        return F.cross_entropy(*flat, reduction="none", **keep).sum() / n_tokens
    return chunked_cross_entropy(logits, targets, **options)


@pytest.mark.parametrize(
    "options",
    [{}, dict(chunk_size=0), dict(chunk_size=3), dict(ignore_index=2)],
    ids=["default", "one-chunk", "small-chunks", "another-index"],
)
@pytest.mark.parametrize("kind", ["whole", "list", "list-with-an-empty-end"])
def test_litgpt(recipes, kind, options):
    n_tokens = 8 if kind == "list-with-an-empty-end" else 10
    hidden, head = states(2, n_tokens + 1), a_head()
    targets = some_targets(2, n_tokens, ignore_index=options.get("ignore_index", -100))

    def logits():
        if not kind.startswith("list"):
            return head(hidden)[..., :-1, :]
        chunks = [head(chunk) for chunk in hidden.split(4, dim=1)]
        chunks[-1] = chunks[-1][..., :-1, :]  # as the script does
        return chunks

    loss = recipes["chunked_cross_entropy"](logits(), targets, **options)
    check(loss, litgpts(logits(), targets, **options), (hidden, head.weight))
    nothing = targets.fill_(options.get("ignore_index", -100))
    assert recipes["chunked_cross_entropy"](logits(), nothing, **options) == 0


@pytest.mark.parametrize("cap", [None, 2.0], ids=["plain", "capped"])
@pytest.mark.parametrize("lora", [False, True], ids=["linear", "lora"])
def test_litgpt_from_hidden_states(recipes, lora, cap):
    x, head, targets = states(2, 7), a_head(bias=True), some_targets(2, 7)
    self = SimpleNamespace(
        lm_head=SimpleNamespace(linear=head) if lora else head,
        config=SimpleNamespace(final_logit_softcapping=cap),
    )
    logits = head(x) if cap is None else cap * torch.tanh(head(x) / cap)
    leaves = x, *head.parameters()
    check(recipes["litgpt_loss"](self, x, targets), litgpts(logits, targets), leaves)
    assert recipes["litgpt_loss"](self, x, targets.fill_(-100)) == 0


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_nanogpt(recipes, autocast):
    x, head, targets = states(2, 7), a_head(), some_targets(2, 7, ignore_index=-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = recipes["nanogpt_loss"](SimpleNamespace(lm_head=head), x, targets)
        logits = head(x)
        theirs = F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
        )
    check(ours, theirs, (x, head.weight), dtype=torch.bfloat16 if autocast else None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nanochat(recipes, dtype, reduction):
    """Weights of float32, cast as its `Linear` casts them; 3 classes are padding."""
    x, head = states(2, 7, dtype=dtype), a_head(n_classes=N_CLASSES + 3)
    with torch.no_grad():
        head.weight.mul_(5)  # so that the cap matters
    targets = some_targets(2, 7, ignore_index=-1)
    self = SimpleNamespace(lm_head=head, config=SimpleNamespace(vocab_size=N_CLASSES))
    options = dict(ignore_index=-1, reduction=reduction)

    def logits():
        return F.linear(x, head.weight.to(dtype))[..., :N_CLASSES]

    def theirs():
        capped = 15 * torch.tanh(logits().float() / 15)
        loss = F.cross_entropy(capped.view(-1, N_CLASSES), targets.view(-1), **options)
        return loss.view(2, 7) if reduction == "none" else loss

    without_logits = recipes["nanochat_loss"](self, x, targets, loss_reduction=reduction)
    check(without_logits, theirs(), (x, head.weight), dtype=dtype)
    of_logits = fused_cross_entropy(logits(), targets, dim=-1, softcap=15.0, **options)
    check(of_logits, theirs(), (x, head.weight), dtype=dtype)
