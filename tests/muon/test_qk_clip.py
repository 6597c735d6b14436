"""The largest logits against the direct formula; QK-Clip by its effect, also of sharded weights and of latent
attention, and the meter, against plain tensors and formulas."""
import copy
import functools
import math

import pytest
import torch
from torch import nn
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


# --- the largest logits ---

def direct(q, k, scale):
    """Return the largest logit of each head of q (..., heads, T, d), one pair after the other."""
    q, k = q.reshape(-1, *q.shape[-3:]).double(), k.reshape(-1, *k.shape[-3:]).double()
    group = q.size(1) // k.size(1)
    return torch.tensor([max((scale * q[b, h, i] @ k[b, h // group, j]).item() for b in range(q.size(0))
                             for i in range(q.size(2)) for j in range(i + 1)) for h in range(q.size(1))])


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("block", [1, 3, 1024])
def test_max_logits_equal_the_direct_formula(batch, heads, kv_heads, block):
    generator = torch.Generator().manual_seed(heads)
    q, k = (torch.randn(*batch, h, 7, 5, generator=generator) for h in (heads, kv_heads))
    found = max_logits(q, k, 0.3, block)
    assert found.shape == (heads,) and found.dtype == torch.float32
    torch.testing.assert_close(found, direct(q, k, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 5, 1024])
def test_future_keys_do_not_count_and_the_last_one_does(block):
    q, k = torch.ones(2, 5, 3), torch.zeros(2, 5, 3)
    k[0, 4], k[1, 3] = 9.0, -7.0
    assert max_logits(q, k, 1.0, block).tolist() == [27.0, 0.0]  # only the last query sees the last key
    q[0, 4] = 0.0
    assert max_logits(q, k, 1.0, block).tolist() == [0.0, 0.0]
    # The largest, not the largest absolute, one
    assert max_logits(-q, k + 1, 1.0, block).tolist() == [0.0, 18.0]
    assert max_logits(q[:, :1], k[:, :1] - 2, 0.5).tolist() == [-3.0, -3.0]


def test_max_logits_of_bf16_are_fp32_and_not_finite_ones_show():
    q, k = torch.full((2, 3, 4), 2.0, dtype=torch.bfloat16), torch.ones(2, 3, 4, dtype=torch.bfloat16)
    found = max_logits(q, k, 0.25)
    assert found.dtype == torch.float32 and found.tolist() == [2.0, 2.0]
    q[0, 1, 1] = math.nan
    assert math.isnan(max_logits(q, k, 0.25)[0]) and max_logits(q, k, 0.25)[1] == 2.0
    assert not max_logits(torch.ones(1, 2, 2, requires_grad=True), torch.ones(1, 2, 2), 1.0).requires_grad


# --- QK-Clip ---

LIMIT, D, C, T = 3.0, 4, 12, 9


class Attention:
    """Query and key projections with biases, of a size at which some heads exceed LIMIT and some do not."""

    def __init__(self, heads, kv_heads, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads = heads, kv_heads
        self.x = torch.randn(2, T, C, generator=generator)
        shapes = (heads * D, C), (heads * D,), (kv_heads * D, C), (kv_heads * D,)
        self.weights = [torch.randn(shape, generator=generator) for shape in shapes]
        self.wq, self.bq, self.wk, self.bk = self.weights
        sizes = torch.linspace(1, 0.1, heads).repeat_interleave(D)
        self.wq *= 0.3 * sizes[:, None]
        self.bq *= 0.3 * sizes

    def logits(self):
        q, k = (((self.x.double() @ w.double().T + b.double()).unflatten(-1, (-1, D)).transpose(1, 2))
                for w, b in ((self.wq, self.bq), (self.wk, self.bk)))
        return max_logits(q, k, D**-0.5)

    def clip(self, s_max=None, **settings):
        s_max = self.logits() if s_max is None else s_max
        queries, keys = (self.wq, self.bq), (self.wk, self.bk)
        return qk_clip_(queries, keys, s_max, tau=LIMIT, kv_heads=self.kv_heads, **settings)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (1, 1), (8, 2), (6, 1)])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
def test_recomputed_logits_are_the_smaller_of_old_and_tau_exactly_per_head(heads, kv_heads, alpha):
    attention = Attention(heads, kv_heads)
    before, keys = attention.logits(), attention.wk.clone()
    assert (before > LIMIT).any() and (heads == 1 or (before < LIMIT).any())
    gamma = attention.clip(alpha=alpha)
    torch.testing.assert_close(gamma, (LIMIT / before).clamp(max=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(attention.logits(), before.clamp(max=LIMIT), rtol=1e-5, atol=0)
    if kv_heads < heads or alpha == 1:
        assert torch.equal(attention.wk, keys)  # shared keys stay as they are
    elif alpha == 0.5:
        factor = gamma.sqrt().repeat_interleave(D)[:, None]
        torch.testing.assert_close(attention.wk, keys * factor)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_per_group_brings_every_head_to_tau_or_below_by_one_factor(heads, kv_heads, alpha):
    attention = Attention(heads, kv_heads)
    before, keys = attention.logits(), attention.wk.clone()
    gamma = attention.clip(per_group=True, alpha=alpha)
    after = attention.logits()
    shared = gamma.view(kv_heads, -1).amin(1)
    torch.testing.assert_close(after, before * shared.repeat_interleave(heads // kv_heads), rtol=1e-5, atol=0)
    assert (after <= LIMIT * (1 + 1e-5)).all()
    torch.testing.assert_close(attention.wk, keys * (shared ** (1 - alpha)).repeat_interleave(D)[:, None])


def test_below_tau_and_without_a_finite_maximum_no_bit_changes():
    attention = Attention(4, 4)
    before = [w.clone() for w in attention.weights]
    gamma = attention.clip(torch.tensor([math.nan, math.inf, -math.inf, LIMIT]))
    assert gamma.tolist() == [1.0] * 4 and all(map(torch.equal, attention.weights, before))
    gamma = attention.clip(torch.tensor([math.nan, 2 * LIMIT, -5.0, -2 * LIMIT]))
    assert gamma.tolist() == [1.0, 0.5, 1.0, 1.0]
    assert torch.equal(attention.wq[:D], before[0][:D])
    assert torch.equal(attention.wq[2 * D:], before[0][2 * D:])
    torch.testing.assert_close(attention.wq[D:2 * D], before[0][D:2 * D] / 2**0.5)


def test_masters_copies_and_slices_of_a_fused_projection_are_scaled_in_place():
    attention = Attention(4, 4)
    s_max = attention.logits()
    fused = torch.cat([attention.wq, attention.wk, attention.wk]).requires_grad_()
    half, single = fused.detach().bfloat16(), nn.Parameter(fused.detach().double())
    slices = [(x[:4 * D], x[4 * D:8 * D]) for x in (fused.detach(), half, single)]
    values = fused.detach()[8 * D:].clone()
    gamma = qk_clip_(*map(list, zip(*slices)), s_max, tau=LIMIT)
    attention.clip(s_max)
    assert gamma.min() < 1 and torch.equal(fused.detach()[:4 * D], attention.wq)
    assert torch.equal(fused.detach()[4 * D:8 * D], attention.wk)
    assert torch.equal(fused.detach()[8 * D:], values)
    assert half.dtype == torch.bfloat16 and torch.equal(half[8 * D:], values.bfloat16())
    torch.testing.assert_close(half[:8 * D].float(), fused.detach()[:8 * D], rtol=2**-7, atol=0)  # twice
    torch.testing.assert_close(single.detach()[:8 * D].float(), fused.detach()[:8 * D])


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


# --- calls that do not fit ---

HEADS_CALL = dict(wq=torch.ones(16, 2), wk=torch.ones(16, 2), s_max=torch.full((4,), 1e3))
LATENT_CALL = dict(wq=torch.ones(20, 6), wkv=torch.ones(28, 5), s_max=torch.full((4,), 1e3), nope=NOPE,
                   rope=ROPE)
UNFIT = [  # function, what is changed in its call, what it expected, what it found
    (qk_clip_, dict(s_max=torch.ones(3), heads=4), "s_max with one number per head", "(3,)"),
    (qk_clip_, dict(s_max=torch.ones(4, 1)), "s_max with one number per head", "(4, 1)"),
    (qk_clip_, dict(kv_heads=3), "heads to be a multiple of kv_heads", "4 and 3"),
    (qk_clip_, dict(tau=0.0), "tau above 0 and alpha in 0 .. 1", "0.0 and 0.5"),
    (qk_clip_, dict(tau=-1.0), "tau above 0 and alpha in 0 .. 1", "-1.0 and 0.5"),
    (qk_clip_, dict(alpha=1.5), "tau above 0 and alpha in 0 .. 1", "100.0 and 1.5"),
    (qk_clip_, dict(alpha=-0.1), "tau above 0 and alpha in 0 .. 1", "100.0 and -0.1"),
    (qk_clip_, dict(wq=torch.ones(18, 2)), "rows of wq in 4 heads", "[(18, 2)]"),
    (qk_clip_, dict(wq=[torch.ones(16, 2), torch.ones(17)]), "rows of wq in 4 heads", "[(16, 2), (17,)]"),
    (qk_clip_, dict(wk=torch.ones(7, 2), kv_heads=2), "rows of wk in 2 heads", "[(7, 2)]"),
    (mla_qk_clip_, dict(s_max=torch.ones(4, 2)), "s_max with one number per head", "(4, 2)"),
    (mla_qk_clip_, dict(s_max=torch.ones(3)), "3 x (3 + 2) rows of wq", "[(20, 6)]"),
    (mla_qk_clip_, dict(tau=0.0), "tau above 0 and alpha in 0 .. 1", "0.0 and 0.5"),
    (mla_qk_clip_, dict(nope=0), "nope above 0 and rope 0 or more", "0 and 2"),
    (mla_qk_clip_, dict(rope=3), "4 x (3 + 3) rows of wq", "[(20, 6)]"),
    (mla_qk_clip_, dict(wkv=torch.ones(27, 5)), "rows of wkv in 4 heads of 3 or more", "[(27, 5)]"),
    (mla_qk_clip_, dict(wkv=torch.ones(8, 5)), "rows of wkv in 4 heads of 3 or more", "[(8, 5)]"),
]


@pytest.mark.parametrize("clip, change, expected, found", UNFIT)
def test_a_call_that_does_not_fit_is_refused_before_anything_changes(clip, change, expected, found):
    call = copy.deepcopy(HEADS_CALL if clip is qk_clip_ else LATENT_CALL) | change
    with pytest.raises(ValueError) as error:
        clip(**call)
    assert str(error.value) == f"{clip.__name__}: expected {expected}, found {found}; change the call"
    for name in call.keys() & {"wq", "wk", "wkv"}:
        weights = call[name]
        assert all((w == 1).all() for w in (weights if isinstance(weights, list) else [weights]))
