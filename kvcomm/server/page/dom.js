"use strict";
// Elements and numbers. Whatever comes from a server is inserted as text: there is no other way to insert here.

const SOURCES = ["exact", "aligned", "computed"];

const MEANING = {
  exact: "reused, equal to a cold run",
  aligned: "moved from another context and corrected",
  computed: "computed for this request",
  approximate: "rests on moved text; never serves an exact request",
};

const REASONS = {
  new: "no cached prompt continues like this one",
  evicted: "was cached, but its pages were needed",
  expired: "was cached and outlived its TTL",
  quota: "the quota left no room to keep it",
  reset: "cleared by the operator",
  last_token: "everything is cached; the last token's logits are needed to go on",
  cache_off: "reuse is switched off",
  glue: "template text behind the first moved segment",
  rung: "moved text that this rung of the ladder recomputes",
  no_source: "not seen in another context, or not kept any more",
  immovable: "this model's keys cannot be moved",
  no_anchors: "too few anchors between these contexts for the only rungs asked for",
  uncalibrated: "too few exact examples yet, at the levels that are accepted, to promise a bound",
  bound: "no rung keeps the bound",
  breaker: "audits found more violations than the bound allows",
  out_of_distribution: "too far from what the bound was calibrated on",
  source_risk: "the source is approximate itself, and both risks are too much",
  comes_back: "was moved to this place before: computed, it is an exact prefix from now on",
  displaced: "stands first here, and its only source stood behind others",
  cost: "moving would take longer than computing",
  escalated: "recomputed tokens were too far from their estimates",
  no_room: "the pool could not hold the prompt beside what was found of it",
  failed: "moving it failed",
  read_along: "computed before the prompt was complete",
  too_late: "of an answer that is followed, written too late to be read along",
  no_spare: "of an answer that is followed; other answers left no time to read it along",
  tier_slow: "the shared tier has it, and computing was quicker",
  tier_corrupt: "the shared tier has it, but altered or not as its name says",
  tier_failed: "the shared tier lost it, or failed to give it",
};

const ENDINGS = {
  stop: "the model ended its answer, or a stop text came",
  length: "as long as was asked for, or the context was full",
  tool_calls: "the answer calls tools",
  prefill: "computed ahead; no answer was asked for",
  refused: "answered with an error",
  client_gone: "the client left before it had its answer",
  timed_out: "took longer than the server lets an answer take",
  failed: "the server's own fault; its log says why",
};

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; children that are no nodes become text. */
function make(tag, attributes = {}, ...children) {
  return dressed(document.createElement(tag), attributes, children);
}

/** The same for a part of a drawing. */
function draw(tag, attributes = {}, ...children) {
  return dressed(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function dressed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A length or share as a custom property: the policy allows no style attributes, the style sheet does the rest. */
function sized(element, property, value) {
  element.style.setProperty(property, value);
  return element;
}

/** Say something in a place that is hidden while there is nothing to say. */
function report(element, text) {
  if (element.textContent !== text) element.textContent = text ?? "";
  element.hidden = !text;
}

/** Show parts in a place of the page. What has the focus keeps still, what was scrolled stays where it was. */
function put(id, parts) {
  const place = byId(id);
  if (place.contains(document.activeElement)) return;
  const top = place.querySelector(".scroll")?.scrollTop ?? 0;
  place.replaceChildren(...parts);
  place.querySelector(".scroll")?.scrollTo(0, top);
}

function empty(text) {
  return make("p", { class: "empty" }, text);
}

const grouped = new Intl.NumberFormat("en-US");
const count = (value) => grouped.format(value);

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 1000 && index < units.length - 1) {
    value /= 1000;
    index += 1;
  }
  return `${index ? value.toFixed(1) : value} ${units[index]}`;
}

function seconds(value) {
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${+(value * 1000).toPrecision(3)} ms`;
  if (value < 120) return `${+value.toPrecision(3)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

/** Something a second, or a minute where it is rarer. */
function rate(value, overS) {
  const each = value / Math.max(1, overS);
  return each === 0 || each >= 1 ? `${+each.toPrecision(3)}/s` : `${+(60 * each).toPrecision(2)}/min`;
}

const nats = (value) => (value === null ? "unknown" : String(+value.toPrecision(2)));
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part < whole / 100 ? 2 : 1)} %` : "none");
const plain = (word) => word.replaceAll("_", " ");
const total = (tokens) => SOURCES.reduce((sum, source) => sum + tokens[source], 0);
