"""What else a CPU does while it is timed: a busy neighbour can make a call 100 times slower.

Two threads on two cores meet at the end of every operation; where somebody else has one of the
cores, each meeting waits for the scheduler. No median helps against that, so a disturbed case is
timed again, and what stays disturbed says so in its note.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
DISTURBED = 0.1  # of the machine, used by others
STEP = 0.5  # seconds between two looks


class Others:
    """The share of the machine's time that other processes have had since this was made."""

    def __init__(self):
        """Begin now."""
        self._begin = _jiffies()
        self._own = time.process_time()

    def share(self) -> float:
        """0 to 1; 0 also where the system does not say."""
        now = _jiffies()
        if self._begin is None or now is None:
            return 0.0
        total = now[0] - self._begin[0]
        busy = now[1] - self._begin[1]
        own = (time.process_time() - self._own) * os.sysconf("SC_CLK_TCK")
        return max(0.0, busy - own) / total if total > 0 else 0.0


@dataclass
class Patience:
    """Seconds that a run may spend on waiting, and on timing again what was disturbed."""

    seconds: float

    def undisturbed(self, measure: Callable[[], None]) -> float:
        """Measure, again while others work and there is patience; their share in the last time."""
        while True:
            start, others = time.monotonic(), Others()
            measure()
            share = others.share()
            if share <= DISTURBED or self.seconds <= 0:
                return share
            self.seconds -= time.monotonic() - start
            self._wait()

    def _wait(self) -> None:
        """Until the machine is quiet, or patience ends."""
        while self.seconds > 0:
            others = Others()
            time.sleep(STEP)
            self.seconds -= STEP
            if others.share() <= DISTURBED / 2:
                return


def _jiffies() -> tuple[int, int] | None:
    """All of the machine's time, and that in which it worked (or was taken away), in ticks."""
    try:
        numbers = [int(text) for text in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = numbers[3] + numbers[4]
    return sum(numbers), sum(numbers) - idle
