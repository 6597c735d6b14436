"""Checkpoint files: written whole or not at all, read without running anything in them."""
import dataclasses
from pathlib import Path

import torch

from data.errors import RunError, UsageError
from data.files import written_whole

CHECKPOINT_FORMAT = "nanogpt-speedrun checkpoint 1"


def write_checkpoint(path: Path, state: dict | None):
    """Write a state (None: nothing); it appears under its name whole or not at all."""
    if state is None:
        return
    try:
        with written_whole(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        reason = e.strerror if isinstance(e, OSError) else str(e).splitlines()[0]
        raise RunError(f"{path}: expected to write a checkpoint, found: {reason}; free some space and resume from an earlier "
                       "one") from None


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
