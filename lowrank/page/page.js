// Sorts the table. What it is sorted by stands in the address (#sort=rank,down), so that a view
// can be linked to.
const table = document.getElementById("layers");
const heads = [...table.tHead.rows[0].cells];
const names = heads.map((head) => head.textContent);

function value(row, index) {
  const cell = row.cells[index];
  if (heads[index].className === "text") return cell.textContent || null;
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function sort(index, down) {
  const rows = [...table.tBodies[0].rows].map((row) => [value(row, index), row]);
  rows.sort(([one, a], [other, b]) => {
    if (one === null || other === null) return (one === null) - (other === null); // empty: last
    const order = typeof one === "string"
      ? one.localeCompare(other, "en", { numeric: true }) : one - other;
    const first = value(a, 0) - value(b, 0); // ties keep the model's order
    return (down ? -order : order) || first;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
  heads.forEach((head, i) => {
    if (i === index) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function follow() {
  const asked = /^#sort=([^,]+)(,down)?$/.exec(decodeURIComponent(location.hash));
  if (asked && names.includes(asked[1])) sort(names.indexOf(asked[1]), Boolean(asked[2]));
}

heads.forEach((head, index) => head.firstChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  sort(index, down);
  history.replaceState(null, "", `#sort=${encodeURIComponent(names[index])}${down ? ",down" : ""}`);
}));
addEventListener("hashchange", follow);
follow();
