"""Stack Exchange data dumps: finds the sites in some paths, and opens their tables as streams of bytes.

Dumps have been published as one archive per site, one archive per table (`stackoverflow.com-Posts.7z`), and one archive
of such archives; people also unpack them into folders. All of these are read in place: nothing in an archive is written
to disk, because the largest archive holds hundreds of GB of XML.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from minisobert.corpus.archives import contents, open_member, unpacking

POSTS, COMMENTS = "posts.xml", "comments.xml"  # in lower case: the dumps of 2009 to 2011 write them so
_TABLES = "badges|comments|posthistory|postlinks|posts|tags|users|votes"
_TABLE_FILE = re.compile(rf"({_TABLES})\.xml", re.I)
_TABLE_SUFFIX = re.compile(rf"(^|-)({_TABLES})$", re.I)
_OTHER_ARCHIVE = re.compile(rf"(.*-)?(?!posts|comments)({_TABLES})\.7z", re.I)
_VOLUME = re.compile(r"(.*\.7z)\.\d{3,}", re.I)
_DOMAIN = re.compile(r"\.(com|net)$", re.I)  # the end of every Stack Exchange domain


class Member(NamedTuple):
    """A file on disk (`inside` is empty), or in an archive on disk: all names of `inside` but the last are archives.

    size: in bytes, unpacked.
    """

    path: Path
    inside: tuple[str, ...] = ()
    size: int = 0

    def __str__(self) -> str:
        return ": ".join([str(self.path), *self.inside])

    @property
    def name(self) -> str:
        return PurePosixPath(self.inside[-1]).name if self.inside else self.path.name

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with open_member(self.path, self.inside) if self.inside else open(self.path, "rb") as stream:
            yield stream


class Site(NamedTuple):
    """The tables of one site. source: the given path that holds its posts."""

    name: str
    source: Path
    posts: Member
    comments: Member | None


def is_dump(path: Path) -> bool:
    """Whether `sites` can look into a path: a folder, a .7z or a volume of one, or the XML of a table."""
    name = path.name.lower()
    return path.is_dir() or name.endswith(".7z") or bool(_VOLUME.fullmatch(name) or _TABLE_FILE.fullmatch(name))


def sites(paths: Sequence[Path]) -> tuple[list[Site], list[str]]:
    """The sites of some dumps, in the order of the paths, and notes: lines on what is missing or is not read.

    Posts and comments belong together if they are in one place, or if their names give the same site: a domain, or what
    comes before `-Posts` and `-Comments`. Raises ValueError for a path without posts, comments without their posts, a
    site that is there twice, and archives that cannot be read.
    """
    tables: dict[str, dict[str, Member]] = {}  # the key of a site → the name of a table → the table
    names: dict[str, str] = {}  # the key of a site → its name
    source: dict[str, Path] = {}  # the key of a site → the path with its posts
    left_out: list[str] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if _VOLUME.fullmatch(path.name):
            raise _volume(path)
        others, empty = [], True
        for member in files(Member(path)):
            name = member.name.lower()
            if name not in (POSTS, COMMENTS):
                others.append(member.name)
                continue
            empty = False
            key, site = _key(member)
            names[key] = site
            if twin := tables.setdefault(key, {}).get(name):
                same = f"{twin} and {member} are {name[:-4]} of the same site; give one of them"
                raise ValueError(f"{member} is given twice" if member == twin else same)
            tables[key][name] = member
            if name == POSTS:
                source[key] = path
        known = others and all(_TABLE_FILE.fullmatch(name) or _OTHER_ARCHIVE.fullmatch(name) for name in others)
        if empty and not (known and len(paths) > 1):
            raise ValueError(f"{path} holds no Posts.xml" + (f", but {some(others)}" if others else ""))
        left_out += others
    found = []
    for key, members in tables.items():
        if POSTS not in members:
            raise ValueError(f"{members[COMMENTS]} comes without its posts; {_partner(members[COMMENTS])} is missing")
        if not members[POSTS].size:
            raise ValueError(f"{source[key]} holds no Posts.xml, or an empty one")
        found.append(Site(names[key], source[key], members[POSTS], members.get(COMMENTS)))
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no Posts.xml, but {some(left_out)}")
    for a, b in combinations(found, 2):
        if a.posts.size == b.posts.size and _begins(a.posts) == _begins(b.posts):
            raise ValueError(f"{a.posts} and {b.posts} are the same posts; give one of them")
    found.sort(key=lambda site: list(paths).index(site.source))
    notes = []
    if alone := [site.name for site in found if not site.comments]:
        notes.append(f"no Comments.xml for {some(alone)}: the posts are read without comments")
    if left_out:
        notes.append(f"left out, since they are neither posts nor comments: {some(left_out)}")
    return found, notes


def files(member: Member) -> Iterator[Member]:
    """Every file of a folder with its subfolders and archives. An archive named after another table is one file."""
    path, inside = member.path, member.inside
    if not inside and _VOLUME.fullmatch(path.name):
        if not _joined(path).exists():
            raise _volume(path)
        yield member  # the file that its volumes were joined into is read instead
    elif not inside and path.is_dir():
        for child in sorted(path.iterdir()):
            yield from files(Member(child))
    elif member.name.lower().endswith(".7z") and not _OTHER_ARCHIVE.fullmatch(member.name):
        for name, size in contents(path, inside).items():
            yield from files(Member(path, (*inside, name), size))
    else:
        yield member if inside else member._replace(size=path.stat().st_size)


def _joined(volume: Path) -> Path:
    return volume.with_suffix("")


def _volume(path: Path) -> ValueError:
    if _joined(path).exists():
        return ValueError(f"{path} is a volume of a split archive; give {_joined(path)}, which lies beside it")
    return ValueError(f"{path} is a volume of a split archive; {unpacking(path.with_suffix('.001'))}")


def _key(member: Member) -> tuple[str, str]:
    """(key, name) of the site: posts and comments that belong together have the same key.

    The key is the path of the folders and archives that hold the file, without names of tables. It starts at the last
    of them that names a site, or at the root if none does.
    """
    path = Path(os.path.abspath(member.path))  # links are not followed, because their own names tell the site
    parts, named = [], 0
    for part in [*path.parts, *(part for name in member.inside for part in PurePosixPath(name).parts)][:-1]:
        name = re.sub(r"\.7z$", "", part, flags=re.I)
        site = _TABLE_SUFFIX.sub("", name)
        if not site:
            continue
        if site != name or _DOMAIN.search(site):
            named, site = len(parts), site.lower()
        parts.append(site)
    return "/".join(parts[named:]), "/".join(parts[named or -1 :])


def _partner(comments: Member) -> str:
    """Where the posts that go with these comments should be, judging by names."""
    path, *archives = comments.path, *comments.inside[:-1]
    names = [path.name, *archives]
    renamed = [re.sub("comments", lambda m: "posts" if m[0][0] == "c" else "Posts", n, flags=re.I) for n in names]
    where = ": ".join([str(path.with_name(renamed[0])), *renamed[1:]])
    return where if renamed != names else f"Posts.xml in {where}"


def _begins(member: Member) -> bytes:
    with member.open() as stream:
        return stream.read(1 << 16)


def some(names: Sequence[str], most: int = 8) -> str:
    """A list for one line: each name once, with its number of occurrences, and how many more names there are."""
    counts = list(Counter(names).items())
    shown = [f"{name} ({n:,} times)" if n > 1 else name for name, n in counts[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most:,} more" if len(counts) > most else "")
