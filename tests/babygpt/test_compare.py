"""Comparisons: what they measure, print and leave."""

import json
import sys
from dataclasses import fields, replace

import pytest
import torch

from fused_ce.babygpt import compare as compare_module
from fused_ce.babygpt import data as data_module
from fused_ce.babygpt import model as model_module
from fused_ce.babygpt import plots
from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.compare import compare, format_table
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.device import peak_memory_bytes
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.folder import is_ours
from fused_ce.babygpt.train import train


@pytest.fixture
def comparison(config):
    return replace(CompareConfig(**vars(config)), max_steps=4, eval_interval=2, eval_iters=1)


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes take seconds to start; all but their memory is the same here.

    A picture takes as long as a small run; what a run leaves has tests of its own.
    """
    monkeypatch.setattr(compare_module, "_train_in_a_process", train)
    monkeypatch.setattr(train_module, "plot_losses", lambda *args: None)


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(compare_module, "plot_comparison", lambda *args: None)


class Process:
    """A process that has ended."""

    def __init__(self, exitcode):
        """Say how it ended."""
        self.exitcode = exitcode

    def start(self):
        """Do nothing."""

    def join(self):
        """Do nothing."""


def test_a_user_sees_curves_times_and_memory(comparison, flags, babygpt, in_this_process):
    folder, before = comparison.out, set(sys.modules)
    status, out, err = babygpt("compare", *flags, "--max-steps", 20, "--out", folder)
    assert status == 0, err
    summary = json.loads((folder / "compare.json").read_text())
    fused, *others = (summary["losses"][loss] for loss in ("fused", "linear", "torch"))
    assert summary["config"]["max_steps"] == 20 and "loss" not in summary["config"]
    assert fused["largest_difference"] == fused["largest_step_difference"] == 0
    for other in others:
        assert other["largest_difference"] < 1e-5 and other["largest_step_difference"] < 1e-5
    assert format_table(summary["losses"]) in out
    pixels = pytest.importorskip("matplotlib.image").imread(folder / "compare.png")
    assert min(pixels.shape[:2]) > 600
    assert is_ours(folder / "compare.png") and is_ours(folder / "compare.json")
    assert "matplotlib.pyplot" not in set(sys.modules) - before  # no display, no state
    for loss in ("fused", "linear", "torch"):
        log = (folder / loss / "log.jsonl").read_text().splitlines()
        assert summary["losses"][loss]["val"] == json.loads(log[-1])["val"]
        assert len((folder / loss / "steps.jsonl").read_text().splitlines()) == 20
        assert summary["losses"][loss]["peak_memory_bytes"] > 2**20


def test_a_run_is_a_process_whose_peak_of_memory_is_its_own(comparison):
    """It imports what this process has imported, but not what this process held since."""
    ballast = torch.ones(2**27)  # 512 MiB
    peak = peak_memory_bytes(ballast.device)
    assert peak > ballast.nbytes
    run = compare_module._run_config(replace(comparison, max_steps=1), "linear")
    assert compare_module._train_in_a_process(run)
    (_, last) = compare_module._read_run(run.out)["log"]
    assert 2**26 < last["peak_memory_bytes"] < peak - ballast.nbytes // 2


def test_no_run_has_the_tokenizer_to_learn(comparison, no_picture, monkeypatch):
    """Which takes more memory than a small run, and would be the first one's alone."""

    def observed(config):
        monkeypatch.setattr(data_module, "train_tokenizer", None)  # it was called before
        return train(config)

    monkeypatch.setattr(compare_module, "_train_in_a_process", observed)
    assert compare(replace(comparison, tokenizer="bpe", bpe_vocab_size=300))


def test_a_curve_that_goes_another_way_shows(comparison, in_this_process, no_picture, monkeypatch):
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


def test_four_losses_are_four_runs_alike_but_for_the_loss(
    comparison, in_this_process, no_picture, monkeypatch
):
    taken = []

    def observed(config):
        taken.append(config)
        return train(replace(config, loss="torch"))

    monkeypatch.setattr(compare_module, "_train_in_a_process", observed)
    losses = ("torch", "compiled", "fused", "linear")
    assert compare(replace(comparison, losses=losses, seed=7))
    assert [config.loss for config in taken] == list(losses)
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


RUNS = {
    "steps": [{"step": i, "loss": 4 - i / 10} for i in range(1, 5)],
    "log": [{"step": 2 * i, "val": 4 - i / 5} for i in range(3)],
}
MEASURED = {"step_seconds": 0.1, "peak_memory_bytes": 2**30}


@pytest.fixture
def drawn(monkeypatch):
    """What would be written to a file: the figure, drawn."""
    figures = []

    def draw(figure, path):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(plots, "_save", draw)
    return figures


def moved(by):
    """A run whose losses are larger by so much."""
    return {
        name: [
            {key: value + by * (key != "step") for key, value in row.items()} for row in RUNS[name]
        ]
        for name in RUNS
    }


@pytest.mark.parametrize("kind, unit", [("chars", "character"), ("bpe", "token")])
def test_a_plot_says_what_is_compared_and_in_which_unit(comparison, drawn, kind, unit):
    comparison = replace(comparison, tokenizer=kind, data="/texts/moby $5$.txt", preset="v1")
    runs = {"fused": RUNS, "linear": moved(0), "torch": moved(1e-6), "compiled": moved(2e-4)}
    plots.plot_comparison(runs, dict.fromkeys(runs, MEASURED), comparison, None)
    plots.plot_losses([{"step": 0, "train": 4.0, "val": 4.0}], comparison, None)
    (figure, losses) = drawn
    curves, differences = figure.axes[0], figure.axes[2]
    assert figure.get_suptitle() == losses.axes[0].get_title() == r"BabyGPT v1 on moby \$5\$.txt"
    assert curves.get_ylabel() == f"val loss (nats per {unit})"
    assert losses.axes[0].get_ylabel() == f"loss (nats per {unit})"
    for axes in (curves, differences):
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 > axes.get_window_extent().x1  # beside the curves, not on them
        assert legend.x1 < figure.axes[1].get_tightbbox().x0
    for axes in (figure.axes[1], figure.axes[3]):
        names = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(names) == 4
        assert all(left.x1 + 5 < right.x0 for left, right in zip(names, names[1:], strict=False))


@pytest.mark.parametrize("apart", [0.0, 3e-7, 5e-3, 2.0, float("nan")])
def test_differences_can_be_read_off(comparison, drawn, apart):
    runs = {"fused": RUNS, "torch": moved(apart)}
    plots.plot_comparison(runs, dict.fromkeys(runs, MEASURED), comparison, None)
    axes = drawn[0].axes[2]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{tick:.0e}" if tick else "0" for tick in axes.get_yticks()]
    assert 3 <= len(labels) <= 11 and labels[0] == "0"
    assert axes.get_ylim()[0] == 0 and not axes.get_ylim()[1] <= apart
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(low.y1 < high.y0 for low, high in zip(boxes, boxes[1:], strict=False))


def test_a_comparison_of_what_has_diverged_is_not_a_number():
    nan = float("nan")
    assert compare_module._largest([0.0, nan, 1.0]) != compare_module._largest([0.0, nan, 1.0])
    assert compare_module._largest([0.0, 1.0]) == 1.0


def test_a_comparison_replaces_one_of_ours_when_told_to(comparison, in_this_process, no_picture):
    assert compare(replace(comparison, max_steps=1))
    with pytest.raises(UserError, match="holds a run already"):
        compare(comparison)
    assert compare(replace(comparison, max_steps=2, overwrite=True))
    assert json.loads((comparison.out / "compare.json").read_text())["config"]["max_steps"] == 2


def test_a_comparison_whose_plot_fails_is_whole(comparison, in_this_process, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr(compare_module, "plot_comparison", fail)
    assert compare(replace(comparison, max_steps=1))
    out, err = capsys.readouterr()
    assert "warning: compare.png was not drawn: ValueError: no ink" in err
    assert out.endswith("compare.json, fused/, linear/, torch/\n")
