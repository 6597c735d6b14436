"""Whole commands under a Python that lacks what one on macOS lacks (tests/helpers/mac), and what scripts may
not use because macOS has bash 3.2 and BSD's tools.

What a Linux machine cannot try: torch's own modules for macOS, gloo over libuv, and its file system.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.files import ROOT
from tests.helpers.runs import TINY, make_shards
from tests.records.test_ab import FAKE

SCRIPTS = ("run.sh", "test.sh", "tools/setup.sh")
NOT_ON_MACOS = re.compile(
    r"\b(mapfile|readarray|coproc|flock|nproc|setsid|taskset|timeout|realpath|stdbuf|tac|shuf)\b(?![(.])"
    r"|declare -[Ag]|local -[nA]|wait -n|\|&|&>>|\$\{\w+(\^|,)|\$\{\w+@|\[\[ -v |printf '%\("
    r"|readlink -f|sed -i|date -d|grep -P|cp --|stat -c|mktemp --|sort -V|xargs -r|head -n -|ls --|cat -A")


def on_a_mac(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    variables |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests/helpers/mac"), str(ROOT))), "NPROC": "2",
                  "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, text=True,
                          capture_output=True, timeout=110)


@pytest.mark.skipif(sys.platform != "linux", reason="takes from Linux what macOS lacks")
def test_a_run_of_two_ranks_and_its_text_need_nothing_that_macos_lacks(tmp_path):
    own_data = "--train_files=data/shakespeare/shakespeare_train_*.bin"  # nothing is to be prepared
    settings = [*TINY, own_data, "--products=auto", "--save_final=on", f"--log_dir={tmp_path}/logs"]
    done = on_a_mac(make_shards(tmp_path), "-m", "tools.launch", *settings)
    assert done.returncode == 0 and "MacOs" not in done.stderr, done.stderr
    log = next(tmp_path.glob("logs/*.txt")).read_text().rpartition("config: ")[2]
    for fact in ("collectives: gloo;", "products by oneDNN: no", "products in bfloat16: no (no units",
                 "weights: float32"):
        assert fact in log, fact

    checkpoint = next(tmp_path.glob("logs/*/*.pt"))
    done = on_a_mac(tmp_path, "-m", "tools.sample", str(checkpoint), "--prompt=abc", "--tokens=5")
    assert (done.returncode, done.stdout[:3]) == (0, "abc"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="takes from Linux what macOS lacks")
def test_an_experiment_in_pairs_needs_nothing_that_macos_lacks(tmp_path):
    command = f"{FAKE} --log_dir={tmp_path}/logs"
    done = on_a_mac(tmp_path, "-m", "records", "ab", "--runs=2", f"--out={tmp_path}/ab", f"--a={command}",
                    f"--b={command}")
    assert done.returncode == 0, done.stderr
    assert "Loss: the same in every pair" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_use_nothing_that_macos_lacks(name):
    lines = (ROOT / name).read_text().splitlines()
    code = [line.partition("  # ")[0] for line in lines if not line.lstrip().startswith("#")]
    found = [line for line in code if NOT_ON_MACOS.search(line)]
    assert not found


def test_no_two_files_differ_by_case_alone():
    """On the file systems of macOS and Windows they would be one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    assert len({name.lower() for name in listed}) == len(listed)
