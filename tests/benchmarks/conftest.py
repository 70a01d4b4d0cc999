"""The suite itself, tried on the CPU with tiny logits: a GPU's first minute is not for typos."""

import pytest
import torch

from benchmarks import providers
from benchmarks.providers import COMPILED, PROVIDERS
from benchmarks.session import Session

ABOUT = {"gpu": "a machine", "torch": "2", "triton": "3", "date": "2020-01-02"}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Not here: the suite measures torch as it is."""


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    """What else the machine does is no part of these tests."""
    monkeypatch.setattr("benchmarks.quiet._jiffies", lambda: None)


@pytest.fixture
def cpu():
    return torch.device("cpu")


@pytest.fixture
def about():
    return ABOUT


@pytest.fixture
def uncompiled(monkeypatch):
    """Without torch.compile, which takes seconds a case."""
    few = {name: provider for name, provider in PROVIDERS.items() if name != COMPILED}
    monkeypatch.setattr(providers, "PROVIDERS", few)
    return few


@pytest.fixture
def session(cpu, tmp_path):
    session = Session.begin(cpu, tmp_path / "out", quick=True)
    yield session
    session.log.close()
