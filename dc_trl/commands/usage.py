# SPDX-License-Identifier: Apache-2.0
"""What commands say of arguments that cannot be carried out."""

from pathlib import Path


class UsageError(Exception):
    """A command that cannot be carried out as given: message and exit status 2, without a traceback."""


def model_directory(name: str) -> Path | None:
    """The directory that `--model_name_or_path` names, or None for a model of the Hub.

    Raises:
        UsageError: the name is that of a directory, and there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(
            f"the model directory {name} does not exist (looked from {Path.cwd()}; `~` is not expanded). Check it, or "
            "name a model of the Hub as OWNER/NAME."
        )
    return None
