"""The page of ttt-serve: its files, its logic under Node.js, and the whole of it in headless Chromium, which asks by
voice and is heard."""

import contextlib
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from browser import MOUTH, OTHER_RATE, Visitor, launch, padded_wav
from serving import ANSWER, QUESTION, ROOT, SECONDS, serve, words_of

from modeling_ttt import TttForConditionalGeneration
from pipelines.serving.engine_requests import GenerationRequest
from processing import TttProcessor

STATIC = ROOT / "pipelines" / "serving" / "static"
TINY = ROOT / "model_cards" / "ttt-tiny"
KEY = "a-key-for-these-tests"
# Keeps the microphone's track where a test can look at it.
TRACK = """
const ask = navigator.mediaDevices.getUserMedia;
navigator.mediaDevices.getUserMedia = async (...what) => {
  const stream = await ask(...what);
  [window.track] = stream.getAudioTracks();
  return stream;
};
"""
LONG = "count from three to nine"
needs_tiny = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the default model is not there")


# ---- the files -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_inline_and_nothing_from_elsewhere():
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=", html)
    for path in STATIC.iterdir():
        addresses = re.findall(r"https?://[\w./-]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path.name


def test_every_file_the_page_names_is_there_and_flat_as_the_package_data_takes_them():
    named = re.findall(r'(?:src|href)="([^"#]+)"', (STATIC / "index.html").read_text())
    for path in STATIC.glob("*.js"):
        text = path.read_text()
        named += re.findall(r'from "\./([^"]+)"', text) + re.findall(r'addModule\("([^"]+)"\)', text)
    assert len(named) > 15
    assert [name for name in named if not (STATIC / name).is_file()] == []
    assert all(path.is_file() for path in STATIC.iterdir())


def test_the_logic_of_the_page_under_node(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js")
    for path in [*STATIC.glob("*.js"), ROOT / "tests" / "page" / "logic.test.mjs"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    command = [node, "--test", "logic.test.mjs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = TttForConditionalGeneration.from_pretrained(TINY, dtype="float32").eval()
    return model, TttProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def server(tiny):
    with serve(*tiny) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    microphone = padded_wav(tmp_path_factory.mktemp("microphone") / "question.wav", QUESTION, 0.7, 4.0)
    with launch(microphone) as started:
        yield started


@pytest.fixture
def visit(browser):
    """Opens the page; whatever goes wrong in its code fails the test."""
    with contextlib.ExitStack() as stack:

        def opened(server, *scripts, **options) -> Visitor:
            visitor = Visitor(browser, server, QUESTION, scripts, **options)
            stack.callback(visitor.close)
            return visitor

        yield opened


def assert_all_is_heard(visitor: Visitor, sent: np.ndarray | None = None) -> np.ndarray:
    """What came out of the page is what the server sent, all of it and once."""
    sent, heard = visitor.sound_sent() if sent is None else sent, visitor.heard()
    assert len(sent) > 24_000 and np.abs(sent).max() > 1500
    assert np.square(heard).sum() == pytest.approx(np.square(sent).sum(), rel=0.03)
    return heard


@needs_tiny
@pytest.mark.slow
def test_a_typed_question_is_answered_in_text_and_in_a_voice_that_can_be_played_again(server, visit):
    visitor = visit(server).connected()
    page = visitor.page
    assert page.locator("#model").inner_text() == "ttt-tiny"
    page.get_by_role("button", name="what is seven plus eight").click()
    assert visitor.answered() == ANSWER
    assert_all_is_heard(visitor)
    assert "first sound after" in page.locator(".turn.model .meta").inner_text()
    assert not page.locator("#empty").is_visible()
    page.get_by_role("button", name="Replay this turn").click()
    page.get_by_role("button", name="Stop replay").wait_for()
    page.get_by_role("button", name="Replay this turn").wait_for()
    assert np.square(visitor.heard()).sum() > 0.5 * np.square(visitor.sound_sent()).sum()
    visitor.ask("what is the capital of france")
    assert "paris" in visitor.answered(2)
    page.get_by_role("button", name="New conversation").click()
    page.locator("#empty").wait_for()


@needs_tiny
@pytest.mark.slow
def test_the_question_is_asked_hands_free_and_the_answer_is_heard(server, visit):
    visitor = visit(server).connected()
    page = visitor.page
    page.get_by_text("Hands free", exact=True).click()
    page.get_by_role("button", name="Listen").click()
    page.locator(".turn.model").wait_for()
    assert visitor.answered() == ANSWER
    assert page.locator(".turn.user .words").inner_text().endswith("seven plus eight")
    assert words_of(assert_all_is_heard(visitor)) == ANSWER
    assert page.locator(".turn.user canvas").is_visible() and page.locator(".turn.model canvas").is_visible()
    page.get_by_role("button", name="Listen").click()  # no more
    page.wait_for_selector("#talk[aria-pressed=false]")


@needs_tiny
@pytest.mark.slow
@pytest.mark.parametrize("by", ["mouse", "space bar"])
def test_the_question_is_asked_while_the_button_or_the_space_bar_is_held(server, visit, by):
    visitor = visit(server, MOUTH).connected()
    page = visitor.page
    if by == "mouse":
        page.hover("#talk")
        down, up = page.mouse.down, page.mouse.up
    else:
        down, up = lambda: page.keyboard.down(" "), lambda: page.keyboard.up(" ")
    down()
    page.locator(".turn.user").wait_for()
    page.evaluate("say()")
    up()
    page.locator(".turn.model").wait_for()
    assert visitor.answered() == ANSWER
    assert_all_is_heard(visitor)
    assert visitor.events("input_audio_buffer.commit", of_page=True)
    page.evaluate("""for (const type of ["keydown", "keyup"]) {
        document.body.dispatchEvent(new KeyboardEvent(type, { key: " ", bubbles: true }));
    }""")
    page.get_by_text("for as long as you speak").wait_for()  # that was no question
    assert page.locator(".turn.user").count() == 1


@needs_tiny
@pytest.mark.slow
def test_a_device_of_another_rate_is_understood_as_well(server, visit):
    visitor = visit(server, OTHER_RATE, MOUTH).connected()
    page = visitor.page
    page.hover("#talk")
    page.mouse.down()
    page.locator(".turn.user").wait_for()
    page.evaluate("say()")
    page.mouse.up()
    page.locator(".turn.model").wait_for()
    assert visitor.answered() == ANSWER
    assert page.evaluate("capturedAt") == 44_100


@needs_tiny
@pytest.mark.slow
@pytest.mark.parametrize("by", ["button", "Escape", "speaking"])
def test_an_answer_is_interrupted_and_the_conversation_holds_what_was_heard(server, visit, by):
    visitor = visit(server, MOUTH).connected()
    page = visitor.page
    if by == "speaking":
        page.get_by_text("Hands free", exact=True).click()
        page.get_by_role("button", name="Listen").click()
        page.wait_for_selector("#talk[data-state=listening]")
    visitor.ask(LONG)
    page.wait_for_selector("#talk[data-state=speaking]")
    if by == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    elif by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.evaluate("say()")
    page.locator(".turn.model").first.get_by_text("interrupted").wait_for()
    page.locator(".turn.model .unheard:not(:empty)").first.wait_for()
    [truncate] = visitor.events("conversation.item.truncate", of_page=True)
    sent = sum(event["item_id"] == truncate["item_id"] for event in visitor.events("response.output_audio.delta"))
    assert sent and visitor.events("conversation.item.truncated")
    if by == "speaking":
        page.locator(".turn.model").nth(1).wait_for()
        assert visitor.answered(2)  # and the question that interrupted it is answered
    else:
        visitor.heard()
        page.wait_for_timeout(300)
        assert not np.abs(visitor.heard()).max(initial=0) > 0


@needs_tiny
@pytest.mark.slow
def test_settings_reach_the_session_and_what_it_refuses_is_said_in_words(tiny, server, visit):
    visitor = visit(server).connected()
    page = visitor.page
    page.get_by_role("button", name="Settings", exact=True).click()
    default = str(tiny[0].generation_config.audio_block_size)
    assert page.locator("[name=block]").get_attribute("placeholder") == default != "2"
    assert page.locator("[name=task] option").count() == 1 + len(server.service.processor.tasks)
    page.fill("[name=block]", "2")
    page.fill("[name=threshold]", "0.9")
    page.fill("[name=instructions]", "Be brief.")
    page.get_by_label("Speak the answer").uncheck()
    page.fill("[name=steps]", "0")
    page.keyboard.press("Tab")
    page.locator("#settings-error").get_by_text("Steps a block").wait_for()
    page.fill("[name=steps]", "")
    page.get_by_role("button", name="Done").click()
    visitor.ask("what is seven plus eight")
    assert visitor.answered()
    settings = visitor.events("session.updated")[-1]["session"]
    assert settings["ttt"]["audio_block_size"] == 2 and settings["ttt"]["audio_confidence_threshold"] == 0.9
    assert settings["instructions"] == "Be brief." and settings["output_modalities"] == ["text"]
    assert not visitor.events("response.output_audio.delta")
    page.reload()
    visitor.connected()
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.locator("[name=block]").input_value() == "2"
    page.get_by_role("button", name="Reset").click()
    assert page.locator("[name=block]").input_value() == ""


@needs_tiny
@pytest.mark.slow
def test_a_refused_microphone_is_said_in_words_and_typing_goes_on(server, visit):
    refused = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); };"
    visitor = visit(server, refused).connected()
    visitor.page.hover("#talk")
    visitor.page.mouse.down()
    visitor.page.get_by_text("may not use the microphone").wait_for()
    visitor.page.mouse.up()
    visitor.ask("what is seven plus eight")
    assert visitor.answered() == ANSWER


@needs_tiny
@pytest.mark.slow
def test_a_server_that_goes_away_is_waited_for(tiny, visit):
    with serve(*tiny, arguments=["--drain_seconds", "0"]) as first:
        port = first.port
        visitor = visit(first).connected()
        visitor.ask(LONG)
        visitor.page.wait_for_selector("#talk[data-state=speaking], #talk[data-state=thinking]")
    page = visitor.page
    page.wait_for_selector("#connection[data-state=waiting]")
    page.get_by_role("alert").get_by_text("Trying again").wait_for()
    with serve(*tiny, arguments=["--port", str(port)]) as second:
        assert second.port == port
        visitor.connected()
        page.get_by_text("does not remember").wait_for()
        before = page.locator(".turn.model").count()
        visitor.ask("what is seven plus eight")
        page.locator(".turn.model").nth(before).wait_for()
        assert visitor.answered(before + 1) == ANSWER


@needs_tiny
@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_for_the_tab(tiny, visit):
    with serve(*tiny, keys=[KEY]) as locked:
        visitor = visit(locked)
        page = visitor.page
        page.get_by_text("The server asks for an API key").wait_for()
        page.get_by_label("API key").fill("a-wrong-key-for-them")
        page.keyboard.press("Enter")
        page.get_by_text("does not know this API key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        visitor.connected()
        page.reload()
        visitor.connected()
        page.goto(f"{locked.url}/docs")
        page.get_by_role("heading", name="POST /v1/audio/speech").wait_for()


@needs_tiny
@pytest.mark.slow
def test_a_microphone_that_nobody_uses_is_let_go(server, visit):
    visitor = visit(server, MOUTH, TRACK).connected()
    page = visitor.page
    page.clock.install()
    page.hover("#talk")
    page.mouse.down()
    page.locator(".turn.user").wait_for()
    page.keyboard.press("Escape")  # what is being said is taken back
    page.mouse.up()
    page.locator(".turn.user").wait_for(state="detached")
    assert page.evaluate("track.readyState") == "live"
    for _ in range(20):
        page.wait_for_timeout(50)  # its sound still comes, which is what is noticed
        page.clock.run_for(10_000)
    assert page.evaluate("track.readyState") == "ended"


@needs_tiny
@pytest.mark.slow
def test_a_busy_server_is_said_in_words_with_a_way_to_try_again(tiny, visit):
    with serve(*tiny, max_rows=1, max_queue=0) as busy:
        visitor = visit(busy).connected()
        prompt = busy.service.processor(text="hello", task="text_chat")["input_ids"]
        options = {"max_new_tokens": 400, "min_new_tokens": 400}
        others = busy.service.engine.submit(GenerationRequest(prompt, options))
        visitor.ask("what is seven plus eight")
        visitor.page.get_by_text("The server is busy just now").wait_for()
        others.cancel()
        deadline = time.monotonic() + SECONDS
        while busy.service.engine.stats().rows and time.monotonic() < deadline:
            time.sleep(0.05)
        visitor.page.get_by_role("button", name="Try again").click()
        visitor.page.locator(".turn.model").nth(1).wait_for()
        assert visitor.answered(2) == ANSWER


@needs_tiny
@pytest.mark.slow
def test_two_tabs_have_two_conversations(server, visit):
    first, second = visit(server).connected(), visit(server).connected()
    first.ask("what is seven plus eight")
    second.ask("what is the capital of france")
    assert first.answered() == ANSWER and "paris" in second.answered()
    assert first.page.locator(".turn").count() == second.page.locator(".turn").count() == 2


@needs_tiny
@pytest.mark.slow
def test_the_page_fits_a_phone_and_the_keyboard(server, visit):
    visitor = visit(server, viewport={"width": 320, "height": 600}, reduced_motion="reduce").connected()
    page = visitor.page
    for width in (375, 320):
        page.set_viewport_size({"width": width, "height": 600})
        page.wait_for_timeout(100)
        sides = "Math.max(...[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right))"
        assert page.evaluate(sides) <= width
    fields = "[...document.querySelectorAll('button, input, select, textarea')].filter((e) => !e.hidden)"
    nameless = f"{fields}.filter((e) => !(e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim()))"
    assert page.evaluate(f"{nameless}.length") == 0
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"new", "theme", "settings-open", "talk", "text", "send", "what is seven plus eight"} <= set(reached)
    page.get_by_role("button", name="what is seven plus eight").focus()
    page.keyboard.press("Enter")
    assert visitor.answered() == ANSWER
    page.focus("#theme")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 23)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@needs_tiny
@pytest.mark.slow
def test_models_tell_what_the_settings_offer(tiny, server):
    status, _, body = server.request("/v1/models")
    [model] = json.loads(body)["data"]
    assert status == 200 and model["ttt"]["tasks"] == list(server.service.processor.tasks)
    assert model["ttt"]["defaults"]["audio_block_size"] == tiny[0].generation_config.audio_block_size
