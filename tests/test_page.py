"""The page to try models on: it shows what the models say, and never executes anything that is pasted into it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import finetune
import train
from minisobert import page, playground
from minisobert.corpus.tokenizer import open_tokenizer
from minisobert.inference import Entity, Loaded, guess, with_masks
from minisobert.model import MaskedLM
from minisobert.page import Mask, Page
from tests.runs import SMALL_MODERN, make_small, words

ROOT = Path(__file__).parents[1]
IMAGE = "<img src=x onerror='hacked=1'>"  # also used as the name of a folder and of a class
ATTACK = "<script>hacked=1</script><img src=x onerror='hacked=1'>\"'><b onclick=hacked=1>&lt; ${hacked=1} {{hacked}}"


class Parsed(HTMLParser):
    """What a browser reads in some HTML: its tags with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.names = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, kind: str) -> list[dict]:
        return [attributes for _, attributes in self.tags if kind in attributes.get("class", "").split()]


def check_harmless(html: str) -> None:
    """Asserts that there is only markup of this page, with no element or attribute that loads or runs anything."""
    for tag, attributes in Parsed(html).tags:
        assert tag in {"section", "h3", "h4", "small", "div", "span", "p", "i", "b", "br", "mark"}, tag
        assert set(attributes) <= {"class", "title", "role", "tabindex", "data-mask", "style"}, attributes
        assert re.fullmatch(r"(width:[\d.]+%|--hue:\d+)?", attributes.get("style", ""))
    html.encode()  # raises for half of a surrogate pair, which could not be sent


@given(st.text() | st.text(alphabet="<>&\"'/= \n\t\0\u202e\ud800ai"))
@example(ATTACK)
@example("\0\u202e\u200f\ud800\x1b[31m\ufeff")
def test_a_text_is_shown_and_never_obeyed(text):
    html = page.shown(text)
    check_harmless(html)
    parsed = Parsed(html)
    assert {tag for tag, _ in parsed.tags} <= {"i"}
    expected = "".join(f"U+{ord(c):04X}" if page._ODD.match(c) else c for c in text)
    assert parsed.text == expected.replace("\r\n", "\n")


def test_what_cannot_be_seen_is_told_by_its_number():
    assert Parsed(page.shown("a\0\u202eb\ud800\x9b")).text == "aU+0000U+202EbU+D800U+009B"
    assert Parsed(page.piece(" a\tb\n")).text == "·a⇥b↵"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return open_tokenizer(corpus.folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    network = MaskedLM(SMALL_MODERN)
    return Loaded("model", network, tokenizer)


def rows(html: str) -> list[tuple[str, str]]:
    """(name, figure) of each bar."""
    found = re.findall(r'<span class="name">(.*?)</span>.*?<span class="figure">(.*?)</span>', html, re.S)
    return [(Parsed(name).text, figure) for name, figure in found]


def expected(guesses) -> list[tuple[str, str]]:
    return [(Parsed(page.piece(text)).text, f"{p:.1%}") for text, p in guesses]


def test_guesses_are_those_of_the_model_for_typed_and_for_clicked_masks(model):
    shown = Page([("model", model)], best=4)
    post = "bar [MASK] gin don"
    typed = model.fill_mask(post, 4)[0]
    assert rows(shown(post)) == expected(typed)
    clickable = [token for token in Parsed(shown(post)).of("token") if "data-mask" in token][-1]
    mask = Mask(*map(int, clickable["data-mask"].split()))
    ids, (place,) = with_masks(model, post)
    of_typed, of_clicked = guess(model, ids, [place, mask.start], 4)
    html = shown(post, masked=[mask])
    assert rows(html) == expected(of_clicked) + expected(of_typed)  # words that were clicked on come first
    assert len(Parsed(html).of("masked")) == 2
    # masks from another model or another text do no harm
    assert rows(shown(post, masked=[Mask(1, 0, 1), Mask(0, -5, 0), Mask(0, 500, 501)])) == expected(typed)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="a 😀\n\tif (x < y)\n        return '\u202e▁';\0")
def test_tokens_make_up_the_text(model, text):
    ids = model.tokenizer.encode(text).tolist()
    found = page.chips(model.tokenizer.decode, ids)
    assert [place for chip in found for place in range(chip.start, chip.stop)] == list(range(len(ids)))
    assert "".join(chip.text for chip in found) == text or "\ufffd" in text
    check_harmless(page.tokens(0, found, ids, [], [], []))


def test_the_bytes_of_a_character_are_one_token_to_click_on(model):
    ids = model.tokenizer.encode("b😀").tolist()
    assert len(ids) == 5
    assert page.chips(model.tokenizer.decode, ids) == [("b", 0, 1), ("😀", 1, 5)]
    html = Page([("model", model)])("b😀", masked=[Mask(0, 1, 5)])
    assert len(Parsed(html).of("masked")) == 1 and len(rows(html)) == 4 * 5


class FineTuned:
    """A loaded model that classifies, tags or embeds; like a real one, it refuses the rest."""

    model = tokenizer = None

    def __init__(self, labels=(), p=(), found=(), vectors=None, value=None):
        self.labels, self.p, self.found, self.vectors = tuple(labels), np.array(p), list(found), vectors
        self.asked, self.value = 0, value

    def classify(self, texts):
        if not len(self.p):
            raise ValueError("classifies nothing")
        self.asked += len(texts)
        return np.stack([self.p] * len(texts)) if texts else np.empty((0, len(self.p)))

    def numbers(self, texts):
        if self.value is None:
            raise ValueError("predicts no number")
        return np.full(len(texts), self.value)

    def entities(self, texts):
        if not self.found:
            raise ValueError("tags nothing")
        return [self.found for _ in texts]

    def embed(self, texts):
        if self.vectors is None:
            raise ValueError("embeds nothing")
        if len(texts) > 1:
            sys.stderr.write("\r100%|####| 2/2 [00:03]\n3 of 9 texts were cut\n")
        return np.array([self.vectors[text] for text in texts])


def test_labels_entities_and_nearest_texts():
    classifier = FineTuned(("a", ATTACK, "c"), (0.2, 0.7, 0.1))
    several = FineTuned(("a", "b", "c"), (0.9, 0.8, 0.1))
    many = FineTuned([str(i) for i in range(40)], np.eye(40)[3])
    post = "x <i>list</i> in Java"
    tagger = FineTuned(
        ("O", "B-" + ATTACK), found=[Entity(ATTACK, 2, 13, "<i>list</i>"), Entity("Language", 17, 21, "Java")]
    )
    vectors = {post: [1.0, 0.0], "far": [0.0, 2.0], ATTACK: [3.0, 0.0], "nearer": [1.0, 1.0], "back": [-1.0, 0.0]}
    finder = FineTuned(vectors=vectors)
    number = FineTuned([ATTACK], value=2.5)
    models = {"classifier": classifier, "several": several, "many": many, "tagger": tagger, "number": number}
    models[ATTACK] = finder
    shown = Page(list(models.items()), texts=["nearer", "back"])
    html = shown(post, f"far\n\n{ATTACK}\n")
    check_harmless(html)
    cards = dict(zip(models, html.split("</section>")))
    assert rows(cards["classifier"]) == [(ATTACK, "70.0%"), ("a", "20.0%"), ("c", "10.0%")]
    assert len(Parsed(cards["classifier"]).of("chosen")) == 1
    assert len(Parsed(cards["several"]).of("chosen")) == 2
    assert len(rows(cards["many"])) == 10 and "and 30 less likely ones" in cards["many"]
    assert Parsed(cards["number"]).text.endswith(f"{ATTACK} 2.5")
    marked = re.findall("<mark.*?</mark>", cards["tagger"].split('class="post"')[1], re.S)
    assert [Parsed(mark).text for mark in marked] == ["<i>list</i>" + ATTACK, "JavaLanguage"]
    assert rows(cards[ATTACK]) == [(ATTACK, "1.000"), ("nearer", "0.707"), ("far", "0.000"), ("back", "-1.000")]
    assert Parsed(cards[ATTACK]).text.startswith(ATTACK)
    assert "3 of 9 texts were cut" in cards[ATTACK] and "100%" not in cards[ATTACK]  # its message, and no bars
    assert classifier.asked == 1
    shown(post, f"far\n\n{ATTACK}\n", [Mask(0, 0, 1)])
    assert classifier.asked == 1  # a click does not ask again


def test_what_is_too_long_is_refused_or_cut_and_that_is_said(model, monkeypatch, capsys):
    shown = Page([("model", model)], texts=["other"])
    begin = time.monotonic()
    for post, lines, message in (
        ("a" * 1_000_000, "", "the post has 1,000,000 characters; the page reads up to 100,000"),
        ("a", "a" * 1_000_000, "the list of texts has 1,000,000 characters; the page reads up to 100,000"),
        ("a", "a\n" * 501, "the list has 501 texts, and up to 500 fit"),
        ("a\ud800b", "", "the post holds half of a surrogate pair"),
    ):
        html = shown(post, lines)
        assert message in html and len(Parsed(html).tags) == 1 and Parsed(html).of("error")
        check_harmless(html)
    assert time.monotonic() - begin < 1
    for empty in ("", " \n\t", "\r\n"):
        assert Parsed(shown(empty)).of("hint")
    assert "51 tokens are masked; the page guesses up to 50" in shown("[MASK] " * 51)
    monkeypatch.setitem(model.model.config.__dict__, "positions", 12)
    post = "bar gin don " * 5
    html = shown(f"{post}[MASK]")
    count = len(model.tokenizer.encode(post[:-1])) + 1  # a mask includes the space before it
    assert count > 10
    assert f"the post has {count} tokens, of which the model reads the first 10" in html
    assert "1 of 1 texts were cut to their first 10 tokens" in html and not capsys.readouterr().err
    assert len(Parsed(html).of("token")) == 10 and not Parsed(html).of("error")
    check_harmless(shown("\0\u202e\x1b\u200f <!-- \f\v -->"))


def test_one_word_opens_a_page_and_a_text_is_answered_in_the_terminal(model, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(playground, "serve", lambda *options: calls.append(options))
    monkeypatch.setattr(playground, "load", lambda run: model)
    playground.main(["runs/a"])
    playground.main(["runs/a", "runs/b", "--page", "--port", "8000", "--texts", "t.txt", "--best", "3"])
    assert calls == [(["runs/a"], None, 5, "127.0.0.1", None), (["runs/a", "runs/b"], "t.txt", 3, "127.0.0.1", 8000)]
    playground.main(["runs/a", "bar [MASK]"])
    assert capsys.readouterr().out.startswith("bar [MASK]\n") and len(calls) == 2
    for options, message in (
        ([str(tmp_path)], "to open several models, add --page"),
        (["bar [MASK]", "--texts", "t.txt"], "--texts and --port are for the page"),
    ):
        with pytest.raises(SystemExit, match="2"):
            playground.main(["runs/a", *options])
        assert message in capsys.readouterr().err


def test_what_keeps_a_page_from_opening_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(playground, "load", lambda run: pytest.fail("loaded first"))
    cases = []
    if _has("gradio"):
        cases += [(["--port", "0"], "--port is 0"), (["--port", "70000"], "--port is 70,000")]
        cases += [(["--best", "0"], "--best is 0")]
        cases += [(["--host", "203.0.113.7"], "the page cannot be served at --host 203.0.113.7, port any: ")]
    for options, message in cases:
        with pytest.raises(SystemExit, match="2"):
            playground.main(["run", *options])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        playground.main(["run"])
    assert capsys.readouterr().err == "minisobert.playground: the page needs gradio: pip install 'minisobert[page]'\n"


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


@pytest.fixture(scope="module")
def served(corpus, tmp_path_factory):
    """The address and the process of a page with a run and a classifier, whose names are both markup."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setitem)
        run = folder / IMAGE
        train.main(words(corpus, run, steps=1))
    with open(folder / "posts.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([f"{i % 3} {'script' if i % 3 else 'bar'} {i}", (IMAGE, "b", "c")[i % 3]] for i in range(60))
    finetune.main(["--task", "labels", "--data", str(folder / "posts.csv"), "--text", "text", "--label", "label",
                   "--model", "tfidf", "--out", str(folder / "classes")])  # fmt: skip
    command = [sys.executable, "-m", "minisobert.playground", str(run), str(folder / "classes"), "--page"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), process.stderr.read() if process.poll() is not None else line
    yield line.split()[0], process
    process.kill()


@pytest.fixture
def browser():
    """A headless Chromium, driven by Debian's chromedriver; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # root, as in CI, has no sandbox; only our own page is opened
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_paste_click_and_see_in_a_browser(served, browser):
    url, process = served
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def see(what):
        return WebDriverWait(browser, 90).until(lambda _: what())

    def all_of(kind):
        return browser.find_elements(By.CSS_SELECTOR, f"#answer {kind}")

    browser.get(url)
    see(lambda: all_of(".token"))
    post, lines = (browser.find_element(By.CSS_SELECTOR, f"#{box} textarea") for box in ("post", "lines"))
    lines.send_keys(f"bar gin {ATTACK}")
    lines.send_keys(Keys.CONTROL, "ax")  # cuts it to the clipboard
    post.send_keys(Keys.CONTROL, "av")
    see(lambda: "".join(token.text for token in all_of(".token")).replace("·", " ") == f"bar gin {ATTACK}")
    names = [name.text for name in all_of(".name")]
    assert sorted(names) == sorted([IMAGE, "b", "c"])  # the classifier's labels
    widths = [bar.size["width"] for bar in all_of(".bar b")]
    assert widths == sorted(widths, reverse=True) and widths[0] > 20
    assert IMAGE in all_of("h3")[0].text
    word = all_of(".token")[1]
    word.click()
    see(lambda: len(all_of(".guesses .row")) == 5 and len(all_of(".masked")) == 1)
    shares = [float(figure.text[:-1]) for figure in all_of(".guesses .figure")]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0
    all_of(".token")[0].send_keys(Keys.ENTER)  # the keyboard works too, and the focus stays
    see(lambda: len(all_of(".masked")) == 2 and len(all_of(".guesses .row")) == 10)
    assert browser.execute_script("return document.activeElement.dataset.mask").split() == ["0", "0", "1"]
    all_of(".masked")[1].click()
    see(lambda: len(all_of(".masked")) == 1)

    assert browser.execute_script("return typeof hacked") == "undefined"
    assert not all_of("script") and not all_of("img")
    lines.send_keys("gin")
    see(lambda: all_of(".texts .row"))
    assert all_of(".masked")  # the words stay masked

    browser.set_window_size(500, 900)  # the smallest window that Chromium has; the next line makes the page smaller
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})  # fmt: skip
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {each["params"]["request"]["url"] for each in requests if each["method"] == "Network.requestWillBeSent"}
    with urllib.request.urlopen(url) as answer:  # the browser refuses to load anything else
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert addresses and all(address.startswith((url, "data:", "blob:")) for address in addresses), addresses
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read().splitlines()[-1:] == ["minisobert.playground: interrupted"]
