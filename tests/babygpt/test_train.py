"""Runs: what they leave, and that they can be stopped and continued anywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fused_ce.babygpt import data as batches
from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.checkpoint import load_checkpoint, newest_checkpoint
from fused_ce.babygpt.config import TrainConfig
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.record import Record
from fused_ce.babygpt.train import Run, train

CPU = torch.device("cpu")


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(row["step"], row["train"], row["val"], row["lr"]) for row in rows(folder)]


def test_a_run_leaves_its_files(config):
    assert train(config)
    names = {path.name for path in config.out.iterdir()}
    assert names == {"last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors"}
    for row in rows(config.out):
        assert set(row) == {"step", "train", "val", "lr", "tokens_per_s", "peak_memory_bytes"}
    assert [row["step"] for row in rows(config.out)] == [0, 10, 20]
    assert rows(config.out)[1]["tokens_per_s"] > 0
    assert rows(config.out)[1]["peak_memory_bytes"] > 2**20


def test_the_loss_falls(config):
    train(replace(config, max_steps=100, dropout=0.0, decay_steps=100))
    first, *_, last = rows(config.out)
    assert last["train"] < first["train"] - 0.5 and last["val"] < first["val"] - 0.5


def test_the_last_step_is_evaluated_when_no_interval_ends_there(config):
    train(replace(config, max_steps=13))
    assert [row["step"] for row in rows(config.out)] == [0, 10, 13]


def test_the_log_has_the_rate_of_the_next_step(config):
    train(replace(config, eval_interval=5))
    assert [row["lr"] for row in rows(config.out)] == pytest.approx([0, 1e-2, 5.5e-3, 1e-3, 1e-3])


def test_best_is_the_checkpoint_with_the_lowest_val(config):
    # A rate that is far too large: the last evaluation is not the best.
    train(replace(config, lr=1.0, min_lr=1.0, max_steps=30))
    best = min(rows(config.out), key=lambda row: row["val"])
    assert load_checkpoint(config.out / "best.pt")["step"] == best["step"]
    assert load_checkpoint(config.out / "last.pt")["step"] == 30 != best["step"]


def test_training_draws_through_get_batch(config, monkeypatch):
    drawn = []
    get_batch = batches.get_batch

    def observed(data, batch_size, block_size, **kwargs):
        drawn.append((len(data), batch_size, block_size))
        return get_batch(data, batch_size, block_size, **kwargs)

    monkeypatch.setattr(batches, "get_batch", observed)
    train(replace(config, max_steps=5, eval_iters=1))
    assert drawn == [(3600, 4, 16), (400, 4, 16)] + [(3600, 4, 16)] * 6 + [(400, 4, 16)]


def test_evaluation_does_not_change_the_run(config):
    train(config)
    often = replace(config, eval_interval=1, eval_iters=7, out=config.out.parent / "often")
    train(often)
    assert weights(often.out) == weights(config.out)


def test_the_seed_decides_the_run(config):
    train(config)
    same, other = config.out.parent / "same", config.out.parent / "other"
    train(replace(config, out=same))
    train(replace(config, out=other, seed=2))
    assert weights(same) == weights(config.out) != weights(other)


def test_fused_and_torch_losses_give_the_same_curve(config):
    config = replace(config, max_steps=200, dropout=0.0, lr=1e-3, warmup_steps=10, decay_steps=200)
    dataset = load_dataset(config.data)
    curves = []
    for loss in ("fused", "torch"):
        run = Run(replace(config, loss=loss), dataset, CPU)
        curves.append(torch.stack([run.advance() for _ in range(200)]))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.3


@pytest.mark.parametrize("stop", [6, 10, 13], ids=["in-warm-up", "at-an-evaluation", "in-decay"])
def test_an_extended_run_is_the_uninterrupted_one_bit_for_bit(config, stop):
    train(config)
    parts = replace(config, out=config.out.parent / "parts")
    train(replace(parts, max_steps=stop))
    train(parts, newest_checkpoint(parts.out)[0])
    assert weights(parts.out) == weights(config.out)
    whole = losses(config.out)
    assert [row for row in losses(parts.out) if row in whole] == whole


def test_a_run_that_was_killed_continues_from_its_last_checkpoint(config, monkeypatch):
    train(config)
    killed = replace(config, out=config.out.parent / "killed")
    advance = Run.advance

    def fail(run):
        if run.step == 12:  # after the evaluation at 10, with last.pt of step 7
            raise MemoryError
        return advance(run)

    monkeypatch.setattr(Run, "advance", fail)
    with pytest.raises(MemoryError):
        train(killed)
    monkeypatch.undo()
    (killed.out / "best.pt").unlink()
    with open(killed.out / "log.jsonl", "a") as log:
        log.write('{"step": 11, "tr')  # torn by the crash
    saved, _ = newest_checkpoint(killed.out)
    assert saved["step"] == 7
    train(killed, saved)
    assert weights(killed.out) == weights(config.out)
    assert losses(killed.out) == losses(config.out)


def test_the_newest_checkpoint_counts_not_its_name(config):
    train(replace(config, max_steps=10))
    (config.out / "last.pt").rename(config.out / "best.pt")
    train(replace(config, max_steps=5, out=config.out.parent / "older"))
    (config.out.parent / "older" / "last.pt").rename(config.out / "last.pt")
    assert newest_checkpoint(config.out)[0]["step"] == 10


def test_a_run_does_not_continue_on_another_text(config, text_file):
    train(config)
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(UserError, match="not what the run began with"):
        train(replace(config, max_steps=30), newest_checkpoint(config.out)[0])


def test_a_new_run_replaces_an_old_one(config, capsys):
    train(config)
    before = weights(config.out)
    (config.out / "note.txt").write_text("mine")
    train(replace(config, max_steps=10, seed=3))
    assert "replacing the run" in capsys.readouterr().out
    assert [row["step"] for row in rows(config.out)] == [0, 10]
    assert load_checkpoint(config.out / "best.pt")["config"]["seed"] == 3
    assert weights(config.out) != before
    assert (config.out / "note.txt").exists()


def test_an_old_run_survives_a_new_one_that_cannot_begin(config):
    train(config)
    before = weights(config.out)
    with pytest.raises(UserError, match="--block-size 400 needs at least 401 characters"):
        train(replace(config, block_size=400))
    assert weights(config.out) == before


def test_a_gradient_that_is_not_finite_stops_the_run(config, monkeypatch):
    advance = Run.advance

    def poison(run):
        if run.step == 8:
            with torch.no_grad():
                run.model.head.weight[0] = torch.inf
        return advance(run)

    monkeypatch.setattr(Run, "advance", poison)
    with pytest.raises(UserError, match="before step 9: the gradient is not finite"):
        train(config)
    assert load_checkpoint(config.out / "last.pt")["step"] == 7


def test_clip_bounds_the_norm_of_the_gradient(config):
    run = Run(replace(config, clip=1e-3), load_dataset(config.data), CPU)
    run.advance()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_curve_is_a_picture(config):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    train(config)
    pixels = matplotlib_image.imread(config.out / "loss.png")
    assert min(pixels.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 2


def test_the_weights_are_those_of_the_last_step(config):
    from safetensors.torch import load_file

    train(config)
    saved = load_checkpoint(config.out / "last.pt")["model"]
    loaded = load_file(config.out / "weights.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_tied_weights_train_and_continue(config):
    config = replace(config, tie_weights=True)
    train(config)
    parts = replace(config, out=config.out.parent / "parts")
    train(replace(parts, max_steps=9))
    train(parts, newest_checkpoint(parts.out)[0])
    assert weights(parts.out) == weights(config.out)


def test_a_log_is_kept_up_to_the_step_of_the_checkpoint(tmp_path):
    record = Record(tmp_path / "log.jsonl")
    for step in (0, 10, 20):
        record.append({"step": step})
    kept = Record(tmp_path / "log.jsonl", until_step=12)
    assert kept.has(10) and not kept.has(0)
    assert rows(tmp_path) == [{"step": 0}, {"step": 10}]


def test_device_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_module.resolve_device("auto") == CPU
    with pytest.raises(UserError, match="--device cuda needs a GPU"):
        train_module.resolve_device("cuda")


def test_ctrl_c_saves_and_the_run_continues_bit_for_bit(config, flags):
    command = [sys.executable, "-m", "fused_ce.babygpt", "train", "--out", str(config.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*flags, "--max-steps", "2000"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    log = config.out / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in out and "Traceback" not in err
    stopped = load_checkpoint(config.out / "last.pt")["step"]
    assert 30 <= stopped < 2000
    end = stopped + 25
    saved, _ = newest_checkpoint(config.out)
    train(replace(config, max_steps=end), saved)
    whole = replace(config, out=config.out.parent / "whole", max_steps=end)
    train(whole)
    assert weights(config.out) == weights(whole.out)


@pytest.mark.slow
def test_the_quick_preset_reaches_1_75_on_pydocs(tmp_path, one_thread):
    torch.set_num_threads(os.cpu_count())
    train(TrainConfig(out=tmp_path / "quick"))
    assert rows(tmp_path / "quick")[-1]["val"] < 1.75
