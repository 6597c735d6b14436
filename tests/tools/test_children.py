"""tools/children.py: whatever ends a program, no child of it stays at work."""
import os
import signal
import subprocess
import sys

import pytest

from data.files import ROOT
from tools import children

CHILD = "import os, sys, time; os.write(int(sys.argv[1]), b'x'); time.sleep(600)"
PROGRAM = f"""
import sys
from tools.children import run_limited
run_limited([sys.executable, "-c", {CHILD!r}, sys.argv[1]], 600, pass_fds=[int(sys.argv[1])])
"""


@pytest.fixture
def pipe():
    """The two ends of a pipe, of which one is read to its end once all who have the other one are gone."""
    ends = os.pipe()
    yield ends
    os.close(ends[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_program_ends_its_child(pipe, number):
    reader, writer = pipe
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(writer)], cwd=ROOT, pass_fds=[writer],
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
                               stderr=subprocess.DEVNULL)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    process.send_signal(number)
    assert process.wait() != 0
    assert os.read(reader, 1) == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_child_is_started_ends_it(pipe, number, monkeypatch):
    """The signal comes when there is a child of which nobody but Popen knows yet."""
    reader, writer = pipe
    popen = subprocess.Popen

    def started(*arguments, **options):
        process = popen(*arguments, **options)
        os.read(reader, 1)
        os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        children.run_limited([sys.executable, "-c", CHILD, str(writer)], 600, pass_fds=[writer])
    os.close(writer)
    assert os.read(reader, 1) == b"" and signal.getsignal(number) == before
