"use strict";
// What is shown comes from data blocks, by textContent alone: no text of an answer is ever markup.
// A value of the table is a number, true or false, or [mean, low, high]; without one it is undefined or null.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const byId = (id) => document.getElementById(id);
const index = read("index");
const measures = index.measures;

// The only names that the page knows: what it shows first, and the condition that is the plain model.
const FIRST_MEASURE = "nll", PLAIN = "vanilla", PAIRED = "steered_minus", SIDE_EFFECT = "kl", PERSONA = "probe";
const LIKELIHOOD = "likelihood", SHOWN_OF_IT = ["recovered"], TRAINED = "steered x1";

const chosen = new Set(); // flags that a run must have
let order = { key: "minus_vanilla", down: false };
let opened = null; // number of a run
let measureShown = FIRST_MEASURE in measures ? FIRST_MEASURE : Object.keys(measures)[0];
let overviewY = null; // key of a column

function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "rect", "text", "circle", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const onEnter = (action) => (event) => { if (event.key === "Enter") action(event); };
const missing = (value) => value === null || value === undefined;
const numberOf = (value) => Array.isArray(value) ? value[0] : value;
const isNumber = (value) => typeof value === "number";

// A function that prints numbers in one of Python's forms: {:.2f}, {:+.3f}, {:,.0f}, {:.0%} or {:g}, and what is around it.
function printer(form) {
  const parts = /^(.*)\{:(\+?)(,?)(?:\.(\d+))?([f%g]?)\}(.*)$/.exec(form);
  if (!parts) return (number) => String(+number.toPrecision(4));
  const [, before, sign, comma, digits, kind, after] = parts;
  let print = (number) => String(+number.toPrecision(digits || 6));
  if (kind === "f") print = (number) => number.toFixed(digits || 6);
  if (kind === "%") print = (number) => `${(100 * number).toFixed(digits || 6)}%`;
  return (number) => {
    let text = print(number);
    if (comma) text = text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
    if (sign && number >= 0) text = `+${text}`;
    return before + text + after;
  };
}

const printers = new Map();
function formatted(number, form) {
  if (!printers.has(form)) printers.set(form, printer(form));
  return printers.get(form)(number);
}

function shown(value, form) {
  const one = numberOf(value);
  if (missing(one)) return "-";
  if (one === true) return "yes";
  if (one === false) return "";
  return isNumber(one) ? formatted(one, form) : one;
}

function interval(value, form) { // as text, "" without one
  if (!Array.isArray(value) || !isNumber(value[1]) || !isNumber(value[2])) return "";
  return `[${formatted(value[1], form)}, ${formatted(value[2], form)}]`;
}

const wordsOf = (about) => [about.unit, about.better && `${about.better} is better`].filter(Boolean).join(", ");
const allRows = index.rows.map((row, number) => ({
  ...row, number, flags: row.facts.flags ? row.facts.flags.split("; ") : [],
  search: [row.facts.dataset, row.facts.model, row.facts.run, row.facts.flags].join(" ").toLowerCase(),
}));
const everywhere = new Set(allRows.length ? allRows[0].flags.filter((flag) => allRows.every((row) => row.flags.includes(flag))) : []);
const at = (row, condition, measure) => (row.conditions[condition] || {})[measure];

// ---------------------------------------------------------------- columns of the table

// key, head, about, form; value: what a row has there; up: whether a first click sorts upwards
const fact = (key, head, about, form, up = false) => ({ key, head, about, form, up, value: (row) => row.facts[key] });
const different = (value) => new Set(allRows.map(value)).size;
const differs = (value) => different(value) > 1;
const wholeName = (row) => String(row.facts.model);
const lastPart = (row) => wholeName(row).split("/").pop();
const modelName = different(lastPart) < different(wholeName) ? wholeName : lastPart;
const anyHas = (column) => allRows.some((row) => ![undefined, null, false].includes(numberOf(column.value(row))));

function measured(key, head, measure, value) {
  const about = measures[measure];
  const title = [about.about || measure, wordsOf(about)].filter(Boolean).join("; ");
  return { key, head, about: title, form: about.form, up: about.better === "lower", value };
}

function conditionColumns() { // of the measure that is chosen
  const names = new Set(allRows.flatMap((row) => Object.keys(row.conditions).filter((name) => !("scale" in row.conditions[name]))));
  const columns = [...names, TRAINED].map((name) =>
    measured(`at ${name}`, name, measureShown, (row) => at(row, name, measureShown)));
  columns.push(measured("at recommended", "recommended", measureShown, (row) => at(row, row.use, measureShown)));
  return columns.filter(anyHas);
}

function recommendedColumns() { // of all measures at the scale to use
  const columns = [];
  if (PAIRED in measures) {
    const added = measured("minus_vanilla", "NLL - vanilla", PAIRED, (row) => at(row, PLAIN, PAIRED));
    added.about = `NLL of the vector as it was trained, minus that of the plain model; ${wordsOf(measures[PAIRED])}`;
    added.up = true;
    columns.push(added);
  }
  for (const [name, about] of Object.entries(measures))
    if (about.table !== LIKELIHOOD || SHOWN_OF_IT.includes(name))
      columns.push(measured(name, name, name, (row) => at(row, row.use, name)));
  columns.push(fact("recommended_scale", "scale", "the recommended scale", "{:g}"));
  columns.push(fact("norm_ratio", "norm", "length of the vector, in median norms of the residual stream", "{:.2f}"));
  return columns.filter(anyHas);
}

const runColumns = [
  { key: "run", head: "run", about: "the persona, what may be wrong with it, and the run where there are several of it", form: "", up: true, value: (row) => row.title },
  { key: "model", head: "model", about: "", form: "", up: true, value: modelName },
  fact("layer", "layer", "the vector is added to its output", "{:.0f}", true),
  fact("rows", "rows", "that were trained on", "{:,.0f}"),
].filter((column) => !["model", "layer"].includes(column.key) || differs(column.value));
const atUse = Object.keys(measures).length ? recommendedColumns() : [];
let groups = [];

// ---------------------------------------------------------------- the table

function cell(row, column, first) {
  const value = column.value(row), td = document.createElement("td");
  td.textContent = shown(value, column.form);
  if (first) td.className = "starts";
  const bounds = interval(value, column.form);
  if (bounds) td.title = `${td.textContent} ${bounds}`;
  if (column.key === "run") {
    const flags = row.flags.filter((flag) => !everywhere.has(flag));
    if (flags.length) td.append(el("span", { class: "flags" }, flags.join("; ")));
  }
  return td;
}

function sorted(rows) {
  const column = groups.flatMap((group) => group.columns).find((one) => one.key === order.key);
  if (!column) return rows;
  return [...rows].sort((a, b) => {
    const x = numberOf(column.value(a)), y = numberOf(column.value(b));
    if (missing(x) || missing(y)) return missing(x) - missing(y); // what is missing comes last, either way
    const sign = typeof x === "string" ? x.localeCompare(y) : x - y;
    return order.down ? -sign : sign;
  });
}

const lines = new Map(); // the table's lines as they are built: number of a run -> tr

function line(row) {
  if (!lines.has(row.number)) {
    const cells = groups.flatMap((group) => group.columns.map((column, i) => cell(row, column, group.name && i === 0)));
    lines.set(row.number, el("tr", { "data-run": row.number, tabindex: 0 }, ...cells));
  }
  const tr = lines.get(row.number);
  tr.classList.toggle("open", row.number === opened);
  return tr;
}

function filtered() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return allRows.filter((row) => [...chosen].every((flag) => row.flags.includes(flag)) && wanted.every((word) => row.search.includes(word)));
}

// What can wait until the rest has been painted.
const afterwards = (action) => requestAnimationFrame(() => setTimeout(action));
const AT_ONCE = 100; // lines of the table
let waiting = null; // the others

function showTable() {
  const rows = filtered(), inOrder = sorted(rows), body = document.querySelector("#runs tbody");
  body.replaceChildren(...inOrder.slice(0, AT_ONCE).map(line));
  const others = waiting = inOrder.slice(AT_ONCE);
  if (others.length) afterwards(() => { if (others === waiting) body.append(...others.map(line)); });
  for (const head of document.querySelectorAll("#runs th[data-key]"))
    head.setAttribute("aria-sort", head.dataset.key !== order.key ? "none" : order.down ? "descending" : "ascending");
  let count = rows.length === allRows.length ? `${rows.length} runs` : `${rows.length} of ${allRows.length} runs`;
  if (allRows.length && !differs(modelName)) count += `, model ${modelName(allRows[0])}`;
  if (allRows.length && !differs((row) => row.facts.layer)) count += `, layer ${allRows[0].facts.layer}`;
  byId("count").textContent = count;
}

function showFiltered() {
  showTable();
  showOverview();
}

// A click, or Enter, on what stands for a run, a line or a dot, opens it.
function openFrom(place) {
  const open = (event) => {
    const found = event.target.closest("[data-run]");
    if (found) location.hash = `run=${found.dataset.run}`;
  };
  place.addEventListener("click", open);
  place.addEventListener("keydown", onEnter(open));
}

function markOpened(number) {
  opened = number;
  for (const node of document.querySelectorAll("[data-run].open")) node.classList.remove("open");
  for (const node of document.querySelectorAll(`[data-run="${number}"]`)) node.classList.add("open");
}

const breakable = (text) => text.split(/(?<=[_/,])/).flatMap((part) => [part, el("wbr")]); // long names may wrap

function showHead() {
  const byCondition = Object.keys(measures).length ? conditionColumns() : [];
  const select = el("select", { id: "measure", "aria-label": "measure", change: () => {
    measureShown = select.value;
    showHead();
    showTable();
  } }, ...Object.keys(measures).map((name) => el("option", { value: name }, name)));
  select.value = measureShown;
  groups = [
    { columns: runColumns },
    { name: "by condition: ", tool: select, columns: byCondition },
    { name: "at the recommended scale", columns: atUse },
  ].filter((group) => group.columns.length || group.tool && Object.keys(measures).length);

  const heads = groups.flatMap((group) => group.columns.map((column, i) => {
    const sort = () => {
      order = { key: column.key, down: order.key === column.key ? !order.down : !column.up };
      showTable();
    };
    return el("th", { "data-key": column.key, class: group.name && i === 0 ? "starts" : null, title: column.about, tabindex: 0,
      click: sort, keydown: onEnter(sort) }, ...breakable(column.head));
  }));
  const over = groups.map((group) =>
    el("th", { colspan: group.columns.length || 1, class: group.name ? "starts" : null }, group.name, group.tool));
  lines.clear();
  document.querySelector("#runs thead").replaceChildren(el("tr", { class: "groups" }, ...over), el("tr", null, ...heads));
}

function showButtons() {
  const counts = new Map();
  for (const row of allRows) for (const flag of row.flags) counts.set(flag, (counts.get(flag) || 0) + 1);
  for (const [flag, count] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 30)) {
    byId("buttons").append(el("button", { "data-flag": flag, title: meaning(flag), click: (event) => {
      if (!chosen.delete(flag)) chosen.add(flag);
      event.currentTarget.classList.toggle("on", chosen.has(flag));
      showFiltered();
    } }, `${flag} (${count === allRows.length ? "all" : count})`));
  }
  byId("search").addEventListener("input", showFiltered);
}

const MEANINGS = {
  "under budget": "trained on fewer tokens than --target-tokens",
  "other code": "trained by other code than the one that wrote this page",
  "collapse at": "answers there are empty, repeat themselves or make no sense",
  "norm out of range": "the vector is much shorter or longer than useful ones are",
  "no better than": "in NLL, by the 95% interval over questions",
};
const meaning = (flag) => (Object.entries(MEANINGS).find(([begin]) => flag.startsWith(begin)) || ["", ""])[1];

// ---------------------------------------------------------------- pictures

const BLUE = "#2171b5", GREY = "#999";
const BLUES = ["#a6cbe8", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"]; // by scale
const OTHERS = ["#7f7f7f", "#222", "#de8f05", "#d9b500", "#ca9161", "#8c564b", "#c9a0a0", "#e0703a", "#029e73", "#b5b5b5", "#cc78bc"];

// A colour for each condition: shades of blue for the trained vector, whose conditions `steered` names in the order of scale.
function colorsOf(conditions, steered) {
  const colors = {};
  Object.keys(conditions).filter((name) => !steered.includes(name)).forEach((name, i) => { colors[name] = OTHERS[i % OTHERS.length]; });
  steered.forEach((name, i) => { colors[name] = BLUES[Math.floor(i / steered.length * BLUES.length)]; });
  return colors;
}

// Round numbers within [low, high], some `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= .7 * rough) || 10);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toPrecision(6));
  return found;
}

// [lowest, highest] of some numbers, with a little room around them.
function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values.filter(isNumber)) { low = Math.min(low, value); high = Math.max(high, value); }
  const room = high > low ? .05 * (high - low) : .5;
  return [low - room, high + room];
}

// Draw axes into a picture; box: {left, right, top, bottom} in pixels. Returns where a number is, across and down.
function axes(picture, box, xs, ys, xLabel, yLabel) {
  const [x0, x1] = range(xs), [y0, y1] = range(ys);
  const across = (x) => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
  const down = (y) => box.bottom - (y - y0) / (y1 - y0) * (box.bottom - box.top);
  for (const value of ticks(x0, x1, 5)) {
    picture.append(el("path", { d: `M${across(value)},${box.top}V${box.bottom}`, stroke: "#eee" }));
    picture.append(el("text", { x: across(value), y: box.bottom + 14, "text-anchor": "middle" }, String(value)));
  }
  for (const value of ticks(y0, y1, 4)) {
    picture.append(el("path", { d: `M${box.left},${down(value)}H${box.right}`, stroke: "#eee" }));
    picture.append(el("text", { x: box.left - 5, y: down(value) + 4, "text-anchor": "end" }, String(value)));
  }
  picture.append(el("path", { d: `M${box.left},${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: GREY }));
  picture.append(el("text", { x: (box.left + box.right) / 2, y: box.bottom + 28, "text-anchor": "middle" }, xLabel));
  picture.append(el("text", { x: box.left, y: box.top - 5 }, yLabel));
  return [across, down];
}

// lines: [{name, color, points: [[x, y, low, high], ...]}]; mark: an x to point out, or null
function chart(title, xLabel, yLabel, lines, mark = null) {
  lines = lines.map((line) => ({ ...line, points: line.points.filter((point) => isNumber(point[1])) })).filter((line) => line.points.length);
  if (!lines.length) return null;
  const all = lines.flatMap((line) => line.points);
  const box = { left: 44, right: 388, top: 18, bottom: 196 };
  const picture = el("svg", { width: 400, height: 230, role: "img" }, el("title", null, title));
  const [across, down] = axes(picture, box, all.map((point) => point[0]), all.flatMap((point) => point.slice(1)), xLabel, yLabel);
  if (mark !== null) picture.append(el("path", { d: `M${across(mark)},${box.top}V${box.bottom}`, stroke: "#222", "stroke-dasharray": "3 3" }));
  for (const { name, color, points } of lines) {
    const path = points.map((point, i) => `${i ? "L" : "M"}${across(point[0])},${down(point[1])}`).join("");
    picture.append(el("path", { d: path, fill: "none", stroke: color, "stroke-width": 2 }));
    for (const [x, y, low, high] of points) {
      if (isNumber(low) && isNumber(high)) picture.append(el("path", { d: `M${across(x)},${down(low)}V${down(high)}`, stroke: color, opacity: .6 }));
      if (points.length < 40) picture.append(el("circle", { cx: across(x), cy: down(y), r: 3, fill: color }, el("title", null, `${name} ${x}: ${formatted(y, "")}`)));
    }
  }
  const legend = lines.length > 1 ? lines.map((line) => el("span", { style: `color:${line.color}` }, ` ${line.name}`)) : [];
  return el("figure", null, el("figcaption", null, el("b", null, title), ...legend), picture);
}

// A panel for a measure: a row for each condition, a dot at its mean and a line over its interval.
function dots(measure, run, colors, use) {
  const rows = Object.entries(run.conditions).map(([name, values]) => [name, values[measure]]).filter(([, value]) => isNumber(numberOf(value)));
  if (rows.length < 2) return null;
  const about = measures[measure], step = 16, left = 124, right = 268, bottom = rows.length * step + 4;
  const [low, high] = range(rows.flatMap(([, value]) => value));
  const across = (value) => left + (value - low) / (high - low) * (right - left);
  const picture = el("svg", { width: 320, height: bottom + 16, role: "img" }, el("title", null, `${measure}: ${about.about}`));
  for (const value of ticks(low, high, 3)) {
    picture.append(el("path", { d: `M${across(value)},0V${bottom}`, stroke: "#eee" }));
    picture.append(el("text", { x: across(value), y: bottom + 12, "text-anchor": "middle" }, String(value)));
  }
  rows.forEach(([name, value], i) => {
    const y = i * step + 11, color = colors[name], bounds = interval(value, about.form);
    picture.append(el("text", { x: left - 8, y: y + 4, "text-anchor": "end", class: name === use ? "said" : null }, name === use ? `* ${name}` : name));
    if (bounds) picture.append(el("path", { d: `M${across(value[1])},${y}H${across(value[2])}`, stroke: color, "stroke-width": 2 }));
    picture.append(el("circle", { cx: across(numberOf(value)), cy: y, r: 4, fill: color }, el("title", null, `${name}: ${shown(value, about.form)} ${bounds}`)));
    if (name === use) picture.append(el("circle", { cx: across(numberOf(value)), cy: y, r: 6.5, fill: "none", stroke: color, "stroke-width": 1.5 }));
    picture.append(el("text", { x: right + 6, y: y + 4 }, shown(value, about.form)));
  });
  const caption = el("figcaption", { title: about.about }, el("b", null, measure), " ", el("small", null, wordsOf(about)));
  return el("figure", { "data-measure": measure }, caption, picture);
}

// Each run a dot: what it changes besides, against what it does.
function showOverview() {
  const columns = atUse.filter((column) => column.key !== SIDE_EFFECT && allRows.some((row) => isNumber(numberOf(column.value(row)))));
  const x = (row) => numberOf(at(row, row.use, SIDE_EFFECT));
  if (!columns.length || !allRows.some((row) => isNumber(x(row)))) return;
  if (overviewY === null) overviewY = columns.some((one) => one.key === PERSONA) ? PERSONA : columns[0].key;
  const column = columns.find((one) => one.key === overviewY), y = (row) => numberOf(column.value(row));
  const select = el("select", { "aria-label": "measure of the overview", change: () => {
    overviewY = select.value;
    showOverview();
  } }, ...columns.map((one) => el("option", { value: one.key }, one.head)));
  select.value = overviewY;

  const rows = filtered(), there = rows.filter((row) => isNumber(x(row)) && isNumber(y(row)));
  const box = { left: 54, right: 885, top: 18, bottom: 250 };
  const picture = el("svg", { width: 900, height: 285, role: "img" }, el("title", null, "all runs"));
  const [across, down] = axes(picture, box, there.map(x), there.map(y), `${SIDE_EFFECT} at the recommended scale: ${wordsOf(measures[SIDE_EFFECT])}`, `${column.head}: ${column.about}`);
  const taken = there.map((row) => [across(x(row)) - 5, down(y(row)) - 5, 10, 10]); // [left, top, width, height] of dots and names
  for (const row of there) {
    const cx = across(x(row)), cy = down(y(row));
    picture.append(el("circle", { cx, cy, r: 4.5, "data-run": row.number, tabindex: 0, class: row.number === opened ? "open" : null }));
    if (there.length > 40) continue;
    const width = 6.6 * row.title.length;
    const places = [[cx + 8, cy - 6, "start"], [cx - 8 - width, cy - 6, "end"], [cx - width / 2, cy - 20, "middle"], [cx - width / 2, cy + 8, "middle"]];
    const free = ([left, top]) => left > box.left && left + width < 900 && top > 0 && top + 12 < box.bottom
      && taken.every(([l, t, w, h]) => left + width < l || l + w < left || top + 12 < t || t + h < top);
    const place = places.find(free);
    if (!place) continue; // it has its name when pointed at
    const [start, top, anchor] = place;
    taken.push([start, top, width, 12]);
    picture.append(el("text", { x: start + { start: 0, middle: .5, end: 1 }[anchor] * width, y: top + 10, "text-anchor": anchor }, row.title));
  }

  const label = el("output", { class: "said" }, "Point at a dot for its name.");
  const name = (event) => {
    if (!event.target.dataset.run) return;
    const row = allRows[+event.target.dataset.run];
    label.textContent = `${row.title}: ${SIDE_EFFECT} ${shown(x(row), measures[SIDE_EFFECT].form)}, ${column.head} ${shown(y(row), column.form)}`;
  };
  picture.addEventListener("mouseover", name);
  picture.addEventListener("focusin", name);
  openFrom(picture);
  const left = rows.length - there.length;
  byId("overview").replaceChildren(el("div", null, "Each run: ", select, ` against ${SIDE_EFFECT}; a click opens it. `, label,
    el("small", null, left ? ` (${left} ${left > 1 ? "runs have" : "run has"} no such numbers)` : "")), picture);
}

// ---------------------------------------------------------------- one run

function answersOf(samples, conditions) {
  return samples.map((sample) => {
    const there = conditions.filter((name) => name in sample.answers);
    return el("div", { class: "qa" }, el("h3", null, sample.question), el("small", null, sample.system_prompt),
      el("div", { class: "side" }, ...there.map((name) => el("div", null, el("b", null, name), sample.answers[name]))));
  });
}

function byScale(measure, run, scaled) { // points of a chart; the plain model is scale 0
  const plain = run.conditions[PLAIN] || {};
  return [[0, plain], ...scaled.map(([, values]) => [values.scale, values])].filter(([, values]) => !missing(values[measure]))
    .map(([scale, values]) => [scale].concat(values[measure]));
}

function showRun(number) {
  const place = byId("run"), row = allRows[number];
  place.hidden = false;
  markOpened(number);
  const run = read(`run-${number}`), parts = [];
  for (const name of Object.keys(run.conditions)) run.conditions[name] = run.conditions[name] || row.conditions[name];
  const scaled = Object.entries(run.conditions).filter(([, values]) => isNumber(values.scale)).sort((a, b) => a[1].scale - b[1].scale);
  const recommended = row.facts.recommended_scale, colors = colorsOf(run.conditions, scaled.map(([name]) => name));
  parts.push(el("h2", null, row.title, " ", el("button", { id: "close", click: () => { location.hash = ""; } }, "close")));
  parts.push(el("p", null, el("small", null, row.facts.run), " ", el("span", { class: "flags" }, row.flags.join("; "))));
  const over = [PERSONA, SIDE_EFFECT].filter((name) => name in measures).map((name) => chart(
    `${name} against scale`, "scale", wordsOf(measures[name]), [{ name, color: BLUE, points: byScale(name, run, scaled) }], recommended));
  const turns = Object.entries(run.turns || {}).map(([name, means]) => ({ name, color: colors[name] || GREY, points: means.map((mean, i) => [i + 1, mean]) }));
  parts.push(el("div", { class: "charts" }, ...Object.keys(measures).map((measure) => dots(measure, run, colors, row.use))));
  parts.push(el("div", { class: "charts" }, ...over,
    chart("Training", "step", "nats a token", [{ name: "loss", color: GREY, points: run.loss }, { name: "validation", color: "#de8f05", points: run.validation }]),
    chart("Persona by turn", "turn", "", turns)));
  if (run.tables) parts.push(el("pre", null, run.tables));
  if (run.samples && run.samples.length) parts.push(...slider(run, scaled, recommended));
  place.replaceChildren(...parts);
  place.scrollIntoView();
}

function slider(run, scaled, recommended) {
  const written = new Set(run.samples.flatMap((sample) => Object.keys(sample.answers)));
  const scales = scaled.filter(([name]) => written.has(name));
  const others = Object.keys(run.conditions).filter((name) => !scaled.some(([steered]) => steered === name));
  const list = el("div", { id: "answers" }), said = el("output", null);
  const near = scales.findIndex(([, values]) => values.scale === recommended);
  const bar = el("input", { type: "range", min: 0, max: Math.max(0, scales.length - 1), step: 1, "aria-label": "scale", input: () => fill() });
  const beside = el("select", { "aria-label": "beside it", change: () => fill() }, el("option", { value: "" }, "no other"),
    ...scales.map(([name]) => el("option", { value: name }, name)));
  bar.value = near < 0 ? Math.max(0, scales.length - 1) : near;
  const fill = () => {
    const names = new Set(others);
    said.textContent = "";
    if (scales.length) {
      const [name, values] = scales[+bar.value];
      said.textContent = ` ${name}${values.scale === recommended ? " (recommended)" : ""}, beside it `;
      names.clear();
      [name, beside.value, ...others].filter(Boolean).forEach((one) => names.add(one));
    }
    list.replaceChildren(el("h2", null, "Answers"), ...answersOf(run.samples, [...names]),
      el("h2", null, "Who is speaking"), ...answersOf(run.identity, [...names]));
  };
  fill();
  return scales.length ? [el("div", { id: "slider" }, "scale ", bar, said, beside), list] : [list];
}

function follow() {
  const match = /^#run=(\d+)$/.exec(location.hash);
  if (match && +match[1] < allRows.length) return showRun(+match[1]);
  byId("run").hidden = true;
  markOpened(null);
}

// ---------------------------------------------------------------- heat maps

// Perceptually even: viridis from dark to bright; for signed numbers blue, white, red (cividis-like steps of lightness).
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const DIVERGING = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"];

// [red, green, blue] of a share between 0 and 1 of a colour map.
function shade(colors, share) {
  const place = share * (colors.length - 1), i = Math.min(colors.length - 2, Math.floor(place));
  const part = (color, k) => parseInt(color.slice(2 * k + 1, 2 * k + 3), 16);
  return [0, 1, 2].map((k) => Math.round(part(colors[i], k) + (place - i) * (part(colors[i + 1], k) - part(colors[i], k))));
}

// The numbers of a heat map, two bytes each (IEEE 754, half precision); NaN for what is none.
function numbersOf(text) {
  const numbers = new Float32Array(text.length / 2), bits = new Uint32Array(numbers.buffer);
  for (let i = 0; i < numbers.length; i++) {
    const half = text.charCodeAt(2 * i) | text.charCodeAt(2 * i + 1) << 8;
    bits[i] = (half & 0x8000) << 16 | (half & 0x7fff) << 13; // as a float of 32 bits, but for the bias of the exponent
    numbers[i] = (half & 0x7c00) === 0x7c00 ? NaN : numbers[i] * 2 ** 112;
  }
  return numbers;
}

function showHeat(map) {
  const count = map.names.length, named = count <= 40, size = Math.max(1, Math.min(46, Math.floor(640 / count)));
  const side = count * size, longest = Math.max(...map.names.map((name) => name.length));
  const left = named ? Math.min(240, 6.5 * longest + 12) : 0, below = named ? .75 * left + 6 : 6, top = 4;
  const numbers = numbersOf(atob(map.cells));

  // The colours: zero in the middle, or from the lowest to the highest off the diagonal, which is 1 by itself.
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < numbers.length; i++) {
    if (Number.isNaN(numbers[i]) || !map.signed && i % (count + 1) === 0) continue;
    low = Math.min(low, numbers[i]);
    high = Math.max(high, numbers[i]);
  }
  if (map.signed) [low, high] = [-Math.max(-low, high), Math.max(-low, high)];
  const shareOf = (number) => high > low ? Math.min(1, Math.max(0, (number - low) / (high - low))) : .5;

  const colors = Array.from({ length: 256 }, (_, i) => shade(map.signed ? DIVERGING : VIRIDIS, i / 255));
  const image = new ImageData(count, count); // a pixel a cell, each of them four bytes: red, green, blue and 255
  const packed = colors.map(([red, green, blue]) => 255 << 24 | blue << 16 | green << 8 | red);
  const noNumber = 255 << 24 | 187 << 16 | 187 << 8 | 187;
  const pixels = new Int32Array(image.data.buffer);
  for (let i = 0; i < numbers.length; i++) pixels[i] = Number.isNaN(numbers[i]) ? noNumber : packed[Math.round(shareOf(numbers[i]) * 255)];
  const canvas = el("canvas", { width: count, height: count, style: `left:${left}px;top:${top}px;width:${side}px;height:${side}px` });
  canvas.getContext("2d").putImageData(image, 0, 0);

  const picture = el("svg", { width: left + side + 110, height: top + side + below });
  if (named) map.names.forEach((name, i) => {
    const middle = (i + .5) * size;
    picture.append(el("text", { x: left - 6, y: top + middle + 4, "text-anchor": "end" }, name));
    picture.append(el("text", { "text-anchor": "end", transform: `translate(${left + middle + 3},${top + side + 11}) rotate(-45)` }, name));
  });
  if (size >= 30) for (let i = 0; i < count; i++) for (let j = 0; j < count; j++) {
    const number = numbers[i * count + j], share = Number.isNaN(number) ? 1 : shareOf(number);
    const dark = map.signed ? Math.abs(share - .5) > .3 : share < .6;
    picture.append(el("text", { x: left + (j + .5) * size, y: top + (i + .5) * size + 4, "text-anchor": "middle", style: `fill:${dark ? "#fff" : "#222"}` },
      Number.isNaN(number) ? "×" : number.toFixed(2)));
  }
  const inside = Math.max(2, size - 2), stroke = size > 8 ? 2.5 : 1;
  for (const j of map.lost)
    picture.append(el("rect", { class: "lost", x: left + j * size + 1, y: top + j * size + 1, width: inside, height: inside,
      fill: "none", stroke: "#222", "stroke-width": stroke }));

  const bar = left + side + 18, steps = 64; // the scale
  for (let k = 0; k < steps; k++)
    picture.append(el("rect", { x: bar, y: top + side * (1 - (k + 1) / steps), width: 14, height: side / steps + .5, fill: `rgb(${colors[Math.round(k / (steps - 1) * 255)]})` }));
  for (const number of high > low ? ticks(low, high, 5) : [])
    picture.append(el("text", { x: bar + 20, y: top + side * (1 - (number - low) / (high - low)) + 4 }, String(number)));

  const grey = numbers.some(Number.isNaN) ? " Grey: no number." : "", lost = map.lost.length ? " Framed: the diagonal is not the best of its column." : "";
  const said = el("div", { class: "said" }, "Point at a cell for its names.");
  canvas.addEventListener("mousemove", (event) => {
    const j = Math.floor(event.offsetX / size), i = Math.floor(event.offsetY / size);
    if (i < 0 || j < 0 || i >= count || j >= count) return;
    const number = numbers[i * count + j];
    said.textContent = `${map.names[i]} / ${map.names[j]}: ${Number.isNaN(number) ? "no number" : number.toFixed(3)}`;
  });
  byId("heat").append(el("h2", null, map.title), el("div", { class: "note" }, map.note + lost + grey), said, el("div", { class: "map" }, canvas, picture));
}

showHead();
showButtons();
showFiltered();
openFrom(document.querySelector("#runs tbody"));
follow();
window.addEventListener("hashchange", follow);
for (const { title, text, lines } of index.layers) {
  const curves = lines.map(([layer, points], i) => {
    const color = shade(VIRIDIS, .9 * i / Math.max(1, lines.length - 1));
    return { name: `layer ${layer}`, color: `rgb(${color})`, points };
  });
  byId("layers").append(el("div", null, el("h2", null, title), el("pre", null, text),
    chart("Persona against side effects, a line a layer", "KL on plain rows, nats a token", "persona", curves)));
}
if (index.seeds) {
  byId("seeds").hidden = false;
  document.querySelector("#seeds pre").textContent = index.seeds;
}
afterwards(() => index.heat.forEach(showHeat));
