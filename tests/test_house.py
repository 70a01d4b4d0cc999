"""The house: imports run down the floors, never up or in a circle; a reader can hold each room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top floor down. A file imports from floors below its own, and on its own floor nothing.
FLOORS = [
    ["fused_ce.babygpt", "fused_ce.integrations"],  # rooms with an order of their own
    ["fused_ce"],
    ["fused_ce.modules", "fused_ce.ops"],
    ["fused_ce.linear_cross_entropy"],
    ["fused_ce.cross_entropy"],
    ["fused_ce.dtensors"],
    ["fused_ce.vocab_parallel"],
    ["fused_ce.linear_autograd", "fused_ce.sharded_linear"],
    ["fused_ce.sharded_autograd"],
    ["fused_ce.autograd", "fused_ce.linear_products"],
    ["fused_ce.linear_chunks"],
    ["fused_ce.row_losses"],
    ["fused_ce.row_tangents"],
    ["fused_ce.backend"],
    ["fused_ce.cpu", "fused_ce.kernels", "fused_ce.reference"],
    ["fused_ce.linear_arguments"],
    ["fused_ce.arguments", "fused_ce.exchange"],
    ["fused_ce.shards"],
    ["fused_ce.options", "fused_ce.rows", "fused_ce.stats", "fused_ce.tracing"],
    ["fused_ce.version"],
]
ROOMS = ("fused_ce.babygpt", "fused_ce.integrations", "fused_ce.cpu", "fused_ce.kernels")
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL = 400, 60, 80


def sources(*folders):
    return {
        path.relative_to(ROOT): ast.parse(path.read_text("utf-8"))
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "fused_ce/kernels" not in str(path)
    }


def module_of(path):
    """`kernels/` installs as fused_ce.kernels."""
    parts = list(path.with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fused_ce")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): tree for path, tree in sources("fused_ce", "kernels").items()}
PATHS = {module_of(path): path for path in sources("fused_ce", "kernels")}


def imports_of(module, node):
    """The modules of ours that an import statement names."""
    if isinstance(node, ast.Import):
        named = [(alias.name, None) for alias in node.names]
    else:
        package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
        base = node.module or ""
        if node.level:
            package = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = f"{package}.{base}" if base else package
        named = [(base, alias.name) for alias in node.names]
    for base, name in named:
        if f"{base}.{name}" in TREES:
            yield f"{base}.{name}"
        elif base in TREES:
            yield base


def arrows():
    """(file, file that it imports), inside functions too."""
    return {
        (module, imported)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in imports_of(module, node)
        if imported != module
    }


def floor_of(module):
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or room in ROOMS and module.startswith(room + "."):
                return floor, room
    raise AssertionError(f"{module} stands on no floor: say in FLOORS where it belongs")


def test_the_imports_are_seen():
    """Of each kind: absolute, relative, of a name or of a module, inside a function."""
    found = arrows()
    assert ("fused_ce.cross_entropy", "fused_ce.arguments") in found
    assert ("fused_ce.backend", "fused_ce.cpu") in found
    assert ("fused_ce.backend", "fused_ce.kernels.launch") in found
    assert ("fused_ce.kernels.launch", "fused_ce.rows") in found
    assert ("fused_ce.kernels.launch", "fused_ce.kernels.forward") in found


def test_imports_run_down():
    for module, imported in sorted(arrows()):
        (floor, room), (other_floor, other_room) = floor_of(module), floor_of(imported)
        assert room == other_room or floor < other_floor, (
            f"{module} imports {imported}, which is up"
        )


def test_no_two_files_import_each_other():
    """Nor does any circle of more."""
    edges = {}
    for module, imported in arrows():
        edges.setdefault(module, set()).add(imported)

    def reached(start):
        seen, pending = set(), [start]
        while pending:
            for imported in edges.get(pending.pop(), ()):
                if imported not in seen:
                    seen.add(imported)
                    pending.append(imported)
        return seen

    assert [module for module in TREES if module in reached(module)] == []


def test_imports_stand_at_the_top():
    """But for Triton, which CPU tensors do without, and for extras that BabyGPT may lack."""
    hidden = {
        (module, imported)
        for module, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in imports_of(module, node)
        if not module.startswith(("fused_ce.babygpt", "fused_ce.integrations"))
    }
    assert hidden == {
        ("fused_ce.backend", "fused_ce.kernels.forward"),
        ("fused_ce.backend", "fused_ce.kernels.launch"),
    }


def test_the_reference_can_be_read_alone():
    needed_by_it = ("arguments", "linear_arguments", "options", "rows", "stats")
    needed = {imported for module, imported in arrows() if module == "fused_ce.reference"}
    assert needed == {f"fused_ce.{name}" for name in needed_by_it}


@pytest.mark.parametrize("folder", ["fused_ce", "kernels", "benchmarks"])
def test_a_reader_can_hold_each_file(folder):
    for path, tree in sources(folder).items():
        n_lines = len((ROOT / path).read_text("utf-8").splitlines())
        assert n_lines <= LONGEST_FILE, f"{path} has {n_lines} lines"
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                most = LONGEST_KERNEL if is_kernel(function) else LONGEST_FUNCTION
                n_lines = lines_of_code(function)
                assert n_lines <= most, f"{path}: {function.name} has {n_lines} lines"


def is_kernel(function):
    return any(
        isinstance(name, ast.Name) and name.id == "kernel" for name in function.decorator_list
    )


def lines_of_code(function):
    """All of it but the docstring."""
    n_lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        n_lines -= text.end_lineno - text.lineno + 1
    return n_lines
