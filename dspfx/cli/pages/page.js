"use strict";
// The structure pictures: rows are filters, columns are input channels. Everything else works without this script.
const layers = JSON.parse(document.getElementById("structures").textContent);
document.getElementById("no-script")?.remove();
const COLOURS = ["#2b7bba", "#e08a1e", "#2a9d6f", "#c4526f", "#8a63d2", "#37a8c4", "#a9a018", "#9c5b33"];
const DEAD = "rgba(128, 132, 130, .45)";
const colour = (group) => group < COLOURS.length ? COLOURS[group] : `hsl(${(group * 137.5) % 360} 55% 50%)`;
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const count = (number, one) => `${number} ${one}${number === 1 ? "" : "s"}`;

// What a layer became: its living groups, its dead filters, the channels that nobody reads, the share that is kept.
function study(layer) {
  const channels = layer.keep[0].length;
  const reads = layer.keep.map((row) => Array.from(row, (digit) => digit === "1"));
  const groups = reads
    .map((row, index) => ({
      index,
      filters: layer.group.filter((group) => group === index).length,
      channels: row.filter(Boolean).length,
    }))
    .filter((group) => group.filters && group.channels);
  const living = new Set(groups.map((group) => group.index));
  const unread = Array.from({length: channels}, (_, c) => ![...living].some((group) => reads[group][c]));
  const kept = groups.reduce((sum, group) => sum + group.filters * group.channels, 0);
  return {
    reads, groups, living, unread, channels,
    filters: layer.group.length,
    dead: layer.group.filter((group) => !living.has(group)).length,
    left: kept / (layer.group.length * channels),
  };
}

// The order of rows and columns: as in the network, or with the filters of a group, and channels read alike, together.
function order(layer, found, sorted) {
  const rows = layer.group.map((_, filter) => filter);
  const columns = found.unread.map((_, channel) => channel);
  if (sorted) {
    const rank = (filter) => found.living.has(layer.group[filter]) ? layer.group[filter] : Infinity;
    const key = (channel) => found.groups.map((group) => found.reads[group.index][channel] ? "0" : "1").join("");
    const keys = columns.map(key);
    rows.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
    columns.sort((a, b) => (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : a - b));
  }
  return {rows, columns};
}

// Fills a canvas with `size` pixels a pair, or at most `limit` pixels a side.
function draw(canvas, layer, found, sorted, size, limit = Infinity) {
  const {rows, columns} = order(layer, found, sorted);
  const height = Math.min(rows.length, limit), width = Math.min(columns.length, limit);
  const gap = size > 4 ? 1 : 0;
  canvas.width = width * size;
  canvas.height = height * size;
  const context = canvas.getContext("2d");
  for (let y = 0; y < height; y++) {
    const group = layer.group[rows[Math.floor(y * rows.length / height)]];
    const lives = found.living.has(group);
    for (let x = 0; x < width; x++) {
      const channel = columns[Math.floor(x * columns.length / width)];
      if (lives && found.reads[group][channel]) context.fillStyle = colour(group);
      else if (!lives || found.unread[channel]) context.fillStyle = DEAD;
      else continue;
      context.fillRect(x * size, y * size, size - gap, size - gap);
    }
  }
}

function describe(layer, found) {
  const groups = found.groups.map((group, i) =>
    `group ${i + 1}: ${count(group.filters, "filter")} that read ${count(group.channels, "channel")}`);
  return `${layer.name}: ${count(found.filters, "filter")} of ${count(found.channels, "input channel")}. ` +
    `${groups.join("; ") || "no group is left"}. ${count(found.dead, "dead filter")}, ` +
    `${count(found.unread.filter(Boolean).length, "channel")} that no filter reads. ` +
    `${(100 * found.left).toFixed(1)}% of the pairs are kept.`;
}

function swatch(fill) {
  const made = element("span", {className: "swatch"});
  made.style.background = fill;
  made.setAttribute("aria-hidden", "true");
  return made;
}

function groupTable(layer, found) {
  const cell = (name, text, scope, ...more) => {
    const made = element(name, {}, ...more, String(text));
    if (scope) made.scope = scope;
    return made;
  };
  const row = (name, fill, filters, channels) => element("tr", {},
    cell("th", name, "row", swatch(fill)), cell("td", filters), cell("td", channels));
  const head = element("tr", {}, ...["group", "filters", "input channels read"].map((text) => cell("th", text, "col")));
  const rows = found.groups.map((group, i) => row(String(i + 1), colour(group.index), group.filters, group.channels));
  rows.push(row("dead filters (rows)", DEAD, found.dead, 0));
  rows.push(row("channels nobody reads (columns)", DEAD, 0, found.unread.filter(Boolean).length));
  rows.push(row("not read by this group, but by another", "transparent", "", ""));
  return element("table", {}, element("caption", {textContent: "Its groups and their colours"}),
    element("thead", {}, head), element("tbody", {}, ...rows));
}

function picture(layer) {
  const found = study(layer);
  const canvas = element("canvas", {className: "picture"});
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", describe(layer, found));
  const size = Math.max(1, Math.min(14, Math.floor(Math.min(560 / found.channels, 480 / found.filters))));
  const choices = [["grouped: like filters and channels together", true], ["as in the network", false]];
  const choose = element("fieldset", {}, element("legend", {textContent: "Order"}), ...choices.map(([text, sorted]) => {
    const radio = element("input", {type: "radio", name: "order", checked: sorted});
    radio.addEventListener("change", () => draw(canvas, layer, found, sorted, size));
    return element("label", {}, radio, ` ${text}`);
  }));
  const title = `${layer.name}: ${count(found.filters, "filter")} (rows) × ` +
    `${count(found.channels, "input channel")} (columns), ${(100 * found.left).toFixed(1)}% of the pairs kept`;
  draw(canvas, layer, found, true, size);
  return element("figure", {}, element("figcaption", {textContent: title}), choose, canvas, groupTable(layer, found));
}

const rows = [...document.querySelectorAll("tr.layer")];
const button = (row) => row.querySelector("button.open");

function show(row, opened) {
  for (const other of rows) {
    other.classList.remove("shown");
    button(other).setAttribute("aria-expanded", "false");
    button(other).removeAttribute("aria-controls");
  }
  document.getElementById("structure")?.remove();
  if (!opened) return;
  const cell = element("td", {colSpan: row.cells.length}, picture(layers[Number(row.dataset.layer)]));
  row.after(element("tr", {className: "detail", id: "structure"}, cell));
  row.classList.add("shown");
  button(row).setAttribute("aria-expanded", "true");
  button(row).setAttribute("aria-controls", "structure");
}

rows.forEach((row, index) => {
  const layer = layers[Number(row.dataset.layer)];
  draw(row.querySelector(".thumb"), layer, study(layer), true, 1, 48);
  row.addEventListener("click", () => show(row, !row.classList.contains("shown")));
  row.addEventListener("keydown", (event) => {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step) {
      event.preventDefault();
      button(rows[(index + step + rows.length) % rows.length]).focus();
    } else if (event.key === "Escape") show(row, false);
  });
});

// One picture is open from the start: of the layer where groups save most beyond dead filters and unread channels.
const saved = (layer) => {
  const found = study(layer);
  const unread = found.unread.filter(Boolean).length;
  return (1 - found.dead / found.filters) * (1 - unread / found.channels) - found.left;
};
if (rows.length) {
  const values = layers.map(saved);
  show(rows[values.indexOf(Math.max(...values))], true);
}
