// The report works without this: it sorts tables by a click on a column's head, and shows a chart's values also where
// nothing can hover.
"use strict";

const valueOf = (cell) => {
  const text = cell.textContent.trim().replace(/[\u202f\s]+/g, " ").replaceAll("−", "-");
  const number = Number.parseFloat(text.replace(/(\d) (?=\d{3})/g, "$1").replace(/^\+/, ""));
  return Number.isNaN(number) ? text : number;
};

const compare = (a, b) => {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what was not measured comes last
  return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
};

for (const table of document.querySelectorAll("table:not(.heat)")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [a, b].map((row) => valueOf(row.cells[column]));
        return typeof x === typeof y && !rising ? compare(y, x) : compare(x, y);
      });
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}

const floating = document.createElement("div");
floating.className = "floating";
floating.hidden = true;
document.body.append(floating);

for (const point of document.querySelectorAll(".tip")) {
  const title = point.querySelector("title");
  point.dataset.text = title.textContent;
  title.remove(); // or a browser shows both
}

document.addEventListener("pointerover", (event) => {
  const point = event.target.closest(".tip");
  floating.hidden = !point;
  if (!point) return;
  floating.textContent = point.dataset.text;
  const width = document.documentElement.clientWidth;
  floating.style.left = `${Math.max(4, Math.min(event.pageX + 10, width - floating.offsetWidth - 4))}px`;
  floating.style.top = `${event.pageY + 14}px`;
});

window.addEventListener("resize", () => (floating.hidden = true));
