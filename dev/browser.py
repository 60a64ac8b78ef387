"""ComfyUI's real frontend in a Chromium without a screen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = "window.app?.canvas && window.app.graph && !!window.LiteGraph?.registered_node_types['KSampler']"


@contextmanager
def frontend(url: str, width: int = 1600, height: int = 1000, messages: list[str] | None = None) -> Iterator[Page]:
    """A page with the frontend loaded; its console's errors go into `messages`."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        page = browser.new_page(viewport={"width": width, "height": height})
        if messages is not None:
            page.on("console", lambda m: messages.append(m.text + str(m.location)) if m.type == "error" else None)
            page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(url)
        page.wait_for_function(READY, timeout=60_000)
        yield page
        browser.close()


def open_workflow(page: Page, workflow: dict[str, Any], name: str = "workflow") -> None:
    """Opens a workflow in a tab of its own, as from a file."""
    page.evaluate("([w, n]) => app.loadGraphData(w, true, true, n)", [workflow, name])


def set_values(page: Page, node_type: str, values: dict[str, Any]) -> None:
    """Sets widgets of every node of a type, as a person would."""
    page.evaluate(
        """([type, values]) => {
            for (const node of app.graph.nodes.filter(n => n.type === type))
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find(w => w.name === name);
                    widget.value = value;
                    widget.callback?.(value, app.canvas, node);
                }
        }""",
        [node_type, values],
    )


def queue(page: Page) -> None:
    """Presses Run."""
    page.evaluate(
        """() => {
            window.ended = null;
            for (const type of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(type, event => { window.ended ??= [type, event.detail]; }, {once: true});
            return app.queuePrompt(0, 1);
        }"""
    )


def wait_for_end(page: Page, seconds: float = 300) -> str:
    """Waits until what was queued ended: "execution_success", "execution_error" or "execution_interrupted"."""
    page.wait_for_function("window.ended", timeout=seconds * 1000)
    return str(page.evaluate("window.ended[0]"))


def quiet_settings(base: Path, **more: Any) -> None:
    """Settings of the user `default` in a base directory: no greeting, no floating panels."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Minimap.Visible": False,
        "Comfy.Graph.CanvasInfo": False,
        "Comfy.Graph.CanvasMenu": False,
        **more,
    }
    path = base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
