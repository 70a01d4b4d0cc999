"""docs/kernels.md: what it names is there, and what it says of sizes is what the policy chooses."""

import ast
import functools
import re
from pathlib import Path

from fused_ce.kernels import policy

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text("utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
FILE = re.compile(r"((?:[\w.-]+/)*[\w-]+\.(?:py|md))?(?:::([\w.]+))?")
NOT_OURS = {"CHANGELOG.md", "README.md", "lse_cost"}


@functools.cache
def names_in(path):
    """Of its functions, classes, what these have, and what is set at its top level."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            found.update(f"{node.name}.{name}" for name in inner)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def places():
    """(file, name or None) of all that is quoted; a name alone is beside the last file."""
    folder, file = "", ""
    for quoted in QUOTED:
        match = FILE.fullmatch(quoted)
        if not match or not any(match.groups()):
            continue
        given, name = match.groups()
        if given:
            beside = f"{folder}/{given}".lstrip("/")
            file = beside if "/" not in given and (ROOT / beside).is_file() else given
            folder = str(Path(file).parent)
        yield file, name


def test_every_file_and_what_it_is_said_to_hold_are_there():
    found = list(places())
    assert len(found) > 100
    assert [file for file, _ in found if not (ROOT / file).is_file()] == []
    assert [(file, name) for file, name in found if name and name not in names_in(file)] == []


def test_every_file_of_the_kernels_is_named():
    named = {file for file, _ in places()}
    assert {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= named


def test_every_other_name_is_a_word_of_the_sources():
    folders = ("kernels", "fused_ce", "tests", "benchmarks")
    sources = "".join(
        path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")
    )
    names = {q for q in QUOTED if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", q)} - NOT_OURS
    words = set(re.findall(r"\w+", sources))
    assert len(names) > 50
    assert [name for name in names if not set(name.split(".")) <= words] == []


def test_links_lead_somewhere():
    links = re.findall(r'\]\(([^)#:]+)[^)]*\)|src="([^"]+)"', PAGE)
    assert links
    assert all((ROOT / "docs" / (a or b)).is_file() for a, b in links)


def held_at_most(element_size, heavy):
    config = policy.held_config(10**6, element_size, 32, heavy)
    return config.held * config.block_v


def test_columns_held_at_most():
    for kind, size in (("bfloat16, float16", 2), ("float32", 4), ("float64", 8)):
        numbers = [f"{held_at_most(size, heavy):,}" for heavy in (False, True)]
        assert f"| {kind} | {numbers[0]} | {numbers[1]} |" in PAGE


def test_the_figure_cuts_its_row_as_the_kernel_does():
    vocab_size, vector = 128_256, 8
    config = policy.held_config(vocab_size, 2)
    interior = (vocab_size // vector - 1) * vector
    step = config.block_v * config.unroll
    streamed = -(-(interior - config.held * config.block_v) // step) * step
    figure = (ROOT / "docs" / "figures" / "row_through_the_chip.svg").read_text("utf-8")
    assert f"{vocab_size:,}" in figure and f"edge: {vocab_size - interior} logits" in figure
    assert f"streamed: {streamed:,}" in figure and f"held: {interior - streamed:,}" in figure
    assert f"{config.num_warps * 32:,} threads" in figure
