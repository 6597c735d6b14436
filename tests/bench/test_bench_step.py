"""bench.floors counts what the model does, and bench.step puts every operation of a step into the part it
belongs to."""
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from bench import floors, step
from engine import kernels, products
from engine.attention import masked_mask, paired_docs
from engine.kernels import Kernels
from tools.gpus import GPUS
from tools.plan import shapes_of
from tests.helpers.tiny import BARE, SMALL, build, config, context, docs_of, make_run
from train_gpt import Config

torch.set_num_threads(1)  # tiny tensors
CPU, FP32 = torch.device("cpu"), torch.float32
PRODUCTS = "attention", "projections", "MLP", "head and loss", "elementwise"


@pytest.mark.parametrize("window", [1, 4, 20, 500])
def test_visible_keys_are_those_of_the_mask(window):
    lengths = [1, 3, 40, 21, 2]
    docs = docs_of(lengths)
    assert floors.visible(np.array(lengths), window) == masked_mask(docs, window).sum()
    assert floors.visible(2 * np.array(lengths), window) == masked_mask(paired_docs(docs), window).sum()


RECORD_89 = dict(SMALL, mudd=True, backout=False, gate_networks=(0, 3))


@pytest.mark.parametrize("base", [SMALL, BARE, RECORD_89], ids=["all", "bare", "networks"])
@pytest.mark.parametrize("stage", [0, 2])
def test_counted_flops_are_those_of_a_real_forward_and_backward(monkeypatch, base, stage):
    """Attention is written out, so that it computes, and the counter counts, every pair of a query and a
    key."""
    def attend(q, k, v, mask, scale):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.mT) * scale + torch.log(mask.float())
        return torch.bmm(torch.softmax(scores, -1), v).transpose(0, 1)

    cfg, lengths = config(base), [11, 3, 18]
    model, T, tied = build(cfg), sum(lengths), cfg.tied(cfg.stage_starts[stage])
    monkeypatch.setattr(Kernels, "attend", lambda self, *args: attend(*args))
    ctx = context(model, docs_of(lengths), stage, tied)
    tokens = torch.randint(0, 60, (T + 1,), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model.train()(tokens[:-1], tokens[1:], ctx, torch.ones(1)).backward()
    work = floors.count(cfg, FP32, [np.array(lengths)], cfg.stage_starts[stage], device=CPU)
    seen = floors.keys_seen(cfg, [np.array(lengths)], stage)
    full = sum(T * T * (2 if i in cfg.paired_layers else 1) for i in model.attn_layers)
    assert work["attention"].flops == 12 * cfg.model_dim * seen
    hidden = 12 * cfg.model_dim * (full - seen)
    assert counter.get_total_flops() == sum(work[part].flops for part in PRODUCTS) + hidden


@pytest.mark.parametrize("track", ["small", "shakespeare"])
def test_with_endless_documents_the_model_says_the_same(track):
    """Only at the start of a document queries see fewer keys than a window has."""
    cfg, T = Config.for_track(track), 10**7
    for stage, first in enumerate(cfg.stage_starts):
        work = floors.count(cfg, torch.bfloat16, [np.array([T])], first, fp8=track == "small")
        total = sum(work[part].flops + work[part].fp8 for part in PRODUCTS[:-1])
        assert total / T == pytest.approx(shapes_of(cfg).flops_per_token(stage), rel=1e-4)
        assert 0 < work["elementwise"].flops < 0.01 * total  # gates
        assert bool(work["head and loss"].fp8) == (track == "small")


def test_ranks_share_the_work_and_pay_for_their_talk():
    cfg = Config.for_track("small")
    docs = floors.packed(floors.document_lengths(np.random.default_rng(0), 5000), 2048, 49152, 8)
    assert [d.sum() for d in docs] == [49152] * 8
    one = floors.count(cfg, torch.bfloat16, docs, 900)
    eight = [floors.count(cfg, torch.bfloat16, [d], 900, world=8) for d in docs]
    for part in ("attention", "MLP"):
        assert sum(w[part].flops for w in eight) == pytest.approx(one[part].flops)
    assert one["communication"].link == 0 < eight[0]["communication"].link
    assert one["Muon"].flops / 8 <= eight[0]["Muon"].flops < 1.1 * one["Muon"].flops / 8
    assert eight[0]["Adam"].bytes == pytest.approx(one["Adam"].bytes / 8, rel=0.01)
    h100 = GPUS["H100"]
    assert floors.Work(flops=989.4e9).floor_ms(h100) == pytest.approx(1)
    assert floors.Work(fp8=1978.9e9).floor_ms(h100) == pytest.approx(1)
    assert floors.Work(flops=1e9, bytes=3.35e9).floor_ms(h100) == pytest.approx(1)


def test_packing_is_the_loaders(tmp_path):
    run = make_run(tmp_path)
    lengths = run.loader.open(0)[2]
    cfg, T = run.cfg, run.cfg.batch_tokens[0] // run.cfg.slices
    batches = run.loader.next()
    expected = [np.diff(b.docs.starts[b.docs.starts < T].numpy(), append=T) for b in batches]
    found = floors.packed(lengths, cfg.max_doc_len[0], T + 1, cfg.slices)
    for mine, theirs in zip(found, expected, strict=True):  # the token after the last is a target only
        mine[-1] -= 1
        assert mine[mine > 0].tolist() == theirs.tolist()


@pytest.mark.parametrize("onednn", [False, True])
def test_every_product_of_a_step_belongs_to_its_part(tmp_path, monkeypatch, onednn):
    """Three for each matrix and sequence, in the backward pass too: two gradients."""
    if onednn and products.ONEDNN is None:
        pytest.skip("needs AVX-512")
    monkeypatch.setattr(kernels, "choose_onednn", lambda *a: (onednn, "as the test says"))
    run, product = make_run(tmp_path), "mkldnn::_linear_pointwise" if onednn else "aten::mm"
    run.warm_up()
    with step.ranges(run, eager=True), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as p:
        run.train_step()
    found = {}
    for event, part in step.owners(p.events()):
        if event.name in (product, "aten::embedding", "aten::embedding_dense_backward") and part:
            found.setdefault((event.name, part), []).append(event)
    count = {key: len(events) for key, events in found.items()}
    A, L, slices = len(run.model.attn_layers), run.cfg.num_layers, run.cfg.slices
    assert count[product, "projections"] == 3 * 3 * A * slices
    assert count[product, "MLP"] == 3 * 2 * L * slices
    assert count[product, "head and loss"] == 3 * slices
    assert count["aten::embedding", "tables"] == 4 * slices  # tokens, values, bigrams, signs
    assert count["aten::embedding_dense_backward", "tables"] == 3 * slices
    assert {part for name, part in count if name != product} == {"tables"}


def test_parts_add_up_to_the_step(tmp_path):
    run = make_run(tmp_path)
    run.warm_up()
    ms = step.profile(run, 0, eager=True)
    assert {*PRODUCTS, "tables", "Muon", "Adam", "masks"} <= set(ms)
    wall = ms.pop(step.WALL)
    assert sum(ms.values()) == pytest.approx(wall, rel=0.2)  # the clock starts a little earlier


def event(id, name, start, end, parent=None, seq=-1, scope=0, kernels=()):
    return SimpleNamespace(
        id=id, name=name, time_range=SimpleNamespace(start=start, end=end), cpu_parent=parent,
        sequence_nr=seq, scope=scope, kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels])


def test_kernels_go_to_the_part_that_launched_them_or_by_their_names():
    step_ = event(0, "part: other", 0, 100, kernels=[("part: other", 90)])
    model = event(1, "part: elementwise", 1, 50, step_)
    attend = event(2, "part: attention", 2, 10, model)
    forward = event(3, "aten::mm", 3, 4, attend, seq=7, kernels=[("nvjet_hss", 5)])
    backward = event(4, "autograd::engine::evaluate_function: MmBackward0", 60, 70, None, seq=7, scope=1)
    inner = event(5, "aten::mm", 61, 62, backward, kernels=[("sm90_gemm", 6)])
    fused = [("triton_red", 1), ("flash_fwd", 2), ("nvjet", 3)]
    graph = event(6, "CompiledFunction", 20, 30, model, seq=8, kernels=fused)
    node = "autograd::engine::evaluate_function: "
    compiled = event(7, node + "CompiledFunctionBackward", 80, 90, None, seq=8, scope=1,
                     kernels=[("triton_poi", 1), ("ncclDevKernel", 4)])
    grads = event(8, node + "torch::autograd::AccumulateGrad", 91, 92, kernels=[("add", 8)])
    events = [step_, model, attend, forward, backward, inner, graph, compiled, grads]
    assert step.attribute(events, cuda=True, eager=False) == {
        "attention": 13, step.PRODUCTS: 3, "elementwise": 2, "communication": 4, "gradient sums": 8}
    assert step.busy_us([(5, 6), (1, 3), (2, 4)]) == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_report_prints_floor_beside_measurement_and_muons_share(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(step, "STEPS", 2)
    run = make_run(tmp_path, BARE, slices=1)
    run.warm_up()
    # Two profiles; there is no compiler behind it.
    run.kernels = dataclasses.replace(run.kernels, compiled=compiled)
    run.warm_up = lambda: None
    monkeypatch.setattr(step, "Run", lambda cfg, rt: run)
    result = json.loads(json.dumps(step.measure(run.cfg, run.rt, "tiny")))
    assert len(result["rows"]) == 4 and result["peak"]["tflops"] > 0
    for row in result["rows"]:
        parts = {p["part"]: p for p in row["parts"]}
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["parts"][-1]["part"] == step.WALL
        summed = sum(p["floor_ms"] or 0 for name, p in parts.items() if not name.startswith("all"))
        assert parts[step.WALL]["floor_ms"] == pytest.approx(summed)
        assert parts["MLP"]["eager"] > 0
        assert ("compiled" in parts["MLP"]) == compiled == (step.PRODUCTS in parts)
    text = step.report(result)
    lines = text.splitlines()
    assert sum(line.startswith("| 2 | MLP |") for line in lines) == 1
    assert ("| compiled, ms |" in text) == compiled
    assert {line.count("|") for line in lines if line.startswith("| 2 | ")} == {8, 8 + 2 * compiled}
    said = re.search(r"Muon's share of the FLOPs of a step: (.*); of its time, by stage: (.*)\.", text)
    planned, measured = said.groups()
    assert " at 64 tokens " in planned and len(measured.split(", ")) == 4
    assert all(0 < float(share.rstrip("%")) < 100 for share in measured.split(", "))


def test_without_shards_a_run_reads_synthetic_ones(tmp_path, monkeypatch):
    cfg = config(train_files="none/train_*.bin", val_files="none/val_*.bin", max_epochs=1000)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "empty"))
    assert step.ensure_shards(cfg, tmp_path, 20_000) == "synthetic documents"
    assert len(step.Loader(cfg, 0, 1, False).next()) == cfg.slices
    assert step.ensure_shards(cfg, tmp_path, 20_000) == "the track's shards"


def test_floors_of_a_named_gpu_are_printed_by_part_and_stage(capsys):
    assert floors.main(["--gpu=4090", "--ranks=2", "--fp8=off"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| MLP |")).split("|")
    assert "2 x 4090, head in bf16" in out and len(row) == 7
    gflop, mb, ms = (float(x.replace(",", "")) for x in row[2].split(", "))  # 6 FLOPs per weight and token
    assert gflop == pytest.approx(6 * 51.9e6 * 65_536 / 1e9, rel=1e-3)
    assert ms == pytest.approx(gflop / 165.2, rel=1e-3)
