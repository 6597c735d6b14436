"""The default of track small against a transcription of the public record, over a short schedule that crosses
every stage, the parting of embedding and head, and the extension."""
import numpy as np
import pytest
import torch

from data.shards import write_shard
from engine.ranks import Runtime
from tests.helpers.plain_model import as_records, logits, loss, rotation
from tests.recipe.record80 import Plan, Training
from train_gpt import Config, Run, learning_rate, mtp_weights, muon_momentum, rotary_settings

SIZES = dict(  # six heads, so that the pairs of the record are (0, 3), (1, 4), (2, 5)
    vocab_size=61, bos_id=60, model_dim=48, head_dim=8, bigram_rows=97, slices=2, batch_tokens=(64, 96, 128),
    max_doc_len=(12, 24), window_short=(3, 5, 6, 8), window_long=(6, 9, 12, 13), window_final=20,
    val_tokens=128, val_slice=64, train_steps=14, extension_steps=2,
    momentum_warmup=4, momentum_cooldown=3, dtype="float32", products="float32", compile="off",
    attention="blocked")
PLAN = Plan(scheduled=12, extension=2, momentum_rise=4, momentum_fall=3)
EXACT = 1e-5  # of the norm; fp32 in another order of summation
# Left to itself: Newton-Schulz lifts the small singular values of a gradient, and its rounding,
# up to a thousandfold. Measured after 22 steps: weights 9e-5, losses 1e-6.
DRIFT = 5e-4


def make_run(folder) -> Run:
    """A run of track small in tiny sizes, on shards of random documents."""
    rng = np.random.default_rng(0)
    for name, documents in (("train_000.bin", 800), ("val_000.bin", 20)):
        parts = [np.r_[60, rng.integers(0, 60, rng.integers(1, 30))] for _ in range(documents)]
        write_shard(folder / name, np.concatenate(parts).astype(np.uint16))
    files = dict(train_files=str(folder / "train_*.bin"), val_files=str(folder / "val_*.bin"))
    return Run(Config.for_track("small", **SIZES, **files), Runtime())


def copied(cfg, weights: dict) -> dict[str, torch.Tensor]:
    """Ours, or their gradients, under the names of the transcription and in its layout."""
    theirs = as_records(cfg, weights)
    return {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in theirs.items()}


class Both:
    """A run of ours and the transcription, side by side. Before each update of ours, `gradients` holds what
    it is given."""

    def __init__(self, folder, everything: bool):
        self.run = make_run(folder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # so large that no epsilon counts; at full size a loss sums up 16,384 tokens
            for name, p in self.run.model.named_parameters():
                if everything or 48 in p.shape[-2:]:
                    p.add_((0.3 if p.ndim < 3 else 0.1) * torch.randn(p.shape, generator=generator))
            self.run.model.embed.copy_(self.run.model.head)
        self.theirs = Training(self.weights(), self.run.model.signs.float(), self.run.cfg, PLAN)
        self.slices, self.gradients = [], {}
        self.take, self.update = self.run.loader.next, self.run.update
        self.run.loader.next, self.run.update = self.note_batches, self.note_gradients

    def weights(self):
        return copied(self.run.cfg, dict(self.run.model.named_parameters()))

    def note_batches(self):
        batches = self.take()
        self.slices = [(batch.inputs, batch.targets, batch.docs.ids) for batch in batches]
        return batches

    def note_gradients(self, step):
        parameters = self.run.model.named_parameters()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters}
        self.gradients = copied(self.run.cfg, found)
        self.update(step)

    def compare(self, ours: dict, theirs: dict, tolerance: float):
        step = self.run.step - 1
        for name, expected in theirs.items():
            if name != "embed" or step > PLAN.last_tied:  # before, ours is a copy that nobody reads
                difference = (ours[name] - expected).abs().flatten().sort().values
                # Where an update is zero but for rounding, decay may go either way.
                decided = difference[: len(difference) - len(difference) // 500]
                assert decided.norm() <= tolerance * expected.norm(), (step, name)

    def compare_validation(self, tolerance: float):
        total, P = 0.0, self.theirs.P
        for batch in self.run.validation.batches:
            inputs, document = batch.inputs, batch.docs.ids
            z = logits(P, self.theirs.signs, inputs, document, self.run.cfg, 3, False, final=True)
            total += loss(z, batch.targets, [1.0]).item()
        assert abs(self.run.evaluate() * self.run.cfg.val_tokens - total) < tolerance * total


@pytest.mark.parametrize("everything", [False, True], ids=["gates at their start", "gates anywhere"])
def test_each_step_equals_the_record_s_gradients_and_updates(tmp_path, everything):
    """Every gradient is compared from the same weights, and every weight from the same gradients."""
    both = Both(tmp_path, everything)
    run, theirs, moved = both.run, both.theirs, set()
    while run.step < PLAN.total:
        before = both.weights()
        for name, p in theirs.P.items():
            if name != "embed" or run.step > PLAN.last_tied + 1:  # ours parts as the next step begins
                p.copy_(before[name])
        loss = run.train_step()

        expected_loss = theirs.add_gradients(both.slices)
        assert abs(loss - expected_loss) < EXACT * expected_loss, run.step
        whole = torch.stack([g.norm() for g in theirs.sums.values()]).norm()
        for name, expected in theirs.sums.items():
            error = (both.gradients[name] - expected).norm()
            assert error < EXACT * (expected.norm() + 0.01 * whole), (run.step, name)

        for name, total in theirs.sums.items():
            total.copy_(both.gradients[name])
        theirs.update()
        both.compare(both.weights(), theirs.P, EXACT)
        moved |= {name for name, p in theirs.P.items() if not torch.equal(p, before[name])}
    assert moved == set(theirs.P)
    both.compare_validation(EXACT)


def test_a_whole_run_on_its_own_ends_where_the_record_s_does(tmp_path):
    both = Both(tmp_path, everything=True)
    for _ in range(PLAN.total):
        loss = both.run.train_step()
        expected_loss = both.theirs.add_gradients(both.slices)
        both.theirs.update()
        assert abs(loss - expected_loss) < EXACT * expected_loss
        both.compare(both.weights(), both.theirs.P, DRIFT)
    both.compare_validation(EXACT)


def test_the_schedules_equal_the_record_s_at_full_length():
    cfg, plan = Config.for_track("small"), Plan()
    assert cfg.stage_starts == tuple(plan.starts[:4]) == (0, 480, 960, 1440)
    assert cfg.train_steps == plan.total == 1480
    for step in range(1480):
        assert abs(learning_rate(cfg, step) - plan.learning_rate(step)) < 1e-12
        assert abs(muon_momentum(cfg, step) - plan.momentum(step)) < 1e-12
        assert mtp_weights(cfg, step) == pytest.approx(plan.future_weights(step), abs=1e-12)
        assert cfg.tied(step) == (step <= plan.last_tied)
    for stage in range(4):
        (ours, our_scale), (theirs, scale) = rotary_settings(cfg, stage), rotation(cfg, stage)
        torch.testing.assert_close(ours.float(), theirs.float())
        assert abs(our_scale - scale) < 1e-12
