"""A browser for tests of the page: headless Chromium with a fake microphone, and ears at the page's own output."""

import base64
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from serving import RunningServer
from starlette.responses import Response
from starlette.routing import Route

WAIT = 60_000  # ms after which a test gives up
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Every node that is connected to the loudspeaker is connected to a recorder as well; the page knows nothing of it.
EARS = """
window.heard = [];
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (target, ...rest) {
  if (target instanceof AudioDestinationNode) {
    this.context.audioWorklet.addModule("test-ears.js").then(() => {
      const ears = new AudioWorkletNode(this.context, "ears", { numberOfOutputs: 0 });
      ears.port.onmessage = ({ data }) => window.heard.push(data);
      connect.call(this, ears);
    });
  }
  return connect.call(this, target, ...rest);
};
window.takeHeard = () => {
  const pieces = window.heard.splice(0);
  const bytes = new Uint8Array(new Int16Array(pieces.flatMap((piece) => [...piece])).buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
};
"""
EARS_WORKLET = """
class Ears extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) this.port.postMessage(Int16Array.from(channels[0], (sample) => Math.round(sample * 32767)));
    return true;
  }
}
registerProcessor("ears", Ears);
"""
# A microphone at the device's own rate that says the question when it is told to.
MOUTH = """
navigator.mediaDevices.getUserMedia = async () => {
  const context = new AudioContext({ sampleRate: 48000 });
  const output = context.createMediaStreamDestination();
  window.say = async () => {
    await context.resume();
    const file = await (await fetch("test-question.wav")).arrayBuffer();
    const source = new AudioBufferSourceNode(context, { buffer: await context.decodeAudioData(file) });
    source.connect(output);
    source.start();
    await new Promise((resolve) => source.addEventListener("ended", resolve));
  };
  return output.stream;
};
"""
# What some browsers do: no microphone in a context of another rate than the device's, which is 44.1 kHz.
OTHER_RATE = """
window.AudioContext = class extends AudioContext {
  constructor(options) {
    super(options ?? { sampleRate: 44100 });
  }
  createMediaStreamSource(stream) {
    if (this.sampleRate !== 44100) throw new DOMException("another rate", "NotSupportedError");
    window.capturedAt = this.sampleRate;
    return super.createMediaStreamSource(stream);
  }
};
"""


@contextlib.contextmanager
def launch(microphone: Path | None = None) -> Iterator:
    """Start Chromium; what the microphone hears is a WAV file, from its beginning whenever it is opened."""
    sync_api = pytest.importorskip("playwright.sync_api", reason='no Playwright: pip install -e ".[browser]"')
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream"]
    if microphone is not None:
        arguments.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def offer_ears(server: RunningServer) -> None:
    """Have the server offer the recorder's worklet: the page's policy takes scripts from nowhere else."""

    async def ears(request) -> Response:
        return Response(EARS_WORKLET, media_type="text/javascript")

    server.server.config.app.router.routes.insert(0, Route("/test-ears.js", ears))


class Visitor:
    """The page in a browser context of its own, with what it sent and received."""

    def __init__(self, browser, server: RunningServer, question: Path, scripts=(), microphone: bool = True, **options):
        self.context = browser.new_context(permissions=["microphone"] if microphone else [], **options)
        self.context.set_default_timeout(WAIT)
        self.page = self.context.new_page()
        self.sent: list[dict] = []
        self.received: list[dict] = []
        self.faults: list[str] = []
        self.page.on("websocket", self._watch)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.route("**/test-question.wav", lambda route: route.fulfill(path=question, content_type="audio/wav"))
        for script in (EARS, *scripts):
            self.page.add_init_script(f"(() => {{{script}}})();")
        offer_ears(server)
        self.page.goto(server.url)

    def _watch(self, socket) -> None:
        socket.on("framesent", lambda payload: self.sent.append(json.loads(payload)))
        socket.on("framereceived", lambda payload: self.received.append(json.loads(payload)))

    def connected(self) -> "Visitor":
        self.page.wait_for_selector("#connection[data-state=open]")
        return self

    def ask(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")

    def answered(self, number: int = 1) -> str:
        """Wait until answer `number` is complete and played; return its text."""
        turn = self.page.locator(".turn.model").nth(number - 1)
        turn.locator(".words").wait_for()
        self.page.wait_for_selector("body:has(#stop[hidden]):not(:has([aria-busy=true]))")
        return turn.locator(".words").inner_text()

    def events(self, kind: str, of_page: bool = False) -> list[dict]:
        return [event for event in (self.sent if of_page else self.received) if event["type"] == kind]

    def sound_sent(self) -> np.ndarray:
        """The answers' samples as the server sent them, PCM16."""
        deltas = [base64.b64decode(event["delta"]) for event in self.events("response.output_audio.delta")]
        return np.frombuffer(b"".join(deltas), "<i2").astype(np.float64)

    def heard(self) -> np.ndarray:
        """What came out of the page since this was last asked, PCM16."""
        return np.frombuffer(base64.b64decode(self.page.evaluate("takeHeard()")), "<i2").astype(np.float64)

    def close(self) -> None:
        faults, self.faults = self.faults, []
        self.context.close()
        assert not faults, faults


def padded_wav(path: Path, question: Path, before: float, after: float) -> Path:
    """Write the question with silence around it, in seconds, as a WAV file of PCM16."""
    samples, rate = soundfile.read(question, dtype="float32")
    silence = [np.zeros(int(seconds * rate), np.float32) for seconds in (before, after)]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate([silence[0], samples, silence[1]]), rate, format="WAV", subtype="PCM_16")
    path.write_bytes(buffer.getvalue())
    return path
