"""Muon inside Lightning: the weights of a plain loop, saved and resumed bit for bit."""
import pytest
import torch

from muon import Muon
from tests.clients.net import SETTINGS, Net, batch, straight, weights
from tests.helpers.bits import same_bits

lightning = pytest.importorskip("lightning")
STEPS = 4


class Module(lightning.LightningModule):
    """Net with a Muon, as a user of Lightning would write it."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, *_):
        return self.net(**batch(self.global_step))["loss"]  # resumed in mid-epoch, its loader begins anew

    def configure_optimizers(self):
        optimizer = Muon(self.net.parameters(), **SETTINGS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval="step"))


def trained(folder, num_steps: int, checkpoint=None):
    module = Module()
    trainer = lightning.Trainer(
        max_steps=num_steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS)), ckpt_path=checkpoint)
    return trainer, weights(module)


@pytest.mark.filterwarnings("ignore")  # it advises on data loaders and checkpoints
def test_lightning_trains_and_resumes_bit_for_bit(tmp_path):
    _, uninterrupted = trained(tmp_path, STEPS)
    assert same_bits(uninterrupted, straight(STEPS))
    trainer, halfway = trained(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "halfway.ckpt")
    assert not same_bits(halfway, uninterrupted)
    _, resumed = trained(tmp_path, STEPS, tmp_path / "halfway.ckpt")
    assert same_bits(resumed, uninterrupted)
