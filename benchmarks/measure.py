"""Time and memory of calls: CUDA events on a GPU, the clock on a CPU; providers take turns."""

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

TURN_MS = 20.0  # what a provider runs before the next one's turn: three calls, or more short ones
CALLS_IN_A_TURN = (3, 30)
LONG_CALL_MS = 20.0  # one untimed call is enough to warm up for these
TURN_IN_ITSELF_MS = 250.0  # and none for these: each call is a turn, and every one counts
FAR_BEHIND = 4.0  # times the fastest; of such turns one is enough, for minutes would go there
HEAD_START_CYCLES = 600_000  # a call: 0.3 ms at 2 GHz, more than most providers' launches take
MOST_HEAD_START = 4  # times that


@dataclass
class Work:
    """Something to time; `prepare` makes its arguments outside the time."""

    prepare: Callable[[], tuple]
    call: Callable[..., Any]
    milliseconds: list[float] = field(default_factory=list)
    head_start: int = 1  # of the host, in HEAD_START_CYCLES a call
    waited: float = 0.0  # the fraction of the last turn's calls for which the GPU was waiting
    is_warm: bool = False  # it was called before: what it compiles is compiled

    @property
    def median(self) -> float:
        """Of all timed calls."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float | None:
        """Between the quartiles of all timed calls; one call has none."""
        if len(self.milliseconds) < 2:
            return None
        first, _, third = statistics.quantiles(self.milliseconds, n=4)
        return third - first


def interleave(
    works: dict[str, Work], device: torch.device, seconds: float, min_turns: int = 3
) -> dict[str, Exception]:
    """Time works in turns, for so many seconds and at least `min_turns` turns each.

    A turn is one or two untimed calls and then several timed ones. Alternating call by call would
    let the allocator decide on a CPU: what a provider with large buffers gives back to the system,
    the next one has to fault in again (float32 8,192 x 65: 0.35 ms alone, 1.4 ms alternated).
    Turns still spread over all of them what else the machine does. A call that is much longer than
    a turn is one, its first included.

    Returns:
        What a work raised, by name; its times are not complete.
    """
    failures: dict[str, Exception] = {}
    one_call: dict[str, float] = {}
    for name, work in works.items():
        try:
            one_call[name] = _warm_up(work, device)
        except Exception as error:
            failures[name] = named(error)
            give_back_memory(device)
    fastest = min(one_call.values(), default=0.0)
    enough = max(TURN_IN_ITSELF_MS, FAR_BEHIND * fastest)
    turns = 0
    end = time.perf_counter() + seconds
    while turns < min_turns or time.perf_counter() < end:
        for name, work in works.items():
            had_its_turn = one_call.get(name, 0.0) >= (enough if turns else TURN_IN_ITSELF_MS)
            if name in failures or had_its_turn:
                continue
            untimed, count = _turn(one_call[name])
            try:
                _calls(work, device, untimed)
                work.milliseconds += _calls(work, device, count)
            except Exception as error:
                failures[name] = named(error)
                give_back_memory(device)
        turns += 1
        if len(failures) == len(works):
            break
    return failures


def _warm_up(work: Work, device: torch.device) -> float:
    """Milliseconds of a call; where it is a turn in itself, that is the work's first."""
    if not work.is_warm:
        _calls(work, device, 1)  # it may compile
    work.is_warm = True
    (one_call,) = _calls(work, device, 1)
    if one_call < TURN_IN_ITSELF_MS:
        return min(one_call, *_calls(work, device, 2))  # not a turn in itself all the same
    work.milliseconds.append(one_call)
    return one_call


def _turn(one_call: float) -> tuple[int, int]:
    """How many untimed and timed calls, where one takes so many milliseconds."""
    if one_call >= TURN_IN_ITSELF_MS:
        return 0, 1
    least, most = CALLS_IN_A_TURN
    count = min(most, max(least, int(TURN_MS / max(one_call, 1e-6))))
    return 1 if one_call > LONG_CALL_MS else 2, count


def _calls(work: Work, device: torch.device, count: int) -> list[float]:
    """Milliseconds of each of `count` calls."""
    if device.type == "cuda":
        return _cuda_calls(work, count)
    times = []
    for _ in range(count):
        arguments = work.prepare()
        start = time.perf_counter()
        work.call(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_calls(work: Work, count: int) -> list[float]:
    """Between two events each, which the GPU reaches when the host is already ahead of it.

    So that what is timed is kernels, not launches: the GPU first sleeps while the host enqueues.
    A provider that waits for the device gives this head start away in every call: then launches
    and its wait are in its time, and `waited` says so. Where it was too short for some calls, the
    next turn has a longer one.
    """
    events, waited = [], 0
    torch.cuda._sleep(work.head_start * HEAD_START_CYCLES * count)
    for _ in range(count):
        arguments = work.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.call(*arguments)
        end.record()
        waited += start.query()  # the GPU was there before all of the call was enqueued
        events.append((start, end))
    torch.cuda.synchronize()
    work.waited = waited / count
    if 0 < waited < count:
        work.head_start = min(2 * work.head_start, MOST_HEAD_START)
    return [start.elapsed_time(end) for start, end in events]


def wall_ms(call: Callable[[], Any], device: torch.device, count: int) -> float:
    """Milliseconds a call takes the host and the device together, launches included."""
    for _ in range(3):
        call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / count


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before."""
    arguments = work.prepare()
    work.is_warm = True
    if device.type != "cuda":
        return _cpu_peak(lambda: work.call(*arguments))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.call(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Callable[[], Any]) -> int:
    with _silent_profiler() as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent_profiler() -> Iterator[torch.profiler.profile]:
    """torch's memory profiler, which would write lines into the tables, past Python's stderr."""
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with profile:
            yield profile
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def give_back_memory(device: torch.device) -> None:
    """What nobody holds any more goes back to the device, so that the next case can have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def named(error: Exception) -> Exception:
    """The error without its traceback, whose frames would keep a failed provider's tensors."""
    return error.with_traceback(None)


def in_a_line(error: Exception) -> str:
    """An error as a record and a log name it."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {first}"[:200] if first else type(error).__name__
