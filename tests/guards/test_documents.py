"""The pages tell the truth: their commands exist, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_reference import CLI_PAGE, cli_page, commands, group
from documents import Block, blocks_of, broken_links, commands_of, pages, trouble_with
from source_tree import ROOT

from calib.simulator.frame import simulate_frame

LOOKING_UP = ("detect", "report", "inspect", "models", "devices", "doctor", "plan")
CLOUD = re.compile(r"[\w./-]+\.(?:npy|bin)\b")
FOREGROUND = ("build", "detect", "bench", "report")

BLOCKS = [block for page in pages() for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "console")]
PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.fixture
def reader_folder(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: runs and point clouds are made as a page names them, by `prepare`."""
    (tmp_path / "tiny").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(folder: Path, text: str) -> None:
    for name in set(re.findall(r"\bruns/[\w.-]+", text)):
        if not (folder / name).exists():
            shutil.copytree(folder / "tiny", folder / name)
    for name in set(CLOUD.findall(text)):
        path = folder / name
        if path.parts[: len(folder.parts)] == folder.parts and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            points = simulate_frame(1, sensor="nuscenes32").cloud.points
            np.save(path, points) if path.suffix == ".npy" else points.tofile(path)


def troubles(blocks: list[Block]) -> list[str]:
    found = [(block.where, words, trouble_with(words)) for block in blocks for words in commands_of(block.text)]
    return [f"{where} {' '.join(words)}: {trouble}" for where, words, trouble in found if trouble]


def test_every_command_on_every_page_parses() -> None:
    assert SHELL, "the guard saw no commands"
    assert troubles(SHELL) == []


def test_commands_that_look_things_up_run(reader_folder: Path) -> None:
    ran = 0
    for block in SHELL:
        for words in commands_of(block.text) if block.runs else ():
            if words[0] == "dm3d-deploy" and words[1:2] and words[1] in LOOKING_UP and "--help" not in words:
                prepare(reader_folder, " ".join(words))
                group().main(words[1:], standalone_mode=False)
                ran += 1
    assert ran, "the guard ran nothing"


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, reader_folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__page__"}
    for block in (block for block in PYTHON if block.page == page):
        code = compile(block.text, block.where, "exec", dont_inherit=True)
        if block.runs:
            prepare(reader_folder, block.text)
            exec(code, names)  # noqa: S102 - the page is ours


def test_the_command_page_is_up_to_date() -> None:
    assert CLI_PAGE.read_text(encoding="utf-8") == cli_page(), "run: python tests/guards/cli_reference.py"


def test_every_command_and_option_is_documented() -> None:
    text = CLI_PAGE.read_text(encoding="utf-8")
    assert len(commands()) >= 10
    for name, command in commands().items():
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        words = [f"`{word}`" for param in command.params for word in param.opts if word.startswith("-")]
        assert [word for word in words if word not in section] == []
        assert not [param.name for param in command.params if not param.help], f"{name} has a silent parameter"


def test_the_front_page_shows_the_foreground() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [word for word in FOREGROUND if f"dm3d-deploy {word}" not in text] == []
    assert [word for word in ("make demo", "make test") if word not in text] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dm3d-deploy build --model centerpoint --target 0.3", None),
        ("OMP_NUM_THREADS=1 dm3d-deploy build --model centerpoint \\\n  --target 0.3  # half a minute", None),
        ("dm3d-deploy doctor --json | python -m json.tool", None),
        ("dm3d-deploy build --modell centerpoint --target 0.3", "No such option"),
        ("dm3d-deploy build --target 0.3", "model"),
        ("dm3d-deploy build --model centerpoint --seed much", "integer"),
        ("dm3d-deploy prune runs/a", "no command 'prune'"),
        ("dm3d-deploy plan inspect runs/a --json", None),
        ("dm3d-deploy plan inspect", "run"),
        ("dm3d-deploy plan show runs/a", "no command 'plan show'"),
        ("cd x && dm3d-deploy bench", "bench"),
        ("make demo PYTHON=python3.12", None),
        ("make coffee", "coffee"),
        ("pip install -c constraints.txt -e '.[compile,rtx,sparse3d]'", None),
        ("pip install 'dm3d-deploy[everything]'", "everything"),
        ("python benchmarks/pruning_speed.py", None),
        ("python benchmarks/nothing.py", "nothing.py"),
        ("frobnicate", "nobody knows"),
    ],
)
def test_a_false_line_is_found(tmp_path: Path, line: str, words: str | None) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```bash\n{line}\n```\n")
    found = troubles(list(blocks_of(page)))
    assert found == [] if words is None else len(found) == 1 and words in found[0], found


def test_pages_are_read_as_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- test: not run: takes minutes -->\n```python\na\n```\n[here](page.md) [gone](gone.md#x)\n```text\nb\n```\n"
    )
    first, second = blocks_of(page)
    assert (first.language, first.text, first.runs, first.line) == ("python", "a", False, 2)
    assert (second.language, second.runs) == ("text", True)
    assert broken_links(page) == ["gone.md"]
    page.write_text("<!-- test: not run: -->\n```python\na\n```\n```bash\n")
    with pytest.raises(ValueError, match="nothing closes"):
        list(blocks_of(page))
