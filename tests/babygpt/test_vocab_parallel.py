"""A vocabulary over several processes: the run is that of one process, whoever goes on with it."""

import os
import re
import signal
from dataclasses import replace

import pytest
import torch

from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.__main__ import main
from fused_ce.babygpt.checkpoint import load_checkpoint, newest_checkpoint
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.distributed import World, count_parameters, world
from fused_ce.babygpt.errors import CheckpointError, UserError
from fused_ce.babygpt.evaluate import estimate_loss
from fused_ce.babygpt.record import read_rows
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.train import train
from tests.babygpt.processes import in_processes

STEPS = 100
# The text has 28 characters: shards of 14 and 14, or of 10, 9 and 9.
CASES = [
    pytest.param(2, {}, id="fused"),
    pytest.param(2, {"loss": "linear", "n_layer": 0}, id="linear-bias", marks=pytest.mark.slow),
    pytest.param(
        2,
        {"loss": "linear", "tie_weights": True, "grad_accum": 2},
        id="linear-tied",
        marks=pytest.mark.slow,
    ),
    pytest.param(3, {"tie_weights": True, "inplace": True}, id="tied-inplace-uneven"),
]


@pytest.fixture
def longer(config):
    """A run whose gradient is clipped at most steps, and whose rate keeps rounding small."""
    return replace(config, max_steps=STEPS, lr=3e-3, decay_steps=STEPS, clip=0.5)


def sharded_run(config, here):
    return Run(replace(config, vocab_parallel=True), load_dataset(config.data), here)


def steps(run):
    """What a run comes to: its losses, an evaluation, the logits of a text, and its state."""
    losses = torch.stack([run.advance() for _ in range(STEPS)])
    splits, size = run.dataset.splits, run.config.block_size
    estimate = estimate_loss(run.model, splits, 4, size, 3)
    idx = torch.from_numpy(splits["val"][:size].astype("int64"))[None]
    with torch.no_grad():
        logits = run.model.eval()(idx)[0]
    return losses, list(estimate.values()), logits, run.state(), count_parameters(run.model)


def assert_same_state(got, expected, atol=1e-6):
    """Names, shapes and numbers of model and optimiser."""
    assert got["model"].keys() == expected["model"].keys()
    for name, weight in expected["model"].items():
        # A key's bias has a gradient of 0 but for rounding, of which AdamW makes steps.
        bound = 1e-3 if name.endswith("query_key_value.bias") else atol
        torch.testing.assert_close(got["model"][name], weight, rtol=0, atol=bound)
    assert got["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    torch.testing.assert_close(
        got["optimizer"]["state"], expected["optimizer"]["state"], rtol=1e-3, atol=atol
    )
    assert got["step"] == expected["step"] and len(got["generators"]) == 1
    for name in ("batches", "torch"):
        assert torch.equal(got["generators"][0][name], expected["generators"][0][name])


@pytest.mark.parametrize("n, change", CASES)
def test_the_run_is_that_of_one_process(longer, tmp_path, n, change):
    config = replace(longer, **change)
    whole = steps(Run(config, load_dataset(config.data), World()))
    assert whole[2].shape == (1, config.block_size, 28)

    def work(rank):
        with world("cpu") as here:
            run = sharded_run(config, here)
            return steps(run), len(run.model.head.weight)

    of_ranks = [result for result, _ in in_processes(work, tmp_path, n)]
    assert [n_rows for _, n_rows in of_ranks] == {2: [14, 14], 3: [10, 9, 9]}[n]
    for got, _ in of_ranks:
        torch.testing.assert_close(got[0], whole[0], rtol=0, atol=2e-6)
        assert torch.equal(got[0], of_ranks[0][0][0])
        assert got[1] == pytest.approx(whole[1], abs=2e-6)
        torch.testing.assert_close(got[2], whole[2], rtol=0, atol=5e-6)
        assert got[4] == whole[4]
    assert_same_state(of_ranks[0][0][3], whole[3])


def test_bfloat16_is_that_of_one_process(longer, tmp_path):
    config = replace(longer, dtype="bfloat16", dropout=0.0)
    whole = Run(config, load_dataset(config.data), World())
    expected = torch.stack([whole.advance() for _ in range(20)])

    def work(rank):
        with world("cpu") as here:
            run = sharded_run(config, here)
            return torch.stack([run.advance() for _ in range(20)])

    for got, _ in in_processes(work, tmp_path):
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)


def test_it_stops_and_continues_bit_for_bit(config, tmp_path):
    config = replace(config, tie_weights=True, vocab_parallel=True, out=tmp_path / "whole")
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

    (first, printed), (second, silence) = in_processes(work, tmp_path)
    assert first == second == [True, False, True]
    assert "stopped at step 9" in printed and silence == ""
    assert read_rows(parts.out / "log.jsonl")[1]["step"] == 10
    for name in ("weights.safetensors", "log.jsonl"):
        whole, resumed = ((c.out / name).read_bytes() for c in (config, parts))
        if name == "log.jsonl":
            whole, resumed = (re.sub(rb', "tokens_per_s.*', b"", text) for text in (whole, resumed))
        assert whole == resumed, name


def test_two_processes_and_one_continue_each_other(config, flags, babygpt, tmp_path):
    config = replace(config, tie_weights=True)
    whole = replace(config, out=tmp_path / "whole")
    train(whole)
    words = ["train", *flags, "--tie-weights", "--out", config.out, "--max-steps"]
    assert babygpt(*words, 6)[0] == 0

    def go_on(rank):
        two = [*words, 10, "--resume", "--vocab-parallel"]
        assert main([str(word) for word in two]) == 0
        two[two.index(10)] = 13
        assert main([str(word) for word in two]) == 0  # on already, and said again

    (_, printed), _ = in_processes(go_on, tmp_path)
    assert "fused loss, vocabulary over 2 x cpu\n" in printed
    assert printed.count("a sample of the last model") == 2
    saved = load_checkpoint(config.out / "last.pt")
    tokens, head = (saved["model"][f"{name}.weight"] for name in ("token_embedding", "head"))
    assert saved["step"] == 13 and tokens.data_ptr() == head.data_ptr()
    sampled = babygpt("sample", "--checkpoint", config.out, "--max-new-tokens", 20)
    assert sampled[0] == 0 and len(sampled[1]) >= 20
    assert babygpt("eval", "--checkpoint", config.out)[0] == 0
    one = ["train", "--resume", "--out", config.out, "--max-steps", 20]
    status, _, err = babygpt(*one)
    assert (
        status == 1
        and "torchrun" in err
        and err.endswith("; --no-vocab-parallel goes on without\n")
    )
    assert babygpt(*one, "--no-vocab-parallel")[0] == 0
    got, expected = (load_checkpoint(c.out / "last.pt") for c in (config, whole))
    assert_same_state(got, expected, atol=1e-5)


def test_copies_stay_equal_where_their_gradients_do_not(config, tmp_path):
    """As on GPUs, whose sums have no fixed order."""

    def work(rank):
        with world("cpu") as here:
            run = sharded_run(config, here)
            for parameter in run.model.blocks.parameters():
                parameter.register_hook(lambda gradient: gradient * (1 + rank * 1e-3))
            losses = [run.advance() for _ in range(3)]
            return losses, run.model.blocks.state_dict()

    (first, _), (second, _) = in_processes(work, tmp_path)
    assert first[0] == second[0]
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name


def test_blocks_alone_are_compiled(config, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))

    def work(rank):
        with world("cpu") as here:
            return compiled == list(sharded_run(replace(config, compile=True), here).model.blocks)

    assert in_processes(work, tmp_path, 1)[0][0]


def test_what_cannot_be_is_refused(config, folder, tmp_path):
    saved = load_checkpoint(folder / "last.pt")

    def work(rank):
        said = []
        with world("cpu") as here:
            run = sharded_run(config, here)
            run.restore(saved)
            state = saved["optimizer"]["state"]
            foreign = {**saved["optimizer"], "state": {**state, len(state): state[0]}}
            with pytest.raises(CheckpointError, match="does not fit"):
                run.restore({**saved, "optimizer": foreign})
            alone = replace(config, vocab_parallel=False)
            for one, of in ((run, 2), (Run(alone, run.dataset, here), 1)):
                with pytest.raises(UserError) as refused:
                    one.restore({**saved, "generators": saved["generators"] * of})
                said.append(str(refused.value))
            with pytest.raises(UserError) as refused:
                few = replace(here, size=29)
                sharded_run(config, few)
            return [*said, str(refused.value)]

    for said, _ in in_processes(work, tmp_path):
        assert said == [
            "--vocab-parallel cannot continue a run of 2 processes that drew batches of their own",
            "--resume needs 1 process, as the run began with, got 2",
            "--vocab-parallel needs a token for each process, got 28 tokens and 29 processes",
        ]
