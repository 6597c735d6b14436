"""The log of a run, and everything that it takes to tell what ran."""
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch

from data.errors import UsageError
from engine.endings import Stopped
from engine.ranks import Runtime

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("train_gpt.py", "muon.py", "engine/adam.py", "engine/attention.py",
           "engine/products.py", "engine/head_loss.py", "engine/kernels.py", "engine/ranks.py", "engine/endings.py",
           "engine/settings.py", "engine/checkpoint.py", "engine/log.py", "data/loader.py", "data/shards.py")


def say_fallbacks(run):
    """What a GPU run does without though nobody asked for that."""
    if run.rt.device.type == "cuda":
        if run.cfg.attention == "auto" and run.backend != "varlen":
            run.rt.print0(f"note: attention by {run.backend}, not by FlashAttention: {run.backend_reason}", file=sys.stderr)
        if run.cfg.fp8_head == "auto" and not run.fp8:
            run.rt.print0(f"note: head in {str(run.dtype)[6:]}, not in FP8: {run.fp8_reason}", file=sys.stderr)


class Startup:
    """What the time before the first step goes to: seconds of each part, since this process began where the system tells."""

    def __init__(self):
        self.parts, self.begin, self.ended = {}, time.perf_counter(), False
        try:
            started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            self.begin -= time.clock_gettime(time.CLOCK_BOOTTIME) - started
        except (OSError, AttributeError):  # not Linux
            pass

    def mark(self, part: str):
        """All since the last mark was this part."""
        self.parts[part] = time.perf_counter() - self.begin - sum(self.parts.values())

    def end(self, part: str, log: "Log"):
        """The last part; what comes later is no start-up."""
        if not self.ended:
            self.mark(part)
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
            log.write(f"start-up: {sum(self.parts.values()):.1f} s: {parts}", show=False)
            self.ended = True


class Log:
    """logs/<uuid4>.txt, rank 0 only. Step lines follow the grammar of the public speedrun logs; all else is on lines of
    its own. On a terminal a progress bar stands for the training lines."""

    def __init__(self, cfg, rt: Runtime):
        self.run_id, self.file, self.bar, self.wandb, self.step = str(uuid.uuid4()), None, None, None, 0
        self.path = Path(cfg.log_dir) / f"{self.run_id}.txt"
        if rt.rank > 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "x", encoding="utf-8", buffering=1)
        except OSError as e:
            raise UsageError(f"--log_dir: expected a folder to write to, found {e.strerror} at {cfg.log_dir}; choose "
                             "another one")
        print(self.path, flush=True)
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                raise UsageError("--wandb: expected the package wandb, found none; pip install -r requirements.txt") from None
            try:
                self.wandb = wandb.init(project=cfg.wandb, name=self.run_id, config=dataclasses.asdict(cfg),
                                        settings=wandb.Settings(silent=True))
            except wandb.Error as e:
                raise UsageError(f"--wandb: expected to reach Weights & Biases, found: {str(e).partition(chr(10))[0]}; run "
                                 "wandb login, or set WANDB_MODE=offline") from None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
                self.bar = tqdm(total=cfg.train_steps, unit="step", dynamic_ncols=True, leave=False)
            except ImportError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.write(f"ended after step {self.step}: {str(error).partition(chr(10))[0]}", show=kind is Stopped)
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))
        if self.file is not None:
            self.file.close()
            self.file = None

    def write(self, line: str, show: bool = True):
        if self.file is None:
            return
        self.file.write(line + "\n")
        if show and self.bar is not None:
            self.bar.write(line)
        elif show:
            print(line, flush=True)

    def train(self, step: int, total: int, ms: float, loss: float | None, tokens_per_s: float):
        self.step = step
        self.write(f"step:{step}/{total} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms", show=self.bar is None)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            seen = "" if loss is None else f"loss {loss:.3f}, "
            self.bar.set_postfix_str(f"{seen}{tokens_per_s:,.0f} tokens/s", refresh=False)

    def validation(self, step: int, total: int, ms: float, loss: float):
        self.write(f"step:{step}/{total} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
        if self.wandb is not None:
            self.wandb.log({"val_loss": loss, "train_time_ms": ms}, step=step)


def host_facts(folder: str) -> list[str]:
    """What `python -m records calibrate` measured of this machine since it started, on one line."""
    try:
        host = json.loads((Path(folder) / "host.json").read_text(encoding="utf-8"))
        boot = Path("/proc/sys/kernel/random/boot_id")
        now = boot.read_text().strip() if boot.exists() else ""
    except (OSError, ValueError):
        return []
    if not isinstance(host, dict) or host.get("boot") != now:
        return ["host: measured on another machine or before a restart, left out"]
    return ["host: " + json.dumps(host)]


def muon_facts(run) -> list[str]:
    if run.muon is None:
        return []
    plan, = run.muon.placements
    matrices = sum(len(units) for bucket in plan.buckets for units in bucket)
    return [f"Muon: {matrices} matrices in {len(plan.buckets)} buckets over {run.rt.world} ranks, planned balance "
            f"{plan.efficiency:.3f}; symmetric products by {run.symmetric_reason}"]


def log_header(run, log: Log, resumed: str):
    """Everything that it takes to tell what ran: sources, versions, hardware, settings, data."""
    def output(*command) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    if log.file is None:
        return
    cfg, rt, line = run.cfg, run.rt, "=" * 100
    for i, name in enumerate(SOURCES):
        if i:
            log.write("\n".join(("-" * 40, f"# {name}", "-" * 40)), show=False)
        log.write((ROOT / name).read_text(encoding="utf-8"), show=False)
    cuda = rt.device.type == "cuda"
    cpu = f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    device = torch.cuda.get_device_name(rt.device) if cuda else cpu
    flops = [f"{run.model.flops_per_token(k) / 1e6:.1f}" for k in range(len(cfg.stage_starts))]
    facts = [
        line,
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {device} with world_size {rt.world}",
        output("nvidia-smi") if cuda else f"no GPU: {output('lscpu') or platform.platform()}",
        *host_facts(cfg.log_dir),
        f"commit: {output('git', 'rev-parse', 'HEAD') or 'unknown'}"
        f"{' with changes' if output('git', 'status', '--porcelain') else ''}",
        "config: " + json.dumps(dataclasses.asdict(cfg)),
        f"seed: {cfg.seed}",
        f"head in FP8: {'yes' if run.fp8 else 'no'} ({run.fp8_reason})",
        f"attention: {run.backend} ({run.backend_reason})",
        f"products by oneDNN: {'yes' if run.onednn else 'no'} ({run.onednn_reason})",
        f"weights: {str(run.dtype)[6:]}, {'compiled' if run.compiled else 'eager'}",
        *muon_facts(run),
        f"parameters: {sum(p.numel() for p in run.model.parameters()):,}, {run.model.matmul_params():,} in matrix products, "
        f"MFLOP per token by stage: {', '.join(flops)}",
        f"training data: {cfg.train_tokens:,} tokens from {len(run.loader.paths)} shards, fingerprint {run.loader.fingerprint}",
        f"validation data: first {cfg.val_tokens} tokens, sha256 {run.validation.sha256}",
    ]
    if resumed:
        facts.append(f"resumed: from {resumed}; such a run is no record")
    log.write("\n".join((*facts, line)), show=False)
