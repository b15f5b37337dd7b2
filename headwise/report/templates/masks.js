// A prompt under one mask: what is left of every token when a query comes, and who took the rest.
(() => {
  const packed = JSON.parse(byId("report-masks").textContent);
  const labels = report.tokens, size = labels.length;
  const chosen = { layer: Object.keys(packed)[0], mask: 0, query: size - 1, token: null, kept: false, factor: false };
  const VERSIONS = report.protected ? [["taken", "With protection"], ["unprotected", "Without protection"]] : [["taken", ""]];
  const quoted = (at) => `“${labels[at]}”`;
  const quantity = (value) => value >= 0.01 || value === 0 ? value.toFixed(2) : value.toExponential(0);

  // Half-precision numbers of the rows up to the diagonal, unpacked once for each mask that is looked at.
  const unpacked = new Map();
  function values(name) {
    const text = packed[chosen.layer][chosen.mask][name];
    if (!unpacked.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const halves = new DataView(bytes.buffer), found = new Float32Array(bytes.length / 2);
      for (let n = 0; n < found.length; n++) {
        const bits = halves.getUint16(2 * n, true), exponent = (bits >> 10) & 31, fraction = bits & 1023;
        const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
        found[n] = bits & 0x8000 ? -size : size;
      }
      unpacked.set(text, found);
    }
    return unpacked.get(text);
  }
  const of = (name, query, key) => values(name)[query * (query + 1) / 2 + key];
  const strength = (f) => 1 - Math.min(1, Math.max(0, f));
  const shown = (f) => chosen.factor ? Math.min(1, Math.exp(-f)) : strength(f);

  // What key `token` lost to each query after it, and how hard that query attacked.
  function attackersOf(token) {
    const found = [];
    for (let query = token; query < size; query++) {
      const attack = of("attack", query, token);
      if (attack <= 0) continue;
      const [before, after] = [query, Math.min(query + 1, size - 1)].map((at) => strength(of("taken", at, token)));
      found.push({ query, attack, before, after });
    }
    return found;
  }

  function victimsOf(query) {
    const found = [];
    for (let key = 0; key <= query; key++) {
      const attack = of("attack", query, key);
      if (attack <= 0) continue;
      const [before, after] = [query, Math.min(query + 1, size - 1)].map((at) => strength(of("taken", at, key)));
      found.push({ query: key, attack, before, after });
    }
    return found;
  }

  const texts = VERSIONS.map(([name, title]) => {
    const paragraph = element("p");
    const spans = labels.map((label, at) => {
      const span = element("span", { textContent: label, title: `token ${at}` });
      if (/^[␣⏎⇥␍…·]*$/.test(label)) span.classList.add("space");
      span.onpointerenter = () => { if (!chosen.kept) choose(at); };
      span.onclick = () => { chosen.kept = !(chosen.kept && chosen.token === at); choose(at); };
      paragraph.append(span);
      if (label.includes("⏎")) paragraph.append(element("br"));
      return span;
    });
    const parts = title ? [element("h3", { textContent: title }), paragraph] : [paragraph];
    byId("texts").append(element("div", { className: "text" }, ...parts));
    return [name, spans];
  });

  function choose(token) {
    chosen.token = token;
    paint();
    detail();
  }

  function paint() {
    const attackers = chosen.token === null ? [] : attackersOf(chosen.token);
    const most = Math.max(...attackers.map((one) => one.attack));
    const by = new Map(attackers.map((one) => [one.query, one.attack / most]));
    for (const [name, spans] of texts) {
      spans.forEach((span, at) => {
        const taken = at > chosen.query ? 0 : 1 - shown(of(name, chosen.query, at));
        span.style.setProperty("--taken", taken.toFixed(3));
        span.style.setProperty("--attack", (by.get(at) ?? 0).toFixed(3));
        span.classList.toggle("gone", taken > 0.6);
        span.classList.toggle("later", at > chosen.query);
        span.classList.toggle("query", at === chosen.query && chosen.query < size - 1);
        span.classList.toggle("chosen", at === chosen.token);
        span.classList.toggle("attacker", by.has(at));
      });
    }
    byId("at").textContent = `before query ${chosen.query} ${quoted(chosen.query)}`;
  }

  function list(id, rows, side) {
    if (!rows.length) { byId(id).replaceChildren(element("p", { className: "note", textContent: "Nothing." })); return; }
    const table = element("table");
    table.innerHTML = `<thead><tr><th>${side}</th><th class="num">distance</th><th class="num">S</th><th class="num">strength</th></tr></thead>`;
    const body = element("tbody");
    const lost = (row) => row.before - row.after;
    for (const row of [...rows].sort((a, b) => lost(b) - lost(a) || b.attack - a.attack).slice(0, 8)) {
      const cells = [`${row.query} ${quoted(row.query)}`, Math.abs(row.query - chosen.token), quantity(row.attack), `${row.before.toFixed(2)} → ${row.after.toFixed(2)}`];
      body.append(element("tr", {}, ...cells.map((text, n) => element("td", { className: n ? "num" : "", textContent: text }))));
    }
    table.append(body);
    byId(id).replaceChildren(element("div", { className: "scroll" }, table));
    if (rows.length > 8) byId(id).append(element("p", { className: "note", textContent: `and ${rows.length - 8} more` }));
  }

  function detail() {
    const token = chosen.token;
    if (token === null) return;
    const after = Array.from({ length: size - token }, (_, n) => token + n);
    const masked = after.find((query) => of("taken", query, token) >= 1);
    const attackers = attackersOf(token), last = of("taken", size - 1, token);
    const fate = masked === undefined ? "It is never wholly masked" : `It is masked when query ${masked} ${quoted(masked)} comes, ${masked - token} later`;
    byId("about").textContent = `Token ${token} ${quoted(token)}, layer ${chosen.layer}, mask ${chosen.mask}. ${fate}; F ends at ${quantity(last)}, which leaves ${quantity(Math.min(1, Math.exp(-last)))} of its weight. ${attackers.length} of ${size - 1 - token} later queries attack it.`;
    const dashes = ["solid", "dot"];
    const traces = VERSIONS.flatMap(([name, title], n) => [["1 − min(F, 1)", strength, "--v1"], ["exp(−F)", (f) => Math.min(1, Math.exp(-f)), "--v0"]].map(([label, what, tone]) => ({
      x: after, y: after.map((query) => what(of(name, query, token))), name: title ? `${label}, ${title.toLowerCase().split(" ")[0]}` : label, mode: "lines",
      line: { color: css(tone), width: 2, dash: dashes[n], shape: "hv" }, hovertemplate: "%{y:.3f}",
    })));
    const shapes = [{ type: "line", x0: chosen.query, x1: chosen.query, yref: "paper", y0: 0, y1: 1, line: { color: css("--muted"), width: 1, dash: "dot" } }];
    plot(byId("curve"), traces, { height: 330, showlegend: true, legend: { orientation: "h", y: -0.25, x: 0 }, hovermode: "x unified", shapes, x: { title: "query", range: [token, size - 1], hoverformat: ",d" }, y: { range: [-0.03, 1.05] } });
    list("attackers", attackers, "query");
    list("victims", victimsOf(token), "key");
  }

  function masks() {
    const one = report.layers.find((layer) => String(layer.layer) === chosen.layer);
    chosen.mask = Math.min(chosen.mask, one.heads.length - 1);
    byId("mask").replaceChildren(...one.heads.map((heads, mask) => new Option(`${mask} (${heads.length === 1 ? "head" : "heads"} ${heads.join(", ")})`, mask)));
    byId("mask").value = chosen.mask;
  }

  const redraw = () => { paint(); detail(); };
  byId("layer").append(...Object.keys(packed).map((layer) => new Option(layer)));
  byId("layer").onchange = (event) => { chosen.layer = event.target.value; masks(); redraw(); };
  byId("mask").onchange = (event) => { chosen.mask = Number(event.target.value); redraw(); };
  segments("measure", (value) => { chosen.factor = value === "factor"; paint(); });
  byId("query").max = size - 1;
  byId("query").value = size - 1;
  byId("query").oninput = (event) => { chosen.query = Number(event.target.value); redraw(); };
  let timer = null;
  byId("play").onclick = () => {
    const stop = () => { clearInterval(timer); timer = null; byId("play").textContent = "▶"; };
    if (timer) { stop(); return; }
    if (chosen.query === size - 1) chosen.query = 0;
    byId("play").textContent = "❚❚";
    timer = setInterval(() => {
      chosen.query += 1;
      byId("query").value = chosen.query;
      redraw();
      if (chosen.query >= size - 1) stop();
    }, 120);
  };
  masks();
  // Begin with a token that others took much from.
  const losses = labels.map((_, at) => attackersOf(at).filter((one) => one.query > at && one.before > one.after).length);
  chosen.token = losses.indexOf(Math.max(...losses));
  show(redraw);
})();

(() => {
  const tone = (n) => `hsl(${265 - 200 * n / Math.max(1, report.layers.length - 1)} 60% 50%)`;
  const summed = (shares) => { let total = 0; return shares.map((share) => (total += share)).slice(1); };
  const line = (shares, name, style) => ({ x: shares.slice(1).map((_, n) => n + 1), y: summed(shares), name, mode: "lines", line: { width: 2, ...style }, hovertemplate: "%{y:.1%}" });
  for (const [kind, title] of [["effect", "Strength lost to queries within this distance"], ["attack", "Attack within this distance"]]) {
    const layers = report.layers.filter((one) => one.all[kind]);
    if (!layers.length) continue;
    const target = box("answer-plots", title);
    show(() => {
      const traces = layers.map((one) => line(one.all[kind].shares, `layer ${one.layer}`, { color: tone(report.layers.indexOf(one)) }));
      if (kind === "attack") traces.push(line(report.alike.shares, "all keys alike", { color: css("--ink"), width: 1, dash: "dash" }));
      const shapes = [{ type: "line", x0: report.near, x1: report.near, yref: "paper", y0: 0, y1: 1, line: { color: css("--muted"), width: 1, dash: "dot" } }];
      const ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048].filter((at) => at < report.tokens.length);
      plot(target, traces, { height: 330, showlegend: traces.length <= 7 || kind === "effect", legend: { orientation: "h", y: -0.25, x: 0 }, hovermode: "x unified", shapes, x: { title: "distance from query to key (tokens)", type: "log", tickvals: ticks, hoverformat: ",d" }, y: { range: [0, 1.03], tickformat: ".0%" } });
    });
  }
  const edges = report.edges;
  const names = edges.map((edge, n) => n + 1 < edges.length ? `${edge}–${edges[n + 1]}` : `≥ ${edge}`);
  const target = box("answer-plots", "Share of tokens by F at the end");
  show(() => plot(target, report.layers.filter((one) => one.all.histogram).map((one) => ({
    type: "bar", x: names, y: one.all.histogram, name: `layer ${one.layer}`, marker: { color: tone(report.layers.indexOf(one)) }, hovertemplate: "%{y:.1%}",
  })), { height: 330, showlegend: report.layers.length <= 6, legend: { orientation: "h", y: 1.1, x: 0 }, hovermode: "x unified", barmode: "group", x: { type: "category" }, y: { tickformat: ".0%" } }));
})();
