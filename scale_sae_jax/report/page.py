"""A report as one HTML page that needs nothing beside it, and as Markdown."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; font-size: 0.8rem; }
div.wide { overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.command { text-align: left; font-family: monospace; font-size: 0.7rem; white-space: nowrap; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } }
"""


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn: FOLDER/name.png and .svg, and what it shows."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text under their headings; `commands` is the column set in type, if there is one."""

    title: str
    head: list[str]
    rows: list[list[str]]
    commands: str = ""


def html(title: str, lead: str, pictures: list[Picture], tables: list[Table], folder: Path) -> str:
    """The page; pictures are inside it."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(lead)}</p>"]
    for picture in pictures:
        data = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode()
        alt = escape(picture.caption, quote=True)
        parts += [
            f"<h2>{escape(picture.title)}</h2>",
            f'<img alt="{alt}" src="data:image/png;base64,{data}">',
            f"<p>{escape(picture.caption)}</p>",
        ]
    for table in tables:
        parts += [f"<h2>{escape(table.title)}</h2>", '<div class="wide"><table>']
        parts.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in table.head) + "</tr>")
        for row in table.rows:
            cells = zip(table.head, row, strict=True)
            kinds = {table.commands: ' class="command"'} if table.commands else {}
            parts.append("<tr>" + "".join(
                f"<td{kinds.get(name, '')}>{escape(value)}</td>" for name, value in cells
            ) + "</tr>")
        parts.append("</table></div>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def markdown(title: str, lead: str, pictures: list[Picture], tables: list[Table]) -> str:
    """The same with the pictures beside it."""
    parts = [f"# {title}", lead]
    for picture in pictures:
        parts += [f"## {picture.title}", f"![{picture.title}]({picture.name}.png)", picture.caption]
    for table in tables:
        parts += [f"## {table.title}", markdown_table(table.head, table.rows, len(table.head))]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A table as Markdown; columns after the first `left` stand to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(head))]
    clean = [[value.replace("|", "\\|") for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *clean))
