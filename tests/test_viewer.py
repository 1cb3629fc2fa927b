"""The page that plays the unmasking, in a real browser (Debian's chromium and chromium-driver)."""

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import made_up_data
from PIL import Image

from corpus.image_files import data_uri, load_picture
from corpus.tokens import BOS, EOS, MASK, load_tokenizer
from generate import SHOWN, GenerateConfig, main, pictures_of
from sampling.loop import State
from sampling.viewer import Picture, Trace, break_lines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = made_up_data(tmp_path_factory.mktemp("data") / "data", max_stories=50, vocab_size=300)
    return load_tokenizer((folder / "tokenizer.json").read_text())


def states(tokenizer, texts: list[str]) -> tuple[np.ndarray, list[State]]:
    """A row with a known first word, and one state for each text; "_" is a hidden token."""
    ids = {text: tokenizer.encode(text).ids[0] for text in "abcdefg"}
    rows = [np.array([BOS, *[MASK if letter == "_" else ids[letter] for letter in text], EOS])
            for text in texts]
    result = []
    for k, (before, row) in enumerate(zip([rows[0], *rows], rows, strict=False)):
        result.append(State(k, k, row[None], ((before == MASK) & (row != MASK))[None],
                            ((before != MASK) & (row == MASK))[None],
                            np.full((1, len(row)), 0.25, np.float32), np.ones(1, bool)))
    return rows[0], result


@pytest.fixture
def trace(tokenizer) -> Trace:
    return traced(tokenizer, 2)


def traced(tokenizer, count: int, pictures: list[Picture] | None = None) -> Trace:
    """So many stories, of which the second has all steps and the first one."""
    row, all_states = states(tokenizer, ["a____", "ab__c", "ab_dc", "a_edc", "agedc"])
    trace = Trace(tokenizer, [row] * count, pictures)
    for state in all_states:
        trace.add([1], state)
    for state in (all_states[0], all_states[1]):
        trace.add([0], state)
    return trace


def data_of(path: Path) -> dict:
    page = path.read_text(encoding="utf-8")
    return json.loads(page.split('type="application/json">')[1].split("</script>")[0])


def test_the_page_holds_every_step(trace, tmp_path):
    path = tmp_path / "story.html"
    trace.write(path, "</script> & more")
    page, data = path.read_text(), data_of(path)
    assert data["title"] == "</script> & more" and page.count("</script>") == 2
    assert "http" not in page and "src=" not in page  # nothing is fetched
    first, second = data["stories"]
    assert second["tokens"] == ["a", None, None, None, None]
    assert second["steps"] == [
        {"drawn": [[1, "b", 0.25], [4, "c", 0.25]], "hidden": []},
        {"drawn": [[3, "d", 0.25]], "hidden": []}, {"drawn": [[2, "e", 0.25]], "hidden": [1]},
        {"drawn": [[1, "g", 0.25]], "hidden": []}]
    assert len(first["steps"]) == 1
    assert data.keys() == {"title", "stories"}  # nothing of pictures where there are none


PICTURES = [Picture(data_uri(np.full((8, 8, 4), shade, np.uint8)), name) for shade, name in (
    (40, "cat.png"), (90, '"><dog>.png'))]


def test_the_page_has_each_picture_once(tokenizer, tmp_path):
    path = tmp_path / "story.html"
    traced(tokenizer, 3, [PICTURES[0], PICTURES[1], PICTURES[0]]).write(path, "A story")
    page, data = path.read_text(), data_of(path)
    assert data["shown"] == [0, 1, 0] and page.count("data:image/png;base64,") == 2
    assert data["pictures"] == [
        {"src": source, "alt": f"What is told of: {name}"} for source, name in PICTURES]
    assert page.count("</script>") == 2 and "<dog>" not in page


def test_generate_gives_the_page_the_pictures(tmp_path):
    paths = []
    for shade, name in ((40, "one.png"), (90, "two.png")):
        paths.append(str(tmp_path / name))
        Image.new("RGB", (20, 10), (shade,) * 3).save(paths[-1])
    one, two = paths
    made = pictures_of(GenerateConfig(image=paths, num_samples=2), [one, one, two, two])
    assert [picture.name for picture in made] == ["one.png", "one.png", "two.png", "two.png"]
    for picture, path in zip(made, [one, one, two, two], strict=True):
        content = base64.b64decode(picture.source.removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(image, load_picture(path, SHOWN)[..., :3])
    assert pictures_of(GenerateConfig(condition="Tom ran."), ["Tom ran."]) is None


def test_an_animation_has_a_frame_for_every_step(trace, tmp_path):
    trace.stories.reverse()
    trace.write(tmp_path / "story.gif", "a $ title")
    with Image.open(tmp_path / "story.gif") as image:
        assert image.format == "GIF" and image.n_frames == 5


def test_a_letter_in_several_tokens_is_whole_once_it_is_there(tokenizer, tmp_path):
    ids = tokenizer.encode("a \u201cb\u201d \U0001f600").ids
    assert len(ids) > 6  # this vocabulary has no token for any of the three
    row = np.array([BOS, *[MASK] * len(ids), EOS])
    full = np.array([[BOS, *ids, EOS]])
    trace = Trace(tokenizer, [row])
    nothing = np.zeros_like(full, dtype=bool)
    trace.add([0], State(1, 1, full, full > EOS, nothing, np.zeros(full.shape, np.float32),
                         np.ones(1, bool)))
    trace.write(tmp_path / "story.html", "letters")
    drawn = data_of(tmp_path / "story.html")["stories"][0]["steps"][0]["drawn"]
    assert "".join(text for _, text, _ in drawn) == "a \u201cb\u201d \U0001f600"


def test_the_text_of_an_animation_does_not_move(trace):
    text = "one two three four five"
    assert break_lines(text, 9) == "one two\nthree\nfour five"
    assert break_lines("unbreakable word\nnext", 5) == "unbreakable\nword\nnext"
    assert break_lines(text, 100) == text
    trace.stories.reverse()
    assert trace._frames() == ["a\u2591\u2591\u2591\u2591", "ab\u2591\u2591c", "ab\u2591dc",
                               "a\u2591edc", "agedc"]


def test_generate_writes_a_trace(checkpoint, tmp_path, capsys, fails):
    path = tmp_path / "new" / "story.html"
    argv = ["--checkpoint", str(checkpoint), "--num_samples", "2", "--steps", "5", "--length", "20",
            "--prompt", "Once", "--remask", "remdm_cap", "--eta", "0.3"]
    main([*argv, "--trace", str(path)])
    told = capsys.readouterr().out
    stories = data_of(path)["stories"]
    assert len(stories) == 2
    for number, story in enumerate(stories):
        text = list(story["tokens"])
        for step in story["steps"]:
            for i, token, _ in step["drawn"]:
                assert text[i] is None
                text[i] = token
            for i in step["hidden"]:
                text[i] = None
        assert f"--- {number + 1} ---\n{''.join(text)}" in told
    assert any(step["hidden"] for story in stories for step in story["steps"])
    assert ".html or .gif" in fails(main, *argv, "--trace", "story.txt")


# ---- in a browser --------------------------------------------------------------------------------

class Browser:
    """Chromium by the WebDriver protocol (w3.org/TR/webdriver), as far as this test needs it."""

    OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--force-prefers-reduced-motion", "--window-size=420,800"]

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.base}/status", timeout=10)
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        options = {"args": [*self.OPTIONS, f"--user-data-dir={folder}"]}
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self.base += f"/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None):
        request = urllib.request.Request(
            self.base + path, method=method, headers={"Content-Type": "application/json"},
            data=json.dumps(body or {}).encode() if method == "POST" else None)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        """Types a key to whatever has the focus."""
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


LEFT, RIGHT, HOME, END = "\ue012", "\ue014", "\ue011", "\ue010"


def test_the_page_plays_in_a_browser(trace, tmp_path, browser):
    path = tmp_path / "story.html"
    trace.stories.reverse()
    trace.write(path, "A story")
    browser.call("POST", "/url", {"url": path.as_uri()})

    def shown() -> str:
        """The tokens on the page; a hidden one is _."""
        return browser.run("return [...document.querySelectorAll('#story span')].map("
                           "s => s.className === 'hidden' ? '_' : s.textContent).join('')")

    def status() -> str:
        return browser.run("return document.getElementById('status').textContent")

    def click(name: str) -> None:
        browser.run(f"document.getElementById('{name}').click()")

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 20
        while shown() != text:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    # who asked for less motion sees the start, and nothing moves
    assert shown() == "a____" and status() == "Step 0 of 4: 0 of 4 tokens uncovered"
    assert browser.run("return document.body.scrollWidth <= innerWidth")  # on a phone
    # step by step by keyboard, forth and back
    for key, text in ((RIGHT, "ab__c"), (RIGHT, "ab_dc"), (RIGHT, "a_edc"), (LEFT, "ab_dc"),
                      (END, "agedc"), (RIGHT, "agedc"), (HOME, "a____")):
        browser.press(key)
        assert shown() == text
    # play to the end, which stops by itself
    browser.press(" ")
    assert browser.run("return document.getElementById('play').textContent") == "Pause"
    wait_for("agedc")
    assert browser.run("return document.getElementById('play').textContent") == "Play"
    assert status() == "Step 4 of 4: 4 of 4 tokens uncovered"
    # the slider has keys of its own, but not this one
    browser.run("document.getElementById('scrub').focus()")
    browser.press(" ")
    assert browser.run("return document.getElementById('play').textContent") == "Pause"
    wait_for("agedc")
    browser.run("document.activeElement.blur()")
    # play again begins again; pausing keeps the place
    click("play")
    wait_for("ab__c")
    click("play")
    place = shown()
    time.sleep(0.5)
    assert shown() == place
    # scrubbing
    browser.run("const s = document.getElementById('scrub'); s.value = 3;"
                "s.dispatchEvent(new Event('input'))")
    assert shown() == "a_edc"
    # what was given, drawn and is new; probabilities for who points at them
    kinds = browser.run("return [...document.querySelectorAll('#story span')]"
                        ".map(s => s.className)")
    assert kinds == ["known", "hidden", "drawn new", "drawn", "drawn"]
    assert browser.run("return document.querySelectorAll('#story span')[4].title") == (
        "step 1, probability 0.25")
    click("orders")
    assert browser.run("return [...document.querySelectorAll('#story sub')].map("
                       "s => getComputedStyle(s).display + s.textContent)") == [
        "inline", "inline", "inline3", "inline2", "inline1"]
    # the other story
    browser.run("const w = document.getElementById('which'); w.value = 1;"
                "w.dispatchEvent(new Event('change'))")
    assert status() == "Step 0 of 1: 0 of 4 tokens uncovered"
    # every control has a name for a screen reader
    assert browser.run("return [...document.querySelectorAll('button, input, select')].every("
                       "c => c.textContent.trim() || c.ariaLabel || c.labels.length)")
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []


def test_the_picture_stands_beside_its_story(trace, tokenizer, tmp_path, browser):
    def open_page(page: Trace) -> None:
        page.write(tmp_path / "story.html", "A story")
        browser.call("POST", "/url", {"url": (tmp_path / "story.html").as_uri()})

    shown = ("const p = document.getElementById('picture'), s = document.getElementById('story');"
             "return [p.checkVisibility(), p.alt, p.naturalWidth,"
             " p.getBoundingClientRect().top < s.getBoundingClientRect().bottom]")
    open_page(traced(tokenizer, 2, PICTURES))
    assert browser.run(shown) == [True, "What is told of: cat.png", 8, True]
    assert browser.run("return document.body.scrollWidth <= innerWidth")
    browser.run("const w = document.getElementById('which'); w.value = 1;"
                "w.dispatchEvent(new Event('change'))")
    assert browser.run(shown)[:2] == [True, 'What is told of: "><dog>.png']
    open_page(trace)
    assert browser.run(shown)[:2] == [False, ""]
    assert browser.call("POST", "/se/log", {"type": "browser"}) == []
