"""tools/launch.py and tools/rank.py: what is looked at, prepared and started, and which exit code comes
back."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.helpers.commands import python
from tests.helpers.runs import launch as launch_tiny
from tests.helpers.runs import make_shards

from data import machine
from data.errors import UsageError, run_program
from data.files import ROOT
from data.loader import shards_needed
from data.shards import MAKERS
from engine.checkpoint import ENTRIES, write_checkpoint
from tools import launch
from train_gpt import Config


@pytest.fixture
def started(monkeypatch) -> SimpleNamespace:
    """Yield what launch.main would start on a machine of `gpus` GPUs and 6 cores; data scripts end with
    `data_code`."""
    seen = SimpleNamespace(gpus=0, data_code=0, scripts=[], runs=[], environ={})

    def script(command):
        seen.scripts.append(command)
        return SimpleNamespace(returncode=seen.data_code)

    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: seen.gpus > 0)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: seen.gpus)
    monkeypatch.setattr(launch, "check_driver", lambda: None)
    monkeypatch.setattr(launch, "usable_cores", lambda: 6)
    monkeypatch.setattr(launch.os, "environ", seen.environ)
    monkeypatch.setattr(launch.subprocess, "run", script)
    monkeypatch.setattr(launch, "torchrun", lambda *call: seen.runs.append(call) or 0)
    return seen


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of the track shakespeare, as far as the launcher looks at one."""
    settings = dataclasses.asdict(Config.for_track("shakespeare", train_steps=99))
    path = tmp_path / "state.pt"
    write_checkpoint(path, {**dict.fromkeys(ENTRIES), "config": settings})
    return path


# ------------------------------------------------------------------------------------------------------------
# Choices and data

RANKS = {  # (GPUs, cores, NPROC) -> ranks
    (0, 1, ""): 1,
    (0, 2, ""): 2,
    (0, 64, ""): 2,
    (0, 2, "4"): 4,
    (1, 16, ""): 1,
    (8, 96, ""): 8,
    (3, 16, "2"): 2,
}
NO_RANKS = {  # (GPUs, NPROC) -> what the refusal says
    (3, ""): "found 3 GPUs; set NPROC=2",
    (16, ""): "found 16 GPUs; set NPROC=8",
    (2, "4"): "found 4 ranks for 2 GPUs; set NPROC=2",
    (8, "5"): "found 5; set NPROC=4",
    (0, "0"): "found '0'",
    (0, "two"): "found 'two'",
}


def test_ranks_follow_from_gpus_cores_and_the_wish(started, capsys):
    for (gpus, cores, wanted), ranks in RANKS.items():
        assert launch.choose_ranks(gpus, cores, wanted) == ranks
    for (started.gpus, started.environ["NPROC"]), said in NO_RANKS.items():
        assert run_program(launch.main, []) == 2
        err = capsys.readouterr().err
        assert "expected" in err and said in err and err.count("\n") == 1
    assert started.runs == started.scripts == []


HARDWARE = [  # GPUs, arguments, track, ranks, threads
    (0, ["--seed=1"], "shakespeare", 2, "3"),
    (8, [], "small", 8, "1"),
    (4, ["--track=shakespeare"], "shakespeare", 4, "1"),
    (0, ["--track", "small"], "small", 2, "3"),
]


@pytest.mark.parametrize("gpus, args, track, ranks, threads", HARDWARE)
def test_hardware_decides_track_ranks_and_threads(started, capsys, gpus, args, track, ranks, threads):
    started.gpus = gpus
    assert launch.main(args) == 0
    line = capsys.readouterr().err
    assert line.startswith(f"{gpus or 'no'} GPU, 6 CPU cores: track {track}, ranks: {ranks}, ")
    assert started.runs == [(ranks, args)] and started.environ["OMP_NUM_THREADS"] == threads
    [command] = started.scripts
    assert command[:3] == [sys.executable, "-m", MAKERS[os.path.dirname(Config.for_track(track).train_files)]]
    if track == "small":  # as many shards as the schedule needs
        assert launch.main([*args, "--train_steps=5000"]) == 0
        shards = [int(command[-1]) for command in started.scripts]
        longer = Config.for_track("small", train_steps=5000)
        assert shards == [shards_needed(Config.for_track("small")), shards_needed(longer)]
        assert shards[0] < shards[1]


def test_without_a_seed_it_says_that_runs_are_equal_before_several_are_made(started, checkpoint, capsys):
    note = "note: without --seed every run has seed 0, and several are one run made again; give each its own"
    for args, told in ([], True), (["--muon_lr=0.1"], True), (["--seed=0"], False):
        assert launch.main(args) == 0
        assert (note in capsys.readouterr().err) == told
    assert launch.main([f"--resume={checkpoint}"]) == 0  # which has its seed
    assert note not in capsys.readouterr().err


@pytest.mark.parametrize("program", ["tools.launch", "train_gpt"])
def test_a_gpu_that_torch_cannot_use_ends_the_run_instead_of_leaving_it_to_the_cpu(tmp_path, program):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: Some H100 (UUID: 1)'\n")
    driver.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
    child = python("-m", program, "--track=shakespeare", **env)
    assert (child.returncode, child.stdout, len(child.stderr.splitlines())) == (2, "", 1)
    assert "lists (GPU 0: Some H100" in child.stderr and "CUDA_VISIBLE_DEVICES= ./run.sh" in child.stderr


def test_the_quota_of_a_container_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "open", lambda path: (tmp_path / "cpu.max").open(), raising=False)
    for text, cores in [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 16), ("", 16)]:
        (tmp_path / "cpu.max").write_text(text)
        assert machine.usable_cores() == cores


def test_ctrl_c_in_the_script_of_the_data_starts_no_run(started, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.subprocess, "run", interrupted)
    assert launch.main([]) == 130 and started.runs == []


def test_nothing_is_prepared_for_shards_of_the_user_or_a_checkpoint(started, checkpoint):
    started.data_code, started.environ["OMP_NUM_THREADS"] = 2, "5"
    assert launch.main(["--track=small", "--train_files=mine/*.bin"]) == 0
    assert launch.main([f"--resume={checkpoint}", "--seed=3"]) == 0  # it has its own track
    assert started.scripts == [] and started.environ["OMP_NUM_THREADS"] == "5"
    assert started.runs[1][1] == [f"--resume={checkpoint}", "--seed=3"]
    assert launch.main([]) == 2  # without data nothing is started
    assert len(started.runs) == 2


def test_a_dry_run_downloads_nothing_and_says_what_a_run_would(started, tmp_path, capsys):
    started.environ["DATA_PATH"] = str(tmp_path)
    with pytest.raises(UsageError, match="expected at most the 103 training shards .* train fewer steps"):
        launch.main(["--track=small", "--dry-run", f"--train_steps={10**12}"])
    assert launch.main(["--track=small", "--dry-run", "--seed=7"]) == 0
    assert started.scripts == started.runs == []
    out = capsys.readouterr().out
    needed = 1 + shards_needed(Config.for_track("small"))
    folder = tmp_path / "data/fineweb10B"
    assert "--train_steps=1480\n" in out and "--seed=7\n" in out and "plan: track small on CPU" in out
    assert f"data: {needed} of {needed} files are missing in {folder}; a run would download them" in out

    (tmp_path / "data/shakespeare").mkdir(parents=True)
    for name in ("train", "val"):  # with data it is the trainer's turn, once they are looked at
        assert launch.main(["--track=shakespeare", "--dry-run"]) == 0 and started.runs == []
        (tmp_path / f"data/shakespeare/shakespeare_{name}_000000.bin").touch()
    assert launch.main(["--track=shakespeare", "--dry-run"]) == 0
    assert len(started.scripts) == len(started.runs) == 1


# ------------------------------------------------------------------------------------------------------------
# Settings, once

REFUSED = {  # arguments -> the beginning of the one sentence
    ("--trian_steps=5",): "expected a setting of --help, found '--trian_steps=5'; did you mean ",
    ("--train_steps=0",): "--train_steps: expected a positive number, found 0",
    ("--resume=nope.pt",): "nope.pt: expected a checkpoint of this program, found no such file",
    ("--resume=~/nope.pt",): f"{Path.home()}/nope.pt: expected a checkpoint of this program, found no such ",
    ("--resume=CHECKPOINT", "--track=small"): "--track: expected the checkpoint's track, shakespeare, found ",
    ("--resume=CHECKPOINT", "--recipe=miniature"): "--recipe: expected the checkpoint's recipe, base, found ",
}


@pytest.mark.parametrize("args", REFUSED)
def test_settings_and_checkpoint_are_refused_once_before_anything_starts(started, checkpoint, capsys, args):
    given = [arg.replace("CHECKPOINT", str(checkpoint)) for arg in args]
    assert run_program(launch.main, given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(REFUSED[args]) and err.count("\n") == 1
    assert started.runs == started.scripts == []


# ------------------------------------------------------------------------------------------------------------
# Exit codes

FAILURES = [  # {rank: (exit code, second)}, exit code, message
    ({0: (2, 10), 1: (-15, 10)}, 2, ""),
    ({1: (1, 10), 0: (2, 10)}, 2, ""),
    ({0: (1, 10), 1: (-9, 41)}, 1, ""),
    ({0: (1, 10), 1: (-9, 10)}, 1, "rank 1 ended by SIGKILL"),
    ({1: (-11, 10), 0: (-15, 10)}, 1, "rank 1 ended by SIGSEGV"),
    ({0: (-15, 10)}, 1, "rank 0 ended by SIGTERM"),
    ({0: (3, 10), 1: (3, 10)}, 1, "found that they lost contact"),
]


def test_failed_ranks_end_in_one_exit_code_and_one_sentence_at_most(capsys):
    for ranks, code, message in FAILURES:
        failures = {rank: SimpleNamespace(exitcode=exitcode, timestamp=second)
                    for rank, (exitcode, second) in ranks.items()}
        assert launch.exit_code(failures) == code
        err = capsys.readouterr().err
        assert message in err and bool(message) == bool(err)


# ------------------------------------------------------------------------------------------------------------
# With the real torchrun

LAUNCH = """
import sys
from tools import launch
launch.RANK_PROGRAM = [sys.argv[1]]
sys.exit(launch.run_program(launch.main, sys.argv[2:]))
"""
TRAINER = """
import json, os, signal, sys, time
os.chdir(os.path.dirname(__file__))
rank = os.environ["RANK"]

def tell(name, text=""):
    with open("." + name + rank, "w") as file:
        file.write(text)
    os.rename("." + name + rank, name + rank)

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.02)
"""
AWKWARD = ["--train_files=two words/*", "--wandb=\"'$HOME", "--log_dir="]  # the first: no data are prepared


def start(folder: Path, trainer: str, *args: str, hang_up=signal.SIG_DFL) -> subprocess.Popen:
    """The launcher with two ranks that run a trainer of a few lines. hang_up: what SIGHUP does at the start,
    whatever it does in this process."""
    program = folder / "trainer.py"
    program.write_text(TRAINER + trainer)
    env = {**os.environ, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        env.pop(name, None)
    command = [sys.executable, "-c", LAUNCH, program, *AWKWARD, *args]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(folder: Path, *names: str) -> None:
    """Wait until files of these names are there; the time limit of the test ends it."""
    while not all((folder / name).exists() for name in names):
        time.sleep(0.02)


def test_ranks_get_arguments_and_threads_and_the_failure_of_one_is_told_once(tmp_path):
    trainer = """
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MASTER_ADDR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
tell("rank", json.dumps([[os.environ[name] for name in names], sys.argv[1:]]))
wait_for("rank0")
if rank == "1":
    sys.exit(print("my message", file=sys.stderr) or 2)
time.sleep(600)
"""
    process = start(tmp_path, trainer, "--seed=1")
    out, err = process.communicate(timeout=600)
    threads = str(max(1, launch.usable_cores() // 2))
    environment = ["2", threads, "1000", "127.0.0.1", "60"]  # the last: seconds for all ranks to save
    expected = [environment, [*AWKWARD, "--seed=1"]]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == expected
    line, message = err.splitlines()
    assert re.fullmatch(r"no GPU, \d+ CPU cores?: track shakespeare, ranks: 2, threads of each: \d+", line)
    assert (process.returncode, out, message) == (2, "", "my message")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_signal_lets_all_ranks_end_and_a_hang_up_may_be_ignored(tmp_path, nohup):
    trainer = """
def stop(number, frame):
    tell("received", signal.Signals(number).name)
    wait_for("go")
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, stop)
tell("up")
time.sleep(600)
"""
    process = start(tmp_path, trainer, "--seed=1", hang_up=signal.SIG_IGN if nohup else signal.SIG_DFL)
    wait_for(tmp_path, "up0", "up1")
    number = signal.SIGINT if nohup else signal.SIGHUP
    if nohup:
        process.send_signal(signal.SIGHUP)
    process.send_signal(number)
    wait_for(tmp_path, "received0", "received1")
    process.send_signal(number)  # an impatient one changes nothing
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, len(err.splitlines())) == (128 + number, "", 1), err
    received = [(tmp_path / f"received{rank}").read_text() for rank in range(2)]
    assert received == [number.name] * 2


@pytest.mark.parametrize("program", [
    "train_gpt.py", "-m tools.sample", "-m bench.step", "-m bench.ablate", "-m bench.theory",
    *(f"examples/{name}.py" for name in ("convnet", "kimi", "train_simple"))])
def test_idle_threads_of_every_program_that_trains_soon_sleep(program, tmp_path):
    """Torch's library of threads looks at the variable when it is loaded."""
    (tmp_path / "torch.py").write_text(
        "import os\nprint(os.environ['GOMP_SPINCOUNT'], flush=True)\nos._exit(0)\n")
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, *program.split()], cwd=ROOT, text=True, capture_output=True,
                          env=variables | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr


def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n")
    done = python("-m", "tools.launch", PYTHONPATH=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_before_the_trainer_listens_ends_a_rank_without_a_traceback(tmp_path):
    program = "import sys, time\nprint(sys.argv, flush=True)\ntime.sleep(600)\n"
    (tmp_path / "train_gpt.py").write_text(program)
    command = [sys.executable, ROOT / "tools/rank.py", "--seed=1"]
    env = {**os.environ, "LAUNCHED_BY": str(os.getpid())}
    rank = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)
    assert rank.stdout.readline() == "['train_gpt.py', '--seed=1']\n"
    rank.send_signal(signal.SIGINT)
    out, err = rank.communicate(timeout=600)
    assert (rank.returncode, err) == (130, "")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_launcher_that_is_killed_leaves_no_rank_at_work_and_a_checkpoint(tmp_path):
    folder = make_shards(tmp_path)
    with launch_tiny(folder, "--save_every=100000") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        assert len(ranks) == 2
    try:  # now the launcher is killed
        while any(is_at_work(pid) for pid in ranks):
            time.sleep(0.1)
    finally:
        for pid in ranks:
            if is_at_work(pid):
                os.kill(int(pid), signal.SIGKILL)
    assert len(list((folder / "logs").rglob("state_step*.pt"))) == 1


def is_at_work(pid: str) -> bool:
    """Return whether a process is neither gone nor a zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
