"""Muon inside Hugging Face accelerate and the Trainer, at 1 and 2 ranks: saved and resumed bit for bit."""
import os

import pytest
import torch

from muon import Muon
from tests.clients.net import SETTINGS, Net, batch, straight, train, weights
from tests.helpers.bits import same_bits
from tests.helpers.dist import run_ranks

STEPS = 4


def rank_environment(rank: int, world_size: int) -> None:
    """Set what a launcher would; run_ranks has made the process group already."""
    os.environ |= dict(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world_size}", LOCAL_WORLD_SIZE=f"{world_size}",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")


# ----------------------------------------------------------------------------------------------------
# accelerate


def with_accelerate(rank: int, world_size: int, folder: str) -> list[list[torch.Tensor]]:
    """Return the weights without and with an interruption."""
    rank_environment(rank, world_size)
    from accelerate import Accelerator

    def prepared():
        model = Net()
        optimizer = Muon(model.parameters(), replicate_state=world_size > 1, **SETTINGS)
        return accelerator.prepare(model, optimizer)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    model, optimizer = prepared()
    train(model, optimizer, range(2), rank)
    accelerator.save_state(folder)
    train(model, optimizer, range(2, STEPS), rank)
    accelerator.free_memory()
    other, fresh = prepared()
    accelerator.load_state(folder)
    train(other, fresh, range(2, STEPS), rank)
    return [weights(model), weights(other)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_accelerate_resumes_bit_for_bit(tmp_path, world_size):
    pytest.importorskip("accelerate")
    found = run_ranks(world_size, with_accelerate, str(tmp_path))
    for uninterrupted, resumed in found:
        assert same_bits(resumed, uninterrupted) and same_bits(uninterrupted, found[0][0])
    if world_size == 1:
        assert same_bits(found[0][0], straight(STEPS))


# ----------------------------------------------------------------------------------------------------
# Trainer


class Rows(torch.utils.data.Dataset):
    """Rows of all batches, one after the other."""

    def __len__(self):
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: x[0] for key, x in batch(i, size=1).items()}


def with_trainer(rank: int, world_size: int, folder: str) -> list[list[torch.Tensor]]:
    """Return the weights without and with an interruption."""
    rank_environment(rank, world_size)
    from transformers import Trainer, TrainingArguments

    def trainer():
        args = TrainingArguments(
            folder, max_steps=STEPS, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, lr_scheduler_type="cosine", logging_steps=1)
        model = Net()
        optimizer = Muon(model.parameters(), replicate_state=world_size > 1, **SETTINGS)
        return Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-2"):
        client = trainer()
        client.train(resume_from_checkpoint=checkpoint)
        assert client.state.global_step == STEPS
        found.append(weights(client.model))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_trainer_resumes_bit_for_bit(tmp_path, world_size):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = run_ranks(world_size, with_trainer, str(tmp_path))
    for uninterrupted, resumed in found:
        assert same_bits(resumed, uninterrupted) and same_bits(uninterrupted, found[0][0])
        assert not same_bits(uninterrupted, weights(Net()))
