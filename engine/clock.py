"""Two clocks: of training, which stands still during everything else, and of what comes before it."""
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


class Clock:
    """Milliseconds of training. It runs from start() on and stands still inside paused(). synchronize: waits
    until the device has done all that it was asked to do."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.ms = 0.0  # up to the last pause
        self.started = None  # time.perf_counter() of the last start; None: it stands still

    def start(self) -> None:
        self.started = time.perf_counter()

    def now(self) -> float:
        """Return the milliseconds so far. Without waiting for the device, so that looking costs nothing."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        return self.ms + 1000 * running

    @contextlib.contextmanager
    def paused(self):
        self.synchronize()
        self.ms = self.now()
        self.started = None
        yield
        self.start()


class Startup:
    """Seconds of each part of the start-up, from the start of this process where the system tells it."""

    def __init__(self):
        self.parts = {}
        self.ended = False
        self.begin = time.perf_counter()
        try:
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            self.begin -= time.clock_gettime(time.CLOCK_BOOTTIME) - started
        except (OSError, AttributeError):  # not Linux
            pass

    def mark(self, part: str) -> None:
        """Count all time since the last mark as this part."""
        self.parts[part] = time.perf_counter() - self.begin - sum(self.parts.values())

    def end(self, part: str) -> str | None:
        """Mark the last part and return the account as one line. Returns None ever after."""
        if self.ended:
            return None
        self.ended = True
        self.mark(part)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"start-up: {sum(self.parts.values()):.1f} s: {parts}"
