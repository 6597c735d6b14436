"""muon_extras: the routing that it proposes, the largest logits against the direct formula, QK-Clip by its
effect."""
import math

import pytest
import torch
from torch import nn

from muon import Muon
from muon_extras.qk_clip import max_logits, qk_clip_
from muon_extras.split_params import split_params

# --- routing ---


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.gate = nn.Parameter(torch.ones(1, width))


class GPT(nn.Module):
    # As GPT-2 medium: as many positions as channels
    def __init__(self, tied, vocabulary=50, width=16, positions=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def names(routes):
    """Names that Muon and AdamW get."""
    return [[name for group in routes[0] for name, _ in group["params"]], [name for name, _ in routes[1]]]


HIDDEN = [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention", "project", "up", "down")]


@pytest.mark.parametrize("tied, sizes", [
    (True, {}), (False, {}), (False, dict(vocabulary=64, width=64))])  # squares like the head
def test_of_a_gpt_muon_gets_the_hidden_matrices(tied, sizes):
    model = GPT(tied, **sizes)
    muon, adamw = split_params(model, verbose=False)
    assert names((muon, adamw))[0] == HIDDEN
    routed = [*muon[0]["params"], *adamw]
    assert len(routed) == len({p for _, p in routed}) == len(list(model.parameters())) and len(muon) == 1
    assert all(dict(model.named_parameters())[n] is p for n, p in routed)
    assert ("lm_head.weight" in names((muon, adamw))[1]) != tied
    Muon(muon), torch.optim.AdamW(adamw)  # both take what it returns


def test_the_routing_is_printed_with_its_reasons(capsys):
    model = GPT(True)
    for p in model.blocks[1].parameters():
        p.requires_grad = False
    model.wpe.weight.requires_grad = False
    assert names(split_params(model))[0] == HIDDEN[:4]  # what is frozen is left out
    assert capsys.readouterr().out.splitlines() == [
        "AdamW  wte.weight  (50, 16)  embedding",
        "AdamW  blocks.0.gain  ()  scalar",
        "AdamW  blocks.0.gate  (1, 16)  vector",
        "AdamW  blocks.0.norm.weight  (16,)  vector",
        "AdamW  blocks.0.norm.bias  (16,)  vector",
        "Muon   blocks.0.attention.weight  (48, 16)",
        "AdamW  blocks.0.attention.bias  (48,)  vector",
        "Muon   blocks.0.project.weight  (16, 16)",
        "AdamW  blocks.0.project.bias  (16,)  vector",
        "Muon   blocks.0.up.weight  (64, 16)",
        "Muon   blocks.0.down.weight  (16, 64)"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.bank = nn.Linear(8, 4, bias=False), nn.Parameter(torch.zeros(4, 8, 16))
        self.bank_bias, self.A_log = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(8, 4))
        self.gate = nn.Linear(8, 16, bias=False)  # of a GLU: it does not narrow
        self.scale = nn.Parameter(torch.ones(1))


def test_convolutions_and_banks_go_to_muon_and_routers_do_not(capsys):
    blocks = nn.ModuleList([nn.ModuleDict(dict(experts=Experts(), gate=nn.Linear(8, 4, bias=False)))])
    model = nn.ModuleDict(dict(
        first=nn.Conv2d(3, 8, 3), depthwise=nn.Conv2d(8, 8, 3, groups=8), norm=nn.BatchNorm2d(8),
        wave=nn.Conv1d(8, 4, 5), blocks=blocks, token_embedding=nn.Linear(9, 8, bias=False),
        bag=nn.EmbeddingBag(7, 8)))
    model.register_parameter("positions", nn.Parameter(torch.zeros(16, 8)))
    muon, adamw = split_params(model)
    whole = ["first.weight", "depthwise.weight", "blocks.0.experts.bank", "blocks.0.experts.gate.weight"]
    assert [(group["flatten"], [name for name, _ in group["params"]]) for group in muon] == [
        (False, whole), (True, ["wave.weight"])]
    printed = capsys.readouterr().out
    for line in ("positions  (16, 8)  positions", "blocks.0.experts.router.weight  (4, 8)  router",
                 "blocks.0.gate.weight  (4, 8)  router", "token_embedding.weight  (8, 9)  embedding",
                 "blocks.0.experts.bank_bias  (4, 16)  entry by entry",
                 "blocks.0.experts.A_log  (8, 4)  entry by entry"):
        assert f"AdamW  {line}" in printed
    assert "Muon   wave.weight  (4, 8, 5)  flatten" in printed
    p = model["wave"].weight  # one matrix (4, 40), not four of (8, 5)
    optimizer, before = Muon(muon, lr=1.0, ns_dtype=torch.float32), p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert (torch.linalg.svdvals((p.detach() - before).flatten(1)) < 1.2).all()


@pytest.mark.parametrize("name", ["head", "score", "classifier", "fc", "to_out"])
def test_outputs_go_to_adamw_whatever_they_are_called(name, capsys):
    last = nn.ModuleDict(dict(fc=nn.Linear(6, 6, bias=False)))  # of a list of blocks: no output
    model = nn.ModuleDict(dict(inner=nn.Linear(6, 6, bias=False), body=nn.ModuleList([last])))
    model[name] = nn.Linear(6, 3, bias=False)
    assert names(split_params(model)) == [["inner.weight", "body.0.fc.weight"], [f"{name}.weight"]]
    assert f"AdamW  {name}.weight  (3, 6)  head" in capsys.readouterr().out


# --- the largest logits ---

def direct(q, k, scale):
    """Per head of q (..., heads, T, d), one pair after the other."""
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

TAU, D, C, T = 3.0, 4, 12, 9


class Attention:
    """Query and key projections with biases, of a size at which some heads exceed TAU and some do not."""

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
        return qk_clip_(queries, keys, s_max, tau=TAU, kv_heads=self.kv_heads, **settings)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (1, 1), (8, 2), (6, 1)])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
def test_recomputed_logits_are_the_smaller_of_old_and_tau_exactly_per_head(heads, kv_heads, alpha):
    attention = Attention(heads, kv_heads)
    before, keys = attention.logits(), attention.wk.clone()
    assert (before > TAU).any() and (heads == 1 or (before < TAU).any())
    gamma = attention.clip(alpha=alpha)
    torch.testing.assert_close(gamma, (TAU / before).clamp(max=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(attention.logits(), before.clamp(max=TAU), rtol=1e-5, atol=0)
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
    assert (after <= TAU * (1 + 1e-5)).all()
    torch.testing.assert_close(attention.wk, keys * (shared ** (1 - alpha)).repeat_interleave(D)[:, None])


def test_below_tau_and_without_a_finite_maximum_no_bit_changes():
    attention = Attention(4, 4)
    before = [w.clone() for w in attention.weights]
    gamma = attention.clip(torch.tensor([math.nan, math.inf, -math.inf, TAU]))
    assert gamma.tolist() == [1.0] * 4 and all(map(torch.equal, attention.weights, before))
    gamma = attention.clip(torch.tensor([math.nan, 2 * TAU, -5.0, -2 * TAU]))
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
    gamma = qk_clip_(*map(list, zip(*slices)), s_max, tau=TAU)
    attention.clip(s_max)
    assert gamma.min() < 1 and torch.equal(fused.detach()[:4 * D], attention.wq)
    assert torch.equal(fused.detach()[4 * D:8 * D], attention.wk)
    assert torch.equal(fused.detach()[8 * D:], values)
    assert half.dtype == torch.bfloat16 and torch.equal(half[8 * D:], values.bfloat16())
    torch.testing.assert_close(half[:8 * D].float(), fused.detach()[:8 * D], rtol=2**-7, atol=0)  # twice
    torch.testing.assert_close(single.detach()[:8 * D].float(), fused.detach()[:8 * D])


@pytest.mark.parametrize("change, expected, found", [
    (dict(s_max=torch.ones(3), heads=4), "s_max with one number per head", "(3,)"),
    (dict(s_max=torch.ones(4, 1)), "s_max with one number per head", "(4, 1)"),
    (dict(kv_heads=3), "heads to be a multiple of kv_heads", "4 and 3"),
    (dict(tau=0.0), "tau above 0 and alpha in 0 .. 1", "0.0 and 0.5"),
    (dict(tau=-1.0), "tau above 0 and alpha in 0 .. 1", "-1.0 and 0.5"),
    (dict(alpha=1.5), "tau above 0 and alpha in 0 .. 1", "100.0 and 1.5"),
    (dict(alpha=-0.1), "tau above 0 and alpha in 0 .. 1", "100.0 and -0.1"),
    (dict(wq=torch.ones(18, 2)), "rows of wq in 4 heads", "[(18, 2)]"),
    (dict(wq=[torch.ones(16, 2), torch.ones(17)]), "rows of wq in 4 heads", "[(16, 2), (17,)]"),
    (dict(wk=torch.ones(7, 2), kv_heads=2), "rows of wk in 2 heads", "[(7, 2)]")])
def test_a_call_that_does_not_fit_is_refused_before_anything_changes(change, expected, found):
    settings = dict(wq=torch.ones(16, 2), wk=torch.ones(16, 2), s_max=torch.full((4,), 1e3)) | change
    with pytest.raises(ValueError) as error:
        qk_clip_(**settings)
    assert str(error.value) == f"qk_clip_: expected {expected}, found {found}; change the call"
    for weights in (settings["wq"], settings["wk"]):
        assert all((w == 1).all() for w in (weights if isinstance(weights, list) else [weights]))
