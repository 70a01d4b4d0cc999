"""Several processes, several micro-batches: the same step as one of each."""

import importlib
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fused_ce.babygpt import data as batches
from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.checkpoint import load_checkpoint, newest_checkpoint
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.distributed import World, full_state, world
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.model import IGNORED
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.train import train
from tests.babygpt.processes import fork, in_processes, wait, wait_for_rows

STEPS = 5
ROWS = 8
KINDS = [
    pytest.param({}, id="ddp"),
    pytest.param({"fsdp": True}, id="fsdp"),
    pytest.param({"loss": "linear"}, id="ddp-linear"),
    pytest.param({"fsdp": True, "loss": "linear"}, id="fsdp-linear"),
]


@pytest.fixture
def unevenly_ignored(config, monkeypatch):
    """Each step of a run takes its share of 8 windows, which count 16, 14, ... and 2 tokens."""
    size = config.block_size
    tokens = torch.from_numpy(load_dataset(config.data).splits["train"].astype("int64"))
    x = tokens[: STEPS * ROWS * size].view(STEPS, ROWS, size)
    y = tokens[1 : STEPS * ROWS * size + 1].view(STEPS, ROWS, size).clone()
    for row in range(ROWS):
        y[:, row, : 2 * row] = IGNORED

    def patch(rank=0, n_processes=1):
        share = ROWS // n_processes
        taken = 0

        def take(data, batch_size, block_size, **kwargs):
            nonlocal taken
            step, start = divmod(taken, share)
            taken += batch_size
            rows = slice(rank * share + start, rank * share + start + batch_size)
            return x[step, rows], y[step, rows]

        monkeypatch.setattr(batches, "get_batch", take)

    return patch


def steps(config, world):
    """The losses of some steps, the gradient of the last, and the weights it leads to."""
    run = Run(config, load_dataset(config.data), world)
    losses = torch.stack([run.advance() for _ in range(STEPS)])
    losses = world.sum(losses) / world.size
    gradients = [p.grad for p in run.model.parameters()]
    if config.fsdp:
        gradients = [gradient.full_tensor() for gradient in gradients]
    model, _ = full_state(run.model, run.optimizer)
    return losses, torch.cat([g.flatten() for g in gradients]), model


def assert_same_steps(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=2e-6, atol=0)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5 * scale)
    for name, weight in expected[2].items():
        # AdamW's step of a gradient of 0 but for rounding is up to the rate: bound the mean
        assert (got[2][name] - weight).abs().mean() < 1e-6, name


def import_before_fork(config):
    if config.fsdp:
        importlib.import_module("torch.distributed.fsdp")
        importlib.import_module("torch.distributed.checkpoint.state_dict")


@pytest.mark.parametrize("loss", ["fused", "linear", "torch"])
def test_micro_batches_are_one_big_batch(config, unevenly_ignored, loss):
    config = replace(config, dropout=0.0, batch_size=ROWS, loss=loss, clip=math.inf)
    unevenly_ignored()
    whole = steps(config, World())
    unevenly_ignored()
    run = Run(config, load_dataset(config.data), World())
    x, y = run._draw()
    mean = F.cross_entropy(run.model(x)[0].flatten(0, 1), y.flatten(), ignore_index=IGNORED)
    assert whole[0][0].item() == pytest.approx(mean.item(), rel=1e-6)
    for grad_accum in (2, 8):
        unevenly_ignored()
        parts = replace(config, batch_size=ROWS // grad_accum, grad_accum=grad_accum)
        assert_same_steps(steps(parts, World()), whole)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_a_batch_twice_as_large(
    config, unevenly_ignored, tmp_path, kind, tied
):
    config = replace(config, dropout=0.0, batch_size=ROWS, clip=math.inf, tie_weights=tied)
    unevenly_ignored()
    whole = steps(config, World())

    def work(rank):
        unevenly_ignored(rank, 2)
        with world("cpu") as here:
            return steps(replace(config, batch_size=2, grad_accum=2, **kind), here)

    import_before_fork(replace(config, **kind))
    (first, _), (second, _) = in_processes(work, tmp_path)
    assert_same_steps(first, whole)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "kind", KINDS[:-1] + [pytest.param(*KINDS[-1].values, id=KINDS[-1].id, marks=pytest.mark.slow)]
)
def test_processes_stop_together_and_continue_bit_for_bit(config, tmp_path, kind):
    config = replace(config, grad_accum=2, tie_weights=True, out=tmp_path / "whole", **kind)
    parts = replace(config, out=tmp_path / "parts")

    def refuse(*args, **kwargs):
        raise AssertionError("only the first process writes")

    def work(rank):
        if rank == 1:
            for name in ("save_checkpoint", "atomic_file", "Record", "plot_losses"):
                setattr(train_module, name, refuse)
        finished = [train(config)]
        advance = Run.advance

        def advance_and_be_interrupted(run):
            if run.step == 8 and rank == 1:  # Ctrl-C reaches one of them
                os.kill(os.getpid(), signal.SIGINT)
            return advance(run)

        Run.advance = advance_and_be_interrupted
        finished.append(train(parts))
        Run.advance = advance
        finished.append(train(parts, newest_checkpoint(parts.out)[0]))
        return finished

    import_before_fork(config)
    (first, printed), (second, silence) = in_processes(work, tmp_path)
    assert first == second == [True, False, True]
    assert "stopped at step 9" in printed and silence == ""
    for name in ("weights.safetensors", "log.jsonl"):
        whole, resumed = ((c.out / name).read_bytes() for c in (config, parts))
        if name == "log.jsonl":
            whole, resumed = (re.sub(rb', "tokens_per_s.*', b"", text) for text in (whole, resumed))
        assert whole == resumed, name
    saved = load_checkpoint(parts.out / "last.pt")
    drawn = [generators["batches"] for generators in saved["generators"]]
    assert len(drawn) == 2 and not torch.equal(*drawn)
    if not config.fsdp:
        with pytest.raises(UserError, match="--resume needs 2 processes.*got 1"):
            train(parts, saved)


def test_processes_draw_batches_and_dropout_of_their_own(config, tmp_path):
    def work(rank):
        with world("cpu") as here:
            run = Run(config, load_dataset(config.data), here)
            return run._draw()[0], torch.rand(5), run.model.head.weight.detach()

    (first, _), (second, _) = in_processes(work, tmp_path)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    alone = Run(config, load_dataset(config.data), World())
    assert torch.equal(alone._draw()[0], first[0])


def torchrun(printed, *words):
    """Run two processes; the launcher too is forked, which spares its imports."""
    words = ["--nproc-per-node", "2", "-m", "fused_ce.babygpt", *map(str, words)]

    def launch():
        os.environ["OMP_NUM_THREADS"] = "1"
        from torch.distributed.run import main

        main(words)

    return fork(launch, printed)


def test_torchrun_trains_and_ctrl_c_saves(config, flags, tmp_path):
    words = ["train", *flags, "--max-steps", 100_000, "--out", config.out]
    pid = torchrun(tmp_path / "printed", *words)
    wait_for_rows(config.out, 3)
    os.kill(pid, signal.SIGINT)
    wait([pid], status=1)  # torchrun's own, with a traceback of its own
    printed = (tmp_path / "printed").read_text()
    stopped = int(re.search(r"stopped at step (\d+)", printed)[1])
    assert printed.count("vocabulary 28") == 1 and printed.count("Ctrl-C: finishing") == 1
    assert load_checkpoint(config.out / "last.pt")["step"] == stopped >= 20
    assert "babygpt/train.py" not in printed  # no traceback of ours


def test_a_mistake_under_torchrun_is_said_once(tmp_path):
    words = ["train", "--data", tmp_path / "none", "--out", tmp_path]
    wait([torchrun(tmp_path / "printed", *words)], status=1)
    printed = (tmp_path / "printed").read_text()
    assert len(re.findall(r"^error: .*none' does not exist$", printed, re.MULTILINE)) == 1
    assert printed.count("error: ") == 1 and "babygpt/train.py" not in printed
