"""One version, one set of promises: in the project's metadata, its pages and its CI."""

import re
from datetime import date
from pathlib import Path

import pytest

from fused_ce.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_version_has_a_dated_entry_in_the_changelog():
    entries = re.findall(r"^## (.*)\n", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert entries[0] == "Unreleased"
    version, _, day = entries[1].partition(" ")
    assert version == __version__
    date.fromisoformat(day.strip("()"))


@pytest.mark.parametrize("page", ["README.md", "docs/versions.md"])
def test_pages_promise_what_the_metadata_asks_for(page):
    promised = dict(
        (name.lower(), version)
        for name, version in re.findall(
            r"\b(Python|torch|Triton) (?:>=|≥) ([\d.]*\d)", (ROOT / page).read_text("utf-8")
        )
    )
    (python,) = re.findall(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)
    asked = dict(re.findall(r'^    "(torch|triton)>=([\d.]+)', PROJECT, re.MULTILINE))
    assert promised == {"python": python, **asked}


def test_ci_has_every_python_of_the_classifiers():
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.is_file():
        pytest.skip("the workflow is not here")
    (pythons,) = re.findall(r"^ +python: \[(.*)\]", workflow.read_text("utf-8"), re.MULTILINE)
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert re.findall(r"3\.\d+", pythons) == named
