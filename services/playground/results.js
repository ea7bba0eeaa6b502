// What is shown of one question: answers, figures, charts. A run is
// { label, text, finish_reason, usage: { prompt_tokens, completion_tokens, winnow } | null, failed }.
const FINISHED = { length: "cut at the limit", tool_calls: "calls a tool" };

function answerCard(label, id) {
  const thought = element("div", { class: "thought", hidden: true });
  const said = element("div", { class: "said", id });
  const foot = element("div", { class: "foot" });
  const card = element(
    "article",
    { class: "card answer" },
    element("h3", { text: label }),
    thought,
    said,
    foot,
  );
  card.setAttribute("aria-busy", "false");
  said.setAttribute("aria-live", "polite");
  let waiting = "",
    frame = 0;
  const flush = () => {
    const isAtEnd = said.scrollHeight - said.scrollTop - said.clientHeight < 40;
    frame = 0;
    said.append(readable(waiting));
    waiting = "";
    if (isAtEnd) said.scrollTop = said.scrollHeight;
  };
  return {
    card,
    busy(is) {
      card.classList.toggle("busy", is);
      card.setAttribute("aria-busy", is);
    },
    take({ text, thought: more }) {
      if (more) {
        thought.hidden = false;
        thought.append(readable(more));
        thought.scrollTop = thought.scrollHeight;
      }
      if (text) {
        waiting += text;
        frame ||= requestAnimationFrame(flush);
      }
    },
    foot(told) {
      foot.textContent = told;
    },
    fail(message) {
      this.busy(false);
      foot.replaceChildren(element("p", { class: "problem", role: "alert", text: message }));
    },
    end(run) {
      this.busy(false);
      if (run.usage) foot.textContent = footOf(run);
    },
  };
}

function footOf({ usage, finish_reason }) {
  const { winnow, completion_tokens } = usage,
    speed = winnow.explain?.tokens_per_s;
  return [
    ...(winnow.ttft_s ? [`first token after ${seconds(winnow.ttft_s)}`] : []),
    `${count(completion_tokens)} ${completion_tokens === 1 ? "token" : "tokens"}${speed ? `, ${speed.toFixed(speed < 10 ? 1 : 0)} a second` : ""}`,
    FINISHED[finish_reason] ?? "",
  ]
    .filter(Boolean)
    .join(" · ");
}

// Which of the full layers was chosen, where not all layers are.
const ofFull = ({ selection_layer: layer, selection_full_layer: place }) =>
  place && place !== layer + 1 ? `full layer ${place}` : "";
const numLayersOf = (winnow) => winnow.explain?.num_layers ?? null;

// Figures as { id, name, value, small }, with those of the unpruned run beside them if there is one.
function figuresOf(pruned, unpruned) {
  const { usage } = pruned,
    w = usage.winnow,
    other = unpruned?.usage?.winnow,
    numLayers = numLayersOf(w);
  const also = (told) => (other ? `${told(other)} unpruned` : "");
  const figures = [
    {
      id: "num-selected",
      name: "Went on",
      value: count(w.selected_tokens),
      small: `of ${count(usage.prompt_tokens)} tokens`,
    },
    {
      id: "selection-layer",
      name: "Layer chosen",
      value: w.selection_layer ?? "none",
      small: [numLayers ? `of 0 to ${numLayers - 1}` : "", ofFull(w)].filter(Boolean).join(", "),
    },
    {
      id: "computed",
      name: "Computed",
      value: percent(w.computed_share),
      small: also((o) => percent(o.computed_share)) || "of the prefill",
    },
    { id: "kv-kept", name: "KV kept", value: mib(w.kv_bytes_kept), small: `of ${mib(w.kv_bytes_full)}` },
  ];
  if (w.ttft_s)
    figures.push({
      id: "first-token",
      name: "First token",
      value: seconds(w.ttft_s),
      small: also((o) => seconds(o.ttft_s)) || "after the question",
    });
  if (pruned.prefill_s)
    figures.push({
      id: "prefill-time",
      name: "Prefill time",
      value: seconds(pruned.prefill_s),
      small: `${seconds(unpruned.prefill_s)} unpruned`,
    });
  if (w.cached_tokens) {
    const saved = numLayers
      ? `spared ${percent(w.saved_layer_tokens / (numLayers * usage.prompt_tokens))} of the work`
      : "tokens were there already";
    figures.push({ id: "cached", name: "From the store", value: count(w.cached_tokens), small: saved });
  }
  return figures;
}

function showFigures(figures) {
  $("figures").replaceChildren(
    ...figures.map(({ id, name, value, small }) =>
      element(
        "div",
        {},
        element("dt", { text: name }),
        element("dd", { id, text: value }, ...(small ? [element("small", { text: small })] : [])),
      ),
    ),
  );
}

function whyNot({ no_selection_reason: reason, selection_layer }, settings) {
  const method = settings?.method ?? "The method";
  const reasons = {
    off: `${method} computes every token at every layer.`,
    short_prompt: "The prompt is no longer than what may go on, so nothing was dropped.",
    threshold_not_met: "The order of the tokens never settled below the threshold, so nothing was dropped.",
  };
  return (
    reasons[reason] ??
    `${method} does not look for the layer${selection_layer === null ? "." : `: it chose layer ${selection_layer}.`}`
  );
}

function sentNote({ wire_bytes: wire, exposed_transfer_s: exposed, kv_bytes_full: full }) {
  if (!wire) return "";
  const times = full / wire;
  return `${times > 1.05 ? `${times.toFixed(1)} times less than all of it. ` : ""}Sent layer by layer while the next one was computed; ${seconds(exposed)} were waited for.`;
}

// settings: the pruning settings in force.  layers: of a report, { layer, levels } for each.
function showRuns(pruned, unpruned, settings, layers) {
  const w = pruned.usage.winnow,
    found = w.explain;
  $("told").hidden = false;
  showFigures(figuresOf(pruned, unpruned));
  drawBars(
    $("bytes"),
    [
      { name: "of every token", amount: w.kv_bytes_full, told: mib(w.kv_bytes_full), class: "whole" },
      { name: "kept", amount: w.kv_bytes_kept, told: mib(w.kv_bytes_kept), class: "kept" },
      ...(w.wire_bytes
        ? [
            {
              name: "sent from prefill to decode",
              amount: w.wire_bytes,
              told: mib(w.wire_bytes),
              class: "kept",
            },
          ]
        : []),
      ...(w.recompressed_entries
        ? [
            {
              name: "entries dropped while decoding",
              amount: 0,
              told: count(w.recompressed_entries),
              class: "whole",
            },
          ]
        : []),
    ],
    "Bytes of keys and values",
    sentNote(w),
  );
  const rho = Object.entries(w.rho)
    .map(([layer, value]) => [Number(layer), value])
    .sort(([a], [b]) => a - b);
  for (const id of ["text-section", "time-section"]) $(id).hidden = !found;
  $("layers").closest("section").hidden = !found;
  drawRho($("rho"), {
    rho,
    threshold: found?.threshold,
    chosen: w.selection_layer,
    numLayers: found?.num_layers ?? Math.max(1, ...rho.map(([layer]) => layer + 1)),
    whyNot: whyNot(w, settings),
  });
  if (!found) return;
  const numTokens = found.pieces.length;
  drawLayers($("layers"), {
    entries: found.layer_entries,
    full: found.layer_entries_full,
    bytes: found.layer_bytes,
    chosen: w.selection_layer,
  });
  showTimes(pruned, unpruned);
  const ranks = ranksOf(found.scores, numTokens);
  const tokens = {
    pieces: found.pieces.map(readable),
    lastLayers: found.last_layers,
    windowSize: found.window_size,
    scores: found.scores,
    ranks,
    levels: levelsOf(ranks, numShaded(w, found)),
  };
  showText(tokens);
  if (layers) chooseLayers(layers, tokens, found.layer);
}

function showTimes(...runs) {
  drawTimes(
    $("time"),
    runs
      .filter((run) => run?.usage?.winnow.explain)
      .map((run) => ({ label: run.label, timeline: run.usage.winnow.explain.timeline })),
  );
}

// Ranks that are shaded: those that went on, or the best quarter where all did.
function numShaded({ selected_tokens: selected }, { pieces, window_size: windowSize }) {
  return Math.max(
    1,
    selected < pieces.length ? selected - windowSize : Math.ceil((pieces.length - windowSize) / 4),
  );
}

// The order at each layer, of a report.  levels: one digit per token.
function chooseLayers(layers, tokens, chosen) {
  $("layer-choice").hidden = layers.length < 2;
  $("layer").replaceChildren(
    ...layers.map(({ layer }) => new Option(layer, layer, layer === chosen, layer === chosen)),
  );
  $("layer").addEventListener("change", () => {
    const layer = Number($("layer").value),
      { levels } = layers.find((one) => one.layer === layer);
    const own =
      layer === chosen
        ? tokens
        : {
            ...tokens,
            scores: null,
            ranks: new Uint32Array(levels.length),
            levels: Uint8Array.from(levels, Number),
          };
    showText(own);
  });
}
