// Loss against the share of the context that is kept.
(() => {
  const target = box("budget-plots", "Validation loss (nats per token)");
  const dashes = { kept: "solid", window: "solid", "chosen afresh": "dot", "per layer": "dash" };
  const budgets = [...new Set(report.series.flatMap((one) => one.points.map((point) => point.budget)))].sort((a, b) => b - a);
  show(() => {
    const traces = [];
    for (const one of report.series) {
      const tone = colour(one.variant);
      const with_bars = one.points.some((point) => point.ci95 !== null);
      traces.push({
        x: one.points.map((point) => point.budget), y: one.points.map((point) => point.mean), name: one.name, mode: "lines+markers",
        line: { color: tone, width: 2, dash: dashes[one.method] }, marker: { size: 7, symbol: SYMBOLS[style(one.variant)] },
        error_y: { type: "data", array: one.points.map((point) => point.ci95 ?? 0), visible: with_bars, color: tone, thickness: 1.5, width: 5 },
        customdata: one.points.map((point) => [point.keys, point.ci95 === null ? "" : ` ± ${point.ci95.toFixed(4)}`]),
        hovertemplate: "%{y:.4f}%{customdata[1]}, %{customdata[0]} keys",
      });
      const found = one.parity;
      if (found && found.share !== null) {
        traces.push({
          x: [found.share], y: [report.baseline.mean], mode: "markers", name: "parity", showlegend: false,
          marker: { size: 11, symbol: "diamond-open", color: tone, line: { width: 2 } },
          error_x: { type: "data", symmetric: false, array: [(found.high ?? found.share) - found.share], arrayminus: [found.share - (found.low ?? found.share)], visible: found.low !== null, color: tone },
          hovertemplate: `${one.name}: parity at %{x:.3g}<extra></extra>`,
        });
      }
    }
    const base = report.baseline;
    const shapes = base ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: base.mean, y1: base.mean, line: { color: css("--ink"), width: 1, dash: "dash" } }] : [];
    const annotations = base ? [{ xref: "paper", x: 1, y: base.mean, xanchor: "right", yanchor: "bottom", showarrow: false, text: `${base.name}, full context`, font: { size: 11, color: css("--muted") } }] : [];
    plot(target, traces, {
      height: 420, showlegend: true, legend: { orientation: "h", y: -0.18, x: 0 }, hovermode: "closest", shapes, annotations,
      x: { title: "share of the context kept (log scale)", type: "log", autorange: "reversed", tickvals: budgets, ticktext: budgets.map(String) },
    });
  });
})();
