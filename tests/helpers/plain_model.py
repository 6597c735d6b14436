"""The model by its formulas, for one sequence and one head at a time, in the type of its weights: the oracle
of test_model.py, one technique after the other in float64, and of the record's transcription in fp32.

Layouts are those of the public records: rotary channels lie in adjacent pairs, MLP outputs are stored (in,
out), every layer has its own weights. Settings have the names of the trainer's Config.

Shapes: T tokens of one packed sequence, D width, H heads, d head width, V vocabulary.
"""
import ctypes
import math

import torch
from torch import Tensor

from engine.token_factors import gate_slots

EPS = torch.finfo(torch.float32).eps  # of the RMS norm


def as_records(cfg, p: dict) -> dict[str, Tensor]:
    """Return the trainer's weights, or their gradients, under the records' names and in their layout."""
    H, d, D = cfg.num_heads, cfg.head_dim, cfg.model_dim
    renamed = dict(bigram_embed="bigram", resid_lambdas="resid", post_lambdas="post", x0_lambdas="x0",
                   bigram_lambdas="bigram_factor", attn_lambdas="attention_factors", smear_lambda="smear",
                   backout_lambda="backout", skip_lambda="skip")
    banks = {"attn_qk", "attn_vo", "attn_gates", "mlp_in", "mlp_out", "value_embeds", "value_gates",
             "xsa_alphas"}
    found = {renamed.get(name, name): w for name, w in p.items() if name not in banks}

    def spread(kind: str, layers, bank) -> None:
        for i, w in zip(layers, bank, strict=True):
            found[f"{kind}.{i}"] = w

    attention = [i for i in range(cfg.num_layers) if i not in cfg.no_attn_layers]
    qk, vo = p["attn_qk"].reshape(-1, 2, H, d, D), p["attn_vo"].view(-1, 2, D, D)
    order = records_channels(cfg)
    spread("q", attention, qk[:, 0, :, order])
    spread("k", attention, qk[:, 1, :, order])
    spread("v", attention, vo[:, 0])
    spread("o", attention, vo[:, 1])
    spread("fc", range(cfg.num_layers), p["mlp_in"])
    spread("proj", range(cfg.num_layers), p["mlp_out"].mT)
    if "value_embeds" in p:
        found["values"] = p["value_embeds"].view(-1, cfg.padded_vocab, D)
    for kind, bank, layers in (("attention_gate", "attn_gates", cfg.attn_gate_layers),
                               ("value_gate", "value_gates", cfg.value_embed_layers),
                               ("xsa", "xsa_alphas", cfg.xsa_layers)):
        if bank in p:
            spread(kind, layers, p[bank])
    return found


def num_planes(cfg) -> int:
    """Return how many planes of two channels turn in a head."""
    return round(cfg.head_dim * cfg.rope_fraction / 2)


def records_channels(cfg) -> list[int]:
    """Return which of the trainer's channels of a head are the records': j and r + j are 2j + 1 and 2j."""
    r = num_planes(cfg)
    order = list(range(cfg.head_dim))
    for j in range(r):
        order[2 * j] = r + j
        order[2 * j + 1] = j
    return order


# ------------------------------------------------------------------------------------------------------------
# Attention


def rms(x: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotation(cfg, stage: int) -> tuple[Tensor, float]:
    """Return (r,) frequencies in float64 and the softmax scale, after YaRN's changes from stage to stage."""
    scale = cfg.attn_scale
    omega = cfg.rope_base ** -torch.linspace(0, 1, num_planes(cfg), dtype=torch.float64)
    windows = [cfg.window_long[min(s, len(cfg.window_long) - 1)] for s in range(stage + 1)]
    for before, after in zip(windows, windows[1:] if cfg.yarn else []):
        turns = before * omega / (2 * math.pi)
        kept = ((turns - 1) / 31).clamp(0, 1)
        omega = omega * (before / after + kept * (1 - before / after))
        scale *= 1 + 0.2 * math.log(after / before)
    return omega, scale


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """x: (T, d); angle: (T, r). Channels (0, 1), (2, 3), ... turn, those from 2r on stay."""
    cos, sin, end = angle.cos().type_as(x), angle.sin().type_as(x), 2 * angle.size(1)
    even, odd = x[:, 0:end:2], x[:, 1:end:2]
    turned = torch.stack([cos * even + sin * odd, cos * odd - sin * even], -1)
    return torch.cat([turned.flatten(1), x[:, end:]], 1)


def weights_of(q: Tensor, k: Tensor, document: Tensor, window: int, scale: float) -> Tensor:
    """Softmax weights (N, N) of one head over N places, of which each sees itself and `window` before it."""
    place = torch.arange(len(q))
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance <= window) & (document[:, None] == document[None, :])
    return torch.softmax((scale * q @ k.T).masked_fill(~seen, -math.inf), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, document: Tensor, window: int, scale: float) -> Tensor:
    """One head: (N, d)."""
    return weights_of(q, k, document, window, scale) @ v


def attend_in_pairs(q, k, v, partners: list[tuple], document, window: int, scale: float) -> list[Tensor]:
    """Heads a and b of a pair stand at places 2t and 2t + 1 and share keys; the window counts places."""
    y = [None] * len(q)
    for a, b in partners:
        woven = [torch.stack([x[a], x[b]], 1).flatten(0, 1) for x in (q, k, v)]
        both = attend(*woven, document.repeat_interleave(2), window, scale)
        y[a] = both[0::2]
        y[b] = both[1::2]
    return y


def mixture(w_in: Tensor, w_out: Tensor, q, k, v, document, window: int, scale: float) -> list[Tensor]:
    """Return what each head gains by what all read, of `window` tokens with its own. w_in, w_out: (T, H)."""
    heads = range(len(q))
    A = sum(w_in[:, g, None] * weights_of(q[g], k[g], document, window - 1, scale) for g in heads)
    return [w_out[:, a, None] * (A @ v[a]) for a in heads]


def attention(P: dict, cfg, i: int, h: Tensor, rows: Tensor | None, document: Tensor, stage: int, window: int,
              gates: dict, mu: Tensor | None = None, streams=()) -> Tensor:
    """Return (T, D). h: (T, D), the normalized input of layer i; rows: (T, D), its value embedding; gates:
    factors by (kind, layer); mu and streams: connections and what they mix into the values."""
    H, d, _ = P[f"q.{i}"].shape
    n = [k for k in range(cfg.num_layers) if k not in cfg.no_attn_layers].index(i)
    value_factor, output_factor = P["attention_factors"][n]
    omega, scale = rotation(cfg, stage)
    time = torch.arange(len(h))
    q, k, v = [], [], []
    for a in range(H):
        place = 2 * time + a % 2 if i in cfg.paired_layers else time
        angle = place[:, None] * omega
        q.append(turn(rms(h @ P[f"q.{i}"][a].T), angle))
        k.append(turn(rms(h @ P[f"k.{i}"][a].T), angle))
        own = slice(a * d, (a + 1) * d)
        v.append(h @ (value_factor * P[f"v.{i}"][own]).T)
        if rows is not None and mu is None:
            w = P[f"value_gate.{i}"][a]
            half = len(w) // 2
            gate = 2 * torch.sigmoid(torch.cat([h[:, :half], rows[:, :half]], 1) @ w)
            v[a] = v[a] + gate[:, None] * rows[:, own]
        elif rows is not None:
            v[a] = v[a] + mu[:, 6 if a < H // 2 else 7, None] * rows[:, own]
        for m, stream in enumerate(streams):
            v[a] = v[a] + mu[:, m, None] * stream[:, own]
        if cfg.key_offset and i in cfg.long_layers:
            late = torch.cat([k[a][:1, d // 2 :], k[a][:-1, d // 2 :]])
            k[a] = torch.cat([k[a][:, : d // 2], late], 1)

    if i in cfg.paired_layers:
        halves = [(a, a + H // 2) for a in range(H // 2)]
        partners = halves if cfg.pairing == "halves" else [(a, a + 1) for a in range(0, H, 2)]
        y = attend_in_pairs(q, k, v, partners, document, window, scale)
    else:
        y = [attend(q[a], k[a], v[a], document, window, scale) for a in range(H)]
    if ("mix_in", i) in gates:
        w_in = rms(gates["mix_in", i], 1e-6)
        gains = mixture(w_in, gates["mix_out", i], q, k, v, document, cfg.mix_window, scale)
        y = [one + gain for one, gain in zip(y, gains)]
    for a in range(H):
        if i in cfg.xsa_layers:
            alpha = gates["xsa", i][:, a, None] if gates else P[f"xsa.{i}"][a]
            along = (y[a] * v[a]).sum(1, keepdim=True) / v[a].square().sum(1, keepdim=True).clamp(min=1e-8)
            y[a] = y[a] - torch.tanh(alpha) * along * v[a]
        if i in cfg.attn_gate_layers and gates:
            y[a] = y[a] * gates["attn_gate", i][:, a, None]
        elif i in cfg.attn_gate_layers:
            w = P[f"attention_gate.{i}"][a]
            y[a] = y[a] * torch.sigmoid(h[:, : len(w)] @ w)[:, None]
    return torch.cat(y, 1) @ (output_factor * P[f"o.{i}"]).T


# ------------------------------------------------------------------------------------------------------------
# The whole model


def bigram_row(now: int, before: int, t: int, rows: int) -> int:
    """Hash with 32-bit integers, as C does; no remainder is negative, and the first token has its own row."""
    mixed = ctypes.c_int32(36313 * now).value ^ ctypes.c_int32(27191 * before).value
    return mixed % (rows - 1) if t else rows - 1


def bigrams(P: dict, cfg, signs: Tensor, tokens: Tensor) -> Tensor:
    """Return (T, D) embeddings of each token and the one before; n-grams lie in the first channels."""
    ids, result = tokens.tolist(), []
    for t, now in enumerate(ids):
        before = ids[t - 1] if t else 0
        row = P["bigram"][bigram_row(now, before, t, len(P["bigram"]))]
        row = row * signs[(now ^ before) % 8192] if cfg.bigram_signs else row
        if cfg.ngram_rows:
            row = torch.cat([row[: cfg.head_dim] + P["ngrams"][t], row[cfg.head_dim :]])
        result.append(row)
    return torch.stack(result)


def small_network(P: dict, kind: str, n: int, scale, x: Tensor) -> Tensor:
    """Return (T, outputs) of one small network."""
    hidden = x @ P[f"{kind}_in"][n].T
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return scale * (hidden @ P[f"{kind}_out"][n].T + P[f"{kind}_bias"][n])


def gates_of(P: dict, cfg, n: int, x: Tensor) -> dict:
    """Return (kind, layer) -> (T, width), the factors that network n sets."""
    outputs, found, first = small_network(P, "gate", n, P["gate_scale"], x), {}, 0
    for slot in gate_slots(cfg)[n]:
        found[slot.kind, slot.layer] = outputs[:, first : first + slot.width]
        first += slot.width
    return found


def logits(P: dict, signs: Tensor | None, tokens: Tensor, document: Tensor, cfg, stage: int, tied: bool,
           final: bool = False) -> Tensor:
    """Return (T, V) capped logits. final: with the long window of the last validation."""
    e = P["head" if tied else "embed"][tokens]
    if cfg.smear:
        w = P["smear_gate"][0]
        smeared = P["smear"] * torch.sigmoid(e[1:, : len(w)] @ w)[:, None] * e[:-1]
        e = torch.cat([e[:1], e[1:] + smeared])
    x = x0 = rms(e)
    B = bigrams(P, cfg, signs, tokens) if cfg.bigram_rows else None
    gates = gates_of(P, cfg, 0, x0) if cfg.gate_networks else {}
    mu, streams, last, after = None, (), cfg.num_layers - 1, {}

    def factor(kind: str, name: str, i: int):
        return gates[kind, i] if gates else P[name][i]

    if B is not None:
        x = x + factor("bigram", "bigram_factor", 0) * B
    c0 = x
    for i in range(cfg.num_layers):
        (a, b), (p, r) = P["resid"][i], P["post"][i]
        if i in cfg.gate_networks[1:]:
            gates |= gates_of(P, cfg, cfg.gate_networks.index(i), x)
        if cfg.mudd and i == last:
            streams = c0, after[cfg.cache_layer], x
            mu = small_network(P, "mudd", 0, 0.1, x)
            into = mu.split(1, 1)
            x = (1 + into[5]) * x + into[3] * c0 + into[4] * streams[1]

        if i not in cfg.no_attn_layers:
            windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
            window = windows[min(stage, len(windows) - 1)]
            window = cfg.window_final if final and i in cfg.long_layers else window
            source = rms(after[cfg.cache_layer] if i in cfg.late_attn_layers else x)
            rows = None
            if i in cfg.value_embed_layers:
                rows = P["values"][cfg.value_embed_layers.index(i)][tokens]
            y = attention(P, cfg, i, source, rows, document, stage, window, gates, mu, streams)
            if mu is not None:
                x = into[8] * x + into[9] * y + into[10] * c0
                x = x + into[11] * B if B is not None else x
            else:
                x = a * x + p * y
                x = x + factor("x0", "x0", i) * x0 if cfg.inject_x0 else x
                x = x + factor("bigram", "bigram_factor", i) * B if B is not None and i else x

        if cfg.skip and i == cfg.skip[1]:
            if gates:
                by_token = gates["skip", i]
            else:
                w = P["skip_gate"][0]
                by_token = 2 * torch.sigmoid(x0[:, : len(w)] @ w)[:, None]
            x = x + torch.sigmoid(P["skip"]) * by_token * after[cfg.skip[0]]
        hidden = torch.relu(rms(x) @ P[f"fc.{i}"].T).square()
        if mu is not None:
            b, r = into[12], into[13]
        x = after[i] = b * x + r * (hidden @ P[f"proj.{i}"])

    if cfg.backout:
        x = x - P["backout"] * after[cfg.cache_layer]
    if cfg.mudd:
        into = small_network(P, "mudd", 1, 0.1, x).split(1, 1)
        values = P["values"][0][tokens] if cfg.value_embed_layers else None
        skipped = after[cfg.skip[0]] if cfg.skip else None
        for n, stream in enumerate((*streams, values, skipped)):
            x = x + into[n] * stream if stream is not None else x
    z = rms(x) @ P["head"].T
    if not cfg.softcap:
        return z
    A, shift, C = cfg.softcap
    return A * torch.sigmoid((z + shift) / C)


def loss(z: Tensor, targets: Tensor, weights) -> Tensor:
    """Sum over the sequence; targets past its end are left out."""
    log_p, T = torch.log_softmax(z, -1), len(z)
    return sum(-w * log_p[torch.arange(T - k), targets[k:]].sum() for k, w in enumerate(weights))
