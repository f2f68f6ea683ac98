"""A corpus on disk opens as it was written, and anything wrong with it is a message of one line."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from minisobert.corpus.shards import held_out, open_shards, write_meta
from minisobert.corpus.tokenizer import Tokenizer, train
from minisobert.files import new_folder, sha256

DOCUMENTS = [f"document {n}\n    of some words" for n in range(20)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    model = train(DOCUMENTS, 300)
    ids = [Tokenizer(model).encode(text) for text in DOCUMENTS]
    with new_folder(out) as work:
        (work / "tokenizer.model").write_bytes(model)
        np.concatenate(ids).astype("<u2").tofile(work / "tokens.bin")
        np.save(work / "documents.npy", np.cumsum([0, *map(len, ids)], dtype=np.int64))
        vocab_size = Tokenizer(model).vocab_size
        write_meta(work, documents=20, tokens=sum(map(len, ids)), vocab_size=vocab_size, validation_documents=[18, 20])
    return out


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "shards")


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_what_was_written_is_read(folder):
    shards = open_shards(folder, verify=True)
    tokenizer = shards.tokenizer()
    texts = [tokenizer.decode(shards.tokens[a:b]) for a, b in zip(shards.offsets, shards.offsets[1:])]
    assert texts == DOCUMENTS
    assert (shards.training_documents, shards.validation_documents) == (range(18), range(18, 20))
    assert shards.vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in folder.iterdir()) == [
        "documents.npy", "meta.json", "tokenizer.model", "tokens.bin"]  # fmt: skip


def weights_of(*each) -> list[dict]:
    return [{"input": "a", "weight": w, "documents": [a, b], "tokens": 5} for a, b, w in each]


def test_the_fingerprint_is_also_that_of_the_weights(folder):
    assert open_shards(folder).weights == []
    seen = {open_shards(folder).fingerprint}
    for weights in ([(0, 9, 2.0), (9, 18, 1.0)], [(0, 8, 2.0), (8, 18, 1.0)], [(0, 9, 2.0), (9, 18, 0.5)]):
        edit_meta(folder, weights=weights_of(*weights))
        assert open_shards(folder).weights == [(range(a, b), w) for a, b, w in weights]
        seen.add(open_shards(folder).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "weights",
    [
        weights_of((0, 9, 2.0)), weights_of((0, 9, 2.0), (8, 18, 1.0)), weights_of((0, 20, 2.0)),
        weights_of((0, 18, 0.0)), weights_of((0, 18, float("nan"))), weights_of((0, 18, float("inf"))),
        weights_of((0, 18, "2")), weights_of((0, "18", 2.0)), [{**weights_of((0, 18, 2.0))[0], "documents": [0]}],
        [{}], [5], [], 5,
    ],
)  # fmt: skip
def test_damaged_weights_are_found(folder, weights):
    edit_meta(folder, weights=weights)
    with pytest.raises(ValueError, match=r"meta.json is damaged.*; prepare the data again") as error:
        open_shards(folder)
    assert "\n" not in str(error.value)


def test_the_fingerprint_is_that_of_the_files(folder):
    before = open_shards(folder).fingerprint
    edit_meta(folder, seed=5)
    assert open_shards(folder).fingerprint == before
    swap_two_tokens(folder)
    rewrite_checksum(folder, "tokens.bin")
    assert open_shards(folder).fingerprint != before


def swap_two_tokens(folder):
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    assert tokens[0] != tokens[1]
    tokens[:2] = tokens[1::-1]
    tokens.tofile(folder / "tokens.bin")


def rewrite_checksum(folder, name):
    files = json.loads((folder / "meta.json").read_text())["files"]
    files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    edit_meta(folder, files=files)


def refused(folder, message, **settings):
    with pytest.raises(ValueError, match=message) as error:
        open_shards(folder, **settings)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert "prepare" in str(error.value)  # says what to do


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    refused(tmp_path / "none", r"python -m data\.prepare --input .* --out .*none")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "tokenizer.model"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "tokenizer.model"])
def test_a_file_of_the_wrong_size_is_refused(folder, name):
    with open(folder / name, "ab") as file:
        file.write(b"\0\0")
    refused(folder, rf"{name} has [\d,]+ bytes, meta\.json says")


def test_changed_tokens_are_found_by_their_checksum_when_asked(folder):
    swap_two_tokens(folder)
    open_shards(folder)
    refused(folder, r"tokens\.bin is not the file", verify=True)


def test_another_tokenizer_is_always_found(folder):
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content.replace(b"[MASK]", b"[MUSK]"))
    refused(folder, r"tokenizer\.model is not the file")
    (folder / "tokenizer.model").write_bytes(train(DOCUMENTS, 290))
    rewrite_checksum(folder, "tokenizer.model")
    refused(folder, r"tokenizer\.model has 290 pieces, meta\.json says 300")


def test_ids_beyond_the_vocabulary_are_refused(folder):
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    tokens[-1] = 300
    tokens.tofile(folder / "tokens.bin")
    refused(folder, r"tokens\.bin holds the id 300, the vocabulary has 300")


@pytest.mark.parametrize(
    "change", [lambda o: np.sort(o)[::-1], lambda o: o + 1, lambda o: np.where(np.arange(len(o)) == 5, o[4], o)]
)
def test_offsets_that_do_not_increase_are_refused(folder, change):
    np.save(folder / "documents.npy", change(np.load(folder / "documents.npy")).astype(np.int64))
    refused(folder, "offsets do not increase")


@pytest.mark.parametrize("offsets", [np.arange(21, dtype=np.int32), np.arange(20), np.array([object()])])
def test_offsets_of_another_kind_are_refused(folder, offsets):
    np.save(folder / "documents.npy", offsets)
    rewrite_checksum(folder, "documents.npy")
    refused(folder, r"documents\.npy (holds|cannot be read)")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "{", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_damaged_meta_is_refused(folder, content):
    (folder / "meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, r"meta\.json is damaged")


@pytest.mark.parametrize(
    "change", [{"documents": 19}, {"tokens": -1}, {"vocab_size": "300"}, {"validation_documents": [5, 3]}]
)
def test_counts_that_contradict_each_other_are_refused(folder, change):
    edit_meta(folder, **change)
    refused(folder, r"meta\.json is damaged: its counts contradict")


def test_another_format_is_refused(folder):
    edit_meta(folder, format=2)
    refused(folder, "has format 2, this version reads 1")


def test_fewer_tokens_than_meta_says_are_refused(folder):
    edit_meta(folder, tokens=10)
    refused(folder, "10 tokens of uint16 need 20")


@pytest.mark.parametrize("name", ["meta.json", "documents.npy", "tokens.bin", "tokenizer.model"])
def test_verify_finds_every_damaged_byte_of_every_file(folder, name):
    content = (folder / name).read_bytes()
    step = 1 if name == "meta.json" else max(1, len(content) // 50)
    for place in range(0, len(content), step):
        for bit in (1, 2, 32) if name == "meta.json" else (1,):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match="prepare the data again"):
                open_shards(folder, verify=True)
    for changed in (content + b"\n", content[:-1]):
        (folder / name).write_bytes(changed)
        refused(folder, name.replace(".", r"\."), verify=True)
    (folder / name).write_bytes(content)
    open_shards(folder, verify=True)


def test_a_folder_of_before_meta_had_a_checksum_opens_and_verify_says_so(folder, capsys):
    meta = json.loads((folder / "meta.json").read_text())
    checksum = meta.pop("sha256")
    (folder / "meta.json").write_text(text := json.dumps(meta, indent=1, ensure_ascii=False) + "\n")  # as it was then
    assert hashlib.sha256(text.encode()).hexdigest() == checksum
    open_shards(folder)
    assert capsys.readouterr().err == ""
    open_shards(folder, verify=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}/meta.json was made by an earlier version and has no checksum of its own")


# The held-out threads


def test_whole_threads_are_held_out():
    thread = np.arange(3_000) // 3
    chosen = held_out(np.zeros(3_000, np.int64), thread, seed=0)
    assert chosen.sum() == 150  # 5 % of 1,000 threads, with 3 posts each
    assert len(np.unique(thread[chosen])) == 50


def test_the_seed_chooses_and_the_order_does_not():
    source, thread = np.zeros(1_000, np.int64), np.arange(1_000) << 33  # ids of more than 32 bits differ too
    first = held_out(source, thread, seed=0)
    assert (held_out(source, thread, seed=0) == first).all()
    assert (held_out(source, thread, seed=1) != first).any()
    assert (held_out(source, thread[::-1], seed=0)[::-1] == first).all()


def test_the_same_id_in_two_sources_is_two_threads():
    chosen = held_out(np.arange(1_000) % 2, np.arange(1_000) // 2, seed=0)
    assert chosen.sum() == 50
    assert (chosen[::2] != chosen[1::2]).any()


@pytest.mark.parametrize("threads, expected", [(1, 0), (2, 1), (10, 1), (1_000_000, 10_000)])
def test_at_least_one_thread_is_held_out_never_all_and_at_most_10000(threads, expected):
    assert held_out(np.zeros(threads, np.int64), np.arange(threads), seed=0).sum() == expected
