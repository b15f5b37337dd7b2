"use strict";
// What the page shows was computed before; these scripts only draw it.
const report = JSON.parse(document.getElementById("report-data").textContent);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px 2px", "1px 3px"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon"];
const STROKES = ["", "8 4", "2 3", "8 3 2 3", "12 4", "12 3 2 3", "5 2", "1 3"];
const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };
const order = new Map(report.variants.map((variant, index) => [variant.name, index]));

// {% include "theme.js" %}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const style = (name) => (order.get(name) ?? 7) % 8;
const colour = (name) => css(`--v${style(name)}`);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function translucent(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

// A titled box to draw into, appended to the grid `parent`.
function box(parent, title) {
  const target = element("div");
  byId(parent).append(element("div", { className: "plot" }, element("h3", { textContent: title }), target));
  return target;
}

function axis(extra = {}) {
  return {
    gridcolor: css("--rule"), zeroline: false, linecolor: css("--rule"), ticks: "outside", tickcolor: css("--rule"),
    ticklen: 4, automargin: true, ...extra,
    title: { text: extra.title ?? "", font: { size: 12, color: css("--muted") }, standoff: 8 },
  };
}

function plot(target, traces, { height = 280, x = {}, y = {}, ...rest } = {}) {
  const touch = matchMedia("(pointer: coarse)").matches;
  Plotly.react(target, traces, {
    height, margin: { l: 48, r: 12, t: 8, b: x.title ? 40 : 24 }, showlegend: false, dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 12, color: css("--ink") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--rule"), font: { color: css("--ink"), family: css("--sans") } },
    xaxis: axis(x), yaxis: axis(y), ...rest,
  }, CONFIG);
}

// Draw once all boxes have their places and so their widths, and again whenever the theme changes.
function show(drawing) {
  drawings.push(drawing);
  queueMicrotask(drawing);
}

function segments(id, changed) {
  const buttons = [...byId(id).querySelectorAll("button")];
  for (const button of buttons) {
    button.onclick = () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      changed(button.value);
    };
  }
}

const significant = (value) => value === 0 ? "0" : Number(value.toPrecision(4)).toString();
