"""docs/guide.md, recipes: losses and gradients of the plain formulas, documents one by one."""

import math

import guide
import pytest
import torch
import torch.nn.functional as F
from oracle import generator, random_logits, random_targets
from torch.distributions import Categorical

from fused_ce import fused_cross_entropy, fused_linear_cross_entropy

N_CLASSES, N_FEATURES = 41, 8
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def recipes():
    return guide.run("Recipes")


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return random_logits(*shape, dtype=dtype, seed=seed, scale=scale).requires_grad_()


def tokens_of(*shape):
    """Of which the last row's first three are not to count."""
    tokens = random_targets(*shape, classes=N_CLASSES)
    tokens[-1, :3] = -100
    return tokens


def in_double(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def check(ours, theirs, leaves, dtype=torch.float32, value_dtype=torch.float32):
    """One or several results of the leaves against the formula in float64, with their gradients.

    `dtype` is what the gradients of logits are rounded to, `value_dtype` what the logits are.
    """
    doubles = in_double(leaves)
    mine, right = ours(*leaves), theirs(*doubles)
    mine, right = ((r,) if isinstance(r, torch.Tensor) else r for r in (mine, right))
    upstreams = [
        torch.randn(value.shape, generator=generator(seed)) for seed, value in enumerate(mine)
    ]
    steps = {torch.bfloat16: 4, torch.float32: 32}  # float32 sums round in many places
    tolerance = steps[value_dtype] * torch.finfo(value_dtype).eps
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(mine, leaves, upstreams)
    expected = torch.autograd.grad(right, doubles, [upstream.double() for upstream in upstreams])
    for a, b in zip(grads, expected, strict=True):
        atol = steps[dtype] * torch.finfo(dtype).eps * b.abs().max().item()
        assert atol > 0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


def chosen(logits, tokens):
    """(log-probabilities, entropies), both 0 where tokens do not count."""
    counted = tokens != -100
    log_probs = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    return log_probs * counted, Categorical(logits=logits).entropy() * counted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_and_entropy(recipes, dtype):
    """From hidden states in float32, whatever their dtype, and at a temperature."""
    tokens = tokens_of(3, 5)
    logits = random(3, 5, N_CLASSES, dtype=dtype, scale=3.0)
    ours = recipes["selective_log_softmax"]
    check(lambda x: ours(x, tokens), lambda x: chosen(x, tokens), [logits], dtype)
    leaves = random(3, 5, N_FEATURES, dtype=dtype), random(N_CLASSES, N_FEATURES, dtype=dtype)
    of_hidden = recipes["log_probs_and_entropy"]
    for temperature in (1.0, 0.6):
        check(
            lambda h, w, t=temperature: of_hidden(h, w, tokens, t),
            lambda h, w, t=temperature: chosen(h @ w.T / t, tokens),
            leaves, dtype,
        )  # fmt: skip


@pytest.mark.parametrize("of_answers", [False, True], ids=["of-tokens", "of-answers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_gradient(recipes, dtype, of_answers):
    """Ratios on both sides of the clip, of advantages of both signs."""
    actions, advantages = tokens_of(6, 7), torch.randn(6, 1, generator=generator(7))
    leaves = random(6, 7, N_FEATURES, dtype=dtype), random(N_CLASSES, N_FEATURES, dtype=dtype)
    with torch.no_grad():
        now, _ = chosen(leaves[0].double() @ leaves[1].double().T, actions)
    old = (now + 0.4 * torch.randn(6, 7, generator=generator(8))).float()
    old[-1, :3] = -200.0  # a ratio of what was not chosen, 0 * inf where it is made
    ratios = (now - old).exp()[actions != -100]
    assert (ratios < 0.8).any() and (ratios > 1.2).any() and (ratios - 1).abs().min() < 0.1

    def theirs(hidden, weight):
        counted = actions != -100
        log_probs, entropy = (x[counted] for x in chosen(hidden @ weight.T, actions))
        ratio = torch.exp(log_probs - old[counted])
        of_token = advantages.expand(6, 7)[counted]
        surrogate = torch.minimum(ratio * of_token, ratio.clamp(0.8, 1.2) * of_token)
        gains = surrogate + 0.3 * entropy
        if not of_answers:
            return -gains.sum() / 50
        return -torch.stack([g.mean() for g in gains.split(counted.sum(1).tolist())]).mean()

    def ours(hidden, weight):
        n_actions = (actions != -100).sum(1, keepdim=True) * len(actions) if of_answers else 50
        return recipes["policy_loss"](
            hidden, weight, actions, old, advantages, n_actions, bonus=0.3
        )

    check(ours, theirs, leaves, dtype)


def test_reinforce():
    actions, advantages = tokens_of(6, 7), torch.randn(6, 1, generator=generator(7))
    assert (advantages < 0).any() and (advantages > 0).any()
    leaves = random(6, 7, N_FEATURES), random(N_CLASSES, N_FEATURES)
    check(
        lambda h, w: fused_linear_cross_entropy(
            h, w, actions, sample_weight=advantages.expand(actions.shape), normalizer=50
        ),
        lambda h, w: -(chosen(h @ w.T, actions)[0] * advantages).sum() / 50,
        leaves,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation(recipes, dtype, temperature):
    """KLDivLoss of the tokens that count, times T**2, from logits and from hidden states."""
    teacher = random(3, 5, N_CLASSES, dtype=dtype, seed=5, scale=3.0).detach()
    counts = (tokens_of(3, 5) != -100).float()

    def theirs(logits):
        kept = counts.bool()
        return temperature**2 * torch.nn.KLDivLoss(reduction="batchmean")(
            (logits[kept] / temperature).log_softmax(-1),
            (teacher.double()[kept] / temperature).softmax(-1),
        )

    def ours(logits):
        return recipes["distillation_loss"](logits, teacher, counts, temperature)

    check(ours, theirs, [random(3, 5, N_CLASSES, dtype=dtype, scale=3.0)], dtype)

    probabilities = (teacher.float() / temperature).softmax(-1)
    entropy = Categorical(probs=probabilities[counts.bool()]).entropy().mean()

    def of_hidden(hidden, weight):
        loss = fused_linear_cross_entropy(
            hidden, weight, probabilities, sample_weight=counts, logit_scale=1 / temperature
        )
        return temperature**2 * (loss - entropy)

    leaves = random(3, 5, N_FEATURES, dtype=dtype), random(N_CLASSES, N_FEATURES, dtype=dtype)
    check(of_hidden, lambda h, w: theirs(h @ w.T), leaves, dtype, dtype)


LENGTHS = [[4, 1, 6], [3, 8], [11]]  # of the documents in each row


@pytest.fixture
def packed():
    """(tokens, documents) of the rows above; their numbers go on from row to row."""
    numbers = iter(range(6))
    rows = [torch.repeat_interleave(torch.tensor([next(numbers) for _ in n]), torch.tensor(n))
            for n in LENGTHS]  # fmt: skip
    return random_targets(3, 11, classes=N_CLASSES), torch.stack(rows)


def alone(hidden, weight, tokens, documents):
    """The losses of each document that has a token to predict, by itself."""
    for number in range(6):
        states, text = hidden[documents == number], tokens[documents == number]
        if len(text) > 1:
            yield F.cross_entropy(states[:-1] @ weight.T, text[1:], reduction="none")


def test_packed_documents_are_as_if_alone(recipes, packed):
    targets = recipes["packed_targets"](*packed)
    assert (targets == -100).sum() == 3
    check(
        lambda h, w: fused_linear_cross_entropy(h[:, :-1], w, targets),
        lambda h, w: torch.cat(list(alone(h, w, *packed))).mean(),
        [random(3, 11, N_FEATURES), random(N_CLASSES, N_FEATURES)],
    )


@pytest.mark.parametrize("first", [0, 27], ids=["small-numbers", "the-largest-numbers"])
def test_mean_of_the_means_of_documents(recipes, packed, first):
    """A document of one token has no mean."""
    tokens, documents = packed
    targets = recipes["packed_targets"](tokens, documents)
    check(
        lambda h, w: recipes["mean_of_documents"](h[:, :-1], w, targets, documents[:, :-1] + first),
        lambda h, w: torch.stack([each.mean() for each in alone(h, w, *packed)]).mean(),
        [random(3, 11, N_FEATURES), random(N_CLASSES, N_FEATURES)],
    )


def clip(images, texts, log_scale):
    """CLIP's own: similarities of all pairs, rows and columns."""
    similarities = log_scale.exp() * images @ texts.T
    pairs = torch.arange(len(images))
    return (F.cross_entropy(similarities, pairs) + F.cross_entropy(similarities.T, pairs)) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive(recipes, dtype):
    """The learnt temperature has its gradient; a fixed one is `logit_scale`."""
    images, texts = (
        F.normalize(random(13, N_FEATURES, seed=seed).detach(), dim=-1).to(dtype).requires_grad_()
        for seed in (1, 2)
    )
    log_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    ours = recipes["clip_loss"]
    check(lambda i, t, s: ours(i, t, s.exp()), clip, [images, texts, log_scale], dtype, dtype)

    pairs = torch.arange(13)
    fixed = torch.tensor(math.log(4.0), dtype=torch.float64)
    check(
        lambda i, t: (
            fused_linear_cross_entropy(i, t, pairs, logit_scale=4.0)
            + fused_linear_cross_entropy(t, i, pairs, logit_scale=4.0)
        ) / 2,
        lambda i, t: clip(i, t, fixed), [images, texts], dtype, dtype,
    )  # fmt: skip
    similarities = random(13, 13, dtype=dtype)
    check(
        lambda x: (fused_cross_entropy(x, pairs, dim=1) + fused_cross_entropy(x, pairs, dim=0)) / 2,
        lambda x: (F.cross_entropy(x, pairs) + F.cross_entropy(x.T, pairs)) / 2,
        [similarities], dtype,
    )  # fmt: skip


def test_contrastive_with_negatives_of_other_processes():
    """The second of two processes: its pairs begin where its own rows do."""
    pairs = torch.arange(5) + 5
    check(
        lambda i, t: fused_linear_cross_entropy(i, t, pairs, logit_scale=2.0),
        lambda i, t: -(2 * i @ t.T).log_softmax(-1).diagonal(5).mean(),
        [random(5, N_FEATURES, seed=1), random(10, N_FEATURES, seed=2)],
    )


def test_smoothing_and_z_loss():
    targets = tokens_of(3, 5)

    def theirs(hidden, weight):
        kept = targets != -100
        logits = hidden[kept] @ weight.T
        smoothed = F.cross_entropy(logits, targets[kept], label_smoothing=0.1)
        return smoothed + 1e-2 * logits.logsumexp(-1).square().mean()

    check(
        lambda h, w: fused_linear_cross_entropy(
            h, w, targets, label_smoothing=0.1, z_loss=1e-2
        ),
        theirs, [random(3, 5, N_FEATURES), random(N_CLASSES, N_FEATURES)],
    )  # fmt: skip
