// The gallery of a report: filter, order, strength of the overlay, keyboard, viewer.
// Pages can be read without it. What it knows of the images comes from the JSON of the page, never from markup.
"use strict";

const gallery = {
  /** Lower-case text to look for, and bounds; an empty bound is none. */
  query(text, low, high, choice) {
    const bound = (value, otherwise) => (String(value).trim() === "" || Number.isNaN(Number(value)) ? otherwise : Number(value));
    return { text: String(text).trim().toLowerCase(), low: bound(low, -Infinity), high: bound(high, Infinity), choice };
  },

  fits(fact, query) {
    if (fact.score < query.low || fact.score > query.high) return false;
    if (query.choice && !fact.choices.includes(query.choice)) return false;
    return query.text === "" || String(fact.id) === query.text || fact.uri.toLowerCase().includes(query.text);
  },

  /** The facts in an order; equal ones by id. */
  ordered(facts, order) {
    const keys = {
      high: (fact) => -fact.score,
      low: (fact) => fact.score,
      spread: (fact) => (fact.spread === null ? Infinity : -fact.spread),
      id: (fact) => fact.id,
    };
    const key = keys[order] || keys.high;
    return [...facts].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.id - b.id));
  },

  /** Where browsing goes from one of `count` images; stays at the ends. */
  step(index, by, count) {
    return index < 0 ? (by > 0 ? 0 : count - 1) : Math.max(0, Math.min(count - 1, index + by));
  },

  counted(shown, all) {
    const images = (count) => `${count.toLocaleString("en")} image${count === 1 ? "" : "s"}`;
    return shown === all ? images(all) : `${shown.toLocaleString("en")} of ${images(all)}`;
  },
};

function start() {
  const element = (id) => document.getElementById(id);
  const source = element("facts");
  if (!source) return;
  const facts = JSON.parse(source.textContent);
  const cards = new Map(facts.map((fact) => [fact.id, element(`image-${fact.id}`)]));
  const viewer = element("viewer");
  let shown = facts;
  let current = -1;

  function apply() {
    const choice = element("filter-choice") ? element("filter-choice").value : "";
    const query = gallery.query(element("filter-text").value, element("filter-low").value, element("filter-high").value, choice);
    const focused = shown[current];
    shown = gallery.ordered(facts.filter((fact) => gallery.fits(fact, query)), element("order").value);
    const kept = new Set(shown.map((fact) => fact.id));
    for (const fact of facts) cards.get(fact.id).hidden = !kept.has(fact.id);
    element("gallery").append(...shown.map((fact) => cards.get(fact.id)));
    current = focused ? shown.findIndex((fact) => fact.id === focused.id) : -1;
    element("count").textContent = gallery.counted(shown.length, facts.length);
    element("none").hidden = shown.length > 0;
    element("reset").hidden = shown.length === facts.length;
  }

  function setStrength(percent) {
    const value = Math.max(0, Math.min(100, percent));
    document.documentElement.style.setProperty("--strength", String(value / 100));
    for (const id of ["strength", "viewer-strength"]) {
      element(id).value = String(value);
      element(`${id}-text`).textContent = `${value}%`;
    }
  }

  function go(index) {
    if (!shown.length) return;
    current = index;
    const card = cards.get(shown[current].id);
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
    if (viewer.open) fill();
  }

  function fill() {
    const card = cards.get(shown[current].id);
    const copy = (selector) => card.querySelector(selector).cloneNode(true);
    element("viewer-title").replaceChildren(...copy(".score").childNodes);
    element("viewer-place").textContent = [...card.querySelectorAll(".place span:not(span span)")]
      .map((part) => part.textContent.trim()).join(" · ");
    const details = copy("footer");
    for (const named of details.querySelectorAll("[id]")) named.removeAttribute("id");
    details.querySelector(".enlarge").remove();
    element("viewer-body").replaceChildren(copy(".triptych"), details);
    for (const image of viewer.querySelectorAll("img")) image.loading = "eager";
    element("viewer-previous").disabled = current === 0;
    element("viewer-next").disabled = current === shown.length - 1;
  }

  function open(index) {
    current = index;
    fill();
    if (!viewer.open) {
      viewer.showModal();
      element("viewer-close").focus();
    }
  }

  // The image shown last has the focus at once: a dialog's "close" event comes later, and would take it from whoever types by then.
  function close() {
    viewer.close();
    if (current >= 0) go(current);
  }

  for (const id of ["filter-text", "filter-low", "filter-high", "filter-choice", "order"]) {
    if (element(id)) element(id).addEventListener("input", apply);
  }
  element("reset").addEventListener("click", () => {
    for (const id of ["filter-text", "filter-low", "filter-high", "filter-choice"]) if (element(id)) element(id).value = "";
    apply();
    element("filter-text").focus();
  });
  for (const id of ["strength", "viewer-strength"]) {
    element(id).addEventListener("input", (event) => setStrength(Number(event.target.value)));
  }
  element("gallery").addEventListener("click", (event) => {
    const control = event.target.closest(".triptych, .enlarge");
    if (!control) return;
    const card = control.closest(".card");
    open(shown.findIndex((fact) => cards.get(fact.id) === card));
  });
  element("gallery").addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    current = shown.findIndex((fact) => cards.get(fact.id) === card);
  });
  element("viewer-close").addEventListener("click", close);
  element("viewer-previous").addEventListener("click", () => open(gallery.step(current, -1, shown.length)));
  element("viewer-next").addEventListener("click", () => open(gallery.step(current, 1, shown.length)));
  viewer.addEventListener("click", (event) => event.target === viewer && close());
  viewer.addEventListener("cancel", close); // Escape; the browser then finds it closed

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    // Letters and signs only where an image has the focus: elsewhere they may be spoken, or somebody's own shortcuts.
    const letters = event.target.closest(".card, dialog");
    const steps = letters ? { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 } : { ArrowRight: 1, ArrowLeft: -1 };
    if (event.key in steps) {
      const next = gallery.step(current, steps[event.key], shown.length);
      if (viewer.open) open(next);
      else go(next);
    } else if (event.key === "Enter" && !viewer.open && event.target.classList.contains("card")) {
      open(current);
    } else if (letters && (event.key === "+" || event.key === "=" || event.key === "-")) {
      setStrength(Number(element("strength").value) + (event.key === "-" ? -10 : 10));
    } else {
      return;
    }
    event.preventDefault();
  });

  window.addEventListener("beforeprint", () => {
    for (const image of document.images) image.loading = "eager";
  });
  for (const button of document.querySelectorAll(".enlarge")) button.hidden = false;
  element("tools").hidden = false;
  document.documentElement.classList.add("scripted");
  apply();
  const asked = /^#image-(\d+)$/.exec(location.hash);
  const target = asked && cards.get(Number(asked[1]));
  if (target) target.scrollIntoView({ block: "center" });
}

if (typeof document !== "undefined") start();
