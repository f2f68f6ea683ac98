"""`data.prepare --decontaminate`: no dev or test text of a task is left in the corpus."""

import csv
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.decontamination import LINE, RUN, Texts
from data.prepare import main, prepare
from minisobert.corpus.shards import open_shards

LONG = " ".join(f"word{i}" for i in range(30))
SHORT = "How to sort a linked list in Java"  # four words: sort linked list java


@pytest.mark.parametrize(
    "text, document, found",
    [
        (LONG, LONG, True),
        (LONG, f"before\n\n{LONG.upper()}", True),
        (LONG, LONG.replace(" ", ",\n\t<b>"), True),  # nothing between words hides them
        (LONG, LONG.replace(" ", " of the "), True),
        (LONG, " ".join(LONG.split()[7 : 7 + RUN]), True),
        (LONG, " ".join(LONG.split()[7 : 6 + RUN]), False),  # one word fewer
        (LONG, " ".join(reversed(LONG.split())), False),
        (SHORT, SHORT, True),
        (SHORT, "sort: linked-list (JAVA)?", True),
        (SHORT, f"{SHORT}\n\nI have a list.", True),  # the title of a post
        (SHORT, f"{SHORT} by name", False),
        ("Thanks a lot", "Thanks a lot!", True),
        ("Thanks a lot", "I have a list.\nThanks a lot", False),  # fewer words than LINE
        ("What is this?", "What is this?", False),  # function words only
        ("", "", False),
        ("Größe der Straße ändern", "GRÖSSE DER STRASSE ÄNDERN", True),
    ],
)
def test_a_document_with_a_text_is_found_and_no_other(text, document, found):
    assert Texts([("ner", text)]).task_of(document) == ("ner" if found else None)


word = st.text(string.ascii_letters + "äß", min_size=1).map(lambda letters: f"x{letters}")  # not a function word
words = st.lists(st.tuples(word, st.sampled_from(["", ",", "_", "..."])).map("".join), min_size=1, max_size=30)


@given(words, words, words)
def test_a_text_inside_of_a_document_is_found(text, before, after):
    """Whatever the search does: a text of enough words anywhere, a shorter one as a line or alone."""
    count = len(text)
    text, before, after = " ".join(text), " ".join(before), " ".join(after)
    texts = Texts([("ner", text)])
    assert texts.task_of(text)
    if count >= LINE:
        assert texts.task_of(f"{before}\n{text}\n{after}")
    if count >= RUN:
        assert texts.task_of(f"{before} {text} {after}")


def titles(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("question_id", "title", "label"), *rows])


@pytest.fixture
def task(tmp_path):
    """A folder of closed titles, which are "title {i} of split {split}"."""
    folder = tmp_path / "closed"
    folder.mkdir()
    for split, first in (("train", 0), ("dev", 30), ("test", 60)):
        labels = ("open", "closed", "duplicate")
        rows = [(i, f"Why is number {i} so odd?", labels[i % 3]) for i in range(first, first + 30)]
        titles(folder / f"{split}.csv", rows)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_of_dev_and_test_leave_the_corpus_and_are_counted(task, tmp_path, workers, capsys):
    corpus = tmp_path / "titles.txt"
    corpus.write_text("".join(f"why is number  {i} so odd\nWhat else is there about {i}?\n" for i in range(90)))
    meta = prepare([corpus], tmp_path / "out", vocab_size=300, workers=workers, decontaminate=[f"closed={task}"])
    shards = open_shards(tmp_path / "out")
    left = [shards.tokenizer().decode(shards.tokens[a:b]) for a, b in zip(shards.offsets, shards.offsets[1:])]
    kept = [f"why is number  {i} so odd" for i in range(30)] + [f"What else is there about {i}?" for i in range(90)]
    assert sorted(left) == sorted(kept)
    assert meta["dropped"] == {"with a text of closed's dev or test": 60}
    assert meta["decontaminated"] == {"closed": 60}


def test_without_the_option_nothing_is_looked_for(task, tmp_path):
    """Not even in a process that has looked for texts before."""
    corpus = tmp_path / "titles.txt"
    corpus.write_text("".join(f"Why is number {i} so odd?\n" for i in range(90)))
    prepare([corpus], tmp_path / "first", vocab_size=300, workers=1, decontaminate=[f"closed={task}"])
    assert prepare([corpus], tmp_path / "second", vocab_size=300, workers=1)["documents"] == 90


@pytest.mark.parametrize(
    "option, message",
    [
        ("titles.csv", "it must be TASK=PATH, where TASK is one of quality, closed, ner, obsoletion"),
        ("spam=titles.csv", "it must be TASK=PATH"),
        ("closed=none.csv", "none.csv does not exist"),
        ("ner=IN", "is not a word and its tag"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, option, message):
    corpus = tmp_path / "titles.txt"
    corpus.write_text("a title\n")
    arguments = ["--input", str(corpus), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--decontaminate", option.replace("IN", str(corpus))])
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
