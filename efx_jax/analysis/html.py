"""Pieces of an HTML page. Text becomes `Html` only in `text`, so that nothing goes in unescaped."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

Html = NewType("Html", str)
"""Markup that is complete and escaped."""

_VOID = ("meta", "circle", "line", "path", "polyline", "rect")
# Control characters, including those for text direction, halves of surrogate pairs and noncharacters.
_FORBIDDEN = re.compile(
    "[^\t\n -~\u00a0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]"
)
_TITLE = 70  # characters that browsers and search results show
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def text(words: str) -> Html:
    """Plain text as markup; characters that HTML cannot contain become replacement characters."""
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", words.replace("\r\n", "\n").replace("\r", "\n"))))


def join(parts: Iterable[Html], between: str = "") -> Html:
    """Pieces of markup joined, with plain text between them."""
    return Html(text(between).join(parts))


def element(tag: str, content: Html | str = "", attributes: Mapping[str, str | float] | None = None) -> Html:
    """One element.

    Args:
        tag: its name.
        content: its content, as made by `text` or this function.
        attributes: name -> plain text or number.
    """
    written = "".join(f' {name}="{text(_plain(value))}"' for name, value in (attributes or {}).items())
    if tag in _VOID and not content:
        return Html(f"<{tag}{written}>" if tag == "meta" else f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{content}</{tag}>")


def paragraph(words: str, look: str = "") -> Html:
    """A paragraph of plain text, optionally with a class."""
    return element("p", text(words), {"class": look} if look else {})


def code(lines: str) -> Html:
    """Lines to copy."""
    return element("pre", element("code", text(lines)), {"tabindex": "0", "dir": "auto"})


def section(name: str, title: str, parts: Iterable[Html]) -> Html:
    """A part of the page with a heading, linked as `#name`."""
    heading = element("h2", text(title), {"id": f"{name}-title"})
    return element("section", join([heading, *parts], "\n"), {"id": name, "aria-labelledby": f"{name}-title"})


def fold(title: Html, parts: Iterable[Html]) -> Html:
    """Content that stays collapsed until a reader opens it."""
    return element("details", join([element("summary", title), *parts], "\n"))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Html]], numbers: bool = True) -> Html:
    """A table that scrolls by itself if it is too wide for the page.

    Args:
        caption: what it shows.
        header: names of the columns.
        rows: cells; the first cell of a row names it.
        numbers: whether the other cells are numbers, which are right-aligned.
    """
    top = join(element("th", text(name), {"scope": "col"}) for name in header)
    lines = [
        element("tr", join([element("th", first, {"scope": "row"}), *(element("td", cell) for cell in rest)]))
        for first, *rest in rows
    ]
    parts = [
        element("caption", text(caption)),
        element("thead", element("tr", top)),
        element("tbody", join(lines, "\n")),
    ]
    look = "numbers" if numbers else "words"
    whole = element("table", join(parts, "\n"), {"class": look})
    return element("section", whole, {"class": "wide", "aria-label": caption, "tabindex": "0"})


def page(title: str, style: str, parts: Iterable[Html]) -> Html:
    """A whole document that loads nothing, whatever it contains: its policy forbids scripts, frames and requests."""
    head = [
        element("meta", attributes={"charset": "utf-8"}),
        element("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", attributes={"name": "color-scheme", "content": "light dark"}),
        element("meta", attributes={"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("title", text(title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…")),
        element("style", Html(style)),
    ]
    body = element("main", join(parts, "\n"))
    whole = join([element("head", join(head, "\n")), element("body", body)], "\n")
    return Html(f"<!DOCTYPE html>\n{element('html', whole, {'lang': 'en'})}\n")


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
