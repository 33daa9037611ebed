"""What a person sees in the terminal while a build runs, and how an error is said."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dm3d_deploy.errors import Dm3dError
from dm3d_deploy.stages import STAGES

SAYS = {stage.name: stage.says for stage in STAGES}
NAME_WIDTH = max(len(stage.name) for stage in STAGES)


class TerminalWatch:
    """Draws a line for every stage: done, running with elapsed and remaining time, or up to date."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.says = ""

    def __enter__(self) -> TerminalWatch:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, stage: str, says: str) -> None:
        """Show a bar that does not know its length yet."""
        self.says = says
        self._drop()
        self.task = self.progress.add_task(f"{stage:<{NAME_WIDTH}}  {says}", total=1)

    def advanced(self, done: int, total: int) -> None:
        """Move the bar."""
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total)

    def finished(self, stage: str, seconds: float, fresh: bool) -> None:
        """Replace the bar by one line."""
        self._drop()
        mark, when = ("[dim]=[/]", "[dim]up to date[/]") if fresh else ("[green]✓[/]", f"{seconds:6.1f} s")
        says = SAYS.get(stage, self.says)  # a stage that is up to date was never started, other work always was
        self.console.print(f"{mark} {stage:<{NAME_WIDTH}}  [dim]{says:<40}[/] {when}", highlight=False)

    def noted(self, text: str) -> None:
        """Print a note above the bar."""
        self.console.print(f"[yellow]! {text}[/]", highlight=False)

    def _drop(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


def say_error(error: Dm3dError) -> None:
    """One sentence and the fix, on standard error."""
    console = Console(file=sys.stderr, soft_wrap=True)
    console.print(f"[bold red]error:[/] {_plain(error.what)}", highlight=False)
    console.print(f"  [bold]fix:[/] {_plain(error.fix)}", highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
