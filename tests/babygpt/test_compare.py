"""Comparisons: what they measure, print and leave."""

import json
import sys
from dataclasses import fields, replace

import pytest

from fused_ce.babygpt import compare as compare_module
from fused_ce.babygpt import model as model_module
from fused_ce.babygpt import plots
from fused_ce.babygpt.compare import compare, format_table
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.folder import is_ours
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
    runs = {"fused": RUNS, "torch": moved(0), "compiled": moved(2e-4)}
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


def test_the_plot_is_a_picture_of_ours(comparison, in_this_process):
    image = pytest.importorskip("matplotlib.image")
    assert compare(replace(comparison, max_steps=2, eval_interval=1, eval_iters=1))
    pixels = image.imread(comparison.out / "compare.png")
    assert min(pixels.shape[:2]) > 600
    assert is_ours(comparison.out / "compare.png") and is_ours(comparison.out / "compare.json")
    assert "matplotlib.pyplot" not in sys.modules  # no display, no state
    again = replace(comparison, max_steps=1, eval_iters=1, overwrite=True)
    assert compare(again)
    assert json.loads((comparison.out / "compare.json").read_text())["config"]["max_steps"] == 1


def test_a_comparison_whose_plot_fails_is_whole(comparison, in_this_process, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr(compare_module, "plot_comparison", fail)
    assert compare(replace(comparison, max_steps=1, eval_iters=1))
    out, err = capsys.readouterr()
    assert "warning: compare.png was not drawn: ValueError: no ink" in err
    assert out.endswith("compare.json, fused/, torch/\n")
