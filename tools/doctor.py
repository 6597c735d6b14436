"""Find out whether a run can start on this machine, by trying what it would use.

    python -m tools.doctor [--track=NAME] [--field=value ...]

Prints one entry for each piece: `ok`, `note` where a run does without it or should know something, `FAIL`
where the run cannot start, with what to change. A child process tries piece after piece. Where one ends the
process or hangs, that is its finding, and another child goes on behind it.
"""
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F

from data.errors import RunError, UsageError, run_program
from data.loader import Loader, Validation
from data.machine import memory_bytes
from engine import TESTED_TORCH
from engine.endings import explain
from engine.kernels import Kernels, choose_dtype, name_of, whole_graph, will_compile
from engine.ranks import check_driver
from engine.self_test import in_one_line, largest_error
from tools.children import ending, run_limited
from tools.plan import GIB, checkpoint_bytes, static_bytes
from train_gpt import Config, parse_config

CHILD = [sys.executable, "-m", "tools.doctor"]
LIMIT_S = 180.0  # of a child; FlexAttention and torch.compile make kernels first


# ------------------------------------------------------------------------------------------------------------
# The pieces: each returns (mark, text) or raises


def try_torch(cfg: Config, device: torch.device) -> tuple[str, str]:
    first, last = (".".join(map(str, version)) for version in TESTED_TORCH)
    text = f"{torch.__version__}; {first} to {last} are tested"
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    tested = TESTED_TORCH[0] <= version <= TESTED_TORCH[1]
    return "ok" if tested else "note", text


def try_device(cfg: Config, device: torch.device) -> tuple[str, str]:
    dtype = choose_dtype(cfg.dtype, device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        text = (f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability "
                f"{capability[0]}.{capability[1]}, {name_of(dtype)}")
        if dtype == torch.bfloat16 and capability < (8, 0):
            return "note", f"{text}; bfloat16 is only emulated before 8.0: use --dtype=float32"
        return "ok", text
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
    text = f"CPU ({why}), {name_of(dtype)}"
    check_driver()
    if cfg.track != "shakespeare":
        return "note", f"{text}; this track would take weeks here: leave out --track"
    return "ok", text


def try_kernels(cfg: Config, device: torch.device) -> tuple[str, str]:
    """Let the trainer choose, which runs its self-tests."""
    kernels = Kernels.choose(cfg, device)
    return "note" if kernels.fallbacks(cfg) else "ok", "\n".join(kernels.facts())


def small_function(x, w):
    return F.relu(x @ w).square().float().mean()


def value_and_gradients(function, leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.requires_grad_() for leaf in leaves.unbind()]
    y = function(*leaves)
    return [z.detach().cpu() for z in (y, *torch.autograd.grad(y, leaves))]


def try_compile(cfg: Config, device: torch.device) -> tuple[str, str]:
    """Compare a small function and its gradients, compiled, with float64."""
    if not will_compile(cfg, device):
        return "ok", "the run is eager"
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    there = x.to(device, choose_dtype(cfg.dtype, device))
    # A kernel from the cache would hide that the compiler is gone.
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        found = value_and_gradients(whole_graph(small_function), there)
    error = largest_error(found, value_and_gradients(small_function, x.double()))
    if not error < 0.02:  # some roundings of bfloat16
        raise RunError(f"a small function and its gradients have an error of {error:.1e}")
    return "ok", f"compiled, forward and backward with an error of {error:.0e}"


def try_ranks(cfg: Config, device: torch.device) -> tuple[str, str]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.full((8,), 3.0, device=device)
    dist.all_reduce(x)
    if x.tolist() != [3.0] * 8:
        raise RunError(f"{backend} sums up one rank's 3.0 to {x.tolist()}")
    return "ok", f"{backend}: an all-reduce of one rank works"


def try_memory(cfg: Config, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        there = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    else:
        free = total = memory_bytes()
        there = f"{total / GIB:.1f} GiB in all"
    need = sum(static_bytes(cfg, choose_dtype(cfg.dtype, device), 1).values())
    text = (f"{there}; weights, gradients and optimizer take {need / GIB:.2f}, for the rest see python -m "
            "tools.plan")
    if need > free:
        raise RunError(text)
    if free < 0.9 * total:
        return "note", f"{text}; another program holds the rest (nvidia-smi)"
    return "ok", text


def try_log_dir(cfg: Config, device: torch.device) -> tuple[str, str]:
    Path(cfg.log_dir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cfg.log_dir).close()
    files = cfg.save_final + (cfg.train_steps // cfg.save_every if cfg.save_every else 0)
    need = files * checkpoint_bytes(cfg, choose_dtype(cfg.dtype, device)) / 1e9 + 0.01
    free = shutil.disk_usage(cfg.log_dir).free / 1e9
    text = f"{cfg.log_dir}: {free:.1f} GB free, {need:.2f} needed for the log and {files} checkpoints"
    if need > free:
        raise RunError(f"{text}; free some or save less often (--save_every)")
    return "ok", text


def try_data(cfg: Config, device: torch.device) -> tuple[str, str]:
    loader, validation = Loader(cfg, 0, 1, False), Validation(cfg, 0, 1, False)
    return "ok", (f"{len(loader.paths)} training shards, enough for {cfg.train_steps} steps, fingerprint "
                  f"{loader.fingerprint}; validation: {cfg.val_tokens:,} tokens, "
                  f"sha256 {validation.sha256[:16]}")


PIECES = {  # name -> (function, what to change where it fails)
    "torch": (try_torch, ""),
    "device": (try_device, "see whether nvidia-smi works"),
    "kernels": (try_kernels, "name an --attention (flex, blocked, masked), or --fp8_head=off"),
    "compile": (try_compile, "--compile=off trains the same without, slower"),
    "ranks": (try_ranks, "NPROC=1 ./run.sh does without"),
    "memory": (try_memory, "end what else uses it (nvidia-smi), or see python -m tools.plan"),
    "log_dir": (try_log_dir, "choose another --log_dir"),
    "data": (try_data, ""),
}


# ------------------------------------------------------------------------------------------------------------
# The child and its parent


def try_pieces(cfg: Config, names: list[str]) -> None:
    """Print [name, mark, text] of each piece as JSON, up to a failure, which may have spoilt the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        piece, advice = PIECES[name]
        try:
            mark, text = piece(cfg, device)
        except (UsageError, RunError) as error:
            mark, text = "FAIL", str(error)
        except Exception as error:  # whatever a missing or broken piece raises
            mark, text = "FAIL", explain(error) or in_one_line(error)
        if mark == "FAIL" and advice and "--" not in text:  # else it names the setting itself
            text = f"{text}; {advice}"
        print(json.dumps([name, mark, text]), flush=True)
        if mark == "FAIL":
            return


def examine(names: list[str], settings: list[str]) -> int:
    """Print an entry for each piece as a child finds it. Return 1 if one of them fails."""
    failed = False
    while names:
        child = run_limited([*CHILD, "--pieces=" + ",".join(names), *settings], LIMIT_S)
        found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('["')]
        if not found or (len(found) < len(names) and found[-1][1] != "FAIL"):
            name = names[len(found)]  # it ended the child
            found.append([name, "FAIL", f"{ending(child, LIMIT_S)}; {PIECES[name][1]}"])
        for name, mark, text in found:
            failed = failed or mark == "FAIL"
            print(f"{mark:4}  {name:8} " + text.replace("\n", "\n" + " " * 15), flush=True)
        names = names[len(found):]
    print("doctor: the run cannot start; change what says FAIL" if failed else "doctor: the run can start")
    return int(failed)


ACTIONS = {
    "pieces": dict(metavar="NAME,NAME", help="try these in this process, and print what was found as JSON"),
}


def main(argv: list[str]) -> int:
    options, changes = parse_config(argv, __doc__, ACTIONS)
    cfg = Config.for_track(**changes)
    if options.pieces:
        try_pieces(cfg, options.pieces.split(","))
        return 0
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"doctor: track {cfg.track}, {versions}", flush=True)
    return examine(list(PIECES), argv)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "tools.doctor"))
