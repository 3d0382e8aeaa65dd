"""One run, or several over each other, as one interactive page: no network, phone or desk, dark or light.

Drawn by plotly.js, which stands in the file. Of one run: the map of activity (hover a cell for its numbers),
every resource against its reference and budget, price, loss, units that left and came back, widths before and
after, what was saved, what was left alone and why. Of several: the same curves together, a row per run.

    saved    share of a dense run's forward FLOPs that was not computed        (loop/telling.py)
    energy   CPU seconds of the process × the stated watts; other work of the process is in it
    carbon   energy × the stated grams per kWh
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loop.history import History
from ..loop.telling import saved_share
from ..state.files import replacing

__all__ = ["Assumed", "page", "write_page"]

COLOURS = ("#1f77b4", "#d1701f", "#2f8f4e", "#8a4fa3", "#a8862a", "#c24b5a")
GROUPS = {  # an axis of names, also where they are numbers
    "type": "category",
    "autorange": "reversed",
    "automargin": True,
    "tickfont": {"size": 9},
}
JOULES_PER_KWH = 3.6e6
Figure = tuple[str, str, list[dict[str, Any]], dict[str, Any]]  # id, title, traces, layout


@dataclass(frozen=True)
class Assumed:
    """What the page cannot know: the machine's power, and what a kWh emits where it stands."""

    watts: float | None = None
    grams_per_kwh: float = 400.0


def write_page(histories: Mapping[str, History], path: str | Path, assumed: Assumed | None = None) -> Path:
    """The page of these runs (name -> history) at `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(page(histories, assumed or Assumed()), encoding="utf-8")
    return path


def page(histories: Mapping[str, History], assumed: Assumed) -> str:
    from plotly.offline import get_plotlyjs

    empty = [name for name, history in histories.items() if len(history) == 0]
    if empty or not histories:
        raise ValueError(f"history of {', '.join(empty) or 'no run'}: no update was recorded")
    alone = len(histories) == 1
    figures = [*(_map(name, h) for name, h in histories.items()), *_curves(histories)]
    if alone:
        figures += [_widths(*histories.values())]
    spec = {key: {"data": traces, "layout": layout} for key, _, traces, layout in figures}
    sections = "".join(
        f'<section><h2>{html.escape(title)}</h2><div class="plot" id="{key}"></div></section>'
        for key, title, _, _ in figures
    )
    title = "What the controller did" + ("" if alone else f": {len(histories)} runs")
    return TEMPLATE.format(
        title=html.escape(title),
        facts=_facts(histories, assumed),
        sections=sections,
        refused="".join(_refused(name, h, alone) for name, h in histories.items()),
        plotly=get_plotlyjs(),
        spec=json.dumps(spec, allow_nan=False).replace("</", "<\\/"),
    )


# --- figures ----------------------------------------------------------------------------------------------


def _steps(history: History) -> list[int]:
    return [row.step for row in history]


def _map(name: str, history: History) -> Figure:
    """Share of each group's units that is on; the hover names units and step."""
    sizes = history.sizes
    z = [[row.active[g] / n for row in history] for g, n in enumerate(sizes)]
    text = [[f"{row.active[g]} of {n}, {row.widths[g]} in the tensors" for row in history]
            for g, n in enumerate(sizes)]  # fmt: skip
    trace = {
        "type": "heatmap", "x": _steps(history), "y": list(history.names), "z": z, "text": text,
        "zmin": 0, "zmax": 1, "colorscale": "Viridis", "colorbar": {"tickformat": ".0%", "thickness": 10},
        "hovertemplate": "%{y}<br>step %{x}: %{z:.0%} on (%{text})<extra></extra>",
    }  # fmt: skip
    events = [
        {"x": row.step, "y": 1.0, "yref": "paper", "text": sign, "showarrow": False, "yanchor": "bottom"}
        for row in history
        for kind, sign in (("shrink", "▼"), ("expand", "▲"))
        if kind in row.event.split(",")
    ]
    layout = {
        "height": max(220, 60 + 16 * len(sizes)),
        "yaxis": GROUPS,
        "xaxis": {"title": {"text": "optimizer step"}},
        "annotations": events,
    }
    return f"map-{_key(name)}", f"Active units of each group: {name} (▼ shrunk, ▲ expanded)", [trace], layout


def _curves(histories: Mapping[str, History]) -> list[Figure]:
    """Resource, price, loss and switches, every run in its colour."""
    resources, prices, losses, switches = [], [], [], []
    for colour, (name, history) in zip(_cycle(len(histories)), histories.items(), strict=True):
        x, rows = _steps(history), list(history)
        shades = zip(_cycle(len(rows[-1].realised)), rows[-1].realised, strict=True)
        for shade, resource in shades:
            pen = shade if len(histories) == 1 else colour
            label = resource if len(histories) == 1 else f"{name}: {resource}"
            resources += [
                _line(x, [r.realised.get(resource) for r in rows], f"{label} in use", pen),
                _line(x, [r.reference.get(resource) for r in rows], f"{label} reference", pen, dash="dash"),
            ]
            if resource in history.budget:
                ends, limit = [0, history.total_steps], history.budget[resource]
                resources.append(_line(ends, [limit, limit], f"{label} budget", pen, dash="dot"))
            prices.append(_line(x, [r.price.get(resource) or None for r in rows], label, pen))
        losses.append(_line(x, [r.loss for r in rows], name, colour))
        switches += [
            {"type": "bar", "x": x, "y": [sum(r.on) for r in rows], "name": f"{name}: came back",
             "marker": {"color": "#2f8f4e"}},
            {"type": "bar", "x": x, "y": [-sum(r.off) for r in rows], "name": f"{name}: left",
             "marker": {"color": "#b3402f"}},
        ]  # fmt: skip
    step = {"xaxis": {"title": {"text": "optimizer step"}}}
    return [
        ("resources", "Resource use, of dense", resources, {**step, "yaxis": {"tickformat": ".0%"}}),
        ("price", "Price (of a budget: relative)", prices, {**step, "yaxis": {"type": "log"}}),
        ("loss", "Training loss", losses, step),
        ("switches", "Units switched", switches, {**step, "barmode": "relative", "bargap": 0}),
    ]


def _widths(history: History) -> Figure:
    last, names = history[-1], list(history.names)
    traces = [
        {"type": "bar", "orientation": "h", "y": names, "x": list(history.sizes), "name": "dense",
         "marker": {"color": "rgba(140,140,140,.45)"}},
        {"type": "bar", "orientation": "h", "y": names, "x": list(last.active), "name": "at the end",
         "marker": {"color": COLOURS[0]}},
    ]  # fmt: skip
    layout = {
        "barmode": "overlay",
        "height": max(220, 80 + 16 * len(names)),
        "yaxis": GROUPS,
        "xaxis": {"title": {"text": "units"}},
    }
    return "widths", "Widths before and after", traces, layout


def _line(x: Sequence[float], y: Sequence[float | None], name: str, colour: str, dash: str = "solid") -> Any:
    kept = [value if value is not None and math.isfinite(value) else None for value in y]
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": kept, "name": name,
            "line": {"color": colour, "dash": dash, "width": 2}}  # fmt: skip


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# --- words ------------------------------------------------------------------------------------------------


def _facts(histories: Mapping[str, History], assumed: Assumed) -> str:
    rows = [_fact(name, history, assumed) for name, history in histories.items()]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _fact(name: str, history: History, assumed: Assumed) -> dict[str, str]:
    last, saved = history[-1], saved_share(history)
    uses = ", ".join(
        f"{key} {100 * value:.1f} %"
        + (f" (budget {100 * history.budget[key]:.0f} %)" if key in history.budget else "")
        for key, value in last.realised.items()
    )
    found = {
        "run": name,
        "steps": f"{last.step} of {history.total_steps}",
        "at the end, of dense": uses,
        "units on": f"{sum(last.active)} of {sum(history.sizes)}",
        "forward FLOPs saved over the run": "–" if saved is None else f"{100 * saved:.1f} %",
        "controller": f"{last.overhead_seconds:.1f} s CPU",
        "process since attach, other work included": f"{last.seconds:.1f} s CPU",
    }
    if assumed.watts is not None:
        joules = last.seconds * assumed.watts
        grams = joules / JOULES_PER_KWH * assumed.grams_per_kwh
        found[f"energy at {assumed.watts:g} W"] = f"{joules:.3g} J"
        found[f"carbon at {assumed.grams_per_kwh:g} g/kWh"] = f"{grams:.3g} g"
    return found


def _refused(name: str, history: History, alone: bool) -> str:
    if not history.refused:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(where)}</td><td>{size}</td><td>{html.escape(reason)}</td></tr>"
        for where, size, reason in history.refused
    )
    title = "Left alone, and why" + ("" if alone else f": {html.escape(name)}")
    return (
        f'<section id="refused"><h2>{title}</h2><div class="wide"><table><tr><th>tensor</th><th>units</th>'
        f"<th>reason</th></tr>{rows}</table></div></section>"
    )


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>
:root {{ --ink: #1c1e21; --paper: #ffffff; --rule: #d8dadd; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e7e9; --paper: #15171a; --rule: #3a3d42; }} }}
body {{ margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.35rem; }} h2 {{ font-size: 1rem; margin: 1.6rem 0 .2rem; }}
.wide {{ overflow-x: auto; }} .plot {{ width: 100%; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: left; padding: .25rem .6rem; vertical-align: top;
          border-bottom: 1px solid var(--rule); }}
</style>
<script>{plotly}</script></head>
<body><h1>{title}</h1>{facts}{sections}{refused}
<script>
const figures = {spec};
const dark = matchMedia("(prefers-color-scheme: dark)");
function colours() {{
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), rule = style.getPropertyValue("--rule").trim();
  return {{ "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
           "modebar.bgcolor": "rgba(0,0,0,0)", "xaxis.gridcolor": rule, "yaxis.gridcolor": rule,
           "xaxis.zerolinecolor": rule, "yaxis.zerolinecolor": rule }};
}}
const shared = {{ height: 300, margin: {{ l: 55, r: 15, t: 25, b: 45 }}, hovermode: "closest",
                 legend: {{ orientation: "h", y: -0.25 }} }};
const drawn = Object.entries(figures).map(([key, figure]) =>
  Plotly.newPlot(key, figure.data, {{ ...shared, ...figure.layout }},
                 {{ responsive: true, displaylogo: false }})
    .then(() => Plotly.relayout(key, colours())));
dark.addEventListener("change", () => Object.keys(figures).forEach(key => Plotly.relayout(key, colours())));
Promise.all(drawn).then(() => {{ document.body.dataset.drawn = drawn.length; }});
</script></body></html>
"""
