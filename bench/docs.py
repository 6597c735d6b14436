"""Put the figures of README.md and docs/ in from committed logs and tables, and draw the pictures.

    python -m bench.docs           # write what has changed
    python -m bench.docs --check   # write nothing; exit code 1 if something would change

Prose is written by hand. What is put in: the table between two marks in docs/results.md, and in
docs/techniques.md the lines that begin with "- Settings:" and "- Worth here, without it:". The settings and
the rows of bench/ABLATION.md that they name stay as they are; the values behind the names are written anew.
Figures in sentences are looked for and never written.
"""
import re
import statistics
import sys
from pathlib import Path

from bench import pictures
from bench.page import grid, with_tables
from data.errors import CommandLine, UsageError, run_program
from data.files import written_whole
from records import logs
from records.compare import spread
from train_gpt import RECIPES, TRACKS, Config

PRESETS = {  # tracks and their recipes
    **{name: Config.for_track(name) for name in TRACKS},
    **{name: Config.for_track(track, recipe=name) for track in RECIPES for name in RECIPES[track]},
}
TECHNIQUES = Path("docs/techniques.md")
RESULTS = Path("docs/results.md")
README = Path("README.md")
ABLATION = Path("bench/ABLATION.md")
PICTURES = Path("docs/pictures")
SHORT_STEPS = 16
MUON, ADAMW, NANOGPT = "Muon", "AdamW for everything", "nanoGPT's quickstart"
SHORT = f"Muon, {SHORT_STEPS} steps"
GROUPS = {
    "the record": Path("records/track_0_laptop/2026-11-28_OneLayer/runs"),
    "the record before": Path("records/track_0_laptop/2026-11-28_OneLayer/baseline"),
    MUON: pictures.RUNS / "muon",
    ADAMW: pictures.RUNS / "adamw",
    NANOGPT: pictures.RUNS / "nanogpt",
    SHORT: pictures.RUNS / "short",
}
ROW = re.compile(r"^\| (?P<name>[^|]+) \| (?P<n>\d+) \| [\d.]+ \| (?P<loss>[^|]+) \| [\d.]* "
                 r"\| (?P<at_time>[^|]*)\|$", re.M)  # of the table in bench/ABLATION.md


# ------------------------------------------------------------------------------------------------------------
# docs/techniques.md


def shown_value(value) -> str:
    """Return a setting's value as a page says it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(shown_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_line(line: str) -> str:
    """The values of the settings that a line names; in brackets, those of presets that have others."""
    names = [name for name in re.findall(r"`(\w+)`", line) if name not in PRESETS]
    entries = []
    for name in names:
        if not hasattr(Config, name):
            raise UsageError(f"{TECHNIQUES}: expected settings of Config, found {name!r}; correct {line!r}")
        values = {preset: shown_value(getattr(cfg, name)) for preset, cfg in PRESETS.items()}
        default = values["small"]
        others = [f"`{preset}` {value}" for preset, value in values.items() if value != default]
        entries.append(f"`{name}` {default}" + (f" ({', '.join(others)})" if others else ""))
    return f"- Settings: {'; '.join(entries)}" if entries else line


def worth_line(line: str, rows: dict[str, re.Match]) -> str:
    """Return what bench/ABLATION.md measured for the rows that a line quotes."""
    entries = []
    for name in re.findall(r'"([^"]+)"', line):
        if name not in rows:
            raise UsageError(f"{TECHNIQUES}: expected a row of {ABLATION}, found {name!r}; correct {line!r}")
        found = rows[name]
        at_time = f", {found['at_time'].strip()} at equal time" if found["at_time"].strip() else ""
        entries.append(f'"{name}" {found["loss"]} (n = {found["n"]}){at_time}')
    return f"{line.partition(':')[0]}: {'; '.join(entries)}" if entries else line


def techniques(page: str) -> str:
    """The page with the values of settings and of measurements written anew."""
    rows = {row["name"]: row for row in ROW.finditer(ABLATION.read_text(encoding="utf-8"))}
    lines = []
    for line in page.splitlines():
        if line.startswith("- Settings:"):
            line = settings_line(line)
        elif line.startswith(("- Worth here, without it:", "- Worth here, with it:")):
            line = worth_line(line, rows)
        lines.append(line)
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Figures of README.md and docs/results.md


def ends_of(folder: Path) -> tuple[list[float], list[float]]:
    """Final losses and training seconds of the runs of a folder."""
    ends = [run[-1] for run in pictures.runs_of(folder)]
    if len(ends) < 2:
        raise UsageError(f"{folder}: expected two or more logs, found {len(ends)}; name a folder of them")
    return [loss for _, _, loss in ends], [seconds for _, seconds, _ in ends]


def runs_table() -> str:
    """One row for each group of runs whose figures README.md or docs/results.md tell."""
    rows = []
    for name, folder in GROUPS.items():
        losses, seconds = ends_of(folder)
        rows.append([f"[{name}](../{folder})", len(losses), spread(losses, ".4f"), spread(seconds, ".1f")])
    return grid(["runs", "n", "final validation loss", "training seconds"], rows) + "\n"


def seconds_to(loss: float, folder: Path) -> list[float]:
    """Training seconds to this loss of each run of train_gpt.py, on straight lines between validations."""
    found = [logs.read(path).runs[0].time_to(loss) for path in sorted(folder.glob("*.txt"))]
    if None in found:  # a mean of the others would flatter them
        raise UsageError(f"{folder}: expected runs that all reach {loss}, found one that does not; name "
                         "others in GROUPS of bench/docs.py")
    return [ms / 1000 for ms in found]


def facts() -> dict[str, str]:
    """Return what README.md and docs/results.md say in sentences, by what it is about."""
    seconds = {name: ends_of(folder)[1] for name, folder in GROUPS.items()}
    mean = {name: statistics.mean(of_runs) for name, of_runs in seconds.items()}
    target = Config.for_track("shakespeare").target_loss
    adamw, muon = (statistics.mean(seconds_to(target, GROUPS[name])) for name in (ADAMW, MUON))
    record = seconds["the record"]
    return {
        "the record": f"{spread(record, '.1f')} s (n = {len(record)}",
        "AdamW, whole schedule": f"{mean[ADAMW] / mean[MUON]:.2f} times",
        "AdamW, to the target": f"{adamw / muon:.2f} times",
        "nanoGPT, against a run that stops there": f"{mean[NANOGPT] / mean[SHORT]:.1f} times",
        "time of the short run": f"{mean[SHORT]:.1f} s",
    }


# ------------------------------------------------------------------------------------------------------------
# All of it


def wanted() -> dict[Path, str]:
    """Return what every file should hold."""
    target = Config.for_track("shakespeare").target_loss
    files = {TECHNIQUES: techniques(TECHNIQUES.read_text(encoding="utf-8")),
             RESULTS: with_tables(RESULTS, "python -m bench.docs", runs_table())}
    for theme in pictures.THEMES:
        files[PICTURES / f"loss_{theme.name}.svg"] = pictures.loss_picture(theme, target)
        files[PICTURES / f"muon_{theme.name}.svg"] = pictures.muon_picture(theme)
    return files


def main(argv: list[str]) -> int:
    parser = CommandLine(__doc__, "python -m bench.docs")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is out of date")
    options = parser.parse_args(argv)
    stale = [(path, text) for path, text in wanted().items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    prose = README.read_text(encoding="utf-8") + RESULTS.read_text(encoding="utf-8")
    missing = [(about, text) for about, text in facts().items() if text not in prose]

    for path, text in stale:
        print(f"{path}: {'out of date' if options.check else 'written'}")
        if not options.check:
            with written_whole(path, "w") as file:
                file.write(text)
    for about, text in missing:
        print(f"{README} and {RESULTS}: expected one to say, of {about}: {text!r}")
    return 1 if missing or (stale and options.check) else 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.docs"))
