"""A real Chromium without a window, by the standard library alone: DevTools' protocol over two pipes.

With `--remote-debugging-pipe` the browser reads JSON messages from its file descriptor 3 and writes them to
4, each ended by a zero byte (https://chromedevtools.github.io/devtools-protocol).
"""

import fcntl
import json
import os
import select
import shutil
import tempfile
import time

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
).split()
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}


def find() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `problems` collects the page's exceptions and whatever it writes to the console, `asked` the
    addresses that it asks for."""

    def __init__(self, program: str):
        self.profile, self.last, self.buffer = tempfile.mkdtemp(), 0, b""
        self.problems, self.asked, self.session = [], [], None
        pipes = os.pipe() + os.pipe()
        # above 9: the child's 3 and 4 must overwrite none of them
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipes]
        theirs_in, self.writes, self.reads, theirs_out = high
        nothing = os.open(os.devnull, os.O_RDWR)
        pairs = ((theirs_in, 3), (theirs_out, 4), (nothing, 1), (nothing, 2))
        actions = [(os.POSIX_SPAWN_DUP2, old, new) for old, new in pairs]
        command = [program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = os.posix_spawn(program, command, os.environ, file_actions=actions)
        for fd in (*pipes, theirs_in, theirs_out, nothing):
            os.close(fd)
        target = self.call("Target.getTargets")["targetInfos"][0]["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, timeout: float = 30, **params) -> dict:
        """A command of the protocol, and its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            message = self.receive(deadline)
            if message.get("id") == self.last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def receive(self, deadline: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reads], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.reads, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("no answer from the browser")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(params["exceptionDetails"]["exception"]["description"])
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.problems.append(json.dumps(params))
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
        return message

    def open(self, path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Load a file and wait until it is painted."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.problems, self.asked = [], []
        self.call("Page.navigate", url=f"file://{path}")
        done = "document.readyState === 'complete' ? done() : addEventListener('load', done)"
        self(f"new Promise((done) => {done})")
        self.paint()

    def __call__(self, expression: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def paint(self) -> None:
        """Wait for two frames: what was asked for has been drawn."""
        self("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.paint()

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            self.call("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **code)
        self.paint()

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)
        self.paint()

    def close(self) -> None:
        self.session = None
        try:
            self.call("Browser.close")
        except (OSError, TimeoutError):
            pass
        for _ in range(100):
            if os.waitpid(self.process, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.kill(self.process, 9)
            os.waitpid(self.process, 0)
        os.close(self.reads)
        os.close(self.writes)
        shutil.rmtree(self.profile, ignore_errors=True)
