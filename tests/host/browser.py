"""A page of a real ComfyUI in Chromium: opening workflows, running them, and what our extensions show."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from host import OURS, Host

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# What ComfyUI's page itself asks of the internet, or of parts that these servers do not have.
FOREIGN = ("ERR_", "Failed to load resource", "net::", "api.comfy.org", "registry")

# Newer pages open a workflow of their own, after all else is there: what was put into the graph before is gone then.
READY = """window.app?.graph && window.app?.extensionManager && window.app?.vueAppReady
    && (!("isGraphReady" in window.app) || window.app.extensionManager.workflow.activeWorkflow?.isLoaded)"""

IDLE = """() => new Promise((done) => {
    requestAnimationFrame(() => requestIdleCallback(() => requestAnimationFrame(done), { timeout: 10000 }));
})"""


def missing_browser() -> str | None:
    """Why there can be no browser tests here, or None."""
    if CHROMIUM is None:
        return "no Chromium on the PATH (Debian: apt-get install chromium)"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if os.environ.get("COMFYUI_FRONTEND") else "set COMFYUI_FRONTEND to a frontend package's static folder"


class ComfyPage:
    """One open page. `console` holds what it wrote there, errors and warnings only."""

    def __init__(self, host: Host, page: Any, vue: bool) -> None:
        self.host, self.page, self.vue, self.console = host, page, vue, []
        self._asking: set[Any] = set()  # requests to our server that are not answered yet
        page.on("request", lambda one: self._asking.add(one) if f":{host.port}/" in one.url else None)
        for ended in ("requestfinished", "requestfailed"):
            page.on(ended, lambda one: self._asking.discard(one))  # playwright takes no builtin
        page.on("console", lambda m: self.console.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", self._uncaught)
        page.on("dialog", self._answer)
        settings = {"Comfy.VueNodes.Enabled": vue, "Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False,
                    "Comfy.InstalledVersion": "1.58.1", "Comfy.Release.Status": "skip",
                    "Comfy.ColorPalette": "dark"}  # fmt: skip
        for name, value in settings.items():
            host.request(f"/settings/{name}", value)
        page.goto(f"http://127.0.0.1:{host.port}/")
        page.wait_for_function(READY, timeout=120_000)

    def _uncaught(self, error: Any) -> None:
        """An error of the page, but for those of a library that ComfyUI 0.3.75 keeps the page of 1.49 from loading."""
        if "/vendor-three" not in (error.stack or ""):
            self.console.append(f"uncaught: {error}")

    def _answer(self, dialog: Any) -> None:
        """Leave a page with unsaved changes when asked; any other dialog is a complaint."""
        if dialog.type == "beforeunload":
            dialog.accept()
            return
        self.console.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, as dropping its file does."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
        self.settle()

    def workflow(self) -> dict[str, Any]:
        """The open workflow as it would be saved."""
        return self.page.evaluate("JSON.parse(JSON.stringify(window.app.graph.serialize()))")

    def prompt(self) -> dict[str, Any]:
        """What the page would send for the open workflow, in API format."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def run(self, timeout: float = 300) -> dict[str, Any]:
        """Press Run, and the history of the run when it is done."""
        known = set(self.host.get("/history"))
        self.page.evaluate("window.app.queuePrompt(0, 1)")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.page.wait_for_timeout(300)
            new = [one for name, one in self.host.get("/history").items() if name not in known]
            if new and (new[0]["status"]["completed"] or new[0]["status"]["status_str"] == "error"):
                self.settle(300)
                return new[0]
        raise TimeoutError("\n".join([*self.console, self.host.log()[-2000:]]))

    def settle(self, least: int = 500) -> None:
        """Wait so many milliseconds, and until the page has nothing left to ask of the server or to draw."""
        self.page.wait_for_timeout(least)
        end = time.monotonic() + 60
        while self._asking and time.monotonic() < end:
            self.page.wait_for_timeout(50)
        self.page.evaluate(IDLE)

    def until(self, expression: str, timeout: float = 60) -> Any:
        """Wait until JavaScript is true."""
        return self.page.wait_for_function(expression, timeout=timeout * 1000)

    def within(self, seconds: float, expression: str) -> bool:
        """Whether JavaScript becomes true so soon."""
        end = time.monotonic() + seconds
        while not (found := self.page.evaluate(expression)) and time.monotonic() < end:
            self.page.wait_for_timeout(200)
        return bool(found)

    def screenshot(self, path: Path, fit: bool = True) -> None:
        """A picture of the page, the whole workflow in view."""
        if fit:
            self.page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            self.settle(700)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))

    def keep(self, name: str, fit: bool = True) -> None:
        """A screenshot to look at, where SAFE_REGION_SCREENSHOTS names a folder."""
        if folder := os.environ.get("SAFE_REGION_SCREENSHOTS"):
            self.page.wait_for_timeout(700)
            self.screenshot(Path(folder) / f"{name}-{'nodes2' if self.vue else 'canvas'}.png", fit)

    def complaints(self) -> list[str]:
        """Errors and warnings that are ours: those that name us, and all uncaught ones."""
        theirs = [text for text in self.console if not any(word in text for word in FOREIGN)]
        return [text for text in theirs
                if any(name in text for name in OURS) or text.startswith(("uncaught", "dialog"))]  # fmt: skip


def add_blueprint(comfy_page: Any, name: str) -> None:
    """Find a blueprint by its name and put it into the open workflow."""
    page = comfy_page.page
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.locator("input:focus").wait_for()
    page.keyboard.type(name)
    page.get_by_text(name).last.wait_for()
    comfy_page.settle()
    page.keyboard.press("Enter")
    comfy_page.settle(300)
    page.mouse.click(800, 900)  # newer frontends ask where
    comfy_page.until(f"window.app.graph.nodes.some((node) => node.title === '{name}')")
