"""Estimates that disturb nothing, and the exact loss."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ce.babygpt import BabyGPT, ModelConfig, estimate_loss
from fused_ce.babygpt import data as batches
from fused_ce.babygpt.evaluate import exact_loss

V = 7
SPLITS = {
    "train": np.random.default_rng(0).integers(V, size=500).astype(np.uint16),
    "val": np.random.default_rng(1).integers(V, size=100).astype(np.uint16),
}


@pytest.fixture(params=["fused", "linear"])
def model(request):
    shape = ModelConfig(V, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    return BabyGPT(shape, request.param)


class Broken(torch.nn.Module):
    """A model that fails in the middle of an evaluation."""

    def forward(self, idx, targets=None):
        """Fail."""
        raise RuntimeError("broken")


def test_the_estimate_is_the_mean_over_batches_of_each_split(model, monkeypatch):
    drawn = []
    get_batch = batches.get_batch

    def observed(*args, **kwargs):
        drawn.append((args, get_batch(*args, **kwargs)))
        return drawn[-1][1]

    monkeypatch.setattr(batches, "get_batch", observed)
    estimate = estimate_loss(model, SPLITS, 4, 8, 5)
    assert [args[0] is SPLITS["train"] for args, _ in drawn] == [True] * 5 + [False] * 5
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x)[0].view(-1, V), y.view(-1)) for _, (x, y) in drawn]
    assert float(estimate["train"]) == pytest.approx(torch.stack(losses[:5]).mean().item())
    assert float(estimate["val"]) == pytest.approx(torch.stack(losses[5:]).mean().item())


def test_estimates_of_one_model_agree(model):
    assert estimate_loss(model, SPLITS, 4, 8, 5) == estimate_loss(model, SPLITS, 4, 8, 5)


def test_an_estimate_consumes_no_randomness_of_the_training(model):
    before = torch.get_rng_state()
    estimate_loss(model, SPLITS, 4, 8, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_ones_own_draws_other_batches(model):
    generator = torch.Generator().manual_seed(5)
    first = estimate_loss(model, SPLITS, 4, 8, 5, generator=generator)
    assert first != estimate_loss(model, SPLITS, 4, 8, 5, generator=generator)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", [False, True], ids=["works", "raises"])
def test_the_mode_is_restored(model, training, broken):
    model = Broken() if broken else model
    model.train(training)
    try:
        estimate_loss(model, SPLITS, 4, 8, 2)
        raised = False
    except RuntimeError:
        raised = True
    assert raised == broken
    assert model.training == training


def test_the_model_is_evaluated_in_eval_mode_without_gradients():
    class Spy(torch.nn.Module):
        def forward(self, idx, targets=None):
            assert not self.training and not torch.is_grad_enabled()
            return None, torch.tensor(1.5)

    assert estimate_loss(Spy(), SPLITS, 4, 8, 2) == {"train": 1.5, "val": 1.5}


def test_an_estimate_needs_a_batch(model):
    with pytest.raises(ValueError, match="eval_iters"):
        estimate_loss(model, SPLITS, 4, 8, 0)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 65, 500], ids=lambda n: f"{n}-tokens")
def test_the_exact_loss_counts_every_token_but_the_first_once(model, n):
    tokens = SPLITS["train"][:n].astype(np.int64)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, n - 1, 8):
            piece = torch.from_numpy(tokens[start : start + 9])
            logits = model(piece[None, :-1])[0][0]
            total += F.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
    model.train()
    assert exact_loss(model, tokens, batch_size=3) == pytest.approx(total / (n - 1), abs=1e-5)
    assert model.training


def test_the_exact_loss_of_a_uniform_model_is_log_v(model):
    torch.nn.init.zeros_(model.head.weight)
    assert exact_loss(model, SPLITS["val"]) == pytest.approx(math.log(V), abs=1e-6)
