"""What is missing or strange around a run is worked around, or one line; the run is never lost."""

import io
import json
import math
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_ce.babygpt import surroundings
from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.__main__ import _complaint, main
from fused_ce.babygpt.checkpoint import load_checkpoint
from fused_ce.babygpt.data import load_dataset
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.folder import RUN_FILES
from fused_ce.babygpt.record import Record, read_rows, to_json
from fused_ce.babygpt.run import Run
from fused_ce.babygpt.train import train
from tests.babygpt.processes import fork, wait


@pytest.fixture
def short(config):
    return replace(config, max_steps=2, eval_interval=2, eval_iters=1)


def names(folder):
    return {path.name for path in folder.iterdir()}


def forget_matplotlib():
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]


def test_a_run_is_drawn_whatever_backend_a_notebook_names(short, tmp_path):
    backend = "module://matplotlib_inline.backend_inline"  # where it is not installed, no backend

    def work():
        os.environ["MPLBACKEND"] = backend
        forget_matplotlib()
        train(short)
        assert os.environ["MPLBACKEND"] == backend and "matplotlib.pyplot" not in sys.modules

    wait([fork(work, tmp_path / "printed")])
    assert names(short.out) == set(RUN_FILES)
    assert "warning" not in (tmp_path / "printed").read_text()


@pytest.mark.parametrize(
    "error", [RuntimeError("no\nink"), ImportError("no module"), OSError("full")], ids=repr
)
def test_a_plot_that_fails_is_a_warning_and_the_run_is_whole(short, monkeypatch, capsys, error):
    def fail(rows, config, path):
        assert names(short.out) >= {"last.pt", "best.pt", "log.jsonl", "weights.safetensors"}
        assert load_checkpoint(short.out / "last.pt")["step"] == 2
        raise error

    monkeypatch.setattr(train_module, "plot_losses", fail)
    assert train(short)
    out, err = capsys.readouterr()
    assert err.startswith("warning: loss.png was not drawn: ") and err.count("\n") == 1
    assert "a sample of the last model" in out
    assert out.endswith("last.pt, best.pt, log.jsonl, weights.safetensors\n")


def test_a_sample_that_fails_is_a_warning_and_the_run_is_whole(short, monkeypatch, capsys):
    def fail(*args, **kwargs):
        assert names(short.out) == set(RUN_FILES)
        raise UnicodeEncodeError("ascii", "é", 0, 1, "a terminal that lacks it")

    monkeypatch.setattr(train_module, "stream", fail)
    assert train(short)
    assert "warning: no sample was drawn: UnicodeEncodeError" in capsys.readouterr().err


def test_ctrl_c_while_plotting_ends_at_once_and_the_run_is_saved(short, monkeypatch, capsys):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        train_module, "plot_losses", lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            train(short)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert load_checkpoint(short.out / "last.pt")["step"] == 2
    assert "Ctrl-C" not in capsys.readouterr().err


def test_a_run_in_a_thread_works_and_leaves_the_signals_alone(short):
    finished, handler = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: finished.append(train(short)))
    thread.start()
    thread.join()
    assert finished == [True] and names(short.out) == set(RUN_FILES)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_program_runs_with_its_streams_closed(folder):
    """In a process of its own: what is closed must be so when Python starts."""
    command = f'"{sys.executable}" -m fused_ce.babygpt sample --checkpoint "{folder}" >&- 2>&- <&-'
    assert subprocess.run(command, shell=True).returncode == 0


@pytest.mark.parametrize("missing", [("stdout",), ("stderr",), ("stdout", "stderr")], ids=str)
@pytest.mark.parametrize("through", ["main", "train"])
def test_a_run_needs_no_standard_streams(short, flags, monkeypatch, missing, through):
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    words = [*flags, "--out", str(short.out), "--max-steps", "2"]
    assert main(["train", *words]) == 0 if through == "main" else train(short)
    assert names(short.out) == set(RUN_FILES)


def test_output_can_go_to_a_string(short, flags, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    words = [*flags, "--out", str(short.out), "--max-steps", "2"]
    assert main(["train", *words]) == 0
    assert "step 2" in out.getvalue() and out.getvalue().rstrip().endswith("weights.safetensors")
    assert main(["train", *words]) == 1
    assert err.getvalue().count("error: ") == 1


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user whom passwd does not know, without HOME and without FUSED_CE_CACHE."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(surroundings.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("FUSED_CE_CACHE")
    monkeypatch.setenv("HOME", "to be restored")
    monkeypatch.delenv("HOME")
    return tmp_path / f"fused-ce-{os.getuid()}"


def test_a_user_without_a_home_gets_a_temporary_one(nobody, short, flags, babygpt):
    status, out, err = babygpt("train", *flags, "--out", short.out, "--max-steps", 1)
    assert status == 0 and names(short.out) == set(RUN_FILES)
    assert err.count("\n") == 1 and f"no home folder: caches go to {nobody}" in err
    assert nobody.stat().st_mode & 0o077 == 0 and (nobody / ".cache/fused-ce/tokens").exists()


@pytest.mark.parametrize("trap", ["link", "open to all"])
def test_a_temporary_home_that_others_can_write_is_not_used(nobody, tmp_path, trap):
    if trap == "link":
        nobody.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
    else:
        nobody.mkdir()
        nobody.chmod(0o777)
    surroundings.prepare_process()
    home = Path(os.environ["HOME"])
    assert home != nobody and home.parent == tmp_path and home.stat().st_mode & 0o077 == 0


def test_a_library_call_without_a_home_is_told_what_to_set(nobody, text_file):
    with pytest.raises(UserError, match="no home folder.*FUSED_CE_CACHE"):
        load_dataset(str(text_file))


class InductorError(RuntimeError):
    """PyTorch's, as `torch._inductor.exc` raises it."""


InductorError.__module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    "error, message",
    [
        (
            InductorError("InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')\n\n"),
            "{flag} needs a C\\+\\+ compiler",
        ),
        (InductorError("CppCompileError: Python.h\n\nmuch more"), "{flag} failed: .*Python.h$"),
        (RuntimeError("Failed to find C compiler. Please specify"), "Triton needs a C compiler"),
    ],
    ids=["none", "it-fails", "triton"],
)
@pytest.mark.parametrize(
    "change, flag",
    [({"compile": True}, "--compile"), ({"loss": "compiled"}, "--loss compiled")],
    ids=["compile", "loss-compiled"],
)
def test_a_missing_compiler_is_one_line(config, error, message, change, flag):
    with pytest.raises(UserError, match=message.format(flag=flag)):
        with surroundings.explained(replace(config, **change)):
            raise error
    if isinstance(error, InductorError):
        with pytest.raises(InductorError), surroundings.explained(config):
            raise error


def test_what_pytorch_says_without_a_compiler_is_understood(short, monkeypatch):
    inductor = pytest.importorskip("torch._inductor.cpp_builder")
    exc = pytest.importorskip("torch._inductor.exc")

    def none(*args, **kwargs):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(inductor, "get_cpp_compiler", none)
    torch.compiler.reset()
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler"):
        train(replace(short, n_layer=0, compile=True))


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_log_is_json_after_a_divergence(short, monkeypatch, capsys):
    config = replace(short, log_steps=True, max_steps=4)
    evaluate = train_module._evaluate

    def diverged(run, tokens_per_s):
        row = evaluate(run, tokens_per_s)
        return row | {"val": math.nan, "train": math.inf} if run.step else row

    monkeypatch.setattr(train_module, "_evaluate", diverged)
    assert train(config)
    out, err = capsys.readouterr()
    assert re.search(r"best val 3\.\d+ at step 0", out) and "warning" not in err
    lines = (config.out / "log.jsonl").read_text().splitlines()
    assert [strict(line)["val"] is None for line in lines] == [False, True, True]
    rows = read_rows(config.out / "log.jsonl")
    assert math.isnan(rows[-1]["val"]) and math.isnan(rows[-1]["train"])
    saved = load_checkpoint(config.out / "last.pt")
    monkeypatch.undo()
    assert train(replace(config, max_steps=6), saved)  # its log has the rows from before
    assert [row["step"] for row in read_rows(config.out / "log.jsonl")] == [0, 2, 4, 6]


def test_numbers_that_are_not_finite_are_null_wherever_they_are(tmp_path):
    value = {"losses": {"a": [1.5, math.nan]}, "clip": math.inf, "text": "NaN", "n": -math.inf}
    assert strict(to_json(value)) == {
        "losses": {"a": [1.5, None]}, "clip": None, "text": "NaN", "n": None,
    }  # fmt: skip
    (tmp_path / "log.jsonl").write_text('{"step": 0, "val": NaN}\n')  # of an older run
    assert Record(tmp_path / "log.jsonl", until_step=0).has(0)
    assert strict((tmp_path / "log.jsonl").read_text()) == {"step": 0, "val": None}


def test_a_model_that_has_diverged_is_saved_before_it_is_said(short, monkeypatch):
    advance = Run.advance

    def diverge(run):
        loss = advance(run)
        with torch.no_grad():
            run.model.head.weight.fill_(math.nan)
        return loss

    monkeypatch.setattr(Run, "advance", diverge)
    with pytest.raises(UserError, match="diverged"):
        train(replace(short, max_steps=1))
    assert names(short.out) == set(RUN_FILES)
    assert load_checkpoint(short.out / "last.pt")["step"] == 1


@pytest.mark.parametrize(
    "box",
    [
        "╭─ A title ──────────╮\n│ Unrecognized: --foo. │\n│ ──────── │\n│ For help │\n╰──╯\n",
        " Unrecognized options  \n ------ \n  Unrecognized: --foo   \n  -----\n  For help  \n\n",
    ],
    ids=["utf-8", "LANG=C"],
)
def test_what_is_wrong_with_a_flag_is_found_in_any_frame(box):
    assert _complaint(box) == "Unrecognized: --foo"
