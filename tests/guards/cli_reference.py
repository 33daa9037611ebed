"""docs/cli.md from the command line itself: `python tests/guards/cli_reference.py` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from dm3d_deploy import errors
from dm3d_deploy.cli import app

CLI_PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = """# The command line

This page is written from the command line itself (`python tests/guards/cli_reference.py`); a test compares them.
Every command takes `--help`. `--version` prints the version.
"""


def group() -> Any:
    """The command line as an object that knows its commands and options."""
    return typer.main.get_command(app)


def commands() -> dict[str, Any]:
    """Every command by the words that call it: "build", "plan inspect"."""
    found: dict[str, Any] = {}
    for name, command in group().commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": leaf for word, leaf in inner.items()}
    return found


def cli_page() -> str:
    """The text of docs/cli.md."""
    parts = [HEAD, *(_command(name, command) for name, command in commands().items()), _exit_codes()]
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    words = " ".join(["dm3d-deploy", name, *(_metavar(argument) for argument in arguments), "[OPTIONS]"])
    rows = [f"| `{_cell(_metavar(param))}` | required | {_cell(param.help)} |" for param in arguments]
    rows += [f"| {_spelling(param)} | {_default(param)} | {_cell(param.help)} |" for param in options]
    table = "\n".join(["| | default | |", "|---|---|---|", *rows])
    return f"## {name}\n`{words}`\n\n{command.help}\n\n{table}\n"


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _spelling(param: Any) -> str:
    return ", ".join(f"`{word}`" for word in param.opts)


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if isinstance(param.show_default, str):
        return param.show_default
    return "" if param.default is None or param.default is False else f"`{param.default}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _exit_codes() -> str:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.Dm3dError]
    rows = [
        (kind.exit_code, kind.__name__, (kind.__doc__ or "").strip()) for kind in kinds if hasattr(kind, "exit_code")
    ]
    table = "\n".join(f"| {code} | {name} | {text} |" for code, name, text in sorted(rows))
    return (
        "## Exit codes\n| | error | |\n|---|---|---|\n| 0 | | Done. |\n"
        f"{table}\n| 130, 143 | | Interrupted, by SIGINT or to `train` by SIGTERM; finished stages, "
        "or the step that a training reached, are kept. |\n"
    )


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
