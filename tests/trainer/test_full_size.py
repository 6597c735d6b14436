"""Track small at full size, counted on the meta device, which takes no memory; and its first steps at reduced width."""
import math

import pytest
import torch

from engine.kernels import Kernels
from muon import COEFFICIENTS
from tests.helpers.tiny import make_run
from train_gpt import GPT, MATRICES, Config, learning_rate, muon_momentum, optimizer_table

D, L, A, V = 768, 11, 10, 50_304  # width, layers, layers with attention, padded vocabulary


def model_of(track: str, **changes) -> GPT:
    with torch.device("meta"):
        return GPT(Config.for_track(track, **changes), Kernels.plain())


@pytest.fixture(scope="module")
def full():
    return model_of("small")


@pytest.fixture(scope="module")
def record89():
    return model_of("small", recipe="record89")


def test_matmul_parameters_are_those_of_the_study(full):
    """TECHNIQUES 1: 23.6 + 51.9 + 38.6 = 114.1 M."""
    attention, mlp, head = A * 4 * D * D, L * 2 * D * 4 * D, D * V
    assert (full.attn_qk.numel() + full.attn_vo.numel(), full.mlp_in.numel() + full.mlp_out.numel()) == (attention, mlp)
    assert [round(n / 1e6, 1) for n in (attention, mlp, head)] == [23.6, 51.9, 38.6]
    assert full.matmul_params() == attention + mlp + head == 114_130_944


def test_all_parameters_are_those_of_the_study(full):
    """TECHNIQUES 1: embedding 38.6, value embeddings 193.2, bigrams 289.8 M; 643.5 M less 7.9 M of padding."""
    assert full.embed.numel() == V * D and full.value_embeds.numel() == 5 * V * D
    assert full.bigram_embed.numel() == 15 * V // 2 * D == 377_280 * D
    total = sum(p.numel() for p in full.parameters())
    small = total - full.matmul_params() - (V + 5 * V + 377_280) * D
    assert abs(total / 1e6 - (643.5 - 7.9)) < 0.15 and 0 < small < 2000  # three rounded figures; scalars and gates


def test_banks_hold_the_matrices_that_muon_treats_as_one(full):
    """TECHNIQUES 6.3: queries and keys by pairs of adjacent heads."""
    assert full.attn_qk.shape == (A * 2 * 3, 256, D) and full.attn_vo.shape == (A * 2, D, D)
    assert full.mlp_in.shape == (L, 4 * D, D) and full.mlp_out.shape == (L, D, 4 * D)


def test_flops_per_token_are_those_of_the_study(full):
    """TECHNIQUES (c): 684.8 MFLOP for matmuls, and attention over full windows 16.6, 44.9, 73.2, 87.4 MFLOP. A token
    sees its window and itself; eight layers are short and two long; 12 D: forward and backward, scores and values."""
    windows = [(128, 384), (384, 896), (640, 1408), (768, 1664)]
    for stage, (short, long) in enumerate(windows):
        attention = full.flops_per_token(stage) - 6 * full.matmul_params()
        assert attention == 12 * D * (8 * (short + 1) + 2 * (long + 1))
        assert round(attention / 1e6, 1) == [16.6, 44.9, 73.2, 87.4][stage]
    assert round(6 * full.matmul_params() / 1e6, 1) == 684.8


def test_record_89_has_the_small_networks_of_the_study_and_no_static_factors(record89, full):
    """TECHNIQUES 2.12 and 2.13: two networks of 64 hidden each; 41 gates at most and 14 connections."""
    shapes = {name: tuple(p.shape) for name, p in record89.named_parameters()}
    assert shapes["gate_in"] == shapes["mudd_in"] == (2, 64, D)
    assert (shapes["gate_out"], shapes["mudd_out"]) == ((2, 41, 64), (2, 14, 64))
    assert (shapes["gate_bias"], shapes["mudd_bias"], shapes["gate_scale"]) == ((2, 41), (2, 14), (1,))
    static = {"x0_lambdas", "bigram_lambdas", "attn_gates", "xsa_alphas", "skip_gate", "backout_lambda"}
    assert {name for name, _ in full.named_parameters()} - set(shapes) == static
    networks = 2 * 64 * (2 * D + 41 + 14)
    assert record89.matmul_params() == full.matmul_params() + networks
    assert record89.flops_per_token(1) == full.flops_per_token(1) + 6 * networks + 12 * D * 112


def test_medium_has_the_products_of_public_record_18_of_its_track():
    """RECIPE 2: 252.8 M weights in products; 2,176,974,848 tokens in 4740 steps."""
    model = model_of("medium")
    cfg, D, L = model.cfg, 1024, 16
    assert model.matmul_params() == L * 12 * D * D + V * D == 252_837_888
    tables = (V + 5 * V + 377_280) * D  # embedding, value embeddings, bigrams
    assert 0 < sum(p.numel() for p in model.parameters()) - model.matmul_params() - tables < 6000
    keys = [12 * (short + 1) + 4 * (long + 1) for short, long in zip(cfg.window_short, cfg.window_long)]
    for stage in (0, 3, 8, 12):
        expected = 6 * model.matmul_params() + 12 * D * keys[min(stage, 8)]
        assert model.flops_per_token(stage) == expected
    assert abs(cfg.train_tokens / 2_176_974_848 - 1) < 0.002  # its stages begin at other steps
    assert (cfg.target_loss, cfg.train_steps, cfg.extension_steps) == (2.92, 4740, 40)
    assert [cfg.at("batch_tokens", s) for s in (0, 392, 784, 1176, 4739)] == [131_072, 262_144, 393_216, 524_288, 524_288]
    assert cfg.untie_step == 786 and learning_rate(cfg, 4739) == pytest.approx(0.1)


def test_the_schedule_takes_the_tokens_of_its_stages():
    cfg = Config.for_track("small")
    assert cfg.slices == 8 and [b // cfg.slices for b in cfg.batch_tokens] == [16_384, 32_768, 49_152]
    assert (cfg.window_short, cfg.window_long, cfg.window_final) == ((128, 384, 640, 768), (384, 896, 1408, 1664), 2560)


EFFECTIVE = {  # TECHNIQUES 6.3, 6.4, 6.6 at schedule factor 1: learning rate, decay per step, betas
    "attn_qk": (0.023, 6.3e-4, None), "attn_vo": (0.023, 6.3e-4, None),
    "mlp_in": (0.046, 2 * 6.3e-4, None), "mlp_out": (0.092, 4 * 6.3e-4, None),
    "head": (0.008, 4.8e-5, (0.5, 0.95)), "embed": (0.008, 4.8e-5, (0.5, 0.95)),
    "value_embeds": (0.6, 9e-3, (0.75, 0.95)), "bigram_embed": (0.6, 9e-3, (0.75, 0.95)),
    "resid_lambdas": (0.04, 0, (0.9, 0.95)), "post_lambdas": (0.008, 0, (0.9, 0.95)),
    **{name: (0.04, 0, (0.9, 0.99)) for name in ("attn_lambdas", "smear_lambda", "skip_lambda", "backout_lambda")},
    **{name: (0.008, 0, (0.9, 0.95)) for name in ("x0_lambdas", "bigram_lambdas", "xsa_alphas")},
    "smear_gate": (0.008 * 0.01, 0, (0.9, 0.99)),
    "value_gates": (0.008, 0.008**2 * 0.005, (0.9, 0.99)), "attn_gates": (0.008, 0.008**2 * 0.005, (0.9, 0.99)),
    "skip_gate": (0.008 * 0.05, 0, (0.9, 0.99)),
    **{name: (0.0008, 0.0008**2 * 0.005, (0.9, 0.99)) for name in ("gate_in", "gate_out")},
    **{name: (0.0008, 0, (0.9, 0.99)) for name in ("gate_bias", "gate_scale")},
    **{name: (0.002, 0.002**2 * 0.005, (0.9, 0.99)) for name in ("mudd_in", "mudd_out")},
    "mudd_bias": (0.002, 0, (0.9, 0.99)),
}


def test_the_optimizer_table_has_the_learning_rates_decays_and_betas_of_the_study(full, record89):
    table = optimizer_table(full.cfg)
    parameters = dict(record89.named_parameters()) | dict(full.named_parameters())
    assert set(table) == set(EFFECTIVE) == set(parameters) and table == optimizer_table(record89.cfg)
    for name, p in parameters.items():
        row, (lr, decay, betas) = table[name], EFFECTIVE[name]
        assert row.optimizer == ("muon" if name in MATRICES else "adam")
        shape = math.sqrt(max(1, p.size(1) / p.size(2))) if name in MATRICES else 1  # Muon's own, not on the decay
        assert math.isclose(row.lr * shape, lr, rel_tol=1e-9), name
        assert math.isclose(row.lr * row.wd, decay, rel_tol=0.01 if name in MATRICES else 1e-9), name  # 6.3 is 6.35
        assert betas is None or row.betas == betas, name
    assert full.cfg.adam_eps == 1e-10
    assert full.cfg.normuon_beta2 == 0.9 and full.cfg.adam_every == 2


# ---------------------------------------------------------------------------------------------------------------------
# Reduced width: what Run.update does to weights, against the formulas


def muon_oracle(W, gradients, lrs, decays, momenta):
    """Cautious NorMuon in float64: TECHNIQUES 6.2-6.4. decays: per step, times lr."""
    W, M, V, tall = W.double(), 0.0, 0.0, W.size(0) >= W.size(1)
    safety, triples = COEFFICIENTS["polar"]
    for G, lr, decay, mu in zip(gradients, lrs, decays, momenta, strict=True):
        M = mu * M + (1 - mu) * G.double()
        X = (1 - mu) * G.double() + mu * M
        X = X / (safety * X.norm())
        for a, b, c in triples:
            X = a * X + (b * X @ X.T + c * X @ X.T @ X @ X.T) @ X
        V = 0.9 * V + 0.1 * (X**2).mean(1 if tall else 0, keepdim=True)
        X = X / V.sqrt() * (X.norm() / (X / V.sqrt()).norm())
        W = W - lr * decay * (X * W >= 0) * W - lr * X
    return W


def adam_oracle(w, gradients, lrs, decay_mul, betas):
    """Cautious Adam in float64; decay per step: lr^2 0.005 decay_mul."""
    w, m, v = w.double(), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, lrs), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        u = lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-10)
        w = w - u - (u * w > 0) * lr**2 * 0.005 * decay_mul * w
    return w


def test_updates_of_a_narrow_track_small_equal_the_formulas(tmp_path):
    """Five steps across a stage change, with made-up gradients: Adam moves in every second one, by their sum."""
    run = make_run(tmp_path, model_dim=64, head_dim=16, mlp_ratio=4, train_steps=26, extension_steps=2)
    cfg, steps = run.cfg, range(6, 11)
    assert cfg.stage_starts[:2] == (0, 8) and cfg.attn_scale == 0.1
    generator = torch.Generator().manual_seed(5)
    before, given = {name: p.detach().clone() for name, p in run.model.named_parameters()}, {}
    for name, p in run.model.named_parameters():
        given[name] = [torch.randn(p.shape, generator=generator) / 8 for _ in steps]
    after = {}
    for i, step in enumerate(steps):
        for name, p in run.model.named_parameters():
            p.grad = given[name][i].clone() if p.grad is None else p.grad + given[name][i]
        run.update(step)
        after[step] = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    eta = [learning_rate(cfg, step) for step in steps]
    assert eta[0] == eta[1] == 1.0 and eta[2] == 1.52 and eta[4] < 1.52  # one stage, the next, its cooldown
    for name, p in run.model.named_parameters():
        lr, decay, betas = EFFECTIVE[name]
        if name in MATRICES:
            assert not torch.equal(after[6][name], before[name])
            for k in {0, len(p) - 1}:
                expected = muon_oracle(before[name][k], [g[k] for g in given[name]], [lr * e for e in eta],
                                       [1.2 * 0.023 * e for e in eta], [muon_momentum(cfg, s) for s in steps])
                # fp32 through five Newton-Schulz iterations in each of five steps: about 1e-5 of an update of 0.1
                assert (p[k] - expected).abs().max() < 2e-5, name
        else:
            assert torch.equal(after[6][name], before[name]) and torch.equal(after[8][name], after[7][name])
            sums = [given[name][0] + given[name][1], given[name][2] + given[name][3]]
            decay_mul = decay / lr**2 / 0.005
            expected = adam_oracle(before[name], [g.double() for g in sums], [lr * eta[1], lr * eta[3]], decay_mul,
                                   betas)
            assert (p - expected).abs().max() < 1e-6 + 1e-6 * lr / 0.008, name  # fp32 roundings of w and of the update
    assert all((p.grad is None) == (name in MATRICES) for name, p in run.model.named_parameters())  # half summed up
