"""The log of a run: everything that it takes to tell what ran, then one line for each event."""
import contextlib
import dataclasses
import json
import platform
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from data.errors import RunError, UsageError
from data.files import ROOT
from data.machine import output
from engine.endings import Stopped
from engine.ranks import Runtime, say

SOURCES = (  # what the log embeds; of the engine all, so that no new file is forgotten
    "train_gpt.py", "muon.py",
    *(f"engine/{path.name}" for path in sorted((ROOT / "engine").glob("*.py")) if path.name != "__init__.py"),
    "data/loader.py", "data/shards.py")
BANNER = "=" * 100
LOSSES_PER_LINE = 10


class Log:
    """logs/<uuid4>.txt, written by rank 0 only. Step lines follow the grammar of the public speedrun logs;
    all else is on lines of its own. On a terminal a progress bar stands for the training lines."""

    def __init__(self, cfg, rt: Runtime):
        self.run_id = str(uuid.uuid4())
        self.path = Path(cfg.log_dir) / f"{self.run_id}.txt"
        self.file = self.bar = self.wandb = None
        self.step = 0
        self.losses = []  # of training, since the last line about them
        if rt.rank > 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "x", encoding="utf-8", buffering=1)
        except OSError as e:
            raise UsageError(f"--log_dir: expected a folder to write to, found {e.strerror} at "
                             f"{cfg.log_dir}; choose another one")
        say(self.path)
        if cfg.wandb:
            self.wandb = start_wandb(cfg, self.run_id)
        if sys.stderr.isatty():
            self.bar = progress_bar(cfg.train_steps)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            reason = str(error).partition("\n")[0]
            with contextlib.suppress(RunError):  # a log that cannot grow cannot say so either
                self.write(f"ended after step {self.step}: {reason}", show=kind is Stopped)
        self.use_bar(lambda bar: bar.close())
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def write(self, line: str, show: bool = True):
        """Write a line, and show it on the screen too unless told not to."""
        if self.file is None:
            return
        try:
            self.file.write(line + "\n")
        except OSError as e:
            raise RunError(f"{self.path}: expected to write the log, found: {e.strerror}; free some space "
                           "and start again, or go on from a checkpoint: --resume=latest") from None
        if show and self.bar is None:
            say(line)
        elif show:
            self.use_bar(lambda bar: bar.write(line))

    def use_bar(self, function):
        """Call a function of the bar, if there is one; a terminal that was closed costs the bar alone."""
        if self.bar is not None:
            try:
                function(self.bar)
            except OSError:
                self.bar = None

    def header(self, cfg, rt: Runtime, facts: list[str], sources: Sequence[str] = SOURCES):
        """Write sources, versions, hardware, settings, and the facts that only the run knows. A first source
        without a name above it is train_gpt.py, as in the public logs."""
        if self.file is None:
            return
        for name in sources:
            if name != "train_gpt.py":
                self.write(f"{'-' * 40}\n# {name}\n{'-' * 40}", show=False)
            self.write((ROOT / name).read_text(encoding="utf-8"), show=False)
        settings = [f"config: {json.dumps(dataclasses.asdict(cfg))}", f"seed: {cfg.seed}"]
        lines = [BANNER, *machine_facts(rt), commit_fact(), *settings, *facts, BANNER]
        self.write("\n".join(lines), show=False)

    def train(self, step: int, total: int, ms: float, loss: float | None, tokens_per_s: float):
        """Write the line of a training step. loss: the newest that has arrived from the device."""
        self.step = step
        self.note_loss(step, loss)
        line = f"step:{step}/{total} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        self.write(line, show=self.bar is None)

        def advance(bar):
            bar.update(step - bar.n)
            seen = "" if loss is None else f"loss {loss:.3f}, "
            bar.set_postfix_str(f"{seen}{tokens_per_s:,.0f} tokens/s", refresh=False)

        self.use_bar(advance)

    def note_loss(self, step: int, loss: float | None):
        """Write the mean of some training losses, on a line that no parser of step lines takes."""
        if loss is None:
            return
        self.losses.append(loss)
        if len(self.losses) == LOSSES_PER_LINE:
            mean = sum(self.losses) / len(self.losses)
            line = f"training loss until step {step}: {mean:.4f} (mean of {len(self.losses)})"
            self.write(line, show=False)
            self.losses.clear()
        if self.wandb is not None:
            self.wandb.log({"train_loss": loss}, step=step)

    def validation(self, step: int, total: int, ms: float, loss: float):
        average = ms / max(step, 1)
        self.write(f"step:{step}/{total} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{average:.2f}ms")
        if self.wandb is not None:
            self.wandb.log({"val_loss": loss, "train_time_ms": ms}, step=step)


def start_wandb(cfg, run_id: str):
    try:
        import wandb
    except ImportError:
        raise UsageError("--wandb: expected the package wandb, found none; "
                         "pip install -r requirements.txt") from None
    try:
        return wandb.init(project=cfg.wandb, name=run_id, config=dataclasses.asdict(cfg),
                          settings=wandb.Settings(silent=True, init_timeout=20))
    except wandb.Error as e:
        found = str(e).partition("\n")[0]
        raise UsageError(f"--wandb: expected to reach Weights & Biases, found: {found}; run wandb login, or "
                         "set WANDB_MODE=offline") from None


def progress_bar(total: int):
    """Return a tqdm bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, leave=False)


def machine_facts(rt: Runtime) -> list[str]:
    cuda = rt.device.type == "cuda"
    if cuda:
        device = torch.cuda.get_device_name(rt.device)
    else:
        device = f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    return [
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {device} "
        f"with world_size {rt.world}",
        output("nvidia-smi") if cuda else f"no GPU: {output('lscpu') or macos_processor()}",
    ]


def macos_processor() -> str:
    """Return system and processor where there is no lscpu, as on macOS."""
    return f"{platform.platform()} {output('sysctl', '-n', 'machdep.cpu.brand_string')}".strip()


def commit_fact() -> str:
    changed = " with changes" if output("git", "status", "--porcelain") else ""
    return f"commit: {output('git', 'rev-parse', 'HEAD') or 'unknown'}{changed}"
