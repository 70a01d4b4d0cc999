"""The package: light to import, whole without Triton, and free of bare asserts."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_ce

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / path for path in ("fused_ce", "fused_ce/cpu", "fused_ce/integrations", "kernels")]
SOURCES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
HEAVY = ("triton", "transformers", "matplotlib", "tyro", "tqdm", "safetensors")


def run(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )


def test_public_names():
    public = {"FusedCrossEntropyLoss", "backend", "fused_cross_entropy", "reference_cross_entropy"}
    assert public <= set(fused_ce.__all__)
    assert all(hasattr(fused_ce, name) for name in fused_ce.__all__)
    assert fused_ce.__all__ == sorted(fused_ce.__all__)


def test_every_public_name_has_a_docstring():
    for name in fused_ce.__all__:
        assert getattr(fused_ce, name).__doc__, name


def test_import_is_light():
    """Of what torch itself does not import."""
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import fused_ce
        print([name for name in {HEAVY!r} if name in set(sys.modules) - before])
    """
    result = run(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_works_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # import triton: ModuleNotFoundError

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        import torch, fused_ce
        x = torch.zeros(2, 3, requires_grad=True)
        for name in ("auto", "cpu", "reference"):
            with fused_ce.backend(name):
                fused_ce.fused_cross_entropy(x, torch.zeros(2).long()).backward()
        fused_ce.FusedCrossEntropyLoss()(x, torch.zeros(2).long())
        print(x.grad.shape, "triton" in [m for m, v in sys.modules.items() if v])
    """
    result = run(code)
    assert result.stdout.strip() == "torch.Size([2, 3]) False", result.stderr


def test_cpu_tensors_do_not_import_triton():
    code = """if True:
        import sys, torch, fused_ce
        x = torch.zeros(2, 3, requires_grad=True)
        fused_ce.fused_cross_entropy(x, torch.zeros(2).long()).backward()
        print("triton" in sys.modules)
    """
    result = run(code)
    assert result.stdout.strip() == "False", result.stderr


def test_nothing_of_torch_is_patched():
    code = """if True:
        import torch, torch.nn.functional as F
        before = F.cross_entropy, torch.nn.CrossEntropyLoss.forward, dict(vars(torch.nn.functional))
        import fused_ce
        after = F.cross_entropy, torch.nn.CrossEntropyLoss.forward, dict(vars(torch.nn.functional))
        print(before == after)
    """
    result = run(code)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_bare_assert_answers_a_user(path):
    tree = ast.parse(path.read_text("utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not lines


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_never_ask_the_device(path):
    """A host value read from a tensor stops the GPU: .item(), .tolist(), .cpu(), nonzero."""
    forbidden = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}
    calls = [
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert not forbidden & set(calls)


def test_kernels_know_no_autograd_and_raise_nothing():
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Raise)], path
        assert "autograd" not in {
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for part in (node.module or "").split(".")
        }


def test_kernels_install_inside_the_package():
    """`kernels` as a top-level name belongs to another distribution."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    linked, kernels = ROOT / "fused_ce" / "kernels", ROOT / "kernels"
    if linked.resolve() != kernels:  # a copy, as an unpacked sdist has it
        names = sorted(path.name for path in kernels.glob("*.py"))
        assert names == sorted(path.name for path in linked.glob("*.py"))
        assert all((linked / n).read_bytes() == (kernels / n).read_bytes() for n in names)


@pytest.mark.parametrize("name", ["differences.md", "pytorch.md"])
def test_pages_name_tests_that_exist(name):
    page = (ROOT / "docs" / name).read_text("utf-8")
    named, file = [], None
    for first, test in re.findall(r"`(?:tests/)?([\w/]+\.py)?::(test_\w+)`", page):
        file = first or file  # `::test` is in the file named before
        named.append((file, test))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{file}::{test}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert all("::test_" in row for row in rows)


@pytest.mark.parametrize("name", ["guide.md", "transformers.md"])
def test_pages_of_recipes_name_tests_that_exist(name):
    page = (ROOT / "docs" / name).read_text("utf-8")
    named, file = [], None
    for first, path in re.findall(r"`(?:tests/)?([\w/]+\.py)?::([\w:]+)`", page):
        file = first or file  # `::test` is in the file named before
        named.append((file, path.split("::")))
    assert len(named) > 10
    for file, names in named:
        source = (ROOT / "tests" / file).read_text("utf-8")
        for name in names:
            assert re.search(rf"(def|class) {name}\b", source), f"{file}: {name}"
