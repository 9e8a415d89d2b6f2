// Sorts and filters the table. By what stands in the address (#sort=rank,down&find=q_proj), so that
// a view can be linked to.
const table = document.getElementById("layers");
const heads = [...table.tHead.rows[0].cells];
const names = heads.map((head) => head.textContent);
const find = document.getElementById("find");
let sorted = [0, false]; // column, falling

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
  mark(index, down);
  const order = `Sorted by ${names[index] === "#" ? "number" : names[index]}, ${down ? "falling" : "rising"}`;
  document.getElementById("sorted").textContent = order;
}

function mark(index, down) {
  sorted = [index, down];
  heads.forEach((head, i) => {
    if (i === index) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function filter() {
  const rows = [...table.tBodies[0].rows], wanted = find.value.trim().toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${rows.length}`;
}

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const [, name, down] = /^([^,]*)(,down)?$/.exec(asked.get("sort") ?? "") ?? [];
  if (names.includes(name)) sort(names.indexOf(name), Boolean(down));
  find.value = asked.get("find") ?? "";
  filter();
}

function note() {
  const asked = new URLSearchParams(), [index, down] = sorted;
  if (index || down) asked.set("sort", names[index] + (down ? ",down" : ""));
  if (find.value) asked.set("find", find.value);
  const text = asked.toString().replaceAll("%2C", ",");
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

heads.forEach((head, index) => head.firstChild.addEventListener("click", () => {
  sort(index, head.getAttribute("aria-sort") === "ascending");
  note();
}));
find.addEventListener("input", () => { filter(); note(); });
find.parentElement.hidden = false;
addEventListener("hashchange", follow);
mark(...sorted);
follow();
