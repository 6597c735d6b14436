"""plan.py counts on the meta device: its bytes must be those of real tensors, of a real run's state and of a real backward."""
import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import muon
from tools import plan
from data.errors import UsageError
from engine.log import ROOT
from tests.helpers.tiny import BARE, SMALL, build, config, context, docs_of, make_run
from train_gpt import EMA_EVERY, Config, Run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny tensors
LARGE = {**BARE, **dict(  # wide enough for tables in parts; three MLPs
    num_layers=3, long_layers=(1,), mlp_ratio=3, model_dim=128, head_dim=64, vocab_size=500, bos_id=60, bigram_rows=1000)}


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def real_parts(run: Run) -> dict[str, int]:
    """Bytes of what lies in the memory of a run after a step."""
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    gradients = nbytes(p.grad for p in run.model.parameters())
    run.update(run.cfg.adam_every - 1)
    run.step = run.cfg.train_steps - EMA_EVERY
    run.average_weights()
    muon = [x for bucket in run.muon.buckets for r in bucket.runs[bucket.rank] for x in r.state.values()] if run.muon else []
    return {"weights": nbytes(run.model.parameters()), "gradients": gradients,
            "Adam: moments, low halves": nbytes(x for state in run.adam.state.values() for x in state.values()
                                                if isinstance(x, torch.Tensor)),
            **({"average of the weights": nbytes(run.ema.values())} if run.ema else {}),
            "Muon: momentum, low halves": nbytes(muon), "signs of the bigrams": nbytes(run.model.buffers())}


@pytest.mark.parametrize("changes", [{}, dict(dtype="bfloat16", ema_frac=0.5), dict(optimizer="adamw"),
                                     dict(normuon_beta2=0.0), BARE], ids=["all", "bfloat16", "adamw", "no normuon", "bare"])
def test_what_stays_in_memory_is_what_a_run_has(tmp_path, changes):
    run = make_run(tmp_path, **{**SMALL, **changes})
    found = plan.static_bytes(run.cfg, run.dtype, 1, CPU)
    assert found.pop("gathers and reductions") == 0 and found == real_parts(run)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_are_those_of_the_fullest_rank(monkeypatch, world):
    """Each rank's real optimizers, laid out one after the other without talking to each other."""
    monkeypatch.setattr(muon, "expect_agreement", lambda *a: None)
    cfg, shares = config(LARGE), []
    for rank in range(world):
        monkeypatch.setattr(muon, "world_and_rank", lambda group: (world, rank))
        run = SimpleNamespace(cfg=cfg, rt=SimpleNamespace(rank=rank, world=world), compiled=False, dtype=torch.float32,
                              symmetric=muon.symmetric_product, model=build(cfg))
        Run.make_optimizers(run)
        shares.append((nbytes(x for state in run.adam.state.values() for x in state.values() if isinstance(x, torch.Tensor)),
                       nbytes(x for bucket in run.muon.buckets for r in bucket.runs[rank] for x in bucket.state(r).values())))
    monkeypatch.undo()
    found, alone = (plan.static_bytes(cfg, torch.float32, n, CPU) for n in (world, 1))
    adam, momentum = (found[key] for key in ("Adam: moments, low halves", "Muon: momentum, low halves"))
    assert [adam, momentum] == [max(share) for share in zip(*shares)]
    assert adam < 1.2 / world * alone["Adam: moments, low halves"] and found["gathers and reductions"] > 0
    assert (len({mine for _, mine in shares}) == 1) == (world == 2)  # four ranks cannot share six MLPs evenly


def saved_for_backward(cfg: Config, T: int, compiled: bool) -> int:
    """Bytes that a real forward pass on the CPU keeps, in tensors of their own; not weights, not masks."""
    model = build(cfg, perturb=False, backend="blocked").train()
    ctx = context(model, docs_of([T // 4] * 4), stage=2, weights=(1.0,), backend="blocked")
    masks = [m for row in ctx.masks for m in row if m is not None]
    ignored = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *masks]}
    found = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in ignored:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage(), x.untyped_storage().nbytes()
        return x

    forward = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
    ids = torch.randint(0, cfg.bos_id, (T,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward(ids, ids.roll(-1), ctx)
    return sum(size for _, size in found.values())


WIDE = dict(model_dim=96, head_dim=16, vocab_size=300)
DEEP = dict(num_layers=14, mlp_ratio=4, model_dim=64, head_dim=32)
SHAPES = {"small": (SMALL, 256), "longer": (SMALL, 768), "wide": ({**SMALL, **WIDE}, 256), "deep": ({**SMALL, **DEEP}, 384),
          "bare": (BARE, 256)}


def planned(base: dict, T: int, compiled: bool) -> tuple[int, int]:
    cfg = config({**base, "batch_tokens": (64, 96, 2 * T)})
    return plan.step_bytes(cfg, torch.float32, compiled)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_kept_for_backward_is_within_a_tenth_of_what_a_real_pass_keeps(name):
    base, T = SHAPES[name]
    assert planned(base, T, False)[0] == pytest.approx(saved_for_backward(config(base), T, False), rel=0.1)


def test_the_same_holds_for_the_graph_of_the_compiler():
    base = {**BARE, "num_layers": 2, "long_layers": (1,), "xsa_layers": (0,), "value_embed_layers": (1,)}
    kept = planned(base, 512, True)[0]
    assert kept == pytest.approx(saved_for_backward(config(base), 512, True), rel=0.1)
    assert kept < planned(base, 512, False)[0]


def test_peak_follows_what_lives():
    outside = torch.empty(1000, device="meta")
    with plan.Peak() as memory:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100)[2:]  # no bytes of its own
        c = a + 1
        assert memory.live == 8000
        del a, c
        assert memory.live == 4000  # b holds it
        b.add_(1)
        del b
        outside.view(2, 500).mul_(2)
    assert (memory.live, memory.peak) == (0, 8000)


def test_the_worst_moment_of_an_eager_step_and_of_a_validation_are_those_of_real_tensors():
    """Peak counts the same operations on real tensors."""
    T, cfg = 128, config({**SMALL, **WIDE, "batch_tokens": (64, 96, 256)})
    model = build(cfg, perturb=False, backend="blocked").train()
    ids = torch.randint(0, cfg.bos_id, (T,))
    with plan.Peak() as memory:
        model(ids, ids, context(model, docs_of([T // 4] * 4), stage=2, backend="blocked")).backward()
    assert sum(planned({**SMALL, **WIDE}, T, False)) == pytest.approx(memory.peak, rel=0.1)
    with torch.no_grad(), plan.Peak() as memory:
        model.eval()(ids, ids, context(model, docs_of([T // 4] * 4), stage=3, final=True, backend="blocked"))
    assert plan.validation_bytes(cfg, plan.build(cfg, torch.float32).model, T) == pytest.approx(memory.peak, rel=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# What fits, and what is said


@functools.cache
def table(*argv: str) -> tuple[dict[str, list[str]], str]:
    """Rows of the printed table by name, and all that was printed, with a step that needs 30 GiB for the track's slices,
    or a quarter of that when it recomputes."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(plan, "step_bytes", lambda cfg, *a: tuple((5 if cfg.recompute else 20) * 8 / cfg.slices * x * plan.GIB for x in (1, 0.5)))
        gpu = dict(arg.split("=") for arg in argv)
        plan.show(Config.for_track("small"), gpu.get("gpu"), float(gpu["gib"]) if "gib" in gpu else None)
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.getvalue().splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 5}, out.getvalue()


def test_a_large_gpu_trains_as_the_track_does_and_a_small_one_recomputes_before_it_takes_shorter_slices():
    large, small, smaller = (table(*gpu)[0] for gpu in (["gpu=NVIDIA H100 80GB HBM3"], ["gpu=RTX 4090"], ["gib=18"]))
    assert all(rows["fits"] == ["yes"] * 4 for rows in (large, small, smaller))
    assert (large["--recompute"], large["--slices"]) == (["off"] * 4, ["8"] * 4)
    assert (small["--recompute"], small["--slices"]) == (["on"] * 4, ["8"] * 4)
    assert int(smaller["--slices"][0]) in (16, 32) and "not the same run" in table("gib=18")[1]
    assert "the same training" in table("gpu=RTX 4090")[1] and "not the same run" not in table("gpu=RTX 4090")[1]
    for rows in (large, small, smaller):
        assert [int(n) * w for n, w in zip(rows["slices of a rank, in turn"], (1, 2, 4, 8))] == list(map(int, rows["--slices"]))
        for i in range(4):
            assert float(rows["needed: training"][i]) + float(rows["allowance"][i]) <= float(rows["memory"][i])
            assert int(rows["tokens of the longest slice"][i]) * int(rows["--slices"][i]) == 393_216
    minutes = [float(n) for n in large["minutes of training, estimate"]]
    assert minutes[0] == pytest.approx(8 * minutes[3], abs=0.5)


def test_a_gpu_that_is_too_small_is_told_so():
    rows, text = table("gib=8")
    assert rows["fits"] == ["no"] * 4 and "does not fit" in text and rows["minutes of training, estimate"] == ["-"] * 4
    assert "not yet checked against a GPU" in text


def test_every_setting_of_a_plan_is_one_that_a_run_takes():
    cfg = Config.for_track("small")
    for world in (1, 2, 4, 8):
        steps, lengths = plan.choices(cfg, world)
        assert steps == [(False, 8), (True, 8), (True, 16), (True, 32)] and lengths[0] == cfg.val_slice
        for recompute, n in steps:
            assert Config.for_track("small", recompute=recompute, slices=n).train_tokens == cfg.train_tokens
        for n in lengths:
            Config.for_track("small", val_slice=n)


@pytest.mark.parametrize("name, memory", [("NVIDIA H100 80GB HBM3", 79.1), ("NVIDIA GH200 480GB", 94.5), ("NVIDIA L40S", 44.4),
                                          ("nvidia l4", 22.0), ("NVIDIA A100-SXM4-80GB", 79.1), ("NVIDIA A10", 22.0)])
def test_a_name_is_the_longest_that_is_known(name, memory):
    assert plan.find_gpu(name, None)[1] == memory
    assert plan.find_gpu(name, 12.0)[1] == 12.0


def test_an_unknown_gpu_needs_its_memory():
    with pytest.raises(UsageError, match="--gpu: expected a name with one of .* found 'Voodoo 2'; add --gpu_gib"):
        plan.find_gpu("Voodoo 2", None)
    assert plan.find_gpu("Voodoo 2", 3.0) == ("Voodoo 2", 3.0, None)


def test_help_lists_it_and_the_command_prints_a_plan():
    out = subprocess.run([sys.executable, "train_gpt.py", "--track=shakespeare", "--plan"], cwd=ROOT, text=True, timeout=60,
                         capture_output=True)
    assert out.returncode == 0 and out.stdout.startswith("plan: track shakespeare on CPU") and "901,120 in training" in out.stdout
