"""A model behind an OpenAI-compatible address: chat completions with audio in and, if a voice is named, audio out."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import soundfile

from processing.audio_input_ttt import load_waveform
from training_examples.evaluation.backends import Answer, Sample, Turn

SENT_RATE = 24_000  # Hz of the recordings that are sent
ATTEMPTS, PAUSE = 4, 1.0  # of a request, and the seconds after the first; each pause is twice the one before
TIMEOUT = 600.0
TRANSCRIBE = "Write down what is said, word for word, and nothing else."
BUSY = (408, 409, 429, 500, 502, 503, 504)


class AddressError(OSError):
    """An address that cannot be asked, or refuses what it is asked."""


def chat(address: str, body: Mapping[str, Any], api_key: str | None = None) -> dict[str, Any]:
    """
    Return the message that chat completions answer. Addresses that are busy or not reached are asked again.

    Args:
        address (`str`): up to `/v1`.
        body (`Mapping`): the request.
        api_key (`str`, *optional*): sent as a bearer token.

    Raises:
        AddressError: If the address refuses, is not reached, or answers in another form.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    url = f"{address.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content = json.loads(response.read())
            return content["choices"][0]["message"]
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            if error.code not in BUSY or attempt == ATTEMPTS - 1:
                raise AddressError(f"{url} answered {error.code}: {said}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if attempt == ATTEMPTS - 1:
                raise AddressError(f"{url} is not reached: {error}") from error
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise AddressError(f"{url} answers in another form than chat completions: {error!r}") from error
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


class OpenAIBackend:
    """
    A model behind an OpenAI-compatible address. Samples of a batch are asked side by side.

    Args:
        address (`str`): up to `/v1`.
        model (`str`): its name there.
        voice (`str`, *optional*): asks for speech in this voice; without one, for text alone.
        api_key (`str`, *optional*): sent as a bearer token.
        options (`Mapping`, *optional*): further fields of the request, such as `temperature` or `max_tokens`.
    """

    def __init__(
        self,
        address: str,
        model: str,
        voice: str | None = None,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.address, self.model, self.voice, self.api_key = address, model, voice, api_key
        self.options = dict(options or {})
        self.name = f"{model} at {address}"
        self.settings: Mapping[str, Any] = {
            "model": model, "address": address, "voice": voice, "options": self.options
        }  # fmt: skip

    def answer(self, samples: Sequence[Sample], task: str) -> list[Answer | Exception]:
        """Answer samples, each turn by turn; earlier answers are sent back as text. An address knows no tasks, so where
        a sample has no words of its own, recognition is asked for in words. A sample that fails has its error in the
        place of its answer, so that the others need not be asked again."""
        # Our own server is told the task in its extension of the request: `ttt={"task": "asr"}`.
        request = TRANSCRIBE if task == "asr" and "ttt" not in self.options else None

        def answer(sample: Sample) -> Answer | Exception:
            try:
                return self._answer(sample, request)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(samples)) as pool:
            return list(pool.map(answer, samples))

    def _answer(self, sample: Sample, request: str | None) -> Answer:
        begin = time.perf_counter()
        messages: list[dict[str, Any]] = []
        answer = Answer("")
        for place, turn in enumerate(sample.turns):
            if place:
                messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": _content(turn, request)})
            earlier = [*answer.earlier, answer.text] if place else []
            answer = self._ask(messages)
            answer.earlier = earlier
        answer.seconds = time.perf_counter() - begin
        return answer

    def _ask(self, messages: list[dict[str, Any]]) -> Answer:
        body: dict[str, Any] = {"model": self.model, "messages": messages, **self.options}
        if self.voice is not None:
            body |= {"modalities": ["text", "audio"], "audio": {"voice": self.voice, "format": "wav"}}
        message = chat(self.address, body, self.api_key)
        spoken = message.get("audio") or {}
        text = message.get("content") or spoken.get("transcript") or ""
        if not spoken.get("data"):
            return Answer(text)
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(spoken["data"])), dtype="float32", always_2d=True)
        return Answer(text, wave.mean(axis=1), rate)


def _content(turn: Turn, request: str | None) -> Any:
    """Return a user's turn as content of a message: text first, as the paper's prompts have it."""
    if turn.audio is None:
        return turn.text or ""
    buffer = io.BytesIO()
    soundfile.write(buffer, load_waveform(turn.audio, SENT_RATE), SENT_RATE, format="WAV", subtype="PCM_16")
    audio = {"data": base64.b64encode(buffer.getvalue()).decode(), "format": "wav"}
    text = [{"type": "text", "text": turn.text or request}] if turn.text or request else []
    return [*text, {"type": "input_audio", "input_audio": audio}]
