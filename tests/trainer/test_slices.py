"""Slices that go through the model together."""
import math

import numpy as np
import pytest
import torch

from data.loader import join, make_batch
from tests.helpers.tiny import build, config, context


MIXED = dict(mudd=True, backout=False, mix_window=4, gate_networks=(0, 3))


@pytest.mark.parametrize("techniques", [{}, dict(untie_stage=0), MIXED])
@pytest.mark.parametrize("lengths", [([5, 1, 7, 4], [17], [1, 16]), ([9], [9], [9])])
def test_joined_slices_give_the_losses_and_gradients_of_each_by_itself(lengths, techniques):
    model = build(config(**techniques), backend="blocked")
    weights = torch.tensor([1.0, 0.5, 0.25])
    T = sum(lengths[0])
    rng = np.random.default_rng(0)
    slices = []
    for each in lengths:
        tokens = rng.integers(0, model.cfg.vocab_size, T + 1)
        slices.append(make_batch(tokens, np.cumsum([0, *each[:-1]]), T, False))

    def outcome(batches, **changes):
        model.zero_grad()
        loss = 0.0
        for inputs, targets, docs in batches:
            ctx = context(model, docs, tied=model.cfg.tied(0))._replace(**changes)
            one = model(inputs, targets, ctx, weights)
            one.backward()
            loss += one.item()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, apart = outcome(slices)
    found, together = outcome([join(slices)])
    assert found == pytest.approx(expected, rel=1e-6)
    whole = math.sqrt(sum(g.square().sum() for g in apart.values()))
    assert together.keys() == apart.keys()
    for name, g in apart.items():
        assert (together[name] - g).norm() < 2e-5 * g.norm() + 1e-6 * whole, name

    blind, _ = outcome([join(slices)], slices=1)  # tokens before, and targets, across the starts of slices
    assert abs(blind - expected) > 1e-4 * expected
