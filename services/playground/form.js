// The form: the service and its key, the text, the question, and the budgets.
const QUESTIONS = [
  "What is the special magic number for quick-fox?",
  "What is the special magic number for amber-barn?",
  "What is the pass key?",
  "What is the value of VAR HEYOK?",
];
const SELECTING = ["asl", "asl-2pass", "fastkv", "gemfilter"],
  WITHOUT_BUDGET = ["full", "gemfilter", "asl-2pass"];
const state = { card: null, running: null, turns: [], text: null, salt: hex(16), charsPerToken: 4 };

function hex(bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

function showProblem(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

// The service and its limits

async function load() {
  try {
    state.card = await fetchCard();
  } catch (error) {
    $("model").textContent = "";
    refused(error);
    return false;
  }
  const { id, max_model_len: most, winnow } = state.card;
  $("model").textContent =
    `${id} · ${count(most)} tokens of context${winnow ? ` · ${winnow.pruning.method}${winnow.prefix_cache ? " with a prefix store" : ""}` : ""}`;
  document.title = `Winnow: ${id}`;
  $("key-form").hidden = true;
  $("max-tokens").max = state.card.max_output_tokens;
  $("max-tokens").value = Math.min($("max-tokens").value, state.card.max_output_tokens);
  setSliders();
  return true;
}

// A key that is missing or wrong is asked for; everything else is told as it is.
function refused(error) {
  const isKey = error.status === 401;
  showProblem(isKey ? "" : error.message);
  $("key-problem").textContent = error.message;
  $("key-problem").hidden = !isKey || !sessionStorage.getItem(KEY);
  if (!isKey) return;
  $("key-form").hidden = false;
  $("key").focus();
  $("key").select();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  if (await load()) {
    $("key").value = "";
    $("text").focus();
  }
});

// Budgets

const sliders = {
  "select-tokens": { told: "select-told", name: "select_tokens" },
  "kv-budget": { told: "kv-told", name: "kv_budget", unlimited: null },
};

// Numbers to choose from, a quarter of an octave apart, from the least to the cap or the context.
function stepsOf(preset, least, top) {
  const steps = new Set([least, top]);
  for (let octave = 4; octave <= top; octave *= 2)
    for (const quarter of [4, 5, 6, 7]) steps.add((octave / 4) * quarter);
  if (preset) steps.add(preset);
  return [...steps].filter((step) => step >= least && step <= top).sort((a, b) => a - b);
}

function setSliders() {
  const { winnow, max_model_len: most } = state.card;
  const pruning = winnow?.pruning,
    method = pruning?.method;
  $("select-slide").hidden = !SELECTING.includes(method);
  $("kv-slide").hidden = !pruning || WITHOUT_BUDGET.includes(method);
  if (!pruning) return;
  for (const [id, slider] of Object.entries(sliders)) {
    const preset = pruning[slider.name],
      cap = winnow.caps[slider.name];
    slider.steps = stepsOf(preset, pruning.window_size + 1, Math.min(cap ?? most, most));
    slider.all = cap === null ? slider.steps.length - 1 : null;
    slider.preset =
      preset === null || preset >= most ? slider.steps.length - 1 : slider.steps.indexOf(preset);
    $(id).max = slider.steps.length - 1;
    $(id).value = slider.preset;
    tellSlider(id);
  }
}

function tellSlider(id) {
  const { steps, all, preset, told } = sliders[id],
    at = Number($(id).value);
  const text = at === all ? "all" : count(steps[at]);
  $(told).textContent = at === preset ? `${text} (preset)` : text;
  $(id).setAttribute("aria-valuetext", text);
}

for (const id of Object.keys(sliders)) $(id).addEventListener("input", () => tellSlider(id));

// What was moved: the service's own settings are left to it.
function budgets() {
  const given = {};
  for (const [id, { steps, all, preset, name, unlimited }] of Object.entries(sliders)) {
    const at = Number($(id).value);
    if (!$(id).closest(".slide").hidden && at !== preset)
      given[name] = at === all && unlimited !== undefined ? unlimited : steps[at];
  }
  return given;
}

// The text

function tellLength() {
  const length = $("text").value.length;
  $("length").textContent = length
    ? `${count(length)} characters, about ${count(Math.ceil(length / state.charsPerToken))} tokens`
    : "Nothing yet";
}

async function openFile(file) {
  if (!file) return;
  try {
    $("text").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    showProblem(`${file.name} is not a text in UTF-8.`);
    return;
  }
  showProblem("");
  $("ideas").hidden = true;
  tellLength();
  $("question").focus();
}

function showExample() {
  $("text").value = page.example;
  $("question").value = QUESTIONS[0];
  offer();
  tellLength();
  $("question").focus();
}

// Questions about the example, one click away.
function offer() {
  $("ideas").hidden = $("text").value !== page.example;
  $("ideas").replaceChildren(
    ...QUESTIONS.filter((question) => question !== $("question").value).map((question) => {
      const idea = element("button", { type: "button", text: question });
      idea.addEventListener("click", () => {
        $("question").value = question;
        offer();
        $("question").focus();
      });
      return idea;
    }),
  );
}

$("text").addEventListener("input", () => {
  tellLength();
  offer();
});
$("question").addEventListener("input", () => offer());
$("file").addEventListener("change", () => {
  openFile($("file").files[0]);
  $("file").value = "";
});
$("example").addEventListener("click", showExample);
$("example-too").addEventListener("click", () => {
  showExample();
  $("ask-form").requestSubmit();
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("ask-form").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") openFile(event.dataTransfer.files[0]);
  });
}
