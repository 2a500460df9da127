"""The look of the report: one style sheet, and a few functions that turn arrays and text into HTML.

In: text, uint8 pictures and clips. Out: HTML strings in which all media are base64 data URIs.
"""

from __future__ import annotations

import base64
import difflib
import html
import io

import numpy as np

from cosmos_jax import media
from data_pipelines.toy_world import sound, world

ZOOM = 3  # clips are enlarged before compression, so that colours survive it

STYLE = """
:root { --ink:#1d2433; --soft:#667085; --line:#e4e7ec; --paper:#fff; --ground:#f6f7f9; --good:#067647; --bad:#c4161c;
  --accent:#2557d6 }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1120px; margin:auto; padding:32px 24px 80px }
header h1 { font-size:34px; margin:0 0 8px; letter-spacing:-.02em }
h2 { margin:56px 0 12px; font-size:24px; letter-spacing:-.01em }
h3 { margin:32px 0 4px; font-size:18px }
p { margin:6px 0 12px; max-width:78ch }
nav a { margin-right:18px; color:var(--accent); text-decoration:none }
.soft, figcaption, .note { color:var(--soft); font-size:14px }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(330px,1fr)); gap:16px }
.card { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:14px;
  overflow-wrap:anywhere }
.card p { font-size:14px; margin:0 0 10px }
.pair { display:flex; gap:12px; flex-wrap:wrap }
figure { margin:0 } figcaption { margin-top:3px }
figure video, figure img { width:144px; border-radius:6px; display:block; image-rendering:pixelated }
table { border-collapse:collapse; width:100%; background:var(--paper); font-size:14px; border:1px solid var(--line) }
th, td { text-align:left; vertical-align:top; padding:8px 12px; border-bottom:1px solid var(--line) }
th { font-weight:600; color:var(--soft) } td.number { white-space:nowrap; font-variant-numeric:tabular-nums }
.good { color:var(--good) } .bad, .lost td.verdict, .lost td:first-child { color:var(--bad); font-weight:600 }
.lost { background:#fef3f2 } .upper { color:var(--soft) } mark { background:#fde2e1; color:var(--bad) }
.missing { border-left:4px solid var(--bad); padding:8px 14px; background:#fef3f2; border-radius:4px; font-size:14px }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(340px,1fr)); gap:16px }
.charts svg { width:100% } .pair svg { flex:1 1 220px; max-width:320px }
.wide { grid-template-columns:repeat(auto-fill,minmax(500px,1fr)) }
svg text { font:11px system-ui,sans-serif; fill:var(--soft) } svg .title { font-size:13px; fill:var(--ink) }
.strip { display:flex; gap:2px; margin:4px 0; width:100% }
.strip span { color:#fff; font-size:11px; padding:2px 0; text-align:center; border-radius:3px; overflow:hidden;
  min-width:3px }
figure img.mask { width:100%; max-width:300px; border:1px solid var(--line); border-radius:0 }
.key { display:inline-block; width:12px; height:12px; border-radius:3px; margin:0 5px 0 14px; vertical-align:-1px }
details { font-size:13px; margin-top:6px } summary { cursor:pointer; color:var(--accent) }
pre { overflow:auto; font-size:12px }
"""


class Missing(Exception):
    """Something a section needs is not there; the message says what, and how to get it."""


def missing(what: str, why: str) -> str:
    return f'<p class="missing"><b>{escape(what)}</b> is not available because {escape(why)}</p>'


def escape(text) -> str:
    return html.escape(str(text))


def page(title: str, lead: str, body: list[tuple[str, str, str]]) -> str:
    """A whole document; body: (anchor, heading, html)."""
    links = "".join(f'<a href="#{a}">{escape(t)}</a>' for a, t, _ in body)
    parts = "".join(f'<section id="{a}"><h2>{escape(t)}</h2>{content}</section>\n' for a, t, content in body)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main><header><h1>{escape(title)}</h1>{lead}<nav>{links}</nav></header>\n"
        f"{parts}</main></body></html>\n"
    )


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(image: np.ndarray, scale: int = 1) -> bytes:
    """uint8 [H,W,3] → PNG."""
    out = io.BytesIO()
    media.write_png(out, image, scale)
    return out.getvalue()


def picture(image: np.ndarray, caption: str = "", scale: int = 1, css: str = "") -> str:
    """uint8 [H,W,3] → a figure."""
    return _figure(f'<img class="{css}" alt="{escape(caption)}" src="{_uri("image/png", png(image, scale))}">', caption)


def clip(video: np.ndarray, caption: str, wave: np.ndarray | None = None, css: str = "") -> str:
    """uint8 [T,H,W,3], and float32 [2,N] if it has sound → a figure; a single frame becomes a picture."""
    if len(video) == 1:
        return picture(video[0], caption, ZOOM, css)
    out = io.BytesIO()
    media.write_mp4(out, video, world.FPS, wave, sound.RATE, ZOOM)
    play = "controls loop playsinline" + ("" if wave is not None else " muted autoplay")
    return _figure(f'<video class="{css}" {play} src="{_uri("video/mp4", out.getvalue())}"></video>', caption)


def _figure(inner: str, caption: str) -> str:
    return f"<figure>{inner}<figcaption>{escape(caption)}</figcaption></figure>"


def card(text: str, *figures: str) -> str:
    """text is HTML."""
    head = f"<p>{text}</p>" if text else ""
    return f'<div class="card">{head}<div class="pair">{"".join(figures)}</div></div>'


def cards(items, css: str = "") -> str:
    return f'<div class="cards {css}">{"".join(items)}</div>'


def table(head: list[str], rows: list[list[str]], css: list[str] | None = None) -> str:
    """Cells are HTML; css: one class per row."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    classes = css or [""] * len(rows)
    body = (
        f'<tr class="{c}">{"".join(cells)}</tr>'
        for c, cells in zip(classes, (map(_cell, r) for r in rows), strict=True)
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def compared(said: str, true: str) -> str:
    """What was said, with the words that are not in the truth marked."""
    a, b = true.split(), said.split()
    out = []
    for kind, _, _, start, stop in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        words = escape(" ".join(b[start:stop]))
        if words:
            out.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return " ".join(out) or "<mark>(nothing)</mark>"
