"""The web page at GET /, which shows where a text exits and why; its style and script are inline."""

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse


def _source(style: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"


@cache
def page() -> HTMLResponse:
    """The response with the page.

    Its policy permits only its own script and style, data: images, and requests to this server.
    """
    html, style, script = (
        (files(__name__) / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace('<script type="module"></script>', f'<script type="module">{script}</script>')
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})
