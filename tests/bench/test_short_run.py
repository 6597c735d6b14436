"""The few steps that bench.cross takes in the place of a whole schedule."""
import pytest

from bench.cross.short import short_run
from data.errors import UsageError


@pytest.mark.parametrize("flags", ["", "--recipe=record89", "--track=medium", "--stages=1 --untie_stage=-1"])
def test_a_short_run_passes_all_stages(flags):
    cfg = short_run(flags.split())
    steps = range(cfg.train_steps)
    assert {cfg.stage(step) for step in steps} == set(range(len(cfg.stage_starts)))
    assert set(cfg.graph_starts) <= set(steps)


def test_a_run_without_steps_in_a_stage_is_refused():
    with pytest.raises(UsageError, match="--train_steps: expected steps in each of 13 stages, found 7"):
        short_run(["--track=medium", "--train_steps=16"])
