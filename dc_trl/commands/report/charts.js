"use strict";
// Draws the figures with the theme's colours, and again when the theme changes.
const report = JSON.parse(document.getElementById("report-data").textContent);

const Charts = (() => {
  const drawn = new Map();
  let logarithmic = false;

  // Plotly does not read CSS variables: their values are put in their place.
  function resolved(value, styles) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? styles.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) {
      return value.length && typeof value[0] !== "object" ? value : value.map((item) => resolved(item, styles));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, styles)]));
    }
    return value;
  }

  function template(styles) {
    const color = (name) => styles.getPropertyValue(name).trim();
    const axis = {
      gridcolor: color("--grid"), linecolor: color("--line"), zerolinecolor: color("--grid"), zerolinewidth: 1,
      tickfont: { size: 11, color: color("--muted") }, automargin: true, nticks: 6, hoverformat: ".4~g",
      exponentformat: "e", title: { font: { size: 12, color: color("--muted") }, standoff: 8 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: styles.fontFamily, size: 12, color: color("--text") },
        margin: { l: 8, r: 22, t: 26, b: 8 },
        hovermode: "x unified",
        hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text") } },
        legend: { orientation: "h", x: 0, xanchor: "left", y: -0.22, yanchor: "top", font: { size: 11 } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--text") },
        xaxis: { ...axis, showgrid: false, ticks: "outside", tickcolor: color("--line"), ticklen: 4 },
        yaxis: { ...axis, rangemode: "normal" },
      },
    };
  }

  // Whether an axis can be logarithmic: something lies above 0, and nothing below.
  function canBeLogarithmic(figure, letter, axis) {
    const traces = figure.data.filter((trace) => letter === "x" || (trace.yaxis ?? "y") === axis);
    const values = traces.flatMap((trace) => trace[letter]).filter((value) => typeof value === "number");
    return values.some((value) => value > 0) && values.every((value) => value >= 0);
  }

  function withLogarithms(figure, layout) {
    const axes = Object.keys(layout).filter((name) => name.startsWith("yaxis"));
    if (layout.meta?.log_x) axes.push("xaxis");
    for (const name of axes) {
      const letter = name[0];
      if (!canBeLogarithmic(figure, letter, name.replace("axis", ""))) continue;
      const { range, rangemode, ...axis } = layout[name];
      layout[name] = { ...axis, type: "log" };
    }
    return layout;
  }

  function draw(element, figure) {
    drawn.set(element, figure);
    const styles = getComputedStyle(document.body);
    const own = resolved(figure.layout, styles);
    const layout = {
      ...(logarithmic ? withLogarithms(figure, { ...own }) : own), template: template(styles), autosize: true,
    };
    // Named one by one: by default plotly.js 4 has a button that uploads the chart to its maker's cloud.
    const config = {
      responsive: true, displaylogo: false, plotlyServerURL: "",
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["resetScale2d"]],
    };
    return Plotly.react(element, resolved(figure.data, styles), layout, config);
  }

  function redraw() {
    for (const [element, figure] of drawn) draw(element, figure);
  }

  // A stretch of steps chosen in one chart is shown in all.
  let following = false;
  async function follow(source, change) {
    if (following) return;
    const [low, high] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (low === undefined && !change["xaxis.autorange"]) return;
    following = true;
    const update = low === undefined ? { "xaxis.autorange": true } : { "xaxis.range": [low, high] };
    const others = [...drawn.keys()].filter((element) => element !== source && element.dataset.figure);
    await Promise.all(others.map((element) => Plotly.relayout(element, update)));
    following = false;
  }

  // A click on a chart asks for the tokens of its step; the token view listens.
  function ask(event) {
    const point = event.points[0];
    const detail = { step: point.x, run: Number(point.data.legendgroup ?? 0) };
    document.dispatchEvent(new CustomEvent("step-asked", { detail }));
  }

  for (const element of document.querySelectorAll("[data-figure]")) {
    draw(element, report.figures[element.dataset.figure]);
    element.on("plotly_relayout", (change) => follow(element, change));
    element.on("plotly_click", ask);
  }
  document.getElementById("chart-controls").addEventListener("change", (event) => {
    logarithmic = event.target.checked;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return { draw };
})();
