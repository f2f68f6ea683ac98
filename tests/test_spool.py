"""`data.prepare` leaves no text twice in a corpus, and no held-out text in training."""

import re
from collections import Counter

import pytest

from data import prepare as module
from data import reading
from data.prepare import main, prepare
from minisobert.corpus.shards import open_shards

ROW = '<row Id="{}" PostTypeId="{}" {} Body="{}" />\n'


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for place in (module, reading):
        monkeypatch.setattr(place, "BATCH", 500)


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def sides(out):
    """The texts of (training, held out)."""
    shards = open_shards(out)
    found = [shards.tokenizer().decode(shards.tokens[a:b]) for a, b in zip(shards.offsets, shards.offsets[1:])]
    return found[: len(shards.training_documents)], found[len(shards.training_documents) :]


def normal(texts):
    return {" ".join(text.split()) for text in texts}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LINES = [f"How do I read line {i} of a file?" for i in range(200)]
AGAIN = [line.replace(" ", "\u00a0\t") for line in LINES[::2]]  # equal except for white space


@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_documents_the_first_stays_and_the_rest_are_counted(tmp_path, workers):
    inputs = [
        write(tmp_path / "a.txt", [*LINES, *LINES[:3]]),
        write(tmp_path / "b.txt", [*AGAIN, "new", LINES[1].upper()]),
    ]
    meta = prepare(inputs, tmp_path / "out", vocab_size=300, workers=workers)
    training, held_out = sides(tmp_path / "out")
    assert Counter(training + held_out) == Counter([*LINES, "new", LINES[1].upper()])  # case matters
    assert meta["dropped"] == {"duplicates": 103}
    assert meta["duplicates"] == {"a.txt": 3, "b.txt": 100}
    assert meta["documents"] == 202
    assert meta["characters"] == sum(map(len, training + held_out))


def test_a_corpus_given_twice_is_the_corpus_given_once(tmp_path):
    """Except for the name of the second source, and the counts of what was left out."""
    (tmp_path / "again").mkdir()
    once, twice = write(tmp_path / "a.txt", LINES), write(tmp_path / "again/a.txt", LINES)
    prepare([once], tmp_path / "once", vocab_size=300, workers=1)
    prepare([once, twice], tmp_path / "twice", vocab_size=300, workers=1)
    files = {name: content(tmp_path / name) for name in ("once", "twice")}
    assert {name for name in files["once"] if files["once"][name] != files["twice"][name]} == {"meta.json"}


def test_of_equal_posts_the_first_stays_with_its_thread(tmp_path):
    """Comments are part of the text of a post; those of dropped posts are counted."""
    question = [ROW.format(i, 1, f'Title="Question {i % 40}"', "body") for i in range(1, 61)]
    answer = [ROW.format(100 + i, 2, f'ParentId="{i}"', f"answer {i}") for i in range(1, 61)]
    write(tmp_path / "Posts.xml", ["<posts>", *question, *answer, "</posts>"])
    comments = [f'<row Id="{n}" PostId="{post}" Text="me too" />' for n, post in enumerate((1, 41, 2))]
    write(tmp_path / "Comments.xml", ["<comments>", *comments, "</comments>"])
    meta = prepare([tmp_path], tmp_path / "out", vocab_size=300, workers=1)
    # 41 repeats 1 with the same comment; 42 lacks the comment that 2 has, and 43 to 60 repeat 3 to 20
    assert meta["dropped"] == {"duplicates": 19, "comments of dropped posts": 1}
    assert (meta["posts"], meta["comments"]) == (101, 2)
    training, held_out = sides(tmp_path / "out")
    assert len(held_out) in range(3, 7)  # 3 of 60 threads, with their questions if those stay
    assert not normal(training) & normal(held_out)


@pytest.mark.parametrize("options", [{}, {"keep_duplicates": True}])
@pytest.mark.parametrize("seed", range(3))
def test_no_held_out_text_is_also_in_training(tmp_path, options, seed):
    inputs = [write(tmp_path / "a.txt", LINES), write(tmp_path / "b.txt", AGAIN)]
    prepare(inputs, tmp_path / "out", vocab_size=300, workers=1, seed=seed, **options)
    training, held_out = sides(tmp_path / "out")
    assert len(held_out) >= 10
    assert not normal(training) & normal(held_out)


def test_kept_duplicates_leave_training_only_where_they_are_held_out(tmp_path):
    inputs = [write(tmp_path / "a.txt", LINES), write(tmp_path / "b.txt", AGAIN)]
    meta = prepare(inputs, tmp_path / "out", vocab_size=300, workers=1, keep_duplicates=True)
    training, held_out = sides(tmp_path / "out")
    assert len(held_out) == 15  # 5 % of 300
    left_out = Counter(LINES + AGAIN) - Counter(training + held_out)
    assert normal(left_out) <= normal(held_out)
    assert meta["dropped"] == {"in training, equal to a held-out document": sum(left_out.values())}
    assert sum(meta["duplicates"].values()) == sum(left_out.values()) > 0
    every_other = normal(AGAIN) - normal(held_out)
    assert every_other <= {text for text, n in Counter(" ".join(t.split()) for t in training).items() if n == 2}


def test_what_has_no_duplicates_is_prepared_the_same_with_any_of_the_options(tmp_path):
    lines = write(tmp_path / "a.txt", [f"{i} {i}{i} x{i} y{i} z{i} {i}w" for i in range(100)])
    prepare([lines], tmp_path / "plain", vocab_size=300, workers=1)
    prepare([lines], tmp_path / "kept", vocab_size=300, workers=1, keep_duplicates=True)
    assert content(tmp_path / "plain") == content(tmp_path / "kept")
    meta = prepare([lines], tmp_path / "near", vocab_size=300, workers=1, near_duplicates=0.8)
    assert meta["dropped"] == {} and "duplicates" not in meta
    assert content(tmp_path / "plain")["tokens.bin"] == content(tmp_path / "near")["tokens.bin"]


def edited(i, last="another"):
    """A text of 40 words. If only the last word is changed, it shares 35 of 37 runs of five words with the original."""
    return " ".join([*(f"w{i}x{word}" for word in range(39)), last])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_of_near_documents_the_first_stays_for_any_number_of_workers(tmp_path, workers):
    first, second = [edited(i) for i in range(50)], [edited(i, "again") for i in range(50)]
    inputs = [write(tmp_path / "a.txt", first), write(tmp_path / "b.txt", [*reversed(second), first[7]])]
    meta = prepare(inputs, tmp_path / "out", vocab_size=300, workers=workers, near_duplicates=0.8)
    training, held_out = sides(tmp_path / "out")
    assert sorted(training + held_out) == sorted(first)
    assert meta["dropped"] == {"duplicates": 1, "near duplicates": 50}
    assert meta["duplicates"] == {"b.txt": 51}
    assert meta["near_duplicates"] == 0.8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokens.bin", "documents.npy", "tokenizer.model", "meta.json"
    }  # fmt: skip
    if workers > 1:
        prepare(inputs, tmp_path / "one", vocab_size=300, workers=1, near_duplicates=0.8)
        assert content(tmp_path / "one") == content(tmp_path / "out")


def test_the_table_says_how_many_and_from_where(tmp_path, capsys):
    inputs = [
        write(tmp_path / "a.txt", [edited(1), edited(2)]),
        write(tmp_path / "b.txt", [edited(1), edited(1, "so")]),
    ]
    arguments = ["--input", *map(str, inputs), "--out", str(tmp_path / "out"), "--workers", "1", "--vocab-size", "300"]
    assert main([*arguments, "--near-duplicates", "0.8"]) == 0
    rows = dict(re.findall("^(.*duplicates.*?)  +([0-9]+)$", capsys.readouterr().out, re.M))
    assert rows == {"dropped: duplicates": "1", "dropped: near duplicates": "1", "duplicates in b.txt": "2"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--near-duplicates", "0.3"], "--near-duplicates is 0.3; it must be from 0.5 to 1"),
        (["--near-duplicates", "80"], "--near-duplicates is 80; it must be from 0.5 to 1"),
        (["--near-duplicates", "nan"], "--near-duplicates is nan; it must be from 0.5 to 1"),
        (["--near-duplicates", "0.8", "--keep-duplicates"], "contradict each other; leave one of them out"),
        (["--keep-duplicates"], "every document is equal to a held-out one; leave --keep-duplicates out"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, options, message):
    path = write(tmp_path / "a.txt", ["the same"] * 2)
    arguments = ["--input", str(path), "--out", str(tmp_path / "out"), "--workers", "1", "--vocab-size", "270"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, *options])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
