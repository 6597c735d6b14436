"""Programs of this repository as a user starts them."""
import os
import subprocess
import sys

from data.files import ROOT


def python(*command, **env) -> subprocess.CompletedProcess:
    """Run `python COMMAND` to its end at the root, with further variables in its environment."""
    words = [sys.executable, *map(str, command)]
    variables = os.environ | {name: str(value) for name, value in env.items()}
    return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
