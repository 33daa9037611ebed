"""YAML that remembers where each value stood: bounded, without tags, with OpenPCDet's `_BASE_CONFIG_` merged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union

import yaml

from dm3d_deploy.errors import UsageError, nearest

BASE_KEY = "_BASE_CONFIG_"
MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_SCALAR_CHARS = 64
SCALAR_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))

Value = Union["dict[str, Entry]", "list[Entry]", str, int, float, bool, None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A YAML value and its place; mappings and lists hold entries."""

    value: Value
    origin: str
    line: int

    @property
    def place(self) -> str:
        """File and line, as error texts show them."""
        return f"{self.origin}, line {self.line}"


class _Loader(yaml.SafeLoader):
    """A composer that stops at a depth and at a number of nodes before Python's stack or memory would."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        _check_bounds(self.depth, self.nodes, self.name, self.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Expansion:
    """Turns composed nodes into entries; an alias counts as often as it is used."""

    def __init__(self, loader: _Loader, origin: str) -> None:
        self.loader = loader
        self.origin = origin
        self.nodes = 0

    def entry(self, node: yaml.Node, depth: int, line: int) -> Entry:
        self.nodes += 1
        _check_bounds(depth, self.nodes, self.origin, line)
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return Entry(self.mapping(node, depth), self.origin, line)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            items = [self.entry(item, depth + 1, item.start_mark.line + 1) for item in node.value]
            return Entry(items, self.origin, line)
        return Entry(self.scalar(node), self.origin, line)

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise UsageError(
                    f"{self.origin}, line {line}: a key is not plain text (merge keys '<<' are not read).",
                    fix="write every key as a word",
                )
            key = str(key_node.value)
            if key in entries:
                raise UsageError(
                    f"{self.origin}, line {line}: '{_short(key)}' was given before, on line {entries[key].line}.",
                    fix="keep one of the two",
                )
            entries[key] = self.entry(value_node, depth + 1, line)
        return entries

    def scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        text, line = str(node.value), node.start_mark.line + 1
        if node.tag == SCALAR_TAGS[-1]:
            return text
        resolved = self.loader.resolve(yaml.ScalarNode, text, (True, False))
        if node.tag not in SCALAR_TAGS or resolved != node.tag or len(text) > MAX_SCALAR_CHARS:
            raise UsageError(
                f"{self.origin}, line {line}: a value has the YAML type '{_short(node.tag)}' that is not read here.",
                fix="write text, numbers, true or false, lists and mappings without tags; put quotes around dates",
            )
        try:
            value: str | int | float | bool | None = self.loader.construct_object(node)
        except ValueError:
            raise UsageError(
                f"{self.origin}, line {line}: '{text}' is not a number.", fix="correct the number, or quote it"
            ) from None
        return value


def _check_bounds(depth: int, nodes: int, origin: str, line: int) -> None:
    if depth > MAX_DEPTH:
        raise UsageError(f"{origin}, line {line}: nested deeper than {MAX_DEPTH} levels.", fix="flatten the file")
    if nodes > MAX_NODES:
        raise UsageError(
            f"{origin}, line {line}: more than {MAX_NODES} values once aliases are expanded.",
            fix="a detector's YAML has a few hundred values: give that file",
        )


def _short(text: str) -> str:
    return text if len(text) <= MAX_SCALAR_CHARS else text[:MAX_SCALAR_CHARS] + "..."


def entry_from_text(text: str, origin: str) -> Entry:
    """Parse one YAML document whose top is a mapping; raises `UsageError` with `origin` and the line."""
    if len(text) > MAX_FILE_BYTES:
        raise UsageError(
            f"{origin} holds {len(text)} characters of YAML; the limit is {MAX_FILE_BYTES}.",
            fix="give the YAML file of a detector",
        )
    try:
        loader = _Loader(text)
        loader.name = origin
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise UsageError(f"{where}: this is not YAML: {_short(str(reason))}.", fix="correct the line") from None
    except (ValueError, OverflowError):  # PyYAML lets chr() fail on escapes such as "\UFFFFFFFF"
        raise UsageError(f"{origin}: this is not YAML: an impossible escape.", fix="correct the escape") from None
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{origin} is not a mapping of sections.", fix="give the YAML file of a detector")
    return _Expansion(loader, origin).entry(node, 1, 1)


def entry_from_file(path: Path) -> Entry:
    """Read a YAML file and merge the files that its `_BASE_CONFIG_` entries name."""
    return _merge_bases(_entry_from_plain_file(path), path)


def _entry_from_plain_file(path: Path) -> Entry:
    if not path.is_file():
        raise UsageError(f"there is no config file {path}.", fix="give the path of a YAML file, or a detector's name")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        return entry_from_text(data.decode("utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", fix="check its permissions") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not text: byte {error.start} is no UTF-8.", fix="give the YAML file of a detector"
        ) from None


def _merge_bases(entry: Entry, path: Path) -> Entry:
    """OpenPCDet's `merge_new_config`: the base first, then mappings deeply, everything else by replacement."""
    if not isinstance(entry.value, dict):
        return entry
    own = {key: _merge_bases(child, path) for key, child in entry.value.items()}
    base = own.pop(BASE_KEY, None)
    if base is None:
        return Entry(own, entry.origin, entry.line)
    if not isinstance(base.value, str):
        raise UsageError(f"{BASE_KEY} must name a file ({base.place}).", fix="give the path of a YAML file")
    loaded = _entry_from_plain_file(_find_base(base, base.value, path))
    if not isinstance(loaded.value, dict) or BASE_KEY in loaded.value:
        raise UsageError(
            f"the base {loaded.origin} has a {BASE_KEY} itself, which OpenPCDet does not follow ({base.place}).",
            fix="name the last base directly",
        )
    return Entry(_merged(loaded.value, own), entry.origin, entry.line)


def _merged(base: dict[str, Entry], own: dict[str, Entry]) -> dict[str, Entry]:
    result = dict(base)
    for key, entry in own.items():
        below = base.get(key)
        if below is not None and isinstance(below.value, dict) and isinstance(entry.value, dict):
            result[key] = Entry(_merged(below.value, entry.value), entry.origin, entry.line)
        else:
            result[key] = entry
    return result


def _find_base(base: Entry, name: str, path: Path) -> Path:
    """OpenPCDet resolves bases from its tools folder, which holds `cfgs`: look there from every folder above `path`."""
    names = [Path(name)]
    if names[0].parts[:1] == ("cfgs",):
        names.append(Path(*names[0].parts[1:]))
    for folder in path.resolve().parents:
        for candidate in names:
            if (folder / candidate).is_file():
                return folder / candidate
    raise UsageError(
        f"{BASE_KEY} '{_short(name)}' was found in none of the folders above {path} ({base.place}).",
        fix="put the base there as in OpenPCDet's tools/cfgs, or merge it into the file",
    )


Kind = Callable[[Entry, str], T]


def refuse(entry: Entry, path: str, what: str, *, fix: str) -> NoReturn:
    """Raise `UsageError` for one entry: its path in the YAML, what is wrong, file and line."""
    raise UsageError(f"{path} {what} ({entry.place}).", fix=fix)


def _shown(entry: Entry) -> str:
    if isinstance(entry.value, dict):
        return "a mapping"
    if isinstance(entry.value, list):
        return f"a list of {len(entry.value)}"
    return _short(repr(entry.value))


def text(entry: Entry, path: str) -> str:
    """A non-empty text."""
    if not isinstance(entry.value, str) or not entry.value:
        refuse(entry, path, f"must be text, not {_shown(entry)}", fix="write a word")
    return entry.value


def flag(entry: Entry, path: str) -> bool:
    """True or False."""
    if not isinstance(entry.value, bool):
        refuse(entry, path, f"must be True or False, not {_shown(entry)}", fix="write True or False")
    return entry.value


def integer(low: int, high: int) -> Kind[int]:
    """A whole number from `low` to `high`."""

    def read(entry: Entry, path: str) -> int:
        value = entry.value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(entry, path, f"must be a whole number, not {_shown(entry)}", fix=f"write one of {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Kind[float]:
    """A finite number from `low` to `high`."""

    def read(entry: Entry, path: str) -> float:
        value = entry.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            refuse(entry, path, f"must be a number, not {_shown(entry)}", fix=f"write one of {low:g} to {high:g}")
        return float(value)

    return read


def choice(known: Sequence[str], thing: str) -> Kind[str]:
    """One of the `known` words; `thing` is what they name, as in "backbone"."""

    def read(entry: Entry, path: str) -> str:
        word = text(entry, path)
        if word not in known:
            refuse(entry, path, f"is '{_short(word)}', which is no supported {thing}", fix=nearest(word, known))
        return word

    return read


def sequence(kind: Kind[T], count: int | None = None) -> Kind[tuple[T, ...]]:
    """A list of `count` (any number but none if absent) entries of one kind."""

    def read(entry: Entry, path: str) -> tuple[T, ...]:
        items = entry.value
        wanted = "one or more" if count is None else str(count)
        if not isinstance(items, list) or not items or (count is not None and len(items) != count):
            refuse(entry, path, f"must be a list of {wanted}, not {_shown(entry)}", fix=f"give {wanted}")
        return tuple(kind(item, f"{path}[{index}]") for index, item in enumerate(items))

    return read


class Section:
    """A mapping that is read key by key; `kept` collects what was read, so that it can be written again."""

    def __init__(self, entry: Entry, path: str) -> None:
        if not isinstance(entry.value, dict):
            refuse(entry, path, f"must be a section of keys, not {_shown(entry)}", fix="indent its keys below it")
        self.entry = entry
        self.entries = entry.value
        self.path = path
        self.kept: dict[str, Any] = {}

    def join(self, key: str) -> str:
        """The full path of a key of this section."""
        return f"{self.path}.{key}" if self.path else key

    def only(self, known: Sequence[str], ignored: Sequence[str] = ()) -> None:
        """Refuse any key that is neither `known` nor `ignored` (accepted because inference does not read it)."""
        for key, entry in self.entries.items():
            if key not in known and key not in ignored:
                raise UsageError(
                    f"unknown entry {self.join(_short(key))} ({entry.place}).",
                    fix=nearest(key, (*known, *ignored)),
                )

    def get(self, key: str, kind: Kind[T]) -> T:
        """Read a key that must be there."""
        if key not in self.entries:
            raise UsageError(
                f"{self.join(key)} is missing ({self.entry.place}).", fix=f"add {key}, as OpenPCDet's file has it"
            )
        value = kind(self.entries[key], self.join(key))
        self.kept[key] = _plain(value)
        return value

    def get_or(self, key: str, kind: Kind[T], default: T) -> T:
        """Read a key that may be absent."""
        if key in self.entries:
            return self.get(key, kind)
        self.kept[key] = _plain(default)
        return default

    def fail(self, key: str, what: str, *, fix: str) -> NoReturn:
        """Raise `UsageError` about one key, or about the section where the key is absent."""
        refuse(self.entries.get(key, self.entry), self.join(key), what, fix=fix)


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return value.kept
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def text_from_section(section: Section) -> str:
    """Canonical YAML of what was read from a section, in the order of reading."""
    dumped: str = yaml.safe_dump(section.kept, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return dumped
