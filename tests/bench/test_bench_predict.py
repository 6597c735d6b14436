"""The page of the prediction is what the code computes, and the formula is the one it prints."""
import re
from pathlib import Path

import pytest

from bench import predict
from train_gpt import Config

PAGE = Path(predict.__file__).parent / "PREDICTION.md"


def test_page_and_code_agree():
    """After a change of schedule, model or inputs: python -m bench.predict --page bench/PREDICTION.md."""
    assert PAGE.read_text(encoding="utf-8") == predict.page()


def test_prediction_is_the_formula_of_its_inputs():
    text, c = " ".join(PAGE.read_text(encoding="utf-8").split()), predict.count()
    by_hand = sum((end - first) * tokens * mflop * 1e6 for first, end, tokens, mflop in c["stages"])
    assert c["work"] == pytest.approx(by_hand)
    tokens = sum((end - first) * n for first, end, n, _ in c["stages"])
    assert tokens == Config.for_track("small").train_tokens
    central = c["work"] / (8 * 989.4e12 * 0.44 / 1.075 * 0.946)
    assert f"**Predicted: {central:.0f} s" in text and "not a measurement" in text
    fast, slow = map(float, re.search(r"at their best (\d+) s, at their worst\s+(\d+) s", text).groups())
    low, high = map(float, re.search(r"between (\d+) and (\d+) s", text).groups())
    assert fast < low < central < high < slow


def test_the_recipes_stand_beside_the_public_times():
    """Both predictions by hand, from the FLOPs of their stages."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d-]+) \| [^|]+ \| ([\d.-]+) \| ([\d-]+) \| ([\d.]+) \|$",
                      PAGE.read_text(encoding="utf-8"), re.M)
    expected = (("base", 1480, "84.4"), ("record89", 1285, "73.8"))
    assert len(rows) == 3 and rows[2][3:] == ("-", "39.9")
    for (name, steps, flops, predicted, public), (recipe, count, time) in zip(rows, expected):
        c = predict.count(recipe)
        work = sum((end - first) * tokens * mflop * 1e6 for first, end, tokens, mflop in c["stages"])
        assert int(steps) == c["steps"] == count and public == time
        assert float(flops) == pytest.approx(work / 1e17, abs=0.006)
        assert float(predicted) == pytest.approx(work / (8 * 989.4e12 * 0.44 / 1.075 * 0.946), abs=0.6)


def test_inputs_say_where_they_come_from_and_which_way_is_faster():
    for x in predict.INPUTS:
        assert x.source and x.kind.split(",")[0] in ("measured", "public", "assumed")
        at = {
            key: predict.seconds(1e17, *(getattr(y, key) if y is x else y.central for y in predict.INPUTS))
            for key in ("fast", "central", "slow")
        }
        assert at["fast"] <= at["central"] <= at["slow"] and at["fast"] < at["slow"]


def test_public_record_of_as_many_steps_lies_in_the_range():
    low, _, high = predict.spread(predict.count()["work"])
    assert low < predict.RECORD < high
