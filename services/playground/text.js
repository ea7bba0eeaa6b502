// The prompt as it was read: each token shaded by its rank, what was dropped struck out.
const LEVELS = 9,
  BLOCK = 3000,
  GAP = 8,
  BUCKET_PX = 3,
  TURNS = /[\u202a-\u202e\u2066-\u2069]/; // how a text runs, up to the end of its line if it is not set apart
const shown = {
  tokens: null,
  starts: [],
  kinds: [],
  blocks: [],
  levels: null,
  here: null,
  passages: [],
  passage: -1,
  job: 0,
};

// Ranks by descending score, 1 for the best; 0 for tokens without one.
function ranksOf(scores, numTokens) {
  const ranks = new Uint32Array(numTokens);
  const scored = scores.map((score, idx) => idx).filter((idx) => scores[idx] !== null);
  scored.sort((a, b) => scores[b] - scores[a] || a - b);
  scored.forEach((token, rank) => {
    ranks[token] = rank + 1;
  });
  return ranks;
}

// 1 to 9 by rank among the best `most`, finer at the top; 0 for all others.
function levelsOf(ranks, most) {
  const levelOf = (rank) =>
    rank && rank <= most ? Math.min(LEVELS, 1 + Math.floor(LEVELS * (1 - Math.sqrt(rank / most)))) : 0;
  return Uint8Array.from(ranks, levelOf);
}

// tokens: { pieces, lastLayers, windowSize, scores, ranks, levels, layer }
function showText(tokens) {
  const { pieces, lastLayers, windowSize } = tokens;
  const deepest = Math.max(...new Set(lastLayers));
  const kinds = pieces.map((_, idx) =>
    lastLayers[idx] < deepest ? "gone" : idx >= pieces.length - windowSize ? "window" : "kept",
  );
  let at = 0;
  Object.assign(shown, {
    tokens,
    kinds,
    levels: tokens.levels,
    here: null,
    passage: -1,
    starts: pieces.map((piece) => {
      const start = at;
      at += piece.length;
      return start;
    }),
  });
  shown.passages = passagesOf();
  $("window").textContent =
    windowSize === 1 ? "last token" : `last ${count(Math.min(windowSize, pieces.length))} tokens`;
  $("best").hidden = shown.passages.length === 0;
  $("only").hidden = $("key-dropped").hidden = !kinds.includes("gone");
  $("prompt").classList.toggle("long", pieces.length > 4 * BLOCK);
  $("prompt").classList.toggle("code", looksLikeCode(pieces.join("")));
  fill();
}

function looksLikeCode(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  const marked = lines.filter((line) => /^(\s{2,}|\t)|[{};]\s*$/.test(line));
  return lines.length > 3 && marked.length > lines.length / 4;
}

// Fills the box block by block, one a frame. A block ends with a line, so that the text flows as it would in one.
function fill() {
  const job = ++shown.job,
    box = $("prompt"),
    { pieces } = shown.tokens;
  const scrolled = box.scrollTop;
  box.replaceChildren();
  shown.blocks = [];
  let next = 0;
  const step = () => {
    if (job !== shown.job) return;
    if (next < pieces.length) {
      next = addBlock(box, next);
      next < BLOCK * 2 ? step() : requestAnimationFrame(step);
    } else {
      box.scrollTop = scrolled;
      drawMap();
    }
  };
  step();
}

function addBlock(box, first) {
  const { pieces } = shown.tokens,
    block = element("div");
  let idx = first,
    run = null,
    kind = null;
  while (idx < pieces.length && (idx < first + BLOCK || !pieces[idx - 1].endsWith("\n"))) {
    const own = classOf(idx);
    if (own !== kind) {
      run = element("span", { class: own, text: "" });
      run.first = idx;
      block.append(run);
      kind = own;
    }
    run.last = idx;
    idx += 1;
  }
  for (const span of block.children) span.textContent = pieces.slice(span.first, span.last + 1).join("");
  box.append(block);
  shown.blocks.push({ first, last: idx - 1, block });
  return idx;
}

function classOf(idx) {
  const level = shown.levels[idx] ? `s${shown.levels[idx]}` : "plain",
    own = shown.kinds[idx] === "kept" ? level : shown.kinds[idx];
  return TURNS.test(shown.tokens.pieces[idx]) ? `${own} turns` : own;
}

// Shaded stretches, best first; small gaps do not part them. Without those at the beginning and just before the
// window: whatever is asked, much attention goes there.
function passagesOf() {
  const found = [],
    { levels, kinds } = shown,
    { ranks, windowSize } = shown.tokens;
  const best = (idx) => ranks[idx] || LEVELS - levels[idx];
  for (let idx = 0; idx < kinds.length; idx += 1) {
    if (kinds[idx] !== "kept" || !levels[idx]) continue;
    const last = found.at(-1);
    if (last && idx - last.last <= GAP)
      Object.assign(last, { last: idx, best: Math.min(last.best, best(idx)) });
    else found.push({ first: idx, last: idx, best: best(idx) });
  }
  const inside = found.filter(({ first, last }) => first >= GAP && last < kinds.length - windowSize - GAP);
  return (inside.length ? inside : found).sort((a, b) => a.best - b.best);
}

// Where in the text the attention is: the best level of each stretch.
function drawMap() {
  draw($("map"), (width) => {
    const height = 54,
      base = height - 4,
      num = shown.kinds.length,
      buckets = Math.max(1, Math.min(num, Math.floor(width / BUCKET_PX)));
    const bars = Array.from({ length: buckets }, () => ({ level: 0, kept: false }));
    shown.kinds.forEach((kind, idx) => {
      const bar = bars[Math.floor((idx * buckets) / num)];
      bar.level = Math.max(bar.level, shown.levels[idx]);
      bar.kept ||= kind !== "gone";
    });
    const wide = width / buckets;
    return [
      svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" },
        svg("rect", { class: "view", y: 0, height, ...seen(width) }),
        svg("line", { class: "axis", x1: 0, x2: width, y1: base + 1, y2: base + 1 }),
        ...bars.map(({ level, kept }, idx) =>
          svg("rect", {
            class: kept ? "gold" : "whole",
            x: idx * wide,
            width: Math.max(1, wide - 1),
            y: base - 2 - (level / LEVELS) ** 2 * (base - 6),
            height: 2 + (level / LEVELS) ** 2 * (base - 6),
          }),
        ),
      ),
    ];
  });
}

// The part of a map of that width that the box shows.
function seen(width) {
  const { scrollTop, scrollHeight, clientHeight } = $("prompt");
  return { x: (scrollTop / scrollHeight) * width || 0, width: (clientHeight / scrollHeight) * width || 0 };
}

function followScroll() {
  const view = $("map").querySelector(".view");
  for (const [name, value] of Object.entries(seen($("map").clientWidth))) view?.setAttribute(name, value);
}

function spanOf(idx) {
  const found = shown.blocks.find(({ first, last }) => idx >= first && idx <= last);
  return found && [...found.block.children].find((span) => idx >= span.first && idx <= span.last);
}

function rangeOf(first, last) {
  const from = spanOf(first),
    to = spanOf(last),
    range = new Range();
  if (!from?.firstChild || !to?.firstChild) return null;
  range.setStart(from.firstChild, shown.starts[first] - shown.starts[from.first]);
  range.setEnd(to.firstChild, shown.starts[last] + shown.tokens.pieces[last].length - shown.starts[to.first]);
  return range;
}

function bringUp(idx) {
  spanOf(idx)?.scrollIntoView({ block: "nearest" });
  const range = rangeOf(idx, idx),
    box = $("prompt");
  if (!range) return;
  const at = range.getBoundingClientRect(),
    frame = box.getBoundingClientRect();
  if (at.top < frame.top + 30 || at.bottom > frame.bottom - 30)
    box.scrollTop += at.top - frame.top - box.clientHeight / 3;
}

function highlight(first, last) {
  const range = rangeOf(first, last);
  if (range && CSS.highlights) CSS.highlights.set("here", new Highlight(range));
}

function tell(idx) {
  shown.here = idx;
  highlight(idx, idx);
  const { pieces, scores, ranks, lastLayers } = shown.tokens,
    score = scores?.[idx];
  const place = ranks[idx]
    ? `rank ${count(ranks[idx])}`
    : shown.levels[idx]
      ? `level ${shown.levels[idx]} of ${LEVELS}`
      : "not ranked";
  const share = score == null ? "" : `, ${Number((score * 100).toPrecision(3))}% of the attention`;
  const fate =
    shown.kinds[idx] === "gone" ? `dropped after layer ${lastLayers[idx]}` : "kept to the last layer";
  const piece = element("bdi", { text: JSON.stringify(pieces[idx]) });
  $("token").replaceChildren(`Token ${count(idx)} `, piece, `: ${place}${share}, ${fate}`);
}

// The token at a point of the window.
function tokenAt(x, y) {
  const caret = document.caretPositionFromPoint?.(x, y) ?? document.caretRangeFromPoint?.(x, y);
  const node = caret?.offsetNode ?? caret?.startContainer,
    span = node?.parentElement;
  if (span?.first === undefined) return null;
  const at = shown.starts[span.first] + (caret.offset ?? caret.startOffset);
  let low = span.first,
    high = span.last;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (shown.starts[middle] <= at) low = middle;
    else high = middle - 1;
  }
  return low;
}

$("prompt").addEventListener("mousemove", (event) => {
  const idx = tokenAt(event.clientX, event.clientY);
  if (idx !== null && idx !== shown.here) tell(idx);
});
$("prompt").addEventListener("scroll", followScroll, { passive: true });
$("prompt").addEventListener("keydown", (event) => {
  const last = shown.kinds.length - 1,
    here = shown.here ?? -1;
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last }[event.key];
  if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  tell(Math.min(last, Math.max(0, next)));
  bringUp(shown.here);
});
$("best").addEventListener("click", () => {
  shown.passage = (shown.passage + 1) % shown.passages.length;
  const { first, last } = shown.passages[shown.passage];
  bringUp(first);
  highlight(first, last);
  $("token").textContent =
    `Passage ${shown.passage + 1} of ${shown.passages.length}, best first: tokens ${count(first)} to ${count(last)}`;
});
$("only").addEventListener("click", () => {
  const on = $("prompt").classList.toggle("only");
  $("only").setAttribute("aria-pressed", on);
  followScroll();
});
$("map").addEventListener("click", (event) => {
  const frame = $("map").getBoundingClientRect();
  const idx = Math.floor(((event.clientX - frame.left) / frame.width) * shown.kinds.length);
  bringUp(Math.min(shown.kinds.length - 1, Math.max(0, idx)));
});
