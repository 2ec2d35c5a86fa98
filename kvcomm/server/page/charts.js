// Charts out of elements: every mark has a pattern or shape of its own, and its number as text beside it.

/** A patch with the pattern of a source or fidelity. */
function swatch(kind) {
  return make("span", { class: `swatch ${kind}`, "aria-hidden": "true" });
}

/** One bar, cut into spans by weight. Spans: {kind, weight, label, title}. */
function strip(spans, label) {
  const bar = make("div", { class: "strip", role: "img", "aria-label": label });
  for (const span of spans.filter((each) => each.weight > 0)) {
    const text = make("span", { class: "inside" }, span.label);
    bar.append(sized(make("div", { class: `span ${span.kind}`, title: span.title }, text), "--weight", span.weight));
  }
  return bar;
}

function legend(tokens) {
  const list = make("ul", { class: "legend" });
  for (const source of SOURCES) {
    const share = percent(tokens[source], total(tokens));
    const number = make("strong", {}, `${share}`);
    list.append(make("li", { title: MEANING[source] }, swatch(source), `${source} `, number, ` ${count(tokens[source])}`));
  }
  return list;
}

function sourceBar(tokens) {
  const spans = SOURCES.map((source) => ({
    kind: source,
    weight: tokens[source],
    label: source,
    title: `${count(tokens[source])} tokens: ${MEANING[source]}`,
  }));
  const parts = SOURCES.map((source) => `${source} ${percent(tokens[source], total(tokens))}`);
  return strip(spans, parts.join(", "));
}

function showSources(tokens) {
  if (!total(tokens)) return [empty("No request has ended yet.")];
  return [sourceBar(tokens), legend(tokens)];
}

/** Bars from the longest to the shortest: numbers by word, what the words mean, and how a word's bar looks. */
function wordBars(numbers, meanings, look) {
  const entries = Object.entries(numbers).sort((left, right) => right[1] - left[1]);
  const list = make("ul", { class: "bars" });
  for (const [word, number] of entries) {
    const bar = sized(make("span", { class: `bar ${look(word)}`, "aria-hidden": "true" }), "--share", number / entries[0][1]);
    const name = make("span", { class: "name" }, plain(word), make("small", {}, meanings[word] ?? ""));
    list.append(make("li", {}, name, make("span", { class: "track" }, bar), make("span", { class: "number" }, count(number))));
  }
  return list;
}

function showReasons(misses) {
  if (!Object.keys(misses).length) return [empty("Nothing was computed yet.")];
  return [wordBars(misses, REASONS, () => "computed")];
}

const TROUBLE = ["refused", "client_gone", "timed_out", "failed"];

function showEndings(reasons) {
  if (!Object.keys(reasons).length) return [empty("No request has ended yet.")];
  return [wordBars(reasons, ENDINGS, (reason) => (TROUBLE.includes(reason) ? "trouble" : "well"))];
}

const CURVE = { width: 120, height: 26 };

/** Sums over steps of time as columns, the newest at the right; `part` of each is drawn inside it. */
function curve(label, steps, stepS, part = null) {
  const most = Math.max(...steps, 1);
  const columns = (values, kind) => {
    const width = CURVE.width / values.length;
    const tops = values.map((value) => `V${(CURVE.height * (1 - value / most)).toFixed(1)}h${width}`);
    return draw("path", { class: kind, d: `M0,${CURVE.height}${tops.join("")}V${CURVE.height}Z` });
  };
  const words = `${label}, last ${seconds(steps.length * stepS)}: at most ${count(Math.max(...steps))} in ${seconds(stepS)}`;
  const box = `0 0 ${CURVE.width} ${CURVE.height}`;
  return draw("svg", { class: "curve", viewBox: box, preserveAspectRatio: "none", role: "img", "aria-label": words },
    draw("title", {}, words), columns(steps, "whole"), part && columns(part, "part"));
}

/** Requests by time to the first token, without the empty buckets at both ends. */
function showHistogram(ttft) {
  const used = ttft.counts.flatMap((requests, index) => (requests ? [index] : []));
  if (!used.length) return [empty("No request has ended yet.")];
  const first = Math.max(0, used[0] - 1);
  const last = Math.min(ttft.counts.length - 1, used.at(-1) + 1);
  const most = Math.max(...ttft.counts);
  const chart = make("ol", { class: "histogram" });
  for (let index = first; index <= last; index += 1) {
    const bound = ttft.bounds_s[index];
    const range = bound === undefined ? `over ${seconds(ttft.bounds_s.at(-1))}` : `≤ ${seconds(bound)}`;
    const column = sized(make("span", { class: "column", "aria-hidden": "true" }), "--share", ttft.counts[index] / most);
    const number = make("span", { class: "number" }, ttft.counts[index] ? count(ttft.counts[index]) : "");
    const spoken = `${range}: ${count(ttft.counts[index])} requests`;
    chart.append(make("li", { "aria-label": spoken }, number, column, make("span", { class: "tick" }, range)));
  }
  return [chart];
}

/** The latest requests, one strip each. */
function showRecent(recent) {
  if (!recent.length) return [empty("No request has ended yet.")];
  const list = make("ul", { class: "recent" });
  for (const each of recent.slice(0, 5)) {
    const words = `${count(total(each.tokens))} tokens, first after ${seconds(each.ttft_s)}, ${seconds(each.ago_s)} ago`;
    list.append(make("li", {}, sourceBar(each.tokens), make("span", { class: "note" }, words)));
  }
  return [list];
}

const CHART = { width: 420, height: 150, left: 46, right: 8, top: 10, bottom: 22 };

/** Audited divergences from old to new against their bound; on a logarithmic scale, as they differ by powers of ten. */
function showAudits(audits) {
  if (!audits.length) return [empty("No approximate answer has been audited yet.")];
  const marks = [...audits].reverse();
  const values = marks.flatMap((audit) => [audit.divergence, audit.predicted, audit.max_divergence]);
  const known = values.filter((value) => value > 0).map(Math.log10);
  const low = Math.floor(Math.min(...known));
  const high = Math.max(low + 1, Math.ceil(Math.max(...known)));
  const inner = CHART.height - CHART.top - CHART.bottom;
  const step = (CHART.width - CHART.left - CHART.right) / marks.length;
  const y = (value) => {
    const level = value === null ? high : value > 0 ? Math.log10(value) : low;
    return CHART.top + (inner * (high - Math.max(low, level))) / (high - low);
  };
  const bad = marks.filter((audit) => audit.violated).length;
  const label = `${marks.length} audits, ${bad} above their bound; the table below has the counts of each bound`;
  const chart = draw("svg", { class: "audits", viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": label });
  for (let power = low; power <= high; power += 1) {
    const at = y(10 ** power);
    chart.append(draw("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: at, y2: at }));
    chart.append(draw("text", { x: CHART.left - 6, y: at + 4, "text-anchor": "end" }, String(10 ** power)));
  }
  marks.forEach((audit, index) => {
    const middle = CHART.left + step * (index + 0.5);
    const ends = { x1: middle - step / 2, x2: middle + step / 2 };
    const at = y(audit.max_divergence);
    chart.append(draw("line", { class: "limit", ...ends, y1: at, y2: at }));
    chart.append(auditMark(audit, middle, y(audit.divergence)));
  });
  chart.append(draw("text", { x: CHART.left, y: CHART.height - 4 }, "older"));
  chart.append(draw("text", { x: CHART.width - CHART.right, y: CHART.height - 4, "text-anchor": "end" }, "newer"));
  return [chart, auditLegend()];
}

/** A dot within the bound, a cross above it. */
function auditMark(audit, x, y) {
  const words = `${nats(audit.divergence)} nats, predicted ${nats(audit.predicted)}, bound ${audit.max_divergence}`;
  const title = draw("title", {}, words);
  if (!audit.violated) return draw("circle", { class: "kept", cx: x, cy: y, r: 3.5 }, title);
  return draw("path", { class: "broken", d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8` }, title);
}

function auditLegend() {
  const icon = (...children) => draw("svg", { class: "icon", viewBox: "0 0 16 12", "aria-hidden": "true" }, ...children);
  return make("ul", { class: "legend" },
    make("li", {}, icon(draw("line", { class: "limit", x1: 0, x2: 16, y1: 6, y2: 6 })), "bound, nats"),
    make("li", {}, icon(draw("circle", { class: "kept", cx: 8, cy: 6, r: 3.5 })), "kept"),
    make("li", {}, icon(draw("path", { class: "broken", d: "M4,2l8,8m0,-8l-8,8" })), "broken"));
}
