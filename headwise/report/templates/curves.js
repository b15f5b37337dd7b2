// Loss curves, paired differences and costs.
const LABELS = {
  val_loss: ["Validation loss", "nats"], train_loss: ["Training loss, smoothed", "nats"],
  val_accuracy: ["Accuracy", ""], tokens_per_sec: ["Tokens per second", ""],
  peak_vram_mb: ["Peak device memory", "MB"], peak_rss_mb: ["Peak process memory", "MB"],
  step_time_ms: ["Step time", "ms"],
};

(() => {
  const panels = [["train", "Training loss, smoothed (nats)"], ["val", "Validation loss (nats)"],
    ["gap", `Validation loss: difference to ${report.against} (nats)`], ["accuracy", "Accuracy"]]
    .filter(([name]) => Object.values(report.curves).some((found) => found[name]));
  if (!panels.length) return;
  const names = Object.keys(report.curves);
  const chosen = { x: "steps", range: "late", seeds: false, hidden: new Set() };
  const targets = panels.map(([, title]) => box("curve-plots", title));
  const xs = (line) => line[chosen.x] ?? line.steps;

  function traces(panel) {
    const drawn = [];
    for (const name of names.filter((name) => !chosen.hidden.has(name))) {
      const series = report.curves[name][panel];
      if (!series) continue;
      const line = { color: colour(name), width: 2, dash: DASHES[style(name)] };
      const x = xs(series);
      if (x.length) {
        drawn.push({
          x: [...x, ...[...x].reverse()], y: [...series.high, ...[...series.low].reverse()], fill: "toself",
          fillcolor: translucent(line.color, 0.18), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
        });
        drawn.push({
          x, y: series.mean, name, line, mode: x.length < 30 ? "lines+markers" : "lines", marker: { size: 6, symbol: SYMBOLS[style(name)] },
          customdata: series.low.map((low, i) => [low, series.high[i]]),
          hovertemplate: "%{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f})",
        });
      }
      for (const seed of series.seeds) {
        if (seed.used && !chosen.seeds) continue;
        const label = seed.used ? `${name}, seed ${seed.seed}` : `${name}, seed ${seed.seed} (${seed.state})`;
        drawn.push({
          x: xs(seed), y: seed.values, name: label, mode: "lines", hovertemplate: "%{y:.4f}",
          line: { color: line.color, width: 1, dash: seed.used ? "solid" : "dot" },
        });
      }
    }
    return drawn;
  }

  // Without the first fifth of training, whose fall would dwarf all differences, or the second half alone.
  function ranges(drawn) {
    const last = Math.max(...drawn.flatMap((trace) => trace.x));
    const from = { late: last / 5, half: last / 2 }[chosen.range];
    const late = drawn.flatMap((trace) => trace.y.filter((_, i) => trace.x[i] >= from));
    if (chosen.range === "whole" || late.length < 2) return [undefined, undefined];
    const [low, high] = [Math.min(...late), Math.max(...late)];
    const pad = 0.06 * (high - low || 1);
    return [chosen.range === "half" ? [from, last] : undefined, [low - pad, high + pad]];
  }

  show(() => panels.forEach(([panel], i) => {
    const drawn = traces(panel);
    const [x, y] = ranges(drawn);
    const chance = ["train", "val"].includes(panel) && chosen.range === "whole" ? report.chance_loss : null;
    const shapes = chance ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: chance, y1: chance, line: { color: css("--muted"), width: 1, dash: "dot" } }] : [];
    const annotations = chance ? [{ xref: "paper", x: 1, y: chance, xanchor: "right", yanchor: "bottom", showarrow: false, text: "chance: ln(vocabulary)", font: { size: 11, color: css("--muted") } }] : [];
    plot(targets[i], drawn, {
      x: { title: { steps: "step", tokens: "tokens", flops: "training FLOPs" }[chosen.x], range: x, dtick: chosen.x === "steps" && drawn.every((trace) => trace.x.at(-1) <= 5) ? 1 : undefined, hoverformat: chosen.x === "steps" ? ",d" : ".3s" },
      y: { range: y, tickformat: panel === "accuracy" ? ".1~%" : undefined }, hovermode: "x unified", shapes, annotations,
    });
  }));
  const redraw = drawings.at(-1);
  segments("curve-x", (value) => { chosen.x = value; redraw(); });
  segments("curve-range", (value) => { chosen.range = value; redraw(); });
  byId("curve-seeds").onchange = (event) => { chosen.seeds = event.target.checked; redraw(); };
  for (const name of names) {
    const stroke = `<svg viewBox="0 0 26 8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" stroke="var(--v${style(name)})" stroke-width="3" stroke-dasharray="${STROKES[style(name)]}"/></svg>`;
    const button = element("button", { type: "button", innerHTML: stroke });
    button.append(name);
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      if (!chosen.hidden.delete(name)) chosen.hidden.add(name);
      button.setAttribute("aria-pressed", String(!chosen.hidden.has(name)));
      redraw();
    };
    byId("curve-legend").append(button);
  }
})();

(() => {
  for (const metric of ["val_loss", "train_loss", "val_accuracy"]) {
    const rows = report.comparisons.filter((row) => row.metric === metric);
    if (!rows.length) continue;
    const [label, unit] = LABELS[metric];
    const target = box("forest-plots", `${label}: difference to ${report.against}${unit ? ` (${unit})` : ""}`);
    const base = report.against === report.baseline && report.variants.find((variant) => variant.name === report.baseline).results[metric];
    show(() => {
      const traces = rows.map((row) => ({
        x: [row.mean], y: [row.variant], mode: "markers", name: row.variant,
        marker: { color: colour(row.variant), size: 11, symbol: SYMBOLS[style(row.variant)] },
        error_x: { type: "data", array: [row.ci95 ?? 0], visible: row.ci95 !== null, color: colour(row.variant), thickness: 2, width: 6 },
        hovertemplate: `${row.variant}: %{x:+.4f}` +
          (row.ci95 === null ? "<br>n = 1, no interval" : `<br>${row.low.toFixed(4)} to ${row.high.toFixed(4)}<br>p = ${significant(row.p_adjusted)}, alone ${significant(row.p_t)}`) +
          `<br>n = ${row.n}<extra></extra>`,
      }));
      traces.push(...rows.filter((row) => row.n > 1).map((row) => ({
        x: row.differences, y: row.differences.map(() => row.variant), mode: "markers", name: row.variant,
        marker: { color: colour(row.variant), size: 9, symbol: "line-ns-open", opacity: 0.8 },
        text: row.seeds.map(String), hovertemplate: `${row.variant}, seed %{text}: %{x:+.4f}<extra></extra>`,
      })));
      const shapes = [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: css("--ink"), width: 1 } }];
      if (metric === "val_loss" && base && report.verdicts.length) {
        shapes.push({ type: "rect", x0: 0, x1: 0.05 * base.mean, yref: "paper", y0: 0, y1: 1, fillcolor: translucent(css("--v7"), 0.14), line: { width: 0 }, layer: "below" });
      }
      plot(target, traces, {
        height: 48 + 40 * rows.length, shapes, hovermode: "closest",
        x: { tickformat: metric === "val_accuracy" ? ".1%" : ".3~g", nticks: 6 },
        y: { type: "category", range: [rows.length - 0.5, -0.5], ticks: "", showgrid: false },
      });
    });
  }
})();

(() => {
  const known = report.variants.filter((variant) => Object.keys(variant.results).length);
  for (const metric of ["tokens_per_sec", "step_time_ms", "peak_vram_mb", "peak_rss_mb"]) {
    const rows = known.filter((variant) => variant.results[metric]);
    if (!rows.length || !byId("cost-plots")) continue;
    const [label, unit] = LABELS[metric];
    const target = box("cost-plots", unit ? `${label} (${unit})` : label);
    show(() => plot(target, [{
      type: "bar", orientation: "h", y: rows.map((v) => v.name), x: rows.map((v) => v.results[metric].mean), width: 0.62,
      marker: { color: rows.map((v) => colour(v.name)) },
      error_x: { type: "data", array: rows.map((v) => v.results[metric].ci95 ?? 0), visible: rows.some((v) => v.results[metric].ci95 !== null), color: css("--ink"), thickness: 1.5, width: 5 },
      hovertemplate: "%{y}: %{x:,.4~g}<extra></extra>",
    }], { height: 44 + 36 * rows.length, x: { range: [0, 1.05 * Math.max(...rows.map((v) => v.results[metric].mean + (v.results[metric].ci95 ?? 0)))], nticks: 5 }, y: { type: "category", autorange: "reversed", ticks: "", showgrid: false }, hovermode: "closest" }));
  }
})();
