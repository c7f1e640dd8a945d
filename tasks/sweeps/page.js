"use strict";
window.addEventListener("error", event => { document.documentElement.dataset.error = event.message; });

// points: one array a row of the table: [context, method, rate, value, spread, run, kind, ...costs]; null: not measured.
const { contexts, methods, costs, points, commands, place, metrics } = JSON.parse(document.getElementById("data").textContent);
const [CONTEXT, METHOD, RATE, VALUE, SPREAD, RUN, KIND, COSTS] = [0, 1, 2, 3, 4, 5, 6, 7];
const MANY = 300, FEW_SPREADS = 150, FIRST_ROWS = 200, COLOURS = 7;
const SHAPES = [
  "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.5-4.5H4.5V4.5H-4.5Z", "M0-6L5.6 4.4H-5.6Z", "M0-6.4L6 0L0 6.4L-6 0Z",
  "M0 6L5.6-4.4H-5.6Z", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
];
const byId = id => document.getElementById(id);
const [form, figure, plot, tip, chosen, body, more] = ["controls", "chart", "plot", "tip", "chosen", "body", "more"].map(byId);
const rows = [...body.rows];
const headers = [...byId("head").cells];
const state = { context: 0, cost: 0, methods: new Set(), low: -Infinity, high: 1, sort: null, down: false, all: false, point: null };
// Prompts add tokens: their rate is below 0.
const LOW = Math.floor(100 * Math.min(0, ...points.map(p => p[RATE]))) / 100, HIGH = 1;
let drawn = [];  // of the chart: { i, x, y }

function make(name, attributes = {}, text = null) {
  const svg = ["svg", "g", "path", "line", "text", "circle"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

const look = method => ({ colour: `m${method % COLOURS}`, shape: SHAPES[method % SHAPES.length] });
const cost = i => points[i][COSTS + state.cost];
const cell = (i, key) => rows[i].cells[headers.findIndex(head => head.dataset.key === key)]?.textContent ?? "";
const name = i => methods[points[i][METHOD]] + (points[i][RATE] > 0 ? ` ${points[i][RATE].toFixed(2)}` : "");
const better = () => (costs[state.cost].higher ? 1 : -1);
const upwards = () => (metrics[state.context].higher ? 1 : -1);

// ---- what is shown

function passes(i) {
  const p = points[i];
  return p[CONTEXT] === state.context && state.methods.has(p[METHOD]) && p[RATE] >= state.low - 1e-9 && p[RATE] <= state.high + 1e-9;
}

function frontOf(shown) {
  const order = shown.slice().sort((a, b) => better() * (cost(b) - cost(a)) || upwards() * (points[b][VALUE] - points[a][VALUE]));
  const front = [];
  for (const i of order) {
    const last = front.at(-1);
    const rises = last === undefined || upwards() * (points[i][VALUE] - points[last][VALUE]) > 0;
    if (rises || (points[i][VALUE] === points[last][VALUE] && cost(i) === cost(last))) front.push(i);
  }
  return front;
}

function update() {
  const wanted = points.map((_, i) => i).filter(passes);
  const shown = wanted.filter(i => cost(i) !== null);
  const front = frontOf(shown);
  const without = wanted.length - shown.length;
  const all = points.filter(p => p[CONTEXT] === state.context).length;
  byId("count").textContent = `${shown.length} of ${all} points, ${front.length} on the front` +
    (without ? `; ${without} without this measurement` : "");
  drawChart(shown, front);
  fillTable(wanted, new Set(front));
  showChosen();
}

// ---- chart

function ticks(low, high, count, log) {
  const found = [];
  if (log) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of high / low > 1e3 ? [1] : [1, 2, 5]) found.push(step * 10 ** power);
  } else {
    const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map(k => k * size).find(s => s >= raw);
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  }
  return found.filter(v => v >= low && v <= high).map(v => v || 0);  // no -0
}

const format = value => Math.abs(value) >= 1e5
  ? new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value)
  : new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format(value);

function scale(values, from, to, log) {
  const f = log ? Math.log10 : Number, back = log ? v => 10 ** v : Number;
  let low = f(Math.min(...values)), high = f(Math.max(...values));
  const pad = 0.07 * (high - low) || 0.1 * Math.abs(low) || 1;
  low -= pad; high += pad;
  return { low: back(low), high: back(high), log, at: v => from + (f(v) - low) / (high - low) * (to - from) };
}

function drawChart(shown, front) {
  plot.replaceChildren();
  tip.hidden = true;
  drawn = [];
  const width = Math.max(260, figure.clientWidth), height = Math.round(Math.min(560, Math.max(330, width * 0.56)));
  const area = { left: 44, right: width - 12, top: 30, bottom: height - 46 };
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.setAttribute("height", height);
  Object.assign(plot.dataset, { cost: costs[state.cost].key, points: shown.length, front: front.length });
  const factor = metrics[state.context].scale;
  plot.append(make("text", { x: 2, y: 15, class: "title" }, metrics[state.context].title + (upwards() > 0 ? " ↑" : " ↓")));
  if (!shown.length) {
    plot.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no point passes the filters"));
    return;
  }
  const xs = shown.map(cost), ys = shown.map(i => factor * points[i][VALUE]);
  const spreads = shown.length <= FEW_SPREADS;
  const reach = spreads ? shown.flatMap((i, k) => [ys[k] - factor * points[i][SPREAD], ys[k] + factor * points[i][SPREAD]]) : ys;
  const log = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 20;
  const x = scale(xs, ...(better() > 0 ? [area.left + 4, area.right] : [area.right, area.left + 4]), log);
  const y = scale(reach, ...(upwards() > 0 ? [area.bottom, area.top] : [area.top, area.bottom]), false);
  drawAxes(x, y, area, width, height, log);

  drawn = shown.map((i, k) => ({ i, x: x.at(xs[k]), y: y.at(ys[k]) }));
  const places = new Map(drawn.map(p => [p.i, p]));
  if (spreads) for (const p of drawn) {
    const half = Math.abs(y.at(factor * points[p.i][SPREAD]) - y.at(0));
    if (points[p.i][SPREAD]) plot.append(make("line", { class: "spread", x1: p.x, x2: p.x, y1: p.y - half, y2: p.y + half }));
  }
  const line = front.map(i => places.get(i));
  plot.append(make("path", { class: "frontier", d: line.map((p, k) => k ? `H${p.x}V${p.y}` : `M${p.x} ${p.y}`).join("") }));
  const list = make("g", { role: "listbox", tabindex: 0, "aria-label": "points; the arrow keys move between them" });
  const onFront = new Set(front), many = shown.length > MANY;
  for (const p of [...drawn.filter(p => !onFront.has(p.i)), ...line]) {
    const { colour, shape } = look(points[p.i][METHOD]), first = onFront.has(p.i);
    const size = many ? (first ? 0.9 : 0.6) : first ? 1.35 : 1;
    list.append(make("path", {
      id: `p${p.i}`, role: "option", "aria-label": described(p.i), d: shape,
      class: `point ${colour}${first ? " front" : many ? " many" : ""}`,
      transform: `translate(${p.x.toFixed(1)} ${p.y.toFixed(1)}) scale(${size})`,
    }));
  }
  list.addEventListener("keydown", move);
  list.addEventListener("focus", () => { if (!places.has(state.point)) choose(front[0]); });
  list.addEventListener("blur", () => point_at(null));
  plot.append(list);
  label(line, area);
}

function drawAxes(x, y, area, width, height, log) {
  let last = -Infinity;
  const marks = ticks(x.low, x.high, Math.max(5, width / 110), log).map(v => [v, x.at(v)]).sort((a, b) => a[1] - b[1]);
  for (const [value, at] of marks) {
    plot.append(make("line", { class: "grid", x1: at, x2: at, y1: area.top, y2: area.bottom }));
    if (at - last < 38 || at > width - 14) continue;
    plot.append(make("text", { x: at, y: area.bottom + 17, "text-anchor": "middle" }, format(value)));
    last = at;
  }
  for (const value of ticks(y.low, y.high, 6, false)) {
    const at = y.at(value);
    plot.append(make("line", { class: "grid", x1: area.left, x2: area.right, y1: at, y2: at }));
    plot.append(make("text", { x: area.left - 6, y: at + 4, "text-anchor": "end" }, format(value)));
  }
  const title = costs[state.cost].axis + (log ? " (log)" : "");
  plot.append(make("text", { x: (area.left + area.right) / 2, y: height - 8, "text-anchor": "middle", class: "title" }, title));
}

// Names of the front, wherever one has room beside its point.
function label(line, area) {
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = getComputedStyle(plot).font;
  const near = (drawn.length <= MANY ? drawn : line).map(p => [p.x - 7, p.y - 7, p.x + 7, p.y + 7]);
  const taken = [];
  const edges = line.slice(1).flatMap((p, k) => [
    [p.x, line[k].y - 1, line[k].x, line[k].y + 1], [p.x - 1, p.y, p.x + 1, line[k].y],
  ].map(([a, b, c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)]));
  const free = (box, more = []) => box[0] >= area.left && box[2] <= area.right + 8 && box[1] >= area.top - 8 && box[3] <= area.bottom &&
    ![...near, ...taken, ...more].some(o => box[0] < o[2] && box[2] > o[0] && box[1] < o[3] && box[3] > o[1]);
  for (const p of line) {
    const text = name(p.i), w = pen.measureText(text).width + 2, h = 14;
    const ways = [9, 14].flatMap(d => [
      [d, -h / 2], [d - 4, -h - d / 2], [-w / 2, -h - d], [-w - d, -h / 2], [-w - d + 4, -h - d / 2], [d - 4, d / 2],
      [-w / 2, d], [-w - d + 4, d / 2],
    ]);
    const boxes = ways.map(([dx, dy]) => [p.x + dx, p.y + dy, p.x + dx + w, p.y + dy + h]);
    const box = boxes.find(one => free(one, edges)) ?? boxes.find(one => free(one));
    if (!box) continue;
    taken.push(box);
    plot.append(make("text", { class: "label", x: box[0] + 1, y: box[3] - 3 }, text));
  }
}

function described(i) {
  const with_ = cell(i, "with");
  return `${name(i)}${with_ ? ` (${with_})` : ""}: ${metrics[state.context].title} ${cell(i, "value")}, ${costs[state.cost].title} ${cost(i) === null ? "not measured" : format(cost(i))}`;
}

function nearest(event) {
  const box = plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = null, least = 24 ** 2;
  for (const p of drawn) {
    const distance = (p.x - x) ** 2 + (p.y - y) ** 2;
    if (distance < least) [best, least] = [p, distance];
  }
  return best;
}

function point_at(p) {
  tip.hidden = !p;
  if (!p) return;
  tip.textContent = described(p.i).replace(": ", "\n").replaceAll(", ", "\n");
  const room = figure.clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(room, p.x + 12))}px`;
  tip.style.top = `${p.y > tip.offsetHeight + 26 ? p.y - tip.offsetHeight - 16 : p.y + 16}px`;
}

// ---- the chosen point

function move(event) {
  const along = { ArrowRight: ["x", 1], ArrowLeft: ["x", -1], ArrowUp: ["y", -1], ArrowDown: ["y", 1], Home: ["x", 0], End: ["x", 0] }[event.key];
  if (!along || !drawn.length) return;
  event.preventDefault();
  const order = drawn.slice().sort((a, b) => a[along[0]] - b[along[0]] || a.i - b.i);
  const now = order.findIndex(p => p.i === state.point);
  const next = { Home: 0, End: order.length - 1 }[event.key] ?? Math.max(0, Math.min(order.length - 1, now + along[1]));
  choose(order[next].i);
  point_at(order[next]);
}

function choose(i) {
  state.point = i;
  showChosen();
}

function showChosen() {
  plot.querySelector(".ring")?.remove();
  for (const node of document.querySelectorAll("[aria-selected=true]")) node.removeAttribute("aria-selected");
  body.querySelector("tr.chosen")?.classList.remove("chosen");
  const i = state.point, list = plot.querySelector("[role=listbox]"), at = drawn.find(p => p.i === i);
  chosen.hidden = i === null || points[i][CONTEXT] !== state.context;
  list?.removeAttribute("aria-activedescendant");
  if (chosen.hidden) return;
  rows[i].classList.add("chosen");
  if (at) {
    list.append(make("circle", { class: "ring", cx: at.x, cy: at.y, r: 11 }));
    list.setAttribute("aria-activedescendant", `p${i}`);
    byId(`p${i}`).setAttribute("aria-selected", "true");
  }
  chosen.replaceChildren(make("h2", {}, name(i)));
  const facts = make("dl");
  headers.forEach((head, k) => {
    const text = rows[i].cells[k].textContent, fact = make("div");
    if (head.dataset.key === "front" || !text) return;
    fact.append(make("dt", {}, head.textContent), make("dd", {}, text));
    facts.append(fact);
  });
  chosen.append(facts, make("p", {}, "The commands take the first of its seeds; the best one would be chosen by its test score."));
  for (const [does, language, text] of commands[points[i][KIND]]) chosen.append(...command(does, language, text, points[i][RUN]));
}

// As the shell or Python reads a path.
function quoted(run, language) {
  if (language === "python") return JSON.stringify(run);
  return /^[\w@%+=:,.\/-]+$/.test(run) ? run : `'${run.replaceAll("'", `'"'"'`)}'`;
}

function command(does, language, text, run) {
  const block = make("pre", { tabindex: 0 }, text.replaceAll(place, () => quoted(run, language)));
  const line = make("div", { class: "command" }), copy = make("button", { type: "button", "aria-label": `Copy: ${does}` }, "Copy");
  copy.addEventListener("click", async () => {
    getSelection().selectAllChildren(block);
    try { await navigator.clipboard.writeText(block.textContent); copy.textContent = "Copied"; } catch { copy.textContent = "Selected"; }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  line.append(make("span", {}, does), copy);
  return [line, block];
}

// ---- table

function sortKey(key) {
  const place = { method: null, rate: RATE, value: VALUE }[key] ?? (costs.findIndex(c => c.key === key) + 1 ? COSTS + costs.findIndex(c => c.key === key) : null);
  return place === null ? i => cell(i, key) : i => points[i][place];
}

function fillTable(wanted, front) {
  let order = wanted.slice();
  if (state.sort) {
    const keys = new Map(), of = state.sort === "front" ? i => (front.has(i) ? 1 : 0) : sortKey(state.sort);
    for (const i of order) keys.set(i, of(i));
    const sign = state.down ? -1 : 1;
    order.sort((a, b) => {
      const [p, q] = [keys.get(a), keys.get(b)];
      if (p === null || q === null) return (p === null) - (q === null) || a - b;
      return sign * (typeof p === "string" ? p.localeCompare(q, "en", { numeric: true }) : p - q) || a - b;
    });
  }
  const visible = state.all ? order : order.slice(0, FIRST_ROWS);
  const mark = headers.findIndex(head => head.dataset.key === "front");
  for (const i of visible) {
    rows[i].cells[mark].textContent = front.has(i) ? "●" : "";
    if (!rows[i].querySelector("button")) {
      const first = rows[i].cells[0], pick = make("button", { type: "button", "data-point": i }, first.textContent);
      first.replaceChildren(pick);
    }
  }
  body.replaceChildren(...visible.map(i => rows[i]));
  more.hidden = visible.length === order.length;
  more.textContent = `Show all ${order.length.toLocaleString("en")} rows`;
  for (const head of headers) {
    if (head.dataset.key === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

// ---- controls and address: #cost=macs&method=pyra,tome&rate=0.3:0.8&task=0&sort=-speed&point=3

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const context = Number(given.get("task") ?? 0);
  state.context = contexts[context] === undefined ? 0 : context;
  const measured = costs.map((_, k) => points.some(p => p[CONTEXT] === state.context && p[COSTS + k] !== null));
  const asked = costs.findIndex((c, k) => c.key === given.get("cost") && measured[k]);
  state.cost = asked >= 0 ? asked : Math.max(0, measured.indexOf(true));
  [...byId("cost").options].forEach((option, k) => { option.disabled = !measured[k]; });
  const names = (given.get("method") ?? "").split(",").map(n => methods.indexOf(n)).filter(k => k >= 0);
  state.methods = new Set(names.length ? names : methods.keys());
  const [low, high] = (given.get("rate") ?? "").split(":").map(text => text.trim() === "" ? NaN : Number(text));
  state.low = Number.isFinite(low) ? low : LOW;
  state.high = Number.isFinite(high) ? high : HIGH;
  const sort = given.get("sort") ?? "";
  state.down = sort.startsWith("-");
  state.sort = headers.some(head => head.dataset.key === sort.replace("-", "")) ? sort.replace("-", "") : null;
  const point = given.has("point") ? Number(given.get("point")) : state.point;
  state.point = points[point] === undefined ? null : point;
  if (byId("task")) byId("task").value = state.context;
  byId("cost").value = state.cost;
  for (const box of byId("methods").querySelectorAll("input")) box.checked = state.methods.has(Number(box.value));
  [byId("low").value, byId("high").value] = [state.low, state.high];
}

function write() {
  const parts = [`cost=${costs[state.cost].key}`];
  if (state.context) parts.push(`task=${state.context}`);
  if (state.methods.size < methods.length) parts.push(`method=${[...state.methods].map(k => encodeURIComponent(methods[k])).join(",")}`);
  if (state.low > LOW || state.high < HIGH) parts.push(`rate=${state.low}:${state.high}`);
  if (state.point !== null) parts.push(`point=${state.point}`);
  if (state.sort) parts.push(`sort=${state.down ? "-" : ""}${state.sort}`);
  try { history.replaceState(null, "", `#${parts.join("&")}`); } catch { /* some viewers forbid it; the page works on */ }
}

function controls() {
  for (const [k, text] of costs.entries()) byId("cost").append(make("option", { value: k }, text.title));
  for (const [k, text] of methods.entries()) {
    const { colour, shape } = look(k), box = make("label"), drawing = make("svg", { viewBox: "-8 -8 16 16", class: colour, "aria-hidden": true });
    drawing.append(make("path", { d: shape }));
    box.append(make("input", { type: "checkbox", value: k, checked: "" }), drawing, text);
    byId("methods").append(box);
  }
  for (const head of headers) {
    const button = make("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      [state.down, state.sort] = [state.sort === head.dataset.key ? !state.down : numeric, head.dataset.key];
      write(); update();
    });
    head.replaceChildren(button);
  }
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => { location.hash = ""; setTimeout(() => { read(); update(); }); });
  form.addEventListener("change", () => {
    const context = Number(byId("task")?.value ?? 0);
    state.methods = new Set([...byId("methods").querySelectorAll("input:checked")].map(box => Number(box.value)));
    const number = (id, otherwise) => byId(id).value === "" ? otherwise : Number(byId(id).value);
    Object.assign(state, { context, cost: Number(byId("cost").value), low: number("low", LOW), high: number("high", HIGH) });
    write();
    if (state.methods.size) read();
    update();
  });
  body.addEventListener("click", event => {
    const pick = event.target.closest("button");
    if (!pick) return;
    choose(Number(pick.dataset.point));
    chosen.scrollIntoView({ block: "nearest" });
  });
  more.addEventListener("click", () => { state.all = true; update(); });
  plot.addEventListener("pointermove", event => point_at(nearest(event)));
  plot.addEventListener("pointerleave", () => point_at(null));
  plot.addEventListener("click", event => { const p = nearest(event); if (p) { choose(p.i); point_at(p); } });
  addEventListener("hashchange", () => { read(); update(); });
}

controls();
read();
figure.querySelector("img").hidden = true;
for (const node of [form, plot]) node.removeAttribute("hidden");
update();
let seen = figure.clientWidth;
new ResizeObserver(() => { if (figure.clientWidth !== seen) { seen = figure.clientWidth; update(); } }).observe(figure);
