"""Tables as people have them: which example gets which class, what is left out with a note, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minisobert.corpus.tables import rows
from minisobert.tasks import labels
from minisobert.tasks.files import File
from minisobert.tasks.splits import fingerprint


def everything(data):
    return [*data.train, *data.dev, *data.test]


def shown(data) -> dict[str, str]:
    return {e.text: data.labels[e.label] for e in everything(data)}


def table(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def many(n: int = 20, names=("Größe & Farbe", "billing team", "BILLING TEAM")) -> list[tuple[str, str]]:
    return [(f"text {i} of {k}", name) for k, name in enumerate(names) for i in range(n)]


def lines(pairs, sep: str = ",", end: str = "\n") -> str:
    return end.join([f"body{sep}team", *(sep.join(pair) for pair in pairs), ""])


@pytest.mark.parametrize(("name", "text", "encoding"), [
    ("t.csv", lines(many()), "utf-8"),
    ("t.csv", lines(many(), end="\r\n"), "utf-8-sig"),
    ("t.csv", lines(many(), end="\r"), "utf-8"),
    ("t.csv", lines(many(), sep=";"), "utf-8-sig"),
    ("t.tsv", lines(many(), sep="\t"), "utf-8"),
    ("t.jsonl", "\n".join(json.dumps({"team": y, "body": x, "more": [1]}) for x, y in many()), "utf-8-sig"),
])  # fmt: skip
def test_every_kind_of_table_gives_the_same_examples(name, text, encoding, tmp_path):
    data = labels.read([table(tmp_path / name, text, encoding)], 0, text=("body",), label="team")
    assert shown(data) == dict(many()) and data.columns == ("body",)
    assert any(
        "classes that differ in case" in note and "'billing team' and 'BILLING TEAM'" in note for note in data.notes
    )
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text.encode(encoding)))
    again = labels.read([packed], 0, text=("body",), label="team")
    assert (again.labels, shown(again)) == (data.labels, shown(data))


def test_a_parquet_file_gives_them_too(tmp_path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pytest.skip("pyarrow is not installed: pip install 'minisobert[tables]'")
    bodies, teams = zip(*many(), (None, "x"), ("no team", None))
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"body": bodies, "team": teams, "n": range(62)}), path)
    data = labels.read([path], 0, text=("body",), label="team")
    assert shown(data) == dict(many()) and sum("1 row left out, without a" in note for note in data.notes) == 2
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as \.parquet"):
        labels.read([path], 0)


def test_a_parquet_file_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet needs pyarrow: pip install 'minisobert\[tables\]'"):
        labels.read([tmp_path / "t.parquet"], 0)


def test_fields_with_quotes_newlines_tabs_and_nothing(tmp_path):
    path = table(tmp_path / "t.csv", 'title,text,label\r\n"a ""b""","one\r\ntwo\tthree",x\r\n,only,y\r\n'
                 + "".join(f"t{i},b{i},{'xy'[i % 2]}\r\n" for i in range(40)))  # fmt: skip
    found = shown(labels.read([path], 0, text=("title", "text")))
    assert found['a "b"\n\none\ntwo\tthree'] == "x" and found["only"] == "y" and found["t3\n\nb3"] == "y"


def test_rows_that_cannot_be_used_are_counted_with_their_reason(tmp_path):
    bad = 'two,fields,more\n,x\n   ,x\n"a"b,x\nno class,\n'
    path = table(tmp_path / "t.csv", "text,label\n" + bad + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40)))
    data = labels.read([path], 0)
    assert len(everything(data)) == 40
    told = [note.partition(": ")[2] for note in data.notes if "left out" in note]
    assert told == [
        "1 row left out, 3 fields, but the header has 2; is a quote missing? (first: line 2)",
        "2 rows left out, without a text (first: line 3)",
        "1 row left out, a quote is missing or too many (',' expected after '\"') (first: line 5)",
        "1 row left out, without a label (first: line 6)",
    ]
    odd = ['{"text": 1, "label": "x"}', '{"text": null, "label": "x"}', '{"text": ["a"], "label": "x"}', "[]", "{",
           '{"label": "x"}', '{"text": "\\ud800", "label": "x"}', '\ufeff{"text": "inside", "label": 7}']  # fmt: skip
    good = [json.dumps({"text": f"t{i}", "label": "xy"[i % 2]}) for i in range(40)]
    data = labels.read([table(tmp_path / "t.jsonl", "\n".join([*odd, *good, '{"text": "t", "label": true}']))], 0)
    assert shown(data)["inside"] == "7" and shown(data)["t"] == "true" and len(everything(data)) == 42
    left_out = Counter(note.partition("left out, ")[2].partition(" (")[0] for note in data.notes)
    assert {"text is a number, not text", "without a text", "text is a list, not text", "no JSON object",
            "text holds half of a surrogate pair"} <= set(left_out)  # fmt: skip


def test_a_quote_that_is_never_closed_is_said(tmp_path):
    path = table(tmp_path / "t.csv", "text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40)) + '"open,x\n')
    assert any("1 row left out, a quote is missing" in note for note in labels.read([path], 0).notes)


def test_the_same_text_is_never_on_two_sides(tmp_path):
    pairs = [(f"Text  {i // 2}" if i % 2 else f"text {i // 2}", "xyz"[i % 3]) for i in range(300)]
    data = labels.read([table(tmp_path / "t.csv", "text,label\n" + "".join(f"{x},{y}\n" for x, y in pairs))], 0)
    sides = [{fingerprint(e.text) for e in part} for part in (data.train, data.dev, data.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(everything(data)) == 150
    assert any("a duplicate with another label" in note for note in data.notes)
    # if files name the splits, test keeps the text
    table(tmp_path / "my_train.csv", "text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40)))
    table(tmp_path / "my_test.csv", "text,label\nT1,x\nnew,x\n")
    data = labels.read([tmp_path / "my_train.csv", tmp_path / "my_test.csv"], 0)
    assert {e.text for e in data.test} == {"T1", "new"} and "t1" not in {e.text for e in data.train + data.dev}
    assert "1 left out of train, since their text is in test too" in data.notes


def test_splits_by_a_column_and_drawn_class_by_class(tmp_path):
    sides = ["train"] * 8 + ["Valid", "TEST"]
    text = "text,label,fold\n" + "".join(f"t{i},{'xy'[i % 2]},{sides[i // 2 % 10]}\n" for i in range(40))
    data = labels.read([table(tmp_path / "some_test.csv", text + "t,x,\nu,x,7\n")], 0, split="fold")
    assert [len(part) for part in (data.train, data.dev, data.test)] == [32, 4, 4]
    assert any("2 rows left out, fold is none of train" in note for note in data.notes)
    drawn = labels.read([table(tmp_path / "t.csv", lines(many(40)))], 0, text=("body",), label="team")
    for part in (drawn.dev, drawn.test):
        assert Counter(e.label for e in part) == {0: 4, 1: 4, 2: 4}
    assert drawn == labels.read([tmp_path / "t.csv"], 0, text=("body",), label="team")


def test_other_tables_of_a_folder_are_left_out_and_said(tmp_path):
    table(tmp_path / "a.csv", "text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40)))
    table(tmp_path / "b.csv", "name,price\na,1\n")
    table(tmp_path / "notes.txt", "mine")
    data = labels.read([tmp_path], 0)
    assert data.notes[0] == f"{tmp_path / 'b.csv'} was left out, since it has no column 'text'"
    assert len(everything(data)) == 40
    for paths, options in (([tmp_path / "a.csv", tmp_path / "b.csv"], {}), ([tmp_path], {"text": ("body",)})):
        with pytest.raises(
            ValueError, match=r"has no column '(text|body)'; its columns are (name, price|text, label);"
        ):
            labels.read(paths, 0, **options)
    with pytest.raises(ValueError, match="--label text is one of the columns of --text"):
        labels.read([tmp_path], 0, label="text")


def test_a_text_may_have_several_classes(tmp_path):
    given = [["b c", "a"], ["a"], [], ["a", "a", "d"]]
    cells = [";".join([*each, " "]) for each in given]
    table(tmp_path / "t.csv", "text,label\n" + "".join(f"text {i},{cells[i % 4]}\n" for i in range(120)))
    lists = [json.dumps({"text": f"text {i}", "label": given[i % 4]}) for i in range(120)]
    table(tmp_path / "t.jsonl", "\n".join(lists))
    for name in ("t.csv", "t.jsonl"):
        data = labels.read([tmp_path / name], 0, several=True)
        assert data.several and data.labels == ("a", "b c", "d")
        found = {e.text: {data.labels[c] for c in e.tags} for e in everything(data)}
        assert found == {f"text {i}": set(given[i % 4]) for i in range(120)}
        drawn = Counter(e.tags for e in data.test)  # a text is drawn by its rarest class
        assert drawn[0, 1] == drawn[0, 2] == 3 and drawn[0,] + drawn[()] == 6
        assert data.notes[-1] == "texts without a class: 30"
    table(tmp_path / "u.jsonl", "\n".join([*lists, '{"text": "a", "label": null}', '{"text": "b"}']))
    assert "2 rows left out, without a label (first: line 121)" in "".join(
        labels.read([tmp_path / "u.jsonl"], 0, several=True).notes
    )
    with pytest.raises(ValueError, match="label is a list, which --several takes"):
        labels.read([tmp_path / "t.jsonl"], 0)


def test_thousands_of_classes_and_some_with_a_single_row(tmp_path):
    draw = np.random.default_rng(0)
    of = [*range(3_000), *(3_000 * draw.random(9_000) ** 2).astype(int)]
    path = table(tmp_path / "t.csv", "text,label\n" + "".join(f"text {i},class {c}\n" for i, c in enumerate(of)))
    data = labels.read([path], 0)
    assert len(data.labels) == 3_000 and {e.label for e in data.train} == set(range(3_000))
    assert all(
        1_000 < len(part) < 1_200 for part in (data.dev, data.test)
    )  # 10 %, except what classes with one or two rows still owe
    count = Counter(of)
    assert list(data.labels) == sorted(data.labels, key=lambda name: (-count[int(name[6:])], name))


def test_classes_that_train_lacks_stay_and_those_without_examples_go(tmp_path):
    train = "text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(40))
    table(tmp_path / "train.csv", train + "T0,gone\n")
    table(tmp_path / "test.csv", "text,label\na,x\nb,new\n")
    data = labels.read([tmp_path], 0)
    assert set(data.labels) == {"x", "y", "new"} and shown(data)["b"] == "new" and shown(data)["t1"] == "y"
    assert data.notes[-2:] == [
        "classes left out, since all their rows are duplicates of others: 1 (gone)",
        "classes of dev or test that train lacks, whose rows count as wrong: 1 (new)",
    ]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("t.csv", "title,body,team\na,b,c\n", "has no column 'text'; its columns are title, body, team; name yours"),
    ("t.jsonl", '{"text": "a", "team": "b"}\n', "has no column 'label'; its columns are text, team; name yours"),
    ("t.csv", "text,label\n", "has no column 'text'; it has no rows"),
    ("t.csv", "text,label\n" + "".join(f"t{i},x\n" for i in range(30)), "all rows are 'x'; at least two classes"),
    ("t.csv", "text,text,label\na,b,c\n", "two columns named 'text'"),
    ("t.csv", "text,label\na,x\ncaf\udce9,x\n", ":3: not UTF-8; convert the file"),
    ("t.csv", "t\0e\0x\0t\0,\0", "not UTF-8 text: it holds NUL bytes; if it is UTF-16, convert it"),
    ("t.txt", "one\n", "of an unknown kind; give a folder, .7z, .csv, .tsv, .jsonl, .parquet"),
    ("t.xlsx", "PK", "of an unknown kind; give a folder, .7z, .csv, .tsv, .jsonl"),
    ("t.csv", "text,label\na,x\nb,y\n", "is empty; there are too few examples"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        labels.read([tmp_path / name], 0)
    told = str(error.value)
    assert expected in told and (name in told or told.startswith("labels: "))
    assert "\n" not in str(error.value)


def test_rows_are_read_one_at_a_time(tmp_path):
    """A file may be larger than memory: the first row comes before a damaged end is reached."""
    path = table(tmp_path / "t.jsonl.gz", "")
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(200_000)))[:-4_000])
    found = rows(File(path, ".jsonl", named=True))
    assert next(found).fields == {"text": "0"}
    with pytest.raises(ValueError, match="truncated or damaged"):
        for _ in found:
            pass


def test_class_names_lose_what_a_terminal_obeys():
    assert labels.class_name(" \x1b[31mred\n  alert\x07 ") == "[31mred alert"
