"""records.calibrate and its probe: the probe on two real ranks, and comparisons against simulated machines and mixtures."""
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from records import calibrate
from records.__main__ import guarded
from records.errors import RecordError

PARTS = {"matmul_float32": "TFLOP/s", "matmul_bfloat16": "TFLOP/s", "memory": "GB/s", "block": "Mtokens/s", "disk": "GB/s"}


def machine(seed: int, noise: float = 0.02, **speeds: float) -> dict:
    """What the probe writes on a machine whose parts have these speeds (1 if not given)."""
    rng = np.random.default_rng(seed)
    parts = {name: dict(unit=unit, values=list(speeds.get(name, 1.0) * (1 + noise * rng.standard_normal(10))))
             for name, unit in PARTS.items()}
    return dict(probe=1, device="CPU", ranks=2, threads=1, torch="2", compute="float32", cores=2, load=0.0, date="today",
                parts=parts, sensors={})


def host(*args, **kwargs) -> calibrate.Host:
    return calibrate.parse(json.dumps(machine(*args, **kwargs)).encode(), Path("x"))


def arguments(**changes):
    return SimpleNamespace(**{**dict(compare=None, seconds=60.0, ranks=None, out=Path("host.json"), json=False), **changes})


def test_probe_measures_on_two_ranks(tmp_path):
    measured = calibrate.measure(0.3, 2, tmp_path / "new" / "host.json")
    assert {"matmul_float32", "matmul_bfloat16", "memory", "block", "all_reduce"} <= measured.values.keys()
    assert all(len(values) == 10 for values in measured.values.values())
    assert measured.training == ["matmul_float32", "memory", "block", "all_reduce"]
    assert measured.facts["ranks"] == 2 and measured.facts["torch"] and measured.facts["cores"] >= 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["host.json"]
    assert (tmp_path / "new" / "host.json").stat().st_size < 4000  # a line of every log


def test_probe_that_fails_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="expected .*, found .* exit code 1; "):
        calibrate.measure(0.3, 1, tmp_path / "file" / "host.json")


def test_sensors_of_the_worst_gpu():
    from bench.host import parse_sensors
    assert parse_sensors("1980, 1980, 41, 350.10\n1755, 1980, 83, 698.50\n") == {
        "clock_mhz": 1755, "max_clock_mhz": 1980, "celsius": 83, "watts": 698.5}
    assert parse_sensors("1980, 1980, 41, [N/A]\n") == {"clock_mhz": 1980, "max_clock_mhz": 1980, "celsius": 41}
    assert parse_sensors("") == parse_sensors("NVIDIA-SMI has failed, no driver\n") == {}


def test_equal_machines_are_found_equal():
    hits = 0
    for seed in range(300):
        _, expected, error = calibrate.time_ratio(host(seed), host(seed + 1000))
        hits += expected / error <= 1 <= expected * error
        assert error < 1.1  # 1.96 sqrt 2 of a noise of 2 % is 5.5 %
    assert hits / 300 > 0.94


def test_machine_that_is_slower_at_everything():
    slow = dict.fromkeys(PARTS, 1 / 1.1)
    ratios, expected, error = calibrate.time_ratio(host(1, **slow), host(2))
    assert expected == pytest.approx(1.1, rel=0.02) and 1.02 < expected / error < 1.1 < expected * error < 1.2
    assert ratios["disk"].estimate == pytest.approx(1.1, rel=0.03)
    _, back, same_error = calibrate.time_ratio(host(2), host(1, **slow))
    assert back == pytest.approx(1 / expected) and same_error == pytest.approx(error)


@pytest.mark.parametrize("noise, memory", [(0.03, 1.4), (0.1, 1.0)])
def test_error_bar_is_the_spread_of_all_mixtures(noise, memory):
    """Mixtures drawn at random, each in another stretch of time, agree with the formula: machines whose parts differ, and
    machines with noise."""
    a, b = host(1, noise), host(2, noise, memory=memory, disk=9.0)
    ratios, expected, error = calibrate.time_ratio(a, b)
    rng, shares = np.random.default_rng(3), np.random.default_rng(4).dirichlet([1, 1, 1], 200_000)
    logs = [math.log(ratios[name].estimate) for name in a.training]
    noises = [math.hypot(*(np.std(np.log(machine.values[name]), ddof=1) for machine in (a, b))) for name in a.training]
    mixtures = shares @ logs + shares @ noises * rng.standard_normal(200_000)
    assert math.log(expected) == pytest.approx(mixtures.mean(), abs=0.002)
    assert math.log(error) / 1.96 == pytest.approx(mixtures.std(), rel=0.01)


def test_compare_reads_files_and_logs(tmp_path, capsys):
    line = json.dumps(machine(1, load=None))
    (tmp_path / "a.json").write_text(line)
    log = 'host: {"in": "the source"\n{\nf"host: {x}"\n' + "=" * 100 + f"\nhost: {line}\nstep:0/1 val_loss:5.5 train_time:0ms\n"
    (tmp_path / "b.txt").write_text(log)
    paths = [tmp_path / "a.json", tmp_path / "b.txt"]
    assert calibrate.run(arguments(compare=paths)) == 0
    assert "1.000 times as long on A as on B (95 %: 0.9" in capsys.readouterr().out
    assert calibrate.run(arguments(compare=paths, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["time_ratio"] == pytest.approx(1)


def test_busy_and_drifting_machines_are_named():
    facts = machine(1, noise=0.001)
    facts["load"] = 1.7
    facts["parts"]["memory"]["values"] = [1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    found = list(calibrate.warnings(calibrate.parse(json.dumps(facts).encode(), Path("x"))))
    assert len(found) == 2 and "load 1.7 on 2 cores" in found[0] and found[1].endswith("moves): memory -10.0%.")
    assert not list(calibrate.warnings(host(1, noise=0.001)))


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "{" * 9999, '{"parts": 3}', '{"parts": {}}', '{"parts": {"memory": {"unit": "GB/s", "values": [1]}}}',
    '{"parts": {"memory": {"unit": "GB/s", "values": [1, -1]}}}', '{"parts": {"memory": {"unit": "GB/s", "values": [1, NaN]}}}',
    '{"parts": {"memory": {"unit": "GB/s", "values": [1, 1e999]}}}', '{"parts": {"memory": {"values": [1, 2]}}}',
    '{"parts": {"memory": {"unit": "GB/s", "values": [1, 1' + "0" * 400 + "]}}}", "host: {broken\nhost: not measured\n",
    "host: {broken}\n", "\x00\xff" * 1000])
def test_what_is_no_measurement_is_refused(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match="expected .*, found .*; "):
        calibrate.read(path)


def test_what_does_not_compare_is_refused(tmp_path):
    other = machine(1)
    other["probe"] = 2
    constant = machine(1, noise=0.0)
    for facts in (other, constant, machine(1) | dict(parts={"disk": dict(unit="GB/s", values=[1.0, 2.0])})):
        with pytest.raises(RecordError, match="expected measurements .*, found .*; "):
            calibrate.time_ratio(host(2), calibrate.parse(json.dumps(facts).encode(), Path("x")))
    with pytest.raises(RecordError, match="check the path"):
        calibrate.read(tmp_path / "nothing")
    for changes in (dict(seconds=0.1), dict(seconds=math.nan), dict(ranks=0)):
        with pytest.raises(RecordError, match="expected .*, found .*; "):
            calibrate.run(arguments(**changes))


def test_hostile_names_do_not_reach_the_terminal(tmp_path, capsys):
    facts = machine(1)
    facts["device"] = "\x1b[2J" + "x" * 9999
    facts["parts"]["[red]\x1b"] = facts["parts"].pop("disk")
    (tmp_path / "a.json").write_text(json.dumps(facts))
    calibrate.run(arguments(compare=[tmp_path / "a.json"] * 2))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]?" in out and max(map(len, out.splitlines())) < 600


def test_example(monkeypatch, capsys):
    """Two measurements of one machine on which others worked: the error bar is as wide as it should be."""
    monkeypatch.chdir(Path(__file__).parents[2])
    assert guarded(shlex.split(calibrate.EXAMPLE)[3:]) == 0
    out = capsys.readouterr().out
    assert "all_reduce" in out and "0.499 to 2.545" in out and out.count("The machine was busy") == 2
