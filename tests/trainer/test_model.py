"""The model against a plain one, one head and one formula at a time in float64, in values and gradients."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import join, make_batch
from engine.kernels import Kernels
from engine.sampled_softmax import draw_sample
from tests.helpers.plain_model import as_records, bigram_row, logits, loss
from tests.helpers.tiny import BARE, THREE_LAYERS, build, config, context, docs_of, make_run
from train_gpt import GPT, MATRICES, TABLES

LENGTHS = [5, 1, 7, 4]  # documents of the sequence that all models below read
T = sum(LENGTHS)
WINDOWS = dict(  # each cuts the longest document
    window_short=(2, 2, 3, 4), window_long=(3, 4, 4, 5), window_final=6)
# fp32 against float64, largest relative error measured: 5e-7 in values, 3e-6 in gradients (but sums that
# cancel, as those of single scalars do, only have the error of their terms: 1e-6 of the whole gradient is
# allowed on top)
VALUES, GRADIENTS = 3e-6, 2e-5


def tokens_of(cfg, n=T + 1, seed=4):
    return torch.randint(0, cfg.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# One technique and all of them against the plain model


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)).item()


def compare(cfg, stage=0, tied=False, weights=(1.0,), final=False, backend="masked"):
    """Values and gradients of the model and of the plain one, from perturbed weights."""
    model, sequence = build(cfg, backend=backend), tokens_of(cfg)
    tokens, targets = sequence[:-1], sequence[1:]
    ctx = context(model, docs_of(LENGTHS), stage, tied, final)
    leaves = dict(model.named_parameters())
    if cfg.ngram_rows:
        leaves["ngrams"] = ctx.ngrams
    exact = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
    signs = model.signs.double() if cfg.bigram_rows else None
    document = docs_of(LENGTHS).ids
    z = logits(as_records(cfg, exact), signs, tokens, document, cfg, stage, tied, final)
    log_p = torch.log_softmax(z, -1)
    assert (model.log_probs(tokens, ctx) - log_p).abs().max() < VALUES * log_p.abs().max()
    found, expected = model(tokens, targets, ctx, torch.tensor(weights)), loss(z, targets, weights)
    assert abs(found.item() - expected.item()) < VALUES * expected.item()
    found.backward()
    gradients = torch.autograd.grad(expected, list(exact.values()), allow_unused=True)
    whole = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    for (name, p), g in zip(leaves.items(), gradients, strict=True):
        if g is None:
            assert p.grad is None and name == "embed" and tied, name
        else:
            assert 0 < g.norm(), name
            assert (p.grad - g).norm() < GRADIENTS * g.norm() + 1e-6 * whole, (name, g.norm())
    with torch.no_grad():
        total = loss(z, targets, (1.0,)).item()
        assert abs(model.evaluate(tokens, targets, ctx).item() - total) < VALUES * total


EMBEDS = dict(value_embed_layers=(0, 2))
GATED = dict(attn_gate_layers=(1, 2), xsa_layers=(0, 3), inject_x0=True, bigram_rows=13, skip=(0, 2))
TECHNIQUES = {
    "nothing": {},
    "partial key offset": dict(key_offset=True),
    "paired heads": dict(paired_layers=(0, 2)),
    "paired heads, neighbours": dict(paired_layers=(0, 2), pairing="neighbours"),
    "paired heads in a long layer with key offset": dict(paired_layers=(1,), key_offset=True),
    "all channels rotate": dict(rope_fraction=1.0),
    "no channel rotates": dict(rope_fraction=0.0),
    "value embeddings with gates": EMBEDS,
    "value embeddings in paired heads": dict(paired_layers=(0,), **EMBEDS),
    "bigrams with signs": dict(bigram_rows=13),
    "bigrams without signs": dict(bigram_rows=13, bigram_signs=False),
    "one bigram row": dict(bigram_rows=2),
    "n-grams": dict(bigram_rows=13, ngram_rows=7),
    "smear": dict(smear=True),
    "attention gate": dict(attn_gate_layers=(1, 2)),
    "XSA": dict(xsa_layers=(0, 3)),
    "XSA on values with embeddings": dict(xsa_layers=(0, 3), **EMBEDS),
    "x0 injection": dict(inject_x0=True),
    "residual factors": dict(resid_init=1.3),
    "no attention in a layer": dict(no_attn_layers=(2,)),
    "single skip": dict(skip=(0, 2)),
    "skip into a layer without attention": dict(skip=(0, 2), no_attn_layers=(2,)),
    "late attention": dict(late_attn_layers=(2, 3)),
    "backout": dict(backout=True),
    "softcap": dict(softcap=(23.0, 5.0, 7.5)),
    "an odd number of heads": dict(model_dim=24),
    "connections": dict(mudd=True),
    "connections of all streams": dict(
        mudd=True, skip=(0, 2), value_embed_layers=(0, 3), bigram_rows=13, inject_x0=True),
    "gates of one network": dict(GATED, gate_networks=(0,)),
    "gates of two networks": dict(GATED, gate_networks=(0, 2)),
    "gates and connections": dict(GATED, gate_networks=(0, 1, 3), mudd=True, late_attn_layers=(3,)),
    "mixing of heads": dict(gate_networks=(0,), mix_window=3, inject_x0=True),
}
RECORD_89 = dict(mudd=True, backout=False, gate_networks=(0, 1), mix_window=4)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_one_technique_alone_equals_the_plain_model(technique):
    compare(config(BARE, **{**WINDOWS, **TECHNIQUES[technique]}))


@pytest.mark.parametrize("stage, tied, weights, final, backend", [
    (0, True, (1.0, 0.5, 0.25), False, "masked"), (2, False, (1.0, 0.3), False, "blocked"),
    (3, False, (1.0,), True, "blocked")])
def test_all_techniques_together_equal_the_plain_model(stage, tied, weights, final, backend):
    compare(config(**WINDOWS), stage, tied, weights, final, backend)


@pytest.mark.parametrize("stage, tied, weights, final", [
    (0, True, (1.0, 0.5, 0.25), False), (3, False, (1.0,), True)])
def test_all_of_record_89_together_equals_the_plain_model(stage, tied, weights, final):
    compare(config(**WINDOWS, **RECORD_89), stage, tied, weights, final, "blocked")


# ------------------------------------------------------------------------------------------------------------
# Parts


def test_the_bigram_hash_wraps_around_like_c():
    cfg = config(BARE, model_dim=4, head_dim=4, vocab_size=65_536, bigram_rows=377_280)
    model = build(cfg)
    tokens = torch.cat([torch.tensor([65_535, 65_535, 0, 65_535, 59_000, 1, 50_256]), tokens_of(cfg, 60)])
    found, wrapped = model.bigram(tokens), 0
    for t, now in enumerate(tokens.tolist()):
        before = int(tokens[t - 1]) if t else 0
        wrapped += t > 0 and 36313 * now >= 2**31
        row = model.bigram_embed[bigram_row(now, before, t, cfg.bigram_rows)]
        assert torch.equal(found[t], row * model.signs[(now ^ before) % 8192])
    assert wrapped > 3


def test_with_prefix_tokens_the_loss_has_one_more_part_while_they_count():
    cfg = config(BARE, prefix_weight=0.25, stages=3)
    model, sequence = build(cfg), tokens_of(cfg)
    tokens, targets = sequence[:-1], sequence[1:]
    assert (model.prefixes == -1).all() and "prefixes" not in model.state_dict()
    model.prefixes[:] = torch.arange(len(model.prefixes)) // 2 - 30
    early, late = (context(model, docs_of(LENGTHS), stage) for stage in (0, 2))
    assert early.prefixes and not late.prefixes
    both = model(tokens, targets, early, torch.tensor([1.0, 0.5, 0.25]))
    plain = model(tokens, targets, early._replace(prefixes=False), torch.tensor([1.0, 0.5]))
    log_p = model.log_probs(tokens, early).double()
    known = [(t, y // 2 - 30) for t, y in enumerate(targets.tolist()) if y >= 60]
    assert 0 < len(known) < T
    expected = plain.item() - 0.25 * sum(log_p[t, prefix].item() for t, prefix in known)
    assert abs(both.item() - expected) < VALUES * expected


def test_the_table_of_prefix_tokens_is_filled_once_the_clock_runs(tmp_path):
    run = make_run(tmp_path, **{**BARE, "prefix_weight": 0.25})
    run.encoding = SimpleNamespace(pieces=lambda: [b"a", b"ab", b"b", b""])
    assert (run.model.prefixes == -1).all()
    run.fill_prefixes()
    assert run.model.prefixes[:4].tolist() == [-1, 0, -1, -1] and (run.model.prefixes[4:] == -1).all()
    make_run(tmp_path).fill_prefixes()  # nothing to do


@pytest.mark.parametrize("techniques", [{}, RECORD_89], ids=str)
def test_recomputing_the_layers_changes_no_gradient_and_keeps_less(techniques):
    kept, gradients = [], []
    for recompute in (False, True):
        cfg = config(THREE_LAYERS, **techniques, recompute=recompute)
        model = build(cfg)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            ctx = context(model, docs_of([30, 34]))
            loss = model(tokens_of(cfg, 64), tokens_of(cfg, 64).roll(-1), ctx, torch.tensor([1.0, 0.5]))
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(map(torch.equal, *gradients))
    assert kept[1] < kept[0] / 2


# ------------------------------------------------------------------------------------------------------------
# Slices that go through the model together


@pytest.mark.parametrize("techniques", [{}, dict(untie_stage=0), RECORD_89], ids=str)
@pytest.mark.parametrize("lengths", [([5, 1, 7, 4], [17], [1, 16]), ([9], [9], [9])], ids=str)
def test_joined_slices_give_the_losses_and_gradients_of_each_by_itself(lengths, techniques):
    model = build(config(**techniques), backend="blocked")
    weights = torch.tensor([1.0, 0.5, 0.25])
    slices = []
    for i, each in enumerate(lengths):
        tokens = tokens_of(model.cfg, sum(each) + 1, seed=i).numpy()
        slices.append(make_batch(tokens, np.cumsum([0, *each[:-1]]), sum(each), False))

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
        assert (together[name] - g).norm() < GRADIENTS * g.norm() + 1e-6 * whole, name

    blind, _ = outcome([join(slices)], slices=1)  # tokens before, and targets, across the starts of slices
    assert abs(blind - expected) > 1e-4 * expected


# ------------------------------------------------------------------------------------------------------------
# Probabilities and causality


@pytest.mark.parametrize("stage, tied, final, backend, techniques", [
    (0, True, False, "masked", {}), (3, False, True, "blocked", {}), (3, False, True, "blocked", RECORD_89)])
@torch.no_grad()
def test_future_tokens_cannot_change_past_probabilities(stage, tied, final, backend, techniques):
    cfg = config(**techniques)
    model, tokens = build(cfg, backend=backend), tokens_of(cfg, 40)
    ctx = context(model, docs_of([14, 1, 25]), stage, tied, final)
    before = model.log_probs(tokens, ctx)
    for t in (1, 13, 20, 39):
        changed = tokens.clone()
        changed[t:] = (changed[t:] + 7) % cfg.vocab_size
        after = model.log_probs(changed, ctx)
        assert torch.equal(before[:t], after[:t])
        assert ((before[t:] - after[t:]).abs().amax(-1) > 1e-3).all()


def test_a_bf16_model_is_near_the_fp32_model_and_has_finite_gradients():
    cfg = config()
    sequence, found = tokens_of(cfg), []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(cfg, dtype, perturb=False)
        with torch.no_grad():
            drawn = torch.randn(model.mlp_out.shape, generator=torch.Generator().manual_seed(3))
            model.mlp_out.copy_(0.1 * drawn)  # normal_ in bf16 draws others in torch 2.11
            model.head.mul_(20)
        ctx = context(model, docs_of(LENGTHS), 1, tied=True)
        loss = model(sequence[:-1], sequence[1:], ctx, torch.tensor([1.0, 0.5]))
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "embed")
        assert model.attn_qk.grad.dtype == dtype and model.resid_lambdas.grad.dtype == torch.float32
        found.append((loss.item(), model.head.grad))
    assert abs(found[0][0] - found[1][0]) < 0.01 * found[0][0]  # bf16 has 8 bits: single roundings are 0.4 %
    assert relative(found[1][1], found[0][1]) < 0.1


# ------------------------------------------------------------------------------------------------------------
# Parameters


def test_every_parameter_and_buffer_is_initialised():
    cfg = config()
    model = GPT(cfg, Kernels.plain())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 99)
    model.init_weights(torch.float32)
    assert all(p.isfinite().all() for p in model.parameters())
    assert set(model.signs.unique().tolist()) == {-1, 1} and abs(model.signs.float().mean()) < 0.01


def test_initial_weights_depend_on_the_seed_alone_and_bf16_ones_are_the_rounded_fp32_ones():
    def state(seed=0, dtype=torch.float32):
        model = GPT(config(seed=seed), Kernels.plain())
        torch.seed()  # the global generator must not matter
        model.init_weights(dtype)
        return model.state_dict()

    a, b, other, low = state(), state(), state(seed=1), state(dtype=torch.bfloat16)
    for name in a:
        assert torch.equal(a[name], b[name])
        assert low[name].dtype == (torch.bfloat16 if name in MATRICES + TABLES else a[name].dtype)
        assert torch.equal(low[name], a[name].to(low[name].dtype))
    random = {"attn_qk", "attn_vo", "mlp_in", "head", "embed", "value_embeds", "signs"}
    assert {name for name in a if not torch.equal(a[name], other[name])} == random


def test_random_mlp_outputs_are_as_large_as_asked():
    out = build(config(model_dim=128, head_dim=16, mlp_out_std=0.5), perturb=False).mlp_out
    bound = math.sqrt(3) * 0.5 / math.sqrt(128)
    assert out.abs().max() <= bound and abs(out.std() / (0.5 / math.sqrt(128)) - 1) < 0.01


OFF = (  # techniques whose settings in BARE turn them off
    "paired_layers", "late_attn_layers", "backout", "skip", "key_offset", "yarn", "softcap",
    "value_embed_layers", "bigram_rows", "smear", "attn_gate_layers", "xsa_layers", "inject_x0",
    "mtp_weights", "untie_stage")
SWITCHES = {
    "everything on": {},
    "everything off": BARE,
    **{f"without {name}": {name: BARE[name]} for name in OFF},
    "no layer is long": dict(long_layers=()),
    "no attention in a layer": dict(no_attn_layers=(1,), value_embed_layers=(0,), attn_gate_layers=(0,),
                                    xsa_layers=(0,)),
    "no rotation": dict(rope_fraction=0.0),
    "n-grams": dict(ngram_rows=60),
    "always tied": dict(untie_stage=-1),
    "sampled softmax": dict(head_rows=(128, 0)),
    "plain Muon": dict(normuon_beta2=0.0),
    "AdamW": dict(optimizer="adamw"),
    "plain decay": dict(cautious=False),
    "no decay": dict(muon_wd=0.0, adam_wd=0.0),
    "Adam in every step": dict(adam_every=1),
    "no cooldown": dict(cooldown_frac=0.0),
    "no extension": dict(extension_steps=0),
    "one stage": dict(stages=1, untie_stage=0),
    "no momentum ramps": dict(momentum_warmup=0, momentum_cooldown=0),
    "other coefficients": dict(coefficients="quintic"),
    "all of record 89": dict(RECORD_89, prefix_weight=0.25),
    "MLP outputs at random": dict(mlp_out_std=0.5),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_ablation_builds_trains_and_evaluates(switch, folder):
    run = make_run(folder, **{**THREE_LAYERS, "train_steps": 8, **SWITCHES[switch]})
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(4):
        run.train_step()
    assert math.isfinite(run.evaluate())
    still = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert still <= ({"embed"} if run.cfg.tied(3) else set()), still


@pytest.mark.parametrize("optimizer, by_muon", [("muon", set(MATRICES)), ("adamw", set())])
def test_every_parameter_is_in_exactly_one_optimizer_group(folder, optimizer, by_muon):
    run = make_run(folder, optimizer=optimizer)
    names = {id(p): name for name, p in run.model.named_parameters()}
    muon, adam = ([names[id(p)] for group in (one.param_groups if one else []) for p in group["params"]]
                  for one in (run.muon, run.adam))
    assert sorted(muon + adam) == sorted(names.values()) and set(muon) == by_muon


# ------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend, compiler, stage, tied, weights, techniques", [
    ("masked", "eager", 1, False, (1.0,), {}),
    ("blocked", "aot_eager", 0, True, (1.0, 0.5), dict(ngram_rows=60)),
    ("blocked", "aot_eager", 0, True, (1.0, 0.25), dict(RECORD_89, prefix_weight=0.25, recompute=True)),
    ("blocked", "aot_eager", 0, True, (1.0, 0.5), dict(head_rows=(128,))),
])
def test_training_and_evaluation_compile_without_graph_break(
        backend, compiler, stage, tied, weights, techniques):
    cfg = config(THREE_LAYERS, **techniques)
    model, sequence = build(cfg, backend=backend), tokens_of(cfg)
    tokens, targets = sequence[:-1], sequence[1:]
    ctx = context(model, docs_of(LENGTHS), stage, tied)
    if any(cfg.head_rows):
        ctx = ctx._replace(sample=draw_sample(cfg.padded_vocab, 128, (0,), torch.device("cpu")))

    def results(forward, evaluate):
        model.zero_grad()
        loss = forward(tokens, targets, ctx, torch.tensor(weights))
        loss.backward()
        with torch.no_grad():
            return loss.detach(), model.attn_qk.grad, evaluate(tokens, targets, ctx)

    torch._dynamo.reset()
    options = dict(fullgraph=True, dynamic=False, backend=compiler)
    compiled = [torch.compile(function, **options) for function in (model, model.evaluate)]
    for found, expected in zip(results(*compiled), results(model, model.evaluate)):
        # the same fp32 operations, perhaps in another order
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
