"""Child processes that end with their time limit or with us, whatever they started themselves."""
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence


class StopSignals:
    """SIGINT and SIGTERM as KeyboardInterrupt, also where SIGINT was ignored, as in a job in the background;
    and SIGHUP unless it was, as under nohup. While a child is started they are held back: it would be left
    alone at work. For the main thread, which is the one that Python lets handle signals."""
    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self.holding = False
        self.came = False
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in self.NUMBERS if number != signal.SIGHUP or not nohup]
        self.before = {number: signal.signal(number, self.take) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, *_):
        self.came = True
        if not self.holding:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self):
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.came:
            raise KeyboardInterrupt


def run_limited(command: Sequence[str], limit_s: float, **popen) -> subprocess.CompletedProcess:
    """Run a command as the leader of a process group and return (args, returncode, stdout, stderr) as texts.

    After `limit_s` seconds, or when a signal ends this process, the whole group is killed; a run that was cut
    short has returncode None and what it had printed. popen: of subprocess.Popen, such as cwd and env.
    """
    process = None
    with StopSignals() as stop:
        try:
            with stop.held_back():
                process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                           start_new_session=True, **popen)
            out, err = process.communicate(timeout=limit_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            out, err = process.communicate()
            code = None
        finally:
            if process is not None:
                kill_group(process.pid)  # what it left running
    return subprocess.CompletedProcess(command, code, out, err)


def ending(child: subprocess.CompletedProcess, limit_s: float) -> str:
    """Say in a clause how a child of `run_limited` ended, and the last line that it printed."""
    said = [line.strip() for line in (child.stderr or child.stdout).splitlines() if line.strip()]
    if child.returncode is None:
        how = f"gave no answer in {limit_s:.0f} s"
    elif child.returncode < 0:
        how = f"was ended by {signal.Signals(-child.returncode).name}"
    else:
        how = f"ended with exit code {child.returncode}"
    return f"{how}: {said[-1][:300]}" if said else how


def kill_group(leader: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process group; one that has ended already is no error."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS answers the latter for a group of zombies
        pass
