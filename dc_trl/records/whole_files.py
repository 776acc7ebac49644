# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whenever the process that writes them may be killed."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one step as far as readers can tell; makes the directory if missing.

    It is written under a temporary name beside `path`, forced to the disk, and renamed.

    Raises:
        OSError: the file cannot be written; the one that was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
