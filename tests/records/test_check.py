"""Every rule of check: a clean set passes, and each way to doctor a log breaks the rules named here
and no other."""
import json
import re

import pytest
from tests.helpers.claims import RUNS, TOTAL, log, public, replaced, runs, slow, write
from tests.helpers.synthetic import LINE
from tests.records.conftest import plan_text

from records import logs, rules
from records.tracks import TRACKS


def last(text: str, pattern: str, new: str) -> str:
    """The last place of a pattern changed."""
    at = [*re.finditer(pattern, text, re.M)][-1]
    return text[:at.start()] + re.sub(pattern, new, at[0], flags=re.M) + text[at.end():]


def first_log(change):
    return lambda texts: [change(texts[0]), *texts[1:]]


def swap_times(texts):
    """The final validation gets the time of another run, average included."""
    pattern = rf"(step:{TOTAL}/{TOTAL} val_loss:\S+) (train_time:.*)"
    (a,), (b,) = ([match[2] for match in re.finditer(pattern, text)] for text in texts[:2])
    return [replaced(texts[0], pattern, rf"\1 {b}"), replaced(texts[1], pattern, rf"\1 {a}"), *texts[2:]]


def copy_with(change):
    """The last log becomes a changed copy of the first."""
    return lambda texts: [*texts[:-1], change(texts[0])]


def optimizer(line):
    """All runs embed another muon.py."""
    return lambda texts: [replaced(text, "^# the optimizer", line) for text in texts]


def other_seed(text):
    return replaced(text, r'("seed": |^seed: )\d+', r"\g<1>77")


def resumed(text):
    return replaced(text, "^attention:", "resumed: from a.pt; such a run is no record\nattention:")


UNFINISHED = {"final-validation", "loss-rule", "faster-than-baseline"}
DOCTORED = {
    "nothing": (lambda texts: texts, set()),
    "a time typed in": (first_log(lambda t: last(t, r"train_time:\d+ms", "train_time:1600ms")),
                        {"intact-logs"}),
    "an average typed in": (first_log(lambda t: last(t, r"step_avg:\S+", "step_avg:75.00ms")),
                            {"intact-logs"}),
    "times of two runs swapped": (swap_times, {"intact-logs"}),
    "final validation removed": (first_log(lambda t: last(t, r"^step:\d+/\d+ val_loss.*\n", "")), UNFINISHED),
    "a validation in the middle removed": (
        first_log(lambda t: replaced(t, r"^step:10/\d+ val_loss.*\n", "")), {"intact-logs"}),
    "the first validation removed": (
        first_log(lambda t: replaced(t, r"^step:0/\d+ val_loss.*\n", "")), {"intact-logs"}),
    "stopped early": (first_log(lambda t: replaced(t, r"^step:(16|17|18|19|20)/.*\n", "")), UNFINISHED),
    "cut inside a line": (first_log(lambda t: t[:-70]), {"intact-logs", *UNFINISHED}),
    "nan": (first_log(lambda t: last(t, r"val_loss:\S+", "val_loss:nan")),
            {"intact-logs", "loss-rule"}),
    "a seed copied": (lambda texts: [*texts[:-1], log(1, final=1.581, pace=101.0)], {"distinct-seeds"}),
    "a file copied": (copy_with(lambda t: t), {"distinct-curves", "distinct-seeds"}),
    "a file copied with another seed": (copy_with(other_seed), {"distinct-curves"}),
    "a copy with another seed and final loss": (
        copy_with(lambda t: last(other_seed(t), r"val_loss:\S+", "val_loss:1.5001")), {"distinct-curves"}),
    "a copy with other losses": (copy_with(lambda t: replaced(other_seed(t), r"val_loss:(\d)\.\d\d(\d\d)",
                                                              r"val_loss:\1.59\2")),
                                 {"distinct-curves"}),
    "losses of another run": (lambda texts: [*texts[:-1], other_seed(log(1, pace=101.0))],
                              {"distinct-curves"}),
    "most losses of another run": (
        lambda texts: [*texts[:-1], last(other_seed(log(1, pace=101.0)), r"val_loss:\S+", "val_loss:1.58")],
        {"distinct-curves"}),
    "seeds not logged": (first_log(lambda t: replaced(t, r'("seed": \d+, |^seed: \d+\n)', "")),
                         {"distinct-seeds"}),
    "a foreign source": (first_log(lambda t: replaced(t, "^# the optimizer", "# another optimizer")),
                         {"same-source"}),
    "no source": (first_log(lambda t: t[t.index(LINE):]), {"same-source"}),
    "another setting": (first_log(lambda t: replaced(t, '"stages": 3', '"stages": 4')), {"same-settings"}),
    "another track": (lambda texts: [replaced(t, '"track": "shakespeare"', '"track": "small"')
                                     for t in texts], {"right-track"}),
    "another GPU": (first_log(lambda t: replaced(t, r"^(Model name: +)Model T", r"\1Model S")),
                    {"same-hardware"}),
    "another torch": (first_log(lambda t: replaced(t, r"PyTorch 2\.13\.0", "PyTorch 2.12.0")),
                      {"same-torch"}),
    "another Triton": (first_log(lambda t: replaced(t, "^(Running PyTorch.*)$",
                                                    r"\1\nRunning Triton version 3.4.0")), {"same-torch"}),
    "another world size": (first_log(lambda t: replaced(t, "world_size 2", "world_size 1")),
                           {"same-hardware"}),
    "other training data": (first_log(lambda t: replaced(t, r"fingerprint 0+", "fingerprint 11111111")),
                            {"same-data"}),
    "other validation data": (first_log(lambda t: replaced(t, r"sha256 \w+", f"sha256 {'1' * 64}")),
                              {"validation-data"}),
    "all judged on the training data": (
        lambda texts: [replaced(t, r"sha256 \w+", f"sha256 {'1' * 64}") for t in texts], {"validation-data"}),
    "validation data not stated": (first_log(lambda t: replaced(t, r"^validation data.*\n", "")),
                                   {"validation-data"}),
    "fewer validation tokens": (first_log(lambda t: replaced(t, '"val_tokens": 262144',
                                                             '"val_tokens": 131072')),
                                {"validation-data", "same-settings"}),
    "resumed": (first_log(resumed), {"not-resumed"}),
    "a banned flag": (optimizer("torch._inductor.config.epilogue_fusion = True"), {"compile-flags"}),
    "a banned mode": (optimizer('f = torch.compile(f, mode="max-autotune")'), {"compile-flags"}),
    "a flag in a comment": (optimizer('"""max_autotune"""\nx = 1  # max_autotune'), set()),
    "losses above the target": (lambda texts: runs(final=1.62), {"loss-rule"}),
    "slow runs": (lambda texts: runs(pace=121.0), {"faster-than-baseline"}),
}


@pytest.fixture
def failures(tmp_path, records):
    """Rules that fail, with the evidence."""
    def call(texts, baseline=(), *options) -> dict[str, str]:
        arguments = [write(tmp_path / "runs", texts), "--track", "shakespeare", *options, "--json"]
        if baseline:
            arguments += ["--baseline", write(tmp_path / "other", baseline, first=1001)]
        code, out, _ = records("check", *arguments)
        found = {v["rule"]: v["evidence"] for v in json.loads(out) if v["verdict"] == rules.FAIL}
        assert code == int(bool(found))
        return found
    return call


@pytest.mark.parametrize("name", DOCTORED)
def test_each_way_to_doctor_a_log_breaks_its_own_rules_and_no_other(name, failures):
    change, expected = DOCTORED[name]
    assert failures(change(runs()), slow()).keys() == expected


def test_what_public_logs_do_not_say_is_no_fault(failures):
    """They hold neither settings nor seeds: what they do not say is no fault."""
    baseline = [public(seed, pace=110.0) for seed in range(500, 504)]
    texts = [public(seed) for seed in range(1, 1 + RUNS)]
    assert not failures(texts, baseline, "--track", "small")
    texts[0] = replaced(texts[0], r"^\|   [1-7] .*\n", "")
    assert failures(texts, baseline, "--track", "small").keys() == {"same-hardware"}


def test_seed_in_the_source_is_no_difference(failures):
    assert not failures([replaced(text, "^# the optimizer", f"SEED = {k}") for k, text in enumerate(runs())],
                        slow())


@pytest.mark.parametrize("change, expected", [
    (lambda texts: [replaced(text, "Model T", "Model S") for text in texts], {"same-hardware"}),
    (first_log(lambda text: replaced(text, r"PyTorch 2\.13\.0", "PyTorch 2.12.0")), {"same-torch"}),
    (first_log(lambda text: replaced(text, r"^step:(19|20)/.*\n", "")),
     {"final-validation", "faster-than-baseline"}),
    (first_log(lambda text: last(text, r"train_time:\d+ms", "train_time:2300ms")), {"intact-logs"}),
    (first_log(resumed), {"not-resumed"}),
    (copy_with(other_seed), {"distinct-curves"}),
])
def test_a_baseline_is_held_to_the_same_rules(failures, change, expected):
    assert failures(runs(), change(slow())).keys() == expected


@pytest.mark.parametrize("planned, expected", [(8, set()), (7, {"planned-runs"}), (9, {"planned-runs"})])
def test_runs_are_counted_against_the_plan(planned, expected, failures):
    assert failures(runs(), slow(), "--planned", planned).keys() == expected


def test_an_experiment_of_ab_says_its_baseline_and_how_many_runs_were_planned(tmp_path, records):
    """Its plan says which arm is the baseline, how many runs were planned, and that what was printed is no
    log."""
    folder = tmp_path / "ab"
    a, b = write(folder / "a", runs()), write(folder / "b", slow(), first=1001)
    write(folder / "output", runs(), first=2001)
    for pairs, code in ((RUNS, 0), (RUNS + 1, 1)):
        (folder / "plan.json").write_text(plan_text(pairs))
        assert records("check", folder)[0] == code
    assert f"{RUNS} runs, 4 of the" in records("check", folder)[1]
    assert records("check", folder, "--planned", RUNS)[0] == 0
    for text in ("{", "[" * 10**5, "[]", '{"pairs": 3}', "\xff"):
        (folder / "plan.json").write_text(text)
        code, out, _ = records("check", a, "--baseline", b)  # the folder is no experiment any more
        assert code == 0 and "no plan is stated" in out


@pytest.mark.parametrize("track, digit, verdict", [
    ("small", "1", rules.PASS), ("small", "2", rules.FAIL),  # of its tokens no hash is known
    ("shakespeare", "1", rules.FAIL)])
def test_runs_and_baseline_are_judged_on_the_same_data_and_on_that_of_the_track(
        tmp_path, records, track, digit, verdict):
    def folder(name, texts, digit):
        texts = [replaced(text, '"track": "shakespeare"', f'"track": "{track}"') for text in texts]
        tokens = f'"val_tokens": {TRACKS[track].val_tokens}'
        texts = [replaced(text, '"val_tokens": 262144', tokens) for text in texts]
        texts = [replaced(text, r"sha256 \w+", f"sha256 {digit * 64}") for text in texts]
        return write(tmp_path / name, texts)
    out = records("check", folder("runs", runs(), "1"), "--baseline", folder("base", slow(), digit),
                  "--track", track, "--json")[1]
    assert {v["rule"]: v["verdict"] for v in json.loads(out)}["validation-data"] == verdict


def submission(folder, track: str, **statement) -> rules.Submission:
    read = [logs.read(path) for path in sorted(folder.glob("*.txt"))]
    return rules.Submission(TRACKS[track], read, **statement)


def test_runs_may_share_losses_with_a_baseline_of_their_seeds_and_other_times(failures):
    """Times and seeds tell a pair of runs from a copy."""
    slower = [log(k, pace=121.0) for k in range(1, 1 + len(runs()))]
    assert failures(runs(), slower) == {}
    assert failures(runs(), [other_seed(text) for text in slower]).keys() == {"distinct-curves"}
    assert "distinct-curves" in failures(runs(), runs())


@pytest.mark.parametrize("second_ms, verdict", [(2001, rules.PASS), (2000, rules.FAIL)])
def test_equal_losses_of_single_validations(tmp_path, second_ms, verdict):
    """One loss can be the same by chance; one loss and its time are not."""
    for ms, name in ((2000, "a"), (second_ms, "b")):
        (tmp_path / f"{name}.txt").write_text(f"step:20/20 val_loss:3.27 train_time:{ms}ms "
                                              f"step_avg:{ms / 20:.2f}ms\n")
    assert rules.distinct_curves(submission(tmp_path, "small"))[0] == verdict


def test_a_score_that_just_reaches_the_rule_of_steps(tmp_path):
    """3.28 - 3.276 with n = 1 is the example in the rules of the public track; its p is a little above
    0.001."""
    (tmp_path / "a.txt").write_text("step:20/20 val_loss:3.27600 train_time:2.000s step_avg:100.00ms\n")
    assert rules.loss_rule(submission(tmp_path, "optimization", step=20))[0] == rules.PASS


def test_runs_count_at_the_step_that_is_stated(failures):
    """In a track with a stated step, runs end where they like and count at that step."""
    texts = [replaced(log(seed, final=3.1), '"val_tokens": 262144', '"val_tokens": 10485760')
             for seed in range(RUNS)]
    settings = json.dumps({"track": "optimization", **TRACKS["optimization"].fixed})[1:-1]
    texts = [replaced(text, r'"batch_tokens": \[2048\], ', "") for text in texts]
    texts = [replaced(text, '"track": "shakespeare"', settings) for text in texts]
    texts[0] = replaced(texts[0], r"^step:(16|17|18|19|20)/.*\n", "")
    track = ["--track", "optimization"]
    assert "final-validation" in failures(texts, (), *track)
    found = failures(texts, (), *track, "--step", 15)
    assert found.keys() == {"loss-rule"} and "(3.28 - 3.599" in found["loss-rule"]
    assert "without a validation at step 12" in failures(texts, (), *track, "--step", 12)["final-validation"]


# Waivers and refusals

def test_what_a_waiver_may_accept(tmp_path, records):
    """The loss rule for a change of systems, speed where no baseline tells it, and the marked rules."""
    good, bad = write(tmp_path / "runs", runs()), write(tmp_path / "bad", runs(final=1.62))
    slower, baseline = write(tmp_path / "slow", runs(pace=121.0)), write(tmp_path / "other", slow())
    for folder, waiver, code in (
            ([good], "faster-than-baseline=first record of the track", 0),
            ([bad, "--baseline", baseline], "loss-rule=it is close", 1),
            ([bad, "--baseline", baseline], "loss-rule=systems: the same training", 0),
            ([slower, "--baseline", baseline], "faster-than-baseline=nearly", 1)):
        found, out, _ = records("check", *folder, "--waive", waiver)
        assert found == code and (waiver.partition("=")[2] in out) == (code == 0)
    assert records("check", good)[0] == 1


def test_what_cannot_be_waived_in_record_json_either(tmp_path):
    write(tmp_path, [replaced(text, r"step_avg:\S+", "step_avg:1.00ms") for text in runs()])
    waivers = {"intact-logs": "so what", "faster-than-baseline": "the first record"}
    found = {v.rule: v.verdict for v in rules.judge(submission(tmp_path, "shakespeare", waivers=waivers))}
    assert (found["intact-logs"], found["faster-than-baseline"]) == (rules.FAIL, rules.WAIVED)


@pytest.mark.parametrize("arguments, sentence", [
    (["--waive", "same-hardware=it does not matter"], "no other rule can be waived"),
    (["--waive", "loss-rule"], "without a reason"),
    (["--planned", "soon"], "--planned: invalid int value: 'soon'"),
    (["--track", "huge"], "invalid choice: 'huge'"),
])
def test_bad_arguments_are_refused_in_a_sentence(arguments, sentence, tmp_path, records):
    code, _, err = records("check", write(tmp_path / "runs", runs()), *arguments)
    assert code == 2 and sentence in err


def test_paths_without_a_run_are_refused(tmp_path, records):
    (tmp_path / "a.txt").write_text("numpy\n")
    for path in (tmp_path / "none", tmp_path / "a.txt", tmp_path):
        code, _, err = records("check", path, "--track", "small")
        assert code == 2
    assert "expected logs of runs, found none" in err


# Hostile logs

def test_hostile_evidence_is_plain(tmp_path, records):
    texts = first_log(lambda text: replaced(text, "PyTorch 2.13.0.cpu", "PyTorch [red]2"))(runs())
    folder = write(tmp_path / "runs", texts)
    next(folder.glob("00000001*")).rename(folder / "\x1b[31m.txt")
    code, out, _ = records("check", folder)
    assert code == 1 and "\x1b" not in out and "[red]2" in out and "?[31m" in out


def test_deeply_nested_settings_end_in_a_verdict(tmp_path, records):
    for depth in range(700, 1000, 50):  # from what is read and compared to what is not even read
        texts = [replaced(text, '"stages": 3', f'"stages": {"[" * depth + "]" * depth}') for text in runs(2)]
        assert records("check", "--track", "shakespeare", write(tmp_path / "runs", texts))[0] == 1


def test_code_is_what_is_left_of_a_source_without_comments_and_docstrings():
    source = ('"""max_autotune\nmax_autotune"""\nx = """max_autotune"""  # max_autotune\n'
              'def f():\n    "max_autotune"\n')
    assert rules.code_of(source).count("max_autotune") == 1
    assert rules.code_of("def f(:\n  max_autotune '") == "def f(:\n  max_autotune '"
    hidden = ('x = "\u2028"; max_autotune = 1\n'
              '# a comment on the second line, which another way of counting takes for the third\n')
    assert "max_autotune" in rules.code_of(hidden)
    assert rules.code_of("é = 1  # é\n") == "é = 1"
