// The page at GET /: classifies a text on this server, and draws the answer of each layer.
// It stores nothing but an API key, in sessionStorage.

const BASE = new URL(".", location.href);
const KEY = "de3-key";
const POLL_MS = 2000,
  WINDOW_MS = 60_000,
  PAUSE_MS = 60,
  MAX_RETRIES = 5,
  POLLS_PER_AUDIT = 5; // the results of audits are polled less often: they change slowly
// Texts for models like the demo, by labels; early exits get the last one wrong.
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
const state = {
  models: [], model: null, table: [], choice: "tau", fullDepth: null, samples: [], isAudited: false, learns: true,
};

// The exit options of the slider, by request field: values, initial value, text and hint.
const CHOICES = {
  tau: {
    name: "Threshold τ",
    label: () => `τ: exit at the first layer whose ${signal(state.model.defaults.signal).below}`,
    values: () => (state.table.length ? state.table.map((row) => row.tau) : squares(60)),
    start: (values) => nearest(values, state.model.defaults.tau),
    text: (value) => value.toFixed(3),
    hint: "0 runs every layer. A higher τ exits earlier and errs more often.",
  },
  target_speedup: {
    name: "Speed-up",
    label: () => "Mean speed-up over full depth",
    values: () => range(1, Math.min(10, Math.max(2, ...state.table.map((row) => row.speedup))), 0.25),
    start: (values) => nearest(values, 3),
    text: (value) => `${value.toFixed(2)}×`,
    hint: "The server looks τ up in the model's calibration. One text may be faster or slower than the mean.",
  },
  max_disagreement: {
    name: "Disagreement",
    label: () => "Largest share of labels that may differ from full depth",
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
// The signals: name beside the bar, and the end of "exit at the first layer whose …". Others keep their name.
const SIGNALS = {
  risk: { name: "risk that the answer differs from full depth", below: "risk is below it" },
  edr: { name: "EDR: the two combined", below: "EDR is below it" },
  entropy: { name: "score: the entropy", below: "entropy is below it" },
};
const signal = (name) => SIGNALS[name] ?? { name, below: `${name} is below it` };
// Exit reasons; others keep their name.
const REASONS = {
  threshold: "exits here",
  last_layer: "full depth",
  max_layer: "deepest allowed layer",
  deadline: "deadline reached",
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

/** A bar in a track; share is from 0 to 1, or null for an empty track. */
function bar(share, kind) {
  const track = element("div", { class: kind });
  if (share === null) return track;
  const fill = element("i");
  fill.style.setProperty("--value", Math.min(1, Math.max(0, share)));
  track.append(fill);
  return track;
}

/** True if a row, or an exit, uses the model's default signal. */
const isDefault = ({ signal, lambda }) =>
  signal === state.model.defaults.signal && lambda === state.model.defaults.lambda;
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

/** Classify an input; returns the row of the response and the model's time in ms. */
async function classify(model, input, fields, signal) {
  const sent = JSON.stringify({ model: model.id, input, explain: true, ...fields });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: sent, signal };
  const { body, headers } = await request("classify", options);
  const timing = /model;dur=([\d.]+)/.exec(headers.get("Server-Timing") ?? "");
  return { ...JSON.parse(body).data[0], ms: timing ? Number(timing[1]) : null };
}

// --- requests

let asking = null,
  timer = null,
  retries = 0;

/** Cancel the current and the scheduled request. */
function cancel() {
  clearTimeout(timer);
  asking?.abort();
}

/** Schedule a request, if there is a model; a later call replaces an earlier one. */
function ask(pause = PAUSE_MS) {
  if (!state.model) return;
  retries = 0;
  clearTimeout(timer);
  timer = setTimeout(answer, pause);
}

async function answer() {
  cancel();
  asking = new AbortController();
  const { model } = state,
    { signal } = asking,
    isPair = $("is-pair").checked;
  const text = $("text").value,
    text_pair = $("pair").value;
  $("problem").textContent = "";
  if (text.trim() === "" || (isPair && text_pair.trim() === "")) {
    $("layers").replaceChildren();
    const what = isPair
      ? "Type both texts, and their answer appears here."
      : "Type a text, and its answer appears here.";
    $("summary").replaceChildren(element("p", { class: "muted" }, what));
    return;
  }
  const input = isPair ? { text, text_pair } : text,
    compares = $("compare").checked;
  const fields = { [state.choice]: CHOICES[state.choice].values()[$("slider").value] };
  try {
    const row = await classify(model, input, fields, signal);
    // Full depth depends on the text alone: one request, not one for each move of the slider.
    const asked = JSON.stringify([model.id, input]);
    const isNew = state.fullDepth?.asked !== asked;
    if (isNew) state.fullDepth = null;
    if (compares && !state.fullDepth) {
      state.fullDepth = { asked, ...(await classify(model, input, { tau: 0 }, signal)) };
    }
    drawAnswer(row, compares ? state.fullDepth : null, isNew);
    drawCurve(row.exit);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("layers").replaceChildren();
    $("summary").replaceChildren();
    if (error.status === 404 && (await isGone(model))) start();
    else if (!signal.aborted) refused(error, answer);
  }
}

/** True if a model is no longer served, for example after its next version was loaded. */
async function isGone(model) {
  try {
    return (await getJson("v1/models")).data.every((other) => other.id !== model.id);
  } catch {
    return false;
  }
}

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

/** True for a row of a regression model, whose answer is a value. */
const isValue = (row) => row.value !== undefined;

const hasClasses = () => state.model.tolerance === null;

/** The phrase for an answer that the calibration counts as correct. */
function rightMeans(source) {
  if (hasClasses()) return source ? `as ${source} answers` : "right";
  return `within ${state.model.tolerance} of ${source ? `the answer of ${source}` : "the label"}`;
}

const answerOf = (row) => (isValue(row) ? String(+row.value.toPrecision(4)) : percent(Math.max(...row.probs)));

function drawAnswer(row, fullDepth, animate) {
  const { exit } = row,
    { num_layers: count } = exit;
  const saved = count - exit.layer;
  const time = row.ms === null ? "" : ` · ${row.ms.toFixed(1)} ms in the model`;
  const where =
    exit.layer === 0 ? "exited before layer 1, on the embeddings" : `exited after layer ${exit.layer} of ${count}`;
  const lines = [
    element("strong", {}, `${row.label} ${answerOf(row)}`),
    element("p", {}, `${where} · ${plural(saved, "layer")} saved${time}`),
  ];
  if (fullDepth) {
    const isSame = isValue(row)
      ? Math.abs(fullDepth.value - row.value) <= state.model.tolerance
      : row.labels // those of a multi-label model
        ? row.labels.join("\n") === fullDepth.labels.join("\n")
        : fullDepth.label === row.label;
    const same = isSame ? "Full depth agrees" : "Full depth disagrees";
    const its = fullDepth.ms === null ? "" : ` after ${fullDepth.ms.toFixed(1)} ms`;
    lines.push(
      element("p", { class: "muted" }, `${same}: ${fullDepth.label} ${answerOf(fullDepth)}${its}.`),
    );
  }
  if (row.truncated)
    lines.push(element("p", { class: "muted" }, "The text was too long for the model and was truncated."));
  if (row.out_of_distribution)
    lines.push(element("p", { class: "muted" }, "This text is far from those that the model was calibrated on."));
  $("summary").replaceChildren(...lines);
  $("tau-name").textContent = `τ = ${+exit.tau.toFixed(4)}`;
  $("score-name").textContent = signal(exit.signal).name;

  const reason = REASONS[exit.reason] ?? exit.reason;
  const layers = state.model.exit_layers.map((layer, i) => {
    const ran = row.layers.find((asked) => asked.layer === layer);
    const shown = ran ?? fullDepth?.layers.find((asked) => asked.layer === layer);
    const status = layer === exit.layer ? reason : ran ? "not sure yet" : shown ? "saved" : "not run";
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
    for (const [style, value] of [
      ["entropy", signals.entropy],
      ["ratio", signals.distance_ratio],
      ["score", signals.score],
    ]) {
      bars.append(bar(value === null ? null : Math.sqrt(value), `bar ${style}`));
    }
    const label = element(
      "div",
      { class: "label" },
      element("span", { title: signals.label }, signals.label),
      element("span", {}, answerOf(signals)),
    );
    probs.append(label);
    if (!isValue(signals)) probs.append(bar(Math.max(...signals.probs), "share"));
    spoken = [
      ["score", signals.score],
      ["entropy", signals.entropy],
      ["distance ratio", signals.distance_ratio],
    ]
      .filter(([, value]) => value !== null)
      .map(([signal, value]) => `${signal} ${value.toFixed(4)}`)
      .join(", ");
    bars.title = spoken;
  } else {
    for (const style of ["entropy", "ratio", "score"]) bars.append(bar(null, `bar ${style}`));
  }
  const marker = element("div", { class: "marker" });
  marker.style.setProperty("--value", Math.sqrt(tau));
  bars.append(marker);
  const title = element("div", { class: "name" }, name, element("small", {}, status));
  const item = element(
    "li",
    { class: kind, "data-layer": layer },
    title,
    bars,
    element("span", { class: "hidden" }, spoken),
    probs,
  );
  item.style.setProperty("--row", i);
  return item;
}

/** The calibration's accuracy against its speed-up, with the default and the chosen point. */
function drawCurve(exit) {
  const rows = state.table.filter((row) => row.speedup <= 12);
  const fastest = Math.max(...rows.map((row) => row.speedup));
  const known = rows.length > 1 && fastest > 1;
  $("curve").hidden = !known;
  if (!known) {
    $("curve-help").textContent = "This model has no calibration to show.";
    $("expected").textContent = "";
    return;
  }
  // The source of the labels if the data had none; accuracy is then the agreement with it.
  const source = state.model.self_labelled && (state.model.has_original ? "the original model" : "full depth");
  const [left, right, above, below] = [52, 408, 10, 190];
  const accuracies = rows.map((row) => row.accuracy);
  const high = Math.max(...accuracies),
    low = Math.min(Math.min(...accuracies), high - 0.01);
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
  const usual =
    rows[
      nearest(
        rows.map((row) => row.tau),
        state.model.defaults.tau,
      )
    ];
  parts.push(svg("circle", { class: "default", cx: x(usual), cy: y(usual.accuracy), r: 5 }));
  const chosen = exit && exit.reason !== "deadline" && state.choice !== "latency_budget_ms";
  if (chosen && isDefault(exit)) {
    const row =
      state.table[
        nearest(
          state.table.map((each) => each.tau),
          exit.tau,
        )
      ];
    if (row.speedup <= fastest) {
      parts.push(svg("line", { class: "guide", x1: x(row), x2: x(row), y1: y(row.accuracy), y2: below }));
      parts.push(svg("circle", { class: "point", cx: x(row), cy: y(row.accuracy), r: 6 }));
    }
    $("expected").textContent =
      `On held-out texts: ${row.speedup.toFixed(1)}× in layers, ${percent(row.accuracy)} ` +
      `${rightMeans(source)} ` +
      `(full depth ${percent(state.table[0].accuracy)}), ` +
      `${percent(row.disagreement)} of ${hasClasses() ? "labels" : "values"} differ from ${source || "full depth"}.`;
  } else {
    $("expected").textContent = "";
  }
  $("curve-help").textContent =
    `${source ? `Agreement with ${source}` : "Accuracy"} on held-out texts against speed-up; ` +
    "the ring is the model's default, the dot this setting.";
  $("curve").replaceChildren(...parts);
}

/** The disagreement that audits measured at the τ in force, the calibration's, and the guarantee. */
function drawMeasured({ audits, measured, calibrated, guarantee, tau }, learned) {
  const share = (value) => `${+(value * 100).toFixed(2)}%`;
  const things = hasClasses() ? "labels" : "values";
  const parts = [];
  if (guarantee && tau.tau === 0) {
    const why = tau.reason === "change" ? "More did, so for now" : "For now";
    parts.push(
      `The server guarantees that at most ${share(guarantee.max_disagreement)} of ${things} differ from full depth.`,
      `${why} every text runs to full depth, until enough live texts show that earlier exits keep the guarantee ` +
        `(${audits} so far).`,
    );
  } else if (measured.disagreement === null) {
    parts.push("No live text has been measured against full depth yet.");
  } else {
    const original = state.model.has_original ? " from the original model" : "";
    const heldOut = calibrated ? `; on held-out texts ${share(calibrated.disagreement)}${original}` : "";
    parts.push(
      `Measured on ${plural(audits, "live text")} that also ran to full depth, at the server's default ` +
        `τ = ${+tau.tau.toFixed(4)}: ${share(measured.disagreement)} of ${things} differ ` +
        `(${share(measured.lower)} to ${share(measured.upper)} with ${share(measured.confidence)} confidence)` +
        `${heldOut}.`,
    );
  }
  if (guarantee && tau.tau > 0) parts.push(`Guaranteed: at most ${share(guarantee.max_disagreement)}.`);
  if (learned) parts.push(`Exits are learned from live texts (${plural(learned.records, "record")}): ${learned.message}.`);
  $("measured").textContent = parts.join(" ");
}

function drawSlider() {
  const choice = CHOICES[state.choice],
    value = choice.values()[$("slider").value];
  $("value").textContent = choice.text(value);
  $("slider").setAttribute("aria-valuetext", choice.text(value));
}

function choose(name) {
  state.choice = name;
  if (!state.model) return;
  const choice = CHOICES[name],
    values = choice.values();
  $("slider").max = values.length - 1;
  $("slider").value = choice.start(values);
  $("slider-label").textContent = choice.label();
  $("hint").textContent = choice.hint;
  drawSlider();
  ask();
}

// --- live figures, from GET /metrics

/** The samples of this model that the page shows: cumulative counts by bucket. */
function read(metrics, model) {
  const latency = new Map(),
    exits = new Map();
  let texts = 0,
    layersRun = 0,
    layersSaved = 0;
  for (const line of metrics.split("\n")) {
    const match = /^de3_(\w+)\{(.*)\} (\S+)$/.exec(line);
    if (!match || !match[2].includes(`model="${model}"`)) continue;
    const value = Number(match[3]),
      limit = /le="([^"]+)"/.exec(match[2])?.[1];
    const add = (buckets) => buckets.set(limit, (buckets.get(limit) ?? 0) + value);
    if (match[1] === "request_latency_seconds_bucket") add(latency);
    else if (match[1] === "exit_layer_bucket") add(exits);
    else if (match[1] === "exit_layer_count") texts += value;
    else if (match[1] === "layers_run_total") layersRun = value;
    else if (match[1] === "layers_saved_total") layersSaved = value;
  }
  return { at: Date.now(), model, latency, exits, texts, layersRun, layersSaved };
}

/** The increase of each bucket between two samples, as [upper limit, cumulative count]. */
const gained = (before, after) =>
  [...after]
    .map(([limit, count]) => [limit === "+Inf" ? Infinity : Number(limit), count - (before.get(limit) ?? 0)])
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

/** A report of the server on a model, such as "audit"; null without one, undefined if a later poll may succeed. */
async function reported(what, model) {
  try {
    return await getJson(`v1/models/${encodeURIComponent(model.id)}/${what}`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return [404, 409].includes(error.status) ? null : undefined;
  }
}

/** Show the results of audits, and of what is learned from them, if the server does either. */
async function measure() {
  const { model } = state;
  const audit = await reported("audit", model);
  if (audit === undefined) return;
  const learned = audit && state.learns ? await reported("learn", model) : null;
  if (learned === null) state.learns = false;
  if (state.model !== model) return; // another one was selected in the meantime
  state.isAudited = audit !== null;
  $("measured").hidden = !audit;
  if (audit) drawMeasured(audit, learned);
}

let polls = 0;

async function poll() {
  polls += 1;
  if (document.visibilityState === "visible" && state.model) {
    try {
      const now = read((await request("metrics")).body, state.model.id);
      // Lower counters than before: the server was restarted.
      state.samples = state.samples.filter(
        (old) => old.model === now.model && old.at > now.at - WINDOW_MS && old.texts <= now.texts,
      );
      state.samples.push(now);
      drawLive(state.samples[0], now);
      if (state.isAudited && polls % POLLS_PER_AUDIT === 0) await measure();
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // the next poll may succeed
    }
  }
  setTimeout(poll, POLL_MS);
}

function drawLive(before, now) {
  const seconds = (now.at - before.at) / 1000,
    texts = now.texts - before.texts;
  const latency = gained(before.latency, now.latency);
  const ms = (share) => {
    const value = quantile(latency, share);
    return value === null ? "–" : `${(value * 1000).toPrecision(2)} ms`;
  };
  const run = now.layersRun - before.layersRun,
    saved = now.layersSaved - before.layersSaved;
  const rate = texts / seconds;
  $("rate").textContent = !texts ? "–" : rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en");
  $("p50").textContent = ms(0.5);
  $("p99").textContent = ms(0.99);
  $("speedup").textContent = run ? `${((run + saved) / run).toFixed(1)}×` : "–";
  let below = 0;
  const counts = gained(before.exits, now.exits)
    .slice(0, -1)
    .map(([layer, count]) => {
      const here = count - below;
      below = count;
      return [layer, here];
    });
  $("exits").replaceChildren(
    ...counts
      .filter(([layer]) => state.model.exit_layers.includes(layer))
      .map(([layer, count]) => {
        const share = texts ? count / texts : 0;
        return element(
          "li",
          {},
          element("span", {}, layer ? `Layer ${layer}` : "Embeddings"),
          bar(share, "bar"),
          element("span", {}, percent(share, 0)),
        );
      }),
  );
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
  const before = state.model;
  const again =
    state.models.find((model) => model.id === before?.id) ??
    state.models.find((model) => model.name === before?.name);
  await use(again ?? state.models.find((model) => model.is_default) ?? state.models[0]);
}

async function use(model) {
  cancel();
  state.model = model;
  state.table = [];
  state.isAudited = true; // until the server says otherwise
  state.learns = true;
  $("measured").hidden = true;
  $("model").value = model.id;
  let rows = [];
  try {
    rows = (await getJson(`v1/models/${encodeURIComponent(model.id)}/calibration`)).table;
  } catch (error) {
    if (state.model !== model) return;
    if (error.status !== 404) return refused(error, () => use(model));
    // No calibration, so no curve.
  }
  if (state.model !== model) return; // another one was selected in the meantime
  state.table = rows.filter(isDefault).sort((a, b) => a.tau - b.tau);
  if (model.input !== null) $("is-pair").checked = model.input === "pair";
  $("is-pair").disabled = model.input !== null;
  $("pair-field").hidden = !$("is-pair").checked;
  const examples = model.input === "pair" ? [] : (EXAMPLES[model.labels.join()] ?? []);
  $("examples").hidden = examples.length === 0;
  $("examples")
    .querySelector("ul")
    .replaceChildren(
      ...examples.map((text) => {
        const button = element("button", { type: "button" }, text);
        button.addEventListener("click", () => {
          $("text").value = text;
          ask(0);
        });
        return element("li", {}, button);
      }),
    );
  if ($("text").value === "" && examples.length) $("text").value = examples[1];
  drawCurve(null);
  choose(state.choice);
  measure();
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
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    $("key-error").textContent = "A key has only ASCII characters, and no spaces.";
    return;
  }
  keepKey(typed);
  $("key").value = "";
  start();
});
start();
poll();
