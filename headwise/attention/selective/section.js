// What masks leave of the context over training, layer by layer, and both terms of the loss.
(() => {
  const found = report.selection;
  const top = 1.05 * Math.max(...found.flatMap((entry) => entry.lines.flatMap((line) => line.kept.flat())));
  const tone = (layer, layers) => `hsl(${265 - 200 * layer / Math.max(1, layers - 1)} 60% 50%)`;
  for (const entry of found) {
    const target = box("selection-plots", `Context kept: ${entry.variant}${entry.averaged ? "" : " (not finished)"}`);
    const layers = entry.last.length;
    show(() => plot(target, entry.lines.flatMap((line, number) => entry.last.map((_, layer) => ({
      x: line.steps, y: line.kept.map((row) => row[layer]), mode: "lines+markers",
      name: String(layer), legendgroup: String(layer), showlegend: number === 0,
      line: { color: tone(layer, layers), width: entry.n > 1 ? 1.2 : 2 }, marker: { size: 4 },
      hovertemplate: `layer ${layer}${line.seed === null ? "" : `, seed ${line.seed}`}, step %{x:,d}: %{y:.1%}<extra></extra>`,
    }))), {
      showlegend: layers <= 12, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", title: { text: "layer" }, entrywidth: 24 },
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
