"""Small runs in a temporary folder, with a cache of their own."""

import shutil
from dataclasses import replace

import pytest
import torch

from fused_ce.babygpt import train as train_module
from fused_ce.babygpt.__main__ import main
from fused_ce.babygpt.config import TrainConfig

TINY = TrainConfig(
    max_steps=20, batch_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1,
    lr=1e-2, min_lr=1e-3, warmup_steps=5, decay_steps=15, eval_interval=10, eval_iters=3,
    checkpoint_interval=7, device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread, and other processes do not disturb it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the encoded texts."""
    monkeypatch.setenv("FUSED_CE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    """A run ends with a sample, which takes as long as a small run."""
    monkeypatch.setattr(train_module, "SAMPLE_TOKENS", 5)


@pytest.fixture
def text_file(tmp_path):
    """A text of 4,000 characters, 28 of them distinct."""
    return write_text(tmp_path / "text.txt")


def write_text(path):
    words = "the quick brown fox jumps over a lazy dog\n".split(" ")
    chosen = torch.randint(len(words), (1000,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(words[i] for i in chosen.tolist())[:4000])
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run; take a copy of it."""
    home = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, whose runs are compared with it bit for bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_CE_CACHE", str(home / "cache"))
        text = write_text(home / "text.txt")
        train_module.train(replace(TINY, data=str(text), out=home / "run"))
    torch.set_num_threads(threads)
    return home / "run"


@pytest.fixture
def folder(config, trained):
    """The folder of a finished run of these settings."""
    return shutil.copytree(trained, config.out)


@pytest.fixture
def config(tmp_path, text_file):
    """A run that takes less than a second."""
    return replace(TINY, data=str(text_file), out=tmp_path / "run")


@pytest.fixture
def flags(config):
    """The same run as flags, without --out and --max-steps."""
    names = (
        "data", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "lr",
        "min_lr", "warmup_steps", "decay_steps", "eval_interval", "eval_iters",
        "checkpoint_interval", "device",
    )  # fmt: skip
    pairs = ((f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names)
    return [word for pair in pairs for word in pair]


@pytest.fixture
def babygpt(capsys):
    """Run a command in this process: babygpt(words...) -> (status, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's way to refuse a flag
            status = stop.code
        return (status, *capsys.readouterr())

    return run
