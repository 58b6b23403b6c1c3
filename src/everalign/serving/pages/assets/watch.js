// Asks for the run's numbers every two seconds while the page is seen, and draws them.
"use strict";

const SECONDS = 2;
const CHARTS = { loss: "loss", margin: "margin, nats", accuracy: "accuracy, %" };
const [WIDEST, HEIGHT, LEFT, BOTTOM, TOP] = [896, 180, 58, 24, 10];

const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

const draw = (name, attributes, ...inside) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...inside);
  return element;
};

const duration = (seconds) => {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
};

const short = (number) => Number(number.toPrecision(3)).toString().replace("-", "−");

// Puts the steps of all stages in a row: each gets its place on the axis.
const placed = (steps) => {
  let offset = 0;
  let previous = null;
  return steps.map((one) => {
    if (previous && previous.part !== one.part) offset += previous.step;
    previous = one;
    return { ...one, x: offset + one.step };
  });
};

const chart = (points, field, title, stages, WIDTH) => {
  const known = points.filter((one) => Number.isFinite(one[field]));
  if (!known.length) return null;
  const values = known.map((one) => one[field]);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const digits = Math.min(4, Math.max(0, 1 - Math.floor(Math.log10(high - low))));
  const last = points[points.length - 1].x;
  const x = (one) => LEFT + ((WIDTH - LEFT - 8) * one.x) / Math.max(1, last);
  const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - value)) / (high - low);
  const parts = [];
  for (const value of [low, (low + high) / 2, high]) {
    parts.push(draw("line", { x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value), class: "grid" }));
    parts.push(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits).replace("-", "−")));
  }
  parts.push(draw("text", { x: LEFT, y: HEIGHT - 6 }, "step 0"));
  parts.push(draw("text", { x: WIDTH - 8, y: HEIGHT - 6, "text-anchor": "end" }, `step ${last}`));
  for (const part of new Set(known.map((one) => one.part))) {
    const own = known.filter((one) => one.part === part);
    const line = own.map((one) => `${x(one).toFixed(1)},${y(one[field]).toFixed(1)}`).join(" ");
    const colour = `line-${stages.indexOf(own[0].stage) % 4}`;
    if (own.length === 1) parts.push(draw("circle", { cx: x(own[0]), cy: y(own[0][field]), r: 3, class: `${colour} dot` }));
    else parts.push(draw("polyline", { points: line, class: colour }));
  }
  const mark = draw("circle", { r: 4, class: "mark", visibility: "hidden" });
  const label = `${title}: last ${short(values[values.length - 1])}, from ${short(low)} to ${short(high)}`;
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, class: "chart", role: "img", "aria-label": label });
  svg.append(...parts, mark);
  const said = make("p", label, { class: "note" });
  svg.addEventListener("pointermove", (event) => {
    const place = ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * WIDTH;
    const near = known.reduce((a, b) => (Math.abs(x(b) - place) < Math.abs(x(a) - place) ? b : a));
    mark.setAttribute("cx", x(near));
    mark.setAttribute("cy", y(near[field]));
    mark.setAttribute("visibility", "visible");
    said.textContent = `${near.task}, ${near.stage}, step ${near.step}: ${title} ${short(near[field])}`;
  });
  const figure = document.createElement("figure");
  figure.append(make("figcaption", title), svg, said);
  return figure;
};

const table = (head, rows, attributes = {}) => {
  const made = make("table", "", attributes);
  const line = made.createTHead().insertRow();
  for (const text of head) line.append(make("th", text, { scope: "col" }));
  const body = made.createTBody();
  for (const cells of rows) body.insertRow().append(...cells);
  const scroll = make("div", "", { class: "scroll", role: "region", tabindex: "0" });
  scroll.append(made);
  return scroll;
};

const show = (data) => {
  document.getElementById("about").textContent = `${data.model}, ${data.method} with ${data.objective}`;
  const now = document.getElementById("now");
  const last = data.steps[data.steps.length - 1];
  const tiles = [];
  if (last) {
    const before = data.steps.findLast((one) => one.part === last.part && one.step < last.step);
    const pace = before ? (last.time - before.time) / (last.step - before.step) : null;
    const left = last.steps && pace !== null && last.step < last.steps ? duration(pace * (last.steps - last.step)) : "–";
    tiles.push(["task", last.task], ["stage", last.stage], ["step", `${last.step}${last.steps ? ` of ${last.steps}` : ""}`]);
    tiles.push(["loss", last.loss === null ? "–" : short(last.loss)]);
    if (last.accuracy !== null) tiles.push(["accuracy", `${short(last.accuracy)} %`]);
    if (last.speed) tiles.push(["tokens a second", Math.round(last.speed).toLocaleString("en").replaceAll(",", "\u202f")]);
    tiles.push(["left of the stage", left], ["last logged", `${duration(Date.now() / 1000 - last.time)} ago`]);
  } else tiles.push(["state", "no step was logged yet"]);
  now.replaceChildren(
    ...tiles.map(([name, value]) => {
      const tile = document.createElement("div");
      tile.append(make("dt", name), make("dd", value));
      return tile;
    }),
  );
  const points = placed(data.steps);
  const stages = [...new Set(points.map((one) => one.stage))];
  // As wide as the page, so that its text is as large as the page's.
  const width = Math.min(WIDEST, document.getElementById("curves").clientWidth);
  const charts = Object.entries(CHARTS).map(([field, title]) => chart(points, field, title, stages, width)).filter(Boolean);
  const legend = make("p", "", { class: "legend" });
  stages.forEach((stage, number) => legend.append(make("span", stage, { class: `key line-${number % 4}` })));
  document.getElementById("curves").replaceChildren(...(charts.length ? [legend, ...charts] : [make("p", "Nothing yet.")]));
  const heat = data.heat.map((row) => [
    make("th", row.name, { scope: "row", class: "name" }),
    ...row.cells.map((cell) => {
      const shade = cell.shade === null ? "empty" : `shade-${cell.shade}`;
      return make("td", cell.text, { class: cell.own ? `${shade} own` : shade });
    }),
  ]);
  const summary = data.summary.filter(([, value]) => value !== "–").map(([name, value]) => `${name} ${value}`);
  document
    .getElementById("scores")
    .replaceChildren(
      ...(heat.length
        ? [make("p", `Accuracy, %. ${summary.join(", ")}`, { class: "note" }), table(["after learning", ...data.tasks], heat, { class: "heat" })]
        : [make("p", "Nothing was scored yet.")]),
    );
  const versions = data.versions.map((one) => [
    make("th", one.name, { scope: "row", class: "name" }),
    ...[one.then, one.now, one.status].map((text, i) => make("td", text, i === 2 ? { class: "words" } : {})),
  ]);
  document
    .getElementById("versions")
    .replaceChildren(versions.length ? table(["version", "then", "now", "status"], versions) : make("p", "No task is finished yet."));
};

let pointed = false;
document.getElementById("curves").addEventListener("pointerenter", () => (pointed = true));
document.getElementById("curves").addEventListener("pointerleave", () => (pointed = false));

const refresh = async () => {
  const trouble = document.getElementById("trouble");
  try {
    const reply = await fetch("/data", { cache: "no-store" });
    const data = await reply.json();
    trouble.hidden = !data.trouble;
    if (data.trouble) trouble.textContent = data.trouble;
    else show(data);
  } catch {
    trouble.hidden = false;
    trouble.textContent = "The server has ended: start everalign watch again.";
  }
};

refresh();
setInterval(() => {
  if (!document.hidden && !pointed) refresh();
}, SECONDS * 1000);
