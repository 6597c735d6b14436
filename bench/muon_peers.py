"""Whom bench.muon measures: one maker per implementation behind the same settings, and processes to try them in.

A setting that an implementation lacks and that would change its result raises NotPosed: the question cannot be put to
it. Nothing but public interfaces is used.
"""
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import math
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.distributed as dist

JORDAN = (3.4445, -4.7750, 2.0315)


class NotPosed(Exception):
    """The question cannot be put through the public interface."""


class Refused(Exception):
    """The optimizer turned the parameters or settings away when it was built."""


class Failed(Exception):
    """First line of an error in another process."""


# ----------------------------------------------------------------------------------------------------------------------
# What goes over the wire

class Wire:
    """Counts the bytes that this rank sends in torch.distributed's collectives, as a ring sends them (what it receives is
    as much), and can delay launches and waits. Stands in their places, so it must be made before other people's
    optimizers are imported. DTensor's own collectives do not pass here."""
    WEIGHTS = {"all_reduce": 2, "reduce_scatter_tensor": 1, "reduce_scatter_single": 1, "reduce_scatter": 1,
               "all_gather_into_tensor": 1, "all_gather_single": 1, "all_gather": 1, "all_to_all_single": 1,
               "all_to_all": 1, "broadcast": 1, "gather": 1, "scatter": 1}

    def __init__(self):
        self.reset()
        ours = [sys.modules[name] for name in ("muon", "muon_extras.fsdp") if name in sys.modules]  # imported before
        for name in self.WEIGHTS:
            if hasattr(dist, name):
                original = getattr(dist, name)
                counted = self._wrap(name, original)
                for module in [dist, *ours]:
                    for key in [key for key, value in vars(module).items() if value is original]:
                        setattr(module, key, counted)

    def reset(self, delay=None) -> None:
        self.sent, self.calls, self.delay, self.inside = 0.0, 0, delay or (lambda: None), False

    def _wrap(self, name, collective):
        def call(*args, **kwargs):
            if self.inside:  # one collective calls another
                return collective(*args, **kwargs)
            values = [*args, *kwargs.values()]
            groups = [x for x in values if isinstance(x, dist.ProcessGroup)]
            world_size = dist.get_world_size(*groups[:1])
            lists = [[x] if isinstance(x, torch.Tensor) else x for x in values if isinstance(x, (torch.Tensor, list))]
            sizes = [sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)) for tensors in lists]
            self.sent += self.WEIGHTS[name] * max(sizes) * (world_size - 1) / world_size
            self.calls += 1
            self.delay()
            self.inside = True
            try:
                work = collective(*args, **kwargs)
            finally:
                self.inside = False
            return work if work is None else _Work(work, self.delay)
        return call


class _Work:
    def __init__(self, work, delay):
        self._work, self._delay = work, delay

    def wait(self, *args):
        self._delay()
        return self._work.wait(*args)

    def __getattr__(self, name):
        return getattr(self._work, name)


WIRE = Wire()


# ----------------------------------------------------------------------------------------------------------------------
# The implementations

@dataclass
class Subject:
    name: str
    version: str
    make: object                 # (params, lr, momentum, ..., the settings it has) -> optimizer
    coefficients: str = "jordan"  # the ones it has or is given, by their name in muon.COEFFICIENTS
    adjust_lr: str | None = "original"
    variants: tuple = ({},)      # settings in which the iteration's dtype or form differs
    shards: bool = False         # whether it takes a mesh for DTensor parameters

    def offers(self, *settings: str) -> bool:
        return set(settings) <= set(inspect.signature(self.make).parameters)

    def __call__(self, params, **settings):
        usual = dict(lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, adjust_lr=self.adjust_lr,
                     coefficients=self.coefficients)
        for key, value in settings.items():
            if not self.offers(key) and (key not in usual or usual[key] != value):
                raise NotPosed(f"it has no setting for {key}")
        try:
            return self.make(list(params), **{k: v for k, v in (usual | settings).items() if self.offers(k)})
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            raise Refused(first_line(error)) from error

    def adjusted(self, name: str | None, table: dict):
        if name not in table:
            raise NotPosed(f"it has no adjust_lr {name}")
        return table[name]


def original(lr, shape):
    return lr * math.sqrt(max(1, shape[-2] / shape[-1]))


def ours(muon) -> Subject:
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    def make(params, coefficients="polar", adjust_lr="original", flatten=False, **settings):
        kind = muon.Muon
        if any(hasattr(p, "device_mesh") for p in params):
            kind = importlib.import_module("muon_extras.fsdp").FsdpMuon
        return kind(params, ns_coefficients=coefficients, adjust_lr_fn=adjust_lr or "identity", flatten=flatten,
                    **settings)
    known = [p for name, p in inspect.signature(muon.Muon).parameters.items() if name != "flatten"]
    mine = [p for p in inspect.signature(make).parameters.values() if p.name not in ("params", "settings")]
    make.__signature__ = inspect.Signature([*known, *(p.replace(kind=p.KEYWORD_ONLY) for p in mine)])
    return Subject("muon.py", "this", make, coefficients="polar", variants=(
        {}, dict(ns_dtype=fp32, ns_form="standard"), dict(ns_dtype=fp32, ns_form="gram"),
        dict(ns_dtype=bf16, ns_form="standard"), dict(ns_dtype=fp16, ns_form="gram")))


def torch_muon(optim) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr):
        return optim.Muon(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                          ns_coefficients=JORDAN, adjust_lr_fn=subject.adjusted(adjust_lr, {
                              "original": "original", "match_rms_adamw": "match_rms_adamw"}))
    subject = Subject("torch.optim.Muon", torch.__version__, make)
    return subject


def gram_newton_schulz(module) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr, split=None):
        groups = [dict(params=params)] if split is None else [dict(
            params=params, param_split_fn=lambda x: list(x.split(split)), param_recombine_fn=torch.cat)]
        with contextlib.redirect_stdout(io.StringIO()):  # it reports the restarts that it chose
            return module.Muon(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                               ns_coefficients=[JORDAN] * 5, ns_use_kernels=torch.cuda.is_available() and bool(
                                   importlib.util.find_spec("quack")),
                               adjust_lr=subject.adjusted(adjust_lr, {
                                   "original": original, "match_rms_adamw": "rms_norm", "spectral": "spectral_norm",
                                   None: None}))
    subject = Subject("gram-newton-schulz", "", make)
    return subject


def heavyball(module) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay):
        return module.Muon(params, lr=lr, betas=(momentum, 0.99), nesterov=nesterov, weight_decay=weight_decay,
                           heavyball_momentum=True)  # its other average adds M to G without weights
    return Subject("heavyball", "", make, coefficients="quintic")


def muon_optimizer(module) -> Subject:
    def make(params, lr, momentum, weight_decay):
        kind = module.Muon if dist.is_initialized() else module.SingleDeviceMuon
        return kind(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Subject("muon-optimizer", "", make)


def optimuon(module) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr, ns_dtype=torch.bfloat16, split=None):
        halves = {} if split is None else dict(ns_split_fn=lambda x: list(x.split(split)), ns_recombine_fn=torch.cat)
        return module.Muon(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                           ns_coefficients=JORDAN, ns_norm_scale=1.0, ns_dtype=ns_dtype, normuon=False, cautious_wd=False,
                           gram_ns=False, distributed=dist.is_initialized(), **halves, adjust_lr=subject.adjusted(
                               adjust_lr, {"original": "original", "match_rms_adamw": "match_rms_adamw", None: "none"}))
    subject = Subject("optimuon", "", make, variants=({}, dict(ns_dtype=torch.float32)))
    return subject


def dion(module) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr, split=None, flatten=False, mesh=None):
        groups = [dict(params=params, **({} if split is None else dict(split_sizes=tuple(split))))]
        return module.Muon(groups, mesh or (dist.group.WORLD if dist.is_initialized() else None), lr=lr, mu=momentum,
                           nesterov=nesterov, weight_decay=weight_decay, flatten=flatten, adjust_lr=subject.adjusted(
                               adjust_lr, {"spectral": "spectral_norm", "match_rms_adamw": "rms_norm", None: None}))
    subject = Subject("dion", "", make, coefficients="polar", adjust_lr="spectral", shards=True)
    return subject


SUBJECTS = {  # name -> (maker, module, whether the module must be found by its distribution: it is a second muon.py)
    "muon.py": (ours, "muon", False),
    "torch.optim.Muon": (torch_muon, "torch.optim", False),
    "gram-newton-schulz": (gram_newton_schulz, "gram_newton_schulz", False),
    "heavyball": (heavyball, "heavyball", False),
    "muon-optimizer": (muon_optimizer, "muon", True),
    "optimuon": (optimuon, "optimuon", False),
    "dion": (dion, "dion", False),
}


def load(name: str) -> Subject:
    """ImportError and the like say why a subject cannot run here."""
    maker, module, by_file = SUBJECTS[name]
    if by_file:
        path = importlib.metadata.distribution(name).locate_file(f"{module}.py")
        spec = importlib.util.spec_from_file_location(name.replace("-", "_"), path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    if name == "torch.optim.Muon" and not hasattr(loaded, "Muon"):
        raise ImportError(f"torch {torch.__version__} has none")
    subject = maker(loaded)
    subject.version = subject.version or importlib.metadata.version(name)
    return subject


def load_all(names) -> tuple[dict[str, Subject], dict[str, str]]:
    """(subjects by name, why the others are missing)."""
    subjects, missing = {}, {}
    for name in names:
        try:
            subjects[name] = load(name)
        except Exception as error:  # whatever a foreign package raises on import
            missing[name] = first_line(error)
    return subjects, missing


def first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:160] if text else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Processes: forked, so that a subject is imported once

def isolated(seconds: float, function, *args):
    """function(*args) in a forked process that is ended, with all that it started, after so many seconds."""
    pipe, process = _fork(function, args, session=True)
    try:
        if not pipe.poll(seconds):
            raise Failed(f"no answer within {seconds:g} s")
        return _answer(pipe)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def ranks(world_size: int, function, *args) -> list:
    """[function(rank, *args) of each rank], in gloo processes of one thread; the first error of any ends them all."""
    with tempfile.TemporaryDirectory() as folder:
        started = [_fork(_rank, (rank, world_size, f"{folder}/store", function, args)) for rank in range(world_size)]
        answers, waiting = {}, {rank: pipe for rank, (pipe, _) in enumerate(started)}
        try:
            while waiting:
                for rank in [r for r, pipe in waiting.items() if pipe.poll(0.005)]:
                    answers[rank] = _answer(waiting.pop(rank))
            return [answers[rank] for rank in range(world_size)]
        finally:
            for _, process in started:
                process.kill()
                process.join()


def _rank(rank: int, world_size: int, store: str, function, args):
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    result = function(rank, *args)
    dist.barrier()
    return result


def _fork(function, args, session: bool = False):
    here, there = get_context("fork").Pipe()
    process = get_context("fork").Process(target=_child, args=(here, there, session, function, args))
    process.start()
    there.close()
    return here, process


def _child(here, there, session: bool, function, args):
    here.close()
    if session:
        os.setsid()
    torch.set_num_threads(1)
    try:
        answer = True, function(*args)
    except BaseException as error:
        answer = False, error if type(error) in (NotPosed, Refused, Failed) else Failed(first_line(error))
        if os.environ.get("BENCH_TRACEBACK"):
            traceback.print_exc()
    there.send_bytes(pickle.dumps(answer))
    there.poll(None)  # until the parent has what it needs of all ranks; a backend's own clean-up may hang
    os._exit(0)


def _answer(pipe):
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise Failed("the process died") from None
    if not ok:
        raise value
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Memory of this process

def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def resident_peak(run) -> int:
    """Bytes by which run() raises the memory of this process at most. Linux resets the mark; elsewhere: NotPosed."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        raise NotPosed("the system keeps no resettable high-water mark") from None
    before = resident()
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run, device: torch.device) -> float:
    """On CUDA between two events, else by the clock."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        begin.record()
        run()
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
