"use strict";
// Interactive parts of the page: themes, sorting of tables, hiding of series, views and scales of figures.
// Tables and charts are readable without this script.
(() => {
  const find = (selector, from = document) => [...from.querySelectorAll(selector)];
  const makeButton = (attributes, ...content) => {
    const button = document.createElement("button");
    for (const [name, value] of Object.entries({ type: "button", ...attributes })) button.setAttribute(name, value);
    button.append(...content);
    return button;
  };

  // Themes: the system's, until the reader chooses one.
  const theme = document.getElementById("the_theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light theme" : "Dark theme"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  // Tables: a click or Enter on a heading sorts by it, a second one reverses the order; cells without value come last.
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of find("table.sortable")) {
    const heads = find("tr.heads > th", table);
    heads.forEach((head, column) => {
      const button = makeButton({}, head.textContent);
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
        const rows = [...table.tBodies[0].rows].map((row) => [row, read(row)]);
        rows.sort(([, a], [, b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return (order === "ascending" ? 1 : -1) * compare(a, b);
        });
        table.tBodies[0].append(...rows.map(([row]) => row));
      });
    });
  }

  // Keys: a click on a name shows or hides its series in all views of the figure; marks are found by their colour.
  for (const item of find(".key li")) {
    const button = makeButton({ "aria-pressed": "true", title: "show or hide" }, ...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const isShown = button.getAttribute("aria-pressed") === "false";
      for (const other of find(".key button", item.closest("figure"))) {
        if (other.textContent !== button.textContent) continue;
        other.setAttribute("aria-pressed", String(isShown));
        const { color } = other.parentElement.dataset;
        find(`.drawn :is([fill="${color}"], [stroke="${color}"])`, other.closest(".view"))
          .forEach((part) => part.classList.toggle("off", !isShown));
      }
    });
  }

  // Views: figures that have views of the same name switch together.
  find(".switches").forEach((group) => { group.hidden = false; });
  for (const group of find(".switch")) {
    group.addEventListener("click", (event) => {
      const label = event.target.closest("button")?.dataset.view;
      for (const other of label === undefined ? [] : find(".switch")) {
        const buttons = find("button", other);
        if (!buttons.some((button) => button.dataset.view === label)) continue;
        buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === label)));
        find(".view", other.closest("figure")).forEach((view) => { view.hidden = view.dataset.view !== label; });
      }
    });
  }

  // Scales: switch a figure's views between a linear and a logarithmic y-axis.
  for (const button of find(".scale")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
      find(".drawn + .drawn", button.closest("figure")).forEach((other) => {
        [other.hidden, other.previousElementSibling.hidden] = [!other.hidden, other.hidden];
      });
    });
  }

  for (const button of find(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.previousElementSibling.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(button.previousElementSibling);
        button.textContent = "Selected";
      }
    });
  }
})();
