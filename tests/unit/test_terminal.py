"""What the terminal shows of work that is no stage of a build."""

import io

from rich.console import Console

from dm3d_deploy.terminal import TerminalWatch


def test_work_beside_the_stages_has_its_own_words():
    out = io.StringIO()
    with TerminalWatch(Console(file=out, width=100)) as watch:
        watch.started("held out", "hold it against frames that chose nothing")
        watch.advanced(1, 2)
        watch.finished("held out", 1.25, False)
        watch.finished("curves", 0.0, True)
    told = [line for line in out.getvalue().splitlines() if line.startswith(("✓", "="))]
    assert "held out" in told[0]
    assert told[0].split("held out")[1].split() == [
        "hold",
        "it",
        "against",
        "frames",
        "that",
        "chose",
        "nothing",
        "1.2",
        "s",
    ]
    assert told[1].endswith("up to date")
