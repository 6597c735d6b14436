"""What the tests of the verbs share."""
import json

import pytest

from data.files import ROOT
from records.__main__ import guarded


@pytest.fixture
def records(capsys):
    """Exit code, output and errors of `python -m records ARGUMENTS`, in this process."""
    def call(*arguments):
        code = guarded([*map(str, arguments)])
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan_text(pairs: int) -> str:
    """The plan.json of an A/B experiment."""
    seeds = [{"seed": seed, "order": "ab"} for seed in range(pairs)]
    return json.dumps({"a": "x", "b": "y", "pairs": seeds})
