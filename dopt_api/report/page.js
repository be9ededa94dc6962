"use strict";
const TEXTS = {{ texts }};
const details = JSON.parse(document.querySelector("#details").textContent);
const body = document.querySelector("#layers tbody");
const rows = Array.from(body.rows);
const texts = rows.map(row => Array.from(row.cells).slice(0, TEXTS).map(cell => cell.textContent).join(" ").toLowerCase());

// ---- search and sorting

const search = document.querySelector("#search");
function filter() {
  closeDetails();
  const wanted = search.value.trim().toLowerCase();
  let count = 0;
  rows.forEach((row, i) => { row.hidden = !texts[i].includes(wanted); count += !row.hidden; });
  document.querySelector("#shown").textContent = count + " of " + rows.length;
}
search.addEventListener("input", filter);

const heads = Array.from(document.querySelectorAll("#layers th"));
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  closeDetails();
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(one => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const numbers = column >= TEXTS;
  const key = row => numbers ? row.cells[column].dataset.sort : row.cells[column].textContent;
  const value = row => !numbers ? key(row) : key(row) === "" ? Infinity : Number(key(row));
  const keyed = rows.map((row, i) => [value(row), i, row]);
  const order = (a, b) => a < b ? -1 : a > b ? 1 : 0;
  keyed.sort((a, b) => {
    if (numbers && (a[0] === Infinity) !== (b[0] === Infinity)) return a[0] === Infinity ? 1 : -1;  // nothing: last
    return (down ? -1 : 1) * order(a[0], b[0]) || a[1] - b[1];
  });
  body.append(...keyed.map(one => one[2]));
}));

// ---- what a layer opens to

function closeDetails() {
  body.querySelectorAll(".detail").forEach(one => {
    one.previousElementSibling?.querySelector("button").setAttribute("aria-expanded", "false");
    one.remove();
  });
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = value => Number(value.toPrecision(4)).toString();

// Bars over an axis; behind them the range of the grid, its ends, and as many of its steps as there is room for.
function histogram(data, caption) {
  const width = 480, height = 150, bottom = 120, least = 5;
  const ends = [data.low, data.low + data.width * data.counts.length];
  const from = Math.min(ends[0], data.range ? data.range[0] : ends[0]);
  const to = Math.max(ends[1], data.range ? data.range[1] : ends[1]);
  const x = value => 10 + (width - 20) * (value - from) / (to - from || 1);
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption});
  let note = "";
  if (data.range) {
    const [low, high] = data.range;
    svg.append(element("rect", {class: "range", x: x(low), y: 8, width: Math.max(x(high) - x(low), 1), height: bottom - 8}));
    let every = 1;
    while (x(every * data.step) - x(0) < least) every *= 2;
    for (let k = Math.ceil(data.levels[0] / every) * every; k <= data.levels[1]; k += every)
      svg.append(element("line", {class: "grid", x1: x(k * data.step), x2: x(k * data.step), y1: 8, y2: bottom + 4}));
    note = every === 1 ? "lines: every step of the grid" : `lines: every ${every}th step of the grid`;
  }
  const most = Math.max(...data.counts, 1);
  data.counts.forEach((count, i) => {
    if (!count) return;
    const tall = Math.max((bottom - 14) * Math.log1p(count) / Math.log1p(most), 1);
    const left = x(data.low + i * data.width), right = x(data.low + (i + 1) * data.width);
    const bar = element("rect", {class: "bar", x: left, y: bottom - tall, width: Math.max(right - left - 1, .6), height: tall});
    bar.append(element("title", {}, count));
    svg.append(bar);
  });
  svg.append(element("line", {class: "axis", x1: 10, x2: width - 10, y1: bottom, y2: bottom}));
  const marks = data.range ? [[data.range[0], "end"], [data.range[1], "end"]] : [[ends[0], ""], [ends[1], ""]];
  for (const [value, kind] of marks) {
    if (kind) svg.append(element("line", {class: kind, x1: x(value), x2: x(value), y1: 4, y2: bottom + 6}));
    const place = x(value), anchor = place < 60 ? "start" : place > width - 60 ? "end" : "middle";
    svg.append(element("text", {x: place, y: bottom + 18, "text-anchor": anchor}, short(value)));
  }
  if (from < 0 && to > 0 && marks.every(([value]) => Math.abs(x(value) - x(0)) > 40))
    svg.append(element("text", {x: x(0), y: bottom + 18, "text-anchor": "middle"}, "0"));
  const figure = document.createElement("figure"), words = document.createElement("figcaption");
  words.textContent = caption + (note ? "; " + note : "") + ". Logarithmic height.";
  figure.append(svg, words);
  return figure;
}

function detail(row) {
  const about = details[row.dataset.place - 1], parts = [];
  const facts = Array.from(row.cells).slice(1).map((cell, i) => [heads[i + 1].textContent, cell.textContent]);
  const text = document.createElement("p");
  text.textContent = facts.filter(pair => pair[1]).map(pair => pair.join(" ")).join(" · ") +
    (about.reason ? " · Rounded to nearest: " + about.reason + "." : "");
  parts.push(text);
  if (about.weights) {
    const [low, high, count] = about.weights.scales;
    const steps = count === 1 ? `one scale, ${short(low)}` : `${count} scales, ${short(low)} to ${short(high)}`;
    parts.push(histogram(about.weights, `Weights in steps of their ${about.weights.bits}-bit grid; ${steps}`));
  }
  if (about.inputs)
    parts.push(histogram(about.inputs, "Inputs before quantization" + (about.inputs.range ?
      `, the chosen range and its ${about.inputs.bits}-bit grid; step ${short(about.inputs.step)}, zero point ${about.inputs.zero_point}` :
      "; they stay float")));
  if (parts.length === 1) {
    const none = document.createElement("p");
    none.textContent = "No histograms: weights are read from ONNX models (with the package onnx), inputs are noted " +
      "by dopt quantize or seen with dopt report --data.";
    parts.push(none);
  }
  const made = document.createElement("tr"), cell = document.createElement("td"), box = document.createElement("div");
  made.className = "detail";
  cell.colSpan = row.cells.length;
  box.append(...parts);
  cell.append(box);
  made.append(cell);
  return made;
}

function toggle(row, open) {
  const opened = row.nextElementSibling?.classList.contains("detail");
  closeDetails();
  if (opened && !open) return;
  row.after(detail(row));
  row.querySelector("button").setAttribute("aria-expanded", "true");
}

body.addEventListener("click", event => {
  const button = event.target.closest("td button");
  if (button) toggle(button.closest("tr"), false);
});

// ---- from the drawing to the table

document.querySelector(".model").addEventListener("click", event => {
  const link = event.target.closest("a");
  if (!link) return;
  const row = document.querySelector(link.getAttribute("href"));
  if (row.hidden) { search.value = ""; filter(); }
  toggle(row, true);
  row.querySelector("button").focus({preventScroll: true});
});

filter();
