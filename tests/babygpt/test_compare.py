"""Comparisons: what they measure, print and leave."""

import json
import sys
from dataclasses import fields, replace

import pytest

from fused_ce.babygpt import compare as compare_module
from fused_ce.babygpt import model as model_module
from fused_ce.babygpt.compare import compare, format_table
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.train import train


@pytest.fixture
def comparison(config):
    return CompareConfig(**vars(config))


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes take seconds to start; all but their memory is the same here."""
    monkeypatch.setattr(compare_module, "_train_in_a_process", train)


class Process:
    """A process that has ended."""

    def __init__(self, exitcode):
        """Say how it ended."""
        self.exitcode = exitcode

    def start(self):
        """Do nothing."""

    def join(self):
        """Do nothing."""


def test_a_user_sees_curves_times_and_memory(comparison, flags, babygpt):
    folder = comparison.out
    status, out, err = babygpt("compare", *flags, "--max-steps", 20, "--out", folder)
    assert status == 0, err
    summary = json.loads((folder / "compare.json").read_text())
    fused, torch = (summary["losses"][loss] for loss in ("fused", "torch"))
    assert summary["config"]["max_steps"] == 20 and "loss" not in summary["config"]
    assert fused["largest_difference"] == fused["largest_step_difference"] == 0
    assert torch["largest_difference"] < 1e-5 and torch["largest_step_difference"] < 1e-5
    assert format_table(summary["losses"]) in out
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    for loss in ("fused", "torch"):
        log = (folder / loss / "log.jsonl").read_text().splitlines()
        assert summary["losses"][loss]["val"] == json.loads(log[-1])["val"]
        assert len((folder / loss / "steps.jsonl").read_text().splitlines()) == 20
        assert summary["losses"][loss]["peak_memory_bytes"] > 2**20


def test_a_curve_that_goes_another_way_shows(comparison, in_this_process, monkeypatch):
    def wrong_loss(logits, targets, *rest, **options):
        return 1.01 * right_loss(logits, targets, *rest, **options)

    right_loss = model_module.LOSSES["torch"]
    monkeypatch.setitem(model_module.LOSSES, "torch", wrong_loss)
    assert compare(comparison)
    measured = json.loads((comparison.out / "compare.json").read_text())["losses"]["torch"]
    assert 0.02 < measured["largest_difference"] < 0.1
    assert 0.02 < measured["largest_step_difference"] < 0.1


def test_what_is_measured():
    def run(losses, vals):
        seconds = [9.0, 0.1, 0.3, 0.2]  # the first step is slow: it compiles, say
        return {
            "steps": [
                {"step": i, "loss": loss, "seconds": s}
                for i, (loss, s) in enumerate(zip(losses, seconds, strict=True), start=1)
            ],
            "log": [
                {"step": 2 * i, "train": 3.0, "val": val, "tokens_per_s": 100.0 * i,
                 "peak_memory_bytes": 10 + i}
                for i, val in enumerate(vals)
            ],
        }  # fmt: skip

    reference = run([4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 1.0])
    measured = compare_module._measure(run([4.0, 2.5, 2.25, 1.0], [4.0, 1.875, 1.0]), reference)
    assert measured == {
        "step_seconds": 0.25, "tokens_per_s": 150.0, "peak_memory_bytes": 12, "train": 3.0,
        "val": 1.0, "largest_step_difference": 0.5, "largest_difference": 0.125,
    }  # fmt: skip


def test_three_losses_are_three_runs_alike_but_for_the_loss(comparison, monkeypatch):
    taken = []

    def observed(config):
        taken.append(config)
        return train(replace(config, loss="torch"))

    monkeypatch.setattr(compare_module, "_train_in_a_process", observed)
    assert compare(replace(comparison, losses=("torch", "compiled", "fused"), seed=7))
    assert [config.loss for config in taken] == ["torch", "compiled", "fused"]
    assert [config.out for config in taken] == [comparison.out / config.loss for config in taken]
    for config in taken:
        assert type(config) is TrainConfig and config.seed == 7
        for field in fields(TrainConfig):
            if field.name not in ("loss", "out", "log_steps", "seed"):
                assert getattr(config, field.name) == getattr(comparison, field.name)


@pytest.mark.parametrize(
    "exitcode, status, message",
    [(1, 1, ""), (130, 130, "interrupted"), (-9, 1, "fused was killed by signal 9")],
    ids=["error", "ctrl-c", "killed"],
)
def test_a_run_that_ends_early_ends_the_comparison(
    comparison, flags, babygpt, monkeypatch, exitcode, status, message
):
    class Context:
        def Process(self, target, args):  # noqa: N802
            return Process(exitcode)

    monkeypatch.setattr(compare_module.multiprocessing, "get_context", lambda method: Context())
    ended, out, err = babygpt("compare", *flags, "--out", comparison.out)
    assert ended == status and message in err and err.count("\n") == bool(message)
    assert not (comparison.out / "compare.json").exists()


@pytest.mark.parametrize("mistake", [FileNotFoundError("gone"), KeyboardInterrupt()], ids=repr)
def test_a_process_says_what_stopped_it_without_a_traceback(comparison, monkeypatch, mistake):
    def fail(config):
        raise mistake

    monkeypatch.setattr(compare_module, "train", fail)
    with pytest.raises(SystemExit) as stop:
        compare_module._train(compare_module._run_config(comparison, "fused"))
    assert stop.value.code == ("error: gone" if isinstance(mistake, OSError) else 130)


def test_a_comparison_lies_in_a_folder_of_its_own():
    assert str(CompareConfig(preset="v1").folder) == "runs/compare-v1"


def test_the_plot_shows_each_run(comparison, in_this_process):
    image = pytest.importorskip("matplotlib.image")
    compare(comparison)
    pixels = image.imread(comparison.out / "compare.png")
    assert min(pixels.shape[:2]) > 600
    assert "matplotlib.pyplot" not in sys.modules  # no display, no state
