"""The style sheet of the reports."""

STYLE = """
:root { --ink: #1b1f24; --soft: #5b636d; --paper: #ffffff; --panel: #f5f6f8; --line: #d9dde2;
  --grid: #9aa0a8; --good: #0b7a55; --bad: #b3401a; --accent: #1666a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a2abb6; --paper: #14171c;
  --panel: #1d2128; --line: #333a44; --grid: #6c7480; --good: #4cc79a; --bad: #f08a5d;
  --accent: #6db3ee; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .3rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0;
  margin: .6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .6rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.muted { color: var(--soft); }
figure { margin: 1rem 0; padding: .9rem; background: var(--panel); border-radius: 8px; }
figure svg { display: block; width: 100%; min-width: 26rem; height: auto; max-width: 52rem; }
figcaption, .notes { color: var(--soft); font-size: .88rem; }
.notes { padding-left: 1.1rem; }
.warning { border-left: 4px solid var(--bad); padding: .5rem .8rem; background: var(--panel); }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto;
  font-size: .88rem; }
@media (max-width: 40rem) {
  table.cards, table.cards caption, .cards tbody, .cards tr, .cards td { display: block; }
  .cards thead { display: none; }
  .cards tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .cards td { display: flex; gap: .8rem; padding: .1rem 0; border: 0; white-space: normal;
    overflow-wrap: anywhere; }
  .cards td::before { content: attr(data-label); flex: 0 0 7.5rem; color: var(--soft);
    font-weight: 400; }
  .cards td:first-child { font-weight: 600; }
  .cards td:first-child::before { content: none; }
  .cards td:empty { display: none; }
}
footer { color: var(--soft); font-size: .85rem; margin-top: 3rem; }
"""
