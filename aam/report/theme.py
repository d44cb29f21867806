"""The look of the page: one style sheet for light, dark, narrow and printed pages."""

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --paper: #ffffff; --ground: #f4f6f7; --ink: #182026; --muted: #5a6872; --line: #dfe4e8;
  --link: #0b5c94;
  --good: #12693f; --good-paper: #e3f4ea; --bad: #a3261b; --bad-paper: #fbe8e5;
  --warn: #7a4a00; --warn-paper: #fff3d9; --warn-line: #e0a63a; --plain-paper: #e9edf0;
  --c1: #1f6fb2; --c2: #cf5a14; --c3: #16866b; --c4: #8a4fa8;
  --c5: #b98a00; --c6: #c43a6c; --c7: #4a7d1f; --c8: #6b6fc9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1a2026; --ground: #11161a; --ink: #e6ebef; --muted: #9dabb6; --line: #323c45;
    --link: #7fbdee;
    --good: #83d8a8; --good-paper: #16372a; --bad: #ff9f92; --bad-paper: #44211d;
    --warn: #ffd083; --warn-paper: #3a2c12; --warn-line: #9a7322; --plain-paper: #2a333b;
    --c1: #66b0ee; --c2: #f5934f; --c3: #4cc9a6; --c4: #c795e3;
    --c5: #e5bf45; --c6: #f283aa; --c7: #9bcf6a; --c8: #a4a8f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 var(--font); }
main, header > div, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { background: var(--paper); border-bottom: 1px solid var(--line); padding: 1.75rem 0 1rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .35rem 0; }
a { color: var(--link); }
.ran { color: var(--muted); margin: 0; overflow-wrap: anywhere; }
code, pre { font: .85em/1.5 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; background: var(--ground); padding: .75rem; border-radius: 6px; margin: 0; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .85rem; }
dl.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 1rem 0 .25rem; }
dl.facts dt { color: var(--muted); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
nav { margin-top: .9rem; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; }
section, .warnings {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.25rem 1.4rem; margin: 1.25rem 0; scroll-margin-top: 1rem;
}
.warnings { background: var(--warn-paper); border-color: var(--warn-line); }
.warnings h2 { color: var(--warn); }
.warnings ul, ul.words { margin: 0; padding-left: 1.2rem; }
.warnings li, ul.words li { margin: .3rem 0; overflow-wrap: anywhere; }
ul.words { font-size: 1.06rem; margin-bottom: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .82rem; }
th, td { padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { color: var(--ink); font-size: inherit; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.main { font-weight: 700; font-size: 1.1rem; }
.baselines { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0; padding: 0;
  list-style: none; }
.baselines .best { font-weight: 650; }
.quiet { color: var(--muted); font-weight: 400; }
th .quiet { font-size: .84rem; }
.chip { display: inline-block; border-radius: .8rem; padding: .08rem .65rem; font-size: .84rem;
  font-weight: 600; background: var(--plain-paper); color: var(--ink); }
.better { background: var(--good-paper); color: var(--good); }
.worse { background: var(--bad-paper); color: var(--bad); }
.cut, .dropped { background: var(--warn-paper); color: var(--warn); }
figure { margin: 0; min-width: 0; }
.pair { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.panels { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
.panels.wide { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.plot { width: 100%; height: auto; max-width: 31rem; max-height: 31rem; display: block;
  margin: 0 auto; overflow: visible; font-family: var(--font); }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .75rem; max-width: 52rem;
  overflow-wrap: anywhere; }
details > summary { cursor: pointer; font-weight: 600; }
details > *:not(summary) { margin-top: .85rem; }
summary h2 { display: inline; }
footer { color: var(--muted); font-size: .85rem; padding-bottom: 2.5rem; }
@media (max-width: 40rem) {
  main, header > div, footer { padding: 0 .8rem; }
  section, .warnings { padding: 1rem; }
  h1 { font-size: 1.4rem; }
  .stack thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
    overflow: hidden; }
  .stack, .stack tbody, .stack tr, .stack th, .stack td { display: block; }
  .stack tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .stack tr:last-child { border-bottom: 0; }
  .stack th, .stack td { border: 0; padding: .1rem 0; }
}
@media print {
  body { background: none; }
  section { break-inside: avoid; border: 0; padding: 0; }
  nav { display: none; }
}
"""
