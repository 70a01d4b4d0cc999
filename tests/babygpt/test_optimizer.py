"""The learning rate, step by step, and what decays."""

from dataclasses import replace

import pytest
import torch

from fused_ce.babygpt import PRESETS, BabyGPT
from fused_ce.babygpt.optimizer import cosine_schedule, make_optimizer, make_schedule

# max 1, min .1, warm-up 7, end of the decay 21
TABLE = [
    0, .142857, .285714, .428571, .571429, .714286, .857143, 1, .988718, .955436, .901824, .830570,
    .745248, .650134, .55, .449866, .354752, .269429, .198176, .144564, .111282, .1, .1, .1, .1,
]  # fmt: skip


@pytest.fixture
def model(config):
    return BabyGPT(config.model(vocab_size=5))


def rates(model, config, n):
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config)
    taken = []
    for _ in range(n):
        taken.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert all(len(rate) == 1 for rate in taken)
    return [rate.pop() for rate in taken]


def test_schedule_follows_the_table():
    rates = [
        cosine_schedule(step, max_lr=1, min_lr=0.1, warmup_steps=7, decay_steps=21)
        for step in range(25)
    ]
    assert rates == pytest.approx(TABLE, abs=1e-6)


def test_the_optimiser_takes_the_rates_of_the_schedule(model, config):
    config = replace(config, lr=0.5, min_lr=0.05, warmup_steps=7, decay_steps=21)
    assert rates(model, config, 25) == pytest.approx([rate / 2 for rate in TABLE], abs=1e-6)


def test_without_min_lr_the_rate_stays(model, config):
    config = replace(config, lr=0.5, min_lr=None, warmup_steps=0, decay_steps=None)
    assert rates(model, config, 30) == pytest.approx([0.5] * 30)


def test_without_decay_steps_the_decay_ends_with_the_run(model, config):
    config = replace(config, lr=0.5, min_lr=0.1, warmup_steps=0, decay_steps=None, max_steps=10)
    taken = rates(model, config, 12)
    assert taken[9] > 0.1 and taken[10:] == pytest.approx([0.1, 0.1])


def test_matrices_decay_and_vectors_do_not(model, config):
    optimizer = make_optimizer(model, replace(config, weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() == 2 else 0)


def test_the_optimiser_is_torchs_adamw(model, config):
    assert type(make_optimizer(model, config)) is torch.optim.AdamW
    assert type(make_schedule(make_optimizer(model, config), PRESETS["v12"])).__name__ == "LambdaLR"
