// The page at GET /: classifies a text on this server, and draws the answer of each layer.
// It stores nothing but an API key, in sessionStorage.

const BASE = new URL(".", location.href);
const KEY = "de3-key";
const [POLL_MS, WINDOW_MS, PAUSE_MS, UPSTREAM_PAUSE_MS, MAX_RETRIES] = [2000, 60_000, 60, 1500, 5];
const POLLS_PER_AUDIT = 5; // the results of audits are polled less often: they change slowly
const MAX_CLASSES = 10; // shown until the user asks for all
const MAX_SPEEDUP = 100; // a higher one means that nearly all texts exit at layer 0
// Texts for models like the demo, by labels; of the last one, layer 0 is too unsure to be taken.
const EXAMPLES = {
  "negative,positive": [
    "A wonderful film.",
    "The actors are fine, but the story goes nowhere.",
    "A film that nobody asked for and everybody should see.",
    "You could do worse than spend an evening with it, but you could also do better.",
    "Not bad.",
  ],
};
const $ = (id) => document.getElementById(id);
// inForce: the tau_choice of requests without exit options. hasMoved: the user has moved the slider. compared: the
// answers to the page's own requests at full depth, which the live figures leave out. warm: the model that has answered once.
const state = {
  models: [], model: null, table: [], choice: "tau", hasMoved: false, inForce: null, fullDepth: null, shown: null,
  samples: [], compared: [], warm: null,
};

// The exit options of the slider, by request field: values, initial value, text and hint; calibrated: needs a table.
const CHOICES = {
  tau: {
    name: "Threshold τ",
    label: () => `τ: exit at the first layer whose ${signal(state.model.defaults.signal).name} is below it`,
    values: () => {
      const grid = state.table.length ? state.table.map((row) => row.tau) : squares(60);
      return [...new Set([...grid, state.inForce.tau])].sort((a, b) => a - b);
    },
    start: (values) => values.indexOf(state.inForce.tau),
    text: (value) => value.toFixed(3),
    hint: "0 runs every layer. A higher τ exits earlier and errs more often.",
  },
  target_speedup: {
    name: "Speed-up",
    calibrated: true,
    label: () => "Mean speed-up over full depth",
    values: () => range(1, Math.min(10, Math.max(2, ...state.table.map((row) => row.speedup))), 0.25),
    start: (values) => nearest(values, 3),
    text: (value) => `${value.toFixed(2)}×`,
    hint: "The server looks τ up in the model's calibration. One text may be faster or slower than the mean.",
  },
  max_disagreement: {
    name: "Disagreement",
    calibrated: true,
    label: () => `Largest share of ${things()} that may differ from full depth`,
    values: () => [0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2],
    start: () => 4,
    text: (value) => `${+(value * 100).toFixed(1)}%`,
    hint: "Certified with 95% confidence on held-out texts: it holds for texts like those.",
  },
  latency_budget_ms: {
    name: "Latency budget",
    label: () => "Time until the answer leaves the server",
    values: () => [0.5, 1, 1.5, 2, 3, 5, 8, 12, 20, 50, 100],
    start: () => 3,
    text: (value) => `${value} ms`,
    hint: "The text goes as deep as the time allows. A budget too small for the first exit is refused.",
  },
};
// The signals: name, and what the legend adds to it. Others keep their name.
const SIGNALS = {
  risk: { name: "risk", more: " that the answer differs from full depth" },
  edr: { name: "EDR", more: ": the two combined" },
  entropy: { name: "entropy", more: ", the signal of the exit rule" },
};
const signal = (name) => SIGNALS[name] ?? { name, more: "" };
// Exit reasons; others keep their name.
const REASONS = {
  threshold: "exits here",
  last_layer: "full depth",
  max_layer: "deepest allowed layer",
  deadline: "deadline reached",
  upstream: "asked the upstream",
  upstream_failed: "the upstream failed",
};
// Sources of the τ in force, by set_by; others are options of the server.
const SOURCES = {
  overload: () => "raised under load",
  guarantee: ({ requested, guarantee }) =>
    `chosen by the guarantee that at most ${guaranteed(guarantee ?? { max_disagreement: requested })}`,
};

// --- helpers

/** Set attributes and children of a new node; returns the node. */
function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const element = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const note = (text) => element("p", { class: "muted" }, text);

/** A bar in a track, with a marker; share and mark are from 0 to 1, or null for none. */
function bar(share, kind, mark = null) {
  const track = element("div", { class: kind });
  const add = (tag, style, value) => {
    if (value === null) return;
    const part = element(tag, { class: style });
    part.style.setProperty("--value", Math.min(1, Math.max(0, value)));
    track.append(part);
  };
  add("i", "", share);
  add("div", "marker", mark);
  return track;
}

/** An item of a list of shares: a name, a bar and a text. */
const shareItem = (name, text, kind, ...bars) =>
  element("li", { class: kind }, element("span", {}, name), bar(...bars), element("span", {}, text));

/** True if a row, or an exit, uses the model's default signal. */
const isDefault = ({ signal, lambda }) =>
  signal === state.model.defaults.signal && lambda === state.model.defaults.lambda;
const squares = (steps) => range(0, 1, 1 / steps).map((value) => value ** 2);
const range = (low, high, step) =>
  Array.from({ length: Math.floor((high - low) / step + 1e-6) + 1 }, (_, i) => low + i * step);
const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)}%`;
const atMost = (share) => `${+(share * 100).toFixed(2)}%`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Index of the value that is nearest to a target. */
const nearest = (values, wanted) =>
  values.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best), 0);
const nearestRow = (rows, tau) => rows[nearest(rows.map((row) => row.tau), tau)];

// --- the server

let lastKey = null; // if the browser blocks sessionStorage, the key lasts until the page is reloaded

function key() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return lastKey;
  }
}

function keepKey(value) {
  lastKey = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    /* blocked */
  }
}

class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

/** The body (text) and headers of a response; throws Refused with the server's message. */
async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key() ? { Authorization: `Bearer ${key()}` } : {}) };
  let response, body;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
    body = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it still running?", 3);
  }
  if (response.ok) return { body, headers: response.headers };
  let message = `The server answered with status ${response.status}.`;
  try {
    message = JSON.parse(body).error.message ?? message;
  } catch {
    /* the response of a proxy */
  }
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || null);
}

const getJson = async (path) => JSON.parse((await request(path)).body);

/** Classify an input; returns the row of the response, the model's ms (or null) and the total in s (or NaN). */
async function classify(model, input, fields, signal) {
  const sent = JSON.stringify({ model: model.id, input, explain: true, ood: true, ...fields });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: sent, signal };
  const { body, headers } = await request("classify", options);
  const [, ms = null, total] = /model;dur=([\d.]+).*total;dur=([\d.]+)/.exec(headers.get("Server-Timing") ?? "") ?? [];
  const { data, tau_choice } = JSON.parse(body);
  return { ...data[0], tau_choice, ms: ms && Number(ms), seconds: Number(total) / 1000 };
}

// --- requests

let asking = null, timer = null, retries = 0;

/** Cancel the current and the scheduled request. */
function cancel() {
  clearTimeout(timer);
  asking?.abort();
}

/** Schedule a request, if there is a model; a later call replaces an earlier one. */
function ask(pause = PAUSE_MS) {
  if (!state.model) return;
  if (state.model.has_upstream) pause = Math.max(pause, UPSTREAM_PAUSE_MS); // each text may cost a call
  retries = 0;
  clearTimeout(timer);
  timer = setTimeout(answer, pause);
}

const hasExits = () => state.model.exit_layers.length > 1;
const isDefaultTau = () => state.choice === "tau" && !state.hasMoved;

/** The exit option of a request. */
function option() {
  const { signal, lambda } = state.model.defaults;
  if (!hasExits()) return { tau: 0 };
  // The model's own signal changes nothing, but texts of requests without any option may be audited.
  return isDefaultTau() ? { signal, lambda } : { [state.choice]: CHOICES[state.choice].values()[$("slider").value] };
}

async function answer() {
  cancel();
  asking = new AbortController();
  const { model } = state, { signal } = asking;
  const isPair = $("is-pair").checked, text = $("text").value, text_pair = $("pair").value;
  $("problem").textContent = "";
  if (text.trim() === "" || (isPair && text_pair.trim() === "")) {
    clearAnswer(note(`Type ${isPair ? "both texts, and their" : "a text, and its"} answer appears here.`));
    return;
  }
  const input = isPair ? { text, text_pair } : text, wasDefault = isDefaultTau();
  const redact = isTokens() && $("redact").checked ? { redact: true } : {};
  const compares = hasExits() && !model.has_upstream && $("compare").checked; // full depth would cost a call
  try {
    if (state.warm !== model && !model.has_upstream) {
      const first = await classify(model, input, { tau: 0 }); // not shown: it may take many times as long as the next
      if (state.model !== model) return;
      state.compared.push(first);
      state.warm = model;
      if (signal.aborted) return;
    }
    const row = await classify(model, input, { ...option(), ...redact }, signal);
    // Full depth depends on the text alone: one request, not one for each move of the slider.
    const asked = JSON.stringify([model.id, input, redact]);
    const isNew = state.fullDepth?.asked !== asked;
    if (isNew) state.fullDepth = null;
    if (compares && !state.fullDepth) {
      // Never aborted: the server would count some of the aborted requests.
      const fullDepth = { asked, ...(await classify(model, input, { tau: 0, ...redact })) };
      if (state.model === model) state.compared.push(fullDepth);
      if (signal.aborted) return;
      state.fullDepth = fullDepth;
    }
    if (hasExits() && wasDefault && isDefaultTau()) setInForce(row.tau_choice);
    drawAnswer(row, text, compares ? state.fullDepth : null, isNew);
    drawSpans(row, text);
    drawCurve(row.exit);
  } catch (error) {
    if (signal.aborted) return;
    clearAnswer();
    if (error.status === 404 && (await isGone(model))) start();
    else if (!signal.aborted) refused(error, answer);
  }
}

/** True if a model is no longer served, for example after its next version was loaded. */
const isGone = (model) =>
  getJson("v1/models").then(
    ({ data }) => data.every((other) => other.id !== model.id),
    () => false,
  );

/** Ask for a key, or show why a request was refused; retry after the time that the server names. */
function refused(error, again) {
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) {
    $("key-error").textContent = key() ? "Unknown API key." : "";
    $("key-form").hidden = false;
    $("main").hidden = true;
    $("key").focus();
    return;
  }
  const pause = retries < MAX_RETRIES ? error.retryAfter : null;
  const message = /[.?!]$/.test(error.message) ? error.message : `${error.message}.`;
  const problem = pause ? `${message} Retrying in ${pause} s.` : message;
  $($("main").hidden ? "key-error" : "problem").textContent = problem;
  $("expected").textContent = "";
  if (!pause) return;
  retries += 1;
  clearTimeout(timer);
  timer = setTimeout(again, pause * 1000);
}

// --- drawing

function clearAnswer(...message) {
  $("layers").replaceChildren();
  $("summary").replaceChildren(...message);
  drawClasses({ probs: null });
  drawSpans({}, "");
}

/** True for a row of a regression model, whose answer is a value. */
const isValue = (row) => row.value !== undefined;

const hasClasses = () => state.model?.tolerance == null;
const isTokens = () => Boolean(state.model?.span_labels); // a token classifier, whose answers are spans
const things = () => (isTokens() ? "answers" : hasClasses() ? "labels" : "values");

/** What a guarantee bounds, after "at most". */
const guaranteed = ({ max_disagreement, max_missed }) =>
  [
    ...(max_disagreement ? [`${atMost(max_disagreement)} of ${things()} differ from full depth`] : []),
    ...(max_missed ? [`${atMost(max_missed)} of the texts that full depth flags are missed`] : []),
  ].join(", and at most ");

/** The phrase for an answer that the calibration counts as correct. */
function rightMeans(source) {
  if (hasClasses()) return source ? `as ${source} answers` : "right";
  return `within ${state.model.tolerance} of ${source ? `the answer of ${source}` : "the label"}`;
}

const answerOf = (row) => (isValue(row) ? String(+row.value.toPrecision(4)) : percent(Math.max(...row.probs)));

// The number of spans, the labels of a multi-label model, or the answer.
function named(row) {
  if (row.spans) return plural(row.spans.length, "span");
  return row.labels ? row.labels.join(", ") || "no label" : `${row.label} ${answerOf(row)}`;
}

/** True if two answers count as the same. */
function isSame(one, other) {
  const places = ({ spans }) => JSON.stringify(spans.map(({ start, end, label }) => [start, end, label]));
  if (one.spans) return places(one) === places(other);
  if (isValue(one)) return Math.abs(one.value - other.value) <= state.model.tolerance;
  return one.labels ? one.labels.join("\n") === other.labels.join("\n") : one.label === other.label;
}

function drawAnswer(row, text, fullDepth, animate) {
  const { exit } = row, count = exit.num_layers, saved = count - exit.layer;
  const layer = exit.layer === 0 ? "before layer 1, on the embeddings" : `after layer ${exit.layer} of ${count}`;
  const ran = saved ? `exited ${layer} · ${plural(saved, "layer")} ${exit.reason === "deadline" ? "not run" : "saved"}` : `ran all ${plural(count, "layer")}`;
  const where = exit.reason === "upstream" ? "no exit was sure: the upstream answered" : ran;
  const ms = (one, words) => (one.ms === null ? "" : words(one.ms.toFixed(1)));
  const lines = [
    element("strong", {}, named(row)),
    element("p", {}, `${where}${ms(row, (time) => ` · ${time} ms in the model`)}`),
  ];
  if (fullDepth) {
    const agrees = isSame(row, fullDepth) ? "agrees" : "disagrees";
    lines.push(note(`Full depth ${agrees}: ${named(fullDepth)}${ms(fullDepth, (time) => ` after ${time} ms`)}.`));
  }
  if (row.flag) {
    const deep = exit.layer === count ? ", decided at full depth" : "";
    const safe = exit.reason === "threshold" ? "safe early" : `not flagged${deep}`;
    const how = row.flag.flagged ? `flagged${deep}` : row.flag.flagged === null ? "not read to its end" : safe;
    const { flag: wanted, thresholds, max_missed } = state.model, { label, prob } = row.flag;
    const least = wanted?.threshold ?? thresholds?.[state.model.labels.indexOf(label)] ?? 0.5;
    const why = prob === undefined ? "" : ` (${label} ${percent(prob)}, flagged from ${atMost(least)})`;
    const most = max_missed == null ? "any number" : `at most ${atMost(max_missed)}`;
    lines.push(note(`This model is a guard: the text is ${how}${why}. Early exits may miss ${most} of the flagged texts.`));
  }
  const end = [...text].slice(0, row.truncated_at ?? 0).slice(-30).join(""); // of a pair, it is unknown
  if (row.truncated) lines.push(note(`Too long for the model: truncated${end && ` after “…${end}”`}.`));
  if (row.ood_score != null)
    lines.push(note(`Out-of-distribution score: ${row.ood_score.toFixed(2)} (1: unlike the calibration's texts).`));
  if (row.out_of_distribution) lines.push(note("This text is far from those that the model was calibrated on."));
  $("summary").replaceChildren(...lines);
  drawClasses(row);
  $("tau-name").textContent = `τ = ${+exit.tau.toFixed(4)}`;
  const { name, more } = signal(exit.signal);
  $("score-name").textContent = name + more;

  const reason = REASONS[exit.reason] ?? exit.reason;
  const layers = state.model.exit_layers.map((layer, i) => {
    const at = (passed) => passed?.layers.find((one) => one.layer === layer);
    const ran = at(row), shown = ran ?? at(fullDepth);
    const goesOn = row.flag && ran?.score < exit.tau ? "flagged: no exit" : "not sure yet";
    const status = layer === exit.layer ? reason : ran ? goesOn : shown ? "saved" : "not run";
    const kind = layer === exit.layer ? "exit" : ran ? "ran" : "saved";
    return drawLayer(layer, shown, name, status, kind, exit.tau, i);
  });
  $("layers").classList.toggle("runs", animate);
  $("layers").replaceChildren(...layers);
}

/** The classes with their probabilities, and for a multi-label model which of them are assigned. */
function drawClasses(row) {
  state.shown = row;
  const { probs, label, labels } = row, { labels: names, thresholds } = state.model;
  const all = $("more").getAttribute("aria-expanded") === "true";
  const ranked = [...(probs ?? []).keys()].sort((a, b) => probs[b] - probs[a]);
  const more = ranked.length - MAX_CLASSES;
  $("assigned").hidden = !ranked.length || !thresholds;
  $("more").hidden = more <= 0;
  $("more").textContent = all ? `Show ${MAX_CLASSES}` : `${more.toLocaleString("en")} more`;
  $("classes").classList.toggle("all", all);
  $("classes").tabIndex = all && more > 0 ? 0 : -1; // a scrollable list must be focusable
  $("classes").replaceChildren(
    ...ranked.slice(0, all ? undefined : MAX_CLASSES).map((k) => {
      const isAssigned = labels ? labels.includes(names[k]) : names[k] === label;
      const [relation, mark] = isAssigned ? [">", " ✓"] : ["≤", ""];
      const why = thresholds ? ` ${relation} ${atMost(thresholds[k])}${mark}` : "";
      const text = `${percent(probs[k])}${why}`;
      return shareItem(names[k], text, isAssigned ? "assigned" : "", probs[k], "bar", thresholds?.[k]);
    }),
  );
}

/** The text with its spans marked, or redacted. Offsets count code points, which [...text] iterates over. */
function drawSpans({ spans, text: redacted }, text) {
  const characters = [...text], parts = [];
  let at = 0;
  for (const { start, end, label, score } of redacted === undefined ? (spans ?? []) : []) {
    if (end <= at) continue; // of an emoji, several tokens may have the same place
    const from = Math.max(start, at);
    const name = element("small", {}, ` ${label} ${percent(score, 0)}`);
    parts.push(characters.slice(at, from).join(""));
    parts.push(element("mark", {}, characters.slice(from, end).join(""), name));
    at = end;
  }
  $("marked").hidden = !spans;
  $("marked").replaceChildren(...parts, redacted ?? characters.slice(at).join(""));
}

function drawLayer(layer, signals, signalName, status, kind, tau, i) {
  const values = [
    ["entropy", "entropy", signals?.entropy ?? null],
    ["ratio", "distance ratio", signals?.distance_ratio ?? null],
    ["score", signalName, signals?.score ?? null],
  ];
  const known = values.filter(([, , value]) => value !== null);
  const spoken = known.map(([, name, value]) => `${name} ${value.toFixed(4)}`).join(", ");
  const bars = values.map(([style, , value]) => bar(value === null ? null : Math.sqrt(value), `bar ${style}`));
  const marker = bar(null, "", Math.sqrt(tau));
  const answer = element("div");
  if (signals?.spans) {
    answer.append(element("div", { class: "label" }, element("span", {}, named(signals))));
  } else if (signals) {
    const label = element("span", { title: signals.label }, signals.label);
    answer.append(element("div", { class: "label" }, label, element("span", {}, answerOf(signals))));
    if (!isValue(signals)) answer.append(bar(Math.max(...signals.probs), "share"));
  }
  const name = layer === 0 ? "Embeddings" : `Layer ${layer}`;
  const item = element(
    "li",
    { class: kind, "data-layer": layer },
    element("div", { class: "name" }, name, element("small", {}, status)),
    element("div", { class: "bars", title: spoken, "aria-hidden": "true" }, ...bars, marker),
    element("span", { class: "hidden" }, spoken),
    answer,
  );
  item.style.setProperty("--row", i);
  return item;
}

/** The calibration's accuracy against its speed-up, with the default and the chosen point. */
function drawCurve(exit) {
  const rows = state.table.filter((row) => row.speedup <= 12);
  const fastest = Math.max(...rows.map((row) => row.speedup));
  const known = rows.length > 1 && fastest > 1;
  $("accuracy").hidden = !known;
  $("expected").textContent = "";
  if (!known) return;
  // The source of the labels if the data had none; accuracy is then the agreement with it.
  const source = state.model.self_labelled && (state.model.has_original ? "the original model" : "full depth");
  const [left, right, above, below] = [52, 408, 10, 190];
  const accuracies = rows.map((row) => row.accuracy);
  const high = Math.max(...accuracies), low = Math.min(...accuracies, high - 0.01);
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
  const usual = nearestRow(rows, state.inForce.tau);
  parts.push(svg("circle", { class: "default", cx: x(usual), cy: y(usual.accuracy), r: 5 }));
  const chosen = exit && exit.reason !== "deadline" && state.choice !== "latency_budget_ms";
  if (chosen && isDefault(exit)) {
    const row = nearestRow(state.table, exit.tau);
    if (row.speedup <= fastest) {
      parts.push(svg("line", { class: "guide", x1: x(row), x2: x(row), y1: y(row.accuracy), y2: below }));
      parts.push(svg("circle", { class: "point", cx: x(row), cy: y(row.accuracy), r: 6 }));
    }
    const speedup = row.speedup > MAX_SPEEDUP ? "nearly all exit at layer 0" : `${row.speedup.toFixed(1)}× in layers`;
    $("expected").textContent =
      `On held-out texts: ${speedup}, ${percent(row.accuracy)} ${rightMeans(source)} ` +
      `(full depth ${percent(state.table[0].accuracy)}), ` +
      `${percent(row.disagreement)} of ${things()} differ from ${source || "full depth"}.`;
  }
  $("curve-help").textContent =
    `${source ? `Agreement with ${source}` : "Accuracy"} on held-out texts against speed-up; ` +
    "the ring is the τ of requests that set nothing, the dot this setting.";
  $("curve").replaceChildren(...parts);
}

/** The disagreement that audits measured at the τ in force, the calibration's, and the guarantee. */
function drawMeasured({ audits, measured, calibrated, guarantee, tau }, learned) {
  const parts = [];
  if (tau.reason === "no_exits") {
    parts.push("There is nothing to measure: every text runs to full depth.");
  } else if (guarantee && tau.tau === 0) {
    const why = tau.reason === "change" ? "More did, so for now" : "For now";
    parts.push(
      `The server guarantees that at most ${guaranteed(guarantee)}.`,
      `${why} every text runs to full depth, until enough live texts show that earlier exits keep the guarantee ` +
        `(${audits} so far).`,
    );
  } else if (measured.disagreement === null) {
    parts.push("No live text has been measured against full depth yet.");
  } else {
    const original = state.model.has_original ? " from the original model" : "";
    const heldOut = calibrated ? `; on held-out texts ${atMost(calibrated.disagreement)}${original}` : "";
    parts.push(
      `Measured on ${plural(audits, "live text")} that also ran to full depth, at the server's default ` +
        `τ = ${+tau.tau.toFixed(4)}: ${atMost(measured.disagreement)} of ${things()} differ ` +
        `(${atMost(measured.lower)} to ${atMost(measured.upper)} with ${atMost(measured.confidence)} confidence)` +
        `${heldOut}.`,
    );
  }
  if (guarantee && tau.tau > 0) parts.push(`Guaranteed: at most ${guaranteed(guarantee)}.`);
  if (learned)
    parts.push(`Exits are learned from live texts (${plural(learned.records, "record")}): ${learned.message}.`);
  $("measured").textContent = parts.join(" ");
}

function drawSlider() {
  const choice = CHOICES[state.choice], value = choice.values()[$("slider").value];
  $("value").textContent = choice.text(value);
  $("slider").setAttribute("aria-valuetext", choice.text(value));
}

/** Place the slider at the start of its choice. */
function resetSlider() {
  const choice = CHOICES[state.choice], values = choice.values();
  $("slider").max = values.length - 1;
  $("slider").value = choice.start(values);
  drawSlider();
}

/** Show the τ of requests without exit options; the slider for τ follows it until the user moves it. */
function setInForce(choice) {
  state.inForce = choice;
  const { tau, set_by } = choice;
  const isModels = tau === state.model.defaults.tau && (!set_by || set_by === "default");
  const option = set_by && `the server's --${(set_by === "default" ? "tau" : set_by).replaceAll("_", "-")}`;
  const source = isModels ? "the model's default" : (SOURCES[set_by]?.(choice) ?? option ?? "set by the server");
  $("in-force").textContent = `Requests that set nothing: τ = ${+tau.toFixed(4)}, ${source}.`;
  if (isDefaultTau()) resetSlider();
}

function choose(name) {
  state.choice = name;
  state.hasMoved = false;
  document.querySelector(`[value=${name}]`).checked = true;
  if (!state.model) return;
  $("slider-label").textContent = CHOICES[name].label();
  $("hint").textContent = CHOICES[name].hint;
  resetSlider();
  ask();
}

// --- live figures, from GET /metrics

/** The metrics of a model, less the page's comparisons: values summed over other labels, cumulative counts by bucket. */
function read(metrics, model) {
  const totals = {}, buckets = {};
  for (const line of metrics.split("\n")) {
    const [, metric, labels, value] = /^de3_(\w+)\{(.*)\} (\S+)$/.exec(line) ?? [];
    if (![model.id, model.name].some((name) => labels?.includes(`model="${name}"`))) continue;
    const limit = /le="([^"]+)"/.exec(labels)?.[1].replace("+Inf", "Infinity");
    if (limit === undefined) totals[metric] = (totals[metric] ?? 0) + Number(value);
    else (buckets[metric] ??= {})[limit] = (buckets[metric][limit] ?? 0) + Number(value);
  }
  for (const { exit, seconds } of state.compared) {
    totals.exit_layer_count -= 1;
    totals.layers_run_total -= exit.layer;
    for (const [metric, value] of [["exit_layer_bucket", exit.layer], ["request_latency_seconds_bucket", seconds]]) {
      for (const limit in buckets[metric]) if (value <= Number(limit)) buckets[metric][limit] -= 1;
    }
  }
  return { at: Date.now(), totals, buckets };
}

/** The increase of each bucket of a histogram between two samples, as [upper limit, cumulative count]. */
const gained = (metric, before, after) =>
  Object.entries(after.buckets[metric] ?? {})
    .map(([limit, count]) => [Number(limit), count - (before.buckets[metric]?.[limit] ?? 0)])
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

/** Show the results of audits, and of learning from them. */
async function measure(model, learns) {
  const path = `v1/models/${encodeURIComponent(model.id)}`;
  const audit = await getJson(`${path}/audit`), learned = learns ? await getJson(`${path}/learn`) : null;
  if (state.model !== model) return; // another one was selected in the meantime
  $("measured").hidden = false;
  drawMeasured(audit, learned);
}

let polls = 0, polling = null;

const textsOf = ({ totals }) => totals.exit_layer_count ?? 0;

async function poll() {
  const { model } = state;
  if (document.visibilityState === "visible" && model) {
    try {
      const now = read((await request("metrics")).body, model);
      if (state.model === model) {
        const { totals } = now;
        // Lower counters than before: the server was restarted.
        const counts = (old) => old.at > now.at - WINDOW_MS && textsOf(old) <= textsOf(now);
        state.samples = [...state.samples.filter(counts), now];
        drawLive(state.samples[0], now);
        if ("tau" in totals && !state.inForce.set_by && totals.tau !== state.inForce.tau) {
          setInForce({ tau: totals.tau }); // no answer has named it yet
          drawCurve(null);
        }
        const learns = "learn_missing_records" in totals;
        $("main").classList.toggle("learns", learns);
        // Only a server that audits has these routes.
        if (!("audit_tau" in totals)) $("measured").hidden = true;
        else if ($("measured").hidden || polls % POLLS_PER_AUDIT === 0) await measure(model, learns);
        polls += 1;
      }
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // the next poll may succeed
    }
  }
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
}

function drawLive(before, now) {
  const texts = textsOf(now) - textsOf(before), rate = (texts * 1000) / (now.at - before.at);
  const sum = (name) => (now.totals[name] ?? 0) - (before.totals[name] ?? 0);
  const run = sum("layers_run_total"), saved = sum("layers_saved_total");
  const latency = gained("request_latency_seconds_bucket", before, now);
  const ms = (share) => {
    const value = quantile(latency, share);
    return value === null ? "–" : `${(value * 1000).toPrecision(2)} ms`;
  };
  $("rate").textContent = !texts ? "–" : rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en");
  $("p50").textContent = ms(0.5);
  $("p99").textContent = ms(0.99);
  const speedup = (run + saved) / run; // NaN without texts
  $("speedup").textContent = speedup > MAX_SPEEDUP ? `over ${MAX_SPEEDUP}×` : speedup ? `${speedup.toFixed(1)}×` : "–";
  const exits = gained("exit_layer_bucket", before, now).map(([layer, count], i, all) => {
    const share = texts ? (count - (all[i - 1]?.[1] ?? 0)) / texts : 0;
    return [layer, shareItem(layer ? `Layer ${layer}` : "Embeddings", percent(share, 0), "", share, "bar")];
  });
  const shown = exits.filter(([layer]) => state.model.exit_layers.includes(layer));
  $("exits").replaceChildren(...shown.map(([, item]) => item));
}

// --- start-up

async function start() {
  cancel();
  try {
    const models = (await getJson("v1/models")).data;
    // Models have no role while they load.
    if (!models.some((model) => model.role)) throw new Refused(503, "The models are still loading", 1);
    state.models = models;
  } catch (error) {
    retries = 0;
    refused(error, start);
    return;
  }
  $("main").hidden = false;
  if (!$("key-form").hidden) $("text").focus();
  $("key-form").hidden = true;
  $("problem").textContent = "";
  const shown = state.models.map((model) =>
    element("option", { value: model.id }, model.role === "current" ? model.id : `${model.id} (${model.role})`),
  );
  $("model").replaceChildren(...shown);
  $("model").disabled = state.models.length < 2;
  const same = (key) => state.models.find((model) => model[key] === state.model?.[key]);
  await use(same("id") ?? same("name") ?? state.models.find((model) => model.is_default) ?? state.models[0]);
}

/** Show a command, which may wrap between words only. */
const drawCommand = (id, command) =>
  $(id).replaceChildren(...command.split(" ").flatMap((word, i) => [i ? " " : "", element("span", {}, word)]));

async function use(model) {
  cancel();
  state.model = model;
  state.table = [];
  state.samples = [];
  state.compared = [];
  state.hasMoved = false;
  $("measured").hidden = true;
  $("model").value = model.id;
  $("main").classList.toggle("full-depth", !hasExits());
  $("no-exits").textContent = model.has_upstream
    ? `${model.id} has no exits yet: its upstream answers every text.`
    : `${model.id} has no exits: every text runs through all ${plural(model.num_layers, "layer")}.`;
  // The source of a folder is its last part only; a hub id has two.
  const name = !model.source || model.source.includes("/") ? (model.source ?? model.name) : `path/to/${model.source}`;
  const fit = model.has_upstream ? "fit answers.csv" : `import ${name} --texts texts.txt`;
  drawCommand("import", `de3 ${fit} --name with-exits`);
  drawCommand("learn", `de3 serve ${name}${model.has_upstream ? ".toml" : ""} --learn --guarantee 0.02`);
  setInForce({ tau: model.defaults.tau });
  poll();
  let rows = [];
  try {
    if (model.calibration) rows = (await getJson(`v1/models/${encodeURIComponent(model.id)}/calibration`)).table;
  } catch (error) {
    if (state.model !== model) return;
    if (error.status !== 404) return refused(error, () => use(model)); // 404: the model was replaced
  }
  if (state.model !== model) return; // another one was selected in the meantime
  state.table = rows.filter(isDefault).sort((a, b) => a.tau - b.tau);
  if (model.input !== null) $("is-pair").checked = model.input === "pair";
  $("pair-choice").hidden = model.input !== null;
  $("pair-field").hidden = !$("is-pair").checked;
  $("redact-choice").hidden = !isTokens();
  const examples = model.input === "pair" ? [] : (EXAMPLES[model.labels.join()] ?? []);
  $("examples").hidden = examples.length === 0;
  const buttons = examples.map((text) => {
    const button = element("button", { type: "button", class: "plain" }, text);
    button.addEventListener("click", () => {
      $("text").value = text;
      ask(0);
    });
    return element("li", {}, button);
  });
  $("examples").querySelector("ul").replaceChildren(...buttons);
  if ($("text").value === "" && examples.length) {
    $("text").value = examples[1];
    if (document.activeElement === $("text")) $("text").select(); // what is typed next replaces it
  }
  drawCurve(null);
  for (const radio of document.querySelectorAll("[name=choice]"))
    radio.parentNode.hidden = CHOICES[radio.value].calibrated && !state.table.length;
  if (CHOICES[state.choice].calibrated && !state.table.length) state.choice = "tau";
  choose(state.choice);
}

for (const [name, choice] of Object.entries(CHOICES)) {
  const radio = element("input", { type: "radio", name: "choice", value: name });
  radio.addEventListener("change", () => choose(name));
  $("choices").append(element("label", { class: "inline" }, radio, choice.name));
}
choose("tau");

$("more").addEventListener("click", () => {
  $("more").setAttribute("aria-expanded", $("more").getAttribute("aria-expanded") !== "true");
  drawClasses(state.shown);
});
$("text").addEventListener("input", () => ask());
$("pair").addEventListener("input", () => ask());
$("compare").addEventListener("change", () => ask());
$("redact").addEventListener("change", () => ask());
$("is-pair").addEventListener("change", () => {
  $("pair-field").hidden = !$("is-pair").checked;
  ask();
});
$("slider").addEventListener("input", () => {
  state.hasMoved = true;
  drawSlider();
  ask();
});
$("model").addEventListener("change", () => use(state.models.find((model) => model.id === $("model").value)));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    $("key-error").textContent = "A key contains only ASCII characters, and no spaces.";
    return;
  }
  keepKey(typed);
  $("key").value = "";
  start();
});
start();
