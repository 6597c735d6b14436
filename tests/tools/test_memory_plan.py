"""tools.plan counts from shapes and by a formula: its bytes against those of a real run, its settings
against the trainer."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import muon
from data.errors import run_program
from data.files import ROOT
from engine.sampled_softmax import draw_sample
from tests.helpers.tiny import BARE, SMALL, build, config, context, docs_of, make_run
from tools import plan
from tools.gpus import GPUS, find_gpu
from tools.traced import settings_of, traced_runs
from train_gpt import EMA_EVERY, Config

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
torch.set_num_threads(1)  # tiny tensors
LARGE = dict(BARE, num_layers=3, long_layers=(1,), mlp_ratio=3)  # three MLPs
RECORD_89 = dict(mudd=True, backout=False, gate_networks=(0, 3), mix_window=8)
LARGE |= dict(model_dim=128, head_dim=64, vocab_size=500, bigram_rows=1000)  # tables in parts


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def state_bytes(optimizer) -> int:
    return nbytes(x for state in optimizer.state.values() for x in state.values()) if optimizer else 0


@pytest.mark.parametrize("changes", [
    dict(normuon_beta2=0.0),
    dict(dtype="bfloat16", ema_frac=0.5),
    dict(optimizer="adamw"),
    dict(RECORD_89, prefix_weight=0.25, ema_frac=0.5, ema_of="head"),
    BARE,
], ids=["no normuon", "bfloat16", "adamw", "record 89", "bare"])
def test_what_stays_in_memory_is_what_a_run_has(tmp_path, changes):
    run = make_run(tmp_path, **{**SMALL, **changes})
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    gradients = nbytes(p.grad for p in run.model.parameters())
    run.update(run.cfg.adam_every - 1)
    run.step = run.cfg.train_steps - EMA_EVERY
    run.average_weights()
    assert plan.static_bytes(run.cfg, run.kernels.dtype, 1) == {
        "weights": nbytes(run.model.parameters()),
        "gradients": gradients,
        "Adam: moments, low halves": state_bytes(run.adam),
        "Muon: momentum, low halves": state_bytes(run.muon),
        "average of the weights": nbytes((run.ema or {}).values()),
        "signs of the bigrams, prefix tokens": nbytes(run.model.buffers()),
        "gathers and reductions": 0,
    }


@pytest.mark.parametrize("world", [2, 4])
def test_shares_are_not_below_those_of_the_fullest_rank(tmp_path, monkeypatch, world):
    """Each rank's real optimizers, laid out one after the other without talking to each other."""
    monkeypatch.setattr(muon, "of_all_ranks", lambda fact, group: [fact])
    run, adam, momenta = make_run(tmp_path, LARGE), [], []
    for rank in range(world):
        monkeypatch.setattr(muon, "world_and_rank", lambda group: (world, rank))
        run.rt = SimpleNamespace(rank=rank, world=world)
        run.make_optimizers()
        for bucket in run.muon.buckets:
            for stack in bucket.stacks[rank]:
                bucket.state(stack)  # made at first use
        adam.append(state_bytes(run.adam))
        momenta.append(state_bytes(run.muon))
    found, alone = (plan.static_bytes(run.cfg, torch.float32, n) for n in (world, 1))
    assert found["Adam: moments, low halves"] == max(adam) < 1.2 / world * alone["Adam: moments, low halves"]
    largest = 3 * 128 * 128 * 4 + 4 * 384
    assert max(momenta) <= found["Muon: momentum, low halves"] <= max(momenta) + largest
    assert found["gathers and reductions"] > 0


def kept_by_a_real_pass(cfg: Config, T: int) -> int:
    """Bytes that a forward pass on the CPU keeps, in tensors of their own; not weights, not masks."""
    model = build(cfg, perturb=False, backend="blocked").train()
    ctx = context(model, docs_of([T // 4] * 4), stage=2)
    if rows := cfg.by_stage("head_rows", 2):
        ctx = ctx._replace(sample=draw_sample(cfg.padded_vocab, rows, (0,), torch.device("cpu")))
    masks = [m for row in ctx.masks for m in row if m is not None]
    ignored = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *masks]}
    found = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in ignored:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage(), x.untyped_storage().nbytes()
        return x

    ids = torch.randint(0, cfg.bos_id, (T,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, ids.roll(-1), ctx, torch.ones(1))
    return sum(size for _, size in found.values())


DEEP = dict(num_layers=14, mlp_ratio=4, model_dim=64, head_dim=32)


@pytest.mark.parametrize("base, T", [
    (SMALL, 768),
    (SMALL | DEEP, 384),
    (SMALL | RECORD_89, 768),
    (SMALL | dict(ngram_rows=60), 768),
    (SMALL | RECORD_89 | dict(mix_window=64), 768),
    (BARE, 512),
    (SMALL | dict(head_rows=(128,)), 768),
], ids=["small", "deep", "record 89", "n-grams", "wide mixing", "bare", "sampled softmax"])
def test_the_formula_lies_a_little_above_what_a_real_eager_pass_keeps(base, T):
    """The bound is 40 % in fp32: the formula is made for bf16, whose norms keep an fp32 copy."""
    cfg = config(base)
    real = kept_by_a_real_pass(cfg, T)
    assert real <= plan.step_bytes(cfg, torch.float32, False, T)[0] <= 1.4 * real


@pytest.mark.parametrize("name", traced_runs())
def test_a_traced_run_is_planned_as_it_was_found(name):
    """Each graph, and the fullest moments of a training and of a validation."""
    cfg, run = traced_runs()[name]
    for _, tokens, kept, _ in run["passes"]:
        assert plan.step_bytes(cfg, torch.bfloat16, True, tokens)[0] == pytest.approx(kept, rel=0.02)
    planned = plan.needs(cfg, torch.bfloat16, True, run["ranks"])
    peaks = {phase: gib for phase, (gib, _) in run["peak_gib"].items()}
    assert planned["needed: training"] / plan.GIB == pytest.approx(max(peaks.values()), rel=0.1)
    assert planned["needed: validation"] / plan.GIB == pytest.approx(peaks["validation"], rel=0.1)


def test_a_loss_over_a_sample_is_planned_as_it_was_found_and_takes_fewer_minutes():
    """By the trace of a run over all rows: its formula is scaled by the logits at a time."""
    path = ROOT / "bench/results/2026-11-29_sampled_softmax/H100-8-sampled.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    cfg = settings_of(run["flags"])
    for _, tokens, *found in run["passes"]:
        planned = plan.step_bytes(cfg, torch.bfloat16, True, tokens, 8192)
        assert planned[0] == pytest.approx(found[0], rel=0.02)
        assert planned[1] == pytest.approx(found[1], rel=0.35)  # 0.4 GiB at most
    needed = plan.needs(cfg, torch.bfloat16, True, run["ranks"])["needed: training"] / plan.GIB
    assert needed == pytest.approx(max(gib for gib, _ in run["peak_gib"].values()), rel=0.1)

    short = replace(cfg, batch_tokens=(131_072,))  # all logits of the sample are fewer than those of a piece
    over = {rows: plan.needs(replace(short, head_rows=rows), torch.bfloat16, True, 8)
            for rows in ((0,), (8192,), (8192, 8192, 8192, 0))}
    assert over[8192, 8192, 8192, 0] == over[0,]  # the last stage is the fullest
    assert over[8192,]["needed: training"] < over[0,]["needed: training"] - plan.GIB / 2
    assert plan.training_flops(cfg) < 0.75 * plan.training_flops(replace(cfg, head_rows=(0,)))


def test_bytes_of_a_compiled_model_are_scaled_as_those_of_an_eager_one():
    cfg = Config.for_track("small")
    kept, more = plan.step_bytes(cfg, torch.bfloat16, True, 49_152)
    matrices = 2 * ((2 * 10 + 4 * 11) * 768**2 + 50_304 * 768)  # bytes that tokens do not change
    streams = plan.eager_step_bytes(cfg, torch.bfloat16, 49_152)[0] - matrices
    larger = kept * (4 * streams + 2 * matrices) // (streams + matrices)
    assert plan.step_bytes(cfg, torch.float32, True, 98_304) == (larger, more)
    deep = replace(cfg, num_layers=22)
    eager = [plan.eager_step_bytes(one, torch.bfloat16, 49_152)[0] for one in (cfg, deep)]
    assert plan.step_bytes(deep, torch.bfloat16, True, 49_152)[0] == kept * eager[1] // eager[0]


def test_ngrams_count_in_host_memory_and_in_checkpoints_and_on_the_device_by_their_step(tmp_path, capsys):
    run = make_run(tmp_path, ngram_rows=1000)
    cfg, without = run.cfg, replace(run.cfg, ngram_rows=0)
    size = nbytes([run.ngrams.rows, run.ngrams.state])
    sizes = [plan.checkpoint_bytes(one, torch.float32) for one in (cfg, without)]
    assert plan.host_bytes(cfg) == size == sizes[0] - sizes[1]
    assert plan.static_bytes(cfg, torch.float32, 1) == plan.static_bytes(without, torch.float32, 1)

    run.accumulate([run.made_up_batch(cfg.train_steps - 1)] * 2, cfg.train_steps - 1)
    leaf = run.ngrams.leaf
    bound = plan.ngram_bytes(cfg, torch.float32, 1)
    assert bound / 3 < nbytes([leaf, leaf.grad]) <= bound == 2 * 2 * 128 * 8 * 4

    text = said(capsys, "--track=small", "--gpu=NVIDIA H100 80GB HBM3", "--ngram_rows=84602880")
    assert "The n-grams take 40.97 GiB of host memory besides, over all ranks together." in text
    assert table(text)["rows and gradients of n-grams"] == ["0.38", "0.19", "0.09", "0.05"]


# ------------------------------------------------------------------------------------------------------------
# What fits, and what is said


def said(capsys, *argv: str) -> str:
    assert run_program(plan.main, list(argv)) == 0
    return capsys.readouterr().out


def table(text: str) -> dict[str, list[str]]:
    """Rows of the printed table by name."""
    lines = text.split("\n\n")[1].splitlines()
    return {line[:36].strip(): line[36:].split() for line in lines}


def test_a_large_gpu_trains_as_the_track_does_and_a_small_one_recomputes_before_slices_get_shorter(capsys):
    gpus = "--gpu=NVIDIA H100 80GB HBM3", "--gpu=RTX 4090", "--gpu_gib=18"
    large, small, smaller = (table(said(capsys, "--track=small", gpu)) for gpu in gpus)
    assert (large["--recompute"], large["--slices"]) == (["off"] * 4, ["8"] * 4)
    assert (small["--recompute"], small["--slices"]) == (["off"] * 4, ["8"] * 4)
    assert (smaller["--recompute"], smaller["--slices"]) == (["on"] * 3 + ["off"], ["8"] * 4)
    assert int(smaller["--val_slice"][0]) < 262_144
    for rows in (large, small, smaller):
        assert rows["fits"] == ["yes"] * 4
        for i in range(4):
            needed = max(float(rows[f"needed: {moment}"][i]) for moment in ("training", "validation"))
            assert needed + float(rows["allowance"][i]) <= float(rows["memory"][i])
    minutes = [float(n) for n in large["minutes of training, estimate"]]
    assert minutes[0] == pytest.approx(8 * minutes[3], abs=0.5)


def test_a_gpu_that_is_too_small_is_told_so(capsys):
    text = said(capsys, "--track=small", "--gpu=Voodoo 2", "--gpu_gib=6")
    assert table(text)["fits"] == ["no"] * 4 and "does not fit" in text
    assert table(text)["minutes of training, estimate"] == ["-"] * 4
    assert "not yet checked against a GPU" in text


def test_every_choice_is_one_that_a_run_takes_and_trains_on_the_same_tokens():
    cfg = Config.for_track("small")
    for world in (1, 2, 4, 8):
        found = plan.choices(cfg, world)
        assert found[0] == cfg and all(c.recompute for c in found[1:])
        assert {c.slices for c in found} == {8, 16, 32}
        assert {c.train_tokens for c in found} == {cfg.train_tokens}
        needed = [max(plan.needs(c, torch.bfloat16, True, world).values()) for c in found]
        assert needed == sorted(needed, reverse=True)


def test_a_machine_without_a_gpu_and_an_unknown_gpu(capsys):
    text = said(capsys, "--track=shakespeare", "--recipe=miniature")
    assert text.startswith("plan: track shakespeare on CPU") and "393,216 in training" in text
    assert run_program(plan.main, ["--gpu=Voodoo 2"]) == 2
    assert "--gpu: expected a name with one of B200" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, dict(optimizer="adamw"), dict(dtype="bfloat16")], ids=str)
def test_muons_share_is_one_number_in_plan_and_log_of_the_matrices_that_it_moves(tmp_path, capsys, changes):
    run = make_run(tmp_path, **changes)
    cfg = run.cfg
    flops = sum(run.muon.placements[0].loads) if run.muon else 0
    parts = []
    for stage, step in enumerate(cfg.stage_starts):
        tokens = cfg.at("batch_tokens", step)
        part = flops / (flops + tokens * run.model.flops_per_token(stage))
        parts.append(f"{part:.1%} at {tokens:,} tokens (bound {5 * cfg.model_dim / tokens:.1%})")
    said = ", ".join(dict.fromkeys(parts))

    plan.show(cfg, "CPU", 16.0, None)
    assert f"Muon's share of the FLOPs of a step: {said}\n" in capsys.readouterr().out
    assert not run.muon or f"Muon's share of the FLOPs of a step, as planned: {said}" in run.facts()


def test_a_name_is_the_longest_that_is_known():
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert find_gpu("NVIDIA GH200 480GB") is GPUS["GH200"]
    assert find_gpu("nvidia l4") is GPUS["L4"] and find_gpu("NVIDIA L40S") is GPUS["L40S"]
    assert find_gpu("Voodoo 2") is None
