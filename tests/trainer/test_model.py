"""The model against a slow one: one token, one head, one formula at a time, in float64, values and
gradients."""
import ctypes
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import join, make_batch
from engine.kernels import Kernels
from engine.token_factors import gate_slots
from tests.helpers.tiny import BARE, THREE_LAYERS, build, config, context, docs_of, make_run
from train_gpt import GPT, MATRICES, TABLES, Config

LENGTHS = [5, 1, 7, 4]  # documents of the sequence that all models below read
T = sum(LENGTHS)
WINDOWS = dict(  # each cuts the longest document
    window_short=(2, 2, 3, 4), window_long=(3, 4, 4, 5), window_final=6)
EPS = torch.finfo(torch.float32).eps  # of the RMS norm, and the rounding of every fp32 operation
# fp32 against float64, largest relative error measured: 5e-7 in values, 3e-6 in gradients (but sums that
# cancel, as those of single scalars do, only have the error of their terms: 1e-6 of the whole gradient is
# allowed on top)
VALUES, GRADIENTS = 3e-6, 2e-5


def tokens_of(cfg, n=T + 1, seed=4):
    return torch.randint(0, cfg.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# The slow model


def rms(x):
    return x / (x.square().mean() + EPS).sqrt()


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def int32(x):
    return ctypes.c_int32(x).value


def bigram_row(now, before, t, rows):
    """As in C with 32-bit integers, then the remainder that is never negative."""
    return rows - 1 if t == 0 else (int32(36313 * now) ^ int32(27191 * before)) % (rows - 1)


def slow_frequencies(cfg, stage):
    """TECHNIQUES 2.2 and 2.3, one frequency at a time; and the softmax scale."""
    r, result = round(cfg.head_dim * cfg.rope_fraction / 2), []
    windows = [cfg.window_long[min(s, len(cfg.window_long) - 1)] for s in range(stage + 1)]
    scale = cfg.attn_scale
    for j in range(r):
        omega = cfg.rope_base ** (-j / (r - 1))
        for old, new in zip(windows, windows[1:] if cfg.yarn else []):
            s, turns = old / new, old * omega / (2 * math.pi)
            g = min(max((turns - 1) / (32 - 1), 0), 1)
            omega *= s + g * (1 - s)
        result.append(omega)
    for old, new in zip(windows, windows[1:] if cfg.yarn else []):
        scale *= 1 + 0.2 * math.log(new / old)
    return result, scale


def turned(x, position, frequencies):
    """Channels j and r + j of x are a plane that turns by position * frequency."""
    r, parts = len(frequencies), list(x)
    for j, omega in enumerate(frequencies):
        c, s = math.cos(position * omega), math.sin(position * omega)
        parts[j], parts[r + j] = x[j] * c - x[r + j] * s, x[j] * s + x[r + j] * c
    return torch.stack(parts)


def slow_network(P, kind, n, scale, x):
    """One small network on one token: the outputs."""
    hidden = P[f"{kind}_in"][n] @ x
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return scale * (P[f"{kind}_out"][n] @ hidden + P[f"{kind}_bias"][n])


def slow_gates(P, cfg, n, x):
    """(kind, layer) -> the factors of each token that network n sets. x: a vector per token."""
    outputs = [slow_network(P, "gate", n, P["gate_scale"][0], v) for v in x]
    found, first = {}, 0
    for slot in gate_slots(cfg)[n]:
        found[slot.kind, slot.layer] = [z[first : first + slot.width] for z in outputs]
        first += slot.width
    return found


def slow_mixture(w_in, w_out, t, q, k, v, seen, scale):
    """What heads gain at token t, where they may read the tokens `seen`. w_in, w_out: (H,)."""
    heads = range(len(w_in))
    w_in = w_in / (w_in.square().mean() + 1e-6).sqrt()
    p = [torch.softmax(scale * torch.stack([q[t][g] @ k[s][g] for s in seen]), 0) for g in heads]
    A = sum(w_in[g] * p[g] for g in heads)
    return [w_out[a] * sum(A[m] * v[s][a] for m, s in enumerate(seen)) for a in heads]


def slow_attention(P, cfg, i, h, tokens, stage, window, gates, mu, streams):
    """h: the normed input of layer i per token; mu, streams: connections and what they mix into the values,
    or None. Returns the output per token."""
    D, H, d = cfg.model_dim, cfg.num_heads, cfg.head_dim
    n = [k for k in range(cfg.num_layers) if k not in cfg.no_attn_layers].index(i)
    Wq, Wk = P["attn_qk"].reshape(-1, 2, H, d, D)[n]
    Wv, Wo = P["attn_vo"][2 * n] * P["attn_lambdas"][n, 0], P["attn_vo"][2 * n + 1] * P["attn_lambdas"][n, 1]
    paired, (frequencies, scale) = i in cfg.paired_layers, slow_frequencies(cfg, stage)
    document = [k for k, length in enumerate(LENGTHS) for _ in range(length)]
    q, k, v = [], [], []
    for t in range(T):
        q.append([turned(rms(Wq[a] @ h[t]), 2 * t + a % 2 if paired else t, frequencies) for a in range(H)])
        k.append([turned(rms(Wk[a] @ h[t]), 2 * t + a % 2 if paired else t, frequencies) for a in range(H)])
        v.append(list((Wv @ h[t]).reshape(H, d)))
        if i in cfg.value_embed_layers:
            m = cfg.value_embed_layers.index(i)
            row = P["value_embeds"][m * cfg.padded_vocab + tokens[t]]
            half = P["value_gates"].size(2) // 2
            by_head = 2 * sigma(P["value_gates"][m] @ torch.cat([h[t][:half], row[:half]]))
            if mu:
                by_head = [mu[t][6] if a < H // 2 else mu[t][7] for a in range(H)]
            v[t] = [v[t][a] + by_head[a] * row[a * d : (a + 1) * d] for a in range(H)]
        if mu:
            more = sum(mu[t][n] * streams[n][t] for n in range(3))
            v[t] = [v[t][a] + more[a * d : (a + 1) * d] for a in range(H)]
    if cfg.key_offset and i in cfg.long_layers:
        k = [k[0]] + [[torch.cat([k[t][a][: d // 2], k[t - 1][a][d // 2 :]]) for a in range(H)]
                      for t in range(1, T)]

    def partners(a):
        """The heads that share a softmax, in the order of their places."""
        if not paired:
            return [a]
        if cfg.pairing == "neighbours":
            return [a // 2 * 2, a // 2 * 2 + 1]
        return [a % (H // 2), a % (H // 2) + H // 2]

    outputs = []
    for t in range(T):
        y, gains = [], None
        if ("mix_in", i) in gates:
            seen = [s for s in range(max(0, t - cfg.mix_window + 1), t + 1) if document[s] == document[t]]
            weights = gates["mix_in", i][t], gates["mix_out", i][t]
            gains = slow_mixture(*weights, t, q, k, v, seen, scale)
        for a in range(H):
            places = [(s, b) for s in range(t + 1) for b in partners(a) if document[s] == document[t]]
            if paired:
                own = 2 * t + partners(a).index(a)
                places = [(s, b) for s, b in places if 0 <= own - (2 * s + partners(b).index(b)) <= window]
            else:
                places = [(s, b) for s, b in places if t - s <= window]
            e = torch.exp(scale * torch.stack([(q[t][a] * k[s][b]).sum() for s, b in places]))
            z = (e / e.sum()) @ torch.stack([v[s][b] for s, b in places])
            z = z + gains[a] if gains else z
            if i in cfg.xsa_layers:
                own = v[t][a]
                alpha = gates["xsa", i][t][a] if gates else P["xsa_alphas"][cfg.xsa_layers.index(i), a]
                z = z - torch.tanh(alpha) * (z @ own) / (own @ own) * own
            if i in cfg.attn_gate_layers and gates:
                z = z * gates["attn_gate", i][t][a]
            elif i in cfg.attn_gate_layers:
                w = P["attn_gates"][cfg.attn_gate_layers.index(i), a]
                z = z * sigma(w @ h[t][: len(w)])
            y.append(z)
        outputs.append(Wo @ torch.cat(y))
    return outputs


def slow_log_probs(P, signs, cfg, tokens, stage, tied, final=False):
    """(T, V) in float64. P: name -> float64 parameter."""
    tokens = tokens.tolist()
    e = [(P["head"] if tied else P["embed"])[x] for x in tokens]
    if cfg.smear:
        w = P["smear_gate"][0]
        e = e[:1] + [e[t] + P["smear_lambda"][0] * sigma(w @ e[t][: len(w)]) * e[t - 1] for t in range(1, T)]
    x = x0 = [rms(v) for v in e]
    B = None
    if cfg.bigram_rows:
        B = []
        for t in range(T):
            before = tokens[t - 1] if t else 0
            row = P["bigram_embed"][bigram_row(tokens[t], before, t, cfg.bigram_rows)]
            B.append(row * signs[(tokens[t] ^ before) % 8192] if cfg.bigram_signs else row)
            if cfg.ngram_rows:
                B[t] = torch.cat([B[t][: cfg.head_dim] + P["ngrams"][t], B[t][cfg.head_dim :]])
    gates, mu, streams = {}, None, None

    def factor(kind, i, t):
        """Of x0 or bigram."""
        return gates[kind, i][t] if gates else P[f"{kind}_lambdas"][i]

    if cfg.gate_networks:
        gates.update(slow_gates(P, cfg, 0, x0))
    if B:
        x = [x[t] + factor("bigram", 0, t) * B[t] for t in range(T)]
    outputs, c0 = {}, x
    for i in range(cfg.num_layers):
        (a, b), (p, r) = P["resid_lambdas"][i], P["post_lambdas"][i]
        if i in cfg.gate_networks[1:]:
            gates.update(slow_gates(P, cfg, cfg.gate_networks.index(i), x))
        if cfg.mudd and i == cfg.num_layers - 1:
            into_last, streams = x, (c0, outputs[cfg.cache_layer], x)
            mu = [slow_network(P, "mudd", 0, 0.1, v) for v in x]
            x = [(1 + mu[t][5]) * x[t] + mu[t][3] * c0[t] + mu[t][4] * streams[1][t] for t in range(T)]
        if i not in cfg.no_attn_layers:
            source = outputs[cfg.cache_layer] if i in cfg.late_attn_layers else x
            windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
            window = windows[min(stage, len(windows) - 1)]
            window = cfg.window_final if final and i in cfg.long_layers else window
            source = [rms(v) for v in source]
            y = slow_attention(P, cfg, i, source, tokens, stage, window, gates, mu, streams)
            if mu:
                x = [m[8] * x[t] + m[9] * y[t] + m[10] * c0[t] for t, m in enumerate(mu)]
                x = [x[t] + (m[11] * B[t] if B else 0) for t, m in enumerate(mu)]
            else:
                x = [a * x[t] + p * y[t] for t in range(T)]
            if cfg.inject_x0 and not mu:
                x = [x[t] + factor("x0", i, t) * x0[t] for t in range(T)]
            if B and i and not mu:
                x = [x[t] + factor("bigram", i, t) * B[t] for t in range(T)]
        if cfg.skip and i == cfg.skip[1]:
            s = P["skip_lambda"][0]
            if gates:
                by_token = gates["skip", i]
            else:
                w = P["skip_gate"][0]
                by_token = [2 * sigma(w @ x0[t][: len(w)]) for t in range(T)]
            x = [x[t] + sigma(s) * by_token[t] * outputs[cfg.skip[0]][t] for t in range(T)]
        hidden = [torch.clamp(P["mlp_in"][i] @ rms(v), min=0) ** 2 for v in x]
        factors = [(m[12], m[13]) for m in mu] if mu else [(b, r)] * T
        x = outputs[i] = [b * x[t] + r * (P["mlp_out"][i] @ hidden[t]) for t, (b, r) in enumerate(factors)]
    if cfg.backout:
        x = [x[t] - P["backout_lambda"][0] * outputs[cfg.cache_layer][t] for t in range(T)]
    if cfg.mudd:
        mu = [slow_network(P, "mudd", 1, 0.1, v) for v in x]
        mixed = [c0, outputs[cfg.cache_layer], into_last]
        mixed.append([P["value_embeds"][token] for token in tokens] if cfg.value_embed_layers else None)
        mixed.append(outputs[cfg.skip[0]] if cfg.skip else None)
        terms = [(n, stream) for n, stream in enumerate(mixed) if stream]
        x = [x[t] + sum(mu[t][n] * stream[t] for n, stream in terms) for t in range(T)]
    logits = torch.stack([P["head"] @ rms(v) for v in x])
    if cfg.softcap:
        A, shift, C = cfg.softcap
        logits = A * sigma((logits + shift) / C)
    return logits - torch.log(torch.exp(logits).sum(-1, keepdim=True))


def slow_loss(log_probs, targets, weights):
    return -sum(w * log_probs[t, targets[t + k]] for k, w in enumerate(weights) for t in range(T - k))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)).item()


def compare(cfg, stage=0, tied=False, weights=(1.0,), final=False, backend="masked"):
    """Values and gradients of the model and of the slow one, from perturbed weights."""
    model, sequence = build(cfg, backend=backend), tokens_of(cfg)
    tokens, targets = sequence[:-1], sequence[1:]
    ctx = context(model, docs_of(LENGTHS), stage, tied, final)
    P = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    if cfg.ngram_rows:
        P["ngrams"] = ctx.ngrams.detach().double().requires_grad_()
    signs = model.signs.double() if cfg.bigram_rows else None
    slow = slow_log_probs(P, signs, cfg, tokens, stage, tied, final)
    fast = model.log_probs(tokens, ctx)
    assert (fast - slow).abs().max() < VALUES * slow.abs().max()
    loss, expected = model(tokens, targets, ctx, torch.tensor(weights)), slow_loss(slow, targets, weights)
    assert abs(loss.item() - expected.item()) < VALUES * expected.item()
    loss.backward()
    gradients = torch.autograd.grad(expected, list(P.values()), allow_unused=True)
    whole = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    leaves = {**dict(model.named_parameters()), **({"ngrams": ctx.ngrams} if cfg.ngram_rows else {})}
    for (name, p), g in zip(leaves.items(), gradients, strict=True):
        if g is None:
            assert p.grad is None and name == "embed" and tied, name
        else:
            assert 0 < g.norm(), name
            assert (p.grad - g).norm() < GRADIENTS * g.norm() + 1e-6 * whole, (name, g.norm())
    with torch.no_grad():
        total = -slow[torch.arange(T), targets].sum().item()
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
def test_one_technique_alone_equals_the_slow_model(technique):
    compare(config(BARE, **{**WINDOWS, **TECHNIQUES[technique]}))


@pytest.mark.parametrize("stage, tied, weights, final, backend", [
    (0, True, (1.0, 0.5, 0.25), False, "masked"), (2, False, (1.0, 0.3), False, "blocked"),
    (3, False, (1.0,), True, "blocked")])
def test_all_techniques_together_equal_the_slow_model(stage, tied, weights, final, backend):
    compare(config(**WINDOWS), stage, tied, weights, final, backend)


@pytest.mark.parametrize("stage, tied, weights, final", [
    (0, True, (1.0, 0.5, 0.25), False), (3, False, (1.0,), True)])
def test_all_of_record_89_together_equals_the_slow_model(stage, tied, weights, final):
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
        wrapped += t > 0 and int32(36313 * now) != 36313 * now
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


@pytest.mark.parametrize("track", ["small", "shakespeare"])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary(track):
    cfg = config() if track == "small" else Config.for_track(track, dtype="float32")
    model, n = build(cfg, perturb=False), 64
    tokens = tokens_of(cfg, n + 1)
    loss = model.evaluate(tokens[:-1], tokens[1:], context(model, docs_of([n]), tied=True)).item() / n
    assert abs(loss - math.log(cfg.padded_vocab)) < 0.05  # logits of size 0.005 sqrt(D) at most


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


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
# Track small at full size, counted on the meta device, which takes no memory


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return GPT(config({}), Kernels.plain())


def test_parameters_are_those_of_the_study(full):
    """23.6 + 51.9 + 38.6 = 114.1 M in products, value embeddings 193.2 M, bigrams 289.8 M; 643.5 M less 7.9 M
    of padding in all. Queries and keys are one matrix by pairs of adjacent heads."""
    L, A, D, V = 11, 10, 768, 50_304  # layers, layers with attention, width, padded vocabulary
    assert full.matmul_params() == A * 4 * D * D + L * 2 * D * 4 * D + D * V == 114_130_944
    rows = V + 5 * V + 377_280  # of embedding, value embeddings, bigrams
    total = sum(p.numel() for p in full.parameters())
    assert abs(total / 1e6 - (643.5 - 7.9)) < 0.15  # three rounded figures
    assert 0 < total - full.matmul_params() - rows * D < 2000  # scalars and gates
    assert full.attn_qk.shape == (A * 2 * 3, 256, D) and full.attn_vo.shape == (A * 2, D, D)
    assert full.mlp_in.shape == (L, 4 * D, D) and full.mlp_out.shape == (L, D, 4 * D)


def test_flops_per_token_are_those_of_the_study(full):
    """684.8 MFLOP for matmuls, and attention over full windows. A token sees its window and itself; eight
    layers are short and two long; 12 D: forward and backward, scores and values."""
    products = 6 * full.matmul_params()
    assert round(products / 1e6, 1) == 684.8
    windows = {(128, 384): 16.6, (384, 896): 44.9, (640, 1408): 73.2, (768, 1664): 87.4}
    for stage, ((short, long), mflop) in enumerate(windows.items()):
        attention = full.flops_per_token(stage) - products
        assert attention == 12 * 768 * (8 * (short + 1) + 2 * (long + 1))
        assert round(attention / 1e6, 1) == mflop


# ------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend, compiler, stage, tied, weights, techniques", [
    ("masked", "eager", 1, False, (1.0,), {}),
    ("blocked", "aot_eager", 0, True, (1.0, 0.5), dict(ngram_rows=60)),
    ("blocked", "aot_eager", 0, True, (1.0, 0.25), dict(RECORD_89, prefix_weight=0.25, recompute=True)),
])
def test_training_and_evaluation_compile_without_graph_break(
        backend, compiler, stage, tied, weights, techniques):
    cfg = config(THREE_LAYERS, **techniques)
    model, sequence = build(cfg, backend=backend), tokens_of(cfg)
    tokens, targets = sequence[:-1], sequence[1:]
    ctx = context(model, docs_of(LENGTHS), stage, tied)

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
