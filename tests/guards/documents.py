"""What the pages say that a machine can check: shell lines, Python blocks, links.

A fenced `bash` block holds commands a reader may type, a `python` block runs; `text` is everything else. In the folder
where Python blocks and looking-up commands run, every `runs/NAME` is a small finished run and every point cloud that
is named exists. A block that cannot run there has a line before it: `<!-- test: not run: REASON -->`; its commands are
still parsed, its Python still compiled.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli_reference import commands, group
from source_tree import ROOT

FENCE = re.compile(r"^```(\w*)\s*$")
NOT_RUN = re.compile(r"^<!-- test: not run: \S.* -->$")
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")
HARMLESS = ("cd", "git", "source", "export")
PYTHON = ("python", "python3", ".venv/bin/python")
PIP = ("pip", ".venv/bin/pip")
PAUSES = ("|", "&&", "||", ";", ">", ">>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """Every page that a reader sees."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of one page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        fence = FENCE.match(line.strip())
        if fence and opened is None:
            opened = number
        elif fence and opened is not None:
            before = lines[opened - 1].strip() if opened else ""
            language = FENCE.match(lines[opened].strip())
            yield Block(
                page=page, line=opened + 1, language=language.group(1) if language else "",
                text="\n".join(lines[opened + 1 : number]), runs=not NOT_RUN.match(before),
            )  # fmt: skip
            opened = None
    if opened is not None:
        raise ValueError(f"{page.name}:{opened + 1} opens a block that nothing closes")


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; pipes and lists are taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word not in PAUSES:
                words.append(word)
            elif words:
                yield words
                words = []


def trouble_with(words: list[str], root: Path = ROOT) -> str | None:
    """Why a command would not work, as far as that can be known without running it."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if not words or words[0] in HARMLESS or words[0].endswith(".md"):
        return None
    program, rest = words[0], words[1:]
    if program in ("dm3d-deploy", ".venv/bin/dm3d-deploy"):
        return trouble_with_own(rest)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        unknown = [word for word in rest if "=" not in word and word not in targets]
        return f"make has no {unknown}" if unknown else None
    if program in PIP or (program in PYTHON and rest[:2] == ["-m", "pip"]):
        return _trouble_with_extras(rest, root)
    if program in PYTHON:
        missing = [word for word in rest if word.endswith(".py") and not (root / word).is_file()]
        return f"there is no {missing}" if missing else None
    if program == ".ci/run":
        return None if (root / program).is_file() else "there is no .ci/run"
    return f"nobody knows '{program}'; a block that is no shell is `text`"


def trouble_with_own(words: list[str]) -> str | None:
    """Parse one of our own commands with the words of a page, without running it."""
    if not words or words[0] in ("--help", "-h", "--version"):
        return None
    known: dict[str, Any] = group().commands
    if words[0] not in known:
        return f"there is no command '{words[0]}'"
    if set(words) & {"--help", "-h"}:
        return None
    inner = getattr(known[words[0]], "commands", None)
    name = words[0] if inner is None else " ".join(words[:2])
    if name not in commands():
        return f"there is no command '{name}'"
    try:
        commands()[name].make_context(name, list(words[len(name.split()) :]))
    except RuntimeError as error:
        return f"'{words[0]}' stopped with {error}"
    except Exception as error:  # noqa: BLE001 - typer's usage errors moved between its versions
        return f"'{words[0]}': {error}"
    return None


def _trouble_with_extras(words: list[str], root: Path) -> str | None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)}
    unknown = [e for group_ in wanted for e in group_.split(",") if not re.search(rf"^{e} = \[", text, re.MULTILINE)]
    return f"there is no extra {unknown}" if unknown else None


def broken_links(page: Path) -> list[str]:
    """Relative links that lead nowhere."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [found.group(1) for found in LINK.finditer(text) if not (page.parent / found.group(1).strip()).exists()]
