const POLL_MS = 1000, GIVE_UP_MS = 7000;
const MODES = { speculating: "Speculating", plain: "Plain decode", fixed: "Fixed K", off: "Off", safe: "Safe mode" };
const at = (id) => document.getElementById(id);
let status = null, lostSince = null, hoverSec = null, apiKey = null, waiting = null;

function show(id, text) { at(id).textContent = text; }

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

// fetch with an end; the error's message is fit for people.
async function ask(path, options = {}) {
  const end = new AbortController();
  const timer = setTimeout(() => end.abort(), GIVE_UP_MS);
  try {
    const response = await fetch(path, { cache: "no-store", signal: end.signal, ...options });
    const body = await response.json().catch(() => null);
    if (!response.ok) throw Object.assign(new Error(body?.error?.message || `it answers with status ${response.status}`), { httpStatus: response.status });
    return body;
  } catch (error) {
    if (error.httpStatus) throw error;
    throw new Error(end.signal.aborted ? "it takes too long" : "the connection fails");
  } finally {
    clearTimeout(timer);
  }
}

async function poll() {
  try {
    status = await ask("status");
    lostSince = null;
  } catch (error) {
    lostSince = lostSince || Date.now();
    show("lost-why", `for ${duration((Date.now() - lostSince) / 1000)}: ${error.message}.` + (status ? " What follows is old." : ""));
  }
  at("lost").hidden = lostSince === null;
  document.body.classList.toggle("lost", lostSince !== null);
  draw();
}

async function pollForever() {
  try {
    if (!document.hidden) await poll();
  } finally {
    setTimeout(pollForever, POLL_MS);
  }
}

async function setPolicy(policy) {
  waiting = policy;
  note("", "");
  drawButtons();
  try {
    const headers = { "Content-Type": "application/json", ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}) };
    await ask("policy", { method: "PUT", headers, body: JSON.stringify({ policy }) });
    at("key-form").hidden = true;
  } catch (error) {
    note(`Policy not set: ${error.message}`, "");
    at("key-form").hidden = error.httpStatus !== 401;
  }
  waiting = null;
  await poll();
}

function note(text, kind) {
  at("control-note").hidden = !text;
  at("control-note").className = kind;
  show("control-note", text);
}

function drawButtons() {
  const widest = status?.max_speculative_tokens || 0, none = !status || status.policy === null || status.policy === undefined;
  const policies = ["auto", "off", ...Array.from({ length: widest }, (_, i) => `fixed:${i + 1}`)];
  const box = at("buttons");
  if (box.childElementCount !== policies.length) {
    box.replaceChildren(...policies.map((policy) => {
      const button = element("button", "", policy.replace("fixed:", "K="));
      button.dataset.policy = policy;
      button.title = policy === "auto" ? "K by measured goodput" : policy === "off" ? "plain decode" : `always ${policy.slice(6)} draft tokens`;
      button.addEventListener("click", () => setPolicy(policy));
      return button;
    }));
  }
  for (const button of box.children) {
    button.disabled = none || waiting !== null || lostSince !== null;
    button.setAttribute("aria-pressed", String(button.dataset.policy === (waiting || status?.policy)));
  }
  at("control").hidden = none;
}

function drawTiles(s) {
  at("mode-tile").className = `tile mode ${MODES[s.mode] ? s.mode : ""}`;
  show("mode", MODES[s.mode] || s.mode || DASH);
  show("reason", s.reason || "");
  at("alarm").hidden = !s.alarm;
  show("alarm", s.alarm === "drift" ? "Alarm: acceptance has drifted" : `Alarm: ${s.alarm}`);
  show("k", number(s.num_speculative_tokens));
  show("k-note", isNumber(s.max_speculative_tokens) ? `of at most ${s.max_speculative_tokens}` : "");
  const pips = Array.from({ length: Math.min(32, s.max_speculative_tokens || 0) }, (_, i) => element("i", i < s.num_speculative_tokens ? "on" : "", ""));
  at("pips").replaceChildren(...pips);
  show("tau", number(s.acceptance_length, 2));
  show("tau-note", `trained ${number(s.trained?.acceptance_length, 2)}, tokens a step ${number(s.tokens_per_step, 2)}`);
  const ratio = isNumber(s.goodput_tok_per_sec) && s.plain_tok_per_sec > 0 ? s.goodput_tok_per_sec / s.plain_tok_per_sec : null;
  show("ratio", isNumber(ratio) ? `${number(ratio, 2)}×` : DASH);
  at("ratio").className = `big ${!isNumber(ratio) || Math.abs(ratio - 1) < 0.02 ? "" : ratio > 1 ? "good" : "bad"}`;
  const speed = (x) => number(x, x < 100 ? 1 : 0);
  const plain = isNumber(s.plain_tok_per_sec) ? `plain ${speed(s.plain_tok_per_sec)}` : "plain not measured";
  show("ratio-note", isNumber(s.goodput_tok_per_sec) ? `${speed(s.goodput_tok_per_sec)} tokens/s, ${plain}` : "nothing measured yet");
  show("fallback", percent(s.fallback_share));
  at("fallback-bar").style.width = `${100 * Math.min(1, s.fallback_share || 0)}%`;
  show("fallback-note", isNumber(s.totals?.decode_sec) ? `of ${duration(s.totals.decode_sec)} of decoding` : "");
}

const gained = (tau) => (isNumber(tau) ? tau - 1 : null); // accepted tokens a draft
const list = (x) => (Array.isArray(x) ? x : []);
const counted = (n) => `${short(n)} drafts`;

function drawCharts(s) {
  const points = list(s.history), newest = points[points.length - 1]?.at_sec ?? 0;
  const span = [points[0]?.at_sec ?? 0, Math.max(newest, s.uptime_sec ?? 0)];
  const seen = isNumber(hoverSec) ? points.reduce((best, p) => (!best || Math.abs(p.at_sec - hoverSec) < Math.abs(best.at_sec - hoverSec) ? p : best), null) : null;
  const common = { points, span, hoverSec: seen?.at_sec };
  const when = seen ? ` · ${duration(span[1] - seen.at_sec)} ago, ${number(seen.batch)} sequences` : "";
  const read = (id, text) => show(id, seen ? text + when : "");
  timeChart(at("goodput-chart"), { ...common, fromZero: true, between: ["goodput_tok_per_sec", "plain_tok_per_sec"], describe: `goodput ${number(s.goodput_tok_per_sec)} tokens a second, plain ${number(s.plain_tok_per_sec)}`,
    lines: [{ key: "plain_tok_per_sec", kind: "plain" }, { key: "goodput_tok_per_sec", kind: "now" }] });
  read("goodput-read", `${number(seen?.goodput_tok_per_sec)} against ${number(seen?.plain_tok_per_sec)}`);
  timeChart(at("tau-chart"), { ...common, level: { value: s.trained?.acceptance_length, kind: "trained" }, describe: `acceptance length ${number(s.acceptance_length, 2)}`,
    lines: [{ key: "acceptance_length", kind: "now" }] });
  read("tau-read", `τ ${number(seen?.acceptance_length, 2)}`);
  timeChart(at("k-chart"), { ...common, range: [0, Math.max(1, s.max_speculative_tokens || 0) + 0.3], whole: true, describe: `K ${number(s.num_speculative_tokens)}`,
    lines: [{ key: "num_speculative_tokens", kind: "now", step: true }] });
  read("k-read", `K ${number(seen?.num_speculative_tokens)}`);
  const rates = list(s.conditional_rates);
  rateBars(at("positions-chart"), rates, list(s.trained?.conditional_rates).slice(0, s.max_speculative_tokens ?? undefined), `accepted by position: ${rates.map((r) => percent(r)).join(", ")}`);
  const steps = Object.entries(s.k_histogram || {}).sort((a, b) => a[0] - b[0]);
  const total = steps.reduce((sum, [, n]) => sum + n, 0);
  rowBars(at("histogram-chart"), steps.map(([k, n]) => ({ label: `K = ${k}`, value: total ? n / total : null, kind: k === "0" ? "plain" : "now", text: `${percent(total ? n / total : null, 1)} · ${short(n)}` })), 1, "steps by K");
  const spans = Object.entries(s.by_span || {}).map(([name, c]) => ({ label: name, value: gained(c.acceptance_length), text: `${number(c.acceptance_length, 2)} · ${counted(c.num_drafts)}` }));
  const along = list(s.by_output_position).map((c) => ({ label: c.to === null ? `from ${number(c.from)}` : `${number(c.from)}–${number(c.to)}`, value: gained(c.acceptance_length), text: `${number(c.acceptance_length, 2)} · ${counted(c.num_drafts)}` }));
  const best = Math.max(0.5, ...[...spans, ...along].map((row) => row.value).filter(isNumber));
  rowBars(at("spans-chart"), [...along, ...(along.length && spans.length ? [{}] : []), ...spans], best * 1.05, "acceptance length along the output and by span");
}

function drawLists(s) {
  const events = [...list(s.events)].reverse().map((event) => {
    const item = document.createElement("li");
    item.append(element("time", "", isNumber(s.uptime_sec) ? `${duration(s.uptime_sec - event.at_sec)} ago` : duration(event.at_sec)));
    item.append(element("span", `kind ${["alarm", "failure"].includes(event.kind) ? event.kind : ""}`, event.kind), element("span", "what", event.what));
    return item;
  });
  at("events").replaceChildren(...(events.length ? events : [element("li", "empty", "Nothing yet")]));
  const t = s.totals || {};
  const rows = [["steps", short(t.num_steps)], ["output tokens", short(t.num_output_tokens)], ["drafts", short(t.num_drafts)], ["drafted tokens", short(t.num_draft_tokens)],
    ["accepted tokens", `${short(t.num_accepted_tokens)}` + (t.num_draft_tokens ? ` (${percent(t.num_accepted_tokens / t.num_draft_tokens)})` : "")],
    ["the policy's cost a step", isNumber(t.policy_usec_per_step) ? `${number(t.policy_usec_per_step)} µs` : DASH], ["the policy's failures", number(t.policy_failures)]];
  at("totals").replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...row.map((text) => element("td", "", text)));
    return line;
  }));
}

function draw() {
  drawButtons();
  if (!status) return;
  document.title = `${MODES[status.mode] || "specdec"} · ${status.target || "specdec"}`;
  show("target", status.target || DASH);
  show("head", status.head || "none");
  at("head").title = status.head_dir || "";
  show("uptime", duration(status.uptime_sec));
  show("batch", number(status.batch));
  drawTiles(status);
  drawCharts(status);
  drawLists(status);
}

for (const id of ["goodput-chart", "tau-chart", "k-chart"]) {
  at(id).addEventListener("pointermove", (event) => {
    const root = at(id).querySelector("svg");
    if (!root?.secondAt) return;
    hoverSec = root.secondAt(event.clientX);
    requestAnimationFrame(draw);
  });
  at(id).addEventListener("pointerleave", () => { hoverSec = null; draw(); });
}
at("key-form").addEventListener("submit", (event) => { event.preventDefault(); apiKey = at("key").value; note("Now choose the policy again.", "calm"); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
addEventListener("resize", draw);
pollForever();
