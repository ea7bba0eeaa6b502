// Asking once or twice, and what is remembered of earlier questions.

// Nothing is dropped from the prompt, nor while the answer is generated.
const UNPRUNED = { method: "full", decode_budget: null, decode_floor: null };

// Streams one answer into its view.
async function answerOne(view, label, request, signal) {
  const run = { label, text: "", thinks: false, finish_reason: null, usage: null },
    begun = performance.now();
  const clock = setInterval(
    () =>
      view.foot(
        `${run.text ? "answering" : run.thinks ? "thinking" : "reading"}, ${((performance.now() - begun) / 1000).toFixed(1)} s`,
      ),
    100,
  );
  const take = (part) => {
    run.text += part.text ?? "";
    run.thinks ||= Boolean(part.thought);
    view.take(part);
  };
  view.busy(true);
  try {
    Object.assign(run, await askExplained(request, signal, take));
    view.end(run);
  } catch (error) {
    if (error.name === "AbortError") {
      view.busy(false);
      view.foot("stopped");
    } else view.fail(error.message);
    run.failed = error;
  } finally {
    clearInterval(clock);
  }
  return run;
}

// A prompt that is too long to be explained token by token is asked all the same.
async function askExplained(request, signal, take) {
  try {
    return await ask(state.card, { ...request, signal }, take);
  } catch (error) {
    if (error.param !== "winnow.explain") throw error;
    return ask(state.card, { ...request, winnow: { ...request.winnow, explain: undefined }, signal }, take);
  }
}

// What the form asks for; null if it asks nothing.
function requestOf() {
  const prompt = [$("text").value.trimEnd(), $("question").value.trim()].filter(Boolean).join("\n\n");
  return prompt
    ? {
        prompt,
        maxTokens: Number($("max-tokens").value),
        winnow: { explain: true, ...budgets() },
        salt: `${state.salt}-pruned`,
      }
    : null;
}

// Empties what is shown for a new question.
function clear(question) {
  $("empty").hidden = true;
  $("found").hidden = false;
  for (const id of ["told", "turns", "note"]) $(id).hidden = true;
  $("answers").replaceChildren();
  $("asked").textContent = question;
  $("asked").hidden = !question;
  if (matchMedia("(max-width: 62rem)").matches) $("found").scrollIntoView({ block: "start" });
}

// First pruned, then whole if that is wanted: at the same time each would take the other's time. Each has a part of
// the prefix store that is this tab's alone, so that a first question is computed from its beginning.
async function askAll(request) {
  const { signal } = state.running,
    text = $("text").value,
    question = $("question").value.trim();
  const settings = { ...state.card.winnow?.pruning, ...budgets() };
  if (text !== state.text) Object.assign(state, { text, turns: [] });
  clear(question);
  const views = [
    answerCard("Pruned", "answer"),
    ...($("compare").checked ? [answerCard("Without pruning", "full-answer")] : []),
  ];
  $("answers").append(...views.map((view) => view.card));
  views[1]?.foot("asked when the pruned one has ended, so that neither slows the other");
  const pruned = await answerOne(views[0], "Pruned", request, signal);
  if (pruned.usage) {
    learn(pruned, request.prompt);
    showRuns(pruned, null, settings);
    remember(question, pruned);
  }
  if (pruned.failed?.status === 401) refused(pruned.failed);
  if (pruned.failed || signal.aborted) {
    views[1]?.card.remove();
    return;
  }
  if (!views[1]) return;
  const whole = { ...request, winnow: { explain: true, ...UNPRUNED }, salt: `${state.salt}-whole` };
  const unpruned = await answerOne(views[1], "Without pruning", whole, signal);
  if (unpruned.usage) {
    showFigures(figuresOf(pruned, unpruned));
    showTimes(pruned, unpruned);
    compare(pruned, unpruned);
  }
}

function compare(pruned, unpruned) {
  const [one, other] = [pruned, unpruned].map((run) => run.usage.winnow.cached_tokens);
  const stored =
    one === other
      ? ""
      : ` The pruned one has ${count(one)} tokens from the prefix store, the other one ${count(other)}.`;
  $("note").hidden = false;
  $("note").textContent =
    `${pruned.text === unpruned.text ? "Both answers are the same." : "The answers differ."}${stored}`;
}

// How long this model's tokens are, for the next estimate.
function learn(run, prompt) {
  if (run.usage.prompt_tokens > 50) state.charsPerToken = prompt.length / run.usage.prompt_tokens;
  tellLength();
}

// From the second question on, what each one about the same text took.
function remember(question, { text, usage }) {
  state.turns.push({ question: question || "(none)", text, usage });
  $("turns").hidden = state.turns.length < 2;
  $("turns")
    .querySelector("tbody")
    .replaceChildren(
      ...state.turns.map(({ question: asked, text: said, usage: { prompt_tokens, winnow } }) =>
        element(
          "tr",
          {},
          element("td", { text: asked }),
          element("td", { text: readable(said.length > 60 ? `${said.slice(0, 60)}…` : said) }),
          ...[
            seconds(winnow.ttft_s),
            `${count(winnow.cached_tokens)} of ${count(prompt_tokens)}`,
            percent(winnow.computed_share),
          ].map((told) => element("td", { class: "number", text: told })),
        ),
      ),
    );
}

$("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (state.running) return;
  showProblem("");
  const request = requestOf();
  if (!request) {
    showProblem("Give a text, a question, or both.");
    $("text").focus();
    return;
  }
  state.running = new AbortController();
  $("go").disabled = true;
  $("stop").hidden = false;
  try {
    if (state.card || (await load())) await askAll(request);
  } finally {
    state.running = null;
    $("go").disabled = false;
    $("stop").hidden = true;
  }
});
$("stop").addEventListener("click", () => state.running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("ask-pane").hidden)
    $("ask-form").requestSubmit();
  if (event.key === "Escape") state.running?.abort();
});

// What the page was made for: to ask, or to show one answer that it has.

function showReport({ model, settings, runs: [pruned, unpruned], layers, note }) {
  document.body.classList.add("report");
  document.title = `What ${settings.method} kept of ${count(pruned.usage.prompt_tokens)} tokens`;
  $("model").textContent = `${model} · ${settings.method}`;
  $("found").hidden = false;
  for (const [run, id] of [
    [pruned, "answer"],
    [unpruned, "full-answer"],
  ]) {
    const view = answerCard(run.label, id);
    view.card.querySelector(".said").textContent = readable(run.text);
    view.end(run);
    $("answers").append(view.card);
  }
  showRuns(pruned, unpruned, settings, layers);
  compare(pruned, unpruned);
  $("note").textContent += ` ${note}`;
}

const page = JSON.parse($("data").textContent);
if (page.report) {
  showReport(page.report);
} else {
  $("ask-pane").hidden = $("empty").hidden = false;
  load();
}
