"""Files that are whole, or refused."""

import os
import pickle
import random
import zipfile

import pytest
import torch

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.checkpoint import KEYS, load_checkpoint, load_model, newest_checkpoint
from fused_ce.babygpt.errors import CheckpointError


class Hostile:
    """A pickle that would make a file when it is read."""

    def __init__(self, path):
        """Name the folder to make."""
        self.path = path

    def __reduce__(self):
        """Say what to call."""
        return os.mkdir, (str(self.path),)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_byte_of_the_weights(path):
    state = load_checkpoint(path)
    content = bytearray(path.read_bytes())
    position = content.find(state["model"]["head.weight"].numpy().tobytes())
    assert position > 0
    content[position] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def replace_by_text(path):
    path.write_text("not a checkpoint")


def replace_by_foreign_tensors(path):
    torch.save({"weight": torch.zeros(3)}, path)


def replace_by_a_foreign_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("last/data.pkl", b"no pickle")


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def give_the_step_another_kind(path):
    torch.save({**load_checkpoint(path), "step": "20"}, path)


DAMAGES = [
    truncate, flip_a_byte_of_the_weights, empty, replace_by_text, replace_by_foreign_tensors,
    replace_by_a_foreign_archive, replace_by_a_folder, give_the_step_another_kind,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(folder, damage):
    damage(folder / "last.pt")
    with pytest.raises(CheckpointError, match="last.pt is "):
        load_checkpoint(folder / "last.pt")


@pytest.mark.parametrize("legacy", [True, False], ids=["bare-pickle", "zip"])
def test_a_file_that_would_run_code_is_refused(tmp_path, legacy):
    bait = tmp_path / "bait"
    if legacy:
        (tmp_path / "last.pt").write_bytes(pickle.dumps(Hostile(bait)))
    else:
        torch.save(dict.fromkeys(KEYS, Hostile(bait)), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="last.pt"):
        load_checkpoint(tmp_path / "last.pt")
    assert not bait.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_continues_from_best_when_last_is_damaged(folder, babygpt, damage):
    best = load_checkpoint(folder / "best.pt")["step"]
    damage(folder / "last.pt")
    kept = (folder / "last.pt.damaged", folder / "last.pt.damaged1")
    kept[0].touch()  # of another time
    before = (folder / "last.pt").is_dir() or (folder / "last.pt").read_bytes()
    status, out, err = babygpt("train", "--resume", "--out", folder, "--max-steps", 30)
    assert status == 0
    assert f"{folder / 'last.pt'} is" in err and f"continuing from step {best}" in err
    assert load_checkpoint(folder / "last.pt")["step"] == 30
    assert f"{folder / 'last.pt'} is kept as last.pt.damaged1" in err  # it may be somebody else's
    assert kept[0].read_bytes() == b"" and (kept[1].is_dir() or kept[1].read_bytes()) == before


def test_no_cut_and_no_flipped_byte_goes_unnoticed(folder):
    path = folder / "last.pt"
    whole, state = path.read_bytes(), load_checkpoint(path)["model"]
    draw = random.Random(0)
    for _ in range(40):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(CheckpointError, match="last.pt is "):
            load_checkpoint(path)
    noticed = 0
    for _ in range(40):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:  # a byte of padding or of a time stamp changes nothing
            loaded = load_checkpoint(path)["model"]
            assert all(torch.equal(loaded[name], state[name]) for name in state)
        except CheckpointError:
            noticed += 1
    assert noticed > 20


def test_a_run_stops_when_no_checkpoint_is_intact(folder):
    truncate(folder / "last.pt")
    truncate(folder / "best.pt")
    with pytest.raises(CheckpointError, match="no checkpoint is intact.*last.pt.*best.pt"):
        newest_checkpoint(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run to continue"):
        newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_model(tmp_path)


def test_a_model_comes_from_best_else_from_last(folder):
    torch.save({**load_checkpoint(folder / "best.pt"), "step": -1}, folder / "best.pt")
    assert load_model(folder)[2]["step"] == -1
    (folder / "best.pt").unlink()
    model, tokenizer, saved = load_model(folder)
    assert saved["step"] == 20 and tokenizer.vocabulary == saved["vocabulary"]
    assert all(torch.equal(value, saved["model"][k]) for k, value in model.state_dict().items())


def test_a_model_does_not_come_from_last_when_best_is_damaged(folder):
    truncate(folder / "best.pt")
    with pytest.raises(CheckpointError, match="best.pt"):
        load_model(folder)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half of what")
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_file_takes_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (calls.append(n), f(*a)))
    with atomic_file(tmp_path / "file") as file:
        file.write(b"content")
        assert not (tmp_path / "file").exists()
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, its folder
