"""Committed figures of runs on GPUs that were not there, found by `python -m bench.cross`."""
import functools
import json
from dataclasses import replace

from data.files import ROOT
from train_gpt import Config, parse_config

FOLDER = ROOT / "bench/results/2026-11-28_cross"
FREE = (  # settings that change no step
    "seed", "train_files", "val_files", "max_epochs", "val_tokens", "val_slice", "val_every", "train_steps",
    "extension_steps", "ema_frac", "log_dir", "sample_tokens", "save_every", "save_final")


@functools.cache
def traced_runs() -> dict[str, tuple[Config, dict]]:
    """Return settings and figures of all runs whose kernels were costed, by the names of their files."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "launches" in run:
            found[path.stem] = settings_of(run["flags"]), run
    return found


def settings_of(flags: str) -> Config:
    """Return the settings that these flags of a run ask for."""
    _, changes = parse_config(flags.split())
    return Config.for_track(**{"track": "small", **changes})


def traced_run(cfg: Config, ranks: int, fp8: bool) -> dict | None:
    """Return the figures of a run of so many ranks with the steps of cfg; settings in FREE change none."""
    free = {name: getattr(cfg, name) for name in FREE}
    for settings, run in traced_runs().values():
        if (run["ranks"], run["fp8"]) == (ranks, fp8) and replace(settings, **free) == cfg:
            return run
    return None
