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
            assert node.module in ("options", "rows")
            continue
        for name in [node.module] if node.module else [alias.name for alias in node.names]:
            assert ORDER.index(name) > ORDER.index(file), f"{file} imports {name}"
            assert file not in FAMILIES or name not in FAMILIES, f"{file} imports {name}"
