"""The implementations that bench.muon compares, each made from settings with torch.optim.Muon's names.

A setting that an implementation lacks and that would change its result raises NotPosed: the question cannot
be put to it. Nothing but public interfaces is used.
"""
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.muon.processes import NotPosed, Refused, first_line
from muon import COEFFICIENTS
from muon_extras.fsdp import FsdpMuon

_, (JORDAN,) = COEFFICIENTS["jordan"]


@dataclass
class Subject:
    """An implementation; calling it builds the optimizer."""
    name: str
    make: Callable                # (params, the settings it offers) -> optimizer
    coefficients: str = "jordan"  # those it is given or has built in, by their name in muon.COEFFICIENTS
    adjust_lr_fn: str = "original"
    variants: tuple = ({},)       # settings in which the dtype or form of the iteration differs
    version: str = ""

    def offers(self, setting: str) -> bool:
        return setting in inspect.signature(self.make).parameters

    def __call__(self, params, **settings):
        usual = dict(lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, adjust_lr_fn=self.adjust_lr_fn)
        for key, value in settings.items():
            if not self.offers(key) and usual.get(key, math.nan) != value:
                raise NotPosed(f"it has no setting for {key}")
        offered = {key: value for key, value in (usual | settings).items() if self.offers(key)}
        try:
            return self.make(list(params), **offered)
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            raise Refused(first_line(error)) from error


def own_name(table: dict, adjust_lr_fn: str):
    """Translate the name of an lr adjustment into an implementation's own."""
    if adjust_lr_fn not in table:
        raise NotPosed(f"it has no adjust_lr_fn {adjust_lr_fn}")
    return table[adjust_lr_fn]


def ours(muon) -> Subject:
    def make(params, flatten=False, **settings):
        sharded = any(hasattr(p, "device_mesh") for p in params)
        return (FsdpMuon if sharded else muon.Muon)(params, flatten=flatten, **settings)
    make.__signature__ = inspect.signature(muon.Muon)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return Subject("muon.py", make, "polar", variants=({}, *(dict(ns_dtype=dtype) for dtype in dtypes)))


def torch_muon(optim) -> Subject:
    modes = {name: name for name in ("original", "match_rms_adamw")}

    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr_fn):
        return optim.Muon(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                          ns_coefficients=JORDAN, adjust_lr_fn=own_name(modes, adjust_lr_fn))
    return Subject("torch.optim.Muon", make, version=torch.__version__)


def gram_newton_schulz(module) -> Subject:
    def original(lr, shape):
        return lr * math.sqrt(max(1, shape[-2] / shape[-1]))

    modes = {"original": original, "match_rms_adamw": "rms_norm", "identity": None}

    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr_fn, split=None):
        group = dict(params=params)
        if split:
            group |= dict(param_split_fn=lambda x: list(x.split(split)), param_recombine_fn=torch.cat)
        kernels = torch.cuda.is_available() and importlib.util.find_spec("quack") is not None
        with contextlib.redirect_stdout(io.StringIO()):  # it reports the restarts that it chose
            return module.Muon(
                [group], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                adjust_lr=own_name(modes, adjust_lr_fn), ns_coefficients=[JORDAN] * 5, ns_use_kernels=kernels)
    return Subject("gram-newton-schulz", make)


def heavyball(module) -> Subject:
    def make(params, lr, momentum, nesterov, weight_decay):
        return module.Muon(
            params, lr=lr, betas=(momentum, 0.99), nesterov=nesterov, weight_decay=weight_decay,
            heavyball_momentum=True)  # its other average adds M to G without weights
    return Subject("heavyball", make, "quintic")


def muon_optimizer(module) -> Subject:
    def make(params, lr, momentum, weight_decay):
        kind = module.Muon if dist.is_initialized() else module.SingleDeviceMuon
        return kind(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return Subject("muon-optimizer", make)


def optimuon(module) -> Subject:
    modes = {"original": "original", "match_rms_adamw": "match_rms_adamw", "identity": "none"}

    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr_fn, ns_dtype=torch.bfloat16, split=None):
        cuts = dict(ns_split_fn=lambda x: list(x.split(split)), ns_recombine_fn=torch.cat) if split else {}
        return module.Muon(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
            adjust_lr=own_name(modes, adjust_lr_fn), ns_coefficients=JORDAN, ns_norm_scale=1.0,
            ns_dtype=ns_dtype, normuon=False, cautious_wd=False, gram_ns=False,
            distributed=dist.is_initialized(), **cuts)
    return Subject("optimuon", make, variants=({}, dict(ns_dtype=torch.float32)))


def dion(module) -> Subject:
    modes = {"spectral_unclamped": "spectral_norm", "match_rms_adamw": "rms_norm", "identity": None}

    def make(params, lr, momentum, nesterov, weight_decay, adjust_lr_fn, split=None, flatten=False,
             mesh=None):
        group = dict(params=params) | (dict(split_sizes=tuple(split)) if split else {})
        world = dist.group.WORLD if dist.is_initialized() else None
        return module.Muon(
            [group], mesh or world, lr=lr, mu=momentum, nesterov=nesterov, weight_decay=weight_decay,
            flatten=flatten, adjust_lr=own_name(modes, adjust_lr_fn))
    return Subject("dion", make, "polar", "spectral_unclamped")


SUBJECTS = {  # name -> (maker, its module)
    "muon.py": (ours, "muon"),
    "torch.optim.Muon": (torch_muon, "torch.optim"),
    "gram-newton-schulz": (gram_newton_schulz, "gram_newton_schulz"),
    "heavyball": (heavyball, "heavyball"),
    "muon-optimizer": (muon_optimizer, "muon"),  # a second muon.py, found by its distribution
    "optimuon": (optimuon, "optimuon"),
    "dion": (dion, "dion"),
}


def load_subject(name: str) -> Subject:
    """Import a subject; whatever it raises says why it cannot run here."""
    maker, module = SUBJECTS[name]
    if name == "muon-optimizer":
        path = importlib.metadata.distribution(name).locate_file("muon.py")
        spec = importlib.util.spec_from_file_location("muon_optimizer", path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    subject = maker(loaded)
    if name != "muon.py":
        subject.version = subject.version or importlib.metadata.version(name)
    return subject


def load_subjects(names) -> tuple[dict[str, Subject], dict[str, str]]:
    """Return (subjects by name, why the others are missing)."""
    subjects = {}
    missing = {}
    for name in names:
        try:
            subjects[name] = load_subject(name)
        except Exception as error:  # whatever a foreign package raises on import
            missing[name] = first_line(error)
    return subjects, missing
