"""The few steps that stand for a whole schedule."""
from data.errors import UsageError
from train_gpt import Config, parse_config

# Several steps of every stage; on track small, checkpoints before and after embedding and head part.
SHORT = dict(extension_steps=4, val_every=11, save_every=10, max_epochs=1000)
STEPS_OF_A_STAGE = 6


def short_run(flags: list[str]) -> Config:
    """Return the settings of a run through all stages of these flags' settings, in few steps."""
    asked = parse_config(flags)[1]
    track = asked.pop("track", "small")
    whole = Config.for_track(track, **SHORT | asked)
    steps = STEPS_OF_A_STAGE * whole.stages + SHORT["extension_steps"]
    short = SHORT | dict(train_steps=steps, val_tokens=2 * whole.val_slice)
    cfg = Config.for_track(track, **short | asked)
    passed = {cfg.stage(step) for step in range(cfg.train_steps)}
    if len(passed) < len(cfg.stage_starts):
        raise UsageError(f"--train_steps: expected steps in each of {len(cfg.stage_starts)} stages, found "
                         f"{len(passed)} with any in {cfg.train_steps} steps; raise it")
    return cfg
