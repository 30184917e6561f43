// Puts the frame of the point that the sliders choose in place of the one that is shown. The frames were made with the
// page: nothing is computed here but the paths of the tiles, by the rule of tile_map.py. A chart that no point has is
// not in the page.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const table = JSON.parse(byId("attnc-data").textContent);
  const points = new Map(table.points.map((point) => [point.at.join(), point]));
  const sliders = [
    { input: byId("slide-length"), said: byId("slide-length-said"), places: table.lengths },
    { input: byId("slide-value"), said: byId("slide-value-said"), places: table.values },
  ];
  const start = sliders.map(({ input }) => (input ? Number(input.getAttribute("value")) : 0));
  let shown = start.join();
  let redraws = 0;

  const drawTexts = (texts) => {
    for (const place of document.querySelectorAll("[data-text]")) {
      const text = texts[place.dataset.text];
      if (text !== undefined) place.textContent = text;
    }
  };

  const drawShapes = (shapes) => {
    for (const [id, attributes] of Object.entries(shapes)) {
      for (const [name, value] of Object.entries(attributes)) byId(id)?.setAttribute(name, value);
    }
  };

  const drawRows = (rows) => {
    const list = byId("notes-rows");
    list.replaceChildren(...rows["notes-rows"].map(([note]) => made("li", note)));
    const body = byId("schedule-rows");
    const last = document.querySelectorAll("#schedule thead th").length - 1;
    const cell = (text, i) => {
      const found = made(i ? "td" : "th", text);
      if (!i) found.setAttribute("scope", "row");
      if (i === last) found.className = "number";
      return found;
    };
    body.replaceChildren(...rows["schedule-rows"].map((row) => {
      const line = document.createElement("tr");
      line.append(...row.map(cell));
      return line;
    }));
  };

  const made = (tag, text) => {
    const found = document.createElement(tag);
    found.textContent = text;
    return found;
  };

  const drawTiles = (rows) => {
    const paths = { full: "", partial: "", strokes: "", mesh: "" };
    rows.forEach((row, y) => {
      for (let x = 0, end; x < row.length; x = end) {
        for (end = x + 1; row[end] === row[x]; end += 1);
        if (row[x] !== "0") paths[row[x] === "2" ? "full" : "partial"] += `M${x} ${y}h${end - x}v1h${x - end}z`;
        if (row[x] === "1") for (let i = x; i < end; i += 1) paths.strokes += `M${i} ${y + 1}l1 -1`;
      }
    });
    const width = rows.length ? rows[0].length : 0;
    for (let y = 1; y < rows.length; y += 1) paths.mesh += `M0 ${y}h${width}`;
    for (let x = 1; x < width; x += 1) paths.mesh += `M${x} 0v${rows.length}`;
    for (const [name, path] of Object.entries(paths)) byId(`map-${name}-path`)?.setAttribute("d", path);
  };

  const words = (slider, i) => slider.places[i].toLocaleString("en-US");

  const move = () => {
    const at = sliders.map(({ input }) => (input ? Number(input.value) : 0));
    sliders.forEach((slider, i) => {
      if (!slider.input) return;
      slider.said.textContent = words(slider, at[i]);
      slider.input.setAttribute("aria-valuetext", words(slider, at[i]));
    });
    const point = points.get(at.join());
    document.body.classList.toggle("stale", !point);
    byId("missing").textContent = point ? "" : "Not simulated here; the charts show the last point that was.";
    if (!point || at.join() === shown) return;
    shown = at.join();
    drawTexts(point.texts);
    drawShapes(point.shapes);
    drawRows(point.rows);
    drawTiles(point.tiles);
    redraws += 1;
    document.body.dataset.redraws = String(redraws);
  };

  for (const { input } of sliders) if (input) input.addEventListener("input", move);
  document.body.dataset.redraws = "0";
  document.body.dataset.ready = "true";
  if (sliders.some(({ input }, i) => input && Number(input.value) !== start[i])) move();
})();
