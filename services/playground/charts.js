// Charts as SVG in the width that they have, drawn anew when it changes.
function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const label = (text, x, y, more = {}) => svg("text", { x, y, ...more }, text);
const hint = (text) => svg("title", {}, text);

const drawings = new Map(); // by container: (width) -> nodes
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) redraw(target);
});

function redraw(container) {
  const width = Math.floor(container.clientWidth);
  if (width && drawings.has(container)) container.replaceChildren(...drawings.get(container)(width));
}

function draw(container, drawing) {
  drawings.set(container, drawing);
  redraw(container);
  resized.observe(container);
}

function picture(width, height, told, ...children) {
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": told },
    ...children,
  );
}

function asTable(heads, rows) {
  const row = (cells, name) =>
    element(
      "tr",
      {},
      ...cells.map((text) => element(name, { text, ...(name === "th" ? { scope: "col" } : {}) })),
    );
  return element(
    "details",
    {},
    element("summary", { text: "As a table" }),
    element("table", {}, row(heads, "th"), ...rows.map((cells) => row(cells, "td"))),
  );
}

// ρ by layer, the threshold, and the layer that was chosen.
function drawRho(container, { rho, threshold, chosen, numLayers, whyNot }) {
  if (!rho.length) {
    drawings.delete(container);
    container.replaceChildren(element("p", { id: "no-rho", class: "soft", text: whyNot }));
    return;
  }
  const told =
    `How much the best tokens' ranks still change, relative to layer ${rho[0][0]}. ` +
    (chosen === null ? whyNot : `Layer ${chosen} chose.`);
  draw(container, (width) => {
    const height = 176,
      left = 30,
      right = 12,
      top = 14,
      bottom = height - 24;
    const peak = Math.max(1, threshold ?? 0, ...rho.map(([, value]) => value));
    const x = (layer) => left + 8 + (layer * (width - left - right - 16)) / Math.max(1, numLayers - 1);
    const y = (value) => bottom - (value / peak) * (bottom - top);
    const step = Math.ceil(numLayers / Math.max(4, width / 34));
    const isNear = (layer) => chosen !== null && Math.abs(x(layer) - x(chosen)) < 16;
    const ticks = Array.from({ length: numLayers }, (_, layer) => layer).filter(
      (layer) => layer % step === 0 && !isNear(layer),
    );
    return [
      picture(
        width,
        height,
        told,
        svg("line", { class: "axis", x1: left, x2: width - right, y1: bottom, y2: bottom }),
        label(peak.toFixed(1), left - 6, top + 4, { "text-anchor": "end" }),
        label("0", left - 6, bottom + 4, { "text-anchor": "end" }),
        ...ticks.map((layer) => label(layer, x(layer), height - 6, { "text-anchor": "middle" })),
        ...(threshold
          ? [
              svg("line", {
                class: "limit",
                x1: left,
                x2: width - right,
                y1: y(threshold),
                y2: y(threshold),
              }),
              label(`threshold ${threshold}`, width - right, y(threshold) - 6, { "text-anchor": "end" }),
            ]
          : []),
        ...(chosen === null
          ? []
          : [
              svg("line", { class: "mark", x1: x(chosen), x2: x(chosen), y1: top, y2: bottom }),
              label(chosen, x(chosen), height - 6, {
                "text-anchor": "middle",
                class: "strong",
                "font-weight": 700,
              }),
            ]),
        svg("polyline", {
          class: "curve",
          points: rho.map(([layer, value]) => `${x(layer)},${y(value)}`).join(" "),
        }),
        ...rho.map(([layer, value]) =>
          svg(
            "circle",
            { class: "dot", cx: x(layer), cy: y(value), r: 3.5 },
            hint(`layer ${layer}: ${value.toFixed(3)}`),
          ),
        ),
        ...rho
          .filter(([layer]) => layer === chosen)
          .map(([layer, value]) => svg("circle", { class: "chosen", cx: x(layer), cy: y(value), r: 7.5 })),
      ),
      element("p", { class: "soft small", text: told }),
      asTable(
        ["layer", "ρ"],
        rho.map(([layer, value]) => [layer, value.toFixed(3)]),
      ),
    ];
  });
}

// KV entries that each layer keeps, of all.
function drawLayers(container, { entries, full, bytes, chosen }) {
  const most = Math.max(...full) || 1;
  draw(container, (width) => {
    const height = 176,
      left = 30,
      top = 14,
      bottom = height - 24;
    const pitch = (width - left) / entries.length,
      gap = Math.min(4, pitch * 0.25);
    const step = Math.ceil(entries.length / Math.max(4, width / 34));
    const isNear = (layer) => chosen !== null && Math.abs(layer - chosen) * pitch < 16;
    const bars = entries.flatMap((kept, layer) => {
      const x = left + layer * pitch + gap / 2,
        [whole, tall] = [full[layer], kept].map((num) => (num / most) * (bottom - top));
      const at = { x, width: Math.max(1, pitch - gap), rx: 1.5 };
      return [
        svg("rect", { ...at, class: "whole", y: bottom - whole, height: whole }),
        svg(
          "rect",
          { ...at, class: "kept", y: bottom - tall, height: tall },
          hint(`layer ${layer}: ${count(kept)} of ${count(full[layer])} entries`),
        ),
        ...((layer % step === 0 && !isNear(layer)) || layer === chosen
          ? [
              label(layer, x + at.width / 2, height - 6, {
                "text-anchor": "middle",
                ...(layer === chosen ? { class: "strong", "font-weight": 700 } : {}),
              }),
            ]
          : []),
      ];
    });
    return [
      picture(
        width,
        height,
        "Entries of keys and values kept by layer, of all",
        label("all", left - 6, top + 9, { "text-anchor": "end" }),
        label("0", left - 6, bottom + 4, { "text-anchor": "end" }),
        ...bars,
      ),
      element("p", {
        class: "soft small",
        text: `Entries over all KV heads, of ${count(most)} ${
          full.every((num) => num === most) ? "in each layer" : "in the largest layer"
        }.`,
      }),
      asTable(
        ["layer", "entries kept", "of", "bytes"],
        entries.map((kept, at) => [at, count(kept), count(full[at]), mib(bytes[at])]),
      ),
    ];
  });
}

// Rows of { name, amount, told, class } on one scale.
function drawBars(container, rows, told, note) {
  draw(container, (width) => {
    const most = Math.max(...rows.map(({ amount }) => amount)) || 1,
      height = rows.length * 44;
    return [
      picture(
        width,
        height,
        told,
        ...rows.flatMap(({ name, amount, told: shown, class: kind }, row) => [
          label(name, 0, row * 44 + 14),
          label(shown, width, row * 44 + 14, { "text-anchor": "end", class: "strong" }),
          svg("rect", {
            class: kind,
            x: 0,
            y: row * 44 + 21,
            width: Math.max(2, (amount / most) * width),
            height: 11,
            rx: 2,
          }),
        ]),
      ),
      ...(note ? [element("p", { class: "soft small", text: note })] : []),
    ];
  });
}

// The phases of each run on one scale of time, one row each.
function drawTimes(container, runs) {
  const names = [...new Set(runs.flatMap(({ timeline }) => timeline.map(({ name }) => name)))];
  const end = Math.max(...runs.flatMap(({ timeline }) => timeline.map((span) => span.end_s))) || 1;
  draw(container, (width) => {
    const left = 78,
      right = 62,
      rows = [],
      thick = runs.length > 1 ? 8 : 12,
      pitch = runs.length > 1 ? 30 : 25;
    names.forEach((name, row) => {
      const y = row * pitch;
      rows.push(label(name, 0, y + 15));
      runs.forEach(({ timeline, label: run }, idx) => {
        const span = timeline.find((one) => one.name === name);
        if (!span) return;
        const long = span.end_s - span.start_s,
          x = left + (span.start_s / end) * (width - left - right);
        const barY = y + (runs.length > 1 ? 3 + idx * (thick + 2) : 5);
        rows.push(
          svg(
            "rect",
            {
              class: idx ? "whole" : "kept",
              x,
              y: barY,
              width: Math.max(2, (long / end) * (width - left - right)),
              height: thick,
              rx: 2,
            },
            hint(`${run}, ${name}: ${seconds(long)}, from ${seconds(span.start_s)}`),
          ),
        );
        if (!idx) rows.push(label(seconds(long), width, y + 15, { "text-anchor": "end", class: "strong" }));
      });
    });
    const cells = names.map((name) => [
      name,
      ...runs.map(({ timeline }) => {
        const span = timeline.find((one) => one.name === name);
        return span ? `${seconds(span.start_s)} to ${seconds(span.end_s)}` : "";
      }),
    ]);
    return [
      picture(width, names.length * pitch + 4, "How long each phase took", ...rows),
      ...(runs.length > 1
        ? [element("p", { class: "soft small", text: "The grey bars are those without pruning." })]
        : []),
      asTable(["phase", ...runs.map((run) => run.label.toLowerCase())], cells),
    ];
  });
}
