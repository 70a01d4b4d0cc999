"""The command line: what a user types and reads."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fused_ce.babygpt import BabyGPT, ModelConfig
from fused_ce.babygpt import __main__ as main_module
from fused_ce.babygpt import evaluate as evaluate_module
from fused_ce.babygpt.checkpoint import load_checkpoint, load_model
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.evaluate import exact_loss


def settings(folder):
    return load_checkpoint(folder / "last.pt")["config"]


@pytest.mark.parametrize("loss", ["fused", "linear"])
def test_a_user_can_train_resume_sample_and_evaluate(babygpt, flags, tmp_path, loss):
    folder, flags = tmp_path / "run", [*flags, "--loss", loss]
    status, out, _ = babygpt("train", *flags, "--out", folder, "--max-steps", 10)
    assert status == 0 and re.search(r"step 10  train \d\.\d+  val \d\.\d+", out)
    status, out, _ = babygpt("train", *flags, "--out", folder, "--max-steps", 20, "--resume")
    assert status == 0 and "step 10 to 20" in out
    for name in ("last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors"):
        assert name in out
    status, out, _ = babygpt("sample", "--checkpoint", folder, "--prompt", "the ")
    assert status == 0 and out.startswith("the ") and len(out) == 4 + 500 + 1
    status, out, _ = babygpt("eval", "--checkpoint", folder)
    assert status == 0 and "400 characters" in out


def test_the_module_runs_as_a_program_and_the_package_imports_no_more_than_it_needs(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules); import fused_ce.babygpt; "
        "print({'tyro', 'tqdm', 'matplotlib', 'safetensors'} & (set(sys.modules) - before)); "
        "import runpy; runpy.run_module('fused_ce.babygpt', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "sample", "--checkpoint", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "set()\n"
    assert done.returncode == 1
    assert done.stderr == f"error: there is no checkpoint in {tmp_path}: no best.pt, no last.pt\n"


def test_flags_override_the_preset(babygpt, tmp_path, text_file):
    flags = ["--data", text_file, "--max-steps", 2, "--eval-iters", 1, "--out", tmp_path / "run"]
    assert babygpt("train", "--preset", "v1", *flags, "--lr", 0.5)[0] == 0
    used = settings(tmp_path / "run")
    assert used["lr"] == 0.5 and used["max_steps"] == 2
    assert used["preset"] == "v1" and used["n_layer"] == 0 and used["block_size"] == 8


def test_a_run_lies_in_runs_preset_by_default(babygpt, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert babygpt("train", "--preset", "v1", *flags, "--max-steps", 1)[0] == 0
    assert (tmp_path / "runs" / "v1" / "last.pt").exists()
    assert babygpt("train", "--preset", "v1", "--resume", "--max-steps", 2)[0] == 0
    assert load_checkpoint(tmp_path / "runs" / "v1" / "last.pt")["step"] == 2


def test_resume_takes_the_settings_of_the_run(babygpt, folder, config):
    assert babygpt("train", "--out", folder, "--resume", "--max-steps", 22)[0] == 0
    assert settings(folder)["n_embd"] == config.n_embd
    assert load_checkpoint(folder / "last.pt")["step"] == 22


def test_an_extended_run_keeps_the_end_of_its_decay(babygpt, tmp_path, text_file):
    run = ["--out", tmp_path / "run", "--data", text_file, "--eval-iters", 1]
    assert babygpt("train", "--preset", "v1", *run, "--min-lr", 1e-3, "--max-steps", 4)[0] == 0
    assert settings(tmp_path / "run")["decay_steps"] == 4
    assert babygpt("train", *run, "--resume", "--max-steps", 8, "--eval-interval", 1)[0] == 0
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in log]
    assert rates == pytest.approx([1e-2] + [1e-3] * 5)


def test_a_finished_run_has_nothing_to_resume(babygpt, folder):
    before = (folder / "log.jsonl").read_text()
    status, out, _ = babygpt("train", "--out", folder, "--resume")
    assert status == 0 and "a larger --max-steps extends" in out
    assert (folder / "log.jsonl").read_text() == before


def test_evaluation_is_exact_and_repeatable(babygpt, folder, config):
    status, out, _ = babygpt("eval", "--checkpoint", folder, "--data", config.data)
    assert babygpt("eval", "--checkpoint", folder, "--data", config.data)[1] == out
    loss = exact_loss(load_model(folder)[0], load_dataset(config.data).splits["val"])
    shown = {
        name: float(re.search(rf"^{name} +([\d.]+)", out, re.MULTILINE)[1])
        for name in ("loss", "perplexity", "bits per character")
    }
    assert shown["loss"] == pytest.approx(loss, abs=1e-4)
    assert shown["perplexity"] == pytest.approx(math.exp(loss), abs=1e-3)
    assert shown["bits per character"] == pytest.approx(loss / math.log(2), abs=1e-4)


def test_evaluation_takes_what_was_not_trained_on(babygpt, folder, tmp_path, text_file):
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(text_file.read_text())  # the same text by another name
    other.write_text(text_file.read_text()[1:])
    command = ["eval", "--checkpoint", folder, "--data"]
    for words, expected in (
        ([copy], "val split, 400 characters"),
        ([other], "all of the text, 3,999 characters"),
        ([other, "--split", "val"], "val split, 400 characters"),
        ([copy, "--split", "train"], "train split, 3,600 characters"),
        ([copy, "--split", "all"], "all of the text, 4,000 characters"),
    ):
        assert expected in babygpt(*command, *words)[1]
    other.write_text("th")
    assert babygpt(*command, other)[0] == 0
    status, _, err = babygpt(*command, other, "--split", "val")
    assert status == 1 and "at least 2 characters are needed, got 1" in err


def test_bits_per_character_count_characters_whatever_the_tokens(
    babygpt, folder, text_file, monkeypatch
):
    class Pairs:
        """Two characters are a token."""

        unit = "pair"
        pairs = sorted({text_file.read_text()[i : i + 2] for i in range(0, 4000, 2)})

        def encode(self, text):
            return np.array([self.pairs.index(text[i : i + 2]) for i in range(0, len(text), 2)])

        def decode(self, tokens):
            return "".join(self.pairs[token] for token in tokens)

    _, _, saved = load_model(folder)
    model = BabyGPT(ModelConfig(len(Pairs.pairs), 8, 1, 2, 16))
    monkeypatch.setattr(evaluate_module, "load_model", lambda folder: (model, Pairs(), saved))
    out = babygpt("eval", "--checkpoint", folder)[1]
    loss, bits = (
        float(re.search(rf"{name} +([\d.]+)", out)[1]) for name in ("loss", "bits per character")
    )
    assert loss == pytest.approx(math.log(len(Pairs.pairs)), abs=0.1)
    assert bits == pytest.approx(loss / 2 / math.log(2), abs=1e-4)


def test_evaluation_on_another_text_uses_the_vocabulary_of_the_run(babygpt, folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a lazy fox jumps over the dog " * 20)
    assert "600 characters" in babygpt("eval", "--checkpoint", folder, "--data", other)[1]
    other.write_text("a lazy fox über the ☃ " * 20, "utf-8")
    status, _, err = babygpt("eval", "--checkpoint", folder, "--data", other)
    assert status == 1 and "'ü' (U+00FC), '☃' (U+2603)" in err


def test_greedy_samples_agree_whatever_the_seed(babygpt, folder):
    greedy = ["sample", "--checkpoint", folder, "--temperature", 0, "--max-new-tokens", 40]
    assert babygpt(*greedy, "--seed", 1)[1] == babygpt(*greedy, "--seed", 2)[1]
    drawn = [*greedy, "--temperature", 1]
    assert babygpt(*drawn, "--seed", 1)[1] != babygpt(*drawn, "--seed", 2)[1]


def test_a_sample_ends_before_the_stop_text(babygpt, folder):
    command = ["sample", "--checkpoint", folder, "--prompt", "the ", "--max-new-tokens", 200]
    whole = babygpt(*command)[1]
    before = whole[4:].partition("o")[0]
    assert "o" in whole[4:] and babygpt(*command, "--stop", "o")[1] == f"the {before}\n"


@pytest.mark.parametrize("words", [["--stop", "None"], ["--stop=None"]], ids=" ".join)
def test_the_text_none_is_a_stop_text(babygpt, folder, monkeypatch, words):
    stops = []
    monkeypatch.setattr(main_module, "sample", lambda config: stops.append(config.stop))
    assert babygpt("sample", "--checkpoint", folder, *words)[0] == 0
    assert babygpt("sample", "--checkpoint", folder)[0] == 0
    assert stops == ["None", None]


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_can_be_named_instead_of_its_folder(babygpt, folder, name):
    torch.save({**load_checkpoint(folder / "last.pt"), "step": 99}, folder / "last.pt")
    out = babygpt("eval", "--checkpoint", folder / name)[1]
    assert ("at step 99" in out) == (name == "last.pt")
    status, out, _ = babygpt("sample", "--checkpoint", folder / name, "--prompt", "the ")
    assert status == 0 and out.startswith("the ")


def test_a_run_finds_its_text_from_any_folder(babygpt, flags, tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags[flags.index("--data") + 1] = text_file.name
    run = tmp_path / "run"
    assert babygpt("train", *flags, "--out", run, "--max-steps", 1)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert babygpt("train", "--resume", "--out", run, "--max-steps", 2)[0] == 0
    assert "val split" in babygpt("eval", "--checkpoint", run)[1]
    moved = text_file.rename(tmp_path / "moved.txt")
    for words in (["train", "--resume", "--out"], ["eval", "--checkpoint"]):
        status, _, err = babygpt(*words, run)
        assert status == 1 and err == (
            f"error: the run was trained on {text_file}, which does not exist: --data says where "
            "it is now\n"
        )
        assert babygpt(*words, run, "--data", moved)[0] == 0


def test_an_older_run_with_a_relative_text_names_the_real_cause(babygpt, folder):
    saved = load_checkpoint(folder / "last.pt")
    saved["config"]["data"] = "books/text.txt"
    for name in ("last.pt", "best.pt"):
        torch.save(saved, folder / name)
    for words in (["train", "--resume", "--out"], ["eval", "--checkpoint"]):
        status, _, err = babygpt(*words, folder)
        assert status == 1 and err.count("\n") == 1
        assert "trained on books/text.txt, which does not exist here: --data says where" in err


def test_several_samples_have_seeds_of_their_own(babygpt, folder):
    command = ["sample", "--checkpoint", folder, "--max-new-tokens", 40, "--seed"]
    out = babygpt(*command, 5, "--num-samples", 2)[1]
    first, second = babygpt(*command, 5)[1], babygpt(*command, 6)[1]
    assert out == f"--- sample 1 of 2, seed 5\n{first}--- sample 2 of 2, seed 6\n{second}"


def hears_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell runs in the background


def test_a_sample_can_be_interrupted_and_its_reader_may_leave(folder):
    command = [sys.executable, "-m", "fused_ce.babygpt", "sample", "--checkpoint", str(folder)]
    for signum, status in ((signal.SIGINT, 130), (None, 1)):
        process = subprocess.Popen(
            [*command, "--max-new-tokens", "1000000"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c,
        )  # fmt: skip
        try:
            process.stdout.read(5)  # it streams: there is something to read at once
            if signum is None:
                process.stdout.close()
                err = process.stderr.read()
            else:
                process.send_signal(signum)
                out, err = process.communicate(timeout=60)
                assert out.endswith("\n")
            assert process.wait(timeout=60) == status
            assert err == ("interrupted\n" if signum else "")
        finally:
            process.kill()


MISTAKES = [
    (["train", "--preset", "v9"], "--preset must be one of quick, v1, v12, gpt2, got 'v9'"),
    (["train", "--data", "missing.txt"], "'missing.txt' does not exist"),
    (["train", "--n-embd", "30", "--n-head", "4"], "--n-embd must be divisible by --n-head"),
    (["train", "--batch-size", "0"], "--batch-size must be positive, got 0"),
    (["train", "--max-steps", "-5"], "--max-steps must be positive, got -5"),
    (["train", "--lr", "nan"], "--lr must be positive, got nan"),
    (["train", "--lr", "inf"], "--lr must be finite"),
    (["train", "--clip", "0"], "--clip must be positive"),
    (["train", "--dropout", "1.5"], "--dropout must be in [0, 1), got 1.5"),
    (["train", "--min-lr", "7"], "--min-lr must be in [0, --lr], got 7.0"),
    (["train", "--warmup-steps", "9", "--decay-steps", "8"], "--decay-steps counts the warm-up"),
    (["train", "--seed", "-1"], "--seed must be in [0, 2**63), got -1"),
    (["train", "--seed", str(2**63)], "--seed must be in [0, 2**63)"),
    (["train", "--block-size", "99999999"], "--block-size 99999999 needs at least 100000000"),
    (["train", "--grad-accum", "0"], "--grad-accum must be positive, got 0"),
    (["train", "--min-vocab-size", "-1"], "--min-vocab-size must not be negative, got -1"),
    (["train", "--inplace", "--loss", "torch"], "--inplace needs --loss fused, got torch"),
    (["train", "--inplace", "--loss", "linear"], "--inplace needs --loss fused, got linear"),
    (["train", "--fsdp", "--dtype", "float16"], "--fsdp needs --dtype float32 or bfloat16"),
    (["train", "--fsdp"], "--fsdp needs the processes of torchrun"),
    (["train", "--vocab-parallel"], "--vocab-parallel needs the processes of torchrun"),
    (["train", "--vocab-parallel", "--fsdp"], "--vocab-parallel and --fsdp shard the model"),
    (["train", "--vocab-parallel", "--loss", "torch"], "needs --loss fused or linear, got torch"),
    (["train", "--vocab-parallel", "--dtype", "float16"], "--vocab-parallel needs --dtype float32"),
    (["train", "--resume", "--out", "none"], "there is no run to continue in none"),
    (["sample", "--checkpoint", "none"], "there is no checkpoint in none"),
    (["sample", "--checkpoint", "none", "--temperature", "-1"], "--temperature must be 0 or more"),
    (["sample", "--checkpoint", "none", "--top-k", "0"], "--top-k must be positive, got 0"),
    (["sample", "--checkpoint", "none", "--top-p", "0"], "--top-p must be in (0, 1], got 0.0"),
    (["sample", "--checkpoint", "none", "--stop", ""], "--stop must have a character, got ''"),
    (["sample", "--checkpoint", "none", "--num-samples", "0"], "--num-samples must be positive"),
    (["sample", "--checkpoint", "none", "--prompt", "\udcff"], "--prompt must be UTF-8 text"),
    (["train", "--tensorboard"], "--tensorboard needs TensorBoard: pip install tensorboard"),
    (["compare", "--preset", "v9"], "--preset must be one of quick, v1, v12, gpt2, got 'v9'"),
    (["compare", "--lr", "0"], "--lr must be positive, got 0.0"),
    (["compare", "--resume"], "--resume is for train"),
    (["compare", "--vocab-parallel"], "--vocab-parallel is for train"),
    (["compare", "--loss", "torch"], "--loss is for train"),
    (["compare", "--losses", "fused"], "--losses must be two or more, each once"),
    (["compare", "--losses", "torch", "torch"], "--losses must be two or more, each once"),
    (["eval", "--checkpoint", "none"], "there is no checkpoint in none"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(babygpt, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    status, _, err = babygpt(*words)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--lr", "much"],
        ["train", "--no-such-flag"],
        ["train", "--loss", "mse"],
        ["sample"],
        ["eval", "--checkpoint", ".", "--split", "test"],
        ["compare", "--losses", "fused", "mse"],
        ["walk"],
        [],
    ],
    ids=" ".join,
)
def test_a_flag_that_cannot_be_read_is_one_line(babygpt, words):
    status, _, err = babygpt(*words)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("(see --help)\n")


@pytest.mark.parametrize(
    "change", [["--n-layer", 3], ["--lr", 0.1], ["--seed", 5], ["--preset", "v12"]], ids=str
)
def test_resume_refuses_to_make_another_run(babygpt, folder, change):
    status, _, err = babygpt("train", "--out", folder, "--resume", "--max-steps", 30, *change)
    assert status == 1 and f"{change[0]} cannot change with --resume" in err


def test_a_switch_may_be_given_again_with_resume(babygpt, config, flags):
    words = ["train", *flags, "--tie-weights", "--out", config.out, "--max-steps"]
    assert babygpt(*words, 2)[0] == 0
    assert babygpt(*words, 4, "--resume")[0] == 0
    status, _, err = babygpt(*words, 6, "--resume", "--inplace")
    assert status == 1 and "--inplace cannot change with --resume: the run has False" in err


def test_resume_does_not_go_back(babygpt, folder):
    status, _, err = babygpt("train", "--out", folder, "--resume", "--max-steps", 5)
    assert status == 1 and "the run is at step 20, beyond --max-steps 5" in err


def test_a_prompt_with_unknown_characters_is_refused(babygpt, folder):
    for flag in ("--prompt", "--stop"):
        status, _, err = babygpt("sample", "--checkpoint", folder, flag, "the 诗")
        assert status == 1 and "lacks the characters '诗' (U+8BD7)" in err


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_damaged_checkpoint_is_named(babygpt, folder, command):
    (folder / "best.pt").write_bytes(b"PK\x03\x04 and no more")
    status, _, err = babygpt(command, "--checkpoint", folder)
    assert status == 1 and err == f"error: {folder / 'best.pt'} is damaged or not a checkpoint\n"


def test_help_shows_the_numbers_of_the_preset(babygpt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = babygpt("train", "--preset", "v12", "--help")
    assert status == 0 and "384" in out and os.fspath("runs/PRESET") in out
