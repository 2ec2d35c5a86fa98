// Tables and tiles.

/** A table with a scroll bar of its own, reachable by keyboard. Columns: {name, number, wide}. */
function table(label, columns, rows) {
  const side = (column) => [column.number ? "number" : "", column.wide ? "wide-only" : ""].join(" ").trim() || null;
  const head = make("tr", {}, ...columns.map((column) => make("th", { scope: "col", class: side(column) }, column.name)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, index) => make("td", { class: side(columns[index]) }, cell))));
  const whole = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, whole);
}

function showSummary(stats) {
  const all = total(stats.tokens);
  const cache = stats.cache;
  const { last_minute: minute, curves } = stats;
  const mean = stats.requests ? seconds(stats.ttft.sum_s / stats.requests) : "none";
  const refused = stats.finish_reasons.refused ?? 0;
  const now = (name) => rate(minute[name], minute.seconds);
  const line = (label, name, part = null) => curve(label, curves[name], curves.step_s, part && curves[part]);
  const quota = cache.quota_tokens === null ? bytes(cache.bytes) : `${bytes(cache.bytes)}, quota ${count(cache.quota_tokens)}`;
  const tiles = [
    ["Requests", count(stats.requests), `${now("requests")}, ${count(stats.requests_in_flight)} in flight`, line("Requests", "requests")],
    ["Prompt tokens", count(all), now("prompt_tokens"), line("Prompt tokens, reused ones solid", "prompt_tokens", "reused_tokens")],
    ["Tokens generated", count(stats.generated_tokens), now("generated_tokens"), line("Tokens generated", "generated_tokens")],
    ["Refused", count(refused), now("refused"), line("Refused", "refused")],
    ["Prompt tokens reused", percent(all - stats.tokens.computed, all), lately(minute)],
    ["First token, mean", mean, `up ${seconds(stats.uptime_s)}`],
    ["Tokens cached", count(cache.tokens), quota],
    ...(stats.tokens.read_along ? [["Read along", count(stats.tokens.read_along), `${percent(stats.tokens.read_along, all)} of prompt tokens`]] : []),
    ...(stats.tokens.tier ? [["From the shared tier", count(stats.tokens.tier), `${percent(stats.tokens.tier, all)} of prompt tokens`]] : []),
  ];
  return tiles.map(([name, value, note, drawn = null]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, note), drawn)));
}

function lately(minute) {
  return minute.prompt_tokens ? `last minute ${percent(minute.reused_tokens, minute.prompt_tokens)}` : "none in the last minute";
}

function showRefused(refused) {
  if (!refused.length) return [empty("No request was refused.")];
  const columns = [{ name: "ago", number: true }, { name: "request" }, { name: "why" }];
  const rows = refused.map((each) => [
    seconds(each.ago_s), make("code", { class: "path" }, `${each.method} ${each.path}`),
    make("span", { title: `request ${each.request_id}` }, make("strong", {}, `${each.status} ${plain(each.code)}`), ` ${each.message}`),
  ]);
  return [table("Refused requests", columns, rows)];
}

const LEVELS = {
  own: "pairs of the same kind of prompt",
  pool: "pairs of all your prompts",
  prior: "pairs that come with the model",
};

/** A kind of prompt: the first digits of its digest and what fills it; null is all of them together. */
function readerName(reader, slots) {
  if (reader === null) return "all";
  return make("span", { title: reader }, make("code", {}, reader.slice(0, 8)), slots.length ? ` ${slots.join(", ")}` : "");
}

function boundState(bound) {
  if (bound.tripped) return "tripped";
  return bound.working_delta > 0 ? "holds" : "paused";
}

const ofNeeded = (number, needed) => (number < needed ? `${count(number)} of ${count(needed)}` : count(number));

function showBounds(bounds) {
  if (!bounds.length) return [];
  const columns = [
    { name: "kind of prompt" }, { name: "level" }, { name: "bound", number: true },
    { name: "confidence", number: true, wide: true }, { name: "pairs", number: true }, { name: "audits", number: true },
    { name: "above", number: true }, { name: "state" },
  ];
  const rows = bounds.map((each) => [
    readerName(each.reader, each.slots), make("span", { title: LEVELS[each.level] }, each.level),
    String(each.max_divergence), `${+(100 * each.confidence).toFixed(2)} %`, ofNeeded(each.num_pairs, each.num_needed),
    count(each.num_audited), count(each.num_violations), boundState(each),
  ]);
  return [table("Bounds, the pairs they rest on, and their audits", columns, rows)];
}

function showReaders(readers) {
  if (!readers.length) return [];
  const columns = [
    { name: "kind of prompt" }, { name: "pairs", number: true }, { name: "requests", number: true },
    { name: "with moved text", number: true }, { name: "audits", number: true, wide: true },
  ];
  const rows = readers.map((each) => [
    readerName(each.reader, each.slots), count(each.num_pairs), count(each.num_requests), count(each.num_approximated),
    each.is_young ? `${count(each.num_audited)}, each one` : count(each.num_audited),
  ]);
  return [make("h3", {}, "Kinds of prompts"), table("Kinds of prompts", columns, rows)];
}

function showEvictions(stats) {
  const cache = stats.cache;
  const sums = [["evicted", cache.evicted_tokens], ["expired", cache.expired_tokens], ["quota", cache.over_quota_tokens]];
  const words = sums.map(([reason, tokens]) => `${reason} ${count(tokens)}`).join(", ");
  const head = make("p", { class: "note" }, `Tokens dropped so far: ${words}.`);
  if (!stats.evictions.length) return [head, empty("Nothing was dropped lately.")];
  const columns = [{ name: "ago", number: true }, { name: "tokens", number: true }, { name: "why" }, { name: "text" }];
  const rows = stats.evictions.map((each) => [
    seconds(each.ago_s), count(each.tokens),
    make("span", { title: REASONS[each.reason] ?? "" }, plain(each.reason)),
    make("code", {}, `${each.start ? "…" : ""}${each.label.trim()}…`),
  ]);
  return [head, table("Dropped stretches of cached prompts", columns, rows)];
}
