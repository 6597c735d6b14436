"use strict";
// A button in a header sorts by its column, up, then down. What is no number, or not finite, stays last.
const number = text => /^[-+]?[\d,.]+/.test(text) ? Number.parseFloat(text.replaceAll(",", "")) : NaN;
const compare = (a, b) => {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = header.closest("table").tBodies[0], column = header.cellIndex;
    const numbers = header.classList.contains("number");
    const down = header.ariaSort === "ascending";
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map(row => [row.cells[column].textContent.trim(), row]);
    const missing = text => numbers && Number.isNaN(number(text));
    rows.sort(([a], [b]) => missing(a) - missing(b) || (down ? compare(b, a) : compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}
