"""Runs that were stopped, killed or extended are the uninterrupted ones, bit for bit."""

import json
import mmap
import os
import random
import re
import resource
import signal
import time
from dataclasses import replace

import pytest

from fused_ce.babygpt.__main__ import main
from fused_ce.babygpt.checkpoint import load_checkpoint, newest_checkpoint
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.record import Record
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.train import train
from tests.babygpt.processes import fork, wait, wait_for_rows, wait_until


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(row["step"], row["train"], row["val"], row["lr"]) for row in rows(folder)]


@pytest.mark.parametrize("stop", [6, 10, 13], ids=["in-warm-up", "at-an-evaluation", "in-decay"])
def test_an_extended_run_is_the_uninterrupted_one_bit_for_bit(config, folder, stop):
    parts = replace(config, out=config.out.parent / "parts")
    train(replace(parts, max_steps=stop))
    train(parts, newest_checkpoint(parts.out)[0])
    assert weights(parts.out) == weights(config.out)
    whole = losses(config.out)
    assert [row for row in losses(parts.out) if row in whole] == whole


def test_a_run_that_was_killed_continues_from_its_last_checkpoint(config, folder, monkeypatch):
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


def test_a_run_does_not_continue_on_another_text(config, folder, text_file):
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(UserError, match="not what the run began with"):
        train(replace(config, max_steps=30), newest_checkpoint(config.out)[0])


@pytest.mark.parametrize("loss", ["fused", "linear"])
def test_tied_weights_train_and_continue(config, loss):
    config = replace(config, tie_weights=True, loss=loss)
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


def test_ctrl_c_saves_and_the_run_continues_bit_for_bit(config, flags, tmp_path):
    words = ["train", *flags, "--out", str(config.out), "--max-steps", "20000"]
    pid = fork(lambda: main(words), tmp_path / "printed")
    wait_for_rows(config.out, 4)
    os.kill(pid, signal.SIGINT)
    wait([pid], status=130)
    printed = (tmp_path / "printed").read_text()
    assert "stopped at step" in printed and "Traceback" not in printed
    stopped = load_checkpoint(config.out / "last.pt")["step"]
    assert 30 <= stopped < 20_000
    end = stopped + 25
    saved, _ = newest_checkpoint(config.out)
    train(replace(config, max_steps=end), saved)
    whole = replace(config, out=config.out.parent / "whole", max_steps=end)
    train(whole)
    assert weights(config.out) == weights(whole.out)


@pytest.mark.parametrize(
    "dtype, loss", [("bfloat16", "fused"), ("float16", "fused"), ("bfloat16", "linear")]
)
def test_half_precision_learns_and_continues_bit_for_bit(config, dtype, loss):
    config = replace(config, dtype=dtype, loss=loss, dropout=0.0, max_steps=40, decay_steps=40)
    train(config)
    first, *_, last = rows(config.out)
    assert last["val"] < first["val"] - 0.3
    parts = replace(config, out=config.out.parent / "parts")
    train(replace(parts, max_steps=13))
    train(parts, newest_checkpoint(parts.out)[0])
    assert weights(parts.out) == weights(config.out)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(config, folder, tmp_path):
    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return main(
            ["train", "--resume", "--out", str(config.out), "--max-steps", "30"]
            + ["--data", config.data]
        )

    wait([fork(fill_the_disk, tmp_path / "printed")], status=1)
    printed = (tmp_path / "printed").read_text()
    assert re.search("^error: .*File too large$", printed, re.MULTILINE)
    assert "Traceback" not in printed
    assert load_checkpoint(config.out / "last.pt")["step"] == 20


def test_kill_at_any_moment_loses_at_most_the_checkpoint_interval(config, tmp_path):
    """kill -9, a dozen times; the run that is left is the uninterrupted one bit for bit.

    Some steps after the last kill, and not some seconds: a machine may be busy. And a moment later,
    which is anywhere in a step or a checkpoint; sometimes it is before the first step.
    """
    whole = replace(
        config, max_steps=80, eval_interval=20, checkpoint_interval=2, out=tmp_path / "whole"
    )
    began = time.perf_counter()
    train(whole)
    step_s = (time.perf_counter() - began) / 80
    config = replace(whole, out=tmp_path / "killed")
    steps = mmap.mmap(-1, 8)  # shared with the processes: the step that the run has reached
    advance = Run.advance

    def reached():
        return int.from_bytes(steps[:8], "little")

    def advance_and_tell(run):
        loss = advance(run)
        steps[:8] = run.step.to_bytes(8, "little")
        return loss

    def go_on():
        Run.advance = advance_and_tell
        saved = newest_checkpoint(config.out)[0] if (config.out / "best.pt").exists() else None
        train(config, saved)

    choose = random.Random(0)
    kills = 0
    for _ in range(12):
        goal = min(80, reached() + choose.randint(0, 6))
        pid = fork(go_on)
        wait_until(lambda goal=goal: reached() >= goal, f"step {goal}")
        time.sleep(choose.uniform(0, 2 * step_s))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        for path in config.out.glob("*.pt"):
            load_checkpoint(path)
        if reached():
            assert reached() - newest_checkpoint(config.out)[0]["step"] <= 2
    assert kills >= 3
    wait([fork(go_on)])
    assert weights(config.out) == weights(whole.out)
    assert losses(config.out) == losses(whole.out)
    assert not list(config.out.glob(".*.tmp"))
