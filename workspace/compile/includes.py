"""Include graph read from the sources: for units whose dependencies no compiler has recorded yet.

It includes too much rather than too little: conditions are ignored, comments count, and an unknown
name counts as every changed file that it could be.
"""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from os import path as paths
from pathlib import Path

# Headers of the toolchain, of Python's packages and of the system do not include this tree: they
# are not followed.
_FOREIGN = ("/usr/", "/lib/")
_FOREIGN_PARTS = ("/site-packages/", "/dist-packages/")
# In GCC a backslash joins lines also with blanks after it.
_SPLICE = re.compile(rb"\\[ \t\f\v\r]*\n")
_BLANK = rb"(?:[ \t\f\v\r]|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)*"
_DIRECTIVES = (b"include", b"import", b"embed")
# The directive before a name suffices, with or without `#` or `__has_include(`: a comment that
# looks like an include only costs a compilation.
_NAME = rb"(_next)?" + _BLANK + rb"\(?" + _BLANK + rb'(?:"([^"\n]+)"|<([^>\n]+)>)'
_NAMED = tuple((directive, re.compile(directive + _NAME)) for directive in _DIRECTIVES)
_MACRO = rb"(?:_next)?(?![A-Za-z0-9_$])" + _BLANK + rb'(?=[^\s"</]|/[^*/])([^\n]*)'
_COMPUTED = tuple((directive, re.compile(directive + _MACRO)) for directive in _DIRECTIVES)
_HASH = re.compile(rb"(?:\A|\n|\*/)[ \t\f\v\r]*(?:#|%:|\?\?=)" + _BLANK + rb"\Z")
_DEFINE = rb"define" + _BLANK + rb"\b"
# A macro with parameters, its use and its definition: CUTLASS's CUDA_STD_HEADER(cstdint) is
# <cuda/std/cstdint>.
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_CALL = re.compile(r"([A-Za-z_]\w*)\(([^()]*)\)\s*(?://.*|/\*.*)?")
_BODY = re.compile(r'(?:<([^<>"]+)>|"([^"]+)")\s*(?://.*|/\*.*)?')


@dataclass(frozen=True)
class Named:
    """Names that a file includes, those of include_next in both sets; `computed` are macros in the
    place of a name.
    """

    quoted: frozenset[str] = frozenset()
    angled: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()


def names(text: bytes) -> Named:
    """Return the names in all `#include` of a file, in every spelling that a compiler accepts."""
    if b"\\" in text:
        text = _SPLICE.sub(b"", text)
    quoted, angled = set[str](), set[str]()
    for directive, pattern in _NAMED:
        for following, in_quotes, in_angles in pattern.findall(text) if directive in text else ():
            name = os.fsdecode(in_quotes or in_angles)
            if following or in_quotes:
                quoted.add(name)
            if following or in_angles:
                angled.add(name)
    return Named(frozenset(quoted), frozenset(angled), frozenset(_computed(text)))


def _computed(text: bytes) -> Iterator[str]:
    for directive, pattern in _COMPUTED:
        if directive not in text:
            continue
        for found in pattern.finditer(text):
            before = text[: found.start()]
            if before.rstrip().endswith((b"#", b"%:", b"??=", b"*/")) and _HASH.search(before):
                yield os.fsdecode(found[1]).strip()


def expanded(use: str, definitions: Iterable[tuple[str, str]]) -> Named | None:
    """Return the names of an `#include` of a macro with arguments, by its definitions, each
    parameters and body; None if a definition, or a missing one, leaves them open.

    A macro without parameters is always open: compilers often get another body on the command line.
    """
    call = _CALL.fullmatch(use)
    quoted, angled = set[str](), set[str]()
    for parameters, body in definitions if call else ():
        given = (
            dict(zip(_split_arguments(parameters), _split_arguments(call[2]), strict=False))
            if call
            else {}
        )
        named = _BODY.fullmatch(body.strip())
        if named is None or len(given) != len(_split_arguments(parameters)):
            return None
        if named[1]:
            angled.add(
                _IDENTIFIER.sub(lambda found, given=given: given.get(found[0], found[0]), named[1])
            )
        else:
            quoted.add(named[2])
    return Named(frozenset(quoted), frozenset(angled)) if quoted or angled else None


def _split_arguments(listed: str) -> list[str]:
    return [argument.strip() for argument in listed.split(",")]


class Scan:
    """Include graph of a tree, for the question which of its `changed` files, relative to it, a
    source may include.
    """

    def __init__(self, tree: Path, changed: Collection[str]) -> None:
        # A file is identified by the real path of its folder and its name: so a link, its
        # neighbours, and git's name for it are all found.
        self._real = cache(paths.realpath)
        self._tree = paths.realpath(tree)
        self._changed = {paths.normpath(paths.join(self._tree, name)): name for name in changed}
        self._gone = frozenset(path for path in self._changed if not paths.isfile(path))
        self._by_name: dict[str, set[str]] = defaultdict(set)
        for path in self._changed:
            self._by_name[paths.basename(path)].add(path)
        self._tops = {
            self._top(path) for path in self._changed if paths.dirname(path) != self._tree
        }
        self._walked: set[str] = set()
        self._named: dict[str, Named | None] = {}
        self._is_file = cache(self._look_for)
        self._is_folder = cache(paths.isdir)

    def changed_dependencies(
        self, sources: Collection[str], folders: Collection[str]
    ) -> dict[str, frozenset[str]]:
        """Return, for each source, the changed files that it may include, itself among them;
        `folders` are searched for both kinds of names.

        Both are relative to the tree, or absolute.
        """
        searched = tuple(self._real(paths.join(self._tree, folder)) for folder in folders)
        starts = {source: self._spelled(paths.join(self._tree, source)) for source in sources}
        below = [
            path
            for path in (*searched, *map(paths.dirname, starts.values()))
            if f"{path}/".startswith(f"{self._tree}/")
        ]
        self._tops |= {self._top(path) for path in below}
        includers = self._includers(starts.values(), searched)
        found: dict[str, set[str]] = {source: set() for source in sources}
        for path, name in self._changed.items():
            reached = _closure(path, includers)
            for source, start in starts.items():
                if start in reached or self._real(start) in reached:
                    found[source].add(name)
        return {source: frozenset(name) for source, name in found.items()}

    def _includers(self, starts: Iterable[str], searched: tuple[str, ...]) -> dict[str, set[str]]:
        """Return, for each file reachable from `starts`, the files that may include it."""
        includers: dict[str, set[str]] = defaultdict(set)
        waiting = [path for start in starts for path in {start, self._real(start)}]
        seen = set(waiting)
        while waiting:
            path = waiting.pop()
            for included in self._included(path, searched):
                includers[included].add(path)
                if included not in seen and self._is_followed(included):
                    seen.add(included)
                    waiting.append(included)
            # Macros are resolved last, once all files that may define them are known.
            if not waiting:
                for path, included in self._by_macro(seen, searched):
                    includers[included].add(path)
                    if included not in seen and self._is_followed(included):
                        seen.add(included)
                        waiting.append(included)
        return includers

    def _by_macro(
        self, seen: Collection[str], searched: tuple[str, ...]
    ) -> Iterator[tuple[str, str]]:
        """Yield the includes by macro of all files seen: the file, and a file it may include."""
        used = {
            path: named.computed
            for path in sorted(seen)
            if (named := self._read(path)) and named.computed
        }
        defined = _definitions(
            seen,
            {call[1] for uses in used.values() for use in uses if (call := _CALL.fullmatch(use))},
        )
        for path, uses in used.items():
            for use in uses:
                named = expanded(use, defined.get(use.split("(")[0], ()))
                for included in (
                    self._changed if named is None else self._places(path, named, searched)
                ):
                    yield path, included

    def _included(self, path: str, searched: tuple[str, ...]) -> Iterator[str]:
        named = self._read(path)
        yield from self._changed if named is None else self._places(path, named, searched)

    def _places(self, path: str, named: Named, searched: tuple[str, ...]) -> Iterator[str]:
        """Yield the paths at which the files that `path` names may be."""
        folder = paths.dirname(path)
        for name in named.quoted | named.angled:
            is_found = False
            is_beside = name in named.quoted or name.startswith("/")
            for place in (folder, *searched) if is_beside else searched:
                candidate = paths.join(place, name)
                if self._is_file(candidate):
                    is_found = True
                    yield self._spelled(candidate)
                    yield self._real(candidate)
                    # The folder of the file comes first for every compiler; the order of the other
                    # folders is not used.
                    if (
                        place is folder
                        and self._spelled(candidate) not in self._gone
                        and name not in named.angled
                    ):
                        break
            if not is_found:
                # The folder is unknown: every file that ends so may be it.
                end = paths.normpath("/" + name)
                yield from (
                    path
                    for other in self._called(end)
                    if other.endswith(end)
                    for path in (other, self._real(other))
                )

    def _called(self, end: str) -> Collection[str]:
        """Return the files with the last name of `end`, in the top folders of the tree with
        sources, includes or changes, or in the one that `end` names.
        """
        _, top, *below = end.split("/")
        if below and self._is_folder(paths.join(self._tree, top)):
            self._tops.add(top)
        for top in self._tops - self._walked:
            for folder, folders, files in os.walk(paths.join(self._tree, top)):
                folders[:] = [below for below in folders if not below.startswith(".")]
                for file in files:
                    self._by_name[file].add(f"{folder}/{file}")
        self._walked |= self._tops
        return self._by_name.get(paths.basename(end), ())

    def _top(self, path: str) -> str:
        """Return the top folder of a path in the tree; empty for a path outside."""
        return (
            path.removeprefix(f"{self._tree}/").split("/")[0]
            if path.startswith(f"{self._tree}/")
            else ""
        )

    def _read(self, path: str) -> Named | None:
        """Return the names that the file includes; none if it was deleted on purpose, None if it
        cannot be read and may include every file.
        """
        if path not in self._named:
            try:
                self._named[path] = names(Path(path).read_bytes())
            except OSError:
                self._named[path] = Named() if path in self._gone else None
        return self._named[path]

    def _look_for(self, path: str) -> bool:
        return paths.isfile(path) or self._spelled(path) in self._gone

    def _spelled(self, path: str) -> str:
        folder, name = paths.split(path)
        return paths.join(self._real(folder), name)

    def _is_followed(self, path: str) -> bool:
        if path.startswith(f"{self._tree}/"):
            return True
        return not path.startswith(_FOREIGN) and not any(part in path for part in _FOREIGN_PARTS)


def _definitions(
    files: Iterable[str], macros: Collection[str]
) -> Mapping[str, list[tuple[str, str]]]:
    """Return the definitions of each macro with parameters in the files: parameters and body."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    listed = b"|".join(sorted(map(os.fsencode, macros)))
    pattern = re.compile(_DEFINE + rb"(%s)\b\(([^()\n]*)\)([^\n]*)" % listed)
    for file in files if macros else ():
        with contextlib.suppress(OSError):
            text = _SPLICE.sub(b"", Path(file).read_bytes())
            for definition in pattern.finditer(text):
                macro, parameters, body = map(os.fsdecode, definition.groups())
                found[macro].append((parameters, body))
    return found


def _closure(path: str, includers: dict[str, set[str]]) -> set[str]:
    reached, waiting = {path}, [path]
    while waiting:
        for includer in includers.get(waiting.pop(), ()):
            if includer not in reached:
                reached.add(includer)
                waiting.append(includer)
    return reached
