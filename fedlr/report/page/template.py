"""Markup, style and script of a page.

They are Python texts rather than files of their own: the node of a federation that
writes a report has the modules, and nothing that lies beside them.
"""

from __future__ import annotations

PAGE = """\
{% macro drawing(d) %}
<figure id="f-{{ d.name }}">
<div role="img" aria-label="{{ d.alternative|plain }}">
<div class="light" aria-hidden="true">{{ d.light|safe }}</div>
<div class="dark" aria-hidden="true">{{ d.dark|safe }}</div>
</div>
<figcaption>{{ d.caption|plain }}</figcaption>
</figure>
{% endmacro %}

{% macro table(t) %}
<div class="scroll" role="region" aria-label="{{ t.caption|plain }}" tabindex="0">
<table{% if t.sortable %} class="sortable"{% endif %}>
<caption>{{ t.caption|plain }}</caption>
<thead><tr>
{% for column in t.columns %}
<th scope="col"{% if column.numeric %} class="number"{% endif %}>{{ column.heading|plain }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in t.rows %}
<tr>
{% for cell in row %}
{% set tag = "th" if loop.first else "td" %}
<{{ tag }}{% if loop.first %} scope="row"{% endif %}
{%- if t.columns[loop.index0].numeric %} class="number"
{%- elif cell.text|length > 30 %} class="long"{% endif %}
{%- if cell.raw is not none %} data-value="{{ cell.raw }}"{% endif %}
>{{ cell.text|plain }}</{{ tag }}>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}

{% macro one(b) %}
{% if b.kind == "text" %}
<p>{{ b.text|plain }}</p>
{% elif b.kind == "listing" %}
<ul>
{% for item in b["items"] %}
<li>{{ item|plain }}</li>
{% endfor %}
</ul>
{% elif b.kind == "code" %}
<p class="label">{{ b.label|plain }}</p>
<pre tabindex="0"><code>{{ b.text }}</code></pre>
{% elif b.kind == "facts" %}
<dl class="{{ 'results' if b.prominent else 'facts' }}">
{% for name, cell in b.cells %}
<div><dt>{{ name|plain }}</dt><dd
{%- if cell.raw is not none %} data-value="{{ cell.raw }}"{% endif %}
>{{ cell.text|plain }}</dd></div>
{% endfor %}
</dl>
{% elif b.kind == "figures" %}
<div class="figures">
{% for d in b.drawings %}
{{ drawing(d) }}
{% endfor %}
</div>
{% elif b.kind == "table" %}
{{ table(b) }}
{% elif b.kind == "folded" %}
<details>
<summary>{{ b.label|plain }}</summary>
{% for inner in b.blocks %}
{{ one(inner) }}
{% endfor %}
</details>
{% endif %}
{% endmacro %}

<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'; img-src data:; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ page.title|plain }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<button type="button" id="theme" hidden>Dark theme</button>
<h1>{{ page.title|plain }}</h1>
<p class="subtitle">{{ page.subtitle|plain }}</p>
</header>
<nav aria-label="Sections">
<ul>
{% for section in page.sections %}
<li><a href="#{{ section.anchor }}">{{ section.title|plain }}</a></li>
{% endfor %}
</ul>
</nav>
<main id="content">
{% if page.notices %}
<aside aria-label="Notices" class="notices">
<ul>
{% for notice in page.notices %}
<li>{{ notice|plain }}</li>
{% endfor %}
</ul>
</aside>
{% endif %}
{% for section in page.sections %}
<section aria-labelledby="{{ section.anchor }}">
<h2 id="{{ section.anchor }}">{{ section.title|plain }}</h2>
{% for block in section.blocks %}
{{ one(block) }}
{% endfor %}
</section>
{% endfor %}
</main>
<footer><p>Made by fedlr from the files of this folder.</p></footer>
<script>{{ script|safe }}</script>
</body>
</html>
"""

_DARK = """\
--background: #15181c; --text: #ececec; --muted: #a3a8ae; --line: #363b42;
--panel: #1d2126; --link: #7cc4f2; --notice: #2f2a16; --edge: #e3c440; color-scheme: dark;"""

_LIGHT = """\
--background: #ffffff; --text: #1b1b1b; --muted: #5a5a5a; --line: #d9d9d9;
--panel: #f5f6f7; --link: #00588a; --notice: #fdf6df; --edge: #8a6d00; color-scheme: light;"""

STYLE = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{
  :root:not([data-theme="light"]) {{ {_DARK} }}
  :root:not([data-theme="light"]) .light {{ display: none; }}
  :root:not([data-theme="light"]) .dark {{ display: block; }}
}}
.dark {{ display: none; }}
:root[data-theme="dark"] {{ {_DARK} }}
:root[data-theme="dark"] .light {{ display: none; }}
:root[data-theme="dark"] .dark {{ display: block; }}

* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; line-height: 1.5;
  background: var(--background); color: var(--text);
  font-family: system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.25rem; margin: 0 0 .5rem; }}
p, ul {{ max-width: 48rem; margin: .5rem 0; }}
a {{ color: var(--link); }}
:focus-visible {{ outline: 3px solid var(--link); outline-offset: 2px; }}
.skip {{ position: absolute; left: -99rem; }}
.skip:focus {{ left: 1rem; top: .5rem; padding: .5rem; background: var(--background); z-index: 1; }}
header {{ display: flow-root; }}
.subtitle {{ color: var(--muted); }}
button {{ font: inherit; color: inherit; background: var(--panel); cursor: pointer;
  border: 1px solid var(--line); border-radius: .4rem; padding: .25rem .7rem; }}
#theme {{ float: right; margin: 0 0 .5rem 1rem; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; padding: 0; list-style: none;
  max-width: none; }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: 1.25rem; }}
.notices {{ border-left: .3rem solid var(--edge); background: var(--notice);
  padding: .25rem .75rem; margin: 1rem 0; border-radius: .25rem; }}
.notices ul {{ padding-left: 1.1rem; max-width: none; }}
dl {{ margin: .75rem 0; }}
dd {{ margin: 0; }}
.results {{ display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); }}
.results div {{ background: var(--panel); border: 1px solid var(--line); border-radius: .4rem;
  padding: .5rem .75rem; }}
.results dt {{ color: var(--muted); font-size: .875rem; }}
.results dd {{ font-size: 1.3rem; font-weight: 600; line-height: 1.3; }}
.facts div {{ display: grid; gap: 0 1rem; padding: .25rem 0; border-bottom: 1px solid var(--line);
  grid-template-columns: minmax(8rem, 14rem) minmax(0, 1fr); }}
.facts dt {{ color: var(--muted); }}
.facts dd {{ overflow-wrap: anywhere; }}
.figures {{ display: grid; gap: 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; max-width: 36rem; }}
figure svg {{ display: block; height: auto; }}
figcaption {{ color: var(--muted); font-size: .9rem; margin-top: .25rem; }}
.scroll {{ overflow-x: auto; margin: .75rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .35rem; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
th {{ font-weight: 600; }}
tbody th {{ white-space: nowrap; }}
td.long {{ min-width: 16rem; }}
thead th {{ vertical-align: bottom; }}
.number {{ text-align: right; white-space: nowrap; }}
th button {{ border: 0; background: none; padding: 0; font-weight: inherit; text-align: inherit; }}
/* After the slash: what is read aloud. */
th button::after {{ content: " \\21C5"; content: " \\21C5" / ""; color: var(--muted); }}
th[aria-sort$="scending"] button::after {{ color: inherit; }}
th[aria-sort="ascending"] button::after {{ content: " \\2191"; content: " \\2191" / ""; }}
th[aria-sort="descending"] button::after {{ content: " \\2193"; content: " \\2193" / ""; }}
.label {{ margin-bottom: .2rem; }}
pre {{ background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; margin: 0;
  padding: .6rem .75rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }}
summary {{ cursor: pointer; padding: .3rem 0; }}
footer {{ border-top: 1px solid var(--line); margin-top: 2rem; color: var(--muted);
  font-size: .9rem; }}
@media (max-width: 32rem) {{
  body {{ padding: .75rem; }}
  .facts div {{ grid-template-columns: minmax(0, 1fr); }}
  .results {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .results dd {{ font-size: 1.1rem; }}
}}
@media print {{
  :root, :root[data-theme="dark"], :root:not([data-theme="light"]) {{ {_LIGHT} }}
  :root .dark, :root[data-theme="dark"] .dark,
  :root:not([data-theme="light"]) .dark {{ display: none; }}
  :root .light, :root[data-theme="dark"] .light,
  :root:not([data-theme="light"]) .light {{ display: block; }}
  nav, .skip, #theme, th button::after {{ display: none; }}
  figure, tr, pre {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  .scroll, pre {{ overflow: visible; }}
  pre {{ white-space: pre-wrap; }}
  body {{ max-width: none; padding: 0; }}
}}
"""

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
  });
  dark.addEventListener("change", name);
  name();
  button.hidden = false;

  const key = (cell, numeric) => {
    const raw = cell.dataset.value;
    if (raw === undefined) return null;
    return numeric ? (raw === "inf" ? Infinity : Number(raw)) : raw;
  };
  const compare = (a, b, numeric) =>
    numeric ? (a === b ? 0 : a - b) : a.localeCompare(b, "en", { numeric: true });
  const sort = (table, heading, index) => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const numeric = heading.classList.contains("number");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row.cells[index], numeric), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return up ? compare(a, b, numeric) : compare(b, a, numeric);
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, index) => {
      const control = document.createElement("button");
      control.type = "button";
      control.append(...heading.childNodes);
      control.addEventListener("click", () => sort(table, heading, index));
      heading.append(control);
      heading.setAttribute("aria-sort", "none");
    });
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not([open])")) {
      fold.open = true;
      closed.push(fold);
    }
  });
  addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
})();
"""
