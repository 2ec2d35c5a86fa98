// The page's life: the key, the polls, and where everything goes.

const STATS_MS = 2000;
const TREES_MS = [5000, 30000]; // when something has happened, and anyway: unlike stats, they count towards the rate
const MAX_WAIT_MS = 30000;

class Dashboard {
  constructor() {
    this.trees = { tree: new TreeView(byId("tree"), "Cached segments"), contexts: new TreeView(byId("contexts"), "Contexts") };
    this.trial = new Trial(() => this.tried());
    this.activity = null;
    this.treesAt = -Infinity;
    this.failures = 0;
    this.timer = null;
    this.isPaused = false;
    byId("key-form").addEventListener("submit", (event) => this.useKey(event));
    byId("forget").addEventListener("click", () => this.forgetKey());
    byId("pause").addEventListener("click", () => this.pause());
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
    this.trial.model = stats.model;
    byId("model").textContent = stats.model;
    put("summary", showSummary(stats));
    put("sources", showSources(stats.tokens));
    put("reasons", showReasons(stats.miss_reasons));
    put("endings", showEndings(stats.finish_reasons));
    put("refused", showRefused(stats.refused));
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
        bySize(answer.root.children.map(cacheNodes)),
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

  /** A trial has ended: what it left is shown at once. */
  tried() {
    this.treesAt = -Infinity;
    this.poll();
  }
}

new Dashboard().poll();
