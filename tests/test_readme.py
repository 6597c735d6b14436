"""README.md and docs/ cannot disagree with the code, the files and the logs that their figures come from."""
import dataclasses
import importlib.util
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

import train_gpt
from bench import docs
from engine import TESTED_TORCH
from records.__main__ import VERBS, module_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
LOGS = ROOT / "bench/results/2026-11-28_shakespeare_cpu"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def commands(page: str) -> list[list[str]]:
    """The words of every command that a page shows, in a block of code or inline."""
    blocks = re.findall(r"^ {4,}((?:.*\\\n)*.+)$", page, re.M)
    inline = re.findall(r"`([^`]+)`", page)
    found = []
    for text in (*blocks, *inline):
        if not text.startswith(("./", "python ", "torchrun ", "srun ")):
            continue
        words = shlex.split(" ".join(text.replace("\\\n", " ").split()), comments=True)
        found.append(words)
    return found


COMMANDS = [words for page in PAGES.values() for words in commands(page)]


def test_there_are_commands_of_every_kind():
    starts = {" ".join(words[:3]) for words in COMMANDS}
    assert {"python -m bench.docs", "python -m records", "python -m tools.sample"} <= starts
    assert {"./run.sh", "torchrun", "srun"} <= {words[0] for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_its_program_takes(words):
    settings = [word for word in words[1:] if word.startswith("--")]
    if words[:2] == ["python", "-m"]:
        module, *arguments = words[2:]
        name = f"{module}.__main__" if module == "records" else module
        found = importlib.util.find_spec(name)
        assert found, f"no module {module}"
        source = Path(found.origin)
        if module == "records" and arguments:
            assert arguments[0] in {verb for verbs in VERBS.values() for verb in verbs}
            source = Path(module_of(arguments[0]).__file__)
            for name in ("--a", "--b"):  # commands of their own
                if name in arguments:
                    check_settings(shlex.split(arguments[arguments.index(name) + 1])[1:])
        check_options(source, settings)
    elif words[0] == "python" and words[1] != "train_gpt.py":
        check_options(ROOT / words[1], settings)
    elif words[0] == "torchrun" and "train_gpt.py" not in words:
        program = next(k for k, word in enumerate(words) if word.endswith(".py"))
        check_options(ROOT / words[program], words[program + 1:])
    elif words[0] != "./test.sh":
        first = words.index("train_gpt.py") if "train_gpt.py" in words else 0
        check_settings(words[first + 1:])


def check_options(source: Path, options: list[str]):
    """Each of these options must be a setting or an action of the trainer, or stand in the program's text."""
    text = source.read_text(encoding="utf-8")
    trainers = {f.name for f in dataclasses.fields(train_gpt.Config)} | {*train_gpt.ACTIONS}
    for option in options:
        name = option.partition("=")[0].removeprefix("--")
        assert name in trainers or f'"--{name}"' in text or f'"{name}"' in text, f"{source} has no --{name}"


def check_settings(words: list[str]):
    """These arguments must be settings or actions of the trainer, with values of the right kind."""
    train_gpt.parse_config([word for word in words if word not in ("--help",)])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_and_every_file_it_names_exists(page):
    text = PAGES[page]
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for link in links:
        assert ":" in link or (page.parent / link).exists(), link
    named = re.findall(r"`((?:[\w.-]+/)+|(?:[\w-]+/)*[\w-]+\.(?:py|sh|txt|md))`", text)
    for name in named:
        assert (ROOT / name).exists() or name in ("train.py",), name  # nanoGPT's


def test_every_room_stands_in_the_table():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))} | {"docs"}
    rows = re.findall(r"^\| `.*$", README, re.M)
    assert rooms <= set(re.findall(r"`(\w+)/`", "\n".join(rows))) | {"logs"}


def test_the_versions_of_torch_it_names_are_those_of_the_doctor():
    first, last = (".".join(map(str, version)) for version in TESTED_TORCH)
    assert f"torch {first} to {last}" in PAGES[ROOT / "docs/running.md"]
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert TESTED_TORCH[0] <= tuple(map(int, pinned.groups())) <= TESTED_TORCH[1]


def test_track_table_is_the_presets():
    for name in train_gpt.TRACKS:
        cfg = train_gpt.Config.for_track(name)
        lines = README.splitlines() + PAGES[ROOT / "docs/running.md"].splitlines()
        row, = [line for line in lines if line.startswith(f"| `{name}` ")]
        assert f"| {cfg.target_loss} | {cfg.train_steps} |" in row
    steps = train_gpt.Config.for_track("shakespeare").train_steps
    assert set(re.findall(r"state_step(\d+)\.pt", README)) == {f"{steps:06d}"}


def test_figures_in_sentences_are_those_of_the_logs():
    for about, text in docs.facts().items():
        assert text in README or text in PAGES[ROOT / "docs/results.md"], (about, text)


def test_the_record_it_shows_is_the_fastest_of_its_track():
    record, before = (docs.ends_of(docs.GROUPS[name])[1] for name in ("the record", "the record before"))
    assert statistics.mean(record) < statistics.mean(before)
    assert f"{docs.spread(record, '.1f')} s (n = {len(record)}, AMD EPYC)" in README


def test_the_output_it_shows_is_that_of_a_run():
    shown = re.findall(r"^ {4}(step:\S+ .*)$", README, re.M)
    assert len(shown) >= 2
    texts = [path.read_text(encoding="utf-8") for path in (LOGS / "muon").glob("*.txt")]
    assert any(all(line in text.splitlines() for line in shown) for text in texts)


def test_the_verdict_it_shows_is_that_of_the_committed_experiment():
    verdict = (ROOT / "bench/results/2026-11-28_mtp/verdict.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4,}((?:Seconds|Loss): .*) \.\.\.$", README, re.M)
    assert len(shown) == 2
    for line in shown:
        assert line in verdict, line
    a, b = re.findall(r"^ {4}[AB]: (.*)$", verdict, re.M)
    assert f"--a '{a}' --b '{b}'" in README


def test_its_lines_about_muon_train_a_model():
    lines = re.search(r"^ {4}from muon import Muon\n(?:(?: {4}.*)?\n)+", README, re.M)[0]
    model = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 7))
    before = [p.detach().clone() for p in model.parameters()]
    names = {"model": model, "torch": torch}
    exec("\n".join(line[4:] for line in lines.splitlines()), names)
    model(torch.arange(7)).square().mean().backward()
    for optimizer in names["optimizers"]:
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
