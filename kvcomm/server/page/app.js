// The page's life: the key, the polls, and where everything goes.

const KEY = "kvcomm.key";
const STATS_MS = 2000;
const TREES_MS = [5000, 30000]; // when something has happened, and anyway: unlike stats, they count towards the rate
const MAX_WAIT_MS = 30000;

/** No answer that could be shown; anything else that is thrown here is a mistake of this page. */
class Refused extends Error {
  constructor(message, status = 0, waitMs = 0) {
    super(message);
    this.status = status;
    this.waitMs = waitMs;
  }
}

function unreachable() {
  throw new Refused("the server does not answer");
}

/** Ask the server for JSON; throws `Refused`. */
async function ask(path, body) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { authorization: `Bearer ${key}` };
  const options = { headers, cache: "no-store" };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["content-type"] = "application/json";
  }
  const response = await fetch(path, options).catch(unreachable);
  const answer = await response.json().catch(unreachable);
  if (response.ok) return answer;
  throw new Refused(answer.error.message, response.status, 1000 * Number(response.headers.get("retry-after") ?? 0));
}

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

class Dashboard {
  constructor() {
    this.trees = { tree: new TreeView(byId("tree"), "Cached segments"), contexts: new TreeView(byId("contexts"), "Contexts") };
    this.segments = new SegmentFields(byId("trial-segments"));
    this.model = null;
    this.activity = null;
    this.treesAt = -Infinity;
    this.failures = 0;
    this.timer = null;
    this.isPaused = false;
    byId("key-form").addEventListener("submit", (event) => this.useKey(event));
    byId("forget").addEventListener("click", () => this.forgetKey());
    byId("pause").addEventListener("click", () => this.pause());
    byId("trial-add").addEventListener("click", () => this.segments.add());
    byId("trial").addEventListener("submit", (event) => this.send(event));
    document.addEventListener("visibilitychange", () => this.poll());
  }

  /** Look at the server now, and again after a while. */
  async poll() {
    clearTimeout(this.timer);
    if (this.isPaused || document.hidden) return;
    let waitMs = STATS_MS;
    try {
      this.show(await ask("/v1/stats"));
      this.failures = 0;
      report(byId("status"), "live");
    } catch (error) {
      this.failures += 1;
      waitMs = this.explain(error);
    }
    clearTimeout(this.timer);
    if (waitMs !== null) this.timer = setTimeout(() => this.poll(), waitMs);
  }

  /** Say what went wrong; the milliseconds after which to try again, null if somebody has to act first. */
  explain(error) {
    if (!(error instanceof Refused)) {
      report(byId("status"), "this page has failed; reload it");
      throw error;
    }
    const needsKey = error.status === 401 || error.status === 403;
    report(byId("status"), needsKey ? "needs a key" : error.message);
    if (needsKey) {
      this.askForKey(error);
      return null;
    }
    return Math.min(MAX_WAIT_MS, Math.max(error.waitMs, STATS_MS * 2 ** Math.min(this.failures, 4)));
  }

  show(stats) {
    byId("key-form").hidden = true;
    byId("forget").hidden = sessionStorage.getItem(KEY) === null;
    this.model = stats.model;
    byId("model").textContent = stats.model;
    put("summary", showSummary(stats));
    put("sources", showSources(stats.tokens));
    put("reasons", showReasons(stats.miss_reasons));
    put("ttft", showHistogram(stats.ttft));
    put("recent", showRecent(stats.recent));
    put("audits", showAudits(stats.audits));
    put("bounds", showBounds(stats.bounds));
    put("readers", showReaders(stats.readers));
    put("evictions", showEvictions(stats));
    const activity = [stats.requests, stats.cache.tokens].join();
    if (performance.now() - this.treesAt > TREES_MS[activity === this.activity ? 1 : 0]) {
      this.activity = activity;
      this.treesAt = performance.now();
      this.showTree("tree", "/v1/cache/tree", (answer) => [
        answer.root.children.map(cacheNodes),
        answer.left_out ? `and ${count(answer.left_out)} more` : null,
      ]);
      this.showTree("contexts", "/v1/contexts", (answer) => [contextNodes(answer.data)]);
    }
  }

  async showTree(id, path, parts) {
    try {
      this.trees[id].show(...parts(await ask(path)));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      byId(id).replaceChildren(empty(error.message));
    }
  }

  askForKey(error) {
    const wasGiven = sessionStorage.getItem(KEY) !== null;
    sessionStorage.removeItem(KEY);
    byId("forget").hidden = true;
    byId("key-form").hidden = false;
    report(byId("key-error"), wasGiven ? error.message : null);
    byId("key").focus();
  }

  useKey(event) {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value.trim());
    byId("key").value = "";
    this.poll();
  }

  forgetKey() {
    sessionStorage.removeItem(KEY);
    location.reload();
  }

  pause() {
    this.isPaused = !this.isPaused;
    byId("pause").setAttribute("aria-pressed", String(this.isPaused));
    byId("pause").textContent = this.isPaused ? "Go on" : "Pause";
    if (this.isPaused) report(byId("status"), "paused");
    this.poll();
  }

  async send(event) {
    event.preventDefault();
    const button = byId("trial-send");
    button.disabled = true;
    report(byId("trial-error"), null);
    try {
      const answer = await ask("/v1/chat/completions", trialBody(this.model, this.segments.values()));
      put("trial-result", showTrial(answer));
      this.treesAt = -Infinity;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      report(byId("trial-error"), error.message);
    } finally {
      button.disabled = false;
    }
    this.poll();
  }
}

new Dashboard().poll();
