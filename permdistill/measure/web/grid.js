"use strict";
// What the explorer and the report share: elements made of text alone, and the grid of one question.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (name === "p") made.style.setProperty("--p", value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter(child => child !== null && child !== ""));
  return made;
}

const UNIT = 1e5; // probabilities come as whole numbers of 1/UNIT; -1: the verdict failed
const READ = {
  position: "A column a position; cells name the option that stood there. A full column is a preference for a position.",
  option: "A column an option; cells name the label that it had. Without bias all rows are alike.",
};
const percent = share => (100 * share).toFixed(share > 0 && share < 0.0095 ? 1 : 0) + "%";
const unseen = text => element("span", {class: "hidden"}, text);

// Row j of an item's probabilities by option, as whole numbers; null where the verdict failed.
function row(values, j, k) {
  return values[j * k] < 0 ? null : values.slice(j * k, (j + 1) * k);
}

// One question's grid, view "position" or "option"; choose(j), where given, is called with the row that was picked.
function grid(item, set, labels, view, chosen, choose) {
  const k = item.options, gold = item.answer, byPosition = view === "position";
  const name = o => String(o + 1), text = o => item.texts[o] || "";
  const head = element("tr", {}, element("th", {scope: "col", class: "order"}, "order"));
  for (let c = 0; c < k; c++) {
    head.append(byPosition
      ? element("th", {scope: "col"}, unseen("position "), labels[c])
      : element("th", {scope: "col", title: text(c) || null}, unseen("option "), `${name(c)}${c === gold ? " ✓" : ""}`,
          text(c) ? element("span", {class: "text"}, text(c)) : "", c === gold ? unseen("the right one") : ""));
  }
  const body = element("tbody");
  set.forEach((order, j) => {
    const p = row(item.p, j, k), place = [];
    order.forEach((o, position) => { place[o] = position; });
    const shown = order.map(name).join(" ");
    const line = element("tr", {});
    const button = choose && element("button", {
      type: "button", tabindex: j === chosen ? 0 : -1, "aria-pressed": String(j === chosen), "data-row": j,
      on: {click: () => choose(j)},
    }, shown);
    line.append(element("th", {scope: "row", class: "order"}, button || shown));
    for (let c = 0; c < k; c++) {
      const o = byPosition ? order[c] : c, tag = byPosition ? name(o) : labels[place[o]];
      if (!p) { line.append(element("td", {class: "failed"}, c ? "" : "no verdict")); continue; }
      const share = p[o] / UNIT, wins = item.wins[j] >> o & 1;
      line.append(element("td", {
        p: share, class: [share > 0.48 ? "half" : "", share > 0.74 ? "full" : "", wins ? "wins" : ""].join(" ").trim() || null,
        "data-p": share.toFixed(5), "data-option": o,
      }, element("i", {}, tag), ` ${percent(share)}`, o === gold ? " ✓" : "",
        unseen(`${byPosition ? " option" : " label"} ${tag}${wins ? ", wins" : ""}${o === gold ? ", right" : ""}`)));
    }
    body.append(line);
  });
  return element("table", {class: "grid"}, element("caption", {class: "hidden"}, READ[view]), element("thead", {}, head), body);
}
