"""Pairs from tables and dumps: what becomes a pair, what is left out, and that no text is in two splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisobert.tasks import dumps, pairs
from tests.tasks.test_tasks import archive, everything, row, site
from tests.tasks.test_tasks import table as csv_of


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    return csv_of(path, "question,answer", rows)


def read(*paths: Path, **options):
    return pairs.read(list(paths), 0, **options)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=60, max_size=90, unique=True))
def test_no_text_is_on_two_sides(tmp_path_factory, drawn):
    """Texts are connected by any chain of pairs; a text is the same in another case and with other white space."""
    rows = [(f"q {a}" if b % 2 else f" Q\t{a}", f"a {b}" if a % 2 else f"A  {b}") for a, b in drawn]
    rows += [(f"alone {i}", f"its own {i}") for i in range(30)]
    path = table(tmp_path_factory.mktemp("pairs") / "rows.csv", rows)
    data = read(path, text=("question", "answer"))
    sides = [
        {text.casefold().replace("\t", " ").replace("  ", " ").strip() for e in part for text in (e.text, e.other)}
        for part in (data.train, data.dev, data.test)
    ]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(everything(data)) == len(rows) and all(sides)


def test_rows_that_are_no_pair_are_counted(tmp_path):
    rows = [(f"q{i}", f"a{i}") for i in range(30)] + [("", "a"), ("q", " "), ("Same", " same"), ("q0", "a0")]
    data = read(table(tmp_path / "rows.csv", rows), text=("question", "answer"))
    assert len(everything(data)) == 30
    assert sum("left out" in note for note in data.notes) == 4
    assert any("its two texts are the same" in note for note in data.notes)


@pytest.mark.parametrize(
    "text, expected",
    [
        ((), "--text is missing; name two, the query's first, or one"),
        (("question", "answer", "id"), "--text question answer id names 3 columns; name two"),
        (("question", "reply"), "no column 'reply'; its columns are question, answer"),
    ],
)
def test_the_columns_must_be_named(text, expected, tmp_path):
    path = table(tmp_path / "rows.csv", [("q", "a")])
    with pytest.raises(ValueError, match=expected):
        read(path, text=text)


def test_two_passages_of_a_text_make_a_pair(tmp_path):
    """The passages are adjacent, have the text's own words and line ends, and texts that are too short are counted."""
    texts = [" ".join(f"w{i}.{j}" + "\n" * (j % 7 == 0) for j in range(40 + 9 * i)) for i in range(40)]
    rows = [(text, "") for text in [*texts, "too short " * 19]]
    data = read(table(tmp_path / "rows.csv", rows), text=("question",))
    assert len(everything(data)) == 40 and any("fewer than 40 words" in note for note in data.notes)
    for e in everything(data):
        whole = texts[int(e.text[1:].partition(".")[0])]
        assert min(len(e.text.split()), len(e.other.split())) >= pairs.SHORTEST
        assert max(len(e.text.split()), len(e.other.split())) <= pairs.PASSAGE
        before, after = whole.index(e.text), whole.index(e.other)
        assert whole[before + len(e.text) : after].isspace()
    again = read(table(tmp_path / "again.csv", rows[::-1]), text=("question",))
    assert {(e.text, e.other) for e in everything(again)} == {(e.text, e.other) for e in everything(data)}


@pytest.fixture
def dump(tmp_path) -> Path:
    """Questions from 100 on. Of each three, one has an accepted answer that is not the best, one only a best answer,
    and one none."""
    posts = []
    for i in range(100, 160):
        accepted = {"AcceptedAnswerId": i * 10} if i % 3 == 0 else {}
        posts.append(row(1, i, Title=f"t{i}", AnswerCount=0 if i % 3 == 2 else 2, **accepted))
        if i % 3 != 2:
            posts += [row(2, i * 10, ParentId=i, Score=-1), row(2, i * 10 + 1, ParentId=i, Score=7)]
    return site(tmp_path / "dump", posts)


def links(folder: Path) -> Path:
    rows = [(1, 102, 105, 3), (2, 108, 111, 1), (3, 114, 999, 3), (4, 117, 100, 3), (5, 120, 120, 3)]
    text = "".join(f'<row Id="{i}" PostId="{a}" RelatedPostId="{b}" LinkTypeId="{k}" />\n' for i, a, b, k in rows)
    path = folder / "PostLinks.xml"
    path.write_text(f"<postlinks>\n{text}</postlinks>")
    return path


def test_a_question_has_its_accepted_answer_or_else_the_best_one(dump):
    data = read(dump)
    found = {e.text: e.other for e in everything(data)}
    assert found == {f"t{i}\n\nb{i}": f"b{i * 10 + i % 3}" for i in range(100, 160) if i % 3 != 2}
    assert "dump: 20 questions with their accepted answer" in data.notes
    assert any("20 questions with the answer of the highest score" in note for note in data.notes)


def test_a_duplicate_finds_the_question_that_it_repeats(dump):
    """It is not paired with itself, a question that is only linked, or one that is not there."""
    before = {(e.text, e.other) for e in everything(read(dump))}
    links(dump)
    data = read(dump)
    added = {(e.text, e.other) for e in everything(data)} - before
    assert added == {("t102\n\nb102", "t105\n\nb105"), ("t117\n\nb117", "t100\n\nb100")}
    split = next(part for part in (data.train, data.dev, data.test) if any(e.id.endswith("117-100") for e in part))
    assert any(e.text == "t100\n\nb100" for e in split)  # its own answer is on the same side


def test_the_table_of_links_is_found_beside_the_archive_of_posts(dump, tmp_path):
    posts = archive(tmp_path / "toys.com-Posts.7z", dump / "Posts.xml")
    assert dumps.links(posts) is None and dumps.links(dump) is None
    archive(tmp_path / "toys.com-PostLinks.7z", links(tmp_path))
    assert dumps.links(posts).name == "PostLinks.xml"
    assert {e.id for e in everything(read(posts))} > {"toys.com-Posts.7z:102-105"}


def test_questions_are_drawn_by_the_seed_in_bounded_memory(dump, monkeypatch):
    whole = {e.id for e in everything(read(dump))}
    monkeypatch.setattr(pairs, "MOST", 30)
    few = {e.id for e in everything(read(dump))}
    assert len(few) == 30 and few < whole
    assert few == {e.id for e in everything(read(dump))} != {e.id for e in everything(pairs.read([dump], 1))}


def test_only_dumps_need_no_columns(dump):
    with pytest.raises(ValueError, match="--text is for tables, and only dumps are given"):
        read(dump, text=("a", "b"))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_objects_need_not_all_have_the_keys(suffix, tmp_path):
    """Not even the first object; and the note says at which line left-out rows begin."""
    objects = [{"question": "alone"}, *({"question": f"q{i}", "answer": f"a{i}"} for i in range(30))]
    path = tmp_path / f"rows{suffix}"
    path.write_text("\n".join(map(json.dumps, objects)))
    data = read(path, text=("question", "answer"))
    assert len(everything(data)) == 30
    assert any("1 row left out, without a text in answer (first: line 1)" in note for note in data.notes)
