// A tree that is walked with the arrow keys and keeps its place while its data change.
// Nodes: {id, label, tokens, bytes, own, fidelity, notes, children}; `own` are bytes that no child counts again.

const MAX_OPEN = 150;

class TreeView {
  constructor(place, name) {
    this.place = place;
    this.name = name;
    this.turned = new Set(); // nodes that somebody opened or closed
    this.nodes = [];
    this.focused = null;
  }

  /** Big trees begin closed, and so does what was folded. */
  isOpen(node) {
    return this.turned.has(node.id) !== (!node.isFolded && this.size <= MAX_OPEN);
  }

  /** Draw anew; `after` is said below. */
  show(nodes, after = null) {
    const hadFocus = this.place.contains(document.activeElement);
    if (!nodes.length) {
      this.place.replaceChildren(empty("Nothing is kept yet."));
      return;
    }
    this.nodes = nodes;
    this.after = after;
    this.size = numUnfolded(nodes);
    this.largest = flat(nodes).reduce((most, node) => Math.max(most, node.bytes), 1);
    const list = make("ul", { role: "tree", "aria-label": this.name });
    nodes.forEach((node, index) => list.append(this.item(node, 1, index + 1, nodes.length)));
    list.addEventListener("keydown", (event) => this.press(event));
    list.addEventListener("focusin", (event) => this.move(event.target.closest("[role=treeitem]")));
    const top = this.place.querySelector("[role=tree]")?.scrollTop ?? 0;
    this.place.replaceChildren(icicle(nodes), list, ...(after ? [empty(after)] : []));
    list.scrollTo(0, top);
    const items = this.visible();
    this.move(items.find((item) => item.dataset.id === this.focused) ?? items[0]);
    if (hadFocus) this.current.focus({ preventScroll: true });
  }

  item(node, level, position, size) {
    const isOpen = this.isOpen(node);
    const item = make("li", {
      role: "treeitem",
      tabindex: -1,
      "aria-level": level,
      "aria-posinset": position,
      "aria-setsize": size,
      "aria-expanded": node.children.length ? String(isOpen) : null,
      "data-id": node.id,
    });
    const bar = sized(make("span", { class: `bar ${node.fidelity}` }), "--share", node.bytes / this.largest);
    const mark = make("span", { class: "twist", "aria-hidden": "true" }, node.children.length ? (isOpen ? "▾" : "▸") : "·");
    const own = `${count(node.tokens)} tokens, ${bytes(node.bytes)}`;
    const words = [node.fidelity, own, ...node.notes].join(" · ");
    const row = make("div", { class: "node" }, mark,
      make("span", { class: "label" }, node.label),
      make("span", { class: "track", "aria-hidden": "true" }, bar),
      make("span", { class: "note" }, swatch(node.fidelity), words));
    row.addEventListener("click", () => this.toggle(item));
    item.append(row);
    if (node.children.length && isOpen) {
      const group = make("ul", { role: "group" });
      node.children.forEach((child, index) => group.append(this.item(child, level + 1, index + 1, node.children.length)));
      item.append(group);
    }
    return item;
  }

  visible() {
    return [...this.place.querySelectorAll("[role=treeitem]")];
  }

  move(item) {
    if (!item) return;
    for (const each of this.place.querySelectorAll("[tabindex='0']")) each.tabIndex = -1;
    item.tabIndex = 0;
    this.current = item;
    this.focused = item.dataset.id;
  }

  toggle(item) {
    if (!item.hasAttribute("aria-expanded")) return;
    const id = item.dataset.id;
    if (!this.turned.delete(id)) this.turned.add(id);
    this.focused = id;
    this.show(this.nodes, this.after);
    this.current.focus();
  }

  press(event) {
    const items = this.visible();
    const at = items.indexOf(this.current);
    const state = this.current.getAttribute("aria-expanded");
    const above = this.current.parentElement.closest("[role=treeitem]");
    const target = {
      ArrowDown: () => items[at + 1],
      ArrowUp: () => items[at - 1],
      Home: () => items[0],
      End: () => items.at(-1),
      ArrowLeft: () => (state === "true" ? this.toggle(this.current) : above),
      ArrowRight: () => (state === "false" ? this.toggle(this.current) : state === "true" ? items[at + 1] : undefined),
      Enter: () => this.toggle(this.current),
      " ": () => this.toggle(this.current),
    }[event.key];
    if (!target || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    target()?.focus();
  }
}

function flat(nodes) {
  return nodes.flatMap((node) => [node, ...flat(node.children)]);
}

function numUnfolded(nodes) {
  return nodes.reduce((sum, node) => sum + 1 + (node.isFolded ? 0 : numUnfolded(node.children)), 0);
}

const held = (node) => flat([node]).reduce((sum, each) => sum + each.own, 0);

const NUM_SHOWN = 6;
const SMALL = 0.02; // of everything

/** Nodes by what they and what hangs below them hold, the biggest first; of many, small ones are folded into one. */
function bySize(nodes, whole = nodes.reduce((sum, node) => sum + held(node), 0), above = "top") {
  const sizes = new Map(nodes.map((node) => [node, held(node)]));
  const sorted = [...nodes].sort((left, right) => sizes.get(right) - sizes.get(left));
  const numShown = Math.max(NUM_SHOWN, sorted.filter((node) => sizes.get(node) >= SMALL * whole).length);
  const small = sorted.length - numShown > 1 ? sorted.splice(numShown) : [];
  const inside = (node) => {
    const size = sizes.get(node);
    const notes = size > node.bytes ? [...node.notes, `${bytes(size)} in all`] : node.notes;
    return { ...node, notes, children: bySize(node.children, whole, node.id) };
  };
  return [...sorted.map(inside), ...(small.length ? [folded(small.map(inside), above)] : [])];
}

function folded(nodes, above) {
  const parts = flat(nodes).filter((node) => node.own);
  const sum = (name) => parts.reduce((number, node) => number + node[name], 0);
  const fidelity = parts.every((node) => node.fidelity === "exact") ? "exact" : "approximate";
  const notes = [`at most ${bytes(held(nodes[0]))} each`];
  const label = `${count(nodes.length)} small ones`;
  return { id: `small ${above}`, label, tokens: sum("tokens"), bytes: sum("own"), own: 0, fidelity, notes, children: nodes, isFolded: true };
}

const MAX_ROWS = 6;

/** All nodes at a glance: a block as wide as what it and what hangs below it hold; below, what is its own is left free. */
function icicle(nodes) {
  return make("div", { class: "icicle", "aria-hidden": "true" }, ...nodes.map((node) => cell(node, 1)));
}

function cell(node, row) {
  const title = `${node.label}: ${bytes(node.bytes)}, ${node.fidelity}`;
  const block = make("div", { class: `block ${node.fidelity}`, title }, make("span", { class: "inside" }, node.label));
  const children = row < MAX_ROWS && !node.isFolded ? node.children.map((child) => cell(child, row + 1)) : [];
  const own = sized(make("div", { class: "own" }), "--weight", node.own);
  const below = make("div", { class: "below" }, ...children, own);
  return sized(make("div", { class: "cell" }, block, below), "--weight", held(node) || 1);
}

const SUMS = ["segment", "salt"]; // kinds whose size is that of their children

/** What hangs in the cache, as nodes of a view; the root itself, which is no text, is left out. */
function cacheNodes(node) {
  const notes = [node.kind];
  const own = SUMS.includes(node.kind) ? 0 : node.bytes;
  if (node.pinned) notes.push("pinned");
  if (node.last_used_s !== null) notes.push(`used ${seconds(node.last_used_s)} ago`);
  if (node.expires_in_s !== null) notes.push(`expires in ${seconds(node.expires_in_s)}`);
  return { ...node, label: node.label ?? node.id, own, notes, children: node.children.map(cacheNodes) };
}

/** A list of contexts as a forest by their parents. */
function contextNodes(contexts) {
  const nodes = new Map();
  for (const each of contexts) {
    const notes = [];
    if (each.own_tokens !== each.tokens) notes.push(`${count(each.own_tokens)} of its own`);
    if (each.busy) notes.push("busy");
    if (each.pinned) notes.push("pinned");
    if (each.expires_in_s !== null) notes.push(`expires in ${seconds(each.expires_in_s)}`);
    nodes.set(each.id, { ...each, label: each.name ?? each.id, own: each.bytes, notes, children: [] });
  }
  const tops = [];
  for (const each of contexts) (nodes.get(each.parent)?.children ?? tops).push(nodes.get(each.id));
  return tops;
}
