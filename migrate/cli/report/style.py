# SPDX-License-Identifier: GPL-2.0-or-later
"""The style sheet of a report: light or dark as the reader's system is, and light on paper."""

LIGHT = """
  --page: #ffffff; --text: #1b1f24; --muted: #59636e; --grid: #d9dee3; --band: #f3f5f7;
  --blue: #0072b2; --orange: #b25f00; --green: #00795a; --red: #c44f00; --purple: #a3487a;
"""
DARK = """
  --page: #15181c; --text: #e6e9ec; --muted: #a0a9b2; --grid: #353b42; --band: #1f2429;
  --blue: #56b4e9; --orange: #e69f00; --green: #2fc49a; --red: #ff8a4c; --purple: #e39ac2;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }}
h2 {{
  font-size: 1.2rem; margin: 2.2rem 0 0.4rem; padding-top: 0.6rem;
  border-top: 1px solid var(--grid);
}}
h3 {{ font-size: 1rem; margin: 1.2rem 0 0.4rem; }}
p {{ margin: 0.4rem 0; max-width: 46rem; }}
.lead {{ color: var(--muted); }}
.unknown {{ padding: 0.6rem 0.9rem; background: var(--band); border-left: 3px solid var(--muted); }}
dl.tiles {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.6rem;
  margin: 1rem 0;
}}
dl.tiles div {{ background: var(--band); padding: 0.6rem 0.8rem; border-radius: 0.3rem; }}
dl.tiles dt {{ color: var(--muted); font-size: 0.85rem; }}
dl.tiles dd {{ margin: 0; font-size: 1.15rem; font-weight: 600; }}
figure {{ margin: 0.8rem 0; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }}
svg image {{ image-rendering: pixelated; }}
svg.narrow {{ display: none; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--muted); padding: 0.3rem 0; }}
th, td {{
  text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--grid);
}}
th {{ font-weight: 600; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }}
.scrolls {{ overflow-x: auto; }}
footer {{ margin-top: 2.5rem; color: var(--muted); font-size: 0.85rem; }}
@media (max-width: 44rem) {{
  svg.wide {{ display: none; }}
  svg.narrow {{ display: block; }}
}}
@media print {{
  :root {{ color-scheme: light; {LIGHT} }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  svg.wide {{ display: block; }}
  svg.narrow {{ display: none; }}
  figure, table, dl.tiles div {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
  * {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
}}
@page {{ margin: 15mm; }}
"""
