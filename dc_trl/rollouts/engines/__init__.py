# SPDX-License-Identifier: Apache-2.0
"""Every engine, one a file of this folder, and which of them a configuration chooses.

A new engine is a new file with its `ENGINE`, an instance of a subclass of `Engine`; nothing else lists them.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from dc_trl.rollouts.engines.base import Engine

ENGINES: tuple[Engine, ...] = tuple(
    import_module(f"{__name__}.{module.name}").ENGINE for module in iter_modules(__path__) if module.name != "base"
)
BACKENDS = tuple(sorted({engine.backend for engine in ENGINES}, reverse=True))


def engine_of(settings: Mapping[str, Any]) -> Engine:
    """The engine that these settings choose.

    Args:
        settings: fields of a `DCGRPOConfig` by name, or those of another trainer's configuration that are known.

    Raises:
        ValueError: none serves them, or several do.
    """
    serving = [engine for engine in ENGINES if engine.serves(settings)]
    if len(serving) != 1:
        names = [type(engine).__name__ for engine in serving]
        raise ValueError(f"{names or 'no engine'} would serve rollout_backend={settings.get('rollout_backend')!r}.")
    return serving[0]


def engine_name(settings: Mapping[str, Any], server: str = "") -> str:
    """What reports and model cards call the engine of these settings; see `Engine.name`."""
    return engine_of(settings).name(settings, server)


def check_log_prob_source(args: Any, rollout_func: Callable[..., Any] | None, defaulted: bool = False) -> None:
    """Refuses what compares the engines where nothing gives the sampler's log-probs, before any model loads.

    Args:
        args: a `DCGRPOConfig`.
        rollout_func: the user's, which takes the engine's place.
        defaulted: whether no configuration was given, so that `args` holds the defaults.

    Raises:
        ValueError: if no engine gives sampling log-probs, or a vLLM server gives unprocessed ones.
        ConnectionError: if the vLLM server does not answer within `vllm_server_timeout` seconds.
    """
    if args.needs_log_probs and rollout_func is None:
        engine_of(vars(args)).check_log_probs(args, defaulted)


def check_route_source(args: Any, given: Mapping[str, Any]) -> None:
    """Refuses router replay that nothing can record for, before any model loads.

    Args:
        args: a `DCGRPOConfig`.
        given: the trainer's arguments, of which `rollout_func`, `tools` and `environment_factory` are looked at.

    Raises:
        ValueError: if rollouts do not come in one turn from an engine that records its choice of experts.
    """
    if not args.router_replay:
        return
    for name in ("rollout_func", "tools", "environment_factory"):
        if given.get(name):
            raise ValueError(
                f"`router_replay` is True with `{name}`, whose tokens do not all come from one call of the engine "
                f"that records its experts. Leave `{name}` out, or set `router_replay=False`."
            )
    engine_of(vars(args)).check_routes(args)
