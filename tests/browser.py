"""A real browser for pages: what it draws, complains about, and asks the network for."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium (Debian)"
)
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_CONSOLE = re.compile(r"^\[[^\]]*:CONSOLE[^\]]*\] (.*)$", re.MULTILINE)
_BROWSER = "not an origin"
# Chromium refuses root a sandbox; no host has an address.
FLAGS = (
    *(("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()),
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=4000",
    "--enable-logging=stderr",
    "--v=0",
)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page.

    Attributes:
        dom: The document after its scripts ran.
        console: Messages on the console, those of errors included.
        asked: Addresses that were asked of the network.
    """

    dom: str
    console: list[str]
    asked: list[str]


def opened(page: Path, *flags: str) -> Seen:
    """Open a file in a headless Chromium for which no host on the network has an address."""
    log = page.with_suffix(".netlog.json")
    done = subprocess.run(  # noqa: S603 - a browser, on our own page
        [
            str(CHROMIUM),
            *FLAGS,
            f"--log-net-log={log}",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Seen(done.stdout, _CONSOLE.findall(done.stderr), _asked(log))


def _asked(log: Path) -> list[str]:
    """Addresses in a log of Chromium's network stack; those of files are no network's.

    What the browser asks for on its own account has no initiator there.
    """
    events: list[dict[str, Any]] = json.loads(log.read_text("utf-8"))["events"]
    parameters = [event.get("params", {}) for event in events]
    found = {
        str(known["url"])
        for known in parameters
        if "url" in known and known.get("initiator", _BROWSER) != _BROWSER
    }
    return sorted(url for url in found if url.startswith(("http:", "https:", "ws:", "wss:")))


def with_script(page: str, script: str) -> str:
    """The page with one more script at its end, and without the policy that would refuse it."""
    changed, count = _POLICY.subn("", page)
    assert count == 1
    return changed.replace("</body>", f"<script>{script}</script></body>")


def on_a_phone(page: str, script: str) -> str:
    """A page that shows `page` 390 pixels wide and runs `script` with its `inner` document."""
    return (
        "<!doctype html><body>"
        f'<iframe srcdoc="{html.escape(page)}" style="width:390px;height:800px;border:0"></iframe>'
        "<script>onload = () => setTimeout(() => {"
        "const inner = document.querySelector('iframe').contentDocument;"
        f"document.body.dataset.seen = ({script});"
        "}, 1000)</script></body>"
    )


def told(seen: Seen) -> str:
    """What a script of a test has written into `document.body.dataset.seen`."""
    found = re.search(r'data-seen="([^"]*)"', seen.dom)
    assert found, seen.console
    return html.unescape(found[1])
