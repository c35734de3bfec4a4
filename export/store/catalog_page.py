"""How the catalogue looks and answers: a style sheet over `nano.page`'s, and the script of its filters."""

from __future__ import annotations

STYLE = """
main { max-width: 1240px; }
:root { --good: #1a7f42; --bad: #b42318; --card: #f7f8f9; }
@media (prefers-color-scheme: dark) { :root { --good: #58c98a; --bad: #f0827a; --card: #1b2025; } }
.controls { display: flex; flex-wrap: wrap; gap: 12px 16px; align-items: end; margin: 0 0 20px;
  position: sticky; top: 0; z-index: 1;
  background: var(--page); padding: 10px 0; border-bottom: 1px solid var(--line); }
.controls[hidden] { display: none; }
.controls label { display: grid; gap: 2px; font-size: .8rem; color: var(--muted); flex: 1 1 150px; }
.controls input, .controls select { font: inherit; font-size: 1rem; color: var(--ink); background: var(--page);
  border: 1px solid var(--muted); border-radius: 6px; padding: 0 8px; height: 40px; width: 100%; min-width: 0; }
.controls output { color: var(--muted); font-size: .85rem; padding-bottom: 10px; flex: 0 0 auto;
  font-variant-numeric: tabular-nums; }
.cards, .phones { list-style: none; margin: 0; padding: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 16px;
  align-items: start; margin-bottom: 24px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0;
  display: flex; flex-direction: column; gap: 10px; content-visibility: auto; contain-intrinsic-size: auto 260px; }
.card[hidden] { display: none; }
.card h2 { font-size: 1.02rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
.card p { margin: 0; }
.about, .unmeasured { color: var(--muted); font-size: .85rem; }
.phones { display: grid; gap: 6px; }
.phones li { display: grid; line-height: 1.35; font-size: .92rem; border-left: 3px solid var(--c); padding-left: 9px; }
.phones b { font-weight: 600; } .phones span { color: var(--c); }
.pass { --c: var(--good); } .fail { --c: var(--bad); }
.ladder { width: 100%; } .ladder th, .ladder td { padding: 2px 8px 2px 0; border: 0; vertical-align: middle; }
.ladder th { width: 38%; overflow-wrap: anywhere; } .ladder td:last-child { width: 3.2em; text-align: right;
  padding: 0; }
.bar { background: linear-gradient(var(--line), var(--line)) 0 50% / calc(100% - 8px) 8px no-repeat; }
.bar i { display: block; height: 8px; background: var(--after); border-radius: 2px; }
.pull { display: flex; gap: 8px; align-items: center; }
.pull code { flex: 1; min-width: 0; overflow-x: auto; white-space: nowrap; background: var(--page); padding: 7px 9px;
  border: 1px solid var(--line); border-radius: 6px; font-size: .8rem; }
button { font: inherit; font-size: .82rem; color: var(--ink); background: var(--page); border: 1px solid var(--muted);
  border-radius: 6px; padding: 6px 10px; cursor: pointer; }
:is(input, select, button):focus-visible { outline: 2px solid var(--after); outline-offset: 1px; }
.digest code { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 560px) { .controls { position: static; } .controls label { flex-basis: 130px; }
  .controls label:first-child { flex-basis: 100%; } }
"""

SCRIPT = """
(() => {
  const at = id => document.getElementById(id);
  const fields = ["q", "phone", "format", "sort"], list = at("cards"), cards = [...list.children];
  const order = {
    "": (a, b) => b.created.localeCompare(a.created),
    size: (a, b) => a.size - b.size,
    score: (a, b) => (b.score || -1) - (a.score || -1),
    name: (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}),
  };
  const read = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const id of fields) {
      at(id).value = state.get(id) || "";
      if (at(id).selectedIndex === -1) at(id).value = "";
    }
  };
  const write = () => {
    const state = new URLSearchParams(fields.filter(id => at(id).value).map(id => [id, at(id).value]));
    history.replaceState(null, "", state.size ? "#" + state : location.pathname + location.search);
  };
  const show = () => {
    const words = at("q").value.toLowerCase().split(/\\s+/).filter(Boolean);
    const phone = at("phone").value, format = at("format").value;
    let count = 0;
    for (const card of cards) {
      const of = card.dataset;
      card.hidden = !(words.every(word => of.words.includes(word)) && (!format || of.format === format)
        && (!phone || of.passed.split(" ").includes(phone)));
      count += !card.hidden;
    }
    list.append(...cards.sort((a, b) => order[at("sort").value](a.dataset, b.dataset)));
    at("count").textContent = count === cards.length ? count + " artifacts" : count + " of " + cards.length;
    at("none").hidden = count > 0;
  };
  at("controls").hidden = false;
  at("controls").addEventListener("submit", event => event.preventDefault());
  at("controls").addEventListener("input", () => { write(); show(); });
  at("clear").addEventListener("click", () => { for (const id of fields) at(id).value = ""; write(); show(); });
  addEventListener("hashchange", () => { read(); show(); });
  list.addEventListener("click", async event => {
    if (!event.target.matches(".copy")) return;
    const code = event.target.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      event.target.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      event.target.textContent = "Selected";
    }
    setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
  });
  read();
  show();
})();
"""
