// The head atlas: layer x head at one step, and every head over all steps.
const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"];
const MANY_HEADS = 160; // beyond it a line a head is a thicket: layer means are drawn

(() => {
  const names = Object.keys(report.atlas.variants);
  if (!names.length) return;
  const lines = (name) => report.atlas.variants[name];
  const steps = [...new Set(names.flatMap((name) => lines(name).flatMap((line) => line.steps)))].sort((a, b) => a - b);
  const seeds = [...new Map(names.flatMap((name) => lines(name).map((line) => [String(line.seed), line.seed]))).values()];
  const chosen = { measure: report.atlas.measures[0].name, seed: String(seeds[0]), at: steps.length - 1, sort: false, pick: null };
  const targets = new Map(names.map((name) => {
    const upper = box("atlas-plots", name), lower = element("div");
    upper.after(lower);
    return [name, { upper, lower, card: upper.parentElement }];
  }));
  const slider = byId("atlas-step");

  const known = (values) => values.filter((value) => value !== null);
  const mean = (values) => known(values).length ? known(values).reduce((a, b) => a + b, 0) / known(values).length : null;

  // The lines that the chosen seed stands for: one run, or all that may be averaged.
  function selected(name) {
    const offering = lines(name).filter((line) => line.measures[chosen.measure]);
    return offering.filter((line) => chosen.seed === "mean" ? line.used : String(line.seed) === chosen.seed);
  }

  // (L, H) at the latest evaluation up to `step`; heads sorted within layers where asked for.
  function gridOf(line, step) {
    const index = line.steps.findLastIndex((at) => at <= step);
    if (index < 0) return null;
    const grid = line.measures[chosen.measure][index];
    return chosen.sort ? grid.map((row) => [...row].sort((a, b) => (b ?? -Infinity) - (a ?? -Infinity))) : grid;
  }

  // What the columns stand for where heads have parts; undefined where column n is head n.
  const columnsOf = (name) => chosen.sort ? undefined : selected(name)[0]?.columns?.[chosen.measure];

  function valuesAt(name, step) {
    const grids = selected(name).map((line) => gridOf(line, step)).filter(Boolean);
    if (!grids.length) return null;
    return grids[0].map((row, layer) => row.map((_, head) => mean(grids.map((grid) => grid[layer]?.[head] ?? null))));
  }

  // Lowest to highest value, at least 1% of their middle apart on either side: heads that hardly
  // differ, as before training, then look alike.
  function range() {
    const all = known(names.flatMap((name) => lines(name).flatMap((line) => (line.measures[chosen.measure] ?? []).flat(2))));
    if (!all.length) return [0, 1];
    const [low, high] = all.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    const middle = (low + high) / 2, half = Math.max((high - low) / 2, 0.01 * Math.abs(middle));
    return [middle - half, middle + half];
  }

  function drawGrids() {
    const measure = report.atlas.measures.find((m) => m.name === chosen.measure);
    const [zmin, zmax] = range();
    const step = steps[chosen.at];
    byId("atlas-at").textContent = `step ${step.toLocaleString("en")}`;
    byId("atlas-low").textContent = significant(zmin);
    byId("atlas-high").textContent = significant(zmax) + (measure.unit ? ` ${measure.unit}` : "");
    byId("atlas-definition").textContent = measure.definition;
    for (const name of names) targets.get(name).card.hidden = !selected(name).length; // before any width is taken
    for (const name of names) {
      const { upper } = targets.get(name);
      const z = valuesAt(name, step);
      if (!z) { Plotly.purge(upper); continue; }
      const rank = chosen.sort ? "rank in layer" : "head", columns = columnsOf(name);
      plot(upper, [{
        type: "heatmap", z, text: z.map((row) => row.map((_, head) => columns?.[head] ?? String(head))), zmin, zmax, colorscale: VIRIDIS.map((c, i) => [i / (VIRIDIS.length - 1), c]), showscale: false, xgap: 2, ygap: 2,
        texttemplate: z[0].length <= 6 && z.length <= 12 ? "%{z:.3g}" : "", textfont: { size: 11 }, hoverongaps: false,
        hovertemplate: `layer %{y}, ${rank} %{text}<br>${measure.label} %{z:.5~g} ${measure.unit}<extra></extra>`,
      }], {
        height: 76 + Math.max(26, Math.min(44, 300 / z.length)) * z.length, margin: { l: 40, r: 8, t: 6, b: 36 }, dragmode: false,
        x: { title: rank, ...(columns ? { tickvals: columns.map((_, n) => n), ticktext: columns } : { dtick: z[0].length <= 16 ? 1 : undefined }), showgrid: false, ticks: "", fixedrange: true },
        y: { title: "layer", dtick: z.length <= 16 ? 1 : undefined, autorange: "reversed", showgrid: false, ticks: "", fixedrange: true },
      });
      upper.removeAllListeners?.("plotly_click");
      upper.on("plotly_click", ({ points }) => {
        const pick = `${points[0].y}.${points[0].x}`;
        chosen.pick = chosen.pick === pick ? null : pick;
        drawLines();
      });
    }
  }

  function drawLines() {
    const [low, high] = range();
    const pad = 0.05 * (high - low || 1);
    for (const name of names) {
      const mine = [...new Set(selected(name).flatMap((line) => line.steps))].sort((a, b) => a - b);
      const grids = mine.map((step) => valuesAt(name, step));
      const { lower } = targets.get(name);
      if (!mine.length) { Plotly.purge(lower); continue; }
      const [layers, heads] = [grids[0].length, grids[0][0].length];
      const each = layers * heads <= MANY_HEADS, columns = columnsOf(name);
      const traces = [];
      for (let layer = 0; layer < layers; layer++) {
        const tint = VIRIDIS[Math.round(layer / Math.max(1, layers - 1) * (VIRIDIS.length - 2))];
        for (let head = 0; head < (each ? heads : 1); head++) {
          const picked = chosen.pick === `${layer}.${head}`;
          traces.push({
            x: mine, y: grids.map((grid) => each ? grid[layer][head] : mean(grid[layer])), mode: mine.length < 3 ? "lines+markers" : "lines",
            line: { color: picked ? css("--v1") : tint, width: picked ? 3.5 : 1.4 }, opacity: chosen.pick && !picked ? 0.35 : 0.95,
            hovertemplate: `${each ? `layer ${layer}, ${chosen.sort ? "rank" : "head"} ${columns?.[head] ?? head}` : `mean of layer ${layer}`}<br>step %{x}: %{y:.5~g}<extra></extra>`,
          });
        }
      }
      plot(lower, traces, {
        height: 190, hovermode: "closest", x: { title: "step", nticks: 5, dtick: mine.at(-1) <= 5 ? 1 : undefined }, y: { range: [low - pad, high + pad], nticks: 5 },
        margin: { l: 40, r: 8, t: 6, b: 36 }, shapes: [marker()],
      });
    }
  }

  const marker = () => ({ type: "line", x0: steps[chosen.at], x1: steps[chosen.at], yref: "paper", y0: 0, y1: 1, line: { color: css("--muted"), width: 1, dash: "dot" } });

  function moved() {
    slider.value = chosen.at;
    drawGrids();
    for (const { lower } of targets.values()) if (lower.data) Plotly.relayout(lower, { shapes: [marker()] });
  }

  const redraw = () => { drawGrids(); drawLines(); };
  for (const seed of seeds) {
    const apart = names.filter((name) => lines(name).some((line) => line.seed === seed && !line.used));
    byId("atlas-seed").append(new Option(apart.length ? `${seed} (not averaged: ${apart.join(", ")})` : `${seed}`, String(seed)));
  }
  if (seeds.length > 1) byId("atlas-seed").append(new Option("mean over seeds", "mean"));
  byId("atlas-measure").onchange = (event) => { chosen.measure = event.target.value; redraw(); };
  byId("atlas-seed").onchange = (event) => { chosen.seed = event.target.value; redraw(); };
  byId("atlas-sort").onchange = (event) => { chosen.sort = event.target.checked; chosen.pick = null; redraw(); };
  slider.max = steps.length - 1;
  slider.value = chosen.at;
  slider.oninput = () => { chosen.at = Number(slider.value); moved(); };

  let playing = null;
  const play = byId("atlas-play");
  play.disabled = steps.length < 2;
  play.onclick = () => {
    if (playing) { clearInterval(playing); playing = null; play.textContent = "▶"; return; }
    if (chosen.at === steps.length - 1) chosen.at = -1;
    play.textContent = "❚❚";
    playing = setInterval(() => {
      chosen.at += 1;
      moved();
      if (chosen.at >= steps.length - 1) play.onclick();
    }, 450);
  };
  show(redraw);
})();
