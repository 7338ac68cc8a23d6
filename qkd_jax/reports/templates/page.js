// Numbers under the pointer, or by the arrow keys, of every chart.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const [svg, tip] = [figure.querySelector(".plot svg"), figure.querySelector(".tip")];
  const cursor = svg.querySelector(".cursor");
  const most = 14; // lines in one box
  let chosen = null;
  const hide = () => {
    chosen = null;
    tip.style.visibility = cursor.style.visibility = "hidden";
  };
  const show = (at) => {
    chosen = Math.min(Math.max(at, 0), chart.places.length - 1);
    const x = chart.places[chosen];
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const title = document.createElement("b");
    title.textContent = chart.names[chosen];
    const rows = chart.lines
      .filter((line, n) => typeof line.values[chosen] === "number" && !hidden(n))
      .sort((a, b) => b.values[chosen] - a.values[chosen])
      .map((line) => {
        const [row, name, value] = ["span", "i", "i"].map((tag) => document.createElement(tag));
        name.textContent = line.name;
        value.textContent = line.values[chosen].toFixed(chart.digits);
        row.append(name, value);
        return row;
      });
    const more = document.createElement("span");
    more.textContent = rows.length > most ? `and ${rows.length - most} more` : "";
    tip.replaceChildren(title, ...rows.slice(0, most), more);
    const share = x / 720;
    tip.style.left = share < 0.5 ? `calc(${share * 100}% + 12px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${(1 - share) * 100}% + 12px)`;
    tip.style.visibility = cursor.style.visibility = "visible";
  };
  // A click on a name hides its line, another shows it again.
  const drawn = [...svg.querySelectorAll(".series")];
  const hidden = (n) => drawn[n].classList.contains("hidden");
  figure.querySelectorAll(".legend button").forEach((button, n) => {
    button.addEventListener("click", () => {
      drawn[n].classList.toggle("hidden");
      button.setAttribute("aria-pressed", !hidden(n));
    });
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 720;
    const distances = chart.places.map((place) => Math.abs(place - x));
    show(distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const end = chart.places.length - 1;
    const to = { ArrowLeft: (chosen ?? end + 1) - 1, ArrowRight: (chosen ?? -1) + 1, Home: 0, End: end };
    if (event.key in to) {
      show(to[event.key]);
      event.preventDefault();
    } else if (event.key === "Escape") hide();
  });
}

// Tables that are sorted by a click on a head: numbers by value, the rest as text.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const value = cell.dataset.value; // "" where there is no number
        return value === undefined ? cell.textContent : value === "" ? NaN : Number(value);
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
