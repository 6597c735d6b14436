"""Write the tables of records into records/README.md between its two marks.

Public records come from records/history, ours from what record.json and the logs in their folders say. Public
times are of many machines and ours of others, so that neither are ranked against the other. With --check
nothing is written, and the exit code is 1 where the page is not what the data say."""
import difflib
from decimal import Decimal
from pathlib import Path

from data.errors import UsageError
from records import check, history, pack, schema
from records.formatting import markdown
from records.tracks import TRACKS, Track

HELP = "the tables of records in records/README.md, from data"
EXAMPLE = "python -m records table --check"

RECORDS = Path(__file__).parent
PAGE = RECORDS / "README.md"
BEGIN, END = "<!-- Tables: written by python -m records table. -->", "<!-- End of the tables. -->"


def history_rows(track: Track) -> list[tuple[history.HistoryRow, Decimal | None]]:
    """The public records of a track by date, each with the minutes or steps that it gained, or None. By time
    each is compared with the row before, be it a retiming, since both are of the same rules; by steps with
    the best before, as the list also holds results that are not the best."""
    rows, before = [], None
    records = [record for record in history.records() if record.track == track.name]
    if track.ranked_by == "steps":
        records.sort(key=lambda record: (record.date, record.number))
    for record in records:
        amount, gain = record.minutes_or_steps, None
        if before is not None and record.kind == "record" and (track.ranked_by == "time" or amount < before):
            gain = before - amount
        rows.append((record, gain))
        before = min(amount, before or amount) if track.ranked_by == "steps" else amount
    return rows


def local_records(track: Track) -> list[tuple[schema.Statement, dict]]:
    """The records in the folders of a track, by date, as said and as the logs say."""
    found = []
    for path in sorted((RECORDS / track.folder).glob(f"*/{schema.FILE}")):  # names begin with the date
        statement = schema.read(path)
        found.append((statement, pack.describe(check.from_folder(path.parent, statement), statement)))
    # On one day the slower comes first: a record is faster than the one before it.
    return sorted(found, key=lambda one: (one[0].date, -(one[1]["runs"]["time_ms_mean"] or 0)))


def link(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url else ""


def number(value: float | None, digits: int, factor: float = 1) -> str:
    return "?" if value is None else f"{value * factor:.{digits}f}"


def public_table(track: Track, rows: list[tuple]) -> list[str]:
    unit = "minutes" if track.ranked_by == "time" else "steps"
    best = min((record for record, _ in rows), key=lambda record: record.minutes_or_steps)
    lines = [f"Public records: {len(rows)} rows, the best with {best.minutes_or_steps} {unit} (number "
             f"{best.number}).", "",
             f"| # | {unit} | gain | date | record | contributors | log | PR |", "|-|-:|-:|-|-|-|-|-|"]
    for r, gained in rows:
        gain = ""
        if gained is not None:
            gain = f"{gained} ({100 * gained / (r.minutes_or_steps + gained):.1f} %)"
        lines.append(f"| {r.number} | {r.minutes_or_steps} | {gain} | {r.date or ''} | {markdown(r.title)} | "
                     f"{markdown(', '.join(r.contributors))} | {link('log', r.log_url)} | "
                     f"{link(r.pr, r.pr_url)} |")
    return lines + [""]


def local_table(records: list[tuple[schema.Statement, dict]]) -> list[str]:
    """Return the table of our records. Gain: mean training time of the baseline on the same machine less that
    of the runs."""
    lines = ["| date | minutes | validation loss | n | steps | gain on the same machine | record | "
             "contributors |",
             "|-|-:|-|-:|-:|-|-|-|"]
    for said, figures in records:
        runs, speed = figures["runs"], figures["speed"]
        gain = ""
        if speed and speed["low_ms"] is not None:
            found = [number(-speed[name], 2, 1e-3) for name in ("difference_ms", "high_ms", "low_ms")]
            gain = "{} s (95 %: {} to {})".format(*found)
        title = link(markdown(said.description), said.folder)
        why = f" (no record: {markdown(said.why_no_record)})" if said.why_no_record else ""
        lines.append(f"| {said.date} | {number(runs['time_ms_mean'], 3, 1 / 60_000)} | "
                     f"{number(runs['loss_mean'], 4)} ± {number(runs['loss_sd'], 4)} | {runs['n']} | "
                     f"{number(runs['step'], 0)} | {gain} | {title}{why} | "
                     f"{markdown(', '.join(said.contributors))} |")
    return lines + [""]


def tables() -> str:
    lines = []
    for track in TRACKS.values():
        rows, local = history_rows(track), local_records(track)
        by = "least training time" if track.ranked_by == "time" else "fewest steps"
        lines += [f"## Track `{track.name}`: {by} to a validation loss of {track.target}", ""]
        if local:
            lines += ["Records of this repository:", "", *local_table(local)]
        if rows:
            lines += public_table(track, rows)
        if not rows and not local:
            lines += ["None yet.", ""]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables up to date."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{PAGE}: expected the lines {BEGIN} and {END}, found at most one; put both where "
                         "the tables belong")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def add_arguments(parser):
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit code 1 if the page is not up to date")


def run(args) -> int:
    try:
        old = PAGE.read_text(encoding="utf-8")
        new = page(old)
        if new != old and not args.check:
            PAGE.write_text(new, encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{PAGE}: expected a page to read and write, found: {e.strerror}; check its "
                         "permissions") from None
    if args.check and new != old:
        print("\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), str(PAGE), "as the data say",
                                             n=0, lineterm="")))
        return 1
    print(f"{PAGE}: {'up to date' if new == old else 'written'}")
    return 0
