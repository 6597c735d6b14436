"use strict";
// Charts. plotly measures the page once, so print and a turned phone need to be told.
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = [...document.querySelectorAll(".chart")];
const mouse = matchMedia("(pointer: fine)").matches;
for (const chart of charts) {
  const { data, layout } = figures[chart.id];
  layout.font.family = getComputedStyle(document.body).fontFamily;
  layout.dragmode = mouse ? "zoom" : false; // a finger on a chart scrolls the page
  for (const note of layout.annotations ?? []) {
    if (note.hovertext && chart.clientWidth > 720) note.text += " " + note.hovertext;
  }
  Plotly.newPlot(chart, data, layout, { displayModeBar: false, responsive: true });
}
addEventListener("beforeprint", () => charts.forEach(chart => // in pixels; A4 has 680 between its margins
  Plotly.relayout(chart, chart.closest(".pair") ? { width: 320, height: 280 } : { width: 660, height: 370 })));
const heights = charts.map(chart => chart.layout.height);
addEventListener("afterprint", () => charts.forEach((chart, i) =>
  Plotly.relayout(chart, { width: null, height: heights[i], autosize: true })));

// Tables: a button in a header sorts by its column, up, then down. Empty cells, and nan and inf, stay last.
const value = cell => {
  if (!cell.dataset.value) return cell.textContent.trim();
  return isFinite(cell.dataset.value) ? Number(cell.dataset.value) : "";
};
const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = header.closest("table").tBodies[0], column = header.cellIndex;
    const down = header.ariaSort === "ascending";
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
    rows.sort(([a], [b]) => (a === "") - (b === "") || (down ? compare(b, a) : compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}
