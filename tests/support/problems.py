# SPDX-License-Identifier: Apache-2.0
"""Problems to train on, in files of the kinds that the package reads."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def dapo_rows(problems: int = 3, repeats: int = 1) -> list[dict[str, Any]]:
    """Rows with the columns of BytedTSinghua-SIA/DAPO-Math-17k, invented here."""
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"What is {n} + 1?\n\nAnswer on its own line after “Answer:”."}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{n}-{repeat}"},
        }
        for repeat in range(repeats)
        for n in range(problems)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
