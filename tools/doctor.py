"""Whether a run can start on this machine, found out by trying what it would use; and whether a model looks ahead.

    python train_gpt.py --doctor [--track=NAME] [--field=value ...]
    python train_gpt.py --check                                        see check_model

One line for each piece: `ok` it will be used, `note` it will not, or there is something to know, `FAIL` the run cannot start;
with the reason and what to change. A piece does its work, forward and backward where it has one, in a process of its own with
a time limit, so that a kernel that hangs or takes its process along is a finding, not the end of the doctor. What is chosen is
what the trainer's own choose_* choose.
"""
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tools import plan
from data.loader import Loader, Validation, to_device
from data.shards import ShardError
from engine.attention import CANDIDATES, choose_backend, self_test
from engine.head_loss import choose_fp8
from engine.kernels import choose_compile, choose_dtype
from engine.products import choose_onednn, choose_symmetric
from data.errors import RunError, UsageError
from engine.endings import explain
from engine.log import ROOT
from train_gpt import softmax_logits

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # a fork would share the GPU
LIMIT = 120.0  # seconds for one piece; FlexAttention compiles two kernels


class Died(Exception):
    """A piece raised, took its process along, or hung."""


def child(answer, output: str, piece, args):
    """Body of the process: send what piece(*args) returns, or one sentence on what it raised."""
    os.setsid()  # so that it and all it starts can be ended together
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)  # libraries talk; the doctor quotes their last line if they die
    torch.set_num_threads(1)
    try:
        answer.send((True, piece(*args)))
    except Exception as e:
        answer.send((False, str(e) if isinstance(e, (UsageError, RunError)) else
                     explain(e) or f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"))


def isolated(piece, *args):
    """piece(*args) in a process of its own. Raises Died."""
    context = multiprocessing.get_context(START)
    if START == "forkserver":  # imports torch once for all pieces
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        context.set_forkserver_preload(["tools.doctor"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as output:
        process = context.Process(target=child, args=(sender, output.name, piece, args), daemon=True)
        process.start()
        sender.close()
        try:
            if not receiver.poll(LIMIT):
                raise Died(f"gave no answer in {LIMIT:.0f} s")
            fine, result = receiver.recv()
            process.join(5)  # time for its clean-up, which may fail and nobody minds
        except EOFError:
            process.join()
            said = [line for line in Path(output.name).read_text(errors="replace").splitlines() if line.strip()]
            how = f"exit code {process.exitcode}" if process.exitcode >= 0 else signal.Signals(-process.exitcode).name
            raise Died(f"ended its process by {how}{': ' + said[-1].strip() if said else ''}") from None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
    if not fine:
        raise Died(result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The pieces: each runs in a process of its own


def find_device() -> dict:
    """What torch finds; where that is no GPU, why, and what nvidia-smi sees."""
    with warnings.catch_warnings(record=True) as said:  # an old driver is a warning, and then no GPU
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info(0)
            return dict(cuda=True, name=torch.cuda.get_device_name(0), capability=torch.cuda.get_device_capability(0),
                        count=torch.cuda.device_count(), free=free, total=total)
    without = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
    try:
        seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        seen = ""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    return dict(cuda=False, name=platform.machine(), why=str(said[0].message).partition("\n")[0] if said else without,
                seen="GPU" in seen and seen, count=0, free=free, total=total)


def small_function(x, w):
    return F.relu(x @ w).square().float().mean()


def small_run(device, dtype, compiled: bool) -> str:
    """Error of a small function and its gradients as the run would compute them, against float64."""
    leaves, results = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)), []
    if compiled:  # a kernel from the cache would hide that the compiler is gone
        torch._inductor.config.force_disable_caches, torch._inductor.config.compile_threads = True, 1
    function = torch.compile(small_function, dynamic=False, fullgraph=True) if compiled else small_function
    for f, x in ((function, leaves.to(device, dtype)), (small_function, leaves.double())):
        x = [row.requires_grad_() for row in x.unbind()]
        y = f(*x)
        results.append([z.detach().cpu().double() for z in (y, *torch.autograd.grad(y, x))])
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))
    if not error < 0.02:  # some roundings of bfloat16
        raise RunError(f"a small function and its gradients have an error of {error:.1e}")
    return f"forward and backward with an error of {error:.0e}"


def attention(wish: str, *test) -> tuple[str, str]:
    """(backend, reason) of the trainer's choice, once that has passed its self-test here."""
    name, reason = choose_backend(wish, *test)
    works, said = self_test(name, *test)
    if not works:
        raise RunError(f"{reason}; {said}")
    return name, reason if name in ("varlen", "flex") and wish == "auto" else f"{reason}; {said}"


def check_products(cfg, facts, device, dtype):
    used, reason = choose_onednn(device, dtype, choose_compile(cfg.compile, device))
    return "ok", f"{'oneDNN' if used else 'torch'} ({reason})"


def symmetric_products(device) -> str:
    return choose_symmetric(device)[1]


def all_reduce(backend: str, device) -> str:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(x := torch.full((8,), 3.0, device=device))
    if x.tolist() != [3.0] * 8:
        raise RunError(f"{backend} sums up one rank's 3.0 to {x.tolist()}")
    return f"{backend}: an all-reduce of one rank works"


# ---------------------------------------------------------------------------------------------------------------------
# The lines: (mark, text) of each


def examine(cfg) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(f"doctor: track {cfg.track}, Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    marks, facts = [], dict(cuda=False, name=platform.machine(), why="asking for a GPU failed", seen="", count=0)
    for name, (check, change) in CHECKS.items():
        try:
            if name == "device":
                facts |= isolated(find_device)
            device = torch.device("cuda" if facts["cuda"] else "cpu")
            mark, text = check(cfg, facts, device, choose_dtype(cfg.dtype, device))
        except (Died, ShardError, UsageError, RunError) as e:
            mark, text = "FAIL", str(e) if "--" in str(e) else f"{e}{change}"  # unless it names the setting itself
        marks.append(mark)
        print(f"{mark:4}  {name:10} {' '.join(text.split())}", flush=True)
    print("doctor: the run can start" if "FAIL" not in marks else "doctor: the run cannot start; change what says FAIL")
    return int("FAIL" in marks)


def check_device(cfg, facts, device, dtype):
    works = f"{str(dtype)[6:]}: {isolated(small_run, device, dtype, False)}"
    if facts["cuda"]:
        old = dtype == torch.bfloat16 and facts["capability"] < (8, 0)
        text = f"{facts['count']} x {facts['name']}, compute capability {'.'.join(map(str, facts['capability']))}, {works}"
        return ("note", f"{text}; bfloat16 is only emulated before 8.0: use --dtype=float32") if old else ("ok", text)
    if facts["seen"]:
        return "note", f"CPU ({facts['why']}), {works}; nvidia-smi sees {facts['seen']}: install a torch for its driver"
    if cfg.track == "small":
        return "note", f"CPU ({facts['why']}), {works}; this track would take weeks here: leave out --track"
    return "ok", f"CPU ({facts['why']}), {works}"


def check_attention(cfg, facts, device, dtype):
    test = cfg.head_dim, cfg.attn_scale, device, dtype
    try:
        chosen, reason = isolated(attention, cfg.attention, *test)
        text = f"{chosen} ({reason})"
    except Died as e:  # as the trainer would
        chosen, text = None, f"--attention={cfg.attention}: {e}"
    works, fails = [], []
    for name in (*CANDIDATES, "blocked") if facts["cuda"] else ("blocked", "masked"):
        if name != chosen and (chosen is None or f"{name}:" not in text):  # what the reason speaks of is done
            try:
                fine, said = isolated(self_test, name, *test)
            except Died as e:
                fine, said = False, f"{name}: {e}"
            (works if fine else fails).append(name if fine else said)
    text = "; ".join([text, *(["not used, but working: " + ", ".join(works)] if works else []), *fails])
    if chosen is None:
        settings = [f"--attention={name}" for name in works if " " not in name]
        raise Died(f"{text}; use {settings[0]}" if settings else f"{text}; nothing works: see the line of the device")
    return "note" if facts["cuda"] and chosen == "blocked" else "ok", text


def check_head(cfg, facts, device, dtype):
    used, reason = isolated(choose_fp8, cfg.fp8_head, device)
    return "ok" if used or not facts["cuda"] else "note", f"{'FP8' if used else str(dtype)[6:]} ({reason})"


def check_compile(cfg, facts, device, dtype):
    if choose_compile(cfg.compile, device):
        return "ok", f"torch.compile, {isolated(small_run, device, dtype, True)}"
    return "ok", "off, as asked for" if cfg.compile == "off" else "off, as always on a CPU"


def check_ranks(cfg, facts, device, dtype):
    try:
        return "ok", isolated(all_reduce, "nccl" if facts["cuda"] else "gloo", device)
    except Died as e:
        if facts["count"] > 1:
            raise
        return "note", f"{e}; one process does without: python train_gpt.py"


def check_memory(cfg, facts, device, dtype):
    need = sum(plan.static_bytes(cfg, dtype, 1, device).values()) / plan.GIB
    free, total = facts["free"] / plan.GIB, facts["total"] / plan.GIB
    text = f"{free:.1f} of {total:.1f} GiB free; weights, gradients and optimizer take {need:.2f}, for the rest see --plan"
    if need > (free if facts["cuda"] else total):
        raise Died(text)
    if facts["cuda"] and free < 0.9 * total:
        return "note", f"{text}; another program holds the rest (nvidia-smi)"
    return "ok", text


def check_data(cfg, facts, device, dtype):
    try:
        loader, validation = Loader(cfg, 0, 1, False), Validation(cfg, 0, 1, False)
    except ShardError as e:
        raise ShardError(f"{e}; the schedule takes {plan.data_size(cfg)}") from None
    return "ok", (f"{len(loader.paths)} training shards, enough for {cfg.train_steps} steps, fingerprint {loader.fingerprint}; "
                  f"validation: {cfg.val_tokens:,} tokens, sha256 {validation.sha256[:16]}")


def check_log_dir(cfg, facts, device, dtype):
    try:
        Path(cfg.log_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.log_dir).close()
    except OSError as e:
        raise UsageError(f"--log_dir: expected a folder to write to, found {e.strerror} at {cfg.log_dir}; choose another one")
    files = cfg.save_final + (cfg.train_steps // cfg.save_every if cfg.save_every else 0)
    need, free = (files * plan.checkpoint_bytes(cfg, dtype) + 1e7) / 1e9, shutil.disk_usage(cfg.log_dir).free / 1e9
    text = f"{cfg.log_dir}: {free:.1f} GB free, {need:.2f} needed for the log and {files} checkpoints"
    if need > free:
        raise RunError(f"{text}; free some or save less often (--save_every)")
    return "ok", text


CHECKS = {  # name -> (check, what to change where it fails without saying so itself)
    "device": (check_device, "; see whether nvidia-smi works; CUDA_VISIBLE_DEVICES= trains on the CPU"),
    "attention": (check_attention, ""),
    "products": (check_products, ""),
    "head": (check_head, "; use --fp8_head=off"),
    "muon": (lambda cfg, facts, device, dtype: ("ok", f"symmetric products by {isolated(symmetric_products, device)}"),
             "; remove the package quack-kernels"),
    "compile": (check_compile, "; --compile=off trains the same without, slower"),
    "ranks": (check_ranks, "; NPROC=1 ./run.sh does without"),
    "memory": (check_memory, "; end what else uses it (nvidia-smi), or see --plan"),
    "data": (check_data, ""),
    "log_dir": (check_log_dir, ""),
}


# ---------------------------------------------------------------------------------------------------------------------
# --check


def check_model(run) -> int:
    """Causality: other tokens from position t on must not change any loss before t - 1. Probabilities must sum to 1."""
    cfg, rt, model = run.cfg, run.rt, run.model.eval()
    with torch.no_grad():
        for p in model.parameters():  # parts that start at zero would hide what they see
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
        batch = to_device(run.loader.next()[0], rt.device)
        stage, t = len(cfg.stage_starts) - 1, len(batch.inputs) // 2
        ctx = run.context(batch.docs, stage, cfg.tied(cfg.train_steps), torch.ones(1, device=rt.device))
        changed = batch.inputs.clone()
        changed[t:] = (changed[t:] + 1) % cfg.bos_id
        a, b = (softmax_logits(model, x, ctx) for x in (batch.inputs, changed))
    moved = (a[:t] - b[:t]).abs().max().item()
    total = (a.double().exp().sum(-1) - 1).abs().max().item()
    sees = (a[t:] - b[t:]).abs().max().item()
    ok = rt.sum(torch.tensor(float(moved == 0 and total < 1e-4 and sees > 0), device=rt.device)).item() == rt.world
    rt.print0(f"causality: largest change of a log probability before token {t}: {moved:.1e} (expected 0), "
              f"after it: {sees:.1e}")
    rt.print0(f"probabilities: largest deviation of a sum from 1: {total:.1e} (expected below 1e-4)")
    rt.print0("check: passed" if ok else "check: failed")
    return 0 if ok else 1
