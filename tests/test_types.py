"""Types: `make lint` asks the checkers; here stands how, and what they do not look at."""

import ast
import importlib.util
import json

import check_types
import pytest
from check_types import ROOT, code_of, left_to_the_reader, public_names, unknown_types

OVERLOADED = [
    ("cross_entropy", "fused_cross_entropy"),
    ("linear_cross_entropy", "fused_linear_cross_entropy"),
    ("modules", "FusedCrossEntropyLoss.__init__"),
    ("modules", "FusedLinearCrossEntropyLoss.__init__"),
    ("reference", "reference_cross_entropy"),
    ("reference", "reference_linear_cross_entropy"),
    ("vocab_parallel", "vocab_parallel_cross_entropy"),
    ("vocab_parallel", "vocab_parallel_linear_cross_entropy"),
]
LOSS, BOTH = "torch.Tensor", "tuple[torch.Tensor, CrossEntropyStats]"
PAGE = """# A page

```python
from fused_ce import fused_cross_entropy

loss = fused_cross_entropy(model(inputs), targets)
```

Some words.

```python
loss, stats = fused_cross_entropy(logits, targets, return_stats=True)
stats.lse.backward(fused_cross_entropy(logits, targets, reduction=3))
```
"""


def definitions(module, path):
    """All that a module has under a name: the overloads, then the function."""
    found = ast.parse((ROOT / "fused_ce" / f"{module}.py").read_text("utf-8")).body
    *classes, function = path.split(".")
    for name in classes:
        (one,) = [node for node in found if isinstance(node, ast.ClassDef) and node.name == name]
        found = list(ast.walk(one))
    return [node for node in found if isinstance(node, ast.FunctionDef) and node.name == function]


def parameters(function):
    """{name: (kind, annotation, default)}, as they are written, without `self`."""
    of = function.args
    defaults = [None] * (len(of.args) - len(of.defaults)) + of.defaults
    every = [("positional", *one) for one in zip(of.args, defaults, strict=True)]
    every += [("keyword", *one) for one in zip(of.kwonlyargs, of.kw_defaults, strict=True)]
    return {
        argument.arg: (
            kind, ast.unparse(argument.annotation), default and ast.unparse(default)
        )
        for kind, argument, default in every
        if argument.arg != "self"
    }  # fmt: skip


@pytest.mark.parametrize(("module", "path"), OVERLOADED, ids=[path for _, path in OVERLOADED])
def test_overloads_have_the_arguments_of_their_function(module, path):
    """Checkers do not ask for it: one that an overload lacks would be an error to its caller."""
    *overloads, function = definitions(module, path)
    assert [ast.unparse(of.decorator_list[0]) for of in overloads] == ["overload"] * 3
    right, asked = parameters(function), []
    for overload in overloads:
        found = parameters(overload)
        asked.append(found["return_stats"])
        assert found | {"return_stats": right["return_stats"]} == right
        assert list(found) == list(right)
    assert asked == [
        ("keyword", "Literal[False]", "False"),
        ("keyword", "Literal[True]", None),
        ("keyword", "bool", None),
    ]


@pytest.mark.parametrize(("module", "path"), OVERLOADED, ids=[path for _, path in OVERLOADED])
def test_overloads_return_what_return_stats_asks_for(module, path):
    *overloads, function = definitions(module, path)
    if path.endswith("__init__"):
        name = path.partition(".")[0]
        returned = [ast.literal_eval(overload.args.args[0].annotation) for overload in overloads]
        assert returned == [f"{name}[{kind}]" for kind in (LOSS, BOTH, f"{LOSS} | {BOTH}")]
        return
    returned = [ast.unparse(of.returns) for of in (*overloads, function)]
    assert returned == [LOSS, BOTH, f"{LOSS} | {BOTH}", f"{LOSS} | {BOTH}"]


@pytest.mark.parametrize("name", ["FusedCrossEntropyLoss", "FusedLinearCrossEntropyLoss"])
def test_modules_are_called_as_their_forward(name):
    call, forward = (definitions("modules", f"{name}.{of}") for of in ("__call__", "forward"))
    assert parameters(call[0]) == parameters(forward[0])
    assert ast.unparse(call[0].returns) == ast.unparse(forward[0].returns) == "Returned"


def test_the_package_says_that_it_has_types():
    assert (ROOT / "fused_ce" / "py.typed").is_file()


def test_blocks_stay_on_their_lines():
    code = code_of(PAGE).splitlines()
    assert [number for number, line in enumerate(code, 1) if line] == [4, 6, 12, 13]
    assert code[5] == PAGE.splitlines()[5]
    indented = "1. so:\n\n   ```python\n   if x:\n       y()\n   ```\n"
    assert code_of(indented).split("\n") == ["", "", "", "if x:", "    y()", "", ""]
    assert code_of("```\nmake\n```\n").strip() == ""


@pytest.mark.parametrize(
    ("code", "names"),
    [
        pytest.param("y = f(x)\nx = y", ["f", "x"], id="used before it is bound"),
        pytest.param("x = x + 1", ["x"], id="bound to what it was"),
        pytest.param("import a.b as c\nimport d.e\nc(d)", [], id="imported"),
        pytest.param("for x, y in xs:\n    print(x, y)", ["xs"], id="bound by a loop"),
        pytest.param("with f() as x:\n    x()", ["f"], id="bound by with"),
        pytest.param("z = [x for x in xs if x]", ["xs"], id="of a comprehension"),
        pytest.param("def f(x):\n    y = x\n    return y + z\nf(1)", ["z"], id="of a function"),
        pytest.param("f = lambda x: x + y", ["y"], id="of a lambda"),
    ],
)
def test_names_that_are_left_to_the_reader(code, names):
    assert left_to_the_reader(code) == names


def test_public_names_without_a_known_type_are_named():
    places = [*public_names().values(), "fused_ce.integrations.transformers.patch"]
    assert "fused_ce.vocab_parallel.vocab_parallel_cross_entropy" in places
    assert "fused_ce.babygpt.config.PRESETS" in places
    known = dict(isTypeKnown=True, isTypeAmbiguous=False, diagnostics=[])
    symbols = [{"name": place, **known} for place in places]

    def said():
        return list(unknown_types(json.dumps({"typeCompleteness": {"symbols": symbols}})))

    assert said() == []
    symbols.append({"name": f"{places[0]}.member", **known, "isTypeKnown": False})
    symbols.append({"name": f"{places[0]}_of_somebody_else", **known, "isTypeKnown": False})
    symbols[1]["isTypeAmbiguous"] = True
    del symbols[2]
    unknown, ambiguous, lost = said()
    assert unknown.startswith(f"{places[0]}.member: ")
    assert ambiguous.startswith(f"{places[1]}: ")
    assert lost == f"{places[2]}: pyright has not found it"


@pytest.mark.slow
@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("mypy", "pyright")), reason="mypy or pyright is not here"
)
def test_a_wrong_call_on_a_page_is_found_by_both(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert check_types.main([page], []) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.endswith("left to its reader: inputs, logits, model, targets") for line in lines
    )
    mypy, pyright = (
        [line for line in lines if mark in line] for mark in (": error: ", " - error: ")
    )
    assert mypy and all("page.md:13: " in line for line in mypy)
    assert pyright and all("page.md:13:" in line for line in pyright)
    page.write_text(PAGE.replace("reduction=3", 'reduction="sum"'))
    assert check_types.main([page], []) == 0, capsys.readouterr().out
