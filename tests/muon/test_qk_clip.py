"""QK-Clip of sharded weights and of latent attention, and the meter, against plain tensors and formulas."""
import functools
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from muon_extras.qk_clip import LogitMeter, max_logits, mla_qk_clip_, qk_clip_
from tests.helpers.dist import run_ranks

TAU = 10.0
HEADS, NOPE, ROPE, VALUE = 4, 3, 2, 4
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- DTensors ---

def clipped(kind, lay):
    """Weights and a row-wise bias after the clip of an attention of a kind, placed by `lay`; and gamma."""
    s_max = torch.tensor([5.0, 20.0, math.nan, 40.0])
    if kind == "latent":
        wq = [lay(random(HEADS * (NOPE + ROPE), 6)), lay(random(HEADS * (NOPE + ROPE), 1))]
        wk = [lay(random(HEADS * (NOPE + VALUE), 5, seed=1))]
        gamma = mla_qk_clip_(wq, wk, s_max, NOPE, ROPE, TAU)
    else:
        kv_heads = 2 if kind == "shared keys" else HEADS
        wq = [lay(random(HEADS * 5, 6)), lay(random(HEADS * 5, 1).bfloat16())]
        wk = [lay(random(kv_heads * 5, 7, seed=1))]
        gamma = qk_clip_(wq, wk, s_max, TAU, kv_heads=kv_heads, per_group=kind == "shared keys")
    return [*wq, *wk], gamma


KINDS = "latent", "heads", "shared keys"


def clipped_on_ranks(rank, world):
    """20 and 28 rows on 3 ranks: a head lies across the border of two shards."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for kind in KINDS:
        for name, placement in PLACEMENTS.items():
            with CommDebugMode() as traffic:
                weights, gamma = clipped(
                    kind, lambda w: distribute_tensor(w, mesh, [placement], src_data_rank=None))
            assert traffic.get_total_counts() == 0
            assert all(w.placements == (placement,) for w in weights)
            found[kind, name] = [w.full_tensor() for w in weights], gamma
    return found


def on_a_rank(rank, world):
    return clipped_on_ranks(rank, world), metered(rank)


@functools.cache
def ranks(world):
    return run_ranks(world, on_a_rank)


@pytest.mark.parametrize("world", [1, 3])
def test_sharded_weights_are_clipped_as_plain_ones_without_traffic(world):
    for found, _ in ranks(world):
        for (kind, _), (weights, gamma) in found.items():
            expected, factors = clipped(kind, torch.clone)
            assert factors.min() < 1 and torch.equal(gamma, factors)
            assert all(map(torch.equal, weights, expected))


# --- latent attention ---

def rotation(t):
    """The rotary embedding of position t, for two channels."""
    return torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=torch.float64)


class Latent:
    """Weights of latent attention whose heads have logits of very different size, and its input."""

    def __init__(self, heads):
        self.heads = heads
        sizes = torch.linspace(1, 0.1, heads)
        self.wq = random(heads * (NOPE + ROPE), 6).double() * sizes.repeat_interleave(NOPE + ROPE)[:, None]
        self.wkv = random(heads * (NOPE + VALUE), 5, seed=1).double()
        self.wk_rope = random(ROPE, 7, seed=2).double()
        self.q_latent, self.kv_latent, self.x = (
            random(8, width, seed=width).double() for width in (6, 5, 7))

    def logits(self):
        """The largest logit of each head, one pair of query and key after the other."""
        q = (self.q_latent @ self.wq.T).view(-1, self.heads, NOPE + ROPE)
        k = (self.kv_latent @ self.wkv.T).view(-1, self.heads, NOPE + VALUE)
        shared = self.x @ self.wk_rope.T
        found = []
        for h in range(self.heads):
            pairs = [q[i, h, :NOPE] @ k[j, h, :NOPE]
                     + rotation(i) @ q[i, h, NOPE:] @ (rotation(j) @ shared[j])
                     for i in range(len(q)) for j in range(i + 1)]
            found.append(max(pairs))
        return torch.stack(found)

    def values(self):
        return self.wkv.view(self.heads, NOPE + VALUE, -1)[:, NOPE:].clone()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.8])
def test_logits_of_latent_attention_become_the_smaller_of_old_and_tau(heads, alpha):
    attention = Latent(heads)
    before = attention.logits()
    values = attention.values()
    tau = before.max().item() / 2
    assert heads == 1 or (before < tau).any()

    gamma = mla_qk_clip_(attention.wq, attention.wkv, before, NOPE, ROPE, tau, alpha)
    torch.testing.assert_close(gamma, (tau / before.float()).clamp(max=1))
    torch.testing.assert_close(attention.logits(), before.clamp(max=tau), rtol=1e-6, atol=0)
    assert torch.equal(attention.values(), values)


def test_queries_and_keys_of_latent_attention_share_the_factor_as_in_kimi_k2():
    attention = Latent(HEADS)
    wq, wkv = attention.wq.clone(), attention.wkv.clone()
    gamma = mla_qk_clip_(attention.wq, attention.wkv, torch.tensor([4.0, 1, 1, 1]) * TAU, NOPE, ROPE, TAU)
    assert gamma.tolist() == [0.25, 1, 1, 1]
    assert torch.equal(attention.wq[:NOPE], wq[:NOPE] / 2)
    assert torch.equal(attention.wq[NOPE:NOPE + ROPE], wq[NOPE:NOPE + ROPE] / 4)
    assert torch.equal(attention.wkv[:NOPE], wkv[:NOPE] / 2)
    assert torch.equal(attention.wq[NOPE + ROPE:], wq[NOPE + ROPE:])
    assert torch.equal(attention.wkv[NOPE:], wkv[NOPE:])


@pytest.mark.parametrize("change, expected, found", [
    (dict(s_max=torch.ones(4, 2)), "s_max with one number per head", "(4, 2)"),
    (dict(s_max=torch.ones(3)), "3 x (3 + 2) rows of wq", "[(20, 6)]"),
    (dict(tau=0.0), "tau above 0 and alpha in 0 .. 1", "0.0 and 0.5"),
    (dict(nope=0), "nope above 0 and rope 0 or more", "0 and 2"),
    (dict(rope=3), "4 x (3 + 3) rows of wq", "[(20, 6)]"),
    (dict(wkv=torch.ones(27, 5)), "rows of wkv in 4 heads of 3 or more", "[(27, 5)]"),
    (dict(wkv=torch.ones(8, 5)), "rows of wkv in 4 heads of 3 or more", "[(8, 5)]")])
def test_a_latent_attention_that_does_not_fit_is_refused_before_anything_changes(change, expected, found):
    settings = dict(wq=torch.ones(20, 6), wkv=torch.ones(28, 5), s_max=torch.full((4,), 1e3), nope=NOPE,
                    rope=ROPE) | change
    with pytest.raises(ValueError) as error:
        mla_qk_clip_(**settings)
    assert str(error.value) == f"mla_qk_clip_: expected {expected}, found {found}; change the call"
    assert (settings["wq"] == 1).all() and (settings["wkv"] == 1).all()


def test_in_bf16_a_factor_too_close_to_1_rounds_away():
    """What the docstring says: logits may stay 0.4 % above tau, not more than that and a rounding."""
    w = random(64, 64).bfloat16()
    before = w.clone()
    qk_clip_(w, w.clone(), torch.tensor([TAU * 1.003]), TAU)
    assert torch.equal(w, before)
    qk_clip_(w, w.clone(), torch.tensor([TAU * 1.02]), TAU)
    assert not torch.equal(w, before)


# --- the meter ---

def test_the_meter_keeps_the_largest_of_all_micro_batches_and_starts_anew():
    meter = LogitMeter(2, 3)
    batches = [random(2, 2, 3, 7, 5, seed=seed) for seed in range(4)]
    for q, k in batches:
        meter.add(1, max_logits(q, k, 0.4))
    direct = torch.stack([max_logits(q, k, 0.4) for q, k in batches]).amax(0)
    found = meter.take()
    assert torch.equal(found[1], direct) and (found[0] == -math.inf).all()
    assert (meter.take() == -math.inf).all()
    assert found.tolist()[1] == direct.tolist()  # what was taken does not change any more


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_log_sum_exp_misses_no_logit_and_is_at_most_ln_T_above(batch, size):
    q, k = size * random(2, *batch, 3, 7, 5)
    logits = (q @ k.mT).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    meter = LogitMeter(1, 3)
    meter.add_lse(0, logits.logsumexp(-1).requires_grad_())
    over = meter.take()[0] - max_logits(q, k, 1.0)
    assert (over >= -1e-6).all() and (over <= math.log(7)).all()


def test_a_logit_that_is_not_a_number_counts_as_infinite_and_is_not_clipped():
    meter = LogitMeter(1, 2)
    meter.add(0, torch.tensor([math.nan, 2 * TAU]))
    meter.add(0, torch.tensor([1.0, 1.0]))
    s_max = meter.take()[0]
    assert s_max.tolist() == [math.inf, 2 * TAU]
    assert qk_clip_(torch.ones(2, 1), torch.ones(2, 1), s_max, TAU).tolist() == [1.0, 0.5]


def metered(rank):
    meter = LogitMeter(1, 3)
    meter.add(0, torch.tensor([1.0 + rank, -5.0 * rank, 2.0]))
    if rank == 1:
        meter.add(0, torch.tensor([0.0, -9.0, math.nan]))
    return meter.take()


@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_see_the_largest_of_all_ranks(world):
    expected = torch.tensor([[float(world), 0.0, math.inf if world > 1 else 2.0]])
    assert all(torch.equal(found, expected) for _, found in ranks(world))


def test_what_does_not_fit_the_meter_is_refused():
    meter = LogitMeter(1, 3)
    with pytest.raises(ValueError, match=r"LogitMeter: expected one number per head, found \(4,\)"):
        meter.add(0, torch.ones(4))
    for wrong in (torch.ones(3), torch.ones(2, 4, 7)):
        with pytest.raises(ValueError, match=r"expected lse of shape \(..., 3, T\), found"):
            meter.add_lse(0, wrong)
