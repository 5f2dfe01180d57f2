"""A headless browser, by the plain HTTP of its driver, where this machine has one."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from helpers.waiting import HANG_S, POLL_S, until

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "" if DRIVER and BROWSER else "no browser here: Debian's packages are chromium and chromium-driver"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")


class Browser:
    """One window."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._session = ""

    async def open(self, dark: bool = False) -> None:
        """Begin a session."""
        flags = [*FLAGS, "--blink-settings=preferredColorScheme=0"] if dark else [*FLAGS]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": BROWSER, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = await self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        def asked() -> Any:
            link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=HANG_S)
            try:
                link.request(method, path, json.dumps(body) if body is not None else None)
                return json.loads(link.getresponse().read())["value"]
            finally:
                link.close()

        value = await asyncio.to_thread(asked)
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value.get('message', '')[:500]}")
        return value

    async def go(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Show a page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.devtools("Emulation.setDeviceMetricsOverride", **size)
        await self._ask("POST", f"{self._session}/url", {"url": url})

    async def devtools(self, command: str, **params: object) -> Any:
        """A command of the browser's own."""
        return await self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": params})

    async def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return await self._ask("POST", f"{self._session}/execute/sync", {"script": f"return {expression}", "args": []})

    async def eventually(self, expression: str) -> Any:
        """The value of an expression once it is true."""

        async def seen() -> Any:
            while not (value := await self.js(expression)):
                await asyncio.sleep(POLL_S)
            return value

        return await until(seen())

    async def press(self, *keys: str) -> None:
        """Press keys, one after another, such as `\\ue004` for Tab."""
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        await self._ask(
            "POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": presses}]}
        )

    async def complaints(self) -> list[str]:
        """What the page has written to the console since it was last asked."""
        return [entry["message"] for entry in await self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    async def barriers(self) -> list[Any]:
        """What axe finds that keeps people with a disability from using the page: rule, and where."""
        axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
        await self.devtools("Runtime.evaluate", expression=axe)
        found = "axe.run(document).then(all => all.violations.map(one => [one.id, one.nodes.map(node => node.html)]))"
        told = await self.devtools("Runtime.evaluate", expression=found, awaitPromise=True, returnByValue=True)
        return told["result"]["value"]

    async def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = await self.devtools("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    async def close(self) -> None:
        """End the session, and the browser with it."""
        if self._session:
            await self._ask("DELETE", self._session)


@asynccontextmanager
async def browser(folder: Path, *, dark: bool = False) -> AsyncIterator[Browser]:
    """A browser with its profile in `folder`; it ends with the block."""
    assert DRIVER is not None
    process = await asyncio.create_subprocess_exec(
        DRIVER, "--port=0", cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        port = None
        while port is None:
            line = (await until(process.stdout.readline())).decode()
            assert line, "the driver has ended"
            port = re.search(r"started successfully on port ([0-9]+)", line)
        window = Browser(int(port[1]))
        await window.open(dark=dark)
        try:
            yield window
        finally:
            await window.close()
    finally:
        process.terminate()
        await process.wait()
