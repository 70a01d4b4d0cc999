"""Memory of head and loss: every way is right, and holds the logits that its name says."""

import dataclasses

import pytest
import torch

from benchmarks import memory, providers, records, report, tables
from benchmarks.cases import Case
from benchmarks.inputs import inputs_of
from benchmarks.memory import IN_PLACE, KIND, NAMES, WHOLE_LOGITS
from benchmarks.providers import COMPILED, EAGER, IN_CHUNKS, OURS, PROVIDERS, Provider
from benchmarks.runner import step

ABOUT = {"gpu": "a machine", "torch": "2", "triton": "3", "date": "2020-01-02"}

CASE = Case("linear", 2048, 500, "float32", hidden_size=8)
LOGITS = 4 * 2048 * 500
GRADIENTS = 4 * 8 * (2048 + 500)


@pytest.fixture(scope="module")
def peaks():
    """The records of all ways but torch.compile, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        few = {name: provider for name, provider in PROVIDERS.items() if name != COMPILED}
        patch.setattr(providers, "PROVIDERS", few)
        found = memory.peaks(CASE, torch.device("cpu"), ABOUT)
        return {record.provider: record for record in found}


@pytest.fixture
def ours_alone(monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", {OURS: PROVIDERS[OURS]})


def test_peaks_are_the_logits_that_are_held(peaks):
    copies = {name: (record.peak_bytes - GRADIENTS) / LOGITS for name, record in peaks.items()}
    assert 2.9 < copies[EAGER] < 3.1
    assert 1.9 < copies[WHOLE_LOGITS] < 2.1
    assert 0.9 < copies[IN_PLACE] < 1.1
    assert copies[OURS] < 0.6


def test_records_say_what_was_measured(peaks, tmp_path):
    assert {OURS, EAGER, WHOLE_LOGITS, IN_PLACE} <= set(peaks) <= set(NAMES)
    for record in peaks.values():
        assert record.key == (KIND, 2048, 8, 500, "float32")
        assert record.ms_median is None and record.note is None
        assert 0 < record.loss_error < 1e-4 and 0 < record.error < 1e-4
    records.write(peaks.values(), tmp_path / "results.json")
    assert records.read(tmp_path / "results.json") == list(peaks.values())


def test_in_place_the_logits_become_their_gradient(cpu, monkeypatch):
    asked = []
    monkeypatch.setattr(
        memory, "fused_cross_entropy", lambda *tensors, **options: asked.append(options)
    )
    found = memory.ways(CASE, cpu)
    for name in (WHOLE_LOGITS, IN_PLACE):
        found[name].make(CASE)(*inputs_of(CASE, cpu).take(found[name]))
    assert asked == [{}, {"inplace": True}]


def test_a_wrong_way_has_no_peak_and_the_others_have(cpu, about, monkeypatch):
    few = {
        OURS: PROVIDERS[OURS],
        EAGER: Provider(
            lambda case: lambda hidden, weight, _: hidden.sum() * weight.sum(), kinds=("linear",)
        ),
    }
    monkeypatch.setattr(providers, "PROVIDERS", few)
    found = {record.provider: record for record in memory.peaks(CASE, cpu, about)}
    assert found[EAGER].peak_bytes is None and found[EAGER].note.startswith("wrong loss")
    assert found[OURS].peak_bytes and found[IN_PLACE].peak_bytes


def test_the_command_keeps_what_it_prints(ours_alone, tmp_path, capsys):
    sizes = ["--tokens", "64", "128", "--hidden-size", "8", "--vocab-size", "100"]
    assert memory.main([*sizes, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    kept = records.read(tmp_path / "results.json")
    assert [r.n_rows for r in kept if r.provider == IN_PLACE] == [64, 128]
    for record in kept:
        assert f"{record.peak_bytes / 1e6:,.1f} MB" in text


def test_peaks_have_a_table_of_their_own(peaks):
    failed = dataclasses.replace(peaks[EAGER], provider=IN_CHUNKS, peak_bytes=None, note="wrong")
    of_all = {**peaks, IN_CHUNKS: failed}
    lines = report.section(list(of_all.values())).splitlines()
    (row,) = [line for line in lines if line.startswith("| head and loss |")]
    (head,) = [line for line in lines if line.startswith("| memory, MB |")]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["tokens"] == "2,048" and cells["eager PyTorch"] == "12"
    assert cells["ours, whole logits"] == "8" and row.endswith("| failed |")
    assert not [line for line in lines if line.startswith("| memory |")]
    timed = dataclasses.replace(peaks[OURS], case="linear", ms_median=1.0)
    assert len(tables.by_case([*of_all.values(), timed])) == 2


def test_gradients_are_those_of_the_head(cpu):
    """What is measured ends with both, as a step of training does."""
    found = memory.ways(CASE, cpu)[IN_PLACE]
    results = step(found.make(CASE), *inputs_of(CASE, cpu).take(found))
    assert [tuple(tensor.shape) for tensor in results] == [(), (2048, 8), (500, 8)]
