"""The choice of an implementation: nested, restored, a thread's own, and clear when impossible."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fused_ce import backend, fused_cross_entropy
from fused_ce.backend import BACKENDS, choose, implementation

CPU = torch.device("cpu")


@pytest.fixture
def no_triton(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a)
    )


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )  # fmt: skip


def test_auto_is_the_default():
    assert choose(CPU) == "cpu"
    assert choose(torch.device("meta")) == "reference"


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_auto_sends_gpus_to_triton(kind):
    pytest.importorskip("triton")
    assert choose(torch.device(kind, 0)) == "triton"


def test_auto_without_triton_warns_and_runs_the_reference(no_triton):
    with pytest.warns(UserWarning, match="pip install triton"):
        assert choose(torch.device("cuda", 0)) == "reference"
    assert choose(CPU) == "cpu"


def test_triton_without_triton_is_an_error(no_triton):
    with backend("triton"), pytest.raises(ValueError, match="not installed"):
        choose(CPU)


def test_nesting_and_restoring():
    with backend("reference"):
        assert choose(CPU) == "reference"
        with backend("cpu"):
            assert choose(CPU) == "cpu"
            with backend("auto"):
                assert choose(torch.device("meta")) == "reference"
            assert choose(CPU) == "cpu"
        assert choose(CPU) == "reference"
    assert choose(CPU) == "cpu"


def test_an_exception_restores():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert choose(CPU) == "cpu"


def test_as_a_decorator():
    @backend("reference")
    def inside():
        return choose(CPU)

    assert [inside(), inside()] == ["reference"] * 2
    assert choose(CPU) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 3])
def test_bad_names_are_refused_at_once(name):
    with pytest.raises(ValueError) as error, backend(name):
        pytest.fail("entered")
    assert ", ".join(BACKENDS) in str(error.value) and repr(name) in str(error.value)
    assert choose(CPU) == "cpu"


def test_threads_do_not_see_each_other():
    seen, ready, done = [], threading.Event(), threading.Event()

    def other():
        with backend("reference"):
            ready.set()
            done.wait(10)
            seen.append(choose(CPU))

    thread = threading.Thread(target=other)
    with backend("cpu"):
        thread.start()
        assert ready.wait(10)
        assert choose(CPU) == "cpu"
        done.set()
        thread.join()
    assert seen == ["reference"]


def test_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("FUSED_CE_BACKEND", "reference")
    assert choose(CPU) == "reference"
    with backend("cpu"):
        assert choose(CPU) == "cpu"
    with backend("auto"):
        assert choose(CPU) == "cpu"


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("FUSED_CE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FUSED_CE_BACKEND must be one of .* got 'gpu'"):
        fused_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())


def test_a_device_is_no_backend():
    """What a user of a GPU tries first."""
    with pytest.raises(ValueError, match='must be one of .* got \'cuda\': "auto" and "triton"'):
        with backend("cuda"):
            pass


def test_cpu_backend_needs_cpu_tensors():
    with backend("cpu"), pytest.raises(ValueError, match="'cpu' needs .* got meta"):
        choose(torch.device("meta"))


def test_triton_backend_needs_a_gpu():
    pytest.importorskip("triton")
    with backend("triton"), pytest.raises(ValueError, match="'triton' needs .* got meta"):
        choose(torch.device("meta"))


def test_triton_on_cpu_tensors_without_the_interpreter():
    pytest.importorskip("triton")
    code = """if True:
        import torch, fused_ce
        with fused_ce.backend("triton"):
            try:
                fused_ce.fused_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
            except ValueError as error:
                print(error)
    """
    result = run(code, TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET=1" in result.stdout and "cpu" in result.stdout, result.stderr


def test_implementations_offer_the_same_functions():
    pytest.importorskip("triton")
    import inspect

    for name in ("forward", "forward_with_grad", "backward", "scale"):
        signatures = [
            list(inspect.signature(getattr(implementation(kind), name)).parameters)
            for kind in ("cpu", "triton")
        ]
        assert signatures[0] == signatures[1]
