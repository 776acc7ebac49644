# SPDX-License-Identifier: Apache-2.0
"""Scores in the metadata of a model card (`model-index`), as the Hub reads them."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, metadata_load, metadata_save, metadata_update
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from dc_trl.records.results import CARD_SETTINGS, newest_results


def model_index_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The `EvalResult`s of benchmark results: for each the score and, where there is one, its standard error; percent.

    Args:
        results: as `read_results` returns them; those without a score are left out, and of those that only weights,
            seed or prompt tell apart the last one stays.
    """
    found = []
    for result in newest_results(results):
        for kind, label, value in (("accuracy", "", result["mean"]), ("stderr", " standard error", result["stderr"])):
            if value is not None:
                found.append(_eval_result(result, kind, f"{result['metric']}{label}", value))
    return found


def _eval_result(result: dict[str, Any], kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=result["dataset"],
        dataset_name=result["title"],
        dataset_config=result["config"],
        dataset_split=result["split"],
        metric_type=kind,
        metric_name=name,
        metric_value=round(100 * value, 2),
        metric_args={key: result[key] for key in CARD_SETTINGS if result[key] is not None},
    )


def check_card(path: Path) -> None:
    """Reads a card's metadata as `update_card` will, so that a broken card is found before the sampling.

    Raises:
        ValueError: the metadata of the card is not valid.
    """
    _split(_metadata(path))


def update_card(path: Path, model: str, results: list[dict[str, Any]]) -> None:
    """Writes results into a card, which keeps everything else; a missing card is made.

    The result of the same benchmark and settings is replaced, other results stay.

    Args:
        path: of the card, a README.md.
        model: name for a new `model-index`; an old one keeps its name.
        results: as `read_results` returns them.

    Raises:
        ValueError: the metadata of the card is not valid.
    """
    metadata = _metadata(path)
    name, old, others = _split(metadata)
    new = model_index_results(results)
    kept = [result for result in old if not any(result.is_equal_except_value(fresh) for fresh in new)]
    metadata["model-index"] = [*eval_results_to_model_index(name or model, kept + new), *others]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\n# {model}\n", encoding="utf-8")
    metadata_save(path, metadata)


def push_results(repository: str, results: list[dict[str, Any]]) -> str:
    """Writes results into the card of a Hub repository; returns the address of the commit.

    Raises:
        Exception: whatever `huggingface_hub.metadata_update` raises without network, token or right.
    """
    name = repository.rpartition("/")[2]
    index = eval_results_to_model_index(name, model_index_results(results))
    return metadata_update(repository, {"model-index": index}, overwrite=True)


def _metadata(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return (metadata_load(path) or {}) if path.exists() else {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ValueError(
            f"the metadata of the model card {path} is not valid: {error}. Correct or move it."
        ) from error


def _split(metadata: dict[str, Any]) -> tuple[str | None, list[EvalResult], list[Any]]:
    """Name and results of the first entry of `model-index`, and the other entries as they are."""
    index = metadata.get("model-index") or []
    if not index:
        return None, [], []
    try:
        name, results = model_index_to_eval_results(index[:1])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the model-index of the model card is not valid ({error!r}): correct or remove it."
        ) from error
    return name, results, index[1:]
