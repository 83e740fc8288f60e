// Streamed tokens in columns, coloured by a measure. One plain module: nothing is built, nothing is fetched.
//
// From Python come short messages while text is written, {kind: "start" | "tokens" | "state", run, ...}, and at rest
// the trait `frame` with the whole state and the measures, which also serves views that are opened later. Choosing
// another measure recolours here, without asking the kernel (the trait `by` tells it for the saved picture).
//
// For tests and for timing, all in the page:
//   .wb-live            root; data-run: number of the run shown; data-state: "idle" | "waiting" | "running" | "done" |
//                       "cancelled" | "error"; data-readings: "yes" once measures are there; data-by: the measure;
//                       data-started, data-first-token, data-done: performance.now() in ms when that run's start, the
//                       first token of its last column, and its end reached this page ("" before that)
//   .wb-column          one column; data-column: its title; data-tokens: how many tokens it shows
//   .wb-token           one token; data-i: its number; data-text: as decoded; data-acted: "yes" where the intervention
//                       acted; data-share: 0..1 of the strongest colour
//   .wb-status          what is going on, in words    .wb-by   the choice of measure    .wb-tip   the alternatives
// performance.mark("wb-first-token-RUN") and ("wb-done-RUN") are set too.

const MEASURES = {
  none: "no colour",
  kl: "KL from the plain model, nats",
  entropy: "entropy of the next token, nats",
  logprob: "log-probability of the token, nats",
  acted: "where the intervention acted",
};
const WORDS = {
  idle: "ready", waiting: "waiting", running: "writing", done: "done", cancelled: "stopped", error: "not run",
};

const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "" }; // as in strip.py
const shown = (token) => token.replace(/[ \n\t\r]/g, (sign) => SIGNS[sign]) || "∅";

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The state of one model of the front end, whichever views show it.
function emptyState() {
  return { run: 0, state: "idle", message: "", columns: [], readings: false };
}

function apply(store, message) {
  const state = store.state;
  if (message.kind === "start") {
    if (message.run < state.run) return;
    store.state = { ...emptyState(), run: message.run, state: "running", columns: message.columns };
    store.times = { started: performance.now() };
    store.views.forEach((view) => view.rebuild());
  } else if (message.run === state.run && message.kind === "tokens") {
    for (const [place, from, tokens] of message.add) {
      const column = state.columns[place];
      column.tokens.length = from;
      column.tokens.push(...tokens);
      if (place === state.columns.length - 1) stamp(store, "first", "wb-first-token-");
    }
    store.views.forEach((view) => view.grow());
  } else if (message.kind === "state" && message.run >= state.run) {
    if (message.run > state.run) store.times = {};
    Object.assign(state, { run: message.run, state: message.state, message: message.message });
    if (message.state !== "running" && message.state !== "waiting") stamp(store, "done", "wb-done-");
    store.views.forEach((view) => view.status());
  }
}

function stamp(store, name, mark) {
  if (store.times[name] !== undefined) return;
  store.times[name] = performance.now();
  performance.mark(mark + store.state.run);
}

function take(store, frame) {
  if (!frame || !frame.columns || frame.run < store.state.run) return;
  if (frame.run > store.state.run) store.times = {};
  store.state = { ...emptyState(), ...frame };
  stamp(store, "done", "wb-done-");
  store.views.forEach((view) => view.rebuild());
}

function value(column, by, i) {
  if (by === "acted") return column.acted && column.acted[i] ? 1 : 0;
  return column.readings && column.readings[by] ? column.readings[by][i] : undefined;
}

function drawing(model, el, store) {
  const root = element("div", "wb-live");
  const bar = element("div", "wb-bar");
  const status = element("span", "wb-status");
  status.setAttribute("role", "status");
  const choice = element("label", "wb-choice", "colour by ");
  const select = element("select", "wb-by");
  select.setAttribute("aria-label", "colour tokens by");
  for (const [name, words] of Object.entries(MEASURES)) select.append(new Option(words, name));
  select.value = model.get("by");
  choice.append(select);
  const scale = element("span", "wb-scale");
  const ramp = element("span", "wb-ramp"), most = element("span", "wb-most");
  scale.append("0 ", ramp, " ", most);
  bar.append(status, choice, scale, element("span", "wb-legend", "intervention acted"));
  const columns = element("div", "wb-columns");
  const tip = element("div", "wb-tip");
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  const hide = element("style");
  hide.textContent = `.wb-twin-${model.get("twin")} { display: none; }`; // the live view stands in its place
  root.append(hide, bar, columns, tip);
  el.append(root);

  const view = { boxes: [] };
  const by = () => select.value;

  view.status = () => {
    const { run, state, message, readings } = store.state, times = store.times;
    Object.assign(root.dataset, {
      run, state, by: by(), readings: readings ? "yes" : "no",
      started: times.started ?? "", firstToken: times.first ?? "", done: times.done ?? "",
    });
    status.textContent = (WORDS[state] ?? state) + (message ? `: ${message}` : "");
  };

  view.rebuild = () => {
    columns.replaceChildren();
    tip.hidden = true;
    view.boxes = store.state.columns.map((column) => {
      const box = element("section", "wb-column");
      box.dataset.column = column.title;
      box.style.setProperty("--wb-colour", column.colour || "currentColor");
      box.setAttribute("aria-label", `answer: ${column.title}`);
      const tokens = element("div", "wb-tokens");
      tokens.tabIndex = 0;
      tokens.setAttribute("role", "group");
      tokens.setAttribute("aria-label", `tokens of ${column.title}; arrow keys show what else could have been said`);
      box.append(element("div", "wb-title", column.title), tokens, element("div", "wb-note", column.note || ""));
      columns.append(box);
      return { box, tokens, column, spans: [] };
    });
    view.grow();
  };

  view.grow = () => {
    view.boxes.forEach((entry) => {
      const { tokens, column, spans, box } = entry;
      while (spans.length > column.tokens.length) spans.pop().remove();
      for (let i = spans.length; i < column.tokens.length; i++) {
        const token = column.tokens[i], span = element("span", "wb-token", shown(token));
        Object.assign(span.dataset, { i, text: token, acted: column.acted && column.acted[i] ? "yes" : "no" });
        tokens.append(span);
        if (token.includes("\n")) span.append(document.createElement("br"));
        spans.push(span);
      }
      box.dataset.tokens = spans.length;
      tokens.classList.toggle("wb-writing", store.state.state === "running");
    });
    view.colour();
    view.status();
  };

  view.colour = () => {
    const name = by();
    let top = 0;
    for (const { column, spans } of view.boxes) {
      spans.forEach((_, i) => { top = Math.max(top, Math.abs(value(column, name, i) ?? 0)); });
    }
    for (const { column, spans } of view.boxes) {
      spans.forEach((span, i) => {
        const share = top ? Math.abs(value(column, name, i) ?? 0) / top : 0;
        span.style.setProperty("--wb-share", share.toFixed(3));
        span.dataset.share = share.toFixed(3);
        span.classList.toggle("wb-strong", share > 0.55);
      });
    }
    scale.hidden = name === "none" || name === "acted" || !store.state.readings;
    most.textContent = `${name === "logprob" ? "−" : ""}${top.toPrecision(2)} nats`;
    root.dataset.by = name;
  };

  const percent = (share) => (share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`);
  const list = (heading, items, chosen) => {
    const table = element("table");
    table.append(element("caption", "", heading));
    for (const [token, share] of items) {
      const row = element("tr", token === chosen ? "wb-chosen" : "");
      const bar = element("td", "wb-share");
      bar.style.setProperty("--wb-part", `${(100 * share).toFixed(1)}%`);
      row.append(element("td", "wb-word", shown(token)), element("td", "wb-number", percent(share)), bar);
      table.append(row);
    }
    return table;
  };

  const show = (span, entry) => {
    root.querySelectorAll(".wb-token.wb-at").forEach((other) => other.classList.remove("wb-at"));
    tip.hidden = true;
    const read = entry && entry.column.readings, i = span && Number(span.dataset.i);
    if (!span || !read || !read.alternatives[i]) return;
    span.classList.add("wb-at");
    const number = (each) => Number(read[each][i]).toPrecision(2);
    tip.replaceChildren(
      element("div", "wb-numbers", [["KL", "kl"], ["entropy", "entropy"], ["log-probability", "logprob"]]
        .map(([words, name]) => `${words} ${number(name)}`).join(" · ")),
      list(read.plain ? "could have been" : "changed model", read.alternatives[i], span.dataset.text),
    );
    if (!read.plain) tip.append(list("plain model, here", read.plain_alternatives[i], span.dataset.text));
    tip.hidden = false;
    const frame = root.getBoundingClientRect(), at = span.getBoundingClientRect();
    const left = Math.min(at.left - frame.left, frame.width - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${at.bottom - frame.top + 6}px`;
  };
  const of = (target) => {
    const span = target.closest && target.closest(".wb-token");
    return [span, span && view.boxes.find(({ spans }) => spans.includes(span))];
  };
  columns.addEventListener("pointerover", (event) => show(...of(event.target)));
  columns.addEventListener("pointerleave", () => show(null));
  columns.addEventListener("focusout", () => show(null));
  columns.addEventListener("keydown", (event) => {
    const entry = view.boxes.find(({ tokens }) => tokens === event.target);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!entry || !step) return;
    event.preventDefault();
    event.stopPropagation();
    const at = entry.spans.findIndex((span) => span.classList.contains("wb-at"));
    const next = Math.min(Math.max(at + step, 0), entry.spans.length - 1);
    if (entry.spans[next]) show(entry.spans[next], entry);
  });
  select.addEventListener("change", () => {
    view.colour();
    model.set("by", by());
    model.save_changes();
  });
  view.chosen = () => { select.value = model.get("by"); view.colour(); };
  view.rebuild();
  return view;
}

export default () => {
  const store = { state: emptyState(), times: {}, views: new Set() };
  return {
    initialize({ model }) {
      take(store, model.get("frame"));
      model.on("msg:custom", (message) => apply(store, message));
      model.on("change:frame", () => take(store, model.get("frame")));
      model.on("change:by", () => store.views.forEach((view) => view.chosen()));
    },
    render({ model, el }) {
      const view = drawing(model, el, store);
      store.views.add(view);
      return () => store.views.delete(view);
    },
  };
};
