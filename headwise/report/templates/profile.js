// The head atlas of a checkpoint: kinds, measures, distributions and correlations, layer by head.
const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"];
const SCALE = VIRIDIS.map((c, i) => [i / (VIRIDIS.length - 1), c]);
const layers = report.kinds.grid.layers;
const known = (values) => values.filter((value) => value !== null);
const heightOf = (rows) => 76 + Math.max(10, Math.min(36, 420 / rows)) * rows;
const measureOf = (name) => report.measures.find((m) => m.name === name);

// A heatmap of layers by heads, or by what the columns are called where heads have parts.
function grid(target, trace, rows, columns) {
  const heads = trace.z[0].length;
  plot(target, [{ type: "heatmap", x: columns ?? undefined, y: layers, showscale: false, xgap: 1, ygap: 1, hoverongaps: false, ...trace }], {
    height: heightOf(rows), margin: { l: 44, r: 8, t: 6, b: 36 }, dragmode: false,
    x: { title: "head", type: columns ? "category" : undefined, dtick: heads <= 16 ? 1 : undefined, showgrid: false, ticks: "", fixedrange: true },
    y: { title: "layer", dtick: rows <= 16 ? 1 : undefined, autorange: "reversed", showgrid: false, ticks: "", fixedrange: true },
  });
}

(() => {
  if (!report.kinds.known) return;
  const target = box("kind-plots", "First rule that holds");
  const { names, grid: { cells } } = report.kinds;
  const z = cells.map((row) => row.map((labels) => labels && names.indexOf(labels[0])));
  const text = cells.map((row) => row.map((labels) => labels ? labels.join(", ") : ""));
  show(() => {
    const steps = names.flatMap((_, i) => [[i / names.length, css(`--kind${i}`)], [(i + 1) / names.length, css(`--kind${i}`)]]);
    grid(target, {
      z, text, colorscale: steps, zmin: -0.5, zmax: names.length - 0.5,
      hovertemplate: "layer %{y}, head %{x}<br>%{text}<extra></extra>",
    }, z.length, report.kinds.columns);
  });
})();

(() => {
  const left = box("atlas-plots", "Every head"), right = box("atlas-plots", "Against depth");
  const draw = () => {
    const measure = measureOf(byId("atlas-measure").value);
    const z = report.grids[measure.name];
    const all = known(z.flat());
    const [low, high] = all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
    byId("atlas-low").textContent = significant(low);
    byId("atlas-high").textContent = significant(high) + (measure.unit ? ` ${measure.unit}` : "");
    byId("atlas-definition").textContent = measure.definition;
    grid(left, {
      z, colorscale: SCALE, zmin: low, zmax: high,
      hovertemplate: `layer %{y}, head %{x}<br>${measure.label} %{z:.5~g} ${measure.unit}<extra></extra>`,
    }, z.length, report.columns[measure.name]);
    const dots = z.flatMap((row, i) => row.map((value, head) => ({ layer: layers[i], head, value }))).filter((d) => d.value !== null);
    const means = z.map((row) => known(row).length ? known(row).reduce((a, b) => a + b, 0) / known(row).length : null);
    plot(right, [
      {
        x: dots.map((d) => d.layer), y: dots.map((d) => d.value), text: dots.map((d) => `layer ${d.layer}, head ${report.columns[measure.name]?.[d.head] ?? d.head}`), mode: "markers",
        marker: { color: translucent(css("--v0"), 0.45), size: 6 }, hovertemplate: "%{text}: %{y:.5~g}<extra></extra>",
      },
      { x: layers, y: means, mode: "lines", line: { color: css("--v1"), width: 2 }, hovertemplate: "mean of layer %{x}: %{y:.5~g}<extra></extra>" },
    ], { height: heightOf(z.length), hovermode: "closest", x: { title: "layer", dtick: z.length <= 16 ? 1 : undefined }, y: { title: measure.unit || measure.label } });
  };
  byId("atlas-measure").onchange = draw;
  show(draw);
})();

(() => {
  const left = box("distribution-plots", "All layers"), right = box("distribution-plots", "By layer");
  const { measures, layers: rows } = report.distributions;
  const draw = () => {
    const measure = measureOf(byId("distribution-measure").value);
    const found = measures[measure.name];
    left.parentElement.hidden = right.parentElement.hidden = !found;
    if (!found) return;
    const middles = found.edges.slice(1).map((edge, i) => (edge + found.edges[i]) / 2);
    const some = found.shares.filter((row) => row[0] !== null); // a layer without a value has no shares
    const overall = middles.map((_, i) => some.reduce((sum, row) => sum + row[i], 0) / some.length);
    const title = measure.unit ? `${measure.label} (${measure.unit})` : measure.label;
    plot(left, [{
      type: "bar", x: middles, y: overall, marker: { color: css("--v0") }, hovertemplate: `${measure.label} %{x:.4~g}: %{y:.2%}<extra></extra>`,
    }], { height: heightOf(rows.length), bargap: 0, x: { title }, y: { title: "share", tickformat: ".0%" } });
    // Each layer on its own scale: what is common in a layer is bright, in every layer.
    const z = found.shares.map((row) => { const most = Math.max(...row) || 1; return row.map((share) => share === null ? null : share / most); });
    plot(right, [{
      type: "heatmap", x: middles, y: rows, z, customdata: found.shares, colorscale: SCALE, showscale: false, hoverongaps: false,
      hovertemplate: `layer %{y}, ${measure.label} %{x:.4~g}: %{customdata:.2%}<extra></extra>`,
    }], {
      height: heightOf(rows.length), dragmode: false, x: { title, showgrid: false, fixedrange: true },
      y: { title: "layer", autorange: "reversed", showgrid: false, fixedrange: true, dtick: rows.length <= 16 ? 1 : undefined },
    });
  };
  byId("distribution-measure").onchange = draw;
  show(draw);
})();

(() => {
  const names = Object.keys(report.correlations);
  if (!names.length) return;
  const left = box("correlation-plots", "Every head"), right = box("correlation-plots", "How many heads");
  const choice = byId("correlation");
  for (const name of names) {
    const [kind, ...measure] = name.split("_");
    choice.append(new Option(`${measureOf(measure.join("_"))?.label ?? measure.join(" ")} (${kind === "pearson" ? "Pearson" : "Spearman"})`, name));
  }
  const draw = () => {
    const z = report.correlations[choice.value];
    const middle = css("--card");
    grid(left, {
      z, zmin: -1, zmax: 1, colorscale: [[0, css("--v0")], [0.5, middle], [1, css("--v1")]],
      hovertemplate: "layer %{y}, head %{x}<br>r %{z:+.3f}<extra></extra>",
    }, z.length, report.columns[choice.value]);
    plot(right, [{
      type: "histogram", x: known(z.flat()), xbins: { start: -1, end: 1, size: 0.1 }, marker: { color: css("--v0") },
      hovertemplate: "r %{x}: %{y} heads<extra></extra>",
    }], { height: heightOf(z.length), bargap: 0.05, x: { title: "r", range: [-1, 1] }, y: { title: "heads" } });
  };
  choice.onchange = draw;
  show(draw);
})();
