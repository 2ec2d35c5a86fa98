// The "try it" panel: one real request, and the plan that its answer reports.

/** Texts that stand before the messages, each a segment of its own. */
class SegmentFields {
  constructor(place) {
    this.place = place;
  }

  add() {
    const text = make("textarea", { rows: 3 });
    const remove = make("button", { type: "button" }, "Remove");
    const label = make("label", {}, make("span"), text);
    const item = make("li", {}, label, remove);
    remove.addEventListener("click", () => {
      item.remove();
      this.number();
    });
    this.place.append(item);
    this.number();
    text.focus();
  }

  number() {
    [...this.place.children].forEach((item, index) => {
      item.querySelector("span").textContent = `Segment ${index + 1}`;
      item.querySelector("button").setAttribute("aria-label", `Remove segment ${index + 1}`);
    });
  }

  /** What is written, as a request has it. */
  values() {
    const texts = [...this.place.querySelectorAll("textarea")].map((field) => field.value).filter(Boolean);
    return texts.map((content, index) => ({ id: `segment ${index + 1}`, content }));
  }
}

function trialBody(model, segments) {
  const messages = [];
  const system = byId("trial-system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  messages.push({ role: "user", content: byId("trial-user").value });
  return {
    model,
    segments,
    messages,
    max_tokens: Number(byId("trial-tokens").value),
    temperature: 0,
    include_plan: true,
    reuse: { mode: byId("trial-mode").value },
  };
}

const MAX_LISTED = 40;

/** The bound in force, whose pairs it rests on, and how text was moved. */
function boundWords({ bound, rung_name }) {
  const words = `bound ${bound.max_divergence} nats at ${+(100 * bound.confidence).toFixed(2)} %`;
  if (bound.level === null) return `${words}, nothing moved`;
  return `${words} by ${count(bound.num_pairs)} ${LEVELS[bound.level]}, moved by ${rung_name}`;
}

/** What an answer says about itself: the strip of spans, the same as a table, the counts, the text. */
function showTrial(answer) {
  const { usage } = answer;
  const plan = usage.plan.map((span) => ({ ...span, tokens: span.end - span.start }));
  const spans = plan.map((span) => ({
    kind: span.source,
    weight: span.tokens,
    label: span.reason === null ? `${span.source} ${span.tokens}` : `${plain(span.reason)} ${span.tokens}`,
    title: `${span.start} to ${span.end}: ${span.source}${span.reason === null ? "" : `, ${plain(span.reason)}`}`,
  }));
  const tokens = { exact: usage.cached_prefix_tokens, aligned: usage.aligned_tokens, computed: usage.computed_tokens };
  const columns = [{ name: "tokens", number: true }, { name: "count", number: true }, { name: "source" }, { name: "why" }];
  const rows = plan.slice(0, MAX_LISTED).map((span) => [
    `${span.start}–${span.end}`, count(span.tokens), make("span", { class: "kind" }, swatch(span.source), span.source),
    span.reason === null ? MEANING[span.source] : `${plain(span.reason)}: ${REASONS[span.reason] ?? ""}`,
  ]);
  const bound = usage.bound === null ? "exact" : boundWords(usage);
  const words = `${count(usage.prompt_tokens)} prompt tokens, first token after ${seconds(usage.timings.ttft_s)}, ${bound}`;
  const label = `Plan: ${SOURCES.map((source) => `${tokens[source]} ${source}`).join(", ")}`;
  return [
    make("h3", {}, "Plan of the prompt"),
    strip(spans, label),
    legend(tokens),
    make("p", { class: "note" }, words),
    table("Spans of the prompt", columns, rows),
    plan.length > MAX_LISTED ? make("p", { class: "note" }, `and ${plan.length - MAX_LISTED} spans more`) : null,
    make("h3", {}, "Answer"),
    make("pre", { class: "answer" }, answer.choices[0].message.content),
  ].filter((part) => part !== null);
}
