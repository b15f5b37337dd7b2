// What masks leave of the context over training, layer by layer, and both terms of the loss.
(() => {
  const found = report.selection;
  const top = 1.05 * Math.max(...found.flatMap((entry) => entry.high.flat()));
  const tone = (layer, layers) => `hsl(${265 - 200 * layer / Math.max(1, layers - 1)} 60% 50%)`;
  for (const entry of found) {
    const target = box("selection-plots", `Memory kept: ${entry.variant}${entry.averaged ? "" : " (not finished)"}`);
    const layers = entry.last.length;
    const bands = entry.n < 2 ? [] : entry.last.map((_, layer) => ({
      x: [...entry.steps, ...entry.steps.slice().reverse()],
      y: [...entry.high.map((row) => row[layer]), ...entry.low.map((row) => row[layer]).reverse()],
      fill: "toself", fillcolor: tone(layer, layers).replace(")", " / 0.13)"), line: { width: 0 }, mode: "lines",
      hoverinfo: "skip", showlegend: false,
    }));
    show(() => plot(target, bands.concat(entry.last.map((_, layer) => ({
      x: entry.steps, y: entry.kept.map((row) => row[layer]), name: `layer ${layer}`, mode: "lines+markers",
      line: { color: tone(layer, layers), width: 2 }, marker: { size: 5 }, hovertemplate: "%{y:.1%}",
    }))), {
      showlegend: layers <= 12, legend: { orientation: "h", y: 1.18, x: 0 }, hovermode: "x unified",
      x: { title: "step", hoverformat: ",d" }, y: { range: [0, top], tickformat: ".0%" },
    }));
  }
  const penalised = found.filter((entry) => entry.terms);
  if (!penalised.length) return;
  const target = box("selection-plots", "Training loss, and dashed the memory penalty (nats)");
  show(() => plot(target, penalised.flatMap((entry) => ["loss", "penalty"].filter((term) => entry.terms[term]).map((term) => ({
    x: entry.terms[term].steps, y: entry.terms[term].mean, name: `${entry.variant}: ${term}`, mode: "lines",
    line: { color: colour(entry.variant), width: 2, dash: term === "loss" ? "solid" : "dash" }, hovertemplate: "%{y:.4f}",
  }))), { hovermode: "x unified", x: { title: "step", hoverformat: ",d" }, y: { type: "log", dtick: 1 } }));
})();
