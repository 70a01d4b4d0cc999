"""What the CPU path does differently from machine to machine: the same numbers everywhere."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_as_exact_as_torch, random_logits, random_targets, random_weight

from fused_ce import backend, fused_cross_entropy
from fused_ce.cpu import machine

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with backend("cpu"):
        yield


@pytest.fixture(params=["exp", "exp2"])
def power(request, monkeypatch):
    """Either exponential, whatever this processor is."""
    unit = 1.0 if request.param == "exp" else math.log2(math.e)
    power = getattr(torch, request.param)
    monkeypatch.setattr(machine, "exponential", lambda n_elements: (power, unit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_either_exponential_is_as_exact_as_torch(power, dtype, scale):
    logits = scale * random_logits(20, 301, dtype=dtype)
    targets = random_targets(20, classes=301)
    for route in (True, False):
        options = dict(ignore_index=3, label_smoothing=0.1, grad_in_forward=route)
        assert_as_exact_as_torch(logits, targets, random_weight(301), **options)


def test_stats_and_their_gradients_by_either_exponential(power):
    targets = random_logits(20, 301, seed=2).softmax(-1)
    results = []
    for name in ("cpu", "reference"):
        logits = random_logits(20, 301).requires_grad_()
        probabilities = targets.clone().requires_grad_()
        with backend(name):
            loss, stats = fused_cross_entropy(logits, probabilities, return_stats=True)
        (loss + stats.entropy.sum() + 0.1 * stats.lse.sum()).backward()
        results.append((loss, stats.entropy, logits.grad, probabilities.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="no huge pages of its own accord here"
)
def test_a_large_gradient_lies_in_huge_pages():
    """In a process of its own: here the tests have written to all memory that is asked for."""
    code = """if True:
        import re, torch, fused_ce
        logits = torch.randn(256, 50_000, requires_grad=True)
        fused_ce.fused_cross_entropy(logits, torch.zeros(256).long()).backward()
        place, huge = logits.grad.data_ptr() + logits.grad.numel() * 2, 0
        for line in open("/proc/self/smaps"):
            if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                first, last = (int(number, 16) for number in span.groups())
            elif line.startswith("AnonHugePages") and first <= place < last:
                huge = int(line.split()[1]) * 1024
        print(huge > logits.grad.numel() * 2)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr


def test_memory_that_is_not_ours_to_advise_on(monkeypatch):
    """Logits that their gradient overwrites, and buffers that huge pages would waste."""
    asked = []
    monkeypatch.setattr(machine, "_system_madvise", lambda *given: asked.append(given))
    targets = random_targets(256, classes=50_000)
    fused_cross_entropy(random_logits(256, 50_000).requires_grad_(), targets, inplace=True)
    fused_cross_entropy(random_logits(256, 50_000), targets)
    fused_cross_entropy(random_logits(20, 50_000).requires_grad_(), targets[:20])
    assert asked == []
    logits = random_logits(256, 50_000).requires_grad_()
    fused_cross_entropy(logits, targets).backward()
    ((first, size, _),) = asked
    assert first % machine.HUGE_PAGE == 0 and size % machine.HUGE_PAGE == 0
    assert logits.grad.data_ptr() <= first
    assert first + size <= logits.grad.data_ptr() + logits.grad.numel() * 4


def test_without_madvise(monkeypatch):
    monkeypatch.setattr(machine, "_system_madvise", None)
    fused_cross_entropy(
        random_logits(256, 50_000).requires_grad_(), random_targets(256, classes=50_000)
    ).backward()
