// Models that were given a head: the loss from there on, and what became of the head.
(() => {
  const runs = report.surgery;
  const named = (run) => `${run.variant}${run.seed === null ? "" : `, seed ${run.seed}`}`;
  const curve = box("surgery-plots", "Validation loss after the operation (nats)");
  show(() => {
    const traces = runs.flatMap((run) => {
      const tone = colour(run.variant);
      const begun = run.val_loss ? [{ x: [0], y: [run.val_loss.operated], mode: "markers", name: "operated", marker: { color: tone, size: 9, symbol: "circle-open" }, hovertemplate: `${named(run)}, operated: %{y:.4f}<extra></extra>` }] : [];
      return [{ x: run.curve.steps, y: run.curve.values, mode: "lines+markers", name: named(run), line: { color: tone, width: 2, dash: DASHES[style(run.variant)] }, marker: { size: 5 }, hovertemplate: `${named(run)}: %{y:.4f}<extra></extra>` }, ...begun];
    });
    const sources = [...new Set(runs.filter((run) => run.val_loss).map((run) => run.val_loss.source))];
    const shapes = sources.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--ink"), width: 1, dash: "dash" } }));
    const annotations = sources.map((y) => ({ xref: "paper", x: 1, y, xanchor: "right", yanchor: "bottom", showarrow: false, text: "source", font: { size: 11, color: css("--muted") } }));
    plot(curve, traces, { x: { title: "step" }, hovermode: "closest", shapes, annotations });
  });
  for (const run of runs.filter((one) => one.movement.length)) {
    const target = box("surgery-plots", `Norm of the new head: ${named(run)} (dotted: at its start)`);
    show(() => plot(target, ["q", "k", "v", "o"].flatMap((part, i) => {
      const rows = run.movement.filter((row) => row.part === part);
      const line = (key, dash) => ({
        x: rows.map((row) => row.layer), y: rows.map((row) => row[key]), mode: "lines+markers", name: part, showlegend: dash === "solid",
        line: { color: css(`--v${i}`), width: 2, dash }, marker: { size: 6, symbol: SYMBOLS[i] },
        customdata: rows.map((row) => row.moved), hovertemplate: `${part}, layer %{x}: %{y:.4f}, %{customdata:.1%} moved<extra></extra>`,
      });
      return rows.length ? [line("norm_start", "dot"), line("norm_end", "solid")] : [];
    }), { showlegend: true, legend: { orientation: "h", y: 1.15, x: 0 }, x: { title: "layer", dtick: Math.max(1, Math.ceil(run.movement.at(-1).layer / 12)) }, hovermode: "closest" }));
  }
})();
