"""The charts of report, as plotly figures: the history of records, curves with the spread of seeds, ends of
runs.

Colours of text, axes and grid come from the style sheet of the page, which knows light, dark and print; those
of groups from records/palette.py. Names of groups stand in a legend below a chart, where no line runs through
them. plotly reads a little HTML in its texts, so that whatever comes out of a file is escaped here.
"""
import datetime
import html
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import plotly.graph_objects as go

from records.palette import COLORS, MAX_GROUPS, dashed

GREY = "#808080"
MAX_POINTS = 400  # of a curve: more are thinned out
FEW_POINTS = 40  # of a curve: so few are marked
LOSSES = (1e-3, 1e3)  # that a chart shows; a log can claim any number
SECONDS = (0, 1e9)
LINE = 17  # pixels: height of a line of a label
CHARACTER = 7  # pixels: width of a character of a label
MARGIN = dict(l=48, r=16, t=32, b=48)
LEGEND = dict(orientation="h", x=0, xanchor="left", y=-0.16, yanchor="top")


@dataclass(frozen=True)
class CurveMean:
    """Runs of a group at a step."""
    step: int
    seconds: float | None
    loss: float
    low: float
    high: float
    n: int


def curve(runs) -> list[CurveMean]:
    """Means at each step that half of the runs or more have."""
    points = defaultdict(list)
    for run in runs:
        for point in run.val_points:
            if LOSSES[0] <= point.val_loss <= LOSSES[1]:
                points[point.step].append(point)
    steps = sorted(step for step, found in points.items() if 2 * len(found) >= len(runs))
    if len(steps) > MAX_POINTS:
        steps = [steps[i * (len(steps) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]
    return [mean(step, points[step]) for step in steps]


def mean(step: int, points: list) -> CurveMean:
    losses = [point.val_loss for point in points]
    times = [point.train_time_ms for point in points]
    seconds = None
    if None not in times:
        seconds = sum(times) / len(times) / 1000
        if not SECONDS[0] <= seconds <= SECONDS[1]:
            seconds = None
    return CurveMean(step, seconds, sum(losses) / len(losses), min(losses), max(losses), len(points))


def ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: about four to eight."""
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        values = (step * 10.0 ** power for power in range(-4, 13) for step in steps)
        found = [value for value in values if low <= value <= high]
        if len(found) <= 8:
            break
    if len(found) >= 4:
        return found

    size = 10 ** math.floor(math.log10((high - low) / 4))  # a short axis is nearly linear
    size *= next(step for step in (1, 2, 5, 10) if (high - low) / (size * step) <= 8)
    first = math.ceil(low / size)
    last = math.floor(high / size)
    return [size * i for i in range(first, last + 1)]


def figure(x_title: str, y_title: str, x_range: list, y_range: list, y_log: bool = True,
           height: int = 440) -> go.Figure:
    """An empty chart with its axes; the title of the vertical one stands above it."""
    y = dict(range=y_range)
    if y_log:
        values = ticks(*y_range)
        labels = [f"{value:,.12g}" for value in values]
        y = dict(type="log", range=[*map(math.log10, y_range)], tickvals=values, ticktext=labels)
    title = dict(text=x_title, standoff=10, font=dict(size=13))
    fig = go.Figure(layout=dict(
        template="none",
        height=height,
        margin=MARGIN if x_title else MARGIN | {"b": 40},
        showlegend=False,
        legend=LEGEND,
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(size=13),
        xaxis=dict(title=title, range=x_range, showgrid=False, zeroline=False, separatethousands=True),
        yaxis=dict(automargin=True, zeroline=False, **y),
    ))
    fig.add_annotation(
        text=y_title,
        x=0,
        y=1,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        yshift=8,
        showarrow=False,
    )
    return fig


def on_axis(fig: go.Figure, y: float) -> float:
    """Where plotly wants an annotation: on a logarithmic axis by the logarithm."""
    return math.log10(y) if fig.layout.yaxis.type == "log" else y


def add_target(fig: go.Figure, target: float | None):
    """The line of the target, with its value at the left end below it, where curves are still far above."""
    if target is not None:
        fig.add_hline(y=target, line=dict(color=GREY, width=1, dash="dot"))
        fig.add_annotation(
            text=f"target {target:g}",
            x=0,
            xref="paper",
            y=on_axis(fig, target),
            xanchor="left",
            yanchor="top",
            showarrow=False,
        )


def time_unit(seconds: float) -> tuple[str, float]:
    return ("minutes", 60) if seconds > 1200 else ("seconds", 1)


def loss_curves(groups: list[tuple[str, list[CurveMean]]], by: str, target: float | None) -> go.Figure | None:
    """Loss against "seconds" or "steps" of (name, curve). None where no curve has two points."""
    def x_of(point):
        return point.step if by == "steps" else point.seconds

    curves = [(k, name, [point for point in points if x_of(point) is not None])
              for k, (name, points) in enumerate(groups[:MAX_GROUPS])]
    curves = [(k, name, points) for k, name, points in curves if len(points) > 1]
    if not curves:
        return None
    longest = max(x_of(point) for *_, points in curves for point in points) or 1
    unit, size = ("steps", 1) if by == "steps" else time_unit(longest)

    # The losses before a tenth of the training say little and would take most of the height.
    top = max(next((point.high for point in points if x_of(point) >= 0.1 * longest), points[-1].high)
              for *_, points in curves)
    bottom = min(point.low for *_, points in curves for point in points)
    if target is not None:
        bottom = min(bottom, target)
    pad = max((top / bottom) ** 0.08, 1.001)
    fig = figure("steps" if by == "steps" else f"training time, {unit}", "validation loss, nats per token",
                 [0, longest / size * 1.02], [bottom / pad, max(top, bottom) * pad])
    fig.update_layout(showlegend=True)
    for k, name, points in curves:
        add_curve(fig, k, name, [x_of(point) / size for point in points], points)
    add_target(fig, target)
    return fig


def add_curve(fig: go.Figure, k: int, name: str, x: list[float], points: list[CurveMean]):
    """The mean of group k as a line, in a band from its lowest to its highest run."""
    name = html.escape(name)
    if max(point.n for point in points) > 1:
        around = [point.high for point in points] + [point.low for point in reversed(points)]
        fig.add_scatter(
            x=x + x[::-1],
            y=around,
            fill="toself",
            fillcolor=COLORS[k],
            opacity=0.2,
            mode="lines",
            line=dict(width=0),
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
    fig.add_scatter(
        x=x,
        y=[point.loss for point in points],
        name=name,
        legendgroup=name,
        mode="lines+markers" if len(points) <= FEW_POINTS else "lines",
        line=dict(color=COLORS[k], width=2, dash="dash" if dashed(k) else "solid"),
        marker=dict(size=5),
        text=[f"<b>{name}</b><br>{in_words(point)}" for point in points],
        hoverinfo="text",
    )


def in_words(point: CurveMean) -> str:
    seconds = "" if point.seconds is None else f", {point.seconds:,.1f} s"
    spread = f" ({point.low:.4f} to {point.high:.4f} in {point.n} runs)" if point.n > 1 else ""
    return f"step {point.step:,}{seconds}: loss {point.loss:.4f}{spread}"


def ends_of_runs(groups: list[tuple[str, list]], target: float | None) -> go.Figure | None:
    """Final loss against training time, a dot for each run of (name, runs).

    None without a run that has both.
    """
    ends = [(k, html.escape(name), ends_of(runs)) for k, (name, runs) in enumerate(groups[:MAX_GROUPS])]
    ends = [(k, name, dots) for k, name, dots in ends if dots]
    if not ends:
        return None
    times = [end.seconds for *_, dots in ends for _, end in dots]
    losses = [end.loss for *_, dots in ends for _, end in dots]
    if target is not None:
        losses.append(target)
    unit, size = time_unit(max(times))
    x_pad = 0.06 * (max(times) - min(times)) or 0.05 * max(times) or 1
    y_pad = 0.08 * (max(losses) - min(losses)) or 0.01
    fig = figure(f"training time, {unit}", "final validation loss, nats per token",
                 [(min(times) - x_pad) / size, (max(times) + x_pad) / size],
                 [min(losses) - y_pad, max(losses) + y_pad], y_log=False)
    fig.update_layout(showlegend=True)
    for k, name, dots in ends:
        marker = dict(color=COLORS[k], size=9, opacity=0.75, symbol="diamond" if dashed(k) else "circle")
        text = [f"<b>{name}</b> {html.escape(run_id)}<br>{in_words(end)}" for run_id, end in dots]
        fig.add_scatter(
            x=[end.seconds / size for _, end in dots],
            y=[end.loss for _, end in dots],
            name=name,
            mode="markers",
            marker=marker,
            hoverinfo="text",
            text=text,
        )
    add_target(fig, target)
    return fig


def ends_of(runs: list) -> list[tuple[str, CurveMean]]:
    """(run_id, last validation) of the runs that a chart can show."""
    ends = [(run.run_id, mean(run.final_step, run.val_points[-1:])) for run in runs if run.val_points]
    return [(run_id, end) for run_id, end in ends if end.seconds is not None
            and LOSSES[0] <= end.loss <= LOSSES[1]]


# The history of records

@dataclass(frozen=True)
class Event:
    """A row of a record table in a chart."""
    date: datetime.date
    value: float
    number: int
    title: str
    gain: float  # per cent of the value before; 0 where there is none


def history(events: list[Event], unit: str, best_only: bool = False, labels: bool = False) -> go.Figure:
    """Records by date, as stairs; with best_only these go through the ones below all before, and
    the others are grey dots."""
    first = min(event.date for event in events)
    last = max(event.date for event in events)
    pad = (last - first) * 0.02
    values = [event.value for event in events]
    fig = figure("", unit, [first - pad, last + pad],
                 [min(values) * (0.6 if labels else 0.93), max(values) * 1.07],
                 height=440 if labels else 300)
    stairs = [event for i, event in enumerate(events)
              if not best_only or all(event.value < other.value for other in events[:i])]
    fig.add_scatter(
        x=[event.date for event in stairs] + [last],
        y=[event.value for event in stairs] + [stairs[-1].value],
        mode="lines",
        line=dict(color=COLORS[0], width=1.5, shape="hv"),
        hoverinfo="skip",
    )
    words = [f"<b>{event.number}</b> {html.escape(event.title)}<br>{event.date}: {event.value:,g} {unit}"
             for event in events]
    fig.add_scatter(
        x=[event.date for event in events],
        y=values,
        mode="markers",
        hoverinfo="text",
        text=words,
        marker=dict(size=6, color=[COLORS[0] if event in stairs else GREY for event in events]),
    )
    if labels:
        name_gains(fig, events)
    return fig


def name_gains(fig: go.Figure, events: list[Event]):
    """Name the largest gain of each quarter: above the stairs in the left half, below in the right one, where
    there is room.

    The page shows text and hovertext side by side where it is wide, and else the text alone.
    """
    best = {}
    for event in events:
        quarter = event.date.year, (event.date.month - 1) // 3
        if event.gain >= 1 and (quarter not in best or event.gain > best[quarter].gain):
            best[quarter] = event
    middle = events[0].date + (events[-1].date - events[0].date) / 2
    left, right = ([event for event in best.values() if (event.date < middle) == side]
                   for side in (True, False))
    for chosen, sign in ((left[::-1], 1), (right, -1)):  # the right half is the left one upside down
        boxes = []
        for event in chosen:
            x, y = place(fig, event.date, event.value, width=900)
            boxes.append((sign * x, sign * x + CHARACTER * 50, sign * y))
        for event, lift in zip(chosen, lifts(boxes)):
            title = html.escape(textwrap.shorten(event.title, 50, placeholder=" …"))
            fig.add_annotation(
                x=event.date,
                y=on_axis(fig, event.value),
                ax=sign * 10,
                ay=-sign * (14 + lift),
                text=str(event.number),
                hovertext=title,
                showarrow=True,
                arrowhead=0,
                arrowwidth=1,
                arrowcolor=GREY,
                standoff=4,
                xanchor="left" if sign > 0 else "right",
            )


def place(fig: go.Figure, x, y: float, width: float) -> tuple[float, float]:
    """Pixels of a point from the lower left corner of a plot of this width."""
    x0, x1 = fig.layout.xaxis.range
    y0, y1 = fig.layout.yaxis.range
    margin = fig.layout.margin
    height = fig.layout.height - margin.t - margin.b
    return (x - x0) / (x1 - x0) * width, (on_axis(fig, y) - y0) / (y1 - y0) * height


def lifts(boxes: list[tuple[float, float, float]]) -> list[float]:
    """By how many pixels labels must rise to not cover each other; a box is (left, right, bottom),
    and the first ones stay."""
    placed, result = [], []
    for left, right, bottom in boxes:
        y = bottom
        while hit := [other for other in placed
                      if other[0] < right and left < other[1] and abs(other[2] - y) < LINE - 0.5]:
            # rounding may make it a hair less, and the loop must end
            y = max(other[2] for other in hit) + LINE
        placed.append((left, right, y))
        result.append(y - bottom)
    return result
