// The page at GET /: asks this server what each layer says of a text, and draws the answers.
// Nothing is stored but an API key, in sessionStorage.

const BASE = new URL(".", location.href);
const KEY = "de3-key";
const POLL_MS = 2000, WINDOW_MS = 60_000, PAUSE_MS = 60, MAX_RETRIES = 5;
// Of the demo model's kind, by labels; the last one is a text that early exits get wrong.
const EXAMPLES = {
  "negative,positive": [
    "A wonderful film.",
    "The actors are fine, but the story goes nowhere.",
    "A film that nobody asked for and everybody should see.",
    "Strange, slow, and somehow impossible to look away from.",
    "Not bad.",
  ],
};
const $ = (id) => document.getElementById(id);
const state = { models: [], model: null, table: [], choice: "tau", fullDepth: null, samples: [] };

// What the slider sets: the request's field, the slider's values, how a value reads, and what it means.
const CHOICES = {
  tau: {
    name: "Threshold τ",
    label: "τ: leave at the first layer whose EDR is below it",
    values: () => (state.table.length ? state.table.map((row) => row.tau) : squares(60)),
    start: (values) => nearest(values, state.model.defaults.tau),
    text: (value) => value.toFixed(3),
    hint: "0 runs every layer. A higher τ leaves earlier and errs more often.",
  },
  target_speedup: {
    name: "Speed-up",
    label: "Mean speed-up over full depth",
    values: () => range(1, Math.min(10, Math.max(2, ...state.table.map((row) => row.speedup))), 0.25),
    start: (values) => nearest(values, 3),
    text: (value) => `${value.toFixed(2)}×`,
    hint: "The server looks τ up in the model's calibration. One text may be faster or slower than the mean.",
  },
  max_disagreement: {
    name: "Disagreement",
    label: "Largest share of labels that may differ from full depth",
    values: () => [0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2],
    start: () => 4,
    text: (value) => `${+(value * 100).toFixed(1)}%`,
    hint: "Certified with 95% confidence on held-back texts: it holds for texts like those.",
  },
  latency_budget_ms: {
    name: "Latency budget",
    label: "Time until the answer leaves the server",
    values: () => [0.5, 1, 1.5, 2, 3, 5, 8, 12, 20, 50, 100],
    start: () => 3,
    text: (value) => `${value} ms`,
    hint: "The text goes as deep as the time allows. A budget too small for the first exit is refused.",
  },
};
const REASONS = {
  threshold: "exits here",
  last_layer: "full depth",
  max_layer: "as deep as allowed",
  deadline: "time is up",
};

// --- helpers

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

/** A bar inside a track; share is from 0 to 1. */
function bar(share, kind) {
  const fill = element("i");
  fill.style.setProperty("--value", Math.min(1, Math.max(0, share)));
  return element("div", { class: kind }, fill);
}

const squares = (steps) => range(0, 1, 1 / steps).map((value) => value ** 2);
const range = (low, high, step) =>
  Array.from({ length: Math.floor((high - low) / step + 1e-6) + 1 }, (_, i) => low + i * step);
const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)}%`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i;
  });
  return best;
}

// --- the server

class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

/** The response to a request; throws Refused with the server's own words. */
async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it still running?", 3);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || null);
}

/** Classify what is typed; returns the row of the response and the model's time in ms. */
async function classify(fields, signal) {
  const text = $("text").value;
  const input = $("is-pair").checked ? { text, text_pair: $("pair").value } : text;
  const body = JSON.stringify({ model: state.model.id, input, explain: true, ...fields });
  const headers = { "Content-Type": "application/json" };
  const response = await request("classify", { method: "POST", headers, body, signal });
  const timing = /model;dur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  return { ...(await response.json()).data[0], ms: timing ? Number(timing[1]) : null };
}

// --- asking

let asking = null, timer = null, retries = 0;

/** Ask soon; a later call replaces an earlier one. */
function ask(pause = PAUSE_MS) {
  retries = 0;
  clearTimeout(timer);
  timer = setTimeout(answer, pause);
}

async function answer() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("problem").textContent = "";
  const missing = $("text").value.trim() === "" || ($("is-pair").checked && $("pair").value.trim() === "");
  if (!state.model || missing) {
    $("layers").replaceChildren();
    const what = $("is-pair").checked ? "Type both texts, and their answer appears here." : "Type a text, and its answer appears here.";
    $("summary").replaceChildren(element("p", { class: "muted" }, what));
    return;
  }
  const choice = CHOICES[state.choice];
  try {
    const row = await classify({ [state.choice]: choice.values()[$("slider").value] }, signal);
    // Full depth depends on the text alone: asked for once, not for each move of the slider.
    const asked = [state.model.id, $("text").value, $("is-pair").checked && $("pair").value].join("\n");
    const isNew = state.fullDepth?.asked !== asked;
    if (isNew) state.fullDepth = null;
    if ($("compare").checked && !state.fullDepth) state.fullDepth = { asked, ...(await classify({ tau: 0 }, signal)) };
    drawAnswer(row, $("compare").checked ? state.fullDepth : null, isNew);
    drawCurve(row.exit);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("layers").replaceChildren();
    $("summary").replaceChildren();
    refused(error, answer);
  }
}

/** Show why a request was refused: ask for a key, or say what to do; tried again when the server says so. */
function refused(error, again) {
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) {
    $("key-error").textContent = sessionStorage.getItem(KEY) ? "The server does not know this key." : "";
    $("key-form").hidden = false;
    $("main").hidden = true;
    $("key").focus();
    return;
  }
  const pause = retries < MAX_RETRIES ? error.retryAfter : null;
  const message = /[.?!]$/.test(error.message) ? error.message : `${error.message}.`;
  $("problem").textContent = pause ? `${message} Trying again in ${pause} s.` : message;
  $("expected").textContent = "";
  if (!pause) return;
  retries += 1;
  clearTimeout(timer);
  timer = setTimeout(again, pause * 1000);
}

// --- drawing

function drawAnswer(row, fullDepth, animate) {
  const { exit } = row, { num_layers: count } = exit;
  const saved = count - exit.layer;
  const time = row.ms === null ? "" : ` · ${row.ms.toFixed(1)} ms in the model`;
  const top = Math.max(...row.probs);
  const where = exit.layer === 0 ? "left before layer 1, on the embeddings" : `left after layer ${exit.layer} of ${count}`;
  const lines = [
    element("strong", {}, `${row.label} ${percent(top)}`),
    element("p", {}, `${where} · ${plural(saved, "layer")} saved${time}`),
  ];
  if (fullDepth) {
    const same = fullDepth.label === row.label ? "Full depth agrees" : "Full depth disagrees";
    const its = fullDepth.ms === null ? "" : ` after ${fullDepth.ms.toFixed(1)} ms`;
    lines.push(element("p", { class: "muted" }, `${same}: ${fullDepth.label} ${percent(Math.max(...fullDepth.probs))}${its}.`));
  }
  if (row.truncated) lines.push(element("p", { class: "muted" }, "The text was longer than the model reads, and was cut."));
  if (row.out_of_distribution) lines.push(element("p", { class: "muted" }, "This text is unlike those of the calibration."));
  $("summary").replaceChildren(...lines);
  $("tau-name").textContent = `τ = ${+exit.tau.toFixed(4)}`;

  const layers = state.model.exit_layers.map((layer, i) => {
    const ran = row.layers.find((asked) => asked.layer === layer);
    const shown = ran ?? fullDepth?.layers.find((asked) => asked.layer === layer);
    const status = layer === exit.layer ? REASONS[exit.reason] : ran ? "not sure yet" : shown ? "saved" : "not run";
    return drawLayer(layer, shown, status, layer === exit.layer ? "exit" : ran ? "ran" : "saved", exit.tau, i);
  });
  $("layers").classList.toggle("runs", animate);
  $("layers").replaceChildren(...layers);
}

function drawLayer(layer, signals, status, kind, tau, i) {
  const name = layer === 0 ? "Embeddings" : `Layer ${layer}`;
  const bars = element("div", { class: "bars", "aria-hidden": "true" });
  const probs = element("div");
  let spoken = "";
  if (signals) {
    for (const [style, value] of [["entropy", signals.entropy], ["ratio", signals.distance_ratio], ["edr", signals.edr]]) {
      bars.append(bar(value === null ? 0 : Math.sqrt(value), `bar ${style}`));
    }
    const top = Math.max(...signals.probs);
    const label = element("div", { class: "label" }, element("span", { title: signals.label }, signals.label), element("span", {}, percent(top)));
    probs.append(label, bar(top, "share"));
    spoken = [["EDR", signals.edr], ["entropy", signals.entropy], ["distance ratio", signals.distance_ratio]]
      .filter(([, value]) => value !== null)
      .map(([signal, value]) => `${signal} ${value.toFixed(4)}`)
      .join(", ");
    bars.title = spoken;
  } else {
    for (const style of ["entropy", "ratio", "edr"]) bars.append(bar(0, `bar ${style}`));
  }
  const marker = element("div", { class: "marker" });
  marker.style.setProperty("--value", Math.sqrt(tau));
  bars.append(marker);
  const title = element("div", { class: "name" }, name, element("small", {}, status));
  const item = element("li", { class: kind, "data-layer": layer }, title, bars, element("span", { class: "hidden" }, spoken), probs);
  item.style.setProperty("--row", i);
  return item;
}

/** The calibration's accuracy against its speed-up, with the default and the chosen point. */
function drawCurve(exit) {
  const rows = state.table.filter((row) => row.speedup <= 12);
  const known = rows.length > 1;
  $("curve").hidden = !known;
  if (!known) {
    $("curve-help").textContent = "This model has no calibration to show.";
    $("expected").textContent = "";
    return;
  }
  const [left, right, above, below] = [52, 408, 10, 190];
  const accuracies = rows.map((row) => row.accuracy);
  const high = Math.max(...accuracies), low = Math.min(Math.min(...accuracies), high - 0.01);
  const fastest = Math.max(...rows.map((row) => row.speedup));
  const x = (row) => left + (Math.log(row.speedup) / Math.log(fastest)) * (right - left);
  const y = (accuracy) => above + ((high - accuracy) / (high - low)) * (below - above);
  const parts = [];
  for (const share of range(0, 4, 1).map((i) => low + (i / 4) * (high - low))) {
    parts.push(svg("line", { class: "grid", x1: left, x2: right, y1: y(share), y2: y(share) }));
    parts.push(svg("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
  }
  for (const speedup of [1, 2, 3, 4, 6, 8, 12].filter((tick) => tick <= fastest)) {
    parts.push(svg("text", { x: x({ speedup }), y: below + 18, "text-anchor": "middle" }, `${speedup}×`));
  }
  parts.push(svg("text", { x: (left + right) / 2, y: below + 36, "text-anchor": "middle" }, "speed-up in layers"));
  parts.push(svg("polyline", { class: "line", points: rows.map((row) => `${x(row)},${y(row.accuracy)}`).join(" ") }));
  const usual = rows[nearest(rows.map((row) => row.tau), state.model.defaults.tau)];
  parts.push(svg("circle", { class: "default", cx: x(usual), cy: y(usual.accuracy), r: 5 }));
  const chosen = exit && exit.reason !== "deadline" && state.choice !== "latency_budget_ms";
  if (chosen && exit.lambda === state.model.defaults.lambda) {
    const row = state.table[nearest(state.table.map((each) => each.tau), exit.tau)];
    if (row.speedup <= fastest) {
      parts.push(svg("line", { class: "guide", x1: x(row), x2: x(row), y1: y(row.accuracy), y2: below }));
      parts.push(svg("circle", { class: "point", cx: x(row), cy: y(row.accuracy), r: 6 }));
    }
    $("expected").textContent =
      `On held-back texts: ${row.speedup.toFixed(1)}× in layers, ${percent(row.accuracy)} right ` +
      `(full depth ${percent(state.table[0].accuracy)}), ${percent(row.disagreement)} of labels unlike full depth.`;
  } else {
    $("expected").textContent = "";
  }
  $("curve-help").textContent = "Accuracy on held-back texts against speed-up; the ring is the model's default, the dot this setting.";
  $("curve").replaceChildren(...parts);
}

function drawSlider() {
  const choice = CHOICES[state.choice], value = choice.values()[$("slider").value];
  $("value").textContent = choice.text(value);
  $("slider").setAttribute("aria-valuetext", choice.text(value));
}

function choose(name) {
  state.choice = name;
  const choice = CHOICES[name], values = choice.values();
  $("slider").max = values.length - 1;
  $("slider").value = choice.start(values);
  $("slider-label").textContent = choice.label;
  $("hint").textContent = choice.hint;
  drawSlider();
  ask();
}

// --- live figures, from GET /metrics

/** The samples of this model that the page shows: cumulative counts by bucket. */
function read(metrics, model) {
  const latency = new Map(), exits = new Map();
  let texts = 0, layersRun = 0, layersSaved = 0;
  for (const line of metrics.split("\n")) {
    const match = /^de3_(\w+)\{(.*)\} (\S+)$/.exec(line);
    if (!match || !match[2].includes(`model="${model}"`)) continue;
    const value = Number(match[3]), limit = /le="([^"]+)"/.exec(match[2])?.[1];
    const add = (buckets) => buckets.set(limit, (buckets.get(limit) ?? 0) + value);
    if (match[1] === "request_latency_seconds_bucket") add(latency);
    else if (match[1] === "exit_layer_bucket") add(exits);
    else if (match[1] === "exit_layer_count") texts += value;
    else if (match[1] === "layers_run_total") layersRun = value;
    else if (match[1] === "layers_saved_total") layersSaved = value;
  }
  return { at: Date.now(), model, latency, exits, texts, layersRun, layersSaved };
}

/** What each bucket gained between two samples, as [upper limit, cumulative count]. */
const gained = (before, after) =>
  [...after].map(([limit, count]) => [limit === "+Inf" ? Infinity : Number(limit), count - (before.get(limit) ?? 0)])
    .sort((a, b) => a[0] - b[0]);

/** A quantile of a histogram, linear within its bucket, in seconds; null if the histogram is empty. */
function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let [lower, below] = [0, 0];
  for (const [limit, count] of buckets) {
    if (count >= share * total) {
      return limit === Infinity ? lower : lower + (limit - lower) * ((share * total - below) / (count - below));
    }
    [lower, below] = [limit, count];
  }
  return lower;
}

async function poll() {
  if (document.visibilityState === "visible" && state.model) {
    try {
      const now = read(await (await request("metrics")).text(), state.model.id);
      state.samples = state.samples.filter((old) => old.model === now.model && old.at > now.at - WINDOW_MS);
      state.samples.push(now);
      drawLive(state.samples[0], now);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;  // the next poll may succeed
    }
  }
  setTimeout(poll, POLL_MS);
}

function drawLive(before, now) {
  const seconds = (now.at - before.at) / 1000, texts = now.texts - before.texts;
  const latency = gained(before.latency, now.latency);
  const ms = (share) => {
    const value = quantile(latency, share);
    return value === null ? "–" : `${(value * 1000).toPrecision(2)} ms`;
  };
  const run = now.layersRun - before.layersRun, saved = now.layersSaved - before.layersSaved;
  const rate = texts / seconds;
  $("rate").textContent = !texts ? "–" : rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en");
  $("p50").textContent = ms(0.5);
  $("p99").textContent = ms(0.99);
  $("speedup").textContent = run ? `${((run + saved) / run).toFixed(1)}×` : "–";
  let below = 0;
  const counts = gained(before.exits, now.exits).slice(0, -1).map(([layer, count]) => {
    const here = count - below;
    below = count;
    return [layer, here];
  });
  $("exits").replaceChildren(
    ...counts.filter(([layer]) => state.model.exit_layers.includes(layer)).map(([layer, count]) => {
      const share = texts ? count / texts : 0;
      return element("li", {}, element("span", {}, layer ? `Layer ${layer}` : "Embeddings"), bar(share, "bar"), element("span", {}, percent(share, 0)));
    }),
  );
}

// --- starting

async function start() {
  try {
    state.models = (await (await request("v1/models")).json()).data;
    if (!state.models.length) throw new Refused(503, "The models are still loading", 1);
  } catch (error) {
    retries = 0;
    refused(error, start);
    return;
  }
  $("key-form").hidden = true;
  $("main").hidden = false;
  const shown = state.models.map((model) =>
    element("option", { value: model.id }, model.role === "current" ? model.id : `${model.id} (${model.role})`));
  $("model").replaceChildren(...shown);
  $("model").disabled = state.models.length < 2;
  await use(state.models[0]);
}

async function use(model) {
  state.model = model;
  state.table = [];
  try {
    const { table } = await (await request(`v1/models/${encodeURIComponent(model.id)}/calibration`)).json();
    state.table = table.filter((row) => row.lambda === model.defaults.lambda).sort((a, b) => a.tau - b.tau);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;  // without a calibration there is no curve
  }
  if (model.input !== null) $("is-pair").checked = model.input === "pair";
  $("is-pair").disabled = model.input !== null;
  $("pair-field").hidden = !$("is-pair").checked;
  const examples = EXAMPLES[model.labels.join()] ?? [];
  $("examples").hidden = examples.length === 0;
  $("examples").querySelector("ul").replaceChildren(...examples.map((text) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      $("text").value = text;
      ask(0);
    });
    return element("li", {}, button);
  }));
  if ($("text").value === "" && examples.length) $("text").value = examples[1];
  drawCurve(null);
  choose(state.choice);
}

for (const [name, choice] of Object.entries(CHOICES)) {
  const radio = element("input", { type: "radio", name: "choice", value: name });
  radio.checked = name === state.choice;
  radio.addEventListener("change", () => choose(name));
  $("choices").append(element("label", { class: "inline" }, radio, choice.name));
}
$("text").addEventListener("input", () => ask());
$("pair").addEventListener("input", () => ask());
$("compare").addEventListener("change", () => ask());
$("is-pair").addEventListener("change", () => {
  $("pair-field").hidden = !$("is-pair").checked;
  ask();
});
$("slider").addEventListener("input", () => {
  drawSlider();
  ask();
});
$("model").addEventListener("change", () => use(state.models.find((model) => model.id === $("model").value)));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  start();
});
start();
poll();
