"""Dumps are found and joined in every layout in which they come, and errors say what is wrong with a file."""

import lzma
import random
import re
import struct
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest

from minisobert.corpus import archives
from minisobert.corpus.dump import sites
from minisobert.corpus.posts import posts

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
GOOD = '  <row Id="{0}" PostTypeId="1" Score="3" Title="t{0}" Body="&lt;p&gt;b{0}&lt;/p&gt;" />\n'


def pack(path: Path, *members: tuple[str, bytes | Path], **options) -> Path:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(path, "w", **options) as file:
        for name, content in members:
            file.writestr(content.read_bytes() if isinstance(content, Path) else content, name)
    return path


def tables(site: str) -> dict[str, bytes]:
    """The files of a site with two posts and a comment, which contain its name. All sites have the same Ids."""
    content = (HEAD + GOOD.format(1) + GOOD.format(2)).replace("&gt;b", f"&gt;{site}")
    return {
        "Posts.xml": f"{content}</posts>".encode(),
        "Users.xml": b"<users>\n</users>",
        "Comments.xml": f'<comments>\n<row Id="1" PostId="2" Text="{site}" />\n</comments>'.encode(),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def per_table(folder: Path, site: str, **options) -> list[Path]:
    """One archive for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    return [pack(folder / f"{site}-{name[:-4]}.7z", (name, x), **options) for name, x in tables(site).items()]


def one_per_table(tmp_path):
    return per_table(tmp_path, "a.com")


def a_folder_of_one_per_table(tmp_path):
    per_table(tmp_path / "so", "a.com")
    return [tmp_path / "so"]


def one_per_table_in_two_folders(tmp_path):
    posts, users, comments = per_table(tmp_path / "1", "so")
    (tmp_path / "2").mkdir()
    return [comments.rename(tmp_path / "2" / comments.name), users, posts]


def one_per_table_with_folders_in_it(tmp_path):
    (tmp_path / "so").mkdir()
    return [pack(tmp_path / f"so/so-{name[:-4]}.7z", (f"x/y/{name}", x)) for name, x in tables("so").items()]


def posts_and_comments_without_a_name(tmp_path):
    (tmp_path / "so").mkdir()
    return [pack(tmp_path / f"so/{name[:-4]}.7z", (name, x)) for name, x in tables("so").items()]


def an_archive_of_archives(tmp_path):
    return [pack(tmp_path / "so.7z", *((path.name, path) for path in per_table(tmp_path / "in", "so")))]


def an_archive_of_archives_of_archives(tmp_path):
    (inner,) = an_archive_of_archives(tmp_path)
    return [pack(tmp_path / "all.7z", ("2024/so.7z", inner))]


def one_archive(tmp_path):
    return [pack(tmp_path / "a.7z", *tables("a.com").items())]


def one_archive_in_capitals(tmp_path):
    return [pack(tmp_path / "A.7Z", *((f"092011/{name.upper()}", x) for name, x in tables("a.com").items()))]


def one_archive_in_small_letters(tmp_path):
    return [pack(tmp_path / "a.7z", *((f"092011/{name.lower()}", x) for name, x in tables("a.com").items()))]


def a_folder(tmp_path):
    return [write(tmp_path / "a", tables("a.com"))]


def a_folder_in_small_letters(tmp_path):
    return [write(tmp_path / "a", {name.lower(): x for name, x in tables("a.com").items()})]


def a_folder_for_each_table(tmp_path):
    for name, content in tables("a.com").items():
        write(tmp_path / "so" / f"stackoverflow.com-{name[:-4]}", {name: content})
    return [tmp_path / "so"]


def links(tmp_path):
    for number, path in enumerate(per_table(tmp_path / "store", "so")):
        path.rename(tmp_path / f"store/{number}")
        (tmp_path / path.name).symlink_to(tmp_path / f"store/{number}")
    return sorted(tmp_path.glob("*.7z"))


def files(tmp_path):
    folder = write(tmp_path / "a", tables("a.com"))
    return [folder / "Posts.xml", folder / "Comments.xml", folder / "Users.xml"]


LAYOUTS = [
    one_per_table, a_folder_of_one_per_table, one_per_table_in_two_folders, one_per_table_with_folders_in_it,
    posts_and_comments_without_a_name, an_archive_of_archives, an_archive_of_archives_of_archives, one_archive,
    one_archive_in_capitals, one_archive_in_small_letters, a_folder, a_folder_in_small_letters,
    a_folder_for_each_table, links, files,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_posts_are_joined_with_their_comments_in_every_layout(tmp_path, layout):
    paths = layout(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    (site,), notes = sites(paths)
    dropped: Counter = Counter()
    first, second = (entry.post for entry in posts(site, tmp_path, dropped))
    assert not first.comments
    (comment,) = second.comments
    assert second.body == f"<p>{comment}2</p>"
    assert not +dropped
    assert len(notes) == 1
    assert re.fullmatch(r"left out, since they are neither posts nor comments: \S*users\.(xml|7z)", notes[0], re.I)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def two_archives(tmp_path):
    return [pack(tmp_path / f"{site}.7z", *tables(site).items()) for site in "ab"]


def a_folder_of_archives(tmp_path):
    two_archives(tmp_path)
    return [tmp_path]


def an_archive_of_two_sites(tmp_path):
    return [pack(tmp_path / "s.7z", *((f"{site}/{name}", x) for site in "ab" for name, x in tables(site).items()))]


def a_folder_of_folders(tmp_path):
    for site in "ab":
        write(tmp_path / "dump" / site, tables(site))
    return [tmp_path / "dump"]


def two_sites_with_an_archive_per_table(tmp_path):
    return [path for site in "ab" for path in per_table(tmp_path, site)]


def an_archive_of_archives_per_table_of_two_sites(tmp_path):
    found = [path for site in "ab" for path in per_table(tmp_path / "in", f"{site}.com")]
    return [pack(tmp_path / "all.net.7z", *((path.name, path) for path in found))]


def two_archives_per_table_with_two_sites(tmp_path):
    found = {site: tables(site) for site in "ab"}
    names = ("Posts.xml", "Comments.xml")
    return [pack(tmp_path / f"all-{name[:-4]}.7z", *((f"{x}/{name}", found[x][name]) for x in "ab")) for name in names]


def two_sites_whose_folders_have_one_name(tmp_path):
    return [write(tmp_path / site / "dump", tables(site)) for site in "ab"]


@pytest.mark.parametrize(
    "layout",
    [
        two_archives, a_folder_of_archives, an_archive_of_two_sites, a_folder_of_folders,
        an_archive_of_archives_per_table_of_two_sites, two_archives_per_table_with_two_sites,
        two_sites_with_an_archive_per_table, two_sites_whose_folders_have_one_name,
    ],
    ids=lambda layout: layout.__name__,
)  # fmt: skip
def test_several_sites_are_kept_apart(tmp_path, layout):
    found, _ = sites(layout(tmp_path))
    dumps = [[entry.post for entry in posts(site, tmp_path, Counter())] for site in found]
    read = [[(post.body[3], [c[0] for c in post.comments]) for post in dump] for dump in dumps]
    assert read == [[(site, []), (site, [site])] for site in "ab"]


def test_a_dump_without_comments_is_read_and_says_so(tmp_path):
    for path in (
        pack(tmp_path / "a.com-Posts.7z", ("Posts.xml", tables("a")["Posts.xml"])),
        write(tmp_path / "a.com", {"Posts.xml": tables("b")["Posts.xml"]}),
    ):
        (site,), notes = sites([path])
        assert len(list(posts(site, tmp_path, Counter()))) == 2
        assert notes == ["no Comments.xml for a.com: the posts are read without comments"]


def test_all_that_is_left_out_is_named_in_one_line(tmp_path):
    write(tmp_path / "dump/x", tables("a") | {"readme.txt": b"", "Posts.xml.bak": b"x"})
    write(tmp_path / "dump/y", tables("b") | {"so.7z": b"", "so.7z.001": b"", ".DS_Store": b""})
    pack(tmp_path / "dump/y/so.7z", ("license.txt", b""))
    _, (note,) = sites([tmp_path / "dump"])
    left_out = "Posts.xml.bak, Users.xml (2 times), readme.txt, .DS_Store, license.txt, so.7z.001"
    assert note == f"left out, since they are neither posts nor comments: {left_out}"
    for number in range(12):
        (tmp_path / f"dump/x/{number}.csv").touch()
    _, (note,) = sites([tmp_path / "dump"])
    assert note.endswith(" and 10 more")


REFUSED = [
    (lambda d: per_table(d, "so")[2:], "Comments.xml comes without its posts; {d}/so-Posts.7z is missing"),
    (lambda d: [*per_table(d, "a")[:2], *per_table(d, "b")[2:]], "comes without its posts; {d}/b-Posts.7z is missing"),
    (lambda d: [write(d, {"comments.xml": b"x"})], "comments.xml comes without its posts; {d}/posts.xml is missing"),
    (lambda d: [pack(d / "a.7z", ("Comments.xml", b"x"))], "comes without its posts; Posts.xml in {d}/a.7z is missing"),
    (lambda d: per_table(d, "so")[1:2], "so-Users.7z holds no Posts.xml, but so-Users.7z"),
    (lambda d: [*per_table(d, "a")[1:2], *per_table(d, "b")[1:2]], "no Posts.xml, but a-Users.7z, b-Users.7z"),
    (lambda d: [pack(d / "a.7z", ("a.csv", b"x"))], "a.7z holds no Posts.xml, but a.csv"),
    (lambda d: [*one_archive(d), pack(d / "b.7z", ("b.csv", b"x"))], "b.7z holds no Posts.xml, but b.csv"),
    (lambda d: [d], "{d} holds no Posts.xml"),
    (lambda d: [d / "none"], "none does not exist"),
    (lambda d: [write(d, {"Posts.xml": b""})], "holds no Posts.xml, or an empty one"),
    (lambda d: [(d / "b").symlink_to(write(d / "a", tables("a"))) or d / "a", d / "b"], "are the same posts"),
    (lambda d: [*one_archive(d), d / "a.7z"], "a.7z: Posts.xml is given twice"),
    (lambda d: [write(d / "a", tables("a")), d], "a/Comments.xml is given twice"),
    (lambda d: [write(d, tables("a") | {"posts.xml": b"x"})], "{d}/Posts.xml and {d}/posts.xml are posts of the same"),
    (lambda d: [write(d / "a.com", tables("a")), per_table(d, "a.com")[0]], "are posts of the same site; give one"),
    (lambda d: [per_table(d / "1", "a")[0], per_table(d / "2", "a")[0]], "are posts of the same site; give one"),
    (lambda d: [write(d / n, tables("a")) for n in "12"], "{d}/1/Posts.xml and {d}/2/Posts.xml are the same posts"),
    (lambda d: [per_table(d, "a.com") and write(d, tables("a.com"))], "are the same posts; give one of them"),
    (lambda d: [pack(d / "a.7z", ("Posts.xml", b"x"), ("Posts.xml", b"y"))], "a.7z holds Posts.xml twice"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=re.escape(message.format(d=tmp_path))) as error:
        sites(make(tmp_path))
    assert "\n" not in str(error.value)


# Archives that cannot be read


@pytest.mark.parametrize("number", [1, 2])
def test_a_volume_of_a_split_archive_is_named(tmp_path, number):
    path = write(tmp_path / "d", {f"a b.7z.00{number}": b"x"}) / f"a b.7z.00{number}"
    advice = f"7z x '{tmp_path}/d/a b.7z.001' -o'{tmp_path}/d/a b'"
    for given in (path, path.parent):
        with pytest.raises(ValueError, match=re.escape(f"{path} is a volume of a split archive; unpack it ({advice})")):
            sites([given])
    whole = pack(tmp_path / "d/a b.7z", *tables("a").items())
    with pytest.raises(ValueError, match=re.escape(f"is a volume of a split archive; give {whole}, which lies beside")):
        sites([path])
    _, (note,) = sites([path.parent])
    assert path.name in note


def renamed(path: Path, name: str) -> Path:
    """An archive of posts under a name that py7zr would not write."""
    with pytest.importorskip("py7zr").SevenZipFile(path, "w") as file:
        file.set_encoded_header_mode(False)
        file.writestr(tables("a")["Posts.xml"], "Q" * len(name))
    return with_header(path, ("Q" * len(name)).encode("utf-16-le"), name.encode("utf-16-le"))


@pytest.mark.parametrize("name", ["../../Posts.xml", "a/../Posts.xml", "..\\Posts.xml", "C:\\x\\Posts.xml", "../x.txt"])
def test_a_member_outside_of_its_archive_is_named(tmp_path, name):
    path = renamed(tmp_path / "a.7z", name)
    message = f"{path} holds {name.replace(chr(92), '/')}, a path outside of it; unpack it (7z x {path} -o"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sites([path])
    assert "\n" not in str(error.value)


def test_a_member_with_an_absolute_name_is_read_and_lands_nowhere(tmp_path):
    path = renamed(tmp_path / "a.7z", f"{tmp_path}/b/Posts.xml")
    (site,), _ = sites([path])
    assert len(list(posts(site, tmp_path, Counter()))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.7z"]


def test_a_symlink_in_the_place_of_a_table_is_named(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("Posts.xml", "readme"):
        with pytest.importorskip("py7zr").SevenZipFile(tmp_path / f"{name}.7z", "w") as file:
            file.write(tmp_path / "link", name)
            if name == "readme":
                file.writestr(tables("a")["Posts.xml"], "Posts.xml")
    path = tmp_path / "Posts.xml.7z"
    message = f"{path} holds Posts.xml as a symlink, which is not followed; unpack it (7z x {path} -o"
    with pytest.raises(ValueError, match=re.escape(message)):
        sites([path])
    _, notes = sites([tmp_path / "readme.7z"])
    assert "left out, since they are neither posts nor comments: readme" in notes


@pytest.mark.parametrize("inside", [False, True])
def test_an_archive_that_would_unpack_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch, inside):
    path = pack(tmp_path / "a.7z", ("Posts.xml", bytes(1_000_000)))
    if inside:
        path = pack(tmp_path / "b.7z", ("a.7z", path))
    assert path.stat().st_size < 1_000_000 / archives.RATIO
    monkeypatch.setattr(archives, "BOMB", 999_999)
    message = (
        "says that it unpacks to 1,000,000 bytes, over 200 times its size, which no dump does; if it is sound, unpack "
        "it"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sites([path])
    monkeypatch.setattr(archives, "BOMB", 1_000_000)
    assert sites([path])


METHODS = {
    "LZMA": [{"id": lzma.FILTER_LZMA1}],
    "LZMA2": [{"id": lzma.FILTER_LZMA2, "preset": 1}],
    "BCJ and LZMA2": [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}],
    "BCJ and LZMA": [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA1}],
    "Delta": [{"id": lzma.FILTER_DELTA, "dist": 1}, {"id": lzma.FILTER_LZMA2, "preset": 1}],
    "Copy": [{"id": 0x33}],
    "BZip2": [{"id": 0x31}],
    "Deflate": [{"id": 0x32}],
    "ZStandard": [{"id": 0x35, "level": 3}],
    "PPMd": [{"id": 0x36, "order": 6, "mem": 24}],
    "Brotli": [{"id": 0x37, "level": 3}],
}


@pytest.mark.parametrize("filters", METHODS.values(), ids=METHODS)
def test_every_method_that_py7zr_has_reads_alike(tmp_path, filters):
    content = f"{HEAD}{''.join(map(GOOD.format, range(3_000)))}</posts>".encode()
    inner = pack(tmp_path / "a-Posts.7z", ("Posts.xml", content), filters=filters)
    outer = pack(tmp_path / "outer.7z", ("a-Posts.7z", inner), filters=filters)
    for path in (inner, outer):
        (site,), _ = sites([path])
        assert site.posts.size == len(content)
        with site.posts.open() as stream:
            assert stream.read() == content


@pytest.mark.parametrize("options", [{}, {"header_encryption": True}], ids=["content", "names too"])
def test_an_encrypted_archive_is_named(tmp_path, options):
    inner = pack(tmp_path / "a-Posts.7z", ("Posts.xml", tables("a")["Posts.xml"]), password="secret", **options)
    outer = pack(tmp_path / "b.7z", (inner.name, inner))
    for path, name in ((inner, inner), (outer, f"{outer}: a-Posts.7z")):
        with pytest.raises(ValueError, match=re.escape(f"{name} is encrypted; unpack it (7z x {path} -o")) as error:
            sites([path])
        assert len(str(error.value)) < 300 + len(str(tmp_path)) * 3


def with_method(path: Path, old: bytes, new: bytes) -> Path:
    """Gives an archive a method that py7zr cannot write, by changing the method's id in the header."""
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(path, "w") as file:
        file.set_encoded_header_mode(False)
        file.writestr(tables("a")["Posts.xml"], "Posts.xml")
    return with_header(path, old, new)


def with_header(path: Path, old: bytes, new: bytes) -> Path:
    """Replaces bytes in the header of an archive, and its checksums."""
    content = path.read_bytes()
    start, size = struct.unpack("<QQ", content[12:28])
    body, header = content[32 : 32 + start], content[32 + start : 32 + start + size]
    assert header.count(old) == 1
    header = header.replace(old, new)
    where = struct.pack("<QQL", start, size, zlib.crc32(header))
    path.write_bytes(content[:8] + struct.pack("<L", zlib.crc32(where)) + where + body + header)
    return path


@pytest.mark.parametrize(
    "method, message",
    [
        (b"\x03\x03\x01\x1b", "uses the method BCJ2, which py7zr cannot read; unpack it (7z x {path} -o"),
        (b"\x04\xf7\x11\x04", "uses the method LZ4, which py7zr cannot read; unpack it (7z x {path} -o"),
        (b"\x04\xf7\x11\x7f", "uses a method (Archive is compressed by an unsupported compression algorithm.), which"),
    ],
)
def test_a_method_that_py7zr_does_not_have_is_named(tmp_path, method, message):
    path = with_method(tmp_path / "a.7z", b"\x03\x03\x01\x03", method)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message.format(path=path)}")) as error:
        sites([path])
    assert "\n" not in str(error.value)


NO_ARCHIVES = [b"", b"7z", b"PK\3\4" + b"x" * 10_000, b"<html>", b"7z\xbc\xaf'\x1c\0\4" + b"x" * 10_000]


@pytest.mark.parametrize("content", NO_ARCHIVES)
def test_what_is_no_archive_is_one_short_line(tmp_path, content):
    (tmp_path / "a.7z").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.7z is truncated or not a \.7z archive") as error:
        sites([tmp_path / "a.7z"])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200 + len(str(tmp_path))


def test_a_thread_that_is_no_longer_needed_reads_no_further(tmp_path, monkeypatch):
    badges = random.Random(0).randbytes(3_000_000)  # they come before the posts in the archive
    (site,), _ = sites([pack(tmp_path / "a.7z", ("Badges.xml", badges), *tables("a").items(), filters=METHODS["Copy"])])
    read, after = archives._File.readinto, []

    def late(self, buffer):
        while not self.stopped.is_set():
            time.sleep(0.001)
        after.append(read(self, buffer))
        return after[-1]

    monkeypatch.setattr(archives._File, "readinto", late)
    with site.posts.open():
        pass
    assert after == []


def test_nor_does_one_in_a_nested_archive(tmp_path):
    inner = pack(tmp_path / "a.7z", ("Badges.xml", random.Random(0).randbytes(3_000_000)), filters=METHODS["Copy"])
    outer = pack(tmp_path / "b.7z", ("a.7z", inner), filters=METHODS["Copy"])
    stopped = threading.Event()
    with archives._Inner(outer, ["a.7z"], stopped) as file:
        file.seek(1_500_000)
        stopped.set()
        with pytest.raises(archives._End):
            file.read(1)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_damaged_archive_in_an_archive_is_refused_and_no_thread_is_left(tmp_path, share):
    content = HEAD + "".join(GOOD.format(n).replace("b", random.Random(n).randbytes(40).hex()) for n in range(3_000))
    packed = bytearray(pack(tmp_path / "a-Posts.7z", ("Posts.xml", content.encode())).read_bytes())
    packed[int(len(packed) * share)] ^= 0xFF
    (site,), _ = sites([pack(tmp_path / "b.7z", ("a-Posts.7z", bytes(packed)))])
    threads = threading.active_count()
    with pytest.raises(ValueError, match=r"b\.7z: a-Posts\.7z is truncated"), site.posts.open() as stream:
        stream.read()
    assert threading.active_count() == threads
