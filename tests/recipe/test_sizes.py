"""Track small, its recipe record89 and track medium at full size, on the meta device, which takes no memory;
and how the small networks of record 89 begin."""
import math

import pytest
import torch

from engine.kernels import Kernels
from engine.token_factors import gate_slots
from tests.helpers.tiny import build, config
from train_gpt import GPT, Config, learning_rate

D, V, H = 768, 50_304, 6  # width and heads of track small, padded vocabulary


def model_of(track: str, **changes) -> GPT:
    with torch.device("meta"):
        return GPT(Config.for_track(track, **changes), Kernels.plain())


def test_track_small_has_the_parameters_of_the_study():
    """23.6 + 51.9 + 38.6 = 114.1 M in products, value embeddings 193.2 M, bigrams 289.8 M; 643.5 M less 7.9 M
    of padding in all. Queries and keys are one matrix by pairs of adjacent heads."""
    full = model_of("small")
    L, A = 11, 10  # layers, layers with attention
    assert full.matmul_params() == A * 4 * D * D + L * 2 * D * 4 * D + D * V == 114_130_944
    rows = V + 5 * V + 377_280  # of embedding, value embeddings, bigrams
    total = sum(p.numel() for p in full.parameters())
    assert abs(total / 1e6 - (643.5 - 7.9)) < 0.15  # three rounded figures
    assert 0 < total - full.matmul_params() - rows * D < 2000  # scalars and gates
    assert full.attn_qk.shape == (A * 2 * 3, 256, D) and full.attn_vo.shape == (A * 2, D, D)
    assert full.mlp_in.shape == (L, 4 * D, D) and full.mlp_out.shape == (L, D, 4 * D)


def test_track_small_takes_the_flops_per_token_of_the_study():
    """684.8 MFLOP for matmuls, and attention over full windows. A token sees its window and itself; eight
    layers are short and two long; 12 D: forward and backward, scores and values."""
    full = model_of("small")
    products = 6 * full.matmul_params()
    assert round(products / 1e6, 1) == 684.8
    windows = {(128, 384): 16.6, (384, 896): 44.9, (640, 1408): 73.2, (768, 1664): 87.4}
    for stage, ((short, long), mflop) in enumerate(windows.items()):
        attention = full.flops_per_token(stage) - products
        assert attention == 12 * D * (8 * (short + 1) + 2 * (long + 1))
        assert round(attention / 1e6, 1) == mflop


def test_the_networks_of_gates_have_the_outputs_of_record_89():
    """26 from the first embedding and 41 from the input of layer 4, with their values at the start."""
    inject = [("x0", 1, 0.0), ("bigram", 1, 0.05)]
    xsa = [("xsa", H, 0.0)]
    gate = [("attn_gate", H, 0.25)]
    mixing = [("mix_in", H, 1.0), ("mix_out", H, 0.0)]
    expected = [
        {0: inject, 1: xsa + inject, 2: inject, 3: xsa + gate + inject},
        {4: xsa + inject, 5: inject, 6: [("skip", 1, 0.5)], 7: xsa + inject, 8: inject, 9: inject,
         10: gate + mixing}]
    networks = gate_slots(Config.for_track("small", recipe="record89"))
    assert [sum(slot.width for slot in slots) for slots in networks] == [26, 41]
    for slots, layers in zip(networks, expected, strict=True):
        assert [tuple(slot) for slot in slots] == [(i, *rest) for i, row in layers.items() for rest in row]


def test_small_networks_begin_as_the_constants_of_the_record_whatever_the_token():
    model = build(config(mudd=True, backout=False, gate_networks=(0, 3), mix_window=4), perturb=False)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    layers = model.layer_weights()
    for i in model.cfg.gate_networks:
        model.set_gates(i, x, layers)
    begins = dict(x0=0.0, bigram=0.05, xsa=0.0, attn_gate=0.25, skip=0.5, mix_in=1.0, mix_out=0.0)
    for kind, value in begins.items():
        found = [factor for layer in layers if (factor := getattr(layer, kind)) is not None]
        assert found and all(torch.allclose(factor, torch.tensor(value)) for factor in found), kind

    root = math.sqrt(1.1)
    into_layer, into_head = (torch.cat(model.connections(n, x), 1) for n in (0, 1))
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, root, 1, 0, 0.05, root, 1])
    assert torch.allclose(into_layer, expected) and torch.equal(into_layer[0], into_layer[1])
    assert torch.allclose(into_head[:, :5], torch.tensor([0, -0.5, 0, 0, 0]))
    for w in (model.gate_in, model.mudd_in):
        assert w.abs().max() <= 32**-0.5 and abs(w.std() * math.sqrt(3 * 32) - 1) < 0.05


def test_record_89_has_two_networks_of_each_kind_and_no_static_factors():
    base, record = model_of("small"), model_of("small", recipe="record89")
    shapes = {name: tuple(p.shape) for name, p in record.named_parameters()}
    assert shapes["gate_in"] == shapes["mudd_in"] == (2, 64, D)
    assert (shapes["gate_out"], shapes["mudd_out"]) == ((2, 41, 64), (2, 14, 64))
    assert (shapes["gate_bias"], shapes["mudd_bias"], shapes["gate_scale"]) == ((2, 41), (2, 14), (1,))
    static = {"x0_lambdas", "bigram_lambdas", "attn_gates", "xsa_alphas", "skip_gate", "backout_lambda"}
    assert {name for name, _ in base.named_parameters()} - set(shapes) == static

    networks = 2 * 64 * (2 * D + 41 + 14)
    assert record.matmul_params() == base.matmul_params() + networks
    assert record.flops_per_token(1) == base.flops_per_token(1) + 6 * networks + 12 * D * 112


def test_medium_has_the_size_and_schedule_of_public_record_18_of_its_track():
    """252.8 M weights in products; 2,176,974,848 tokens in 4740 steps, here in stages that begin
    otherwise."""
    model, D, L = model_of("medium"), 1024, 16
    cfg = model.cfg
    assert (cfg.target_loss, cfg.train_steps, cfg.extension_steps) == (2.92, 4740, 40)
    assert model.matmul_params() == L * 12 * D * D + V * D == 252_837_888
    rows = V + 5 * V + 377_280  # of embedding, value embeddings, bigrams
    scalars = sum(p.numel() for p in model.parameters()) - model.matmul_params() - rows * D
    assert 0 < scalars < 6000

    windows = list(zip(cfg.window_short, cfg.window_long))
    for stage in (0, 3, 8, 12):
        short, long = windows[min(stage, 8)]
        keys = 12 * (short + 1) + 4 * (long + 1)
        assert model.flops_per_token(stage) == 6 * model.matmul_params() + 12 * D * keys
    assert cfg.train_tokens == pytest.approx(2_176_974_848, rel=0.002)
    tokens = {0: 131_072, 392: 262_144, 784: 393_216, 1176: 524_288, 4739: 524_288}
    assert {step: cfg.at("batch_tokens", step) for step in tokens} == tokens
    assert cfg.untie_step == 786 and learning_rate(cfg, 4739) == pytest.approx(0.1)
