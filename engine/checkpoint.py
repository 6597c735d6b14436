"""Checkpoint files: written whole or not at all, and read without running anything that is in them."""
import dataclasses
from pathlib import Path

import torch

from data.errors import RunError, UsageError
from data.files import written_whole

CHECKPOINT_FORMAT = "nanogpt-speedrun checkpoint 1"
ENTRIES = {"config", "step", "train_ms", "reached", "model", "muon", "adam", "ngrams", "ema", "data",
           "loader", "rng"}


def write_checkpoint(path: Path, state: dict | None) -> None:
    """Write a state (None: nothing); it appears under its name whole or not at all. Raises RunError."""
    if state is None:
        return
    try:
        with written_whole(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
    except (OSError, RuntimeError) as e:
        reason = disk_error(e)
        raise RunError(f"{path}: expected to write a checkpoint, found: {reason}; free some space and resume "
                       "from an earlier one") from None


def disk_error(e: Exception) -> str:
    """Return what the system said; torch raises a RuntimeError in the wake of a full disk."""
    first = e
    while e is not None and not isinstance(e, OSError):
        e = e.__context__
    return e.strerror if e is not None else str(first).splitlines()[0]


def read_checkpoint(path: str, settings: type) -> dict:
    """Return what write_checkpoint wrote, if this version of the program did: same entries, same settings.
    settings: the dataclass that the entry "config" must fit. Raises UsageError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # an unpickler fed with some other file raises anything
        reason = "another kind of file or a damaged one"
        if isinstance(e, OSError) and e.strerror:
            reason = e.strerror[0].lower() + e.strerror[1:]
        if isinstance(e, FileNotFoundError):
            reason = "no such file"
        raise UsageError(f"{path}: expected a checkpoint of this program, found {reason}; give a "
                         "state_step*.pt that it wrote") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UsageError(f"{path}: expected a {CHECKPOINT_FORMAT}, found another kind of file; "
                         "give a state_step*.pt")
    try:
        settings(**state.get("config"))
    except TypeError:  # no dictionary, or one with other keys or values
        state.pop("config", None)
    missing = ENTRIES - state.keys()
    other = {field.name for field in dataclasses.fields(settings)} ^ state.get("config", {}).keys()
    if missing or other:
        raise UsageError(f"{path}: expected a checkpoint of this version of the program, found one that "
                         f"differs in {min(missing or other)}; use the version of its log")
    return state
