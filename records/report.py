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
    values = [value if value is None else value * factor for value in values]
    return Column(title, [Cell() if value is None else Cell(form.format(value), value) for value in values],
                  "number")


def texts(title: str, values, kind: str = "text", heads: bool = False, limit: int = 60) -> Column:
    return Column(title, [Cell(shown("" if value is None else value, limit)) for value in values], kind,
                  heads)


def mean_sd(title: str, groups: list[RunGroup], key: str, digits: int) -> Column:
    def cell(facts):
        # not in the logs
        if not facts or key == "seconds" and not math.isfinite(facts[key]["mean"].estimate):
            return Cell()
        mean, sd = facts[key]["mean"], facts[key]["sd"]
        spread = "" if sd is None else f" ± {sd:.{digits}f}"
        return Cell(f"{mean.estimate:.{digits}f}{spread}", mean.estimate, between(mean, digits))
    return Column(title, [cell(group.statistics) for group in groups], "number")


def between(interval, digits: int) -> str:
    return "" if interval.low is None else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def group_table(groups: list[JudgedGroup], track: Track | None) -> list[Column]:
    def rule(facts):
        rule = facts.get("rule")
        if not rule:
            return Cell()
        return Cell("cannot be judged") if rule.why else Cell(rule.verdict, detail=f"p = {rule.p:.2g}")

    def speed_up(facts):
        interval = facts.get("against") and facts["against"]["speed_up"]
        if not interval or interval.estimate is None:
            return Cell()
        return Cell(f"{interval.estimate:.3f}", interval.estimate, between(interval, 3))

    def source(k, group):
        if k == 0 or group.sources == groups[0].sources:
            return Cell("the same" if k else "baseline")
        if not group.differences:
            return Cell("another")
        added, removed = (sum(getattr(d, kind) for d in group.differences) for kind in ("added", "removed"))
        return Cell(links=((f"+{added:,} −{removed:,} lines", f"#difference-{k}"),))

    def steps(facts):
        return Cell("" if not facts else "various" if facts["step"] is None else f"{facts['step']:,}")

    facts = [group.statistics for group in groups]
    columns = [Column("Group", [Cell(group.name, k, swatch=k) for k, group in enumerate(groups)], heads=True),
               numbers("Runs", [len(group.runs) for group in groups]),
               Column("Steps", [*map(steps, facts)], "number"),
               mean_sd("Final loss", groups, "loss", 4)]
    if track:
        columns.append(Column("Loss rule", [rule(f) for f in facts], "fact"))
    columns.append(mean_sd("Training seconds", groups, "seconds", 2))
    if len(groups) > 1:
        columns += [Column("Speed-up", [Cell("baseline"), *map(speed_up, facts[1:])], "number"),
                    Column("Source", [source(k, group) for k, group in enumerate(groups)], "fact")]
    return columns


def run_table(groups: list[RunGroup], track: Track | None) -> tuple[list[Column], list[tuple[str, str]]]:
    """Columns, and (title, text) of those that would say the same in every row."""
    rows = [(k, group, log, run) for k, group in enumerate(groups) for kept in [{*map(id, group.runs)}]
            for log in group.logs for run in log.runs if id(run) in kept]
    every = [run for *_, run in rows]
    steps = [Cell(f"{run.final_step:,}" + ("" if run.complete or run.total_steps is None
                                           else f" of {run.total_steps:,}"),
                  run.final_step) for run in every]
    columns = [
        Column("Group", [Cell(group.name, k, swatch=k) for k, group, _, _ in rows], "fact"),
        texts("Run", [logs.short_name(run.run_id) for run in every], "fact", heads=True),
        numbers("Seed", [run.seed for run in every]),
        numbers("Final loss", [run.final_val_loss for run in every], "{:.4f}"),
        numbers("Training seconds", [run.final_time_ms for run in every], "{:,.2f}", 1e-3),
        Column("Steps", steps, "number"),
        numbers("ms a step", [run.step_avg_ms for run in every], "{:,.2f}"),
        *([numbers(f"Seconds to {track.target:g}", [run.time_to(track.target) for run in every], "{:,.1f}",
                   1e-3),
           numbers(f"Steps to {track.target:g}", [run.steps_to(track.target) for run in every], "{:,.0f}")]
          if track else []),
        numbers("Peak MiB", [run.peak_mib for run in every], "{:,}"),
        texts("Hardware", [run.hardware for run in every]),
        texts("torch", [run.torch for run in every], "fact"),
        texts("Source", [(run.source_sha256 or "")[:8] for run in every], "fact"),
        texts("Remarks", ["; ".join(log.problems) for _, _, log, _ in rows], limit=200),
    ]
    common = [column for column in columns if len({cell.text for cell in column.cells}) == 1
              and (column.kind != "number" and len(rows) > 1 or not column.cells[0].text)]
    return ([column for column in columns if column not in common],
            [(column.title, column.cells[0].text) for column in common if column.cells[0].text])


def settings_table(groups: list[RunGroup]) -> list[Column]:
    """The settings in which the first runs of the groups differ."""
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_TRAINING)
    keys = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    return [texts("Setting", keys, heads=True), *(
        texts(group.name, [json.dumps(config[key]) if key in config else "" for key in keys], "fact")
        for group, config in zip(groups, configs))] if keys else []


def local_table() -> list[Column]:
    found = [record for track in TRACKS.values() for record in table.local_records(track)]
    why = [shown(f"no record: {record.why_no_record}", 200) if record.why_no_record else ""
           for record in found]
    titles = [Cell(shown(record.description, 120), detail=reason) for record, reason in zip(found, why)]
    losses = [Cell(table.number(runs.loss_mean, 4), detail=f"± {table.number(runs.loss_sd, 4)}")
              for runs in (record.runs for record in found)]
    return [Column("Record", titles, heads=True), texts("Track", [record.track for record in found], "fact"),
            texts("Date", [record.date for record in found], "fact"),
            numbers("Runs", [record.runs.n for record in found]),
            Column("Final loss", losses, "number"),
            numbers("Training seconds", [record.runs.time_ms_mean for record in found], "{:,.2f}", 1e-3),
            texts("Hardware", [record.hardware for record in found])] if found else []


def steps_of(record: history.HistoryRow) -> int | None:
    """Steps of the linked run of a record."""
    if TRACKS[record.track].ranked_by == "steps":
        return int(record.minutes_or_steps)
    runs = sorted(history.runs_of(record), key=lambda run: run.log_path != record.log_path)
    return runs[0].final_step if runs else None


def public_table(rows: list[table.RankedRow]) -> list[Column]:
    records = [row.record for row in rows]
    minutes = [record.minutes_or_steps if TRACKS[record.track].ranked_by == "time" else None
               for record in records]
    links = [tuple((text, url) for text, url in (("log", record.log_url), (f"PR {record.pr}", record.pr_url))
                   if url)
             for record in records]
    return [texts("Track", [record.track for record in records], "fact"),
            numbers("#", [record.number for record in records]),
            numbers("Minutes", minutes),
            numbers("Steps", map(steps_of, records), "{:,}"),
            numbers("Gain, %", [row.percent for row in rows], "{:.1f}"),
            texts("Date", [record.date for record in records], "fact"),
            texts("Record", [record.title for record in records], heads=True, limit=120),
            texts("Contributors", [", ".join(record.contributors) for record in records], limit=200),
            Column("Upstream", [Cell(links=found) for found in links], "fact")]


def public_charts(public: dict[str, list[table.RankedRow]]) -> dict:
    def chart(track, unit, value, **options):
        events = [charts.Event(row.record.date, float(value(row.record)), row.record.number, row.record.title,
                               row.percent or 0)
                  for row in public[track] if row.record.date and value(row.record)]
        return charts.history(events, unit, **options)

    return {"history-small": chart("small", "minutes", lambda record: record.minutes_or_steps, labels=True),
            "history-small-steps": chart("small", "steps", steps_of),
            "history-medium": chart("medium", "minutes", lambda record: record.minutes_or_steps),
            "history-medium-steps": chart("medium", "steps", steps_of),
            "history-optimization": chart("optimization", "steps", steps_of, best_only=True)}


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
    # The page tells the browser to run these two scripts and to load nothing, whatever the logs have smuggled
    # in.
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    return environment.get_template("report.html").render(
        groups=groups, left_out=left_out, track=track, notes=notes, public=public, tracks=TRACKS,
        history=history,
        group_table=group_table(groups, track), run_table=run_table(groups, track) if groups else None,
        settings_table=settings_table(groups) if len(groups) > 1 else [], local_table=local_table(),
        public_table=public_table([row for rows in public.values() for row in rows]), ends=ends,
        charts=drawn.keys(), diff_limit=DIFF_LIMIT, max_groups=MAX_GROUPS, colors=COLORS,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")), scripts=[*map(Markup, scripts)],
        hashes=hashes,
        data=Markup(re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", data)),
        plotly_version=get_plotlyjs_version())


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
