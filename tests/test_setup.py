"""Set-up: each command of `make` installs what it needs, once, and says so before it begins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / ".ci").is_dir(), reason="make or .ci is not here"
)
# Stands for the Python of the machine and of the virtual environment: says what it was asked for.
PYTHON = """#!/bin/sh
echo "python $*"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
case "$*" in *"pip install"*"$FAILS"*) exit ${FAILS:+1};; esac
"""
TRAIN = "python -m fused_ce.babygpt train"
INSTALLED = [
    "torch numpy tyro>=1.0 tqdm matplotlib safetensors tokenizers", "--no-deps --editable .",
    "--editable .[train,test,bench,dev,hf,trl]",
]  # fmt: skip
FAST, SLOW = "--dist worksteal -m not slow", "--dist worksteal -m slow"


@pytest.fixture
def make(tmp_path):
    """Run make with a Python that does nothing: make(targets...) -> the lines that were printed."""
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*targets, fails=""):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", "-s", *targets, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],
            cwd=ROOT, env={**environment, "FAILS": fails}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode != 0) == bool(fails), done.stderr
        return done.stdout.splitlines()

    return run


def installed(lines):
    """What pip is asked for, in turn."""
    return [
        line.partition("constraints.txt ")[2]
        for line in lines
        if line.startswith("python -m pip install")
    ]


def test_train_installs_what_it_needs_and_says_so_before(make):
    message, venv, *pips, train = make("train")
    assert "installing PyTorch" in message and " GB" in message
    assert venv.startswith("python -m venv ") and train.startswith(TRAIN)
    assert installed(pips) == INSTALLED[:2]
    assert "--overwrite" in train  # of the run that the first `make train` leaves
    (again,) = make("train")
    assert again == train


def test_test_goes_on_from_what_train_installed_and_the_other_way(make):
    make("train")
    message, pip, tests = make("test")
    assert "installing" in message and " GB more" in message
    assert installed([pip]) == INSTALLED[2:]
    assert tests.endswith(FAST)
    (train,) = make("train")
    assert train.startswith(TRAIN)


def test_test_alone_installs_all(make):
    lines = make("test")
    assert installed(lines) == INSTALLED
    assert [line for line in lines if "-m pytest" in line] == lines[-1:]


def test_the_extras_are_those_of_the_project(make):
    """And training is spared Triton, which is as large as PyTorch for a CPU."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for_training, alone, for_tests = installed(make("test"))
    assert for_training.split() == ["torch", *extras["train"]] and "--no-deps" in alone
    assert set(for_tests.partition(".[")[2].strip("]").split(",")) == set(extras)


def test_an_installation_that_fails_is_begun_again(make):
    assert installed(make("test", fails=".[train,")) == INSTALLED
    assert installed(make("test")) == INSTALLED[2:]


def test_each_test_runs_once(make):
    make("test")
    (slow,), fast_and_slow = make("test-slow"), make("test-all")
    assert slow.endswith(SLOW)
    assert [line.partition("pytest ")[2] for line in fast_and_slow] == [
        f"-n 2 {FAST}",
        f"-n 2 {SLOW}",
    ]


def test_ci_runs_what_a_user_is_told_to_run(tmp_path):
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "$*"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ROOT / ".ci" / "run", cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lint", "wheel", "test", "test-slow"]
