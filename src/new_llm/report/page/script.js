"use strict";
// What the page can do beyond its text and pictures: themes, sorted tables, models shown or hidden, views of a chart,
// numbers under the pointer or at the arrow keys. Without this script tables and pictures stay.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const find = (selector, from = document) => [...from.querySelectorAll(selector)];
  const make = (tag, attributes = {}, text = "") => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const said = document.getElementById("said");
  const hidden = new Set();

  // Themes: the system's until the reader chooses.
  const theme = document.getElementById("theme");
  const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light theme" : "Dark theme"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  // Tables: a click or Enter on a heading sorts by it, again turns the order; what has no value comes last.
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of find("table.sortable")) {
    const heads = find("tr.heads > th", table);
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const read = (row) => {
          const cell = row.cells[column];
          if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
          const text = cell.textContent.trim();
          return text === "" || text === "—" ? null : text;
        };
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [row, read(row)]);
        rows.sort(([, a], [, b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return (order === "ascending" ? 1 : -1) * compare(a, b);
        });
        body.append(...rows.map(([row]) => row));
      });
    });
  }

  // Keys: a model's name shows or hides it in every chart.
  for (const item of find(".key li.model")) {
    const model = item.dataset.model;
    const button = make("button", { type: "button", "aria-pressed": "true", title: "show or hide" });
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      if (!hidden.delete(model)) hidden.add(model);
      const isOff = hidden.has(model);
      find(`[data-s="${model}"]`).forEach((part) => part.classList.toggle("off", isOff));
      find(`.key li[data-model="${model}"] button`).forEach((other) => other.setAttribute("aria-pressed", String(!isOff)));
      hideTip();
    });
  }

  // Views: charts with the same switch change together.
  for (const group of find(".switch")) {
    group.hidden = false;
    group.addEventListener("click", (event) => {
      const label = event.target.closest("button")?.dataset.view;
      if (label === undefined) return;
      for (const other of find(".switch").filter((one) => one.dataset.switch === group.dataset.switch)) {
        const buttons = find("button", other);
        if (!buttons.some((button) => button.dataset.view === label)) continue;
        buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === label)));
        find(".view", other.closest("figure")).forEach((view) => { view.hidden = view.dataset.view !== label; });
      }
      hideTip();
    });
  }

  // Numbers as people read them.
  const digits = (value, most, least = 1) => value.toLocaleString("en-US", { maximumSignificantDigits: most, minimumSignificantDigits: least });
  const say = (value, kind) => {
    if (kind === "percent") return `${value > 0 ? "+" : ""}${digits(value, 3, 2)}%`;
    if (kind === "power") return value === 0 ? "0" : value.toExponential(2).replace("e+", "e");
    if (kind === "count") return digits(value, 9);
    return Math.abs(value) >= 1e4 ? digits(value, 5) : digits(value, 4, 4);
  };

  // The read-out: one box that follows the pointer, or the arrow keys.
  const tip = make("div", { class: "tip", "aria-hidden": "true" });
  let unmark = () => {};
  const hideTip = () => { tip.remove(); unmark(); unmark = () => {}; };
  const showTip = (chart, x, y, lines) => {
    tip.replaceChildren(...lines);
    chart.append(tip);
    const room = chart.clientWidth - tip.offsetWidth;
    const left = x + 14 > room ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
    tip.style.top = `${Math.max(-20, y - tip.offsetHeight - 8)}px`;
  };
  const place = ([start, end, low, high, log], value) => {
    const [a, b, v] = log ? [low, high, value].map(Math.log) : [low, high, value];
    return start + (end - start) * (v - a) / (b - a);
  };

  const readLines = (plot) => {
    const shown = plot.curves.filter((curve) => !hidden.has(String(curve.s)));
    return [shown, [...new Set(shown.flatMap((curve) => curve.p.map((point) => point[0])))].sort((a, b) => a - b)];
  };
  const nearest = (points, x, at) => points.reduce((best, point) => Math.abs(at(point[0]) - x) < Math.abs(at(best[0]) - x) ? point : best);

  // A vertical line at an x, a spot on every curve, and their values.
  const showLines = (chart, plot, index, isSpoken) => {
    const [shown, xs] = readLines(plot);
    if (!xs.length) return;
    const value = xs[Math.max(0, Math.min(index, xs.length - 1))];
    const at = (v) => place(plot.x, v);
    const x = at(value);
    hideTip();
    const svg = chart.querySelector("svg");
    const layer = svg.appendChild(document.createElementNS(SVG, "g"));
    unmark = () => layer.remove();
    const draw = (tag, attributes, style) => {
      const element = layer.appendChild(document.createElementNS(SVG, tag));
      for (const [name, content] of Object.entries(attributes)) element.setAttribute(name, content);
      if (style) element.style.color = style;
    };
    draw("path", { class: "cross", d: `M${x} ${plot.y[0]}V${plot.y[1]}` });
    const name = plot.names.length ? plot.names[value] : say(value, plot.xs);
    const lines = [make("b", {}, `${name} ${plot.xt.split(",")[0]}`)];
    const words = [];
    for (const curve of shown) {
      const point = nearest(curve.p, x, at);
      if (Math.abs(at(point[0]) - x) > 12) continue;
      const color = curve.s < 0 ? "var(--muted)" : `var(--series-${curve.s % 7})`;
      draw("circle", { class: "spot", cx: at(point[0]), cy: place(plot.y, point[1]), r: 5 }, color);
      let text = say(point[1], plot.ys);
      if (point.length > 3) text += ` [${say(point[2], plot.ys)}, ${say(point[3], plot.ys)}]`;
      const line = make("div");
      const label = make("span");
      label.append(make("i", { style: `color:${color}` }), curve.n);
      line.append(label, make("span", {}, text));
      lines.push(line);
      words.push(`${curve.n} ${text}`);
    }
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    showTip(chart, x * scale, plot.y[1] * scale + 40, lines);
    if (isSpoken) said.textContent = `${lines[0].textContent}: ${words.join("; ")}`;
  };

  // A mark with words of its own: a bar, a cell, a point.
  const showMark = (chart, mark, isSpoken) => {
    hideTip();
    mark.classList.add("current");
    unmark = () => mark.classList.remove("current");
    const [box, outer] = [mark.getBoundingClientRect(), chart.getBoundingClientRect()];
    showTip(chart, box.left - outer.left + box.width / 2, box.top - outer.top, [make("span", {}, mark.dataset.t)]);
    if (isSpoken) said.textContent = mark.dataset.t;
  };

  for (const chart of find(".chart")) {
    const plot = plots[chart.dataset.plot];
    const marks = () => find("[data-t]", chart).filter((mark) => !mark.closest(".off"));
    if (!plot && !marks().length) continue;
    let current = -1;
    chart.tabIndex = 0;
    chart.setAttribute("role", "group");
    chart.setAttribute("aria-label", `${chart.dataset.title}: arrow keys read values`);
    const point = (event) => {
      if (plot) {
        const svg = chart.querySelector("svg").getBoundingClientRect();
        const x = (event.clientX - svg.left) * 520 / svg.width;
        const [, xs] = readLines(plot);
        if (!xs.length) return;
        current = xs.indexOf(nearest(xs.map((value) => [value]), x, (value) => place(plot.x, value))[0]);
        showLines(chart, plot, current, false);
      } else {
        const mark = event.target.closest("[data-t]");
        if (!mark) return hideTip();
        current = marks().indexOf(mark);
        showMark(chart, mark, false);
      }
    };
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("pointerleave", hideTip);
    chart.addEventListener("blur", hideTip);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") hideTip();
      if (step === undefined) return;
      event.preventDefault();
      const count = plot ? readLines(plot)[1].length : marks().length;
      if (!count) return;
      current = Math.max(0, Math.min(count - 1, current + step));
      if (plot) showLines(chart, plot, current, true);
      else showMark(chart, marks()[current], true);
    });
  }

  // Commands can be copied.
  for (const box of find(".copyable")) {
    const button = box.querySelector(".copy");
    const text = box.querySelector("pre");
    button.hidden = false;
    button.addEventListener("click", async () => {
      let isDone = false;
      try {
        await navigator.clipboard.writeText(text.textContent);
        isDone = true;
      } catch {
        getSelection().selectAllChildren(text);
        isDone = document.execCommand("copy");
      }
      button.textContent = isDone ? "Copied" : "Select and copy";
      said.textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
