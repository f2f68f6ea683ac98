"""Reading the tasks' files: what becomes an example, what is left out, what is refused."""

import csv
import io
import lzma
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.tasks import derive, main
from minisobert.tasks import TASKS, closed, dumps, ner, obsoletion, quality

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def table(path, columns, rows):
    """Writes a .csv file, compressed if its name ends in .xz."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns.split(","), *rows])
    content = text.getvalue().encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


def archive(path, *files):
    with pytest.importorskip("py7zr").SevenZipFile(path, "w") as packed:
        for file in files:
            packed.write(file, f"inside/{file.name}")
    return path


def everything(dataset):
    return [*dataset.train, *dataset.dev, *dataset.test]


def shown(dataset, split="train"):
    return [(e.id, e.text, dataset.labels[e.label]) for e in getattr(dataset, split)]


def row(kind, number, **attributes):
    attributes = {
        "CreationDate": f"20{number % 10:02}-01-01T00:00:00",
        "Body": f"&lt;p&gt;b{number}&lt;/p&gt;",
    } | attributes
    return f'<row Id="{number}" PostTypeId="{kind}" ' + " ".join(f'{k}="{v}"' for k, v in attributes.items()) + " />\n"


def site(folder, posts, comments=()):
    folder.mkdir()
    (folder / "Posts.xml").write_text(f"<posts>\n{''.join(posts)}</posts>")
    if comments:
        said = "".join(f'<row Id="{i}" PostId="{post}" Text="{text}" />\n' for i, (post, text) in enumerate(comments))
        (folder / "Comments.xml").write_text(f"<comments>\n{said}</comments>")
    return folder


@pytest.fixture
def dump(tmp_path):
    """12 questions of each quality, with 2 answers each; half of the first answers are called obsolete."""
    edited = {"LastEditDate": "2020-01-01"}
    shut = {"ClosedDate": "2020-01-01"}
    posts, comments = [], []
    for i in range(100, 136):
        kind = ({"Score": 30}, {"Score": -1} | edited, {"Score": 1} | shut)[(i - 100) % 3]
        posts += [row(1, i, Title=f"t{i}", **kind), row(2, i * 10, ParentId=i), row(2, i * 10 + 1, ParentId=i)]
        comments += [(i * 10, "This is OUT of date."), (i * 10 + 1, "undeprecated")] if i % 2 else [(i, "obsolete")]
    posts += [row(1, 300, Title="neither", Score=3), row(1, 301, Title="both", Score=40, **shut), row(5, 302)]
    posts += [row(1, 303, Title="no body", Score=40, Body=""), row(1, 304, Title="no score", Score="many", **shut)]
    return site(tmp_path / "site", posts, comments)


def words(n=10):
    """Rows (text, Y) of n questions per class."""
    return [(f"{label} text {i}", label) for label in quality.LABELS for i in range(n)]


# splits and duplicates


def test_the_files_own_splits_are_kept(tmp_path):
    for split in ("train", "dev", "test"):
        rows = [(f"{split} {label}", label) for label in quality.LABELS]
        table(tmp_path / f"some_{split}.csv.xz", "text,Y", rows)
    found = TASKS["quality"].read([tmp_path], 0)
    for split in ("train", "dev", "test"):
        assert shown(found, split) == [
            (f"some_{split}:{i}", f"{split} {label}", label) for i, label in enumerate(quality.LABELS)
        ]


def test_what_the_files_lack_is_taken_from_train_by_the_seed(tmp_path):
    path = table(tmp_path / "q.csv", "text,Y", words(20))
    splits = [quality.read([path], seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert [len(part) for part in (splits[0].train, splits[0].dev, splits[0].test)] == [48, 6, 6]
    assert {e.id for e in everything(splits[0])} == {f"q:{i}" for i in range(60)}
    assert sorted(e.label for e in splits[0].test) == [0, 0, 1, 1, 2, 2]  # class by class


def test_no_thread_is_in_two_splits(dump):
    found = obsoletion.read([dump], 3)
    bodies = {split: {e.text.split("\n\n")[0] for e in getattr(found, split)} for split in ("train", "dev", "test")}
    assert all(bodies.values())
    assert not bodies["train"] & (bodies["dev"] | bodies["test"]) and not bodies["dev"] & bodies["test"]


def test_duplicates_and_shared_questions_are_left_out_of_train(tmp_path):
    columns = "question_id,title,label"
    train = [(i, f"t{i}", ("open", "closed", "duplicate")[i % 3]) for i in range(30)]
    train += [(50, "SAME  title", "open"), (51, "same title", "closed"), (60, "asked again", "open")]
    table(tmp_path / "train.csv", columns, train)
    table(tmp_path / "test.csv", columns, [(70, "same Title", "open"), (60, "asked", "open")])
    found = closed.read([tmp_path], 0)
    assert {"50", "51", "60"} & {e.id for e in found.train + found.dev} == set()
    assert len(found.train) + len(found.dev) == 30 and len(found.test) == 2
    assert found.notes[1:] == [
        "1 left out of train, a duplicate with the same label",
        "1 left out of train, a duplicate with another label",
        "1 left out of train, since their question is in test too",
    ]


# quality


def test_quality_loses_the_form_that_tells_its_class(tmp_path):
    markdown = (
        "See **bold** [the docs][1] and `x`:\r\n\r\n    <div>a</div>\r\n\r\n- one\r\n\r\n"
        "[![enter image description here][2]][2]\r\n\r\n  [1]: http://a.b/c\r\n  [2]: http://i.j/k.png\r\n"
    )
    html = (
        '<p>See <strong>bold</strong> <a href="http://a.b/c" rel="noreferrer">the docs</a> and <code>x</code>:</p>\n\n'
        "<pre><code>&lt;div&gt;a&lt;/div&gt;\n</code></pre>\n\n<ul>\n<li>one</li>\n</ul>\n\n"
        '<p><a href="http://i.j/k.png"><img src="http://i.j/k.png" alt="enter image description here"></a></p>\n'
    )
    assert quality.normalise(markdown) == quality.normalise(html) == "See bold the docs and x: a one"
    rows = [(i, f"T{i}", (html, markdown, html)[i % 3], "<c>", "2016", quality.LABELS[i % 3]) for i in range(30)]
    path = table(tmp_path / "60k.csv", "Id,Title,Body,Tags,CreationDate,Y", rows)
    found = quality.read([path], 0)
    assert {e.text for e in everything(found)} == {f"T{i} See bold the docs and x: a one" for i in range(30)}
    assert "removed" in found.notes[0]
    kept = quality.read([path], 0, keep_leak=True)
    assert {e.text for e in everything(kept)} == {f"T{i}\n\n{(html, markdown, html)[i % 3]}" for i in range(30)}
    assert "kept" in kept.notes[0]


def test_the_leak_has_the_same_splits(tmp_path):
    rows = [(f"{text}\r\n\r\nmore" if label == "LQ_EDIT" else text, label) for text, label in words(30)]
    path = table(tmp_path / "q.csv", "text,Y", rows)
    clean, leak = quality.read([path], 0), quality.read([path], 0, keep_leak=True)
    for split in ("train", "dev", "test"):
        assert [e.id for e in getattr(clean, split)] == [e.id for e in getattr(leak, split)]
    assert sum("\r" in e.text for e in everything(leak)) == 30 and not any("\r" in e.text for e in everything(clean))


def test_the_two_columns_lose_the_words_that_markup_left(tmp_path):
    leaky = "how to\r\n\r\npre code class lang js prettyprint override alter table lt b gt  end\n code pre href x rel"
    snippet = "begin snippet js hide false console true babel false codes end snippet"
    rows = [*words(), (leaky, "HQ"), (snippet, "HQ")]
    texts = {e.text for e in everything(quality.read([table(tmp_path / "q.csv", "text,Y", rows)], 0))}
    assert {"how to alter table b end x", "codes"} < texts


def test_quality_from_a_dump_follows_the_published_rule(dump):
    found = quality.read([dump], 0)
    assert {(e.id, quality.LABELS[e.label], e.text) for e in everything(found)} == {
        (f"site:{i}", quality.LABELS[(i - 100) % 3], f"t{i} b{i}") for i in range(100, 136)
    }
    left_out = {
        "site: 1 posts without id or body left out",
        "site: 1 questions left out, since their score is not a number",
    }
    assert left_out < set(found.notes)


# closed


def test_closed_in_the_kaggle_layout(tmp_path):
    columns = (
        "PostId,PostCreationDate,OwnerUserId,OwnerCreationDate,ReputationAtPostCreation,"
        "OwnerUndeletedAnswerCountAtPostTime,Title,BodyMarkdown,Tag1,Tag2,Tag3,Tag4,Tag5,PostClosedDate,OpenStatus"
    )
    status = closed.CLASSES["kaggle"]
    rows = [(i, *"abcde", f"t{i}", "x\r\n\r\n    y ", *"123456", status[i % 5]) for i in range(50)]
    found = closed.read([table(tmp_path / "train-sample.csv", columns, rows)], 0)
    assert found.labels == status and ("0", "t0\n\nx\n\n    y", "open") in [
        x for s in ("train", "dev", "test") for x in shown(found, s)
    ]
    both = closed.read([tmp_path], 0, binary=True)
    assert both.labels == ("open", "closed")
    assert {e.id: e.label for e in everything(both)} == {str(i): int(i % 5 > 0) for i in range(50)}


def test_open_or_closed_keeps_the_splits_of_the_reasons(tmp_path):
    rows = [(i, f"title {i}", ("open", "closed", "duplicate")[i % 3]) for i in range(300)]
    path = table(tmp_path / "titles.csv", "question_id,title,label", rows)
    reasons, binary = closed.read([path], 0), closed.read([path], 0, binary=True)
    for split in ("train", "dev", "test"):
        of_reasons, of_binary = getattr(reasons, split), getattr(binary, split)
        assert [(e.id, min(e.label, 1)) for e in of_reasons] == [(e.id, e.label) for e in of_binary]


def test_notices_of_closing_are_taken_from_tables_too(tmp_path):
    columns = "Title,BodyMarkdown,OpenStatus"
    body = "> **Possible Duplicate:**  \r\n> [How to x](http://a/b)  \r\n\r\nSo how?"
    rows = [(f"t{i} [closed]", body, name) for i, name in enumerate(closed.CLASSES["kaggle"] * 10)]
    found = closed.read([table(tmp_path / "k.csv", columns, rows)], 0)
    assert {e.text.partition("\n\n")[2] for e in everything(found)} == {"So how?"}
    assert not any("[closed]" in e.text for e in everything(found))
    assert "k: 50 notices of closing removed from questions" in found.notes


def test_closed_from_a_dump_without_what_closing_wrote(tmp_path):
    notice = "<blockquote>&#xA;  <p><strong>Possible Duplicate:</strong>x</p>&#xA;</blockquote>"
    notice = notice.replace("<", "&lt;").replace(">", "&gt;")
    posts = [row(1, i, Title=f"t{i}") for i in range(100, 110)]
    posts += [row(1, i, Title=f"t{i} [closed]", Body=f"{notice} b{i}", ClosedDate="2020") for i in range(110, 120)]
    dump = site(tmp_path / "site", posts, [(100, "comment")])
    found = closed.read([dump], 0)
    assert {e.id: (e.text, e.label) for e in everything(found)} == {
        f"site:{i}": (f"t{i}\n\nb{i}", int(i >= 110)) for i in range(100, 120)
    }
    assert "site: 10 notices of closing removed from questions" in found.notes
    reasons = [(i, closed.CLASSES["reasons"][i % 6]) for i in range(100, 119)]
    table(tmp_path / "reasons.csv", "question_id,closed_reason", reasons)
    named = closed.read([dump, tmp_path / "reasons.csv"], 0)
    assert {(e.id, named.labels[e.label]) for e in everything(named)} == {(f"site:{i}", name) for i, name in reasons}
    with pytest.raises(ValueError, match="holds no texts; add the dump"):
        closed.read([tmp_path / "reasons.csv"], 0)


# ner

NER = """Question_ID\tO
:\tO
12\tO
\t
Use\tO\tUse\tO
java.util\tI-Library_Class
.List\tI-Class_Name
42\tB-Value

CODE_BLOCK\tB-Code_Block
:\tI-Code_Block
Q_1\tI-Code_Block
(\tI-Code_Block
code\tI-Code_Block
omitted\tI-Code_Block
for\tI-Code_Block
annotation\tI-Code_Block
)\tI-Code_Block

Mozilla\tB-Organization
rocks\tI-Library_Function
"""


def test_ner_by_the_rules_of_its_authors(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.txt").write_text(NER)
    packed = archive(tmp_path / "ner.7z", *(tmp_path / f"{split}.txt" for split in ("train", "dev", "test")))
    found = TASKS["ner"].read([packed], 0)
    assert found.labels == ("O", "B-Class", "I-Class", "B-Function", "I-Function", "B-Website", "I-Website")
    first, second = found.train
    assert first.words == ("Use", "java.util", ".List", "42") and second.words == ("Mozilla", "rocks")
    assert [found.labels[tag] for tag in first.tags] == ["O", "B-Class", "I-Class", "O"]
    assert [found.labels[tag] for tag in second.tags] == ["B-Website", "B-Function"]
    assert {note for note in found.notes if note.startswith("train")} == {
        "train: 1 headers left out",
        "train: 1 placeholders left out",
        "train: 1 entities in them",
        "train: 2 I- that continued no entity of their type, read as B-",
    }
    assert "2 sentences of test are in train too, and were kept" in found.notes


def test_ner_without_splits_is_split_by_question(tmp_path):
    text = "".join(f"Question_ID\tO\n:\tO\n{q}\tO\n\n" + f"q{q}\tO\nJava\tB-Language\n\n" * 2 for q in range(20))
    (tmp_path / "all.txt").write_text(text)
    found = ner.read([tmp_path / "all.txt"], 0)
    questions = [{e.words[0] for e in part} for part in (found.train, found.dev, found.test)]
    assert [len(part) for part in questions] == [16, 2, 2] and len(set.union(*questions)) == 20


def test_ner_without_splits_and_headers_is_split_by_sentence_and_repeats_none(tmp_path):
    text = "".join(f"s{i}\tO\nJava\tB-Language\n\n" for i in [*range(40), *range(40)])
    (tmp_path / "all.txt").write_text(text)
    found = ner.read([tmp_path / "all.txt"], 0)
    assert len({e.words for e in everything(found)}) == len(everything(found)) == 40


# obsoletion


def test_obsoletion_from_a_dump(dump):
    found = everything(obsoletion.read([dump], 0))
    assert {e.id for e in found if e.label} == {f"site:{i * 10}" for i in range(101, 136, 2)}
    assert {e.id for e in found if not e.label} == {f"site:{i * 10 + 1}" for i in range(101, 136, 2)}  # beside them
    assert "t101\n\nb1010" in {e.text for e in found}
    assert not any("date" in e.text for e in found)


def test_negatives_are_of_the_same_year_where_the_question_has_none(tmp_path):
    posts = [row(1, i, Title=f"t{i}") for i in range(100, 160)] + [
        row(2, i * 10 + i % 3, ParentId=i) for i in range(100, 160)
    ]
    obsolete = [i * 10 + i % 3 for i in range(100, 112)]
    dump = site(tmp_path / "site", posts, [(post, "deprecated") for post in obsolete])
    rows = obsoletion.derive(dump, 0, [])
    years = {label: sorted(int(r["AnswerID"]) % 10 for r in rows if r["Label"] == label) for label in obsoletion.LABELS}
    assert years["current"] == years["obsolete"] and len(years["current"]) == 12


def test_obsoletion_by_a_list_of_comments(dump, tmp_path):
    listed = [(i, i * 10 + 1, 1, "obsolete") for i in range(100, 120)]
    path = table(tmp_path / "comments.csv", "QuestionID,AnswerID,CommentID,CommentText", listed)
    found = everything(obsoletion.read([path, dump], 0))
    assert {e.id for e in found if e.label} == {f"site:{i * 10 + 1}" for i in range(100, 120)}
    # 1010, 1030, … are called obsolete only by the dump, so they have no class; comments without the words do not count
    assert not {f"site:{i * 10}" for i in range(101, 136, 2)} & {e.id for e in found}
    columns = "QuestionID,AnswerID,CommentID,CommentText"
    thanks = table(tmp_path / "thanks.csv", columns, [*listed, (100, 1000, 2, "ok")])
    again = obsoletion.read([thanks, dump], 0)
    assert {e.id for e in everything(again)} == {e.id for e in found}
    assert any(note.startswith("1 comments left out") for note in again.notes)
    with pytest.raises(ValueError, match="add the one dump that they are from"):
        obsoletion.read([path], 0)


# derived sets


def test_derived_sets_are_read_back_as_the_dump_is(dump, tmp_path, capsys):
    assert main(["--input", str(dump), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["closed.csv", "obsoletion.csv", "quality.csv"]
    assert "quality: 12 HQ, 12 LQ_EDIT, 12 LQ_CLOSE" in capsys.readouterr().out
    for task in ("quality", "closed", "obsoletion"):
        direct, back = TASKS[task].read([dump], 0), TASKS[task].read([tmp_path / "out"], 0)
        assert {(e.id.split(":")[1], e.text, e.label) for e in everything(direct)} == {
            (e.id, e.text, e.label) for e in everything(back)
        }


def test_a_class_is_sampled_by_the_seed_in_bounded_memory(dump, monkeypatch):
    monkeypatch.setattr(dumps, "PER_CLASS", 5)
    drawn = [[r["Id"] for r in quality.derive(dump, seed, [])] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 15
    notes = []
    quality.derive(dump, 0, notes)
    assert "site: 7 HQ left out by chance" in notes


def test_nothing_is_overwritten_or_half_written(dump, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ValueError, match="exists already and is not empty"):
        derive(dump, out)
    with pytest.raises(SystemExit, match="2"):
        main(["--input", str(dump), "--out", str(out)])
    monkeypatch.setitem(TASKS, "obsoletion", replace(TASKS["obsoletion"], derive=lambda *args: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        derive(dump, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def test_a_set_without_one_of_its_classes_is_not_written(tmp_path):
    dump = site(tmp_path / "site", [row(1, 100, Title="t"), row(1, 101, Title="t", ClosedDate="2020")])
    report = derive(dump, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["closed.csv"]
    assert "quality: not written: a class has no example (0 HQ, 0 LQ_EDIT, 1 LQ_CLOSE)" in report
    assert any(line.startswith("obsoletion: not written: ") and "Comments.xml" in line for line in report)
    dump = site(tmp_path / "calm", [row(1, 100, Title="t")])
    with pytest.raises(ValueError, match="nothing can be derived"):
        derive(dump, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# what is refused


def test_long_fields_quotes_and_a_byte_order_mark(tmp_path):
    path = table(tmp_path / "q.csv", "text,Y", [*words(), ('"long"\n' * 100_000, "HQ")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert max(len(e.text) for e in everything(quality.read([path], 0))) == 699_999


def refused(task, path):
    with pytest.raises(ValueError) as caught:
        TASKS[task].read([path], 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (
            "body,Y",
            words(),
            r"q.csv has the columns body, Y; quality reads a .csv file with the columns Title, Body, Y or",
        ),
        (
            "text,Y",
            [*words(), ("x", "GOOD")],
            r"q.csv, line 32: unknown label 'GOOD'; the labels are HQ, LQ_EDIT, LQ_CLOSE",
        ),
        ("text,Y", [*words(), (" \r\n", "HQ")], r"the text is empty without its markup; remove the row"),
        ("text,Y", [*words(), ("x", "HQ", "y")], r"line 32 has 3 fields, but the header has 2; is a quote missing\?"),
        ("text,Y", words()[:20], r"quality: train holds no LQ_CLOSE \(it holds 8 HQ, 8 LQ_EDIT\)"),
        ("text,Y", words(1), r"quality: test is empty"),
        ("text,Y", [], r"nothing to train on: no example was given"),
    ],
)
def test_bad_tables_are_one_clear_line(tmp_path, columns, rows, message):
    assert re.search(message, refused("quality", table(tmp_path / "q.csv", columns, rows)))


def test_bad_files_are_one_clear_line(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,Y\ncafé,HQ\n".encode("latin-1"))
    assert "latin.csv is not UTF-8" in refused("quality", latin)
    latin.write_bytes("text,Y\ncafe,HQ\n".encode("utf-16-le"))
    assert "latin.csv is not UTF-8 text" in refused("quality", latin)
    cut = table(tmp_path / "cut.csv.xz", "text,Y", words(1_000))
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "cut.csv.xz is truncated or damaged" in refused("quality", cut)
    broken = tmp_path / "broken.7z"
    broken.write_bytes(b"7z")
    assert "broken.7z is truncated or not a .7z archive" in refused("closed", broken)
    assert "missing does not exist" in refused("ner", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "nothing to read in" in refused("obsoletion", tmp_path / "empty")
    (tmp_path / "a.pdf").write_text("")
    assert "a.pdf is of an unknown kind" in refused("closed", tmp_path / "a.pdf")
    (tmp_path / "a.csv").write_text("")
    assert "a.csv has no columns" in refused("closed", tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("Java B-Language\n")
    assert "a.txt, line 1: 'Java B-Language' is not a word and its tag" in refused("ner", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("Java\tB-Languages\n")
    assert "a.txt, line 1: unknown label 'B-Languages'" in refused("ner", tmp_path / "a.txt")


def test_names_of_splits_must_be_on_all_files_or_none(tmp_path):
    first, second = table(tmp_path / "train.csv", "text,Y", words()), table(tmp_path / "more.csv", "text,Y", words())
    with pytest.raises(ValueError, match="name all or none"):
        quality.read([first, second], 0)
    with pytest.raises(ValueError, match="nothing to train on: test was given"):
        quality.read([first.rename(tmp_path / "test.csv")], 0)


# the real files

real = pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="needs ../shared/data/tasks, which is not there")


@real
def test_the_ner_corpus_has_the_published_numbers_of_sentences_and_entities():
    found = ner.read([SHARED / "tasks"], 0)
    parts = {"train": found.train, "dev": found.dev, "test": found.test}
    assert {name: len(part) for name, part in parts.items()} == {"train": 9_263, "dev": 2_936, "test": 3_108}
    assert len(found.labels) == 41
    begins = {name: sum(tag % 2 for e in part for tag in e.tags) for name, part in parts.items()}
    assert begins == {"train": 10_669, "dev": 3_423, "test": 3_679}  # those in these sentences
    # the published numbers count each B- in the file, with placeholders and before repair
    whole = {"train": 12_671, "dev": 4_019, "test": 4_382}
    for name in parts:
        counts = {
            n.split(" ", 2)[2]: int(n.split(" ")[1].replace(",", "")) for n in found.notes if n.startswith(f"{name}:")
        }
        repaired = counts["I- that continued no entity of their type, read as B-"]
        assert begins[name] - repaired + counts["entities in them"] == whole[name]


@real
def test_the_other_files_of_the_folder_are_read_each_by_its_task():
    found = quality.read([SHARED / "tasks"], 0)
    assert [len(part) for part in (found.train, found.dev, found.test)] == [6_075, 675, 6_751]
    assert not any("\r" in e.text or "rel noreferrer" in e.text for e in everything(found))
    titles = closed.read([SHARED / "tasks"], 0)
    assert len(everything(titles)) == 60_000 - 6
    assert titles.labels == ("open", "closed", "duplicate")


@real
def test_reasons_and_their_dump():
    dump = SHARED / "dumps/java-questions-2025.stackoverflow.com.7z"
    if not dump.exists():
        pytest.skip(f"needs {dump}")
    found = closed.read([dump, SHARED / "tasks/java_closed_reasons.csv.xz"], 0)
    assert len(everything(found)) == 3_761 and len(found.labels) == 6


def test_a_dump_of_one_archive_per_table_is_one_dump(dump, tmp_path):
    expected = obsoletion.derive(dump, 0, [])
    (tmp_path / "so").mkdir()
    for name in ("Posts", "Comments"):
        archive(tmp_path / f"so/so-{name}.7z", dump / f"{name}.xml")
    for path in (tmp_path / "so", tmp_path / "so/so-Posts.7z"):
        assert obsoletion.derive(path, 0, []) == expected
        assert len(everything(obsoletion.read([path], 0))) == len(expected)
    (dump / "Posts.xml").rename(dump / "posts.xml")
    assert len(everything(obsoletion.read([dump], 0))) == len(expected)
    (tmp_path / "so/so-Posts.7z").rename(tmp_path / "so/b-Posts.7z")
    with pytest.raises(ValueError, match=r"so-Posts\.7z is missing"):
        derive(tmp_path / "so", tmp_path / "out")


def test_a_dump_of_several_sites_is_refused(tmp_path):
    for name in ("a", "b"):
        site(tmp_path / name, [row(1, 100, Title=name)])
    with pytest.raises(ValueError, match=r"holds 2 sites \(a, b\); give one of them"):
        derive(tmp_path, tmp_path / "out")
