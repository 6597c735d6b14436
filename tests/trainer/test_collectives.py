"""All ranks issue the same collectives in the same order, with the same shapes and types: else they wait for
each other for ever, or mix up their data."""
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from tests.helpers.dist import run_ranks
from tests.helpers.tiny import THREE_LAYERS, make_run

RANKS = 2
STOPPED_AT = 12  # late enough for a save, and for embedding and head to part
CHANGES = dict(slices=RANKS, batch_tokens=(256, 384, 512), val_tokens=256, val_slice=32, val_every=5,
               save_every=4)


class Collectives(TorchDispatchMode):
    """Notes every collective with the shapes and types of its tensors, and the names of what asked for it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.seen.append((func.name(), [(tuple(x.shape), str(x.dtype)) for x in tensors]))
        return func(*args, **(kwargs or {}))

    def named(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def call(*args):
            self.seen.append((name, owner.step))
            return function(*args)

        setattr(owner, name, call)


def stopped_run(rank: int, world: int, folder: str) -> list:
    """Return what one rank issues from its start to its end; the last one gets a signal to stop in one of the
    steps."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="here", MASTER_PORT="0")
    def nothing(*args, **kwargs):
        pass

    log = SimpleNamespace(run_id="run", write=nothing, train=nothing, validation=nothing)
    with Collectives() as collectives:
        run = make_run(Path(folder), THREE_LAYERS, log_dir=folder, **CHANGES)
        for name in ("warm_up", "train_step", "evaluate", "save", "untie"):
            collectives.named(run, name)
        run.warm_up()
        count = run.update

        def update(step):
            if step == STOPPED_AT and rank == RANKS - 1:
                run.stop.number = 15
            count(step)

        run.update = update
        try:
            train_gpt.train(run, log)
        except train_gpt.Stopped:
            collectives.seen.append(("stopped", run.step))
    return collectives.seen


def test_ranks_issue_the_same_collectives_in_the_same_order(tmp_path):
    make_run(tmp_path, THREE_LAYERS, **CHANGES)  # writes the shards
    first, *others = run_ranks(RANKS, stopped_run, str(tmp_path))
    names = [name for name, _ in first]
    assert {"warm_up", "train_step", "untie", "evaluate", "save", "stopped"} <= {*names}
    assert sum(name.startswith("c10d") for name in names) > 100
    for rank, seen in enumerate(others, 1):
        differing = [pair for pair in zip(first, seen) if pair[0] != pair[1]]
        assert not differing and len(seen) == len(first), f"rank {rank}: {differing[:1]}"
