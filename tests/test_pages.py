"""README and docs/: their code runs as it stands, and what they name is there."""

import os
import re
import subprocess
import sys

import guide
import pytest
import torch
from guide import PAGES, ROOT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_as_it_stands(page, tmp_path, monkeypatch):
    """All of a page, one after the other, in one namespace and an empty folder."""
    text = (ROOT / page).read_text("utf-8")
    for library in ("transformers", "trl"):
        if re.search(rf"^from (fused_ce\.integrations\.)?{library}\b", text, re.MULTILINE):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = guide.run(page=page)
    assert names["n_blocks"] == text.count("```python\n")
    losses = [value for name, value in names.items() if name == "loss"]
    assert all(loss.isfinite().all() for loss in losses if isinstance(loss, torch.Tensor))


def test_what_the_blocks_compute():
    names = guide.run("From logits")
    right = names["stats"].predictions[names["counted"]] == names["next_tokens"][names["counted"]]
    torch.testing.assert_close(names["accuracy"], right.float().mean())
    accumulated = names["head"].weight.grad.clone()
    names["head"].zero_grad()
    losses = [
        torch.nn.functional.cross_entropy(
            names["head"](names["embedding"](inputs)).flatten(0, 1), targets.flatten(),
            reduction="sum",
        )
        for inputs, targets in names["micro_batches"]
    ]  # fmt: skip
    (sum(losses) / names["n_tokens"]).backward()
    torch.testing.assert_close(accumulated, names["head"].weight.grad)
    names = guide.run("Derivatives", page="docs/pytorch.md")
    hessian = torch.func.hessian(torch.nn.functional.cross_entropy)(
        names["logits"], names["targets"]
    )
    torch.testing.assert_close(
        names["hessian_times_direction"], torch.tensordot(hessian, names["direction"], 2)
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files, and titles of pages as their anchors."""
    text = (ROOT / page).read_text("utf-8")
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page}: {link}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") < 200
    for page in PAGES[1:]:
        assert page in text, page


def commands():
    """("python -m module subcommand", flags) of the pages' shell lines."""
    found = {}
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"-m ((?:fused_ce\.babygpt|benchmarks\.\w+)[^`\n#]*)", text):
            module, *words = line.split()
            subcommand = words[:1] if module == "fused_ce.babygpt" and words else []
            flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", line)}
            found.setdefault((module, *subcommand), set()).update(flags)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_flags_of_the_pages_exist(command):
    asked = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    flags, known = commands()[command], set(re.findall(r"--[a-z][\w-]+", asked.stdout))
    assert flags <= known, f"{command}: {sorted(flags - known)}"
