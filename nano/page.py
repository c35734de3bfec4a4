"""The page that reports are: one self-contained HTML file, its style sheet inside.

For light and dark, narrow and wide; no scripts, nothing loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --muted: #667078; --line: #e3e6e8; --page: #fff;
  --before: #9aa3aa; --after: #2563c9; --chosen: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --muted: #98a2aa; --line: #2c3238; --page: #14171a;
  --before: #77818a; --after: #78a9ff; --chosen: #f2a25c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 44px 0 6px; }
p { margin: 0 0 12px; max-width: 70ch; }
ul { padding-left: 1.2em; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 18px 20px; margin: 0; }
dt, small, caption, .legend, figcaption, thead th { color: var(--muted); font-size: .85rem; font-weight: 400; }
dd { margin: 0; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd small { display: block; line-height: 1.35; }
.key { display: inline-block; margin-right: 18px; }
.key::before { content: ""; display: inline-block; width: 18px; height: 0; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid var(--colour); }
.key.chosen::before { width: 8px; height: 8px; border: 0; border-radius: 50%; background: var(--colour); }
.before { --colour: var(--before); } .after { --colour: var(--after); } .chosen { --colour: var(--chosen); }
.panels { display: grid; grid-template-columns: repeat(2, 1fr); gap: 14px 12px; margin-bottom: 26px; }
figure { margin: 0; } figcaption { margin-bottom: 2px; padding-left: 22%; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 9.5px; }
.rule { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
circle { fill: var(--colour); }
.curve svg text { font-size: 6.5px; } .curve polyline.before { stroke-dasharray: 3 2; }
polyline { vector-effect: non-scaling-stroke; }
.curve { display: grid; gap: 20px; margin-bottom: 26px; align-items: center; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 6px; }
caption b, td b { color: var(--chosen); font-weight: 600; }
.heat td b { font-size: .7em; vertical-align: super; margin-left: 2px; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--muted); }
code { font-size: .9em; overflow-wrap: anywhere; }
tr.chosen td { color: var(--chosen); font-weight: 600; }
.heat { width: 100%; table-layout: fixed; font-size: .75rem; }
.heat th, .heat td { padding: 4px 3px; text-align: right; border: 1px solid var(--page); }
.heat th:first-child { width: 3.2em; }
.heat td { background: color-mix(in srgb, var(--after) var(--heat, 0%), transparent); white-space: nowrap; }
.heat .none { color: var(--muted); background: none; }
.warned { color: var(--chosen); }
@media (min-width: 720px) {
  main { padding: 44px 32px 72px; }
  .panels { grid-template-columns: repeat(4, 1fr); gap: 22px 20px; }
  .curve { grid-template-columns: minmax(0, 420px) auto; gap: 40px; justify-content: start; }
  .panels svg text { font-size: 8px; } .curve svg text { font-size: 5.6px; }
  .heat { max-width: 820px; font-size: .8rem; } .heat td, .heat th { padding: 4px 8px; }
}
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """A whole page: its title, then sections of HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "</main></body></html>\n"
    )
