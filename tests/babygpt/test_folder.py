"""A run replaces what a run left, when it is told to, and never anybody else's files."""

import json
import os
from dataclasses import replace

import pytest
import torch

from fused_ce.babygpt.checkpoint import load_checkpoint
from fused_ce.babygpt.compare import compare
from fused_ce.babygpt.config import CompareConfig, TrainConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.folder import RUN_FILES, is_ours, remove_temporary
from fused_ce.babygpt.record import EVENTS_SUFFIX, Record, TensorBoard
from fused_ce.babygpt.train import train
from tests.babygpt.processes import in_processes

PIXEL = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU"
    b"\0\0\0\nIDATx\x9cc`\0\0\0\2\0\1H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"
)


def foreign_weights():
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.save({"token_embedding.weight": torch.zeros(3)}, {"format": "pt"})


def foreign_checkpoint(path):
    torch.save({"model": {"weight": torch.zeros(3)}, "step": 7}, path)
    return path.read_bytes()


FOREIGN = {
    "last.pt": foreign_checkpoint,
    "best.pt": foreign_checkpoint,
    "log.jsonl": lambda path: b'{"step": 0, "reward": 1.5}\n{"step": 1, "reward": 2.5}\n',
    "steps.jsonl": lambda path: b"[1, 2]\n",
    "loss.png": lambda path: PIXEL,
    "weights.safetensors": lambda path: foreign_weights(),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_strangers_file_is_never_replaced(config, name, overwrite):
    path = config.out / name
    path.parent.mkdir()
    content = FOREIGN[name](path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is in the way.*another --out"):
        train(replace(config, overwrite=overwrite))
    assert path.read_bytes() == content and list(config.out.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.jsonl", "loss.png", "weights.safetensors"])
def test_a_strangers_file_in_the_folder_of_a_run_stays(folder, babygpt, name):
    content = FOREIGN[name](folder / name)
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for words in (["--resume", "--max-steps", 30], ["--overwrite"]):
        status, _, err = babygpt("train", "--out", folder, *words)
        assert status == 1 and f"error: {folder / name} is in the way" in err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_or_a_link_in_the_way_is_named(config, tmp_path):
    (config.out / "best.pt").mkdir(parents=True)
    with pytest.raises(UserError, match="best.pt is in the way"):
        train(replace(config, overwrite=True))
    (config.out / "best.pt").rmdir()
    (config.out / "log.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="log.jsonl is in the way"):
        train(replace(config, overwrite=True))
    assert (config.out / "log.jsonl").is_symlink()


def test_the_files_of_a_run_are_known(folder):
    for name in RUN_FILES:
        assert is_ours(folder / name), name
    (folder / "log.jsonl").write_text('{"step": 0, "trai')  # torn by a crash in its first line
    assert is_ours(folder / "log.jsonl")


def test_a_folder_that_holds_a_run_is_refused_and_the_ways_out_are_named(folder, flags, babygpt):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, _, err = babygpt("train", *flags, "--out", folder)
    assert status == 1 and err.startswith(f"error: {folder} holds a run already: ")
    assert err.count("\n") == 1
    for flag in ("--resume", "--overwrite", "--out"):
        assert flag in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_any_file_of_a_run_makes_it_one(folder, config):
    for name in RUN_FILES:
        if name != "weights.safetensors":
            (folder / name).unlink()
    with pytest.raises(UserError, match="holds a run"):
        train(config)


def test_overwrite_replaces_a_run_and_nothing_else(folder, config, capsys):
    mine = {"note.txt": b"mine", ".foo.tmp": b"mine", ".last.pt.mine.tmp": b"mine"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    (folder / ".last.pt.123.tmp").write_bytes(b"torn by a crash")
    train(replace(config, max_steps=1, eval_interval=1, seed=3, overwrite=True))
    assert "replacing the run" in capsys.readouterr().out
    assert load_checkpoint(folder / "best.pt")["config"]["seed"] == 3
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in folder.iterdir()} == {*RUN_FILES, *mine}
    assert all((folder / name).read_bytes() == content for name, content in mine.items())


def test_overwrite_where_nothing_is_begins_a_run(config):
    assert train(replace(config, max_steps=1, overwrite=True))  # `make train` the first time


def test_only_our_half_written_files_are_removed(tmp_path):
    for name in (".log.jsonl.12.tmp", ".log.jsonl.x.tmp", ".other.12.tmp", "log.jsonl.12.tmp"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path, RUN_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".log.jsonl.x.tmp", ".other.12.tmp", "log.jsonl.12.tmp",
    }  # fmt: skip


def test_events_of_others_stay(tmp_path):
    pytest.importorskip("tensorboard")
    other = tmp_path / "events.out.tfevents.1.host.1.0"
    other.write_bytes(b"")
    TensorBoard(tmp_path).append({"step": 0, "val": 1.0})
    (first,) = tmp_path.glob(f"*{EVENTS_SUFFIX}")
    TensorBoard(tmp_path).append({"step": 0, "val": 1.0})
    assert other.exists() and not first.exists()


def test_out_that_is_a_file_is_one_line(config, flags, babygpt):
    config.out.write_text("mine")
    status, _, err = babygpt("train", *flags, "--out", config.out, "--overwrite")
    assert status == 1 and err == f"error: --out must be a folder, {config.out} is a file\n"
    assert config.out.read_text() == "mine"


@pytest.mark.parametrize("words", [["--out", ""], ["--out="], ["--out", " "]], ids=repr)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_empty_out_is_an_error(babygpt, flags, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, _, err = babygpt(command, *flags, *words)
    assert status == 1 and err == "error: --out is empty: is a variable of the shell not set?\n"
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="--out must name a folder"):
        TrainConfig(out="")


def test_the_current_folder_can_be_asked_for(config, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train(replace(config, out=".", max_steps=1))
    assert {path.name for path in (tmp_path / "here").iterdir()} == set(RUN_FILES)


@pytest.mark.parametrize("flag", ["--checkpoint", "--data"])
def test_an_empty_variable_is_named(babygpt, flag):
    status, _, err = babygpt("eval", "--checkpoint", "x", flag, "")
    assert status == 1 and f"error: {flag} is empty" in err


def test_overwrite_and_resume_exclude_each_other(folder, babygpt):
    status, _, err = babygpt("train", "--out", folder, "--resume", "--overwrite")
    assert status == 1 and "--resume" in err and "--overwrite" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["compare.json", "compare.png", "fused/last.pt"])
def test_a_comparison_replaces_no_strangers_file(config, babygpt, flags, name):
    path = config.out / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"mine": 1}')
    status, _, err = babygpt("compare", *flags, "--out", config.out, "--overwrite")
    assert status == 1 and f"{path} is in the way" in err
    assert path.read_bytes() == b'{"mine": 1}' and "===" not in err


@pytest.fixture
def comparison(config):
    return CompareConfig(**vars(config))


@pytest.fixture
def comparison_folder(config):
    config.out.mkdir()
    content = {"config": {}, "losses": {}}
    (config.out / "compare.json").write_text(json.dumps(content))
    return config.out


def test_a_comparison_is_not_replaced_unasked(comparison_folder, comparison):
    before = (comparison_folder / "compare.json").read_bytes()
    with pytest.raises(UserError, match="holds a run already: another --out .*--overwrite"):
        compare(comparison)
    assert (comparison_folder / "compare.json").read_bytes() == before


def test_processes_hear_of_a_refusal_together(folder, config, tmp_path):
    def work(rank):
        os.environ.update(WORLD_SIZE="2")
        try:
            train(config)
        except UserError as error:
            return str(error)

    (first, _), (second, _) = in_processes(work, tmp_path)
    assert first == second and "holds a run already" in first


def test_a_log_begins_with_its_first_row(tmp_path):
    record = Record(tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()
    record.append({"step": 0})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n'
