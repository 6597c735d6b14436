"""What a run stands on: this process among the ranks, the log, and errors that a person can act on."""
import argparse
import ctypes
import dataclasses
import difflib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import threading
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.shards import ShardError

ROOT = Path(__file__).resolve().parent
SOURCES = ("train_gpt.py", "muon.py", "newton_schulz.py", "muon_ranks.py", "adam.py", "kernels.py", "runtime.py",
           "data/loader.py", "data/shards.py")


class UsageError(ValueError):
    """The command, its settings or its files are wrong: exit code 2."""


class RunError(RuntimeError):
    """The run itself failed: exit code 1."""


class Stopped(SystemExit):
    """A signal ended the run: exit code 128 + its number, as of any program that a signal ends."""

    def __init__(self, number: int, advice: str = ""):
        super().__init__(128 + number)
        self.text = f"by {signal.Signals(number).name}{advice}"

    def __str__(self):
        return self.text


class StopSignal:
    """Ctrl-C and SIGTERM. Once a run can save, the first signal only sets `number`, and the run goes on to a step at which
    all ranks agree to save and end. Before, or at a second signal, the process leaves at once.

    Python handles a signal when the main thread is back from C, which a rank that waits in a collective for one that has
    left may never be. So a thread, told of signals through a pipe, ends the process if after `patience` seconds neither
    the handler has nor the run has called agreed(). torchrun kills 30 seconds after it has sent SIGTERM."""

    def __init__(self, patience: float = 20.0):
        self.number, self.can_save, self.patience, self.calm = 0, False, patience, threading.Event()

    def __enter__(self):
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.agreed()
        signal.set_wakeup_fd(self.fd_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.writer.close()  # ends the thread

    def handle(self, number, frame):
        if self.number or not self.can_save:
            raise Stopped(number)
        self.number = number

    def agreed(self):
        self.calm.set()

    def watch(self):
        number = self.reader.recv(1)
        if number and not self.calm.wait(self.patience if self.can_save else 2.0):
            os._exit(128 + number[0])
        self.reader.close()


ACTIONS = {  # flags that are no settings, and what argparse wants to know of them
    "resume": dict(metavar="PATH", help="continue from a checkpoint, with its settings"),
    "check": dict(action="store_true", help="test causality and probabilities of the model, then end"),
    "doctor": dict(action="store_true", help="try on this machine every piece that the run would use, then end"),
    "plan": dict(action="store_true", help="say what the run takes: memory, settings that fit, minutes, data; then end"),
    "gpu": dict(metavar="NAME", help="--plan: for this GPU, such as 'RTX 4090', instead of the one found"),
    "gpu_gib": dict(metavar="GIB", type=float, help="--plan: for a GPU with so much memory"),
}


def parse_settings(settings: type, argv: list[str], about: str) -> tuple[argparse.Namespace, dict]:
    """Command line to (actions, changed settings). One flag for each field of the dataclass `settings`, with the meaning in
    its metadata as help."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(f"expected --name=value, found: {message}; see --help")

    def parse_bool(text: str) -> bool:
        if text.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise ValueError(text)
        return text.lower() in ("true", "1", "on")

    def parse_value(text: str, kind):
        if hasattr(kind, "__args__"):  # tuple[int, ...]
            return tuple(kind.__args__[0](part) for part in text.split(",") if part)
        return parse_bool(text) if kind is bool else kind(text)

    def show(value) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    parser = Parser(allow_abbrev=False, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("actions")
    for name, options in ACTIONS.items():
        group.add_argument(f"--{name}", **options)
    group, fields = parser.add_argument_group("settings [default; tuples as 1,2,3]"), dataclasses.fields(settings)
    for f in fields:
        group.add_argument(f"--{f.name}", metavar="VALUE", help=f"{f.metadata['help']} [{show(f.default)}]".replace("%", "%%"))
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), [*(f.name for f in fields), *ACTIONS], n=1)
        raise UsageError(f"expected a setting of --help, found {unknown[0]!r}; "
                         + (f"did you mean --{near[0]}?" if near else "see --help"))
    changes = {}
    for f in fields:
        if (text := getattr(options, f.name)) is not None:
            try:
                changes[f.name] = parse_value(text, f.type)
            except ValueError:
                raise UsageError(f"--{f.name}: expected a value like {show(f.default)!r}, found {text!r}; see --help") from None
    return options, changes


CHECKPOINT_FORMAT = "nanogpt-speedrun checkpoint 1"


def write_checkpoint(path: Path, state: dict | None):
    """Write a state (None: nothing) under a partial name, then give it its own: it appears whole or not at all."""
    if state is None:
        return
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        reason = e.strerror if isinstance(e, OSError) else str(e).splitlines()[0]
        raise RunError(f"{path}: expected to write a checkpoint, found: {reason}; free some space and resume from an earlier "
                       "one") from None
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str, settings: type) -> dict:
    """What write_checkpoint wrote, if it is of this version of the program: same entries, same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # an unpickler fed with some other file raises anything
        reason = "no such file" if isinstance(e, FileNotFoundError) else "another kind of file or a damaged one"
        raise UsageError(f"{path}: expected a checkpoint of this program, found {reason}; give a state_step*.pt that it "
                         "wrote") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UsageError(f"{path}: expected a {CHECKPOINT_FORMAT}, found another kind of file; give a state_step*.pt")
    try:
        settings(**state.get("config"))
    except TypeError:  # no dictionary, or one with other keys or values
        state.pop("config", None)
    missing = {"config", "step", "train_ms", "reached", "model", "muon", "adam", "ema", "loader", "rng"} - state.keys()
    other = {f.name for f in dataclasses.fields(settings)} ^ state.get("config", {}).keys()
    if missing or other:
        raise UsageError(f"{path}: expected a checkpoint of this version of the program, found one that differs in "
                         f"{min(missing or other)}; use the version of its log")
    return state


LOST_CONTACT = 3  # exit code under launch.py, which alone knows which rank ended and why


ALONE = ("expected all ranks to go on, found one gone without a word; see what ended it (often a lack of memory), then start "
         "again or go on from a checkpoint: --resume=PATH")


def explain(e: Exception) -> str | None:
    """One sentence about what torch raises where a machine lacks something; None: an error of the program itself."""
    found = (str(e).splitlines() or [""])[0]
    if isinstance(e, torch.OutOfMemoryError) or "out of memory" in found or "can't allocate memory" in found:
        return (f"expected enough memory, found: {found}; --recompute=on needs far less for the same training, a higher "
                "--slices or lower --val_slice shortens sequences; --plan says what fits")
    if {"BackendCompilerFailed", "TritonMissing"} & {kind.__name__ for kind in type(e).__mro__}:  # not an error in our code
        return (f"expected torch.compile to work here, found: {found}; install a C++ compiler and Triton, or train without by "
                "--compile=off; TORCHDYNAMO_VERBOSE=1 shows more")
    return ALONE if any(word in str(e) for word in ("Connection", "connection", "Timed out", "NCCL", "peer")) else None


def report(main, argv: list[str]) -> int:
    """main(argv, stop) with its errors turned into an exit code, 2 for usage and 1 for a failed run, and into one message,
    from the first rank to meet one."""
    code, message = 0, None
    with StopSignal() as stop:
        try:
            code = main(argv, stop) or 0
        except Stopped as e:
            code = e.code
        except (UsageError, ShardError) as e:
            code, message = 2, str(e)
        except RunError as e:
            code, message = 1, str(e)
        except RuntimeError as e:
            code, message = 1, explain(e)
            if message is None:
                raise
            if message is ALONE and "LAUNCHED_BY" in os.environ:
                code, message = LOST_CONTACT, None
        if code and first_to_end() and message:
            print(f"train_gpt.py: {message}", file=sys.stderr, flush=True)
    return code


def first_to_end() -> bool:
    """Whether this rank is the first one to end early: one of them speaks for all."""
    if not dist.is_initialized():  # so early that all ranks of a machine meet the same error
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("ended early", 1) == 1
    except RuntimeError:  # the store is gone with the rank or the torchrun that held it
        return dist.get_rank() == 0


def leave(code: int):
    """End this process without the interpreter's clean-up, at which threads of gloo and NCCL that still release a tensor
    would now and then abort it ("terminate called without an active exception")."""
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_compiled():
    """Compiled graphs outlive the run and the machine's next start: torch keeps them in one folder, apart by its version, the
    GPU and the source of each graph, so that only what changed is compiled again."""
    import torch._dynamo.config
    import torch._functorch.config

    if os.access(ROOT, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache/compile"))
    torch._dynamo.config.recompile_limit = 64  # stages differ in shapes and windows: a graph for each
    if hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):  # HeadLoss is one
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


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


class Runtime:
    """Rank, world size, device and the few collectives that the trainer itself needs."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if ranks > gpus:
                raise UsageError(f"expected at most {gpus} ranks on this machine, one per GPU, found {ranks}; lower "
                                 "--nproc_per_node")
            torch.cuda.set_device(self.device)
        elif sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
            # Keep freed memory instead of returning it to the kernel: activations of a few MB are allocated thousands of
            # times, and the page faults cost more than the arithmetic (rms_norm of 2048 x 192: 4.1 against 0.8 ms).
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    device_id=self.device if self.device.type == "cuda" else None)

    def print0(self, *args, **kwargs):
        if self.rank == 0:
            print(*args, flush=True, **kwargs)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def together(self, fn, *args):
        """Call fn on every rank; if it raises a UsageError or RunError on one, raise that error on all of them."""
        try:
            result, error = fn(*args), None
        except (UsageError, RunError, ShardError) as e:
            result, error = None, e
        errors = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error)
        for error in errors:
            if error is not None:
                raise error
        return result


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
    plan, = run.muon.plans
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
