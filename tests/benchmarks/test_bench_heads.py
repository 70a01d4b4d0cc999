"""`python -m benchmarks.heads trl`: a line per case, of heads that both have computed."""

import pytest
import torch

pytest.importorskip("trl", reason='pip install "fused_ce[trl]"')

from benchmarks import heads  # noqa: E402
from fused_ce.integrations import trl as integration  # noqa: E402


def test_a_line_for_each_case(capsys, monkeypatch):
    calls, function = [], integration.fused_linear_cross_entropy

    def remember(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(integration, "fused_linear_cross_entropy", remember)
    heads.table("trl", heads.Size(101, 32, 2, 16), [torch.float32], rounds=2)
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(heads.OF_TRL)
    assert {line.count("|") for line in (header, rule, *lines)} == {7}
    assert len(calls) == 3 * len(heads.OF_TRL)  # one for the memory, two that are timed


def test_a_line_for_each_loss_of_a_model(capsys, monkeypatch):
    from fused_ce.integrations import transformers as integration

    calls = {}

    def counted(name, function):
        def count(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return count

    for name in ("fused_cross_entropy", "fused_linear_cross_entropy"):
        monkeypatch.setattr(integration, name, counted(name, getattr(integration, name)))
    heads.table("transformers", heads.Size(101, 32, 2, 16), [torch.float32], rounds=2)
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(heads.MASKED)
    assert header.count("|") == rule.count("|") == 3 + 2 * len(heads.OF_TRANSFORMERS)
    assert set(calls.values()) == {3 * len(heads.MASKED)}  # one for the memory, two that are timed
