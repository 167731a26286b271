"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures"), pictures = read("pictures"), items = read("items");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

// --- light and dark ---

const dark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = one("#theme");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function template() {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), ticks: "" };
  return {
    data: { heatmap: [{ textfont: { color: colour("--ink") } }] },
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--soft") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12.5 } },
    },
  };
}

function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  themeButton.setAttribute("aria-pressed", isDark);
  themeButton.textContent = isDark ? "Light" : "Dark";
  drawn.forEach((chart) => draw(chart));
}

// --- charts: drawn when they are first seen ---

const drawn = new Set();

function draw(chart) {
  const { data, layout } = figures[chart.dataset.figure];
  chart.style.height = layout.height + "px";
  drawn.add(chart);
  Plotly.react(chart, data, { ...layout, template: template() }, { displayModeBar: false, responsive: true });
}

function drawVisible() {
  all(".chart").forEach((chart) => {
    if (!drawn.has(chart) && chart.offsetParent !== null) draw(chart);
  });
}

// --- which method, which task ---

function showMethod(index) {
  all("[data-method]").forEach((part) => { part.hidden = part.dataset.method !== index; });
  drawVisible();
  const first = one(`#gallery [data-method="${index}"] .thumb`);
  all(".viewer").forEach((viewer) => { viewer.hidden = !first; });
  if (first) showItem(first);
}

all("#methods input").forEach((input) => input.addEventListener("change", () => showMethod(input.value)));

one("#task").addEventListener("change", (event) => {
  all("[data-family]").forEach((chart) => {
    const name = `${chart.dataset.family}/${event.target.value}`;
    chart.closest("figure").style.opacity = name in figures ? "" : "0.25";
    if (name in figures) chart.dataset.figure = name;
    if (drawn.has(chart)) draw(chart);
  });
});

// --- the table ---

all("#table thead button").forEach((button, column) => button.addEventListener("click", () => {
  const heading = button.closest("th"), body = one("#table tbody");
  const isFirst = heading.getAttribute("aria-sort") === "none";
  const isDown = isFirst ? column > 0 : heading.getAttribute("aria-sort") === "ascending"; // scores: best first
  all("#table thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const value = (row) => column ? Number(row.children[column].dataset.value || -1) : row.children[0].textContent;
  const order = (a, b) => column ? value(a) - value(b) : value(a).localeCompare(value(b));
  [...body.rows].sort((a, b) => (isDown ? -1 : 1) * order(a, b)).forEach((row) => body.append(row));
}));

// --- the gallery ---

const percent = (value) => value === undefined || value === null ? "-" : (100 * value).toFixed(1).replace("-", "\u2212");

function fill(element, item, name) {
  const picture = pictures[item.pictures[name]];
  element.hidden = name === "image" || !picture;
  if (!element.hidden) element.src = picture;
}

function showItem(thumb) {
  const item = items[thumb.dataset.item], stage = one("#stage");
  all(".thumb").forEach((other) => {
    other.setAttribute("aria-pressed", other === thumb);
    other.tabIndex = other === thumb ? 0 : -1;
  });
  stage.dataset.item = thumb.dataset.item;
  stage.style.aspectRatio = item.size.join("/");
  stage.style.maxWidth = `calc(74vh * ${item.size[0] / item.size[1]})`;
  one("#stage .photo").src = pictures[item.pictures.image];
  const scores = item.source === null ? `${percent(item.adapted)}\u00a0%` : `${percent(item.source)} to ${percent(item.adapted)}\u00a0%`;
  const seeds = new Set(items.map((other) => other.seed)).size > 1 ? `, seed ${item.seed}` : "";
  one("#caption").textContent = `${item.task}, ${item.key}${seeds}: mIoU ${scores}`;
  one("#legend").replaceChildren(...item.legend.map((row) => {
    const line = document.createElement("tr"), name = document.createElement("td"), swatch = document.createElement("i");
    swatch.className = "swatch";
    swatch.style.background = row.colour;
    name.append(swatch, row.name);
    line.append(name);
    [row.share, row.source, row.adapted].forEach((value) => {
      const cell = document.createElement("td");
      cell.className = "number";
      cell.textContent = percent(value);
      line.append(cell);
    });
    return line;
  }));
  showSides();
}

function showSides() {
  const stage = one("#stage"), item = items[stage.dataset.item], at = Number(one("#slider").value);
  ["left", "right"].forEach((side) => {
    const name = one(`#${side}`).value, layer = one(`#stage .${side}`);
    fill(layer, item, name);
    layer.style.opacity = one("#opacity").value / 100;
    layer.style.clipPath = side === "left" ? `inset(0 ${100 - at}% 0 0)` : `inset(0 0 0 ${at}%)`;
    one(`#stage .at-${side}`).textContent = item.pictures[name] ? name : `no ${name}`;
  });
  one("#stage .divider").style.left = `${at}%`;
}

function walk(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const shown = all(".thumb").filter((thumb) => thumb.offsetParent !== null);
  const next = shown[shown.indexOf(event.currentTarget) + step];
  event.preventDefault();
  if (!next) return;
  showItem(next);
  next.focus();
}

all("img[data-picture]").forEach((image) => { image.src = pictures[image.dataset.picture]; });
all(".thumb").forEach((thumb) => {
  thumb.addEventListener("click", () => showItem(thumb));
  thumb.addEventListener("keydown", walk);
});
all("#slider, #opacity, #left, #right").forEach((control) => control.addEventListener("input", showSides));
all("#stage").forEach((stage) => {
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    one("#slider").value = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
    showSides();
  };
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
  stage.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
});

// --- start ---

themeButton.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
dark.addEventListener("change", (event) => setTheme(event.matches));
addEventListener("beforeprint", () => setTheme(false));
setTheme(dark.matches);
const chosen = one("#methods input:checked");
showMethod(chosen ? chosen.value : (one("[data-method]") || { dataset: {} }).dataset.method);
document.body.dataset.ready = "true";
