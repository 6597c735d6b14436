"""Write one page about runs and the history of records: charts, tables that sort, statistics, differences of
sources.

A PATH that is a log is a group of its own; the logs in a folder are a group of seeds, those of each subfolder
another one. The first group is the baseline of the others; of an A/B experiment its own baseline is. Without
a PATH the page shows the public history alone. The page is a single file and needs no network; plotly.js, 4.8
MB, lies in it. What comes out of logs is shown and never run."""
import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from records import charts, difference, history, logs, statistics, table
from records.compare import figures, tests_against
from records.errors import RecordError
from records.groups import RunGroup, count, find_groups
from records.palette import COLORS, MAX_GROUPS
from records.rules import NOT_TRAINING
from records.tracks import TRACKS, Track, choose

HELP = "one page with charts: runs, their statistics, sources, and the history of records"
EXAMPLE = ("python -m records report records/track_0_laptop/2026-11-22_AdamW "
           "records/track_0_laptop/2026-11-22_Muon "
           "-o logs/report.html")

TEMPLATES = Path(__file__).parent / "templates"
DIFF_LIMIT = 400  # lines shown of the difference of a file


@dataclass
class JudgedGroup(RunGroup):
    """A group, and what the page says of it beside the facts of its runs."""
    statistics: dict = field(default_factory=dict)
    differences: list[difference.Difference] = field(default_factory=list)  # to the first group


def judge(groups: list[RunGroup], track: Track | None) -> list[JudgedGroup]:
    """Statistics, differences and notes, against the first group.

    Without a track there is no rule and no target.
    """
    judged = [JudgedGroup(**vars(group)) for group in groups]
    for group in judged[:MAX_GROUPS]:
        group.differences = difference.differences(groups[0].sources, group.sources)
    first = None
    for group in judged:
        try:
            counted = count(group, track)
        except RecordError as e:
            group.notes.append(f"No statistics: {e}.")
            continue
        first = first or (group, counted)
        group.notes += counted.notes
        group.statistics = figures(counted) | {
            "step": counted.step,
            "rule": track and statistics.loss_rule(track, counted.losses),
            "against": tests_against(*first, group, counted, track) if group is not first[0] else None,
        }
    return judged


def shown(text, limit: int = 60) -> str:
    """Text of a file for a page: no control or direction characters, not too long."""
    text = logs.printable(str(text)[:limit + 1])
    return text if len(text) <= limit else text[:limit - 1] + "…"


@dataclass(frozen=True)
class Cell:
    text: str = ""
    value: float | None = None  # to sort by; None: by the text
    detail: str = ""  # a second line
    links: tuple[tuple[str, str], ...] = ()  # (text, address)
    swatch: int | None = None  # the number of a group, whose colour stands before the text

    @property
    def empty(self) -> bool:
        return not (self.text or self.links or self.detail)


@dataclass(frozen=True)
class Column:
    title: str
    cells: list[Cell]
    kind: str = "text"  # or "number", or "fact": text that does not wrap
    heads: bool = False  # its cells are the headers of the rows


def numbers(title: str, values, form: str = "{}", factor: float = 1) -> Column:
    cells = []
    for value in values:
        if value is None:
            cells.append(Cell())
        else:
            cells.append(Cell(form.format(value * factor), value * factor))
    return Column(title, cells, "number")


def texts(title: str, values, kind: str = "text", heads: bool = False, limit: int = 60) -> Column:
    cells = [Cell(shown("" if value is None else value, limit)) for value in values]
    return Column(title, cells, kind, heads)


def mean_sd(title: str, groups: list[JudgedGroup], key: str, digits: int) -> Column:
    def cell(facts):
        if not facts:
            return Cell()
        mean = facts[key]["mean"]
        sd = facts[key]["sd"]
        if key == "seconds" and not math.isfinite(mean.estimate):  # not in the logs
            return Cell()
        spread = "" if sd is None else f" ± {sd:.{digits}f}"
        return Cell(f"{mean.estimate:.{digits}f}{spread}", mean.estimate, between(mean, digits))

    return Column(title, [cell(group.statistics) for group in groups], "number")


def between(interval, digits: int) -> str:
    return "" if interval.low is None else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


# Cells of the table of groups

def rule_cell(group: JudgedGroup) -> Cell:
    rule = group.statistics.get("rule")
    if not rule:
        return Cell()
    if rule.why:
        return Cell("cannot be judged")
    return Cell(rule.verdict, detail=f"p = {rule.p:.2g}")


def speed_up_cell(group: JudgedGroup) -> Cell:
    against = group.statistics.get("against")
    interval = against and against["speed_up"]
    if not interval or interval.estimate is None:
        return Cell()
    return Cell(f"{interval.estimate:.3f}", interval.estimate, between(interval, 3))


def source_cell(k: int, group: JudgedGroup, first: JudgedGroup) -> Cell:
    if group is first:
        return Cell("baseline")
    if group.sources == first.sources:
        return Cell("the same")
    if not group.differences:
        return Cell("another")
    added = sum(change.added for change in group.differences)
    removed = sum(change.removed for change in group.differences)
    return Cell(links=((f"+{added:,} −{removed:,} lines", f"#difference-{k}"),))


def steps_cell(group: JudgedGroup) -> Cell:
    if not group.statistics:
        return Cell()
    step = group.statistics["step"]
    return Cell("various" if step is None else f"{step:,}")


def group_table(groups: list[JudgedGroup], track: Track | None) -> list[Column]:
    columns = [
        Column("Group", [Cell(group.name, k, swatch=k) for k, group in enumerate(groups)], heads=True),
        numbers("Runs", [len(group.runs) for group in groups]),
        Column("Steps", [*map(steps_cell, groups)], "number"),
        mean_sd("Final loss", groups, "loss", 4),
    ]
    if track:
        columns.append(Column("Loss rule", [*map(rule_cell, groups)], "fact"))
    columns.append(mean_sd("Training seconds", groups, "seconds", 2))
    if len(groups) > 1:
        sources = [source_cell(k, group, groups[0]) for k, group in enumerate(groups)]
        columns.append(Column("Speed-up", [Cell("baseline"), *map(speed_up_cell, groups[1:])], "number"))
        columns.append(Column("Source", sources, "fact"))
    return columns


def run_table(groups: list[RunGroup], track: Track | None) -> tuple[list[Column], list[tuple[str, str]]]:
    """Columns, and (title, text) of those that would say the same in every row."""
    rows = []
    for k, group in enumerate(groups):
        kept = {*map(id, group.runs)}
        rows += [(k, group, log, run) for log in group.logs for run in log.runs if id(run) in kept]
    runs = [run for *_, run in rows]
    columns = [
        Column("Group", [Cell(group.name, k, swatch=k) for k, group, _, _ in rows], "fact"),
        texts("Run", [logs.short_name(run.run_id) for run in runs], "fact", heads=True),
        numbers("Seed", [run.seed for run in runs]),
        numbers("Final loss", [run.final_val_loss for run in runs], "{:.4f}"),
        numbers("Training seconds", [run.final_time_ms for run in runs], "{:,.2f}", 1e-3),
        Column("Steps", [*map(last_step_cell, runs)], "number"),
        numbers("ms a step", [run.step_avg_ms for run in runs], "{:,.2f}"),
        *(to_target(runs, track.target) if track else []),
        numbers("Peak MiB", [run.peak_mib for run in runs], "{:,}"),
        texts("Hardware", [run.hardware for run in runs]),
        texts("torch", [run.torch for run in runs], "fact"),
        texts("Source", [(run.source_sha256 or "")[:8] for run in runs], "fact"),
        texts("Remarks", ["; ".join(log.problems) for _, _, log, _ in rows], limit=200),
    ]
    common = [column for column in columns if says_the_same(column)]
    return ([column for column in columns if column not in common],
            [(column.title, column.cells[0].text) for column in common if column.cells[0].text])


def last_step_cell(run: logs.RunFacts) -> Cell:
    ended = run.complete or run.total_steps is None
    return Cell(f"{run.final_step:,}" + ("" if ended else f" of {run.total_steps:,}"), run.final_step)


def to_target(runs: list[logs.RunFacts], target: float) -> list[Column]:
    seconds = [run.time_to(target) for run in runs]
    steps = [run.steps_to(target) for run in runs]
    return [numbers(f"Seconds to {target:g}", seconds, "{:,.1f}", 1e-3),
            numbers(f"Steps to {target:g}", steps, "{:,.0f}")]


def says_the_same(column: Column) -> bool:
    """Whether a column need not be shown: it is empty, or its words are the same in several rows."""
    if len({cell.text for cell in column.cells}) > 1:
        return False
    return not column.cells[0].text or column.kind != "number" and len(column.cells) > 1


def settings_table(groups: list[RunGroup]) -> list[Column]:
    """The settings in which the first runs of the groups differ."""
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_TRAINING)
    keys = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    if not keys:
        return []
    columns = [texts("Setting", keys, heads=True)]
    for group, config in zip(groups, configs):
        values = [json.dumps(config[key]) if key in config else "" for key in keys]
        columns.append(texts(group.name, values, "fact"))
    return columns


def local_table() -> list[Column]:
    found = [record for track in TRACKS.values() for record in table.local_records(track)]
    if not found:
        return []
    titles, losses = [], []
    for record in found:
        why = shown(f"no record: {record.why_no_record}", 200) if record.why_no_record else ""
        titles.append(Cell(shown(record.description, 120), detail=why))
        spread = f"± {table.number(record.runs.loss_sd, 4)}"
        losses.append(Cell(table.number(record.runs.loss_mean, 4), detail=spread))
    return [
        Column("Record", titles, heads=True),
        texts("Track", [record.track for record in found], "fact"),
        texts("Date", [record.date for record in found], "fact"),
        numbers("Runs", [record.runs.n for record in found]),
        Column("Final loss", losses, "number"),
        numbers("Training seconds", [record.runs.time_ms_mean for record in found], "{:,.2f}", 1e-3),
        texts("Hardware", [record.hardware for record in found]),
    ]


def steps_of(record: history.HistoryRow) -> int | None:
    """Steps of the linked run of a record."""
    if TRACKS[record.track].ranked_by == "steps":
        return int(record.minutes_or_steps)
    runs = sorted(history.runs_of(record), key=lambda run: run.log_path != record.log_path)
    return runs[0].final_step if runs else None


def public_table(rows: list[table.RankedRow]) -> list[Column]:
    records = [row.record for row in rows]
    timed = {name for name, track in TRACKS.items() if track.ranked_by == "time"}
    return [
        texts("Track", [record.track for record in records], "fact"),
        numbers("#", [record.number for record in records]),
        numbers("Minutes",
                [record.minutes_or_steps if record.track in timed else None for record in records]),
        numbers("Steps", map(steps_of, records), "{:,}"),
        numbers("Gain, %", [row.percent for row in rows], "{:.1f}"),
        texts("Date", [record.date for record in records], "fact"),
        texts("Record", [record.title for record in records], heads=True, limit=120),
        texts("Contributors", [", ".join(record.contributors) for record in records], limit=200),
        Column("Upstream", [Cell(links=links_of(record)) for record in records], "fact"),
    ]


def links_of(record: history.HistoryRow) -> tuple[tuple[str, str], ...]:
    links = (("log", record.log_url), (f"PR {record.pr}", record.pr_url))
    return tuple((text, url) for text, url in links if url)


def public_charts(public: dict[str, list[table.RankedRow]]) -> dict:
    def minutes(record):
        return record.minutes_or_steps

    def chart(track, unit, value, **options):
        events = []
        for row in public[track]:
            record = row.record
            if record.date and value(record):
                event = charts.Event(record.date, float(value(record)), record.number, record.title,
                                     row.percent or 0)
                events.append(event)
        return charts.history(events, unit, **options)

    return {
        "history-small": chart("small", "minutes", minutes, labels=True),
        "history-small-steps": chart("small", "steps", steps_of),
        "history-medium": chart("medium", "minutes", minutes),
        "history-medium-steps": chart("medium", "steps", steps_of),
        "history-optimization": chart("optimization", "steps", steps_of, best_only=True),
    }


def run_charts(groups: list[RunGroup], target: float | None) -> tuple[dict, str]:
    """Charts by name, and in words how the curves end, for those who do not see them."""
    curves = [(group.name, charts.curve(group.runs)) for group in groups[:MAX_GROUPS]]
    found = {"seconds": charts.loss_curves(curves, "seconds", target),
             "steps": charts.loss_curves(curves, "steps", target),
             "ends": charts.ends_of_runs([(group.name, group.runs) for group in groups], target)}
    return ({name: figure for name, figure in found.items() if figure},
            "; ".join(f"{name} ends at {charts.in_words(points[-1])}" for name, points in curves if points))


def page(groups: list[JudgedGroup], left_out: list[tuple[str, str]], track: Track | None,
         notes: list[str]) -> str:
    public = {name: rows for name, t in TRACKS.items() if (rows := table.history_rows(t))}
    drawn, ends = run_charts(groups, track and track.target)
    drawn |= public_charts(public)
    data = json.dumps({name: json.loads(chart.to_json()) for name, chart in drawn.items()})
    scripts = [get_plotlyjs(), (TEMPLATES / "report.js").read_text(encoding="utf-8")]
    # The page tells the browser to run these two scripts and to load nothing, whatever the logs hold.
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    return environment.get_template("report.html").render(
        groups=groups,
        left_out=left_out,
        track=track,
        notes=notes,
        public=public,
        tracks=TRACKS,
        history=history,
        group_table=group_table(groups, track),
        run_table=run_table(groups, track) if groups else None,
        settings_table=settings_table(groups) if len(groups) > 1 else [],
        local_table=local_table(),
        public_table=public_table([row for rows in public.values() for row in rows]),
        ends=ends,
        charts=drawn.keys(),
        diff_limit=DIFF_LIMIT,
        max_groups=MAX_GROUPS,
        colors=COLORS,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[*map(Markup, scripts)],
        hashes=hashes,
        data=Markup(re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", data)),
        plotly_version=get_plotlyjs_version(),
    )


def add_arguments(parser):
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a log, or a folder of logs")
    parser.add_argument("--track", metavar="TRACK",
                        help=f"{', '.join(TRACKS)} (default: the one of the logs)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE",
                        help="the page (report.html)")


def run(args) -> int:
    output, notes = args.output, []
    if output.suffix != ".html":  # so that a log that was meant to be read is not written over
        raise RecordError(f"-o: expected a name that ends in .html, found {output}; add it")
    groups, left_out = find_groups(args.paths) if args.paths else ([], [])
    try:
        track = choose(args.track,
                       [log for group in groups for log in group.logs]) if groups or args.track else None
    except RecordError as e:
        if args.track:
            raise
        track = None
        notes.append(f"No target and no loss rule: {e}.")
    groups = judge(groups, track)
    text = page(groups, left_out, track, notes)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise RecordError(f"-o: expected to write {output}, found: {e.strerror}; "
                          "choose another place") from None
    print(f"{shown(output, 200)}: {sum(len(group.runs) for group in groups)} runs in {len(groups)} groups, "
          f"{len(history.records())} public records, {output.stat().st_size / 1e6:.1f} MB")
    return 0
