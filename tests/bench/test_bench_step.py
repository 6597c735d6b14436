"""bench.step puts every operation of a step into the part it belongs to, beside what bench.cross found."""
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from bench import step
from data.loader import Loader
from engine import kernels, products
from tests.helpers.tiny import BARE, config, make_run
from tools.gpus import GPUS
from train_gpt import Config

torch.set_num_threads(1)  # tiny tensors
PRODUCTS = "attention", "projections", "MLP", "head and loss", "elementwise"


@pytest.mark.parametrize("onednn", [False, True])
def test_every_product_of_a_step_belongs_to_its_part(tmp_path, monkeypatch, onednn):
    """Three for each matrix and sequence, in the backward pass too: two gradients."""
    if onednn and products.ONEDNN is None:
        pytest.skip("needs AVX-512")
    monkeypatch.setattr(kernels, "choose_onednn", lambda *a: (onednn, "as the test says"))
    run, product = make_run(tmp_path), "mkldnn::_linear_pointwise" if onednn else "aten::mm"
    run.warm_up()
    with step.ranges(run), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as p:
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
    ms = step.profile(run, 0)
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
    muon = event(9, "part: Muon", 93, 96, kernels=[("gemm", 7), ("ncclDevKernel", 2)])
    events = [step_, model, attend, forward, backward, inner, graph, compiled, grads, muon]
    assert step.attribute(events, cuda=True, compiled=True) == {
        "attention": 13, step.PRODUCTS: 3, "elementwise": 2, "communication": 6, "gradient sums": 8,
        "Muon": 7}
    assert step.busy_us([(5, 6), (1, 3), (2, 4)]) == 4


def test_the_page_shows_parts_and_muons_share(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "STEPS", 2)
    run = make_run(tmp_path, BARE, slices=1, stages=1, mtp_weights=(1.0,))
    monkeypatch.setattr(step, "Run", lambda cfg, rt: run)
    result = json.loads(json.dumps(step.measure(run.cfg, run.rt, "tiny")))
    assert len(result["rows"]) == 2  # a stage and the extension
    for row in result["rows"]:
        parts = {p["part"]: p for p in row["parts"]}
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["parts"][-1]["part"] == step.WALL
        assert 0 < parts["MLP"]["ms"] < parts[step.WALL]["ms"]
    text = step.page(result)
    lines = text.splitlines()
    assert sum(line.startswith("| 1 | MLP |") for line in lines) == 1
    assert {line.count("|") for line in lines if line.startswith("| 1 | ")} == {7, 9}
    said = re.search(r"Muon's share of the FLOPs of a step: (.*); of its time, by stage: (.*)\.", text)
    planned, measured = said.groups()
    assert " at 64 tokens " in planned and len(measured.split(", ")) == 2
    assert all(0 < float(share.rstrip("%")) < 100 for share in measured.split(", "))


def test_without_shards_a_run_reads_synthetic_ones(tmp_path, monkeypatch):
    cfg = config(train_files="none/train_*.bin", val_files="none/val_*.bin", max_epochs=1000)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "empty"))
    assert step.ensure_shards(cfg, tmp_path, 20_000) == "synthetic documents"
    assert len(Loader(cfg, 0, 1, False).next()) == cfg.slices
    assert step.ensure_shards(cfg, tmp_path, 20_000) == "the track's shards"


def test_costs_by_part_are_those_of_the_traced_run_with_the_same_settings():
    """There are none where a setting of the model or the number of ranks differs."""
    cfg = Config.for_track("small")
    chosen = SimpleNamespace(compiled=True, fp8_head=True)
    h100 = GPUS["H100"]
    stages = step.expected(cfg, chosen, 1, h100)
    assert len(stages) == 4
    for parts in stages:
        whole = sum(row["ms"] for part, row in parts.items() if not part.startswith("all"))
        assert parts[step.WALL]["ms"] == pytest.approx(whole)
        assert {"MLP", "attention", "Muon", "Adam"} < set(parts) <= {*step.PARTS, step.PRODUCTS, step.WALL}
    slower = step.expected(cfg, chosen, 1, GPUS["L4"])[2]
    assert slower["MLP"]["floor_ms"] > 5 * stages[2]["MLP"]["floor_ms"]
    for other in (dict(cfg=dataclasses.replace(cfg, mlp_ratio=3)), dict(world=3), dict(gpu=None)):
        args = dict(cfg=cfg, kernels=chosen, world=1, gpu=h100) | other
        assert step.expected(**args) == [{}] * 4
