"""Style of the report's page, light and dark, and the policy that lets it run and load nothing."""

POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #57606a; --ground: #f6f7f9; --card: #ffffff;
  --line: #d8dee4; --link: #0b5cad; --note: #fff4d6; --note-edge: #e0a800 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #a3adb8; --ground: #12161c; --card: #1b2129;
  --line: #343d48; --link: #7db8f5; --note: #33290f; --note-edge: #b08800 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; font-size: 16px }
header, main { max-width: 1020px; margin: 0 auto; padding: 0 20px }
header { padding-top: 28px } h1 { font-size: 1.7rem; margin: 0 0 4px }
header p { color: var(--soft); margin: 0 0 12px; max-width: none }
nav { display: flex; flex-wrap: wrap; gap: 8px } nav a { padding: 2px 12px; border: 1px solid var(--line);
  border-radius: 999px; background: var(--card); color: var(--link); text-decoration: none; font-size: .9rem }
nav a.missing { color: var(--soft); border-style: dashed }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 6px 24px 18px;
  margin: 20px 0 } h2 { font-size: 1.25rem; margin: 14px 0 8px }
p { margin: 8px 0; max-width: 46em } small { color: var(--soft) }
.scroll { overflow-x: auto; margin: 12px 0 } table { border-collapse: collapse; min-width: 60%; font-size: .93rem }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; font-size: .88rem }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-wrap }
th { font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; white-space: normal;
  overflow-wrap: normal }
td.name { white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: 6px } td.number { white-space: nowrap }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .5em;
  box-shadow: 0 0 0 1.5px var(--card), 0 0 0 2.5px var(--line) }
figure { margin: 18px 0; overflow-x: auto }
figure > svg { background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: 4px; display: block; min-width: 620px }
.note { background: var(--note); border-left: 4px solid var(--note-edge); padding: 8px 14px; border-radius: 4px }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; overflow-wrap: anywhere }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--link); font-size: .93rem }
@media print { body { background: #fff } section { break-inside: avoid; border: 0 } }
""".strip()
