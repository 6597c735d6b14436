"""Muon inside what torch offers: DDP, FSDP2, distributed checkpoints, GradScaler, schedulers, averages."""
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler, swa_utils

from muon import Muon
from muon_extras.fsdp import FsdpMuon
from tests.clients.net import LR, SETTINGS, Net, batch, straight, train, weights
from tests.helpers.bits import same_bits
from tests.helpers.dist import run_ranks

# ----------------------------------------------------------------------------------------------------
# Several ranks: one world runs all scenarios


def plain(_):
    model = Net()
    return model, Muon(model.parameters(), **SETTINGS)


def ddp(_):
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    return model, Muon(model.parameters(), replicate_state=True, **SETTINGS)


def fsdp(world_size):
    model = Net()
    for part in (model.inner, model.outer, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world_size,)))
    return model, FsdpMuon(model.parameters(), **SETTINGS)


def full(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in weights(model)]


def resumed(kind, rank: int, world_size: int, folder: str, flat: bool) -> tuple[list, list]:
    """Return the weights after four steps, and after two, a checkpoint, a new optimizer and two more."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = kind(world_size)
    train(model, optimizer, range(2), rank)
    momenta = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(dict(model=model.state_dict(), optimizer=momenta), checkpoint_id=folder)
    train(model, optimizer, range(2, 4), rank)
    other, fresh = kind(world_size)
    state = dict(model=other.state_dict(), optimizer=get_optimizer_state_dict(other, fresh, options=options))
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, fresh, state["optimizer"], options=options)
    train(other, fresh, range(2, 4), rank)
    return full(model), full(other)


def scenarios(rank: int, world_size: int, folder: str) -> dict:
    model, optimizer = ddp(world_size)
    empty = optimizer.state_dict()  # accelerate asks for it before the first step
    train(model, optimizer, range(4), rank)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    found = {"DDP": weights(model), "momenta": momenta, "groups before a step": len(empty["param_groups"])}
    for name, kind in (("DDP", ddp), ("FSDP2", fsdp)):
        for flat in (False, True):
            found[f"{name}, {flat}"] = resumed(kind, rank, world_size, f"{folder}/{name}{flat}", flat)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, scenarios, str(tmp_path_factory.mktemp("checkpoints")))


def test_ddp_ranks_hold_the_weights_of_one_process_and_the_whole_momentum(two_ranks):
    model = Net()
    optimizer = Muon(model.parameters(), **SETTINGS)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(2):
            (model(**batch(step, rank))["loss"] / 2).backward()
        optimizer.step()
    for found in two_ranks:
        assert found["groups before a step"] == 1
        for key in ("DDP", "momenta"):
            assert same_bits(found[key], two_ranks[0][key])
        for p, w, M in zip(model.parameters(), found["DDP"], found["momenta"]):
            # The sum of two ranks' gradients is rounded in another order: 1e-7, times the iteration's slope.
            torch.testing.assert_close(w, p.detach(), rtol=0, atol=1e-4)
            torch.testing.assert_close(M, optimizer.state[p]["momentum_buffer"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_continues_bit_for_bit_on_two_ranks(two_ranks, kind, flat):
    for uninterrupted, after_loading in (found[f"{kind}, {flat}"] for found in two_ranks):
        assert same_bits(after_loading, uninterrupted) and not same_bits(after_loading, weights(Net()))
        assert same_bits(uninterrupted, two_ranks[0][f"{kind}, {flat}"][0])


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_continues_bit_for_bit_in_one_process(tmp_path, flat):
    uninterrupted, after_loading = resumed(plain, 0, 1, str(tmp_path), flat)
    assert same_bits(uninterrupted, straight(4)), "taking the state moved the optimizer"
    assert same_bits(after_loading, uninterrupted)


# ----------------------------------------------------------------------------------------------------
# One process


def test_grad_scaler_skips_what_overflows_and_changes_nothing_else():
    model = Net()
    optimizer = Muon(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=100)
    for step in (0, 1, 2):
        optimizer.zero_grad()
        scaler.scale(model(**batch(step))["loss"]).backward()
        if step == 1:
            model.inner.weight.grad[0, 0] = torch.inf
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(weights(model), before) == (step == 1)
    assert scaler.get_scale() == 2.0**11
    expected = Net()
    train(expected, Muon(expected.parameters(), **SETTINGS), (0, 2))
    assert same_bits(weights(model), weights(expected))  # scales are powers of two


def warm_up_then_cosine(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, 6)], [2])


SCHEDULERS = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),  # moves momentum too
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=2),
    "SequentialLR": warm_up_then_cosine,
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10),
    "SWALR": partial(swa_utils.SWALR, swa_lr=0.005, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_scheduler_gives_what_the_same_rates_set_by_hand_give(name, kind):
    model, by_hand = Net(), Net()
    optimizer = Muon(model.parameters(), **SETTINGS | dict(lr=kind(LR)))
    scheduler = SCHEDULERS[name](optimizer)
    other = Muon(by_hand.parameters(), **SETTINGS)
    rates = set()
    for step in range(6):
        group = optimizer.param_groups[0]
        other.param_groups[0] |= dict(lr=float(group["lr"]), momentum=group["momentum"])
        rates.add(float(group["lr"]))
        train(model, optimizer, [step])
        train(by_hand, other, [step])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 2
    for found, expected in zip(weights(model), weights(by_hand)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # a tensor rate is rounded to fp32


@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_weights_are_those_of_the_steps_taken(decay):
    model = Net()
    optimizer = Muon(model.parameters(), **SETTINGS)
    exponential = swa_utils.get_ema_multi_avg_fn(decay) if decay else None
    average = swa_utils.AveragedModel(model, multi_avg_fn=exponential)
    expected = None
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        if expected is None:
            expected = weights(model)
        else:
            share = 1 - decay if decay else 1 / (step + 1)
            expected = [old.lerp(new, share) for old, new in zip(expected, weights(model))]
    for found, wanted in zip(weights(average.module), expected):
        torch.testing.assert_close(found, wanted)
    assert same_bits(weights(model), straight(4))
