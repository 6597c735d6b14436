"""Pages are what the code makes of the committed figures of bench.cross, and the cost of a kernel is that of
its formula."""
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import predict
from bench.cross.costs import ACHIEVED, SHEET, Launch, Rates, by_part, milliseconds, step_ms
from bench.cross.launches import alike, as_listed, together
from bench.cross.figures import launches, page
from bench.cross.short import SHORT
from bench.cross.trace import sent_bytes
from tools.gpus import GPUS
from tools.plan import shapes_of
from tools.traced import FOLDER, traced_runs

PREDICTION = Path(predict.__file__).parent / "PREDICTION.md"
H100 = GPUS["H100"]


def test_the_prediction_is_made_of_the_figures():
    """After a change of the figures: python -m bench.predict --page bench/PREDICTION.md."""
    assert PREDICTION.read_text(encoding="utf-8") == predict.page()


@pytest.mark.parametrize("name", traced_runs())
def test_a_page_says_its_figures_and_these_are_of_the_settings_of_today(name):
    """After a change of model or schedule: python -m bench.cross --parts costs --out=PATH, with the flags
    that the file names."""
    cfg, run = traced_runs()[name]
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == page(run)
    today = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(cfg).items()}
    assert {key for key in today | run["config"] if today.get(key) != run["config"].get(key)} <= {
        *SHORT, "train_steps", "val_tokens"}
    assert len(run["launches"]) == len(cfg.stage_starts)


@pytest.mark.parametrize("name", traced_runs())
def test_the_products_that_were_found_are_those_of_the_model(name):
    """6 FLOPs for a weight and token; the rest of the products, gates for instance, is small. A layer that is
    computed again takes 8, but for its MLP's outputs, which no gradient needs."""
    cfg, run = traced_runs()[name]
    model = shapes_of(cfg)
    head = cfg.padded_vocab * cfg.model_dim
    weights = model.matmul_params() - head
    for stage, rows in enumerate(launches(run)):
        parts = by_part(rows, GPUS[run["gpu"]])
        tokens = cfg.by_stage("batch_tokens", stage) / run["ranks"]
        assert parts["head and loss"]["gflop"] == pytest.approx(6e-9 * tokens * head, rel=0.02)
        found = parts["MLP"]["gflop"] + parts["projections"]["gflop"]
        again = 2 * (weights - model.mlp_out.numel()) if cfg.recompute else 0
        assert found == pytest.approx(1e-9 * tokens * (6 * weights + again), rel=0.03)


def test_the_time_of_a_kernel_by_hand():
    rates = Rates(memory=0.5, bf16=0.5, fp8=0.25, attention=0.1, link=0.5, gap_us=3.0)
    moving = Launch("MLP", "GPT", "mm", 2, 3.35e9, 1e9, "bf16")
    assert milliseconds(moving, H100, rates) == pytest.approx(2 * (2.0 + 0.003))
    assert milliseconds(moving, H100, SHEET) == pytest.approx(2.0)
    for kind, ms in (("bf16", 2.0), ("fp8", 2.0 * 2 * 989.4 / 1978.9), ("attention", 10.0)):
        computing = Launch("MLP", "GPT", "mm", 1, 1e3, 989.4e9, kind)
        assert milliseconds(computing, H100, rates) == pytest.approx(ms + 0.003)
    between = Launch("communication", "-", "between ranks", 1, 450e6, 0, "link")
    assert milliseconds(between, H100, rates) == pytest.approx(2.0)


def test_the_prediction_is_the_sum_over_steps_and_kernels():
    recipe = predict.Recipe("base")
    total = 0.0
    starts = recipe.cfg.stage_starts
    for first, end, found in zip(starts, (*starts[1:], recipe.cfg.train_steps), recipe.launches):
        total += (end - first) * sum(milliseconds(launch, H100, ACHIEVED) for launch in found) / 1000
    assert predict.predicted(recipe) == pytest.approx(1.08 * total)
    text = " ".join(PREDICTION.read_text(encoding="utf-8").split())
    assert f"**Predicted: {1.08 * total:.0f} s" in text and "not a measurement" in text
    floor = float(re.search(r"cannot be under (\d+) s", text)[1])
    assert floor == round(recipe.seconds(SHEET)) < total


def test_ten_kernels_gain_no_more_than_the_run_has():
    recipe = predict.Recipe("base")
    seconds = [gain for _, gain in recipe.gains()]
    assert len(seconds) == 10 and seconds == sorted(seconds, reverse=True)
    assert 0.3 * recipe.seconds(ACHIEVED) < sum(seconds) < recipe.seconds(ACHIEVED)


def test_kernels_listed_together_take_as_long_as_one_by_one():
    one_by_one = [
        Launch("MLP", "GPT", "mm", 2, 1e6, 1e12, "bf16"),
        Launch("MLP", "GPT", "mm", 1, 1e9, 1e9, "bf16"),  # of another size: bounded by another rate
        Launch("elementwise", "GPT", "add", 1, 2e9, 0, "bf16"),
        Launch("elementwise", "GPT", "add", 3, 1e9, 0, "bf16"),
        Launch("elementwise", "GPT", "mul", 4, 1e3, 0, "bf16"),
        Launch("elementwise", "GPT", "exp", 1, 3e3, 0, "bf16"),
    ]
    listed = together(map(as_listed, together(one_by_one, alike)), alike)
    assert [launch.operations for launch in listed] == ["mm", "mm", "add", "others"]
    for rates in (SHEET, ACHIEVED):
        assert step_ms(listed, H100, rates) == pytest.approx(step_ms(one_by_one, H100, rates))


def test_bytes_that_a_rank_of_a_ring_sends():
    whole, mine = torch.empty(8, 10), torch.empty(10)
    for name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
        assert sent_bytes(name, [whole, mine], 8) == 7 * mine.nbytes
    assert sent_bytes("c10d::allreduce_", [whole], 8) == 2 * 7 * mine.nbytes
