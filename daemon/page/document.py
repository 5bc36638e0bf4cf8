"""The page as one answer: its document with style and script inside, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_OPERATOR = re.compile(r"<!-- operator (on|off) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def document(*, operator: bool) -> tuple[bytes, dict[str, str]]:
    """The HTML, and its headers.

    Args:
        operator: whether operator actions are on: their controls are left out otherwise.
    """
    folder = files("daemon.page")
    style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    html = (folder / "page.html").read_text(encoding="utf-8")
    wanted = "on" if operator else "off"
    html = _OPERATOR.sub(lambda found: found[2] if found[1] == wanted else "", html)
    html = html.replace("{{style}}", style).replace("{{script}}", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{digest(script)}'",
            f"style-src '{digest(style)}'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    }
    return html.encode(), headers


def digest(text: str) -> str:
    """What a policy calls an inline script or style: sha256 of what stands between its tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
