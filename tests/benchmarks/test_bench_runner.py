"""A case: wrong, failing and missing providers are named, the others are measured."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure, one, quiet, runner
from benchmarks.cases import TINY_CASES, Case
from benchmarks.providers import GRADIENT, OURS, PROVIDERS, Provider
from benchmarks.runner import missing_records, run_case

CASE = Case("forward_backward", 16, 65, "float32")


class WrongGradient(torch.autograd.Function):
    """Torch's loss; the gradient without the softmax."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx, upstream):
        logits, targets = ctx.saved_tensors
        return -F.one_hot(targets, logits.shape[1]).to(logits.dtype) / len(targets), None


def raises(logits, targets):
    raise ValueError("no such shape\nand more")


class RaisesLater:
    """Right at first."""

    calls = 0

    def __call__(self, logits, targets):
        self.calls += 1
        if self.calls > 8:
            raise RuntimeError("worn out")
        return F.cross_entropy(logits, targets)


def measured(monkeypatch, cpu, about, case=CASE, **functions):
    """The records of a case by provider, ours and these functions."""
    providers = {OURS: PROVIDERS[OURS]}
    for name, function in functions.items():
        providers[name] = Provider(lambda case, f=function: f, kinds=("forward", *GRADIENT))
    monkeypatch.setattr("benchmarks.providers.PROVIDERS", providers)
    return {r.provider: r for r in run_case(case, cpu, 0.01, about)}


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.label)
def test_every_kind_is_measured(case, cpu, about, uncompiled):
    records = {r.provider: r for r in run_case(case, cpu, 0.01, about)}
    ours = records[OURS]
    assert ours.case == case.name and ours.note is None
    assert ours.ms_median > 0 and ours.ms_spread >= 0 and ours.peak_bytes > 0
    assert ours.gb_per_s == pytest.approx(case.bytes_moved / ours.ms_median / 1e6)
    clone = records["clone"]
    assert clone.fraction_of_clone == 1.0
    assert ours.fraction_of_clone == pytest.approx(ours.gb_per_s / clone.gb_per_s)
    assert ("torch" in records) == (case.kind != "in_place")
    assert ("read" in records) == (case.kind == "forward")


@pytest.mark.slow
def test_torch_compile_is_measured(cpu, about):
    record = {r.provider: r for r in run_case(CASE, cpu, 0.01, about)}["torch.compile"]
    assert record.note is None and record.ms_median > 0 and record.error < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wrong_gradient_is_named_and_not_timed(monkeypatch, cpu, about, dtype):
    case = dataclasses.replace(CASE, dtype=dtype)
    records = measured(monkeypatch, cpu, about, case, wrong=WrongGradient.apply)
    assert "wrong gradient" in records["wrong"].note
    assert records["wrong"].ms_median is None
    assert records[OURS].ms_median > 0 and records[OURS].note is None


@pytest.mark.parametrize("case", [CASE, dataclasses.replace(CASE, kind="forward")], ids=str)
def test_wrong_loss_is_named(monkeypatch, cpu, about, case):
    def wrong(logits, targets):
        return 1.1 * F.cross_entropy(logits, targets)

    def nan(logits, targets):
        return torch.nan * F.cross_entropy(logits, targets)

    records = measured(monkeypatch, cpu, about, case, wrong=wrong, nan=nan)
    assert "wrong loss" in records["wrong"].note
    assert "wrong loss: nan" in records["nan"].note


def test_what_raises_is_named_with_its_error_and_the_run_goes_on(monkeypatch, cpu, about):
    records = measured(
        monkeypatch, cpu, about, first=raises, later=RaisesLater(), good=F.cross_entropy
    )
    assert records["first"].note == "ValueError: no such shape"
    assert records["later"].note == "RuntimeError: worn out"
    assert records["later"].ms_median is None
    assert records["good"].ms_median > 0 and records["good"].note is None


def test_missing_providers_are_named(cpu, about, monkeypatch):
    absent = Provider(lambda case: None, kinds=GRADIENT, package="no_such_package")
    monkeypatch.setattr("benchmarks.providers.PROVIDERS", PROVIDERS | {"absent": absent})
    notes = {record.provider: record.note for record in missing_records(cpu, about)}
    assert notes["absent"] == "missing: no_such_package is not installed"
    assert {"liger", "quack", "cut_cross_entropy"} <= set(notes)
    assert not {OURS, "torch", "torch.compile"} & set(notes)


def test_a_lost_device_ends_the_run(monkeypatch, cpu, about):
    def gone(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(runner.measure, "synchronize", gone)
    with pytest.raises(runner.DeviceLost, match="no such shape"):
        measured(monkeypatch, cpu, about, first=raises)


def test_turns_warm_up_and_are_not_alternated_call_by_call(cpu, monkeypatch):
    monkeypatch.setattr(measure, "CALLS_IN_A_TURN", (3, 3))
    order = []
    works = {name: measure.Work(tuple, lambda name=name: order.append(name)) for name in "ab"}
    assert measure.interleave(works, cpu, 0.0, min_turns=2) == {}
    assert "".join(order) == "aaaabbbb" + 2 * "aaaaabbbbb"  # two untimed, three timed
    assert [len(work.milliseconds) for work in works.values()] == [6, 6]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a call says so."""

    class Clock:
        now = 0.0

        def call(self, seconds):
            def run():
                self.now += seconds

            return measure.Work(tuple, run)

    made = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: made.now)
    return made


def test_a_long_call_is_a_turn_and_one_far_behind_has_no_other(cpu, clock):
    works = {
        "short": clock.call(0.1), "long": clock.call(0.3), "behind": clock.call(0.5),
    }  # fmt: skip
    works["long"].is_warm = True
    assert measure.interleave(works, cpu, 0.0) == {}
    assert [len(work.milliseconds) for work in works.values()] == [9, 3, 1]
    assert [round(work.median) for work in works.values()] == [100, 300, 500]
    # four to warm up, 3 * (1 + 3); three; one that may compile and one
    assert clock.now == pytest.approx(16 * 0.1 + 3 * 0.3 + 2 * 0.5)


def test_memory_is_measured_before_time_and_warms_up(cpu):
    work = measure.Work(tuple, lambda: torch.ones(10))
    measure.peak_bytes(work, cpu)
    assert work.is_warm


def test_median_and_spread():
    work = measure.Work(tuple, tuple, [5.0, 1.0, 2.0, 4.0, 3.0])
    assert work.median == 3.0 and work.spread == 3.0
    assert measure.Work(tuple, tuple, [1.0]).spread is None


def test_peak_is_the_most_at_once_beyond_the_arguments(cpu):
    def call(x):
        first = torch.ones(1 << 18)  # 1 MiB
        del first
        return torch.ones(1 << 19) + torch.ones(1 << 19)  # 2 + 2 + 2 MiB

    peak = measure.peak_bytes(measure.Work(lambda: (torch.ones(1 << 20),), call), cpu)
    assert peak == pytest.approx(6 << 20, rel=0.01)


def test_memory_profiler_is_silent(cpu, capfd):
    measure.peak_bytes(measure.Work(tuple, lambda: torch.ones(10)), cpu)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def neighbours(monkeypatch):
    """A machine of 100 ticks a look, of which others take those given, one after the other."""

    def set_busy(*busy_ticks):
        ticks, total, busy = list(busy_ticks), [0], [0]

        def jiffies():
            total[0] += 50  # begin and end of a look are two calls
            busy[0] += ticks.pop(0) if total[0] % 100 == 0 else 0
            return total[0], busy[0]

        monkeypatch.setattr(quiet, "_jiffies", jiffies)
        monkeypatch.setattr(quiet.time, "process_time", lambda: 0.0)
        monkeypatch.setattr(quiet.time, "sleep", lambda seconds: None)

    return set_busy


def test_what_others_disturb_is_timed_again_when_they_are_gone(neighbours):
    neighbours(40, 30, 0, 2)  # disturbed; still there, gone; then quiet
    calls = []
    share = quiet.Patience(100.0).undisturbed(lambda: calls.append(1))
    assert len(calls) == 2 and share == pytest.approx(0.04)


def test_without_patience_a_disturbed_case_says_so(neighbours, monkeypatch, cpu, about):
    neighbours(40)
    ours = measured(monkeypatch, cpu, about)[OURS]
    assert ours.note == "other processes used 80% of the CPU" and ours.ms_median > 0


def test_one_case_can_be_called_for_a_profiler(capsys):
    assert one.main(["forward_backward", "4", "65", "float32", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "fused_ce: forward_backward, 4 x 65 float32, 1 calls\n"
    with pytest.raises(SystemExit, match="liger: "):
        one.main(["forward", "4", "65", "float32", "--device", "cpu", "--provider", "liger"])
