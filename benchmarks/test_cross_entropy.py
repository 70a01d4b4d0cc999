"""Benchmarks for pytest: `pytest benchmarks`, on the CPU, or on the GPU where there is one.

The table of pytest-benchmark compares the providers of a case; `--benchmark-json` keeps the bytes
and the error beside each time. What overwrites its logits gets fresh ones outside the time.
"""

import functools
import os
import time

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.accuracy import Exact
from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.inputs import Inputs, LinearInputs, inputs_of
from benchmarks.measure import give_back_memory, synchronize
from benchmarks.providers import PROVIDERS
from benchmarks.runner import check, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = GPU_CASES if DEVICE.type == "cuda" else CPU_CASES


def _id(case: Case, name: str) -> str:
    words = (case.name, "x".join(map(str, case.sizes)), case.dtype, name)
    return "-".join(words).replace(" ", "_").replace("%", "")


BENCHMARKS = [
    pytest.param(case, name, id=_id(case, name))
    for case in CASES
    for name, provider in PROVIDERS.items()
    if case.kind in provider.kinds
]
SECONDS, MOST_ROUNDS = 0.5, 200


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[Inputs | LinearInputs, Exact]:
    give_back_memory(DEVICE)
    inputs = inputs_of(case, DEVICE)
    return inputs, Exact.of(case, *inputs.first)


@pytest.mark.parametrize(("case", "name"), BENCHMARKS)
def test_loss(benchmark, case, name):
    """A provider of one case, checked against float64 before it is timed."""
    provider = PROVIDERS[name]
    if reason := provider.missing(DEVICE):
        pytest.skip(reason)
    if DEVICE.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 would time the interpreter: unset it")
    inputs, exact = _inputs(case)
    loss_fn = provider.make(case)
    benchmark.group = case.label
    errors = check(loss_fn, provider, inputs, exact)
    benchmark.extra_info |= {
        "error": errors.largest, "loss_error": errors.loss, "bytes_moved": case.bytes_moved,
        "case": case.name, "n_rows": case.n_rows, "hidden_size": case.hidden_size,
        "vocab_size": case.vocab_size,
        "dtype": case.dtype, "provider": name, "device": DEVICE.type,
    }  # fmt: skip

    def prepared():
        arguments = inputs.take(provider)
        synchronize(DEVICE)
        return (loss_fn, *arguments), {}

    def finished(*arguments):
        step(*arguments)
        synchronize(DEVICE)  # the host's clock is what pytest-benchmark reads

    once = _seconds(prepared, finished)
    rounds = max(5, min(MOST_ROUNDS, int(SECONDS / once)))
    benchmark.pedantic(finished, setup=prepared, rounds=rounds, warmup_rounds=2)


def _seconds(prepared, finished) -> float:
    """Of the second call: the first may still compile."""
    for _ in range(2):
        arguments, _ = prepared()
        start = time.perf_counter()
        finished(*arguments)
        seconds = time.perf_counter() - start
    return seconds
