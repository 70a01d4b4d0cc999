"""The threads of the CPU path: who computes, in which modes, and what becomes of a failure."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from oracle import fused, random_logits, random_targets

from fused_ce import autograd, backend, cpu, fused_cross_entropy
from fused_ce.cpu import workers


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """However many cores there are; and blocks so small that every thread gets some."""
    monkeypatch.setattr(cpu.blocks, "block_rows", lambda *_: 3)
    monkeypatch.setattr(cpu.blocks, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(autograd, "are_few", lambda *_: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    with backend("cpu"):
        yield
    torch.set_num_threads(threads)


def names_of(n_blocks):
    """Of the threads that compute each block, which waits until all four have one."""
    everybody, names = threading.Barrier(min(n_blocks, 4)), []

    def compute(block):
        if block < 4:
            everybody.wait(10)
        names.append(threading.current_thread().name)

    workers.share(range(n_blocks), lambda: compute)
    return names


def test_every_thread_takes_blocks_and_computes_alone():
    numbers = []

    def compute(_):
        numbers.append(torch.get_num_threads())

    workers.share(range(9), lambda: compute)
    assert numbers == [1] * 9
    assert set(names_of(4)) == {"fused_ce"}


def test_one_block_and_one_core_are_computed_where_they_are():
    here = [threading.current_thread().name]
    assert names_of(1) == here
    torch.set_num_threads(1)
    seen = []
    workers.share(range(5), lambda: lambda _: seen.append(threading.current_thread().name))
    assert seen == here * 5


def test_calls_from_within_a_worker_run_inline():
    """All threads of the pool may be there: nobody would be left to compute."""
    inner = []

    def compute(block):
        outer = threading.get_ident()
        workers.share(range(6), lambda: lambda _: inner.append(outer == threading.get_ident()))

    workers.share(range(8), lambda: compute)
    assert inner == [True] * 48


def test_the_number_of_threads_stays_that_of_the_user():
    """Here, and in threads that begin later, which take what was set last by anybody."""
    code = """if True:
        import threading, torch, fused_ce
        torch.set_num_threads(3)
        x = torch.randn(64, 140_000, requires_grad=True)
        fused_ce.fused_cross_entropy(x, torch.zeros(64).long()).backward()
        found = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start(); thread.join()
        print(found, sum(thread.name == "fused_ce" for thread in threading.enumerate()))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[3, 3] 3", result.stderr


@pytest.mark.parametrize("given", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller(given):
    logits, targets = random_logits(20, 33), random_targets(20, classes=33)
    right = fused_cross_entropy(logits, targets, return_stats=True)
    with given():
        logits, targets = logits.clone(), targets.clone()
        loss, stats = fused_cross_entropy(logits, targets, return_stats=True)
        assert loss.is_inference() == stats.lse.is_inference() == torch.is_inference_mode_enabled()
        torch.testing.assert_close((loss, stats), right, rtol=0, atol=0)
        loss.add_(1.0)


def test_default_dtype_does_not_matter():
    logits, targets = random_logits(20, 33), random_targets(20, classes=33)
    right, right_gradient, upstream = fused(logits, targets)
    torch.set_default_dtype(torch.float64)
    try:
        loss, gradient, _ = fused(logits, targets, upstream=upstream)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, right) and torch.equal(gradient, right_gradient)


def test_bitwise_equal_from_run_to_run(monkeypatch):
    """Whoever takes which block, and however long they take."""
    logits, targets = random_logits(40, 301), random_targets(40, classes=301)
    load, turn = cpu.passes.load, iter(range(10**6))

    def slow_load(*args):
        time.sleep(0.002 * (next(turn) * 7 % 5))
        return load(*args)

    right, right_gradient, upstream = fused(logits, targets)
    monkeypatch.setattr(cpu.passes, "load", slow_load)
    for _ in range(5):
        loss, gradient, _ = fused(logits, targets, upstream=upstream)
        assert torch.equal(loss, right) and torch.equal(gradient, right_gradient)


class TestFailures:
    def test_an_exception_reaches_the_caller_and_nobody_else(self, monkeypatch):
        logits, targets = random_logits(40, 33), random_targets(40, classes=33)
        right = fused_cross_entropy(logits, targets)
        load = cpu.passes.load

        def failing(x, block, options):
            if block.rows.start == 9:
                raise MemoryError("not enough")
            return load(x, block, options)

        monkeypatch.setattr(cpu.passes, "load", failing)
        with pytest.raises(MemoryError, match="not enough"):
            fused_cross_entropy(logits, targets)
        monkeypatch.setattr(cpu.passes, "load", load)
        assert torch.equal(fused_cross_entropy(logits, targets), right)

    def test_nothing_of_a_failed_call_is_held(self, monkeypatch):
        """Whoever is out of memory tries a smaller batch: without the rows of the larger one."""

        def failing(*_):
            raise MemoryError("not enough")

        monkeypatch.setattr(cpu.passes, "load", failing)

        def call():
            logits = random_logits(40, 33)
            with pytest.raises(MemoryError):
                fused_cross_entropy(logits, random_targets(40, classes=33))
            return weakref.ref(logits)

        gc.disable()
        try:
            held, patience = call(), time.monotonic() + 10
            while held() is not None and time.monotonic() < patience:
                time.sleep(0.01)  # a thread may be about to leave its last function
            assert held() is None
        finally:
            gc.enable()

    def test_the_others_stop_at_the_next_block(self):
        done = []

        def compute(block):
            if block == 0:
                raise KeyError
            time.sleep(0.01)
            done.append(block)

        with pytest.raises(KeyError):
            workers.share(range(1000), lambda: compute)
        assert len(done) < 100

    def test_nobody_writes_any_more_after_an_interrupt(self):
        """What a caller gets back after Ctrl-C is his alone."""
        writing, done = set(), []

        def compute(block):
            writing.add(threading.get_ident())
            if block == 5:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)
            done.append(block)
            writing.discard(threading.get_ident())

        with pytest.raises(KeyboardInterrupt):
            workers.share(range(1000), lambda: compute)
        assert not writing and len(done) < 500
        assert set(names_of(4)) == {"fused_ce"}

    def test_a_failure_while_a_thread_prepares(self):
        def worker():
            raise MemoryError("no scratch")

        with pytest.raises(MemoryError, match="no scratch"):
            workers.share(range(8), worker)


@pytest.mark.parametrize("n_started", [0, 2])
def test_where_no_more_threads_may_start(monkeypatch, n_started):
    """Fewer compute, or the caller alone."""
    monkeypatch.setattr(workers, "_pool", workers.Pool())
    start, started = threading.Thread.start, []

    def refused(thread):
        if len(started) == n_started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    logits, targets = random_logits(40, 33), random_targets(40, classes=33)
    loss = fused_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    assert len(started) == n_started and torch.get_num_threads() == 4


def test_several_callers_at_once():
    """Threads of a user's own, of DataParallel, of autograd: they share the pool."""
    n_callers, wrong = 6, []

    def call(seed):
        logits = random_logits(40, 101, seed=seed)
        targets = random_targets(40, classes=101)
        with backend("cpu"):
            for _ in range(10):
                loss, gradient, upstream = fused(logits, targets)
                with backend("reference"):
                    right, right_gradient, _ = fused(logits, targets, upstream=upstream)
                if not (torch.allclose(loss, right) and torch.allclose(gradient, right_gradient)):
                    wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(n_callers)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_after_a_fork():
    """The threads are gone in the child, which gets its own."""
    code = """if True:
        import os, threading, torch, fused_ce
        torch.set_num_threads(2)
        x, y = torch.randn(64, 20_000), torch.zeros(64).long()
        right = fused_ce.fused_cross_entropy(x, y)
        for _ in range(2):
            child = os.fork()
            if child == 0:
                same = torch.equal(fused_ce.fused_cross_entropy(x, y), right)
                os._exit(0 if same and threading.active_count() == 3 else 1)
            print(os.waitpid(child, 0)[1])
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["0", "0"], result.stderr


def test_the_interpreter_ends_in_the_middle_of_nothing():
    """Threads that wait for work do not keep a process alive."""
    code = """if True:
        import torch, fused_ce
        torch.set_num_threads(2)
        fused_ce.fused_cross_entropy(torch.randn(64, 140_000), torch.zeros(64).long())
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
