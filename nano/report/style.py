"""How the report looks: a style sheet over `nano.page`'s, for screens from 360 px and for paper."""

from __future__ import annotations

STYLE = """
main { max-width: 1120px; }
:root { --good: #1a7f42; --bad: #b42318; --card: #f6f7f9; --mark: #1c2024; --teacher: #7d878f; --student: #0f8a80;
  --int4: #2563c9; --bundle: #c2570c; --packed: #2563c9; --kv: #8b4fbf; --arena: #1f8f99; --logits: #6fbac2;
  --tokenizer: #d9a514; --runtime: #8d979e; --mapped: #8fb784; }
@media (prefers-color-scheme: dark) { :root { --good: #58c98a; --bad: #f0827a; --card: #1b2025; --mark: #f2f4f5;
  --teacher: #98a2aa; --student: #3dbfb2; --int4: #78a9ff; --bundle: #f2a25c; --packed: #5b8fe8; --kv: #b48ae0;
  --arena: #3fb3be; --logits: #87ccd3; --tokenizer: #d9ad3a; --runtime: #77818a; --mapped: #7da873; } }
h1 { margin-bottom: 8px; } .figures { grid-template-columns: repeat(auto-fill, minmax(128px, 1fr));
  margin-bottom: 16px; }
 h2 { scroll-margin-top: 12px; } h3 { font-size: 1rem; margin: 24px 0 4px; }
.lead { color: var(--muted); max-width: none; overflow-wrap: anywhere; } .lead code { color: var(--ink); }
a { color: var(--after); } nav { margin: 0 0 24px; font-size: .9rem; line-height: 1.9; }
nav a { margin-right: 14px; white-space: nowrap; }
:is(a, summary):focus-visible { outline: 2px solid var(--after); outline-offset: 2px; }
.stage-teacher { --colour: var(--teacher); } .stage-student { --colour: var(--student); }
.stage-int4 { --colour: var(--int4); } .stage-bundle { --colour: var(--bundle); }
.warnings { border-left: 4px solid var(--bad); background: var(--card); padding: 12px 16px; margin: 0 0 24px;
  border-radius: 0 6px 6px 0; }
.warnings h2 { margin: 0 0 4px; font-size: 1rem; color: var(--bad); }
.warnings ul { margin: 0; } .missing { color: var(--muted); }
.missing code, .command code { display: inline-block; max-width: 100%; background: var(--card); color: var(--ink);
  border: 1px solid var(--line); border-radius: 4px; padding: 1px 6px; white-space: pre-wrap; }
.strip { height: 10px; overflow: hidden; } .strip.tall { height: 22px; border-radius: 3px; }
.strip .back { fill: var(--line); } .strip .bar { fill: var(--colour); }
.strip line, .strip path { vector-effect: non-scaling-stroke; }
.strip .error { stroke: var(--mark); stroke-width: 1.5; }
.strip .edge { stroke: var(--page); stroke-width: 1; }
.strip .written { stroke: var(--bad); stroke-width: 2.5; }
.strip .resident { stroke: var(--mark); stroke-width: 2.5; stroke-dasharray: 4 3; }
.strip .peak { stroke: var(--mark); stroke-width: 9; stroke-linecap: round; }
.strip .inner { stroke: var(--page); stroke-width: 4; stroke-linecap: round; }
.ladders { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 22px 32px;
  margin: 14px 0 20px; align-items: start; }
.ladder { width: 100%; } .ladder caption { color: var(--ink); font-size: .95rem; font-weight: 600;
  padding-bottom: 2px; }
.ladder caption small { font-weight: 400; }
.ladder th, .ladder td { padding: 2px 0; border: 0; vertical-align: middle; }
.ladder th { width: 6.4em; padding-right: 8px; color: var(--ink); } .ladder td + td { width: 3.4em; text-align: right; }
.ladder td + td + td { width: 6.2em; padding-left: 4px; color: var(--muted); white-space: nowrap; }
.divergence td, .numbers td, .numbers thead th:not(:first-child), .divergence thead th:not(:first-child) {
  text-align: right; white-space: nowrap; }
.divergence td small { margin-left: 6px; } .numbers td small { display: block; }
.speeds { --colour: var(--int4); width: 100%; max-width: 720px; } .speeds td:nth-child(3) { width: 50%; }
.speeds small { white-space: nowrap; }
.divergence tbody th, .numbers tbody th { color: var(--ink); }
.divergence .group th { color: var(--muted); padding-top: 12px; white-space: normal; }
.divergence tr > :last-child, .numbers tr > :last-child { padding-right: 0; }
.curve { align-items: start; } .curve > .wide { max-width: 100%; min-width: 0; }
.flips { padding-left: 1.6em; max-width: 82ch; } .flips li { margin-bottom: 12px; overflow-wrap: anywhere; }
.flips .before { color: var(--muted); } .flips small { display: block; }
.flips ins, .flips del { display: inline-block; line-height: 1.35; padding: 0 3px; border-radius: 3px;
  text-decoration: none; white-space: pre-wrap; color: #fff; }
.flips ins { background: #1a7f42; } .flips del { background: #b42318; text-decoration: line-through; }
.causes { display: grid; gap: 4px 22px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr));
  list-style: none; margin: 8px 0 20px; padding: 0; font-size: .85rem; }
.causes li { display: flex; gap: 8px; align-items: baseline; font-variant-numeric: tabular-nums; }
.causes li::before { content: ""; flex: none; width: 11px; height: 11px; background: var(--colour);
  border-radius: 2px; }
.causes span { flex: 1; color: var(--muted); }
.packed_weights { --colour: var(--packed); } .kv_cache { --colour: var(--kv); } .arena { --colour: var(--arena); }
.logits { --colour: var(--logits); } .tokenizer { --colour: var(--tokenizer); } .runtime { --colour: var(--runtime); }
.mapped_weights { --colour: var(--mapped); }
.marks span { white-space: nowrap; } .marks svg { display: inline-block; width: 18px; height: 12px;
  vertical-align: -1px; }
.phones, .chain, .provenance { list-style: none; margin: 0; padding: 0; }
.phones { display: grid; gap: 18px 36px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.phones + p { margin-top: 16px; } .phones li { min-width: 0; } .phones p { margin: 0; max-width: none; }
.phones .head { display: flex; gap: 0 10px; align-items: baseline; } .phones .head small { flex: 1; }
.phones .head span { white-space: nowrap; } .phones .strip { margin: 2px 0; }
.phones .said { font-size: .85rem; color: var(--muted); margin-top: 3px; } .phones .said b { color: var(--ink); }
.pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 600; }
.chain { display: flex; flex-wrap: wrap; gap: 10px 0; margin: 0 0 24px; }
.chain li { display: flex; align-items: center; min-width: 0; }
.chain li + li::before { content: "→"; color: var(--muted); margin: 0 12px; }
.chain div { border-left: 4px solid var(--colour, var(--muted)); padding: 1px 0 1px 9px; line-height: 1.3;
  min-width: 0; }
.chain small { display: block; }
.provenance { border-left: 2px solid var(--line); margin-left: 6px; }
.provenance > li { position: relative; padding: 0 0 22px 20px; }
.provenance > li::before { content: ""; position: absolute; left: -7px; top: 7px; width: 12px; height: 12px;
  border-radius: 50%; background: var(--colour, var(--muted)); }
.provenance h3 { margin: 0 0 2px; } .provenance dl { margin: 0; display: grid; gap: 2px 14px; font-size: .85rem; }
.provenance dd { font-size: inherit; line-height: 1.45; overflow-wrap: anywhere; margin-bottom: 4px; }
.files code, .provenance code { overflow-wrap: anywhere; font-size: .92em; }
.files { width: 100%; } .files td { overflow-wrap: anywhere; } .files td:nth-child(2) { white-space: nowrap; }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--muted);
  font-size: .85rem; }
@media (min-width: 720px) {
  .provenance dl { grid-template-columns: 90px minmax(0, 1fr); } .provenance dd { margin: 0; }
}
@media (max-width: 1000px) {
  .curve { grid-template-columns: minmax(0, 1fr); } .curve figure { max-width: 480px; }
}
@media (max-width: 560px) {
  .divergence td small { display: block; margin: 0; } .panels svg text { font-size: 11.5px; }
  .speeds td:last-child small { display: none; } .speeds td:nth-child(3) { width: 42%; }
  .phones .head { flex-wrap: wrap; } .phones .head b { flex: 1; } .phones .head small { order: 1; flex: 1 0 100%; }
  .chain { flex-direction: column; } .chain li + li::before { content: "↓"; margin: 0 10px 0 0; }
  :is(.divergence, .numbers) :is(th, td) { padding-right: 10px; } .flips { padding-left: 1.3em; }
  .files thead { display: none; } .files tr { display: block; border-bottom: 1px solid var(--line); padding: 6px 0; }
  .files :is(th, td) { display: block; border: 0; padding: 0; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html, body { font-size: 12px; } main { padding: 0; } nav { display: none; } h2 { margin-top: 24px; }
  .curve { grid-template-columns: minmax(0, 1fr); } .curve figure { max-width: 380px; } .wide { overflow: visible; }
  h2, h3, caption { break-after: avoid; } li, tr, figure, .ladder, .warnings { break-inside: avoid; }
}
"""
