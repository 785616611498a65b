"""report.html: one self-contained page, in light and dark."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from mimfast.recipes import describe, sizes
from mimfast.settings import to_toml
from mimfast.train.screen import clock

if TYPE_CHECKING:
    from mimfast.report import Facts, Table

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2129; --soft: #5f6775; --rule: #e3e6eb; --card: #f6f7f9;
--blue: #2563eb; --pale: #a9c4f0; } @media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e9ee; --soft: #98a1b0; --rule: #2b313a; --card: #1c2027; --blue: #6ea0ff;
  --pale: #35507f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p, li { color: var(--soft); margin: .35rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.facts div { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; }
.facts b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .75rem; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; font-size: .9rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody.first tr:first-child td { font-weight: 650; }
img { max-width: 100%; height: auto; border-radius: .6rem; display: block; background: #fff; }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { stroke: var(--pale); stroke-width: 1.5; } svg .line { stroke: var(--blue); stroke-width: 2.5; }
pre { background: var(--card); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .82rem; line-height:
1.5; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin-top: 2.5rem; }
"""


def render(
    facts: "Facts",
    tables: list["Table"],
    sheet: Image.Image | None,
    curve: str,
    lines: list[dict[str, Any]],
    versions: dict[str, str],
) -> str:
    """The page as text.

    Args:
        facts: about the run.
        tables: in the order shown.
        sheet: the reconstruction sheet.
        curve: an SVG element.
        lines: of metrics.jsonl.
        versions: name -> version.
    """
    recipe = facts.recipe
    parts = [
        f"<h1>{_text(recipe.run.name)}</h1>",
        f"<p>{_text(describe(recipe))}, {sizes(recipe)}, trained on {_text(recipe.data.path)}: "
        f"{facts.train_images} images, {facts.held_out_images} more held out.</p>",
        _numbers(facts, lines),
    ]
    waited = who_waited(lines)
    if waited is not None:
        parts.append(f"<p>{_text(waited)}</p>")
    for table in tables:
        parts += [f"<h2>{_text(table.title)}</h2>", _table(table.head, table.rows, "first")]
        parts += [f"<p>{_text(note)}</p>" for note in table.notes]
    if sheet is not None:
        parts += ["<h2>Held-out images, hidden and predicted</h2>", _picture(sheet)]
        parts += ["<p>Where the encoder saw the image, the prediction shows the original.</p>"]
    parts += ["<h2>Loss</h2>", curve, _bad(facts.bad)]
    parts += [
        "<details open><summary>Versions</summary>",
        _table(["", ""], [[k, v] for k, v in versions.items()], ""),
        "</details>",
    ]
    parts += [f"<details><summary>Configuration</summary><pre>{_text(to_toml(recipe))}</pre></details>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(recipe.run.name)} - mimfast</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def who_waited(lines: list[dict[str, Any]]) -> str | None:
    """One sentence: how long the step waited for images, and what the loader did. lines: of metrics.jsonl."""
    lines = lines[1:] or lines  # the first interval holds the start-up
    if not lines:
        return None
    waited = 100 * sum(line["data_wait"] for line in lines) / len(lines)
    text = f"data: the step waited {waited:.1f} % of the time"
    stages = {"reading": "data_read_s", "decoding": "data_decode_s", "cropping": "data_crop_s"}
    spent = {name: sum(line.get(key, 0.0) for line in lines) for name, key in stages.items()}
    whole = sum(spent.values())
    if not whole:
        return text
    order = sorted(spent, key=lambda name: -spent[name])
    told = ", ".join(f"{100 * spent[name] / whole:.0f} % {name}" for name in order if spent[name] >= 0.005 * whole)
    return f"{text}; the loader spent {told}"


def _numbers(facts: "Facts", lines: list[dict[str, Any]]) -> str:
    batches = facts.recipe.progress.batch_sizes or [facts.recipe.optim.batch_size]
    cells = [
        ("steps", f"{facts.steps:,}"),
        ("training time", clock(facts.seconds)),
        ("images per step", ", ".join(f"{n:,}" for n in dict.fromkeys(batches))),
    ]
    if lines:
        # the first interval holds the start-up
        later = lines[1:] or lines
        cells += [
            ("final loss", f"{lines[-1]['loss']:.4f}" if lines[-1]["loss"] is not None else "n/a"),
            ("images per second", f"{sum(line['images_per_second'] for line in later) / len(later):,.0f}"),
            ("waiting for data", f"{100 * sum(line['data_wait'] for line in later) / len(later):.1f} %"),
            ("peak memory", f"{max(line['memory'] for line in lines) / 2**30:.2f} GiB"),
            ("steps skipped", str(lines[-1]["skipped"])),
        ]
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in cells)
        + "</div>"
    )


def _table(head: list[str], rows: list[list[str]], kind: str) -> str:
    top = "<thead><tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr></thead>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody class="{kind}">{body}</tbody></table></div>'


def _bad(bad: list[tuple[str, str]]) -> str:
    if not bad:
        return "<h2>Unreadable images</h2><p>None.</p>"
    shown = [list(pair) for pair in bad[:200]]
    more = f"<p>and {len(bad) - 200} more</p>" if len(bad) > 200 else ""
    return (
        f"<h2>Unreadable images: {len(bad)}</h2><p>Each was replaced by another image.</p>"
        + _table(["file", "reason"], shown, "")
        + more
    )


def _picture(image: Image.Image) -> str:
    memory = io.BytesIO()
    image.save(memory, "PNG", optimize=True)
    data = base64.b64encode(memory.getvalue()).decode()
    return f'<img alt="original, what the encoder saw, prediction" src="data:image/png;base64,{data}">'


def _text(value: str) -> str:
    return html.escape(str(value))
