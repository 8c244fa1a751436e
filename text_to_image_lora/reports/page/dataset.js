"use strict";

const { items, kinds, tables } = JSON.parse(document.getElementById("content").textContent);
const find = (id) => document.getElementById(id);
const [search, finding, concept, order, saveButton, undoButton] =
  ["search", "finding", "concept", "order", "save", "undo"].map(find);
const TOGETHER = 60;  // cards that are added at once while the page is scrolled
const titles = Object.fromEntries(kinds.map((kind) => [kind.key, kind.title]));
for (const item of items) {
  item.editable = item.table !== undefined;
  item.texts = [...item.captions];
  item.out = false;
}

const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const isEdited = (item) => item.out || item.texts.some((text, place) => text !== item.captions[place]);
const changed = () => items.filter((item) => item.editable && isEdited(item));
const counted = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

// The findings, each of which shows its pictures.
find("nothing").hidden = kinds.length > 0;
for (const kind of kinds) {
  const button = element("button", "kind"), count = items.filter((item) => has(item, kind.key)).length;
  button.type = "button";
  button.dataset.kind = kind.key;
  button.append(element("b", "", `${kind.title}: ${count}`), element("span", "quiet", kind.remedy));
  button.addEventListener("click", () => {
    finding.value = finding.value === kind.key ? "" : kind.key;
    select();
    find("pictures").scrollIntoView();
  });
  find("kinds").append(button);
  finding.append(new Option(kind.title, kind.key));
}
if (kinds.length) finding.append(new Option("any finding", "any"));
if (items.some((item) => item.held)) finding.append(new Option("held out for validation", "held"));
if (saveButton) finding.append(new Option("edited", "edited"));
const concepts = [...new Set(items.map((item) => item.concept))];
if (concepts.length > 1) {
  concept.hidden = false;
  concept.append(...concepts.map((name) => new Option(name, name)));
}
function has(item, key) {
  return item.found.some(([each]) => each === key);
}

// The cards. They are made when they are scrolled into view, so that a page of many pictures opens quickly.
let chosen = [], made = 0;
function select() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = {
    "": () => true, any: (item) => item.found.length > 0, held: (item) => item.held, edited: isEdited,
  }[finding.value] || ((item) => has(item, finding.value));
  const length = (item) => item.texts.join("").length;
  const orders = {
    found: (a, b) => b.found.length - a.found.length, short: (a, b) => length(a) - length(b), long: (a, b) => length(b) - length(a),
  };
  chosen = items.filter((item) => {
    const text = `${item.name} ${item.texts.join(" ")}`.toLowerCase();
    return matches(item) && (!concept.value || item.concept === concept.value) && words.every((word) => text.includes(word));
  });
  if (order.value) chosen.sort(orders[order.value]);
  for (const button of document.querySelectorAll(".kind")) {
    button.setAttribute("aria-pressed", button.dataset.kind === finding.value);
  }
  find("shown").textContent = chosen.length === items.length ? counted(items.length, "picture") : `${chosen.length} of ${counted(items.length, "picture")}`;
  find("cards").replaceChildren();
  made = 0;
  addCards();
}

function addCards() {
  find("cards").append(...chosen.slice(made, made + TOGETHER).map(makeCard));
  made = Math.min(made + TOGETHER, chosen.length);
}

function makeCard(item) {
  const card = element("article", "picture"), frame = element("div", "frame"), inner = element("div");
  if (item.picture) {
    const image = element("img");
    image.src = item.picture;
    image.alt = item.name;
    image.decoding = "async";
    inner.append(image);
    const [width, height] = item.kept;
    if (Math.min(width, height) < 0.99) {
      const crop = element("div", "crop");
      crop.style.cssText = `left:${50 * (1 - width)}%;top:${50 * (1 - height)}%;width:${100 * width}%;height:${100 * height}%`;
      crop.title = `The crop of ${item.trained}, in the middle; unless --center_crop is passed, its place is random.`;
      inner.append(crop);
    }
  } else {
    inner.append(element("span", "quiet", "not shown"));
  }
  frame.append(inner);
  const facts = [item.size === item.trained ? item.size : `${item.size} \u2192 ${item.trained}`];
  if (concepts.length > 1) facts.push(item.concept);
  if (item.held) facts.push("held out for validation");
  card.append(frame, element("p", "name", item.name), element("p", "quiet", facts.join(", ")));
  item.captions.forEach((text, place) => {
    if (!item.editable) {
      card.append(element("p", "caption", text));
      return;
    }
    const area = element("textarea");
    area.value = item.texts[place];
    area.rows = Math.min(8, 2 + Math.floor(text.length / 32));
    area.setAttribute("aria-label", `Caption of ${item.name}`);
    area.addEventListener("input", () => {
      item.texts[place] = area.value;
      update(item, card);
    });
    card.append(area);
  });
  if (item.found.length) {
    const list = element("ul");
    list.append(...item.found.map(([key, measure]) => element("li", "", `${titles[key]}: ${measure}`)));
    card.append(list);
  }
  if (item.editable) {
    const label = element("label"), box = element("input");
    box.type = "checkbox";
    box.checked = item.out;
    box.addEventListener("change", () => {
      item.out = box.checked;
      update(item, card);
    });
    label.append(box, "leave this picture out");
    card.append(label);
    card.item = item;
    update(item, card);
  }
  return card;
}

function update(item, card) {
  card.classList.toggle("edited", isEdited(item));
  card.classList.toggle("out", item.out);
  const empty = !item.out && item.texts.every((text) => !text.trim());
  for (const area of card.querySelectorAll("textarea")) {
    area.setCustomValidity(empty ? "Write a caption, or leave the picture out." : "");
  }
  const number = changed().length;
  saveButton.disabled = undoButton.disabled = number === 0;
  saveButton.textContent = number ? `Save ${counted(number, "edit")}` : "Save captions";
}

// Saving.
function rowsOf(number) {
  const { rows, column } = tables[number], edits = new Map();
  for (const item of items) {
    if (item.table === number && isEdited(item)) edits.set(item.row, item);
  }
  return rows.flatMap((row, place) => {
    const item = edits.get(place);
    if (!item) return [row];
    if (item.out) return [];
    const texts = item.texts.map((text) => text.trim()).filter(Boolean);
    return [{ ...row, [column]: Array.isArray(row[column]) ? texts : texts[0] }];
  });
}

function save() {
  const empty = items.find((item) => item.editable && !item.out && item.texts.every((text) => !text.trim()));
  const saved = find("saved");
  saved.hidden = false;
  if (empty) {
    saved.replaceChildren(element("p", "", `${empty.name} has no caption. Write one, or leave the picture out.`));
    return;
  }
  const numbers = [...new Set(changed().map((item) => item.table))].sort((a, b) => a - b);
  saved.replaceChildren(...numbers.map((number) => {
    const { file, note } = tables[number], rows = rowsOf(number), link = element("a", "", file);
    link.href = URL.createObjectURL(new Blob(rows.map((row) => JSON.stringify(row) + "\n"), { type: "application/jsonl" }));
    link.download = file;
    const line = element("p");
    line.append("Downloaded ", link, ` with ${counted(rows.length, "row")}. ${note}`);
    link.click();
    return line;
  }));
  wasSaved = true;
}

let wasSaved = false;
if (saveButton) {
  saveButton.addEventListener("click", save);
  undoButton.addEventListener("click", () => {
    for (const item of changed()) {
      item.texts = [...item.captions];
      item.out = false;
    }
    select();
    saveButton.disabled = undoButton.disabled = true;
    saveButton.textContent = "Save captions";
  });
  addEventListener("input", (event) => {
    if (event.target.closest(".picture")) wasSaved = false;
  });
  addEventListener("beforeunload", (event) => {
    if (changed().length && !wasSaved) event.preventDefault();
  });
}

addEventListener("keydown", (event) => {
  const card = event.target.closest(".picture");
  if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "s" && (event.ctrlKey || event.metaKey) && saveButton) {
    event.preventDefault();
    if (!saveButton.disabled) save();
  } else if (event.altKey && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    const down = event.key === "ArrowDown";
    if (down && (!card || card === find("cards").lastElementChild)) addCards();
    const next = !card ? find("cards").firstElementChild : down ? card.nextElementSibling : card.previousElementSibling;
    const area = next && next.querySelector("textarea");
    if (area) {
      area.focus();
      next.scrollIntoView({ block: "nearest" });
    }
  } else if (event.key === "Escape" && card && card.item) {
    card.item.texts = [...card.item.captions];
    card.item.out = false;
    const again = makeCard(card.item);
    card.replaceWith(again);
    again.querySelector("textarea").focus();
  }
});

for (const control of [search, finding, concept, order]) control.addEventListener("input", select);
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) addCards();
}, { rootMargin: "1200px" }).observe(find("end"));
select();
