"""Child processes that end with their time limit or with us, whatever they started themselves."""
import os
import signal
import subprocess
from collections.abc import Sequence


def run_limited(command: Sequence[str], limit_s: float, **popen) -> subprocess.CompletedProcess:
    """Run a command as the leader of a process group and return (args, returncode, stdout, stderr) as texts.

    After `limit_s` seconds, or when this process is interrupted, the whole group is killed; a run that was
    cut short has returncode None and whatever it had printed. popen: more arguments of subprocess.Popen, such
    as cwd and env.
    """
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, **popen)
    try:
        out, err = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        out, err = process.communicate()
        code = None
    finally:
        kill_group(process.pid)  # what it left running
    return subprocess.CompletedProcess(command, code, out, err)


def kill_group(leader: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process group; one that has ended already is no error."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS answers the latter for a group of zombies
        pass
