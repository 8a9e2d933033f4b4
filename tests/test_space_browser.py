"""
The Space in Debian's Chromium, as a visitor uses it: with the mouse, with the keyboard alone, on a phone, in light and dark.

`INDEXTTS2_SCREENSHOT=FILE.png` keeps a picture of the page, such as the one in the README.
"""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
import soundfile
from conftest import make_speech
from playwright.sync_api import Browser, Page, expect, sync_playwright

from indextts2_hf import IndexTTS2ForTextToWaveform, embedded_checkpoint
from showing import EXAMPLES, LONG_TEXT
from speaking import FEELINGS


PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def model() -> IndexTTS2ForTextToWaveform:
    """The checkpoint that the server speaks with: its voices and rates."""
    return IndexTTS2ForTextToWaveform.from_pretrained(embedded_checkpoint())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "there is no chromium here: run .ci/browser, which installs Debian's"
    # Root needs --no-sandbox. The microphone is a made-up one that beeps.
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, space):
    """Opens the page; afterwards nothing may have gone wrong in it, and nothing been asked of another server."""
    pages = []
    errors, strangers = [], []

    def open_page(width: int = 1280, height: int = 900, theme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, permissions=["microphone"])
        page = context.new_page()
        pages.append(context)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        own = (space.url, "data:", "blob:", space.url.replace("http", "ws"))
        page.on("request", lambda request: None if request.url.startswith(own) else strangers.append(request.url))
        page.goto(f"{space.url}/?__theme={theme}")
        page.get_by_role("button", name="Speak", exact=True).wait_for()
        return page

    yield open_page
    for context in pages:
        context.close()
    # The player's own word about an upload that is no sound.
    assert not [error for error in errors if "Waveform load error" not in error] and not strangers


def text_of(page: Page):
    return page.get_by_role("textbox", name="Text", exact=False).first


def wait_until_spoken(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Made in")
    page.wait_for_function("document.querySelector('#speech audio')?.duration > 0")


def duration_s(page: Page) -> float:
    """Of the sound that the player has: a source that the browser could read."""
    return page.evaluate("document.querySelector('#speech audio').duration")


def test_type_choose_generate_hear(visit, model, tmp_path):
    page = visit()
    text_of(page).fill("Hello there. How are you today?")
    voice = sorted(model.voices)[-1]
    page.get_by_label("Voice", exact=True).click()
    page.get_by_role("option", name=voice).click()
    page.get_by_label("eight sliders").check()
    page.get_by_label("number input for Happy").fill("0.7")
    page.get_by_label("seconds", exact=True).check()
    page.get_by_label("Seconds", exact=True).fill("1.6")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_spoken(page)
    assert duration_s(page) == pytest.approx(1.6, abs=1 / model.config.sampling_rate)
    # It plays by itself.
    page.wait_for_function("document.querySelector('#speech audio').currentTime > 0")
    expect(page.locator("#status")).to_contain_text("1.60 s of speech, 1 segment")
    expect(page.get_by_alt_text("Waveform and mel spectrogram of the speech")).to_be_visible()
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") > 500
    for part in (f"voice='{voice}'", "emotion_weights={'happy': 0.7}", "duration_s=1.6", "seed=5"):
        expect(page.locator("#code .cm-content")).to_contain_text(part)

    with page.expect_download() as download:
        page.locator("#speech").get_by_role("link").click()
    download.value.save_as(tmp_path / "speech.wav")
    assert soundfile.info(tmp_path / "speech.wav").frames == round(1.6 * model.config.sampling_rate)
    for name, begin in (
        ("MP3", b"\xff"),
        ("SRT", b"1\n00:00:00,000 --> 00:00:01,600\nHello there. How are you today?\n"),
    ):
        with page.expect_download() as download:
            page.locator("#downloads").get_by_role("link", name=name).click()
        assert download.value.suggested_filename == f"speech.{name.lower()}"
        download.value.save_as(tmp_path / "download")
        assert (tmp_path / "download").read_bytes().startswith(begin)


def test_the_first_visit(visit, model):
    """All that is made beforehand: examples, voices, buttons that set the sliders."""
    page = visit()
    expect(text_of(page)).to_have_value(EXAMPLES["A greeting"]["text"])
    assert duration_s(page) > 0.5
    expect(page.get_by_alt_text("Waveform and mel spectrogram of the speech")).to_be_visible()
    expect(page.locator("#consent")).to_be_hidden()
    page.evaluate("""window.played = [];
        document.addEventListener('play', event => played.push(event.target.duration), true)""")
    for name, example in EXAMPLES.items():
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator("#status")).to_contain_text(f"“{name}”")
        expect(text_of(page)).to_have_value(example["text"])
        page.wait_for_function("document.querySelector('#speech audio').currentTime > 0")
        if "duration_s" in example:
            assert duration_s(page) == example["duration_s"]
            expect(page.get_by_label("Seconds", exact=True)).to_have_value("3")
            expect(page.locator("#code .cm-content")).to_contain_text("duration_s=3.0")

    for name in model.voices:
        page.get_by_role("button", name=f"▶ {name}").click()
        expect(page.get_by_label("Voice", exact=True)).to_have_value(name)
        page.wait_for_function("document.querySelector('#sample audio')?.currentTime > 0")
    assert page.evaluate("[...document.querySelectorAll('audio')].filter(one => !one.paused).length") == 1

    page.get_by_role("button", name="Sad", exact=True).click()
    expect(page.get_by_label("number input for Sad")).to_have_value("1")
    page.get_by_role("button", name="Calm", exact=True).click()
    expect(page.get_by_label("number input for Calm")).to_have_value("1")
    expect(page.get_by_label("number input for Sad")).to_have_value("0")

    if screenshot := os.environ.get("INDEXTTS2_SCREENSHOT"):
        page.reload()
        page.set_viewport_size({"width": 1180, "height": 900})
        page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 500")
        page.wait_for_timeout(500)
        page.screenshot(path=screenshot)


def test_stop_and_speak_again(visit):
    page = visit()
    speak, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Speak", "Stop"))
    status = page.locator("#status")
    text_of(page).fill(LONG_TEXT)
    speak.click()
    expect(status).to_contain_text(re.compile(r"Speaking, \d+%"))
    expect(page.get_by_role("progressbar")).to_be_visible()
    stop.click()
    expect(status).to_contain_text("Stopped.")
    text_of(page).fill("Hello.")
    page.get_by_label("Seed").fill("7")
    speak.click()
    wait_until_spoken(page)
    expect(status).to_contain_text("seed 7.")
    expect(page.locator("#code .cm-content")).to_contain_text("'Hello.'")
    assert duration_s(page) < 5


def test_takes_and_versions_side_by_side(visit):
    page = visit()
    text_of(page).fill("Hello.")
    for seed in ("1", "2"):
        page.get_by_label("Seed").fill(seed)
        page.get_by_role("button", name="Speak", exact=True).click()
        expect(page.locator("#status")).to_contain_text(f"seed {seed}.")
    takes = page.locator("#takes li")
    assert ["seed 2" in takes.nth(0).inner_text(), "seed 1" in takes.nth(1).inner_text()] == [True, True]
    for take, choice in ((1, "A"), (2, "B")):
        expect(page.get_by_role("button", name=f"Take {take} is {choice}")).to_have_attribute("aria-pressed", "true")
    # As slowly as a browser plays, so that no sound ends meanwhile.
    page.evaluate("document.querySelectorAll('#takes audio').forEach(one => { one.playbackRate = 0.0625; })")
    page.get_by_role("button", name="Play A and B in turn").click()
    page.wait_for_function("document.querySelector('[aria-label=\"Take 1\"]').currentTime > 0")
    page.get_by_role("button", name="Playing A: change to B").click()
    page.wait_for_function("document.querySelector('[aria-label=\"Take 2\"]').currentTime > 0")
    assert page.evaluate("document.querySelector('[aria-label=\"Take 1\"]').paused")

    page.get_by_role("button", name="In three emotions").click()
    expect(page.locator("#status")).to_contain_text("3 versions, seed 2.")
    assert page.locator("#versions figcaption b").all_inner_texts() == list(FEELINGS)
    page.wait_for_function(
        "[...document.querySelectorAll('#versions audio')].filter(one => one.duration > 0).length === 3"
    )
    assert page.evaluate("[...document.querySelectorAll('#versions img')].every(one => one.naturalWidth > 50)")


def test_a_long_text_is_heard_segment_by_segment(visit):
    page = visit()
    # What looks like a program is read out, not run.
    text_of(page).fill(
        "<img src=x onerror=alert(1)> ${document.title = 'x'} {{value}}. The lighthouse keeper climbed the stairs every evening, and "
        "counted the steps as he went. There were two hundred and four of them."
    )
    # What is heard, and how many segments were there before the whole: written down by the page, which misses nothing.
    page.evaluate("""window.played = []; window.before = 0;
        document.addEventListener('play', event => played.push(event.target.getAttribute('aria-label')), true);
        new MutationObserver(() => {
            const segments = document.querySelectorAll('#segments audio').length;
            if (!document.querySelector('#speech audio[src]')) before = segments;
        }).observe(document.body, {subtree: true, childList: true, attributes: true})""")
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_spoken(page)
    assert page.evaluate("before") > 0, "the segments came no sooner than the whole"
    page.wait_for_function("[...document.querySelectorAll('#segments audio')].every(one => one.duration > 0)")
    durations = page.evaluate("[...document.querySelectorAll('#segments audio')].map(one => one.duration)")
    assert len(durations) > 1
    pauses_s = 0.2 * (len(durations) - 1)
    assert duration_s(page) == pytest.approx(sum(durations) + pauses_s, abs=0.001 * len(durations))
    page.wait_for_function(f"played.includes('Segment {len(durations)}') || played.includes('Segment 2')")
    assert "Speech" not in page.evaluate("played")
    assert page.title() == "IndexTTS2" and page.locator("#segments img").count() == 0


def test_wrong_input_is_told_and_the_page_goes_on(visit, tmp_path):
    page = visit()
    speak = page.get_by_role("button", name="Speak", exact=True)
    alert = page.get_by_test_id("toast-body")
    text_of(page).fill("")
    speak.click()
    expect(alert).to_contain_text("text", ignore_case=True)
    # What was there before is gone.
    expect(page.locator("#status p")).to_have_text("Nothing was spoken.")
    expect(page.locator("#page").get_by_test_id("status-tracker").filter(visible=True)).to_have_count(0)
    assert page.locator("#speech audio[src]").count() == 0
    page.get_by_test_id("toast-close").click()

    text_of(page).fill("a" * 5000)
    assert len(text_of(page).input_value()) == 1000

    (tmp_path / "notes.wav").write_text("no sound")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.wav")
    # The player shows the name of such a file for a moment only.
    expect(page.get_by_label("Voice", exact=True)).to_be_disabled()
    text_of(page).fill("Hello.")
    speak.click()
    expect(alert).to_contain_text("'notes.wav' is no sound that can be read")
    assert str(tmp_path) not in alert.inner_text()

    page.get_by_role("button", name="Clear").first.click()
    speak.click()
    wait_until_spoken(page)


def test_own_voice_from_a_file_and_from_the_microphone(visit, tmp_path):
    page = visit()
    # No voice speaks so: the model might go on as long as it can.
    page.get_by_label("seconds", exact=True).check()
    page.get_by_label("Seconds", exact=True).fill("1.2")
    soundfile.write(tmp_path / "anna.wav", make_speech(1.5, 16000), 16000)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "anna.wav")
    expect(page.get_by_label("Voice", exact=True)).to_be_disabled()
    expect(page.locator("#consent")).to_be_visible()
    # Its lowest buttons are within it.
    page.wait_for_function("""() => {
      const bottom = element => element.getBoundingClientRect().bottom;
      const recorder = document.querySelector('.recorder');
      return bottom(recorder.querySelector('[aria-label="Record audio"]')) < bottom(recorder);
    }""")
    text_of(page).fill("Hello.")
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_spoken(page)
    expect(page.locator("#code .cm-content")).to_contain_text("voice='anna.wav'")

    page.get_by_role("button", name="Clear").first.click()
    expect(page.get_by_label("Voice", exact=True)).to_be_enabled()
    page.get_by_role("button", name="Record audio").first.click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.locator(".recorder").get_by_role("button", name="Stop", exact=True).first.click()
    expect(page.get_by_label("Voice", exact=True)).to_be_disabled()
    page.get_by_role("button", name="Speak", exact=True).click()
    expect(page.locator("#code .cm-content")).to_contain_text("voice='audio.wav'")


def test_on_a_phone(visit):
    page = visit(width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # All that a visitor needs first is seen without scrolling, and so is what comes of it.
    for name in (*EXAMPLES, "Speak", "Stop"):
        expect(page.get_by_role("button", name=name, exact=True)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="With joy").click()
    expect(page.locator("#status")).to_contain_text("With joy")
    expect(page.locator("#speech audio")).to_be_in_viewport(ratio=1)
    text_of(page).fill("Hello there.")
    page.get_by_role("button", name="Speak", exact=True).click()
    expect(page.locator("#status")).to_contain_text("Speaking")
    expect(page.locator("#status")).to_be_in_viewport(ratio=1)
    wait_until_spoken(page)
    expect(page.locator("#speech audio")).to_be_in_viewport(ratio=1)
    assert page.evaluate("scrollY") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_by_keyboard_alone(visit):
    page = visit()

    def tab_to(script: str) -> None:
        for _ in range(60):
            if page.evaluate(f"(element => {script})(document.activeElement)"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"not reached: {script}")

    tab_to("element.placeholder === 'What to say'")
    page.keyboard.press("Control+A")
    page.keyboard.type("Hello there.")
    # Gradio makes every choice a stop of its own.
    tab_to("element.type === 'radio' && element.value === 'seconds'")
    page.keyboard.press("Space")
    page.get_by_label("Seconds", exact=True).wait_for()
    tab_to("element.type === 'number' && element.max === '60'")
    page.keyboard.press("Control+A")
    page.keyboard.type("1.2")
    # The focus is always seen.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.innerText") == "Speak":
            break
    page.keyboard.press("Enter")
    wait_until_spoken(page)
    assert duration_s(page) == pytest.approx(1.2, abs=0.001)
    tab_to("element.tagName === 'AUDIO'")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Speech"

    # And from the text itself. That the status was empty in between is too short to be seen: the next speech has another seed.
    status = page.locator("#status")
    (seed,) = re.findall(r"seed \d+", status.inner_text())
    text_of(page).focus()
    page.keyboard.press("Shift+Enter")
    expect(status).not_to_contain_text(seed)
    wait_until_spoken(page)


# Every control that is seen, and what it is called for those who do not see it.
CONTROLS = """
[...document.querySelectorAll('button, input, textarea, select, audio, img, [role=slider], [role=listbox]')]
  .filter(element => element.offsetParent !== null && element.type !== 'file')
  .map(element => [element.outerHTML.slice(0, 120), [element.getAttribute('aria-label'), element.alt, element.title,
    ...[...(element.labels ?? [])].map(label => label.innerText), element.placeholder, element.innerText]
    .find(name => name?.trim()) ?? ''])
"""


def test_all_controls_have_names(visit):
    page = visit()
    page.get_by_label("eight sliders").check()
    page.get_by_label("tokens", exact=True).check()
    page.get_by_role("button", name="Sampling").click()
    page.get_by_role("button", name="A long text").click()
    expect(text_of(page)).to_have_value(LONG_TEXT)  # the server sends it
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_spoken(page)
    page.get_by_label("a recording", exact=True).check()
    page.get_by_label("seconds", exact=True).check()
    page.get_by_label("range slider for Temperature").wait_for()
    page.get_by_label("Seconds", exact=True).first.wait_for()  # the server sends it
    controls = page.evaluate(CONTROLS)
    assert len(controls) > 40
    assert not [control for control, name in controls if not name.strip()]
    names = " ".join(name for _, name in controls)
    for name in ("Text", "Voice", "Seed", "Seconds", "Strength of the emotion", "Guidance", "Speech", "Segment 2"):
        assert name in names


# Contrast of text with what is behind it, after the definition of WCAG 2: the smallest on the page, and where.
CONTRAST = """
() => {
  const channel = value => { value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = color => 0.2126 * channel(color[0]) + 0.7152 * channel(color[1]) + 0.0722 * channel(color[2]);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = rgba(getComputedStyle(element).backgroundColor);
      if (color[3] > 127) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('h1, p, span, label, button, textarea, input, li, strong')]
    .filter(element => element.offsetParent !== null && !element.closest('footer, #code, audio') && !['radio', 'range'].includes(element.type)
      && (element.value || [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())))
    .map(element => {
      const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), element.outerHTML.slice(0, 100)];
    })
    .sort((x, y) => x[0] - y[0])[0];
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_light_and_in_dark(visit, theme):
    page = visit(theme=theme)
    page.get_by_label("eight sliders").check()
    text_of(page).fill("Hello there.")
    page.get_by_label("number input for Happy").fill("0.5")
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_spoken(page)
    red, *_ = map(
        int, page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor.match(/\\d+/g)")
    )
    assert (red > 200) == (theme == "light")
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
