"""doctor.py on machines that lack something, made up by patches that a forked child sees; and errors that become sentences."""
import faulthandler
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tools import doctor
from engine import attention
from engine import endings
from tests.helpers.runs import config, make_shards, run
from engine.endings import explain
from engine.log import ROOT
from train_gpt import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning", "ignore:dynamo_pgo")
GPU = dict(cuda=True, name="Old GPU", capability=(9, 0), count=1, free=20 * 2**30, total=24 * 2**30)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(doctor, "START", "fork")  # no GPU here that a fork could spoil
    monkeypatch.setattr(doctor, "LIMIT", 20.0)


def lines(capsys, folder, *args, only=None) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit code, name -> (mark, text)) of a doctor on shards in folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(folder))
        if only is not None:
            patch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("device", *only)})
        code = doctor.examine(config(f"--log_dir={folder / 'logs'}", *args))
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("doctor: the run can" + ("not start" if code else " start"))
    return code, {line[6:17].strip(): (line[:4].strip(), line[17:]) for line in out[1:-1]}


def on_gpu(monkeypatch, **facts):
    """A machine that says it has a GPU; what touches it is done on the CPU."""
    monkeypatch.setattr(doctor, "find_device", lambda: {**GPU, **facts})
    small_run = doctor.small_run
    monkeypatch.setattr(doctor, "small_run", lambda device, dtype, compiled: small_run(torch.device("cpu"), dtype, compiled))


def test_a_machine_that_works_is_told_so_piece_by_piece(capsys, tmp_path):
    code, found = lines(capsys, make_shards(tmp_path))
    assert code == 0 and list(found) == list(doctor.CHECKS) and {mark for mark, _ in found.values()} == {"ok"}
    assert found["attention"][1].startswith("blocked (fastest on a CPU; blocked: self-test error")
    assert "working: masked" in found["attention"][1] and "all-reduce of one rank works" in found["ranks"][1]
    assert "2 training shards" in found["data"][1] and list((tmp_path / "logs").iterdir()) == []


def test_missing_shards_and_a_folder_that_cannot_be_written_are_both_found(capsys, tmp_path):
    (tmp_path / "logs").write_text("mine")
    code, found = lines(capsys, tmp_path, only=("data", "log_dir"))
    assert code == 1 and found["data"][0] == found["log_dir"][0] == "FAIL"
    assert "run python -m data.shakespeare" in found["data"][1] and "choose another one" in found["log_dir"][1]


def test_too_few_shards_for_the_schedule(capsys, tmp_path):
    code, found = lines(capsys, make_shards(tmp_path), "--train_steps=900", only=("data",))
    assert code == 1 and "get more shards, raise --max_epochs or lower --train_steps" in found["data"][1]


def test_checkpoints_that_do_not_fit_on_the_disk(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**7 + 10}))
    assert lines(capsys, tmp_path, only=("log_dir",))[0] == 0
    code, found = lines(capsys, tmp_path, "--save_final=on", only=("log_dir",))
    assert code == 1 and "--save_every" in found["log_dir"][1]


def test_a_compiler_that_makes_wrong_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x, w: 1.1 * f(x, w))
    code, found = lines(capsys, tmp_path, "--compile=on", only=("compile",))
    assert code == 1 and found["compile"][0] == "FAIL" and "have an error of 1.0e-01" in found["compile"][1]


def test_an_old_gpu_is_told_of_bfloat16(capsys, tmp_path, monkeypatch):
    on_gpu(monkeypatch, capability=(7, 5))
    code, found = lines(capsys, tmp_path, only=())
    assert code == 0 and found["device"][0] == "note" and "7.5" in found["device"][1] and "--dtype=float32" in found["device"][1]
    assert lines(capsys, tmp_path, "--dtype=float32", only=())[1]["device"][0] == "ok"


def test_a_gpu_that_fails_at_its_first_operation(capsys, tmp_path, monkeypatch):
    """It is announced, and this torch cannot use it: what an unsupported capability or a broken driver looks like."""
    monkeypatch.setattr(doctor, "find_device", lambda: GPU)
    code, found = lines(capsys, tmp_path, only=("muon",))
    assert code == 1 and found["device"][0] == "FAIL" and "see whether nvidia-smi works" in found["device"][1]


def test_a_driver_that_torch_refuses(capsys, tmp_path, monkeypatch):
    def refuse():
        import warnings
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).")
        return False
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: type("Result", (), {"stdout": "GPU 0: Some GPU\n"}))
    code, found = lines(capsys, tmp_path, only=())
    assert code == 0 and found["device"][0] == "note"
    assert "driver on your system is too old" in found["device"][1] and "nvidia-smi sees GPU 0" in found["device"][1]


def test_memory_that_is_taken(capsys, tmp_path, monkeypatch):
    on_gpu(monkeypatch, free=10**4)
    code, found = lines(capsys, tmp_path, only=("memory",))
    assert code == 1 and found["memory"][0] == "FAIL" and "--plan" in found["memory"][1]
    on_gpu(monkeypatch, free=12 * 2**30)
    code, found = lines(capsys, tmp_path, only=("memory",))
    assert code == 0 and found["memory"][0] == "note" and "nvidia-smi" in found["memory"][1]


# ---------------------------------------------------------------------------------------------------------------------
# Attention kernels: the trainer's own choice, in a process that may die


def good(*args):
    return attention.masked_attention(*args)


def raising(*args):
    raise ImportError("no kernel image\nfor this device")


def wrong(q, k, v, mask, scale):
    return good(q, k, v, mask, 2 * scale)


def killing(*args):
    faulthandler.disable()
    os.write(2, b"Fatal: unaligned access\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*args):
    time.sleep(60)


def with_kernels(capsys, tmp_path, monkeypatch, *args, **backends):
    """A machine with a GPU whose kernels are these functions, run on the CPU."""
    cpu, (first_correct, self_test) = torch.device("cpu"), (attention.first_correct, attention.self_test)
    monkeypatch.setattr(doctor, "find_device", lambda: GPU)
    monkeypatch.setattr(doctor, "small_run", lambda *a: "works")
    monkeypatch.setattr(attention, "first_correct", lambda c, d, s, device, dtype: first_correct(c, d, s, cpu, dtype))
    for module in (attention, doctor):
        monkeypatch.setattr(module, "self_test", lambda c, d, s, device, dtype: self_test(c, d, s, cpu, dtype))
        monkeypatch.setattr(module, "CANDIDATES", ("varlen", "flex"))
    for name, attend in backends.items():
        monkeypatch.setitem(attention.BACKENDS, name, (attention.masked_mask, attend))
    code, found = lines(capsys, tmp_path, *args, only=("attention",))
    return code, *found["attention"]


def test_kernels_that_work(capsys, tmp_path, monkeypatch):
    code, mark, text = with_kernels(capsys, tmp_path, monkeypatch, varlen=good, flex=good)
    assert (code, mark) == (0, "ok") and text.startswith("varlen (varlen: self-test error") and "working: flex, blocked" in text


@pytest.mark.parametrize("broken, said", [(raising, "varlen: ImportError: no kernel image"), (wrong, "varlen: self-test error")])
def test_a_kernel_that_fails_is_passed_over_as_by_the_trainer(capsys, tmp_path, monkeypatch, broken, said):
    code, mark, text = with_kernels(capsys, tmp_path, monkeypatch, varlen=broken, flex=good)
    assert (code, mark) == (0, "ok") and text.startswith("flex (flex: self-test error") and said in text


def test_without_a_kernel_blocked_is_used_and_noted(capsys, tmp_path, monkeypatch):
    code, mark, text = with_kernels(capsys, tmp_path, monkeypatch, varlen=raising, flex=wrong)
    assert (code, mark) == (0, "note") and text.startswith("blocked (varlen: ImportError")


def test_a_kernel_that_kills_its_process_is_named_with_what_to_use_instead(capsys, tmp_path, monkeypatch):
    code, mark, text = with_kernels(capsys, tmp_path, monkeypatch, varlen=killing, flex=good)
    assert (code, mark) == (1, "FAIL") and "use --attention=flex" in text
    assert "varlen: ended its process by SIGSEGV: Fatal: unaligned access" in text


def test_a_kernel_that_hangs_is_ended(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 2.0)
    code, mark, text = with_kernels(capsys, tmp_path, monkeypatch, varlen=hanging, flex=good)
    assert (code, mark) == (1, "FAIL") and "gave no answer in 2 s" in text and "use --attention=flex" in text


def test_a_symmetric_kernel_that_kills_its_process(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "choose_symmetric", lambda device: os.kill(os.getpid(), signal.SIGKILL))
    code, found = lines(capsys, tmp_path, only=("muon",))
    assert code == 1 and "SIGKILL" in found["muon"][1] and "remove the package quack-kernels" in found["muon"][1]


def test_fp8_that_was_asked_for_and_is_not_there(capsys, tmp_path):
    code, found = lines(capsys, tmp_path, "--fp8_head=on", only=("head",))
    assert code == (found["head"][0] == "FAIL") and ("--fp8_head" in found["head"][1] or "FP8" in found["head"][1])


# ---------------------------------------------------------------------------------------------------------------------
# No compiler, no memory: a sentence instead of a traceback


def test_without_a_compiler_doctor_and_trainer_say_what_to_do(capsys, tmp_path, monkeypatch):
    import torch._inductor.config
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    code, found = lines(capsys, tmp_path, "--compile=on", only=("compile",))
    assert code == 1 and found["compile"][0] == "FAIL" and "No working C++ compiler" in found["compile"][1]
    assert "--compile=off" in found["compile"][1]
    result = run(make_shards(tmp_path), "--compile=on", "--num_layers=1", *"--long_layers=0 --cache_layer=0 --skip="
                 " --value_embed_layers= --attn_gate_layers=0 --xsa_layers=0".split())
    [line] = result.err.splitlines()
    assert result.code == 1 and "expected torch.compile to work here, found: InvalidCxxCompiler" in line
    assert "--compile=off" in line


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.6 GiB.\nSee documentation"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
], ids=["GPU", "driver", "CPU"])
def test_no_memory_in_the_warm_up_ends_with_the_fields_to_change(tmp_path, monkeypatch, error):
    def accumulate(self, batches, step):
        raise error
    monkeypatch.setattr(Run, "accumulate", accumulate)
    result = run(make_shards(tmp_path))
    [line] = result.err.splitlines()
    assert result.code == 1 and line.startswith("train_gpt.py: expected enough memory, found: ")
    assert all(field in line for field in ("--slices", "--val_slice", "--plan")) and line.count("found") == 1


def test_an_error_of_the_program_keeps_its_traceback():
    assert explain(RuntimeError("shapes cannot be multiplied")) is None and explain(ZeroDivisionError()) is None
    assert explain(RuntimeError("Connection closed by peer")) is endings.ALONE


def test_the_command_itself_reports_and_exits_with_the_finding(tmp_path):
    """The real thing: a fork server, and pieces that start from it."""
    command = [sys.executable, "train_gpt.py", "--track=shakespeare", "--doctor", f"--log_dir={tmp_path / 'logs'}"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=110,
                            env={**os.environ, "DATA_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    marks = [line[:4].strip() for line in result.stdout.splitlines()[1:-1]]
    assert result.returncode == 1 and marks.count("FAIL") == 1 and len(marks) == len(doctor.CHECKS), result.stdout
    assert result.stderr == ""
