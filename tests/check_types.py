"""`python -m tests.check_types`: types of fused_ce, of calls to it, and of the pages' Python code.

By mypy and by pyright, which a user may have one of. The blocks of a page are one module: each line
of it is that of the page, so that an error names both. What a page leaves to its reader, a model
say, may be anything.
"""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKED = ["fused_ce", "tests/typed_calls.py"]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Blocks use a name again as people do: two examples both have a `loss`. Libraries may lack types.
# To pyright a sum() of tensors may be the number 0, which lacks their methods; mypy looks at these.
# A page may define what another library calls as we call ours.
SETTINGS = """
# mypy: allow-redefinition, no-warn-unused-ignores
# mypy: disable-error-code="no-redef,import-untyped,import-not-found"
# pyright: basic, reportRedeclaration=false, reportMissingModuleSource=false
# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportUnusedExpression=false
"""
# Stubs of the first two say that they return three values, or two: nobody may unpack what they
# return. An attribute that a module does not declare may be anything that modules hold.
LOOSE = ("torch.func.jvp(", "torch.func.vjp(", "model.loss_stats")


def code_of(page: str) -> str:
    """The Python blocks of a page, each on the lines that it has there."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(2))
        for number, line in enumerate(textwrap.dedent(block[2]).splitlines(), first):
            is_loose = any(name in line for name in LOOSE)
            lines[number] = f"{line}  # type: ignore[misc,assignment]" if is_loose else line
    return "\n".join(lines)


def left_to_the_reader(code: str) -> list[str]:
    """The names that it uses before it binds them."""
    bound, missing = set(dir(builtins)), set()
    for statement in ast.parse(code).body:
        used, made, local = set(), set(), set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
            elif isinstance(node, ast.arg):
                local.add(node.arg)
            elif isinstance(node, ast.alias):
                made.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.comprehension):
                local |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
        is_assignment = isinstance(statement, ast.Assign | ast.AugAssign)
        missing |= used - bound - local - (set() if is_assignment else made)
        bound |= made
    return sorted(missing)


def public_names() -> dict[str, str]:
    """Where each name of an `__all__` is defined: {"backend": "fused_ce.backend.backend", ...}."""
    found = {}
    for package in ("fused_ce", "fused_ce/babygpt"):
        tree = ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))
        imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        modules = {alias.name: node.module for node in imported for alias in node.names}
        (names,) = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        found |= {name: f"{modules[name]}.{name}" for name in names if name[:2] != "__"}
    return found


def write_pages(pages: list[Path], folder: Path) -> dict[str, str]:
    """A module for each page that has blocks: {name of the module: path of the page}."""
    known = {"torch": "import torch as torch"}
    known |= {
        name: f"from {path.rpartition('.')[0]} import {name} as {name}"
        for name, path in public_names().items()
    }
    written = {}
    for page in pages:
        code = code_of(page.read_text("utf-8"))
        if not code.strip():
            continue
        path = os.path.relpath(page, ROOT)
        module = re.sub(r"\W", "_", f"page_{path}")
        names = left_to_the_reader(code)
        stub = ["from typing import Any", *(known.get(name, f"{name}: Any") for name in names)]
        (folder / f"{module}_reader.pyi").write_text("\n".join(stub) + "\n", "utf-8")
        if names:  # on the first line, which no block can have
            code = f"from {module}_reader import {', '.join(names)}{code}"
            print(f"{path}: left to its reader: {', '.join(names)}")
        (folder / f"{module}.py").write_text(code + SETTINGS, "utf-8")
        written[module] = path
    return written


def run(command: list[str], folder: Path) -> subprocess.Popen:
    """A checker, which finds this project whether it is installed or not, and this Python first."""
    paths = os.pathsep.join([str(ROOT), str(folder)])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "PATH": programs, "PYTHONPATH": paths, "MYPYPATH": paths,
            "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",  # of its age: the version is pinned
        },
    )  # fmt: skip


def unknown_types(report: str) -> Iterator[str]:
    """What `pyright --verifytypes` says of the public names that have no known type, if any."""
    try:
        symbols = json.loads(report)["typeCompleteness"]["symbols"]
    except (json.JSONDecodeError, KeyError):  # without py.typed, say
        yield report
        return
    places = [*public_names().values(), "fused_ce.integrations.transformers"]
    n_symbols = 0
    for place in places:
        of_place = [s for s in symbols if f"{s['name']}.".startswith(f"{place}.")]
        n_symbols += len(of_place)
        if not of_place:
            yield f"{place}: pyright has not found it"
        for symbol in of_place:
            if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]:
                said = "; ".join(problem["message"] for problem in symbol["diagnostics"])
                yield f"{symbol['name']}: its type is not known: {said or 'see its members'}"
    print(f"pyright --verifytypes: {n_symbols} public symbols")


def main(pages: list[Path], checked: list[str]) -> int:
    """Print what the checkers find; 0 if nothing."""
    failed = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        modules = write_pages(pages, folder)
        paths = [*checked, *(str(folder / f"{module}.py") for module in modules)]
        checkers = {name: run([name, *paths], folder) for name in ("mypy", "pyright")}
        for checker, process in checkers.items():
            said, _ = process.communicate()
            for module, page in modules.items():  # in any folder: mypy remembers the last one
                said = re.sub(rf"\S*\b{module}\.py", page, said)
            print(f"{checker}: {said.replace(f'{ROOT}{os.sep}', '').strip()}")
            failed |= process.returncode != 0
        verified = run(
            ["pyright", "--verifytypes", "fused_ce", "--ignoreexternal", "--outputjson"], folder
        )
        problems = list(unknown_types(verified.communicate()[0]))
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(failed or bool(problems))


if __name__ == "__main__":
    sys.exit(main(PAGES, CHECKED))
