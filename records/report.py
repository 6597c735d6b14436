"""Write what compare says to one page, with the curves, a table of all runs, and the changes of the sources.

PATHs and groups are those of compare. The page is a single file, needs no network, loads nothing and runs
nothing. What comes out of logs is shown."""
import base64
import io
from pathlib import Path

import jinja2
from markupsafe import Markup

from data.errors import UsageError
from records import charts, compare, show
from records.difference import differences
from records.formatting import TEMPLATES, Grid, printable, short_name
from records.groups import RunGroup

HELP = "what compare says as one page, with charts, all runs and the changes of their sources"
EXAMPLE = ("python -m records report records/track_0_laptop/2026-11-22_AdamW "
           "records/track_0_laptop/2026-11-22_Muon -o logs/report.html")

DIFF_LIMIT = 400  # lines shown of the difference of a file


def add_arguments(parser):
    compare.add_group_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE",
                        help="the page (report.html)")


def run(args) -> int:
    output = args.output
    if output.suffix != ".html":  # so that a log that was meant to be read is not written over
        raise UsageError(f"-o: expected a name that ends in .html, found {output}; add it")
    found = compare.examine(args)
    text = page(found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UsageError(f"-o: expected to write {output}, found: {e.strerror}; choose another "
                         "place") from None
    print(printable(f"{output}: {sum(len(group.runs) for group in found.groups)} runs in {len(found.groups)} "
                    f"groups, {output.stat().st_size / 1e6:.1f} MB"))
    return 0


def page(found: compare.Comparison) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = lambda text, limit=400: printable(str(text), limit)
    runs, common = run_grid(found.groups, found.target)
    first, *others = found.groups
    return environment.get_template("report.html").render(
        found=found,
        runs=runs,
        common=common,
        chart=chart(found.groups, found.target),
        drawn=len(charts.COLORS),
        changes=[differences(first.sources, group.sources) for group in others],
        diff_limit=DIFF_LIMIT,
        kinds={"+": "added", "-": "removed", "@": "place", " ": "same"},
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )


def chart(groups: list[RunGroup], target: float) -> str:
    """Return the chart as a data address, in which no script runs."""
    picture = io.BytesIO()
    charts.save(groups[:len(charts.COLORS)], target, picture, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()


def run_grid(groups: list[RunGroup], target: float) -> tuple[Grid, str]:
    """Return a table of all runs that count, with the oddities of their logs, and what they have in
    common."""
    rows = [[group.name, *show.run_row(short_name(run.run_id), run, target), (run.source_sha256 or "")[:8],
             "; ".join(log.problems)]
            for group in groups for log in group.logs for run in log.runs if run.val_points]
    return Grid(["group", *show.RUN_TITLES, "source", "remarks"], rows).without_common()
