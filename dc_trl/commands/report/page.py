# SPDX-License-Identifier: Apache-2.0
"""The report's HTML. Everything that a run says of itself is untrusted text and goes through `records.text`
or `report.text`."""

import base64
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.resources import files
from string import Template
from typing import Any

from dc_trl import __version__
from dc_trl.commands.report.charts import COLORS, calibrated_until, figure, halvings, never_logged
from dc_trl.commands.report.panels import MAIN_PANELS, STYLES, TAIL_PANELS, Panel, rejection_panel
from dc_trl.commands.report.text import duration, embedded_json, number
from dc_trl.commands.report.tokens.completions import COMPLETIONS
from dc_trl.commands.report.tokens.figures import POINTS
from dc_trl.commands.report.tokens.view import STEPS, TOKENS, TokenView
from dc_trl.commands.report.verdict.strip import strip
from dc_trl.records.run_columns import RunColumns
from dc_trl.records.run_reader import is_finite
from dc_trl.records.text import escaped, visible
from dc_trl.rollouts.engines import engine_name
from dc_trl.rollouts.shown import shown

# Column of the summary, and the key whose last value stands in it.
_SUMMARY = {
    "reward": "reward",
    "discrepancy": "dc/discrepancy/mean",
    "tolerance": "dc/tolerance",
    "multiplier": "dc/multiplier",
    "penalty share": "dc/penalty_share",
    "entropy": "entropy",
}

_ROWS = 3  # of a panel, which the usual height has room for

_CLICKED = '<span class="hint">Click in a chart to see the tokens of the nearest step that has them.</span>'


def render(runs: list[RunColumns], ages: list[float], view: TokenView, plotly: str) -> str:
    """The whole page.

    Args:
        runs: one or more; two of one name cannot be told apart.
        ages: seconds since each run's log was last written.
        view: the token logs.
        plotly: plotly.js, which goes into the page.
    """
    rejection = rejection_panel(key for run in runs for key in run.drawable)
    main = _drawn((*MAIN_PANELS, *filter(None, [rejection])), runs)
    tail = _drawn(TAIL_PANELS, runs)
    data = {
        "figures": {panel.name: drawn for panel, drawn in (*main, *tail)},
        "runs": [visible(run.name) for run in runs],
        "steps": view.steps,
    }
    scripts = [_normalised(plotly), _part("charts.js"), _part("tokens/tokens.js")]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return Template(_part("report.html")).substitute(
        policy=_policy(scripts),
        title=escaped(title),
        style=_part("report.css"),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=escaped(__version__),
        head=_head(runs),
        verdicts=strip(runs),
        summary=_summary(runs, ages),
        main="\n".join(_panel(panel, drawn, runs) for panel, drawn in main),
        tail="\n".join(_panel(panel, drawn, runs) for panel, drawn in tail),
        main_absent=_absent(MAIN_PANELS, main, runs),
        tail_absent=_absent(TAIL_PANELS, tail, runs),
        tokens=_tokens(view),
        chart_hint=_CLICKED if view.steps else "",
        settings=_settings(runs),
        data=embedded_json(data),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _part(name: str) -> str:
    return files("dc_trl.commands.report").joinpath(name).read_text(encoding="utf-8")


def _normalised(script: str) -> str:
    """As a browser reads it, which is what the policy's hash is taken of."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: Iterable[str]) -> str:
    """Content security policy: these scripts and no other, nothing from anywhere; plotly needs inline styles."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


# The head of the page


def _head(runs: list[RunColumns]) -> str:
    """Title and the settings that matter most."""
    if len(runs) > 1:
        return f"<h1>{len(runs)} runs compared</h1>"
    run = runs[0]
    facts = {"model": run.start.get("model"), "constraint": run.settings.get("constraint")}
    facts["engine"] = _engine(run.settings) if run.settings else ""
    chips = "".join(f"<li><span>{name}</span> {escaped(value)}</li>" for name, value in facts.items() if value)
    return f'<h1>{escaped(run.name)}</h1><ul class="chips">{chips}</ul>'


def _engine(settings: dict[str, Any]) -> str:
    try:
        return engine_name(settings)
    except (ValueError, TypeError, AttributeError):  # settings that no configuration would have
        return "not known"


def _summary(runs: list[RunColumns], ages: list[float]) -> str:
    """One row a run: where it stands, and its last values."""
    names = ["run", "step", *_SUMMARY, "last entry"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(_summary_row(index, run, age) for index, (run, age) in enumerate(zip(runs, ages, strict=True)))
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _summary_row(index: int, run: RunColumns, age: float) -> str:
    cells = {"step": _progress(run)} | {name: number(run.last(key)) for name, key in _SUMMARY.items()}
    mean = run.last("dc/discrepancy/mean")
    tolerance = run.last("dc/tolerance")
    if is_finite(mean) and is_finite(tolerance) and tolerance > 0:
        side = "above" if mean > tolerance else "within"
        cells["discrepancy"] += f'<small class="{side}">{mean / tolerance:.0%} of tolerance</small>'
    elif tolerance is None and calibrated_until(run) is not None:
        cells["tolerance"] = "<small>being calibrated</small>"
    cells["last entry"] = f"{duration(age)}<small>before this page was made</small>"
    columns = "".join(f'<td data-name="{name}">{value}</td>' for name, value in cells.items())
    swatch = f'<i class="swatch" style="background:var(--run-{index % COLORS})"></i>'
    return f'<tr><th scope="row">{swatch}<span>{escaped(run.name)}</span></th>{columns}</tr>'


def _progress(run: RunColumns) -> str:
    done = run.last("step") or 0
    total = run.start.get("max_steps") or 0
    if total <= 0:
        return number(done)
    return f'{number(done)} of {number(total)}<progress value="{done}" max="{total}" aria-hidden="true"></progress>'


# Panels


def _drawn(panels: Iterable[Panel], runs: list[RunColumns]) -> list[tuple[Panel, dict[str, Any]]]:
    """The panels that have data, with their figures."""
    figures = [(panel, figure(panel, runs)) for panel in panels]
    return [(panel, drawn) for panel, drawn in figures if drawn is not None]


def _absent(panels: Iterable[Panel], drawn: list[tuple[Panel, dict[str, Any]]], runs: list[RunColumns]) -> str:
    """What was never logged and would have had a panel of its own, with what it needs."""
    shown = [panel for panel, _ in drawn]
    needs: dict[str, list[str]] = {}
    for panel in panels:
        if panel not in shown:
            keys = never_logged(panel, runs)
            needs.setdefault(_needed(keys[0]), []).extend(keys)
    notes = (f'<p class="note">{_never(keys)}{need}</p>' for need, keys in needs.items())
    return "".join(notes)


def _never(keys: list[str]) -> str:
    return f"Never logged: {', '.join(f'<code>{escaped(key)}</code>' for key in keys)}."


def _panel(panel: Panel, drawn: dict[str, Any], runs: list[RunColumns]) -> str:
    """A chart with what healthy looks like, and under it what is marked and what is missing."""
    notes = [_drawn_as(panel, runs), *_marked(panel, runs), _missing(panel, runs)]
    below = "".join(f'<p class="note">{note}</p>' for note in notes if note)
    values = [number(run.last(panel.rows[0].series[0].key)) for run in runs]
    spoken = escaped(f"{panel.title}. Last: {', '.join(values)}.")
    name = panel.name
    rows = len([axis for axis in drawn["layout"] if axis.startswith("yaxis")])
    tall = f' style="--rows:{rows}"' if rows > _ROWS else ""
    chart = f'<div class="chart" id="chart-{name}" data-figure="{name}"{tall} role="img" aria-label="{spoken}"></div>'
    return (
        f'<figure class="panel" id="panel-{name}"><figcaption><h3>{escaped(panel.title)}</h3>'
        f"<p>{escaped(panel.healthy)}</p></figcaption>{chart}{below}</figure>"
    )


def _drawn_as(panel: Panel, runs: list[RunColumns]) -> str:
    """Which line is what, where an axis has several."""
    logged = {key for run in runs for key in run.drawable}
    rows = [[series for series in row.series if series.key in logged] for row in panel.rows]
    parts = [f"{STYLES[series.kind]}: {escaped(series.label)}" for row in rows if len(row) > 1 for series in row]
    return "; ".join(dict.fromkeys(parts)).capitalize() + "." if parts else ""


def _marked(panel: Panel, runs: list[RunColumns]) -> list[str]:
    """The marks of a panel in words."""
    notes = []
    calibrations = {run.name: calibrated_until(run) for run in runs}
    if panel.marks == "calibration" and any(until is not None for until in calibrations.values()):
        until = ", ".join(
            f"{step}" + (f" ({escaped(name)})" if len(runs) > 1 else "")
            for name, step in calibrations.items()
            if step is not None
        )
        notes.append(f"Shaded: the tolerance was not known yet, up to step {until}.")
    for run in runs:
        who = f"{escaped(run.name)}: " if len(runs) > 1 else ""
        surge = run.last("length_decay/surge_step")
        if panel.marks == "decay" and run.last("length_decay/lr_scale") is not None:
            found = f"surge at step {number(surge)}" if surge is not None else "no surge found"
            steps = ", ".join(map(number, halvings(run)))
            notes.append(f"{who}{found}; " + (f"rate lowered at step {steps}." if steps else "rate not lowered."))
    return [note[0].upper() + note[1:] if len(runs) == 1 else note for note in notes]


def _missing(panel: Panel, runs: list[RunColumns]) -> str:
    keys = never_logged(panel, runs)
    if not keys:
        return ""
    return _never(keys) + _needed(keys[0])


def _needed(key: str) -> str:
    """What a run needs to log a key."""
    if key.startswith("dc/sync/"):
        return " It needs DCGRPOTrainer, an engine with weights of its own, and two weight syncs."
    return " It needs DCGRPOTrainer and an engine that gives log-probs." if key.startswith("dc/") else ""


# Tokens and settings


def _tokens(view: TokenView) -> str:
    """The frame that the page's script fills, or how to get tokens."""
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in view.notes)
    if not view.steps:
        return (
            f"{notes}<p>No token log was found. Train with <code>log_tokens=True</code> in DCGRPOConfig: each log "
            "entry then writes the probabilities of every token of its batch to <code>tokens/</code>, and this page "
            "shows which tokens disagree.</p>"
        )
    limits = (
        f"At most {STEPS} steps a run are kept: the newest, the first, the one with the largest discrepancy, and one "
        f"between. A step shows up to {COMPLETIONS} different completions: half of them with the highest discrepancy, "
        f"the others spread evenly over the rest; {TOKENS:,} tokens are on the page. "
        "<code>--tokens_step STEP</code> shows one step, and more of it."
    )
    return notes + Template(_part("tokens/tokens.html")).substitute(limits=limits, points=f"{POINTS:,}")


def _settings(runs: list[RunColumns]) -> str:
    """Settings that differ between the runs, then all of them."""
    tables = [{"model": run.start.get("model", "not logged")} | _shown(run.settings) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = {name: [str(table.get(name, "–")) for table in tables] for name in names}
    differing = {name: values for name, values in rows.items() if len(set(values)) > 1}
    text = ""
    if len(runs) > 1:
        same = "<p>The runs have the same settings.</p>"
        text = f"<h3>Settings that differ</h3>{_settings_table(differing, runs) if differing else same}"
    return f"{text}<details><summary>All settings</summary>{_settings_table(rows, runs)}</details>"


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """What a log says of mappings may be of a version that wrote them whole."""
    return {name: shown(name, value) if isinstance(value, dict) else value for name, value in settings.items()}


def _settings_table(rows: dict[str, list[str]], runs: list[RunColumns]) -> str:
    head = "".join(f'<th scope="col">{escaped(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row"><code>{escaped(name)}</code></th>'
        + "".join(f"<td>{escaped(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Settings"><table class="settings"><thead><tr>'
        f'<th scope="col">setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
