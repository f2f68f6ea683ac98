"""One's own types of entities: every scheme of tags, with columns and spans as people have them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisobert.tasks import metrics, tags
from minisobert.tasks.words import word_spans


def encoded(spans: list[tuple[int, int, str]], n: int, scheme: str) -> list[str]:
    """The tags of n words. scheme: the letters for the beginning, inside and end of an entity and for a whole one; in
    IOB1, an entity begins with B- only after one of the same type."""
    found = ["O"] * n
    for start, stop, kind in spans:
        if scheme == "IOB1":
            after = start and found[start - 1].endswith(f"-{kind}")
            found[start:stop] = [f"I-{kind}"] * (stop - start)
            found[start] = f"{'B' if after else 'I'}-{kind}"
            continue
        begins, inside, ends, single = scheme
        letters = single if stop - start == 1 else begins + inside * (stop - start - 2) + ends
        found[start:stop] = [f"{letter}-{kind}" for letter in letters]
    return found


@st.composite
def drawn_spans(draw):
    spans, at = [], 0
    while at < 12:
        at += draw(st.integers(0, 2))
        length = draw(st.integers(1, 4))
        spans.append((at, at + length, draw(st.sampled_from(["A", "B", "C_d-e"]))))
        at += length
    return spans, at


@given(drawn_spans())
def test_every_scheme_gives_the_same_entities(drawn):
    spans, n = drawn
    expected = {(kind, start, stop) for start, stop, kind in spans}
    for scheme in ("BIIB", "BIES", "BILU", "BMES", "IOB1"):
        bio, repaired = tags.to_bio([tags._split(tag) for tag in encoded(spans, n, scheme)])
        assert metrics.entities(bio) == expected
        assert all(tag[0] in "BIO" for tag in bio) and (repaired == 0 or scheme == "IOB1")


def test_schemes_are_those_of_seqeval():
    scheme = pytest.importorskip("seqeval.scheme")
    rows = {
        scheme.IOBES: "B-A I-A E-A S-A O S-B B-B E-B", scheme.BILOU: "B-A L-A U-A O B-B I-B L-B U-B",
        scheme.IOB1: "I-A I-A B-A O I-B I-A", scheme.IOB2: "B-A I-A B-A O B-B B-B",
    }  # fmt: skip
    for each, text in rows.items():
        theirs = {e.to_tuple()[1:] for e in scheme.Entities([text.split()], each).entities[0]}
        ours = metrics.entities(tags.to_bio([tags._split(tag) for tag in text.split()])[0])
        assert {(start, stop, kind) for kind, start, stop in ours} == {(a, b, kind) for kind, a, b in theirs}


def test_an_entity_that_has_ended_does_not_go_on():
    bio, repaired = tags.to_bio([tags._split(tag) for tag in ("B-A", "E-A", "I-A", "S-B", "M-B", "O", "I-B")])
    assert bio == ("B-A", "I-A", "B-A", "B-B", "B-B", "O", "B-B") and repaired == 3


def everything(data) -> dict[str, list[str]]:
    return {
        " ".join(e.words): [data.labels[tag] for tag in e.tags] for e in (*data.train, *data.dev, *data.test)
    }  # fmt: skip


def sentences(n: int = 40) -> list[list[tuple[str, str]]]:
    return [[(f"Part{i}", "B-Teil Nr"), ("x", "I-Teil Nr"), ("of", "O"), (f"Größe{i}", "B-Maß")] for i in range(n)]


@pytest.mark.parametrize(("line", "label"), [("{0}\t{1}", ""), ("{0}\tNN\t_\t{1}", ""), ("{0}\t{1}\t{0}\tO", "2")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_as_people_have_them(line, label, end, tmp_path):
    lines = [x for s in sentences() for x in (*(line.format(*word) for word in s), "")]
    (tmp_path / "all.conll").write_bytes(("\ufeff" + end.join(["# made by hand", *lines])).encode())
    data = tags.read([tmp_path / "all.conll"], 0, label=label)
    with pytest.raises(ValueError, match="--label is 'tag'; for tags give the number of a column"):
        tags.read([tmp_path / "all.conll"], 0, label="tag")
    assert data.labels == ("O", "B-Maß", "I-Maß", "B-Teil Nr", "I-Teil Nr")
    assert everything(data)["Part3 x of Größe3"] == ["B-Teil Nr", "I-Teil Nr", "O", "B-Maß"]
    assert [len(part) for part in (data.train, data.dev, data.test)] == [32, 4, 4]


def test_columns_with_spaces_between_and_odd_lines(tmp_path):
    good = "".join(f"w{i} B-A\n# O\n\n" for i in range(40))
    odd = "-DOCSTART- -X- O O\n\n# id = 5\n\u00a0\tO\nfoo S-A\n\nbad B_A\nword O\n\nalone\n\n \u00a0\nx I-A\ny E-A"
    (tmp_path / "a.txt").write_text(good + odd)
    data = tags.read([tmp_path / "a.txt"], 0)
    found = everything(data)
    assert found["w7 #"] == ["B-A", "O"] and found["foo"] == ["B-A"] and found["x y"] == ["B-A", "I-A"]
    assert len(found) == 42
    told = Counter(note.partition(": ")[2] for note in data.notes)
    assert told.keys() >= {
        "words left out, since they are white space: 1",
        "sentences left out, since 'B_A' is not a tag (O, or B-, I-, E- or S- with a type): 1",
        "sentences left out, since '' is not a tag (O, or B-, I-, E- or S- with a type): 1",
        "tags that continued no entity of their type, read as its beginning: 1",
    }


def test_documents_stay_together_where_there_are_enough(tmp_path):
    text = "".join(f"-DOCSTART- O\n\nw{i} B-A\n\nv{i} O\n\nu{i} I-A\n\n" for i in range(40))
    (tmp_path / "a.conll").write_text(text)
    data = tags.read([tmp_path / "a.conll"], 0)
    parts = [{word[1:] for e in part for word in e.words} for part in (data.train, data.dev, data.test)]
    assert sum(map(len, parts)) == 40 and [3 * len(part) for part in parts] == [96, 12, 12]
    (tmp_path / "train.conll").write_text(text)
    (tmp_path / "test.conll").write_text("W0 B-A\n\nnew B-New\n\n")
    data = tags.read([tmp_path / "train.conll", tmp_path / "test.conll"], 0)
    assert {e.words for e in data.test} == {("W0",), ("new",)}
    assert not any(e.words == ("w0",) for e in data.train + data.dev)
    assert data.notes[-1] == "types that train lacks, whose entities count as missed: New"


def test_spans_become_the_tags_of_their_words(tmp_path):
    text = "Use scikit-learn 1.2, not (foo)\tbar"
    spans = [
        [4, 16, "Lib"],
        [17, 20, "Version"],
        [27, 30, "Fn"],
        [32, 35, "Fn"],
        [0, 1, "Part"],
        [4, 10, "Inner"],
        [3, 4, "Space"],
    ]
    lines = [{"text": text, "spans": spans}]
    lines += [
        {"text": f"t{i} part{i}", "spans": [{"start": len(f"t{i} "), "end": len(f"t{i} part{i}"), "label": "A"}]}
        for i in range(40)
    ]
    lines[5]["spans"][0]["end"] -= 1
    bad = [{"text": "a"}, {"text": "a", "spans": [[0, 9, "A"]]}, {"text": "a", "spans": [[0, "1", "A"]]},
           {"text": "a", "spans": [[1, 1, "A"]]}, {"spans": []}, {"text": " \n", "spans": []}]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + bad) + "{\n")
    data = tags.read([path], 0)
    words = tuple(text[a:b] for a, b in word_spans(text))
    found = everything(data)
    assert dict(zip(words, found[" ".join(words)])) == {
        "Use": "B-Part", "scikit-learn": "B-Lib", "1.2": "B-Version", ",": "O", "not": "O", "(": "O", "foo": "B-Fn",
        ")": "O", "bar": "B-Fn",
    }  # fmt: skip
    assert found["t7 part7"] == ["O", "B-A"] and found["t4 part4"] == ["O", "B-A"]
    told = Counter(note.partition(": ")[2] for note in data.notes)
    assert told.keys() >= {
        "spans left out, since they hold no word: 1", "spans left out, since they share words with a longer one: 1",
        "spans widened, since they began or ended inside a word: 2",
        'rows left out, without "spans", a list of [start, end, "Type"]: 1',
        "rows left out, a span is empty, or reaches beyond the text: 2",
        'rows left out, a span is not [start, end, "Type"]: 1', "rows left out, without a text: 2",
        "rows left out, no JSON object: 1",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.conll", "a O\nb O\n\n", "tags: no sentence has an entity"),
    ("a.conll", "a X\n\n", "'X' is not a tag"),
    ("a.csv", "a,b\n", "of an unknown kind"),
    ("a.jsonl", '{"text": "a"}\n', 'without "spans"'),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        tags.read([Path(tmp_path / name)], 0)
    assert expected in str(error.value) and "\n" not in str(error.value)
