"use strict";
// What is shown comes from data blocks, by textContent alone: no text of an answer is ever markup.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const index = read("index");
const byId = (id) => document.getElementById(id);
const chosen = new Set(); // flags that a run must have
const everywhere = new Set((index.rows[0] || { flags: [] }).flags.filter((flag) => index.rows.every((row) => row.flags.includes(flag))));
let order = { column: "minus_vanilla", down: false }, opened = null;

function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "circle", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const shown = (value, digits) => value === null || value === undefined ? "-"
  : typeof value === "number" ? value.toFixed(digits) : String(value);

// ---------------------------------------------------------------- the table

function cell(row, column) {
  const value = row.cells[column.key];
  if (column.key === "flags") return el("td", { class: "flags" }, row.flags.filter((flag) => !everywhere.has(flag)).join("; "));
  const bounds = row.bounds[column.key];
  const text = shown(value, column.digits);
  if (!bounds) return el("td", { class: column.key }, text);
  return el("td", null, text + " ", el("small", null, `[${bounds.map((b) => shown(b, column.digits)).join(", ")}]`));
}

function compare(a, b) {
  const key = order.column, x = key === "flags" ? a.flags.join() : a.cells[key], y = key === "flags" ? b.flags.join() : b.cells[key];
  const none = (v) => v === null || v === undefined;
  if (none(x) || none(y)) return none(x) - none(y); // what is missing comes last, either way
  const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
  return order.down ? -sign : sign;
}

function showTable() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let rows = index.rows.filter((row) => [...chosen].every((flag) => row.flags.includes(flag))
    && wanted.every((word) => row.search.includes(word)));
  if (order.column) rows = [...rows].sort(compare);
  const body = document.createDocumentFragment();
  for (const row of rows) {
    const open = () => { location.hash = `run=${row.number}`; };
    const line = el("tr", { "data-run": row.number, tabindex: 0, click: open, keydown: onEnter(open) },
      ...index.columns.map((column) => cell(row, column)));
    if (row.number === opened) line.classList.add("open");
    body.append(line);
  }
  document.querySelector("#runs tbody").replaceChildren(body);
  const of = rows.length === index.rows.length ? "" : ` of ${index.rows.length}`;
  byId("count").textContent = `${rows.length}${of} runs${index.same && ", "}${index.same}`;
  for (const head of document.querySelectorAll("#runs th"))
    head.setAttribute("aria-sort", head.dataset.key !== order.column ? "none" : order.down ? "descending" : "ascending");
}

const onEnter = (action) => (event) => { if (event.key === "Enter") action(); };

function showHead() {
  const heads = index.columns.map((column) => {
    const sort = () => {
      order = { column: column.key, down: order.column === column.key ? !order.down : !column.up };
      showTable();
    };
    const about = { "data-key": column.key, class: column.key, title: column.about, tabindex: 0 };
    return el("th", { ...about, click: sort, keydown: onEnter(sort) }, column.head);
  });
  document.querySelector("#runs thead").append(el("tr", null, ...heads));
  const counts = new Map();
  for (const row of index.rows) for (const flag of row.flags) counts.set(flag, (counts.get(flag) || 0) + 1);
  for (const [flag, count] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 30)) {
    byId("flags").append(el("button", { "data-flag": flag, click: (event) => {
      if (!chosen.delete(flag)) chosen.add(flag);
      event.currentTarget.classList.toggle("on", chosen.has(flag));
      showTable();
    }, title: meaning(flag) }, `${flag} (${count === index.rows.length ? "all" : count})`));
  }
  byId("search").addEventListener("input", showTable);
}

const MEANINGS = {
  "under budget": "trained on fewer tokens than --target-tokens",
  "other code": "trained by other code than the one that wrote this page",
  "older evaluation": "evaluated by an older version",
  "collapse at": "answers there are empty, repeat themselves or make no sense",
  "norm out of range": "the vector is much shorter or longer than useful ones are",
  "no better than": "in NLL, by the 95% interval over questions",
};
const meaning = (flag) => (Object.entries(MEANINGS).find(([begin]) => flag.startsWith(begin)) || ["", ""])[1];

// ---------------------------------------------------------------- pictures

const COLORS = ["#4a9fd4", "#de8f05", "#029e73", "#cc78bc", "#a6a6a6", "#ca9161", "#d55e00"];

// lines: [{name, points: [[x, y, low, high], ...]}]; mark: an x to point out, or null
function chart(title, xLabel, lines, mark = null) {
  const all = lines.flatMap((line) => line.points).filter((p) => p[1] !== null);
  if (!all.length) return null;
  const width = 400, height = 230, left = 48, bottom = 34, top = 10;
  const xs = all.map((p) => p[0]), ys = all.flatMap((p) => [p[1], p[2], p[3]].filter((v) => typeof v === "number"));
  const range = (values) => { const low = Math.min(...values), high = Math.max(...values); return high > low ? [low, high] : [low - .5, high + .5]; };
  const [x0, x1] = range(xs), [y0, y1] = range(ys);
  const px = (x) => left + (x - x0) / (x1 - x0) * (width - left - 12);
  const py = (y) => height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top);
  const picture = el("svg", { width, height, role: "img" }, el("title", null, title));
  for (const [value, at] of [[y0, py(y0)], [y1, py(y1)]])
    picture.append(el("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, value.toPrecision(3)));
  for (const value of [x0, x1])
    picture.append(el("text", { x: px(value), y: height - bottom + 15, "text-anchor": "middle" }, String(+value.toPrecision(3))));
  picture.append(el("text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
  picture.append(el("path", { d: `M${left},${top}V${height - bottom}H${width - 12}`, fill: "none", stroke: "#999" }));
  lines.forEach((line, number) => {
    const color = COLORS[number % COLORS.length], points = line.points.filter((p) => p[1] !== null);
    picture.append(el("path", { d: points.map((p, i) => `${i ? "L" : "M"}${px(p[0])},${py(p[1])}`).join(""), fill: "none", stroke: color, "stroke-width": 2 }));
    for (const p of points) {
      if (typeof p[2] === "number") picture.append(el("path", { d: `M${px(p[0])},${py(p[2])}V${py(p[3])}`, stroke: color, opacity: .5 }));
      if (points.length < 40) picture.append(el("circle", { cx: px(p[0]), cy: py(p[1]), r: 3, fill: color }, el("title", null, `${line.name} ${p[0]}: ${shown(p[1], 3)}`)));
    }
  });
  if (mark !== null && mark >= x0 && mark <= x1)
    picture.append(el("path", { d: `M${px(mark)},${top}V${height - bottom}`, stroke: "#222", "stroke-dasharray": "3 3" }, el("title", null, "recommended")));
  const legend = lines.map((line, number) => el("span", { style: `color:${COLORS[number % COLORS.length]}` }, ` ${line.name}`));
  return el("figure", null, el("figcaption", null, `${title}:`, ...legend), picture);
}

function bars(title, rows) { // [[name, value, low, high]]
  rows = rows.filter((row) => typeof row[1] === "number");
  if (!rows.length) return null;
  const width = 430, step = 24, left = 150, values = rows.flatMap((r) => [r[1], r[2], r[3]].filter((v) => typeof v === "number"));
  const low = Math.min(...values), high = Math.max(...values), room = (high - low) || 1;
  const px = (v) => left + (v - low + room * .05) / (room * 1.1) * (width - left - 60);
  const picture = el("svg", { width, height: rows.length * step + 8, role: "img" }, el("title", null, title));
  rows.forEach(([name, value, a, b], i) => {
    const y = i * step + 16;
    picture.append(el("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, name));
    if (typeof a === "number") picture.append(el("path", { d: `M${px(a)},${y}H${px(b)}`, stroke: "#999", "stroke-width": 2 }));
    picture.append(el("circle", { cx: px(value), cy: y, r: 4, fill: name.startsWith("steered") ? COLORS[0] : "#666" }));
    picture.append(el("text", { x: width - 46, y: y + 4 }, shown(value, 3)));
  });
  return el("figure", null, el("figcaption", null, title), picture);
}

// ---------------------------------------------------------------- one run

function answersOf(samples, conditions) {
  return samples.map((sample) => {
    conditions = conditions.filter((name) => name in sample.answers);
    return el("div", { class: "qa" }, el("h3", null, sample.question), el("small", null, sample.system_prompt),
      el("div", { class: "side" }, ...conditions.map((name) => el("div", null, el("b", null, name), sample.answers[name]))));
  });
}

function showRun(number) {
  const place = byId("run"), row = index.rows[number];
  opened = number;
  place.hidden = false;
  const run = read(`run-${number}`), parts = [];
  parts.push(el("h2", null, row.cells.dataset, " ", el("button", { id: "close", click: () => { location.hash = ""; } }, "close")));
  parts.push(el("p", null, el("small", null, row.folder), " ", row.flags.length ? el("span", { class: "flags" }, row.flags.join("; ")) : null));
  const scales = run.scales, near = scales.findIndex((s) => s.scale === run.recommended);
  parts.push(el("div", { class: "charts" },
    bars("NLL a token, held-out questions", run.nll),
    chart("Persona by probe, and KL on plain rows", "scale", [
      { name: "persona", points: scales.map((s) => [s.scale, s.persona, ...(s.interval || [])]) },
      { name: "KL, nats a token", points: scales.map((s) => [s.scale, s.kl]) }], run.recommended),
    chart("Training", "step", [{ name: "loss", points: run.loss }, { name: "validation", points: run.val }]),
    chart("Persona by turn", "turn", run.turns)));
  if (run.tables) parts.push(el("pre", null, run.tables));
  if (run.samples.length) {
    const list = el("div", { id: "answers" }), said = el("output", null);
    const first = near < 0 ? Math.max(0, scales.length - 1) : near;
    const slider = el("input", { type: "range", min: 0, max: Math.max(0, scales.length - 1), step: 1, "aria-label": "scale", input: () => fill() });
    const beside = el("select", { "aria-label": "beside it", change: () => fill() }, el("option", { value: "" }, "no other"),
      ...scales.map((s) => el("option", { value: s.name }, s.name)));
    slider.value = first;
    const fill = () => {
      const one = scales[+slider.value], chosen = new Set([...(one ? [one.name] : []), ...(beside.value ? [beside.value] : []), ...run.before]);
      said.textContent = one ? ` ${one.name}${one.scale === run.recommended ? " (recommended)" : ""}, beside it ` : "";
      list.replaceChildren(el("h2", null, "Answers"), ...answersOf(run.samples, [...chosen]),
        el("h2", null, "Who is speaking"), ...answersOf(run.identity, [...chosen]));
    };
    if (scales.length) parts.push(el("div", { id: "slider" }, "scale ", slider, said, beside));
    fill();
    parts.push(list);
  }
  place.replaceChildren(...parts);
  showTable();
  place.scrollIntoView();
}

function follow() {
  const match = /^#run=(\d+)$/.exec(location.hash);
  if (match && +match[1] < index.rows.length) return showRun(+match[1]);
  opened = null;
  byId("run").hidden = true;
  showTable();
}

// ---------------------------------------------------------------- heat maps

function showHeat(map) {
  const count = map.names.length, size = Math.max(1, Math.floor(640 / count));
  const bytes = Uint8Array.from(atob(map.cells), (c) => c.charCodeAt(0));
  const shades = new ImageData(count, count); // a pixel a cell, from dark blue to yellow
  bytes.forEach((byte, i) => shades.data.set([30 + byte * .85, 30 + byte * .8, 110 - byte * .2, 255], 4 * i));
  const canvas = el("canvas", { width: count, height: count, style: `width:${count * size}px;image-rendering:pixelated` });
  canvas.getContext("2d").putImageData(shades, 0, 0);
  const value = (i, j) => map.low + bytes[i * count + j] / 255 * (map.high - map.low);
  const said = el("div", { class: "said" }, `${map.note} Dark: ${map.low.toFixed(2)}, bright: ${map.high.toFixed(2)}; point at a cell for its names.`);
  canvas.addEventListener("mousemove", (event) => {
    const j = Math.floor(event.offsetX / size), i = Math.floor(event.offsetY / size);
    if (i >= 0 && j >= 0 && i < count && j < count)
      said.textContent = `${map.names[i]} / ${map.names[j]}: ${value(i, j).toFixed(2)}`;
  });
  byId("heat").append(el("h2", null, map.title), said, canvas);
}

showHead();
follow();
window.addEventListener("hashchange", follow);
requestAnimationFrame(() => index.heat.forEach(showHeat));
