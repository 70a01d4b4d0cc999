"""Timing on a GPU, tried on one that is imagined: a host and a stream, each with its clock."""

import dataclasses

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.providers import OURS, PROVIDERS, Provider
from benchmarks.runner import WAITED, run_case


@dataclasses.dataclass
class Gpu:
    """Milliseconds of the host, and when the stream will have done what was enqueued."""

    host: float = 0.0
    stream: float = 0.0

    def enqueue(self, milliseconds=0.0):
        self.stream = max(self.stream, self.host) + milliseconds

    def sleep(self, cycles):
        self.enqueue(cycles / 2e6)

    def synchronize(self):
        self.host = max(self.host, self.stream)

    def call(self, launch, kernel, waits=False):
        def run():
            if waits:
                self.synchronize()
            self.host += launch
            self.enqueue(kernel)

        return measure.Work(tuple, run)


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            made.enqueue()
            self.at = made.stream

        def query(self):
            return made.host >= self.at

        def elapsed_time(self, other):
            assert self.query() and other.query()
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def timed(work):
    assert measure.interleave({"x": work}, torch.device("cuda"), 0.0) == {}
    return work


@pytest.mark.parametrize("launch", [0.01, 0.2, 0.6, 1.1])
def test_launches_are_not_timed(gpu, launch):
    work = timed(gpu.call(launch, kernel=0.004))
    assert work.median == pytest.approx(0.004) and work.waited == 0.0


def test_a_provider_that_waits_has_its_launches_timed_and_says_so(gpu):
    work = timed(gpu.call(0.2, kernel=0.004, waits=True))
    assert work.median == pytest.approx(0.204)
    assert work.waited == 1.0 and work.head_start == 1


def test_long_kernels_hide_any_launch(gpu):
    work = timed(gpu.call(0.5, kernel=5.0))
    assert work.median == pytest.approx(5.0) and work.waited == 0.0


def test_the_record_says_that_the_gpu_waited(monkeypatch, cpu, about):
    made = Provider(PROVIDERS[OURS].make, kinds=("forward_backward",))
    monkeypatch.setattr("benchmarks.providers.PROVIDERS", {OURS: made, "waits": made})
    interleave = measure.interleave

    def waited(works, *arguments):
        failures = interleave(works, *arguments)
        works["waits"].waited = 1.0
        return failures

    monkeypatch.setattr(measure, "interleave", waited)
    case = Case("forward_backward", 16, 65, "float32")
    notes = {r.provider: r.note for r in run_case(case, cpu, 0.01, about)}
    assert notes["waits"] == WAITED and notes[OURS] is None
