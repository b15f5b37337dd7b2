// Entropies of heads: histogram, layers over training, boxes by layer; entanglement against sparsity.
(() => {
  const labels = { entropy: "Entropy (nats)", entanglement: "Entanglement entropy (nats)", regional_entanglement: "Regional entanglement (nats)" };
  const tone = (layer, layers) => `hsl(${265 - 200 * layer / Math.max(1, layers - 1)} 60% 50%)`;
  for (const entry of report.entropies) {
    for (const [name, shown] of Object.entries(entry.measures)) {
      const label = labels[name] ?? name, layers = shown.last.length;
      const target = (what) => box("entropies-plots", `${label}, ${what}: ${entry.variant}`);
      const [histogram, series, boxes] = ["heads", "over training", "by layer"].map(target);
      show(() => {
        plot(histogram, [{ type: "histogram", x: shown.last.flat(), nbinsx: 24, marker: { color: colour(entry.variant) } }],
          { x: { title: label }, y: { title: "heads" }, bargap: 0.05 });
        plot(series, shown.lines.flatMap((line) => shown.last.map((_, layer) => ({
          x: line.steps, y: line.by_layer.map((row) => row[layer]), mode: "lines+markers", marker: { size: 4 },
          line: { color: tone(layer, layers), width: shown.lines.length > 1 ? 1.2 : 2 },
          hovertemplate: `layer ${layer}${line.seed === null ? "" : `, seed ${line.seed}`}, step %{x:,d}: %{y:.4f}<extra></extra>`,
        }))), { x: { title: "step", hoverformat: ",d" }, hovermode: "closest" });
        plot(boxes, shown.last.map((heads, layer) => ({
          type: "box", y: heads, name: String(layer), boxpoints: "all", pointpos: 0, jitter: 0.4,
          marker: { color: tone(layer, layers), size: 3 }, line: { width: 1.2 },
        })), { x: { title: "layer", type: "category" } });
      });
    }
  }
  const having = report.entropies.filter((entry) => entry.points.length);
  if (!having.length) return;
  const target = box("entropies-plots", "Sparsity against entanglement entropy, every head");
  show(() => plot(target, having.map((entry) => ({
    x: entry.points.map((point) => point[0]), y: entry.points.map((point) => point[1]), mode: "markers", name: entry.variant,
    marker: { color: colour(entry.variant), size: 6, opacity: 0.7 }, hovertemplate: "%{x:.3f} nats, sparsity %{y:.3f}",
  })), { showlegend: true, x: { title: "entanglement entropy (nats)" }, y: { title: "sparsity" }, hovermode: "closest" }));
})();
