"use strict";
// Values under the pointer, or by the arrow keys, for each chart; and tables that a click sorts.
// Text is set as text, never as HTML.
(function () {
  const NS = "http://www.w3.org/2000/svg";
  function shape(parent, kind, attributes) {
    const node = document.createElementNS(NS, kind);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    parent.appendChild(node);
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg"), hover = svg.querySelector(".hover");
    const readout = figure.querySelector(".readout");
    const values = Array.from(figure.querySelectorAll(".legend b"));
    const finals = values.map((node) => node.textContent);
    const box = svg.viewBox.baseVal, shared = data.kind === "lines";
    const curves = data.kind === "curves" ? Array.from(svg.querySelectorAll(".curve")) : [];
    const xs = shared ? data.series[0].x : null;
    // Every point that can be selected: of a line chart the places on its x axis.
    const points = [];
    if (shared) xs.forEach((x, i) => points.push({ x: x, i: i }));
    else data.series.forEach((one, s) => one.x.forEach((x, i) => {
      if (one.y[i] !== null) points.push({ x: x, y: one.y[i], s: s, i: i });
    }));
    let at = points.length;

    function show(index) {
      at = index;
      const point = points[index];
      hover.replaceChildren();
      if (shared) {
        shape(hover, "line", { class: "cursor", x1: point.x, x2: point.x, y1: 10, y2: box.height - 38 });
        data.series.forEach((one, s) => {
          if (one.y[point.i] !== null) shape(hover, "circle", { class: "ring", cx: point.x, cy: one.y[point.i], r: 4 });
          if (values[s]) values[s].textContent = one.text[point.i];
        });
        readout.textContent = data.xLabel + " " + data.series[0].at[point.i];
      } else {
        const one = data.series[point.s];
        curves.forEach((curve) => curve.classList.remove("hot"));
        if (curves.length === data.series.length) curves[point.s].classList.add("hot");
        shape(hover, "circle", { class: "ring", cx: point.x, cy: point.y, r: 7 });
        readout.textContent = one.label + ": " + one.text[point.i] + ", " + data.xLabel + " " + one.at[point.i];
      }
    }
    function clear() {
      at = points.length;
      hover.replaceChildren();
      curves.forEach((curve) => curve.classList.remove("hot"));
      readout.textContent = "";
      values.forEach((node, i) => { node.textContent = finals[i]; });
    }
    function track(event) {
      const place = svg.getBoundingClientRect(), scale = box.width / place.width;
      const x = (event.clientX - place.left) * scale, y = (event.clientY - place.top) * scale;
      let best = 0, nearest = Infinity;
      points.forEach((point, index) => {
        const distance = shared ? Math.abs(point.x - x) : Math.hypot(point.x - x, point.y - y);
        if (distance < nearest) { nearest = distance; best = index; }
      });
      if (points.length) show(best);
    }
    svg.addEventListener("pointermove", track);
    svg.addEventListener("pointerdown", track);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") clear();
      if (!step || !points.length) return;
      event.preventDefault();
      show(Math.max(0, Math.min(points.length - 1, at === points.length ? (step > 0 ? 0 : at - 1) : at + step)));
    });
  }

  // What a cell of the confusion matrix counts: made when it is pointed at, since cells are many.
  for (const table of document.querySelectorAll("table.matrix")) {
    table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("tbody td");
      if (!cell || cell.title) return;
      const own = cell.parentNode.cells[0], other = table.tHead.rows[0].cells[cell.cellIndex];
      const taken = cell.cellIndex === cell.parentNode.sectionRowIndex + 1 ? " right" : " taken for " + other.title;
      cell.title = own.title + taken + ": " + (cell.textContent || "0");
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const number = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        // Numbers begin with the largest, names with the first.
        const rising = before ? before === "descending" : !number;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const rows = Array.from(table.tBodies[0].rows);
        const key = (row) => row.cells[column].dataset.sort;
        rows.sort((a, b) => {
          const p = key(a), q = key(b);
          if (number) {
            if (p === "" || q === "") return (p === "") - (q === ""); // unknown ones last
            return rising ? p - q : q - p;
          }
          return (rising ? 1 : -1) * p.localeCompare(q, "en", { numeric: true });
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
