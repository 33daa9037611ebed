"""The command line: `root` holds what commands share, the other modules hold the commands of one panel each."""

# Importing a module registers its commands, so the order of the imports is the order of `--help`.
from dm3d_deploy.cli import line  # noqa: F401

# isort: split
from dm3d_deploy.cli import profile  # noqa: F401

# isort: split
from dm3d_deploy.cli import study  # noqa: F401

# isort: split
from dm3d_deploy.cli import world  # noqa: F401

# isort: split
from dm3d_deploy.cli import lookup  # noqa: F401

# isort: split
from dm3d_deploy.cli import plan  # noqa: F401

# isort: split
from dm3d_deploy.cli.root import app, main

__all__ = ["app", "main"]
