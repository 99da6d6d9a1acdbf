"""The one border to ml_collections.

A config file builds a `Config`, hands it out as a `ConfigDict` so that absl can override single
fields (`--config.optim.lr=1e-3`), and `from_config_dict` turns the result back once. Beside this
file, only cells of grids (sweep.py) see a `ConfigDict`, on their way here.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict

from scale_sae_jax.config.checks import check
from scale_sae_jax.config.settings import Config
from scale_sae_jax.errors import UserError


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """The argument string of a config file, `l0=32,experts=64`, typed by the defaults.

    Returns a `ConfigDict` with exactly the keys of `defaults`. Raises UserError for an unknown key,
    a part without '=', or a value that is not of its default's type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        known = ", ".join(defaults)
        if not equals:
            raise UserError(f"config argument '{part}' has no '=': write key=value; keys: {known}")
        if key not in defaults:
            raise UserError(f"config argument '{key}' is unknown: this config takes {known}")
        values[key] = _typed(key, text, type(defaults[key]))
    return ConfigDict(values)


def _typed(key: str, text: str, kind: type) -> Any:
    booleans = {"true": True, "1": True, "false": False, "0": False}
    try:
        return booleans[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UserError(f"config argument {key}={text} is not of type {kind.__name__}") from None


def to_config_dict(config: Config) -> ConfigDict:
    """The same settings as a typed ConfigDict, for absl to override."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(settings: Any) -> Config:
    """A ConfigDict or nested dict as a checked, frozen `Config`. Raises UserError; see `check`."""
    plain = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    config = _build(Config, plain, "config")
    check(config)
    return config


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold named settings, not {values!r}")
    types = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise UserError(f"{where}.{unknown[0]} is unknown: {where} takes {', '.join(types)}")
    built = {}
    for name, value in values.items():
        want = types[name]
        if dataclasses.is_dataclass(want):
            built[name] = _build(want, value, f"{where}.{name}")
        elif want is float and isinstance(value, int) and not isinstance(value, bool):
            built[name] = float(value)
        elif type(value) is want:
            built[name] = value
        else:
            raise UserError(f"{where}.{name} = {value!r} must be of type {want.__name__}")
    return kind(**built)
