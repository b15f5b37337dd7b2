// Searches: the number that decides against every searched key; a ring is the winner on fresh seeds.
(() => {
  const found = report.search;
  const number = (value) => typeof value === "number";
  for (const [key, range] of Object.entries(found.keys)) {
    const having = found.variants.filter((one) => one.trials.some((trial) => key in trial.values && trial.value !== null));
    if (!having.length) continue;
    const values = having.flatMap((one) => one.trials.filter((trial) => key in trial.values).map((trial) => trial.values[key]));
    const numeric = values.every(number);
    const log = numeric && (range ? range.log : Math.min(...values) > 0 && Math.max(...values) >= 10 * Math.min(...values));
    const at = (trial) => numeric ? trial.values[key] : String(trial.values[key]);
    const target = box("search-plots", `${found.by} against ${key}`);
    show(() => plot(target, having.flatMap((one) => {
      const trials = one.trials.map((trial, index) => ({ ...trial, index })).filter((trial) => key in trial.values && trial.value !== null);
      const dots = {
        x: trials.map(at), y: trials.map((trial) => trial.value), mode: "markers", name: one.variant,
        text: trials.map((trial) => `trial ${trial.index}: ${Object.entries(trial.values).map(([k, v]) => `${k}=${v}`).join(", ")}`.replace(/[<>&]/g, " ")),
        marker: { color: colour(one.variant), symbol: SYMBOLS[style(one.variant)], size: 7, opacity: 0.8 }, hovertemplate: "%{text}: %{y:.4f}",
      };
      const winner = one.winner === null ? null : one.trials[one.winner];
      if (!winner || !(key in winner.values) || one.confirmed.mean === null) return [dots];
      return [dots, {
        x: [at(winner)], y: [one.confirmed.mean], mode: "markers", name: `${one.variant} on fresh seeds`,
        error_y: { type: "data", array: [one.confirmed.ci95 ?? 0], thickness: 1.2, color: colour(one.variant) },
        marker: { color: colour(one.variant), symbol: "circle-open", size: 15, line: { width: 2 } }, hovertemplate: "%{y:.4f}",
      }];
    }), { height: 340, showlegend: true, legend: { orientation: "h", y: -0.25 }, x: { title: key, type: numeric ? (log ? "log" : "-") : "category" }, y: { title: found.by }, hovermode: "closest" }));
  }
})();
