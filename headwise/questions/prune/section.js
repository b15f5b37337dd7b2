// What removing heads costs by the share removed, and the measure against the importance of each head.
(() => {
  const runs = report.pruning;
  const name = (run) => `${run.variant}${run.run_seed === null ? "" : `, seed ${run.run_seed}`}: ${run.mode === "random" ? "random" : `${run.mode} ${run.by}`}`;
  const share = (run) => run.removed.length / run.n_heads;
  const target = box("pruning-plots", "Difference of the loss (nats per token)");
  show(() => {
    const named = [...new Set(runs.map(name))].map((label) => {
      const mine = runs.filter((run) => name(run) === label).sort((a, b) => share(a) - share(b));
      return {
        x: mine.map(share), y: mine.map((run) => run.loss.delta.mean), name: label, mode: "lines+markers", marker: { size: 7 },
        error_y: { type: "data", array: mine.map((run) => run.loss.delta.ci95 ?? 0), width: 3 }, hovertemplate: "%{x:.0%} removed: %{y:.4f}",
      };
    });
    const draws = runs.flatMap((run) => run.draws.map((draw) => [share(run), draw.delta.mean]));
    plot(target, [...named, { x: draws.map((d) => d[0]), y: draws.map((d) => d[1]), name: "random draws", mode: "markers",
      marker: { color: "#999999", size: 5 }, hovertemplate: "%{x:.0%} removed: %{y:.4f}" }],
    { showlegend: true, x: { title: "heads removed", tickformat: ".0%" }, hovermode: "closest" });
  });
  for (const run of runs.filter((one) => one.heads.some((head) => head.value !== null))) {
    const heads = run.heads.filter((head) => head.value !== null);
    const gone = new Set(run.removed.map(([layer, head]) => `${layer}.${head}`));
    const place = (head) => `${head.layer}.${head.head}`;
    const inside = box("pruning-plots", `Rise of the loss without each head (nats) against ${run.by}: ${name(run)}`);
    show(() => plot(inside, [false, true].map((taken) => {
      const some = heads.filter((head) => gone.has(place(head)) === taken);
      return {
        x: some.map((head) => head.value), y: some.map((head) => head.importance), mode: "markers", name: taken ? "removed" : "kept",
        text: some.map(place), marker: { size: 7, color: css(taken ? "--v1" : "--v0") }, hovertemplate: "head %{text}: %{y:.5f} nats<extra></extra>",
      };
    }), { showlegend: true, x: { title: run.by }, hovermode: "closest" }));
  }
})();
