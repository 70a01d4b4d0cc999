"""kernels/: arrows run down, and no kernel family knows another."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FAMILIES = ("forward", "fused", "small", "split", "backward", "tangents")
# Each imports only what stands below it.
ORDER = (
    "launch", *FAMILIES, "tangent_tiles", "online_softmax", "targets", "transform", "reduce",
    "row_access", "policy", "arguments", "dispatch",
)  # fmt: skip


def test_every_file_has_its_place():
    assert {path.stem for path in KERNELS.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("file", ORDER)
def test_arrows_run_down(file):
    for node in ast.walk(ast.parse((KERNELS / f"{file}.py").read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level == 2:  # of fused_ce
            assert node.module in ("options", "rows", "shards")
            continue
        for name in [node.module] if node.module else [alias.name for alias in node.names]:
            assert ORDER.index(name) > ORDER.index(file), f"{file} imports {name}"
            assert file not in FAMILIES or name not in FAMILIES, f"{file} imports {name}"


def returned_names(function):
    """Of what is returned as it is, alone or in a tuple."""
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    for value in list(values):
        values += value.elts if isinstance(value, ast.Tuple) else ()
    return {value.id for value in values if isinstance(value, ast.Name)}


def names_set_to_none(function):
    found = set()
    for statement in ast.walk(function):
        if not isinstance(statement, ast.Assign):
            continue
        pairs = [(target, statement.value) for target in statement.targets]
        for target, value in list(pairs):
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
        for target, value in pairs:
            none = isinstance(value, ast.Constant) and value.value is None
            none |= isinstance(value, ast.IfExp) and "None" in ast.unparse(value)
            if none and isinstance(target, ast.Name):
                found.add(target.id)
    return found


def test_no_device_function_returns_none():
    """Triton 3.6.0 cannot compile one that does, and nothing here runs on that."""
    n_functions = 0
    for path in sorted(KERNELS.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any("jit" in ast.unparse(d) for d in function.decorator_list):
                continue
            n_functions += 1
            assert not returned_names(function) & names_set_to_none(function), function.name
    assert n_functions > 50
