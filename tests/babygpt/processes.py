"""Processes of one gloo group, forked from the tests' own: torch is imported already."""

import contextlib
import io
import os
import pickle
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

DEADLINE_S = 120


def in_processes(work, folder, n=2):
    """Return [(result, what was printed)] of work(rank) in n processes that can talk."""
    pids = [fork(lambda rank=rank: _one(work, folder, rank, n)) for rank in range(n)]
    wait(pids)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(n)]


def _one(work, folder, rank, n):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=n)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = work(rank)
    (folder / f"result-{rank}").write_bytes(pickle.dumps((result, printed.getvalue())))
    dist.barrier()


def fork(work, output=None):
    """Run work in a process of its own, what it prints in a file; return its id at once.

    The process ends with the status that work returns, None is 0.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # the parent's other threads are not here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output is not None:
            for stream in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = work() or 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pids, status=0):
    """Wait for processes that must end so; when one does not or time is up, end them all."""
    running, deadline = set(pids), time.monotonic() + DEADLINE_S
    try:
        while running:
            assert time.monotonic() < deadline, f"processes {running} did not finish"
            for pid in sorted(running):
                done, ended = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    ended = os.waitstatus_to_exitcode(ended)
                    assert ended == status, f"process {pid} ended with {ended}"
            time.sleep(0.005)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_rows(folder, n):
    """Wait until the log of a run has n lines."""
    log = folder / "log.jsonl"
    wait_until(
        lambda: log.exists() and len(log.read_bytes().splitlines()) >= n, f"{n} lines in {log}"
    )


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.001)
