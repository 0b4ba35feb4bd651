"use strict";
// Small SVG charts. Text goes in as text, never as markup; null is drawn as nothing and written as a dash.

const DASH = "–";
const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

function number(x, digits = 0) {
  return isNumber(x) ? x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : DASH;
}

function short(x) {
  if (!isNumber(x)) return DASH;
  if (x >= 1e6) return number(x / 1e6, 1) + " M";
  return x >= 1e4 ? number(x / 1e3, 1) + " k" : number(x);
}

const percent = (x, digits = 0) => (isNumber(x) ? number(100 * x, digits) + " %" : DASH);

function duration(sec) {
  if (!isNumber(sec)) return DASH;
  const whole = Math.max(0, Math.round(sec));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min` + (whole < 600 && whole % 60 ? ` ${whole % 60} s` : "");
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function svg(name, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function canvas(box, height, description) {
  const width = Math.max(200, box.clientWidth);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": description });
  box.replaceChildren(root);
  return { root, width, add: (name, attributes, text) => root.appendChild(svg(name, attributes, text)) };
}

function empty(box, text) {
  const note = document.createElement("div");
  note.className = "empty";
  note.textContent = text;
  box.replaceChildren(note);
}

// Round steps of an axis: 1, 2 or 5 times a power of ten, at most `most` of them.
function ticks(low, high, most) {
  const raw = (high - low) / most;
  const ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * ten).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step + 0);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

const AGO_STEPS = [5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];
const GAP_SEC = 5; // a longer pause between two points is idleness: the line breaks

// Lines over time. `span`: [first, last] second; `lines`: {key, kind, step}; `level`: {value, kind}, a line across.
function timeChart(box, { points, span, lines, range, between, level, hoverSec, describe, whole, fromZero }) {
  const height = 170, left = 40, bottom = 20, top = 6;
  const values = points.flatMap((p) => lines.map((line) => p[line.key])).filter(isNumber);
  if (!values.length) return empty(box, "Nothing measured yet");
  if (level && isNumber(level.value)) values.push(level.value);
  const chart = canvas(box, height, describe);
  let [low, high] = range || [Math.min(...values), Math.max(...values)];
  if (!range) [low, high] = [low - 0.06 * (high - low || high || 1), high + 0.1 * (high - low || high || 1)];
  if (fromZero || (!range && low < 0.45 * high)) low = 0;
  const [first, last] = span[1] - span[0] < 10 ? [span[1] - 10, span[1]] : span;
  const x = (sec) => left + ((sec - first) / (last - first)) * (chart.width - left - 4);
  const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
  const marks = ticks(low, high, whole ? Math.min(6, Math.ceil(high - low)) : 5);
  for (const value of marks.values) {
    if (whole && value % 1) continue;
    chart.add("line", { class: "grid", x1: left, x2: chart.width, y1: y(value), y2: y(value) });
    chart.add("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, number(value, whole ? 0 : marks.digits));
  }
  const ago = AGO_STEPS.find((step) => (last - first) / step <= chart.width / 110) || 86400 * Math.ceil((last - first) / 518400);
  for (let back = 0; back < last - first; back += ago) {
    const text = back ? `${duration(back).replace(/ 0 (min|h)$/, "")} ago` : "now";
    if (x(last - back) - left < 24) break;
    chart.add("text", { x: x(last - back), y: height - 3, "text-anchor": back ? "middle" : "end" }, text);
  }
  if (between) shade(chart, points, between, x, y);
  if (level && isNumber(level.value)) {
    chart.add("line", { class: `stroke ${level.kind}`, x1: left, x2: chart.width, y1: y(level.value), y2: y(level.value) });
  }
  for (const line of lines) chart.add("path", { class: `stroke ${line.kind}`, d: trace(points, line, x, y) });
  if (isNumber(hoverSec)) chart.add("line", { class: "hover", x1: x(hoverSec), x2: x(hoverSec), y1: top, y2: height - bottom });
  chart.root.secondAt = (clientX) => {
    const frame = chart.root.getBoundingClientRect();
    return first + ((clientX - frame.left - left) / (frame.width - left - 4)) * (last - first);
  };
  return chart.root;
}

function trace(points, line, x, y) {
  let path = "", before = null; // each piece begins with a dash of four pixels: a lonely point is seen too
  for (const point of points) {
    const value = point[line.key];
    if (!isNumber(value) || !isNumber(point.at_sec)) { before = null; continue; }
    const joined = before && point.at_sec - before.at_sec <= GAP_SEC;
    if (joined && line.step) path += `H${x(point.at_sec).toFixed(1)}`;
    path += joined ? `L${x(point.at_sec).toFixed(1)} ${y(value).toFixed(1)}` : `M${(x(point.at_sec) - 2).toFixed(1)} ${y(value).toFixed(1)}h4m-2 0`;
    before = point;
  }
  return path;
}

// The area between two lines, coloured by which is above.
function shade(chart, points, [over, under], x, y) {
  const paths = { gain: "", loss: "" };
  for (let i = 1; i < points.length; i++) {
    const [a, b] = [points[i - 1], points[i]];
    if (![a[over], a[under], b[over], b[under]].every(isNumber) || b.at_sec - a.at_sec > GAP_SEC) continue;
    const kind = a[over] + b[over] >= a[under] + b[under] ? "gain" : "loss";
    const corners = [[a, over], [b, over], [b, under], [a, under]].map(([p, key]) => `${x(p.at_sec).toFixed(1)} ${y(p[key]).toFixed(1)}`);
    paths[kind] += `M${corners.join("L")}Z`;
  }
  for (const [kind, d] of Object.entries(paths)) chart.add("path", { class: kind, d });
}

// Upright bars in [0, 1], with a mark each.
function rateBars(box, rates, marks, describe) {
  const count = Math.max(rates.length, marks.length);
  if (![...rates, ...marks].some(isNumber)) return empty(box, "Nothing drafted yet");
  const height = 170, bottom = 20, top = 16, left = 40;
  const chart = canvas(box, height, describe);
  const y = (rate) => top + (1 - rate) * (height - top - bottom);
  for (const rate of [0, 0.5, 1]) {
    chart.add("line", { class: "grid", x1: left, x2: chart.width, y1: y(rate), y2: y(rate) });
    chart.add("text", { x: left - 7, y: y(rate) + 4, "text-anchor": "end" }, percent(rate));
  }
  const slot = (chart.width - left) / count, bar = Math.min(46, slot * 0.62);
  for (let i = 0; i < count; i++) {
    const middle = left + slot * (i + 0.5);
    if (isNumber(rates[i])) {
      chart.add("rect", { class: "fill now", x: middle - bar / 2, y: y(rates[i]), width: bar, height: Math.max(1, y(0) - y(rates[i])), rx: 3 });
    }
    if (isNumber(marks[i])) {
      chart.add("line", { class: "stroke trained", "stroke-width": 3, x1: middle - bar / 2 - 5, x2: middle + bar / 2 + 5, y1: y(marks[i]), y2: y(marks[i]) });
    }
    const above = Math.max(isNumber(rates[i]) ? rates[i] : 0, isNumber(marks[i]) ? marks[i] : 0);
    if (slot > 30) chart.add("text", { class: "value", x: middle, y: y(above) - 6, "text-anchor": "middle" }, percent(rates[i]));
    chart.add("text", { x: middle, y: height - 3, "text-anchor": "middle" }, String(i + 1));
  }
}

// Lying bars: rows of {label, value, text, kind}; a row without label is a gap.
function rowBars(box, rows, full, describe) {
  if (!rows.some((row) => isNumber(row.value))) return empty(box, "Nothing measured yet");
  const pitch = Math.min(28, Math.max(17, 168 / rows.length)), label = 92, right = 132;
  const chart = canvas(box, pitch * rows.length, describe);
  rows.forEach((row, i) => {
    if (row.label === undefined) return;
    const middle = pitch * (i + 0.5), room = chart.width - label - right, thick = pitch * 0.56;
    chart.add("text", { class: "label", x: 0, y: middle + 4 }, row.label);
    chart.add("rect", { class: "track", x: label, y: middle - thick / 2, width: room, height: thick, rx: 3 });
    const share = isNumber(row.value) ? Math.min(1, Math.max(0, row.value / full)) : 0;
    if (share > 0) chart.add("rect", { class: `fill ${row.kind || "now"}`, x: label, y: middle - thick / 2, width: Math.max(2, room * share), height: thick, rx: 3 });
    chart.add("text", { x: chart.width, y: middle + 4, "text-anchor": "end" }, row.text);
  });
}
