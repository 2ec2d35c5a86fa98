// The "try it" panel: one real request whose answer is written while it comes, then the plan that it reports.

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
    stream: true,
    stream_options: { include_usage: true },
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

/** What an answer says about its prompt: the strip of spans, the counts, the same as a table. */
function showPlan(usage) {
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
  ].filter((part) => part !== null);
}

/** An answer while it comes. */
class TrialAnswer {
  constructor(place) {
    this.place = place;
    this.thoughts = make("span", { class: "thoughts" });
    this.text = make("span");
    this.note = make("p", { class: "note" }, "waiting for the first token");
    this.end = null;
    place.replaceChildren(make("h3", {}, "Answer"), make("pre", { class: "answer" }, this.thoughts, this.text), this.note);
  }

  /** One event of the stream. */
  take({ choices, usage }) {
    for (const { delta, finish_reason: reason } of choices) {
      this.thoughts.append(delta.reasoning_content ?? "");
      this.text.append(delta.content ?? "");
      if (delta.content) this.say("writing");
      if (reason) this.end = `ended with ${plain(reason)}: ${ENDINGS[reason] ?? ""}`;
    }
    if (!usage) return;
    this.say(`${count(usage.completion_tokens)} tokens in ${seconds(usage.timings.total_s)}, ${this.end}`);
    this.place.append(...showPlan(usage));
  }

  say(words) {
    if (this.note.textContent !== words) this.note.textContent = words;
  }
}

/** The panel: its fields, its buttons, and the request that runs, if one does. */
class Trial {
  constructor(onEnd) {
    this.onEnd = onEnd;
    this.model = null;
    this.running = null;
    this.segments = new SegmentFields(byId("trial-segments"));
    byId("trial-add").addEventListener("click", () => this.segments.add());
    byId("trial").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running === null) this.send();
    });
    byId("trial-cancel").addEventListener("click", () => this.running?.abort());
  }

  async send() {
    const place = byId("trial-result");
    this.run(new AbortController());
    const { signal } = this.running;
    report(byId("trial-error"), null);
    const answer = new TrialAnswer(place);
    try {
      const body = trialBody(this.model, this.segments.values());
      for await (const event of streamed("/v1/chat/completions", body, signal)) answer.take(event);
    } catch (error) {
      if (signal.aborted) answer.say("cancelled: the server has stopped writing");
      else if (error instanceof Refused) this.fail(answer, error);
      else throw error;
    } finally {
      this.run(null);
      this.onEnd();
    }
  }

  /** Keep what has come of an answer; say what went wrong. */
  fail(answer, error) {
    answer.say("no whole answer");
    if (!answer.text.textContent) answer.place.replaceChildren();
    report(byId("trial-error"), error.message);
  }

  /** Show that a request runs, or that none does. */
  run(controller) {
    const isRunning = controller !== null;
    const hadFocus = document.activeElement === byId("trial-cancel");
    this.running = controller;
    byId("trial-send").disabled = isRunning;
    byId("trial-cancel").hidden = !isRunning;
    byId("trial-result").setAttribute("aria-busy", String(isRunning));
    if (hadFocus) byId("trial-send").focus();
  }
}
