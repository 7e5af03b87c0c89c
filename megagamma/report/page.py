"""One HTML file: text, tables, figures with their data, and the library that draws them."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagamma import __version__
from megagamma.planning.flops import parameter_counts
from megagamma.report import activations, answers, figures, outcomes, spectra
from megagamma.report.figures import Figure
from megagamma.report.runs import Arm, ReportRun, arms, describe
from megagamma.report.sentences import sentences

_STYLE = """
:root { --ink: #1b1f24; --faint: #57606a; --ground: #ffffff; --line: #d0d7de; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --ground: #0d1117; --line: #30363d; --card: #161b22; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto; max-width: 1080px;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { margin-bottom: .2rem; } p.reading, footer { color: var(--faint); font-size: .92rem; margin: .2rem 0; }
ul.seen { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem .8rem 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; white-space: nowrap; }
.plot { width: 100%; min-height: 320px; overflow: hidden; } a { color: inherit; } .note { color: #b35900; }
@media print { body { max-width: none; } .plot { break-inside: avoid; } .modebar, a.data { display: none; } }
"""
_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function themed(layout) {
  const look = getComputedStyle(document.documentElement), get = name => look.getPropertyValue(name).trim();
  const all = {...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: get("--ink"), size: 12}, margin: {l: 55, r: 15, t: 60, b: 45, ...(layout.margin || {})},
    legend: {orientation: "h", y: -0.22, ...(layout.legend || {})}, hovermode: "closest"};
  const names = new Set(["xaxis", "yaxis", ...Object.keys(layout).filter(key => /^[xy]axis/.test(key))]);
  for (const name of names)
    all[name] = {gridcolor: get("--line"), zerolinecolor: get("--faint"), automargin: true, ...(layout[name] || {})};
  all.modebar = {bgcolor: "rgba(0,0,0,0)", color: get("--faint"), activecolor: get("--ink")};
  all.updatemenus = (layout.updatemenus || []).map(one => ({...one, bgcolor: get("--card"), bordercolor: get("--line")}));
  return all;
}
const figures = JSON.parse(document.getElementById("figures").textContent);
function draw() {
  figures.forEach((one, index) => Plotly.react(`plot-${index}`, one.traces, themed(one.layout),
    {responsive: true, displaylogo: false, displayModeBar: innerWidth < 600 ? false : "hover",
     toImageButtonOptions: {format: "svg"}}));
}
draw();
dark.addEventListener("change", draw);
document.body.dataset.drawn = figures.length;
"""


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_escape(row.get(column, ''))}</td>" for column in columns) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def csv_of(figure: Figure) -> str:
    """A figure's data as CSV."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows([_rounded(value) for value in row] for row in figure.rows)
    return output.getvalue()


def _figure(number: int, figure: Figure) -> str:
    data = base64.b64encode(csv_of(figure).encode()).decode()
    height = figure.layout.get("height", 420)
    return (
        f"<h3>{_escape(figure.title)}</h3><p class='reading'>{_escape(figure.reading)} "
        f"<a class='data' download='figure-{number}.csv' href='data:text/csv;base64,{data}'>Data as CSV</a></p>"
        f"<div class='plot' id='plot-{number}' style='height:{height}px' role='img' aria-label='{_escape(figure.title)}'></div>"
    )


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _clean(value: Any) -> Any:
    """Numbers as short as they are drawn; what is not finite becomes a gap."""
    if isinstance(value, float):
        return _rounded(value) if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    return [_clean(one) for one in value] if isinstance(value, list | tuple) else value


def sections(found: Sequence[Arm]) -> list[tuple[str, list[Figure]]]:
    """Headings and their figures; a heading without any is left out."""
    several = [
        figure
        for name in sorted({name for arm in found for run in arm.runs for name in run.validation_names})
        if len(found) > 1 and (figure := figures.differences(found, name)) is not None
    ]
    random = "The dotted line is a random matrix of the same shape. Means over a role's matrices and over seeds."
    weights = [
        figures.by_role(
            found, "condensation", "Condensation: mean |cosine| between neurons",
            "Above the dotted line neurons point the same way. A rise is condensation, a later fall expansion; the star is "
            f"where one turns into the other. {random}",
        ),
        figures.by_role(found, "stable_rank", "Stable rank", f"How many directions carry a matrix's energy. {random}"),
        figures.by_role(found, "effective_rank", "Effective rank", f"How many directions a matrix uses at all. {random}"),
        spectra.peaks(found),
        spectra.spectra(found),
        figures.cosine_maps(found),
        *spectra.embeddings(found),
    ]  # fmt: skip
    motion = [
        figures.by_role(
            found, "relative_distance", "Distance from the start, over the norm of the start",
            "1: a matrix has moved as far as it was long. The start is redrawn from the seed.", log_y=True,
        ),
        figures.by_role(
            found, "update_over_drawn_std", "An update over the std that was drawn",
            "How large a step is beside what was drawn: at gamma 1 the first ones are large by design.", log_y=True,
        ),
        figures.by_role(found, "gradient_norm", "Gradient norm", "Of a role's matrices together, before clipping.", log_y=True),
    ]  # fmt: skip
    said = answers.answers(found)
    all_of = [
        ("Answers", [said] if said is not None else []),
        ("Loss", [*figures.losses(found), *several]),
        ("How weights condense and expand", [one for one in weights if one is not None]),
        (
            "What flows through the model",
            [one for one in (activations.over_training(found), activations.by_layer(found)) if one is not None],
        ),
        ("How weights move", [one for one in motion if one is not None]),
        (
            "What came out",
            [one for one in (outcomes.token_gains(found), outcomes.scores(found)) if one is not None],
        ),
    ]
    return [(heading, drawn) for heading, drawn in all_of if drawn]


def _runs_table(found: Sequence[Arm]) -> str:
    rows = []
    for arm in found:
        for run in arm.runs:
            about = describe(run.config) | {"parameters": f"{parameter_counts(run.config.model).total:,}"}
            last = run.metrics[-1]
            rows.append(
                {
                    "arm": arm.label, "run": run.name, "seed": run.seed, **about, "steps": last["step"],
                    "tokens": f"{last['tokens']:,}", "hours": f"{last.get('seconds', 0) / 3600:.2f}",
                }
            )  # fmt: skip
    return _table(rows)


def _provenance(runs: Sequence[ReportRun]) -> str:
    rows = []
    for run in runs:
        try:
            about = run.folder.read_provenance()
        except Exception:  # noqa: BLE001 - a run without it is shown all the same
            about = {}
        resolved = run.folder.chosen()
        rows.append(
            {
                "run": run.name, "command": " ".join(map(str, about.get("command", []))) or "not recorded",
                "commit": str(about.get("git", {}).get("commit", ""))[:12] if isinstance(about.get("git"), dict) else "",
                "dtype": resolved.get("dtype", ""), "device": resolved.get("device", ""), "folder": run.folder.path,
            }
        )  # fmt: skip
    return _table(rows)


def page(runs: Sequence[ReportRun], title: str, recorded: Sequence[Figure] = ()) -> str:
    """The whole file.

    Args:
        recorded: figures of other runs, shown as such.

    Raises:
        ConfigurationError: one run is given twice.
    """
    import plotly.offline

    found, options = arms(runs)
    drawn: list[dict[str, Any]] = []
    body: list[str] = []
    others = [("Recorded earlier, by other runs", list(recorded))] if recorded else []
    for heading, here in (*sections(found), *others):
        body.append(f"<h2>{_escape(heading)}</h2>")
        for figure in here:
            body.append(_figure(len(drawn), figure))
            drawn.append({"traces": _clean(figure.traces), "layout": _clean(figure.layout)})
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    differ = (
        f"Arms differ in {', '.join(options)}." if options else "Runs of one arm: they differ in their seed at most."
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_escape(title)}</h1><p class='reading'>{_escape(differ)}</p>",
        "<ul class='seen'>" + "".join(f"<li>{_escape(one)}</li>" for one in sentences(found)) + "</ul>",
        "".join(f"<p class='note'>{_escape(note)}</p>" for note in notes),
        "<h2>What was trained</h2>",
        _runs_table(found),
        *body,
        "<h2>Where it comes from</h2>",
        _provenance(runs),
        f"<footer>megagamma {__version__}. Formulas and sources: docs/dynamics.md.</footer>",
        f"<script type='application/json' id='figures'>{_json(drawn)}</script>",
        f"<script>{plotly.offline.get_plotlyjs()}</script><script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def write(runs: Sequence[ReportRun], output: Path, title: str, recorded: Sequence[Figure] = ()) -> None:
    """Write the page, atomically; `recorded` as in `page`.

    Raises:
        MegagammaError: it cannot be written.
    """
    from megagamma.files import write_text

    write_text(output, page(runs, title, recorded))
