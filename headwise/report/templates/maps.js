// Attention maps of fixed prompts: a canvas a head, one of them large.
(() => {
  const maps = JSON.parse(byId("report-maps").textContent);
  const names = Object.keys(maps);
  if (!names.length) return;
  const MAGMA = ["#000004", "#180f3d", "#440f76", "#721f81", "#9e2f7f", "#cd4071", "#f1605d", "#fd9668", "#feca8d", "#fcfdbf"]
    .map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const LUT = Array.from({ length: 256 }, (_, value) => {
    const place = value / 255 * (MAGMA.length - 1), low = Math.floor(place), part = place - low;
    return MAGMA[low].map((c, i) => Math.round(c + part * ((MAGMA[low + 1] ?? MAGMA[low])[i] - c)));
  });
  const chosen = { variant: names[0], prompt: 0, layer: 0, head: 0, cell: null };
  const prompts = () => maps[chosen.variant].prompts;
  const current = () => prompts()[chosen.prompt];
  const bytes = new Map();

  function weights(layer, head) {
    const prompt = current();
    if (!bytes.has(prompt)) bytes.set(prompt, Uint8Array.from(atob(prompt.data), (c) => c.charCodeAt(0)));
    const [, heads, rows, columns] = prompt.shape;
    const start = (layer * heads + head) * rows * columns;
    return bytes.get(prompt).subarray(start, start + rows * columns);
  }

  function paint(canvas, layer, head) {
    const [, , rows, columns] = current().shape;
    [canvas.width, canvas.height] = [columns, rows];
    const image = new ImageData(columns, rows);
    weights(layer, head).forEach((value, i) => image.data.set([...LUT[value], 255], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  function thumbs() {
    const [layers, heads] = current().shape;
    const parent = byId("map-thumbs");
    parent.style.gridTemplateColumns = `repeat(${heads}, minmax(0, 1fr))`;
    parent.replaceChildren();
    chosen.layer = Math.min(chosen.layer, layers - 1);
    chosen.head = Math.min(chosen.head, heads - 1);
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const button = element("button", { type: "button", title: `layer ${layer}, head ${head}` }, paint(element("canvas"), layer, head));
        button.setAttribute("aria-pressed", String(layer === chosen.layer && head === chosen.head));
        button.onclick = () => {
          for (const other of parent.children) other.setAttribute("aria-pressed", String(other === button));
          Object.assign(chosen, { layer, head, cell: null });
          large();
        };
        parent.append(button);
      }
    }
  }

  // Sizes of the large map in CSS pixels: a margin for the tokens, then square cells.
  function geometry() {
    const canvas = byId("map-large"), n = current().shape[2], width = canvas.clientWidth || 480;
    const margin = (width - 4) / n >= 9 ? 34 : 8;
    return { canvas, n, width, margin, cell: (width - margin - 4) / n };
  }

  function large() {
    const { canvas, n, width, margin, cell } = geometry();
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [width * ratio, width * ratio];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(paint(element("canvas"), chosen.layer, chosen.head), margin, margin, cell * n, cell * n);
    pen.fillStyle = css("--muted");
    pen.font = `${Math.min(12, cell)}px ${css("--mono")}`;
    [pen.textAlign, pen.textBaseline] = ["right", "middle"];
    if (margin > 8) {
      current().tokens.forEach((token, i) => {
        pen.fillText(token.slice(0, 4), margin - 4, margin + (i + 0.5) * cell);
        pen.save();
        pen.translate(margin + (i + 0.5) * cell, margin - 4);
        pen.rotate(Math.PI / 2);
        pen.fillText(token.slice(0, 4), 0, 0);
        pen.restore();
      });
    }
    if (chosen.cell) {
      pen.strokeStyle = css("--v5");
      pen.lineWidth = 2;
      pen.strokeRect(margin + chosen.cell[1] * cell, margin + chosen.cell[0] * cell, cell, cell);
    }
    caption();
  }

  function caption() {
    const text = `Layer ${chosen.layer}, head ${chosen.head}.`;
    if (!chosen.cell) { byId("map-caption").textContent = text; return; }
    const [query, key] = chosen.cell, { tokens, shape } = current();
    const weight = (weights(chosen.layer, chosen.head)[query * shape[3] + key] / 255) ** 2;
    byId("map-caption").textContent = `${text} Query ${query} “${tokens[query]}” gives key ${key} “${tokens[key]}” a weight of ${weight.toFixed(3)}.`;
  }

  byId("map-large").onpointermove = (event) => {
    const { canvas, n, margin, cell } = geometry();
    const bounds = canvas.getBoundingClientRect();
    const place = [event.clientY - bounds.top, event.clientX - bounds.left].map((at) => Math.floor((at - margin) / cell));
    chosen.cell = place.every((at) => at >= 0 && at < n) ? place : null;
    large();
  };

  function refill() {
    chosen.prompt = Math.min(chosen.prompt, prompts().length - 1);
    const preview = (prompt) => prompt.tokens.join("").slice(0, 28);
    byId("map-prompt").replaceChildren(...prompts().map((prompt, i) => new Option(`${i}: ${preview(prompt)}`, i)));
    byId("map-prompt").value = chosen.prompt;
    byId("map-about").textContent = `seed ${maps[chosen.variant].seed}, step ${maps[chosen.variant].step}`;
    thumbs();
    large();
  }

  byId("map-variant").append(...names.map((name) => new Option(name)));
  byId("map-variant").onchange = (event) => { chosen.variant = event.target.value; chosen.cell = null; refill(); };
  byId("map-prompt").onchange = (event) => { chosen.prompt = Number(event.target.value); chosen.cell = null; refill(); };
  refill();
  addEventListener("resize", large);
  show(large);
})();
