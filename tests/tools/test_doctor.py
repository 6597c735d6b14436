"""tools.doctor: its pieces on machines that lack something, made up by patches; children that die; and the
command itself. Also errors of such machines that the trainer turns into sentences."""
import json
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

from data.errors import RunError, UsageError
from engine import endings, ranks
from engine.endings import explain
from tests.helpers.commands import python
from tests.helpers.runs import config, make_shards, run
from tools import doctor
from train_gpt import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method", "ignore:dynamo_pgo")


def lines(capsys, folder, *settings, pieces) -> dict[str, tuple[str, str]]:
    """name -> (mark, text) of pieces tried in this process with data and logs in folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(folder))
        doctor.try_pieces(config(f"--log_dir={folder / 'logs'}", *settings), pieces)
    found = map(json.loads, capsys.readouterr().out.splitlines())
    return {name: (mark, text) for name, mark, text in found}


# ------------------------------------------------------------------------------------------------------------
# Pieces


def test_a_machine_that_works_is_told_so_piece_by_piece(capsys, tmp_path):
    pieces = [name for name in doctor.PIECES if name != "ranks"]
    found = lines(capsys, make_shards(tmp_path), pieces=pieces)
    assert list(found) == pieces and {mark for mark, _ in found.values()} == {"ok"}
    assert "attention: blocked (fastest on a CPU)" in found["kernels"][1]
    assert found["compile"][1] == "the run is eager"
    assert "2 training shards" in found["data"][1] and list((tmp_path / "logs").iterdir()) == []


FAILS = [  # piece, settings, what is said
    ("data", "", "run python -m data.shakespeare"),
    ("kernels", "--attention=flex", "--attention: expected auto, blocked or masked on a CPU"),
    ("log_dir", "--save_final=on", "--save_every"),
    ("log_dir", "--log_dir=/dev/null/logs", "choose another --log_dir"),
    ("compile", "--compile=on", "have an error of 1.0e-01"),
]


@pytest.mark.parametrize("piece, settings, said", FAILS)
def test_what_is_wrong_fails_with_what_to_change(capsys, tmp_path, monkeypatch, piece, settings, said):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**7 + 10}))
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x, w: 1.1 * f(x, w))
    mark, text = lines(capsys, tmp_path, *settings.split(), pieces=[piece])[piece]
    assert mark == "FAIL" and said in text


def test_a_torch_that_nobody_tested_is_noted(monkeypatch):
    expected = {"2.10.1": "note", "2.11.0+cu130": "ok", "2.14.1": "ok", "2.15.0a0+git": "note", "3.0": "note"}
    for version, mark in expected.items():
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        found = doctor.try_torch(config(), torch.device("cpu"))
        assert found == (mark, f"{version}; 2.11 to 2.14 are tested")


@pytest.mark.parametrize("program", ["tools.doctor", "train_gpt"])
def test_a_torch_that_is_too_old_ends_in_a_sentence(program):
    child = python("-c", f"""
import runpy, torch
torch.__version__ = torch.torch_version.TorchVersion("2.6.0+cu124")
runpy.run_module({program!r}, run_name="__main__")
""")
    said = "expected torch 2.7 or newer, found 2.6.0+cu124; install what requirements.txt pins\n"
    assert (child.returncode, child.stdout, child.stderr) == (2, "", said)


def test_a_gpu_is_named_and_an_old_one_told_of_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    mark, text = doctor.try_device(config("--dtype=float32"), torch.device("cuda"))
    assert mark == "ok" and "Old GPU, compute capability 7.5, float32" in text
    mark, text = doctor.try_device(config(), torch.device("cuda"))
    assert mark == "note" and text.endswith("bfloat16 is only emulated before 8.0: use --dtype=float32")


@pytest.mark.parametrize("build, why", [(None, "built without CUDA"), ("13.0", "driver may be too old")])
def test_a_gpu_that_only_its_driver_sees_is_named(monkeypatch, build, why):
    monkeypatch.setattr(ranks, "output", lambda *command: "GPU 0: Some GPU\nGPU 1: Some GPU")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError, match=f"lists .GPU 0: Some GPU.*{why}"):
        doctor.try_device(config(), torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU was asked for
    assert doctor.try_device(config(), torch.device("cpu"))[0] == "ok"


def test_memory_that_others_have_taken_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**4, 24 * 2**30))
    with pytest.raises(RunError, match="see python -m tools.plan"):
        doctor.try_memory(config(), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 * 2**30, 24 * 2**30))
    mark, text = doctor.try_memory(config(), torch.device("cuda"))
    assert mark == "note" and "nvidia-smi" in text


# ------------------------------------------------------------------------------------------------------------
# Children


CHILD = """
import json, os, signal, sys, time
names = next(arg for arg in sys.argv if arg.startswith("--pieces=")).partition("=")[2].split(",")
for name in names:
    if name == "compile":
        print("Fatal: unaligned access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "kernels":
        sys.exit("no such symbol")
    if name == "ranks":
        time.sleep(600)
    print("chatter of a library")
    print(json.dumps([name, "FAIL" if name == "memory" else "ok", "first\\nsecond"]), flush=True)
    if name == "memory":
        break
"""


def test_behind_a_piece_that_ends_its_child_or_hangs_the_next_is_tried(capsys, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(doctor, "CHILD", [sys.executable, str(tmp_path / "child.py")])
    # "ranks" hangs whatever the limit is; the others only need the time that Python takes to start.
    monkeypatch.setattr(doctor, "LIMIT_S", 5.0)
    names = ["device", "kernels", "compile", "ranks", "memory", "data"]
    assert doctor.examine(names, ["--track=shakespeare"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    device   first",
        "               second",
        f"FAIL  kernels  ended with exit code 1: no such symbol; {doctor.PIECES['kernels'][1]}",
        "FAIL  compile  was ended by SIGSEGV: Fatal: unaligned access; "
        "--compile=off trains the same without, slower",
        "FAIL  ranks    gave no answer in 5 s; NPROC=1 ./run.sh does without",
        "FAIL  memory   first",
        "               second",
        "ok    data     first",
        "               second",
        "doctor: the run cannot start; change what says FAIL",
    ]


def test_the_command_itself_reports_and_exits_with_the_finding(tmp_path):
    command = "-m", "tools.doctor", "--track=shakespeare", f"--log_dir={tmp_path / 'logs'}"
    result = python(*command, DATA_PATH=tmp_path, CUDA_VISIBLE_DEVICES="")
    marks = [line[:4].strip() for line in result.stdout.splitlines() if line[4:6] == "  "]
    assert result.returncode == 1 and marks.count("FAIL") == 1 and marks.count("ok") == 7, result.stdout
    assert result.stderr == ""


# ------------------------------------------------------------------------------------------------------------
# No compiler, no memory: a sentence instead of a traceback


def test_without_a_compiler_doctor_and_trainer_say_what_to_do(capsys, tmp_path):
    # Not by monkeypatch, which deletes the option of torch afterwards.
    nowhere = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    with torch._inductor.config.patch(nowhere):
        mark, text = lines(capsys, tmp_path, "--compile=on", pieces=["compile"])["compile"]
    assert mark == "FAIL" and "No working C++ compiler" in text and "--compile=off" in text
    bare = ("--num_layers=1 --long_layers=0 --cache_layer=0 --skip= --value_embed_layers= "
            "--attn_gate_layers=0 --xsa_layers=0")
    with torch._inductor.config.patch(nowhere):
        result = run(make_shards(tmp_path), "--compile=on", *bare.split())
    # torch 2.14 says beside it that it keeps the compiler's folder.
    [line] = [said for said in result.err.splitlines() if "/_inductor/" not in said]
    assert result.code == 1 and "expected torch.compile to work here, found: InvalidCxxCompiler" in line
    assert "--compile=off" in line


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.6 GiB.\nSee documentation"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to"),
], ids=["GPU", "driver", "CPU"])
def test_no_memory_in_the_warm_up_ends_with_the_fields_to_change(tmp_path, monkeypatch, error):
    def accumulate(self, batches, step):
        raise error
    monkeypatch.setattr(Run, "accumulate", accumulate)
    result = run(make_shards(tmp_path))
    [line] = result.err.splitlines()
    assert result.code == 1 and line.startswith("train_gpt.py: expected enough memory, found: ")
    assert all(field in line for field in ("--slices", "--val_slice", "plan")) and line.count("found") == 1


def test_an_error_of_the_program_keeps_its_traceback():
    assert explain(RuntimeError("shapes cannot be multiplied")) is None
    assert explain(ZeroDivisionError()) is None
    assert explain(RuntimeError("Connection closed by peer")) is endings.ALONE
