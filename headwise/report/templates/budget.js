// Loss against the share of the context that is kept, a panel for each way to choose keys.
(() => {
  const base = report.baseline;
  const what = base ? `Validation loss: difference to ${base.name}, full context (nats)` : "Validation loss (nats)";
  const budgets = [...new Set(report.series.flatMap((one) => one.points.map((point) => point.budget)))].sort((a, b) => b - a);
  const interval = (value) => value.ci95 === null ? "" : ` ± ${value.ci95.toFixed(4)}`;
  for (const [title, series] of Object.entries(report.panels)) {
    const target = box("budget-plots", `${what}: ${title}`);
    show(() => {
      const traces = [];
      for (const one of series) {
        const tone = colour(one.variant);
        const points = one.points.filter((point) => !base || point.difference.mean !== null);
        const values = points.map((point) => base ? point.difference : point);
        traces.push({
          x: points.map((point) => point.budget), y: values.map((value) => value.mean), name: one.name, mode: "lines+markers",
          line: { color: tone, width: 2, dash: one.method === "window" ? "dot" : "solid" }, marker: { size: 7, symbol: SYMBOLS[style(one.variant)] },
          error_y: { type: "data", array: values.map((value) => value.ci95 ?? 0), visible: values.some((value) => value.ci95 !== null), color: tone, thickness: 1.5, width: 5 },
          customdata: points.map((point, i) => [point.keys, interval(values[i]), point.mean.toFixed(4)]),
          hovertemplate: `${one.name}: %{y${base ? ":+.4f" : ":.4f"}}%{customdata[1]}<br>loss %{customdata[2]}, %{customdata[0]} keys<extra></extra>`,
        });
        const found = one.parity;
        if (found && found.share !== null) {
          traces.push({
            x: [found.share], y: [0], mode: "markers", name: "parity", showlegend: false,
            marker: { size: 11, symbol: "diamond-open", color: tone, line: { width: 2 } },
            error_x: { type: "data", symmetric: false, array: [(found.high ?? found.share) - found.share], arrayminus: [found.share - (found.low ?? found.share)], visible: found.low !== null, color: tone },
            hovertemplate: `${one.name}: parity at %{x:.3g}<extra></extra>`,
          });
        }
      }
      const shapes = base ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: css("--ink"), width: 1 } }] : [];
      plot(target, traces, {
        height: 420, showlegend: true, legend: { orientation: "h", y: -0.18, x: 0 }, hovermode: "closest", shapes,
        x: { title: "share of the context kept (log scale)", type: "log", autorange: "reversed", tickvals: budgets, ticktext: budgets.map(String) },
        y: { range: report.shown ?? undefined },
      });
    });
  }
})();
