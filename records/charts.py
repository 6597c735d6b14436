"""The charts of report, as plotly figures: the history of records, curves with the spread of seeds, ends of runs.

Colours of text, axes and grid come from the style sheet of the page, which knows light, dark and print. Those of groups must do
for all: four of Okabe and Ito's palette, which have a contrast of 3 or more to both backgrounds, then the same dashed and dotted.
plotly reads a little HTML in its texts, so that whatever comes out of a file is escaped here.
"""
import datetime
import html
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import plotly.graph_objects as go

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DASHES = ("solid", "dash", "dot")
LINES, SYMBOLS = "━╍┅", ("circle", "diamond", "square")  # the same as characters, and of dots
MAX_GROUPS = len(COLORS) * len(DASHES)  # that a chart can tell apart
GREY = "#808080"
MAX_POINTS, FEW_POINTS = 400, 40  # of a curve: more are thinned out, fewer are marked
LOSSES, SECONDS = (1e-3, 1e3), (0, 1e9)  # that a chart shows; a log can claim any number
LINE, CHARACTER = 17, 7  # pixels of a label: height of a line, width of a character
MARGIN = dict(l=48, r=16, t=32, b=48)


@dataclass(frozen=True)
class Mean:
    """Runs of a group at a step."""
    step: int
    seconds: float | None
    loss: float
    low: float
    high: float
    n: int


def curve(runs) -> list[Mean]:
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


def mean(step: int, points: list) -> Mean:
    losses = [point.val_loss for point in points]
    times = [point.train_time_ms for point in points]
    seconds = None if None in times else sum(times) / len(times) / 1000
    return Mean(step, seconds if seconds is None or SECONDS[0] <= seconds <= SECONDS[1] else None,
                sum(losses) / len(losses), min(losses), max(losses), len(points))


def color(k: int) -> str:
    return COLORS[k % len(COLORS)]


def swatch(k: int) -> str:
    """A piece of the line of group k, as a character."""
    return LINES[k // len(COLORS)]


def ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: about four to eight."""
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [step * 10.0 ** power for power in range(-4, 13) for step in steps if low <= step * 10.0 ** power <= high]
        if len(found) <= 8:
            break
    if len(found) >= 4:
        return found
    size = 10 ** math.floor(math.log10((high - low) / 4))  # a short axis is nearly linear
    size *= next(step for step in (1, 2, 5, 10) if (high - low) / (size * step) <= 8)
    return [size * i for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def figure(x_title: str, y_title: str, x_range: list, y_range: list, y_log: bool = True, height: int = 440) -> go.Figure:
    y = dict(range=y_range)
    if y_log:
        values = ticks(*y_range)
        y = dict(type="log", range=[*map(math.log10, y_range)], tickvals=values, ticktext=[f"{value:,.12g}" for value in values])
    fig = go.Figure(layout=dict(
        template="none", height=height, margin=MARGIN | ({} if x_title else {"b": 40}), showlegend=False, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font=dict(size=13),
        xaxis=dict(title=dict(text=x_title, standoff=10, font=dict(size=13)), range=x_range, showgrid=False, zeroline=False,
                   separatethousands=True),
        yaxis=dict(automargin=True, zeroline=False, **y)))
    fig.add_annotation(text=y_title, x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", yshift=8,
                       showarrow=False)
    return fig


def on_axis(fig: go.Figure, y: float) -> float:
    """Where plotly wants an annotation: on a logarithmic axis by the logarithm."""
    return math.log10(y) if fig.layout.yaxis.type == "log" else y


def place(fig: go.Figure, x, y: float, width: float) -> tuple[float, float]:
    """Pixels of a point from the lower left corner of a plot of this width."""
    (x0, x1), (y0, y1), margin = fig.layout.xaxis.range, fig.layout.yaxis.range, fig.layout.margin
    return (x - x0) / (x1 - x0) * width, (on_axis(fig, y) - y0) / (y1 - y0) * (fig.layout.height - margin.t - margin.b)


def lifts(boxes: list[tuple[float, float, float]]) -> list[float]:
    """By how many pixels labels must rise to not cover each other; a box is (left, right, bottom), and the first ones stay."""
    placed, result = [], []
    for left, right, bottom in boxes:
        y = bottom
        while hit := [other for other in placed if other[0] < right and left < other[1] and abs(other[2] - y) < LINE - 0.5]:
            y = max(other[2] for other in hit) + LINE  # rounding may make it a hair less, and the loop must end
        placed.append((left, right, y))
        result.append(y - bottom)
    return result


def add_labels(fig: go.Figure, ends: list[tuple[int, str, float, float]], target: float | None):
    """The target's line, and a label above the last point (k, name, x, y) of each group, clear of the line and of each other."""
    if target is not None:
        fig.add_hline(y=target, line=dict(color=GREY, width=1, dash="dot"))
        fig.add_annotation(text=f"target {target:g}", x=0, xref="paper", y=on_axis(fig, target), xanchor="left", yanchor="top",
                           showarrow=False)
    narrow, boxes = 230, []  # pixels: what does not collide on a small phone does not elsewhere
    ends = sorted(ends, key=lambda end: end[3])
    for _, name, x, y in ends:
        (end, bottom), size = place(fig, x, y, narrow), CHARACTER * (len(name) + 4)
        if target is not None and y < target:
            bottom = max(bottom, place(fig, x, target, narrow)[1])
        boxes.append((end - size, end, bottom) if end > narrow / 2 else (end, end + size, bottom))
    for (k, name, x, y), (left, _, bottom), lift in zip(ends, boxes, lifts(boxes)):
        end, height = place(fig, x, y, narrow)
        text = f'<span style="color:{color(k)}">{swatch(k) * 2}</span> {html.escape(name)}'
        fig.add_annotation(x=x, y=on_axis(fig, y), text=text, xanchor="right" if left < end else "left", yanchor="bottom",
                           yshift=bottom - height + lift + 4, showarrow=False)


def time_unit(seconds: float) -> tuple[str, float]:
    return ("minutes", 60) if seconds > 1200 else ("seconds", 1)


def loss_curves(groups: list[tuple[str, list[Mean]]], by: str, target: float | None) -> go.Figure | None:
    """Loss against "seconds" or "steps" of (name, curve). None where no curve has two points."""
    x_of = (lambda point: point.step) if by == "steps" else (lambda point: point.seconds)
    groups = [(k, name, [point for point in points if x_of(point) is not None])
              for k, (name, points) in enumerate(groups[:MAX_GROUPS])]
    groups = [(k, name, points) for k, name, points in groups if len(points) > 1]
    if not groups:
        return None
    longest = max(x_of(point) for *_, points in groups for point in points) or 1
    unit, size = ("steps", 1) if by == "steps" else time_unit(longest)
    # The losses before say little and would take most of the height.
    top = max(next((point.high for point in points if x_of(point) >= 0.1 * longest), points[-1].high) for *_, points in groups)
    bottom = min(point.low for *_, points in groups for point in points)
    bottom = bottom if target is None else min(bottom, target)
    pad = max((top / bottom) ** 0.08, 1.001)
    fig = figure("steps" if by == "steps" else f"training time, {unit}", "validation loss, nats per token",
                 [0, longest / size * 1.02], [bottom / pad, max(top, bottom) * pad])
    for k, name, points in groups:
        x = [x_of(point) / size for point in points]
        if max(point.n for point in points) > 1:
            fig.add_scatter(x=x + x[::-1], y=[point.high for point in points] + [point.low for point in reversed(points)],
                            fill="toself", fillcolor=color(k), opacity=0.2, mode="lines", line=dict(width=0), hoverinfo="skip")
        fig.add_scatter(x=x, y=[point.loss for point in points], mode="lines+markers" if len(points) <= FEW_POINTS else "lines",
                        line=dict(color=color(k), width=2, dash=DASHES[k // len(COLORS)]), marker=dict(size=5),
                        text=[f"<b>{html.escape(name)}</b><br>{in_words(point)}" for point in points], hoverinfo="text")
    add_labels(fig, [(k, name, x_of(points[-1]) / size, points[-1].loss) for k, name, points in groups], target)
    return fig


def in_words(point: Mean) -> str:
    seconds = "" if point.seconds is None else f", {point.seconds:,.1f} s"
    spread = f" ({point.low:.4f} to {point.high:.4f} in {point.n} runs)" if point.n > 1 else ""
    return f"step {point.step:,}{seconds}: loss {point.loss:.4f}{spread}"


def ends_of_runs(groups: list[tuple[str, list]], target: float | None) -> go.Figure | None:
    """Final loss against training time, a dot for each run of (name, runs). None without a run that has both."""
    groups = [(k, name, [(run.run_id, end) for run in runs if run.val_points
                         and (end := mean(run.final_step, run.val_points[-1:])).seconds is not None
                         and LOSSES[0] <= end.loss <= LOSSES[1]]) for k, (name, runs) in enumerate(groups[:MAX_GROUPS])]
    groups = [(k, name, dots) for k, name, dots in groups if dots]
    if not groups:
        return None
    times, losses = ([getattr(end, key) for *_, dots in groups for _, end in dots] for key in ("seconds", "loss"))
    losses += [] if target is None else [target]
    unit, size = time_unit(max(times))
    x_pad, y_pad = 0.06 * (max(times) - min(times)) or 0.05 * max(times) or 1, 0.08 * (max(losses) - min(losses)) or 0.01
    x_range = [(min(times) - x_pad) / size, (max(times) + x_pad) / size]
    y_range = [min(losses) - y_pad, max(losses) + y_pad * (1 + len(groups))]  # with room for labels above each other
    fig = figure(f"training time, {unit}", "final validation loss, nats per token", x_range, y_range, y_log=False)
    for k, name, dots in groups:
        fig.add_scatter(x=[end.seconds / size for _, end in dots], y=[end.loss for _, end in dots], mode="markers",
                        marker=dict(color=color(k), size=9, opacity=0.75, symbol=SYMBOLS[k // len(COLORS)]), hoverinfo="text",
                        text=[f"<b>{html.escape(name)}</b> {html.escape(run_id)}<br>{in_words(end)}" for run_id, end in dots])
    add_labels(fig, [(k, name, sum(end.seconds for _, end in dots) / len(dots) / size, max(end.loss for _, end in dots))
                     for k, name, dots in groups], target)
    return fig


@dataclass(frozen=True)
class Event:
    """A row of a record table in a chart."""
    date: datetime.date
    value: float
    number: int
    title: str
    gain: float  # per cent of the value before; 0 where there is none


def history(events: list[Event], unit: str, best_only: bool = False, labels: bool = False) -> go.Figure:
    """Records by date, as stairs; with best_only these go through the ones below all before, and the others are grey dots."""
    first, last = min(event.date for event in events), max(event.date for event in events)
    pad, values = (last - first) * 0.02, [event.value for event in events]
    fig = figure("", unit, [first - pad, last + pad], [min(values) * (0.6 if labels else 0.93), max(values) * 1.07],
                 height=440 if labels else 300)
    stairs = [event for i, event in enumerate(events) if not best_only or all(event.value < other.value for other in events[:i])]
    fig.add_scatter(x=[event.date for event in stairs] + [last], y=[event.value for event in stairs] + [stairs[-1].value],
                    mode="lines", line=dict(color=COLORS[0], width=1.5, shape="hv"), hoverinfo="skip")
    fig.add_scatter(x=[event.date for event in events], y=values, mode="markers", hoverinfo="text",
                    marker=dict(size=6, color=[COLORS[0] if event in stairs else GREY for event in events]),
                    text=[f"<b>{event.number}</b> {html.escape(event.title)}<br>{event.date}: {event.value:,g} {unit}"
                          for event in events])
    if labels:
        name_gains(fig, events)
    return fig


def name_gains(fig: go.Figure, events: list[Event]):
    """Name the largest gain of each quarter: above the stairs in the left half, below them in the right one, where there is room.
    The page shows text and hovertext side by side where it is wide, and else the text alone."""
    best = {}
    for event in events:
        quarter = event.date.year, (event.date.month - 1) // 3
        if event.gain >= 1 and (quarter not in best or event.gain > best[quarter].gain):
            best[quarter] = event
    middle = events[0].date + (events[-1].date - events[0].date) / 2
    left, right = ([event for event in best.values() if (event.date < middle) == side] for side in (True, False))
    for chosen, sign in ((left[::-1], 1), (right, -1)):  # the right half is the left one upside down
        boxes = []
        for event in chosen:
            x, y = place(fig, event.date, event.value, width=900)
            boxes.append((sign * x, sign * x + CHARACTER * 50, sign * y))
        for event, lift in zip(chosen, lifts(boxes)):
            fig.add_annotation(x=event.date, y=on_axis(fig, event.value), ax=sign * 10, ay=-sign * (14 + lift),
                               text=str(event.number), hovertext=html.escape(textwrap.shorten(event.title, 50, placeholder=" …")),
                               showarrow=True, arrowhead=0, arrowwidth=1, arrowcolor=GREY, standoff=4,
                               xanchor="left" if sign > 0 else "right")
