"""A browser for the tests of pages, on a desktop and on a phone."""

import os
import shutil
from pathlib import Path

import pytest


DESKTOP = dict(viewport={"width": 1280, "height": 900})
PHONE = dict(viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, is_mobile=True)
DEVICES = {"desktop": DESKTOP, "phone": PHONE}


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright: pip install -r requirements-dev.txt"
    )
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        found = own if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("no browser: apt install chromium, or playwright install chromium")
        as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        launched = driver.chromium.launch(executable_path=found, args=as_root)
        yield launched
        launched.close()


@pytest.fixture(params=DEVICES)
def open_page(request, browser):
    """Opens a page on each device; checks at the end that only the file was requested, and that nothing failed."""
    context, asked, wrong = browser.new_context(**DEVICES[request.param]), [], []
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.device = request.param

    def go(path):
        page.goto(path.as_uri())
        return page

    yield go
    assert wrong == []
    assert asked
    assert all(address.startswith("data:") or address == asked[0] for address in asked)
    context.close()


def wait_for(page, said, expression):
    """Waits until the expression is true; the page's security policy blocks Playwright's own `wait_for_function`."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{said}: {expression}")
