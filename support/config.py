"""Configuration: one YAML file per experiment, `key=value` overrides, mistakes that end in a sentence."""

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml


class UserError(ValueError):
    """A mistake that the user can mend; its text is one sentence that says what, where and how."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; `settings`, the .yaml file and key=value overrides, may stand anywhere in it."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
    words = sys.argv[1:]
    settings = [word for word in words if re.match(r"\w+(\.\w+)?=|[^-].*\.ya?ml$", word)]
    arguments = parser.parse_intermixed_args([word for word in words if word not in settings])
    arguments.settings += settings
    return arguments


# ---- configuration: one YAML file per experiment, `base:` names the file it varies, `key=value` overrides both ----


def load_config(default: Path, settings: list[str], stored: dict | None = None) -> SimpleNamespace:
    """The configuration that a command line names: at most one .yaml file, then `key=value` overrides.

    Without a file it is the `stored` one of a checkpoint, or the stage's `default`. The default file holds every key,
    so it is the schema too: names and types have to be the same as there.
    Raises UserError for a missing file, an unknown or missing key, or a value of the wrong type.
    """
    files = [Path(setting) for setting in settings if setting.endswith((".yaml", ".yml")) and "=" not in setting]
    if len(files) > 1:
        raise UserError(f"only one configuration file can be given, not {' and '.join(map(str, files))}")
    name = str(files[0]) if files else "the checkpoint" if stored else str(default)
    schema = _flatten(_read_yaml(default))
    given = _flatten(stored if stored and not files else _read_yaml(files[0] if files else default))
    if stored:  # it may be older than a key of `run`, where nothing changes the results of a model
        given = {key: value for key, value in schema.items() if key.startswith("run.")} | given
    values = {key: (value, name) for key, value in given.items()}
    for setting in settings:
        if Path(setting) in files:
            continue
        key, separator, value = setting.partition("=")
        if not separator:
            raise UserError(f"'{setting}' is neither a .yaml file nor key=value, which is written without spaces")
        try:
            values[key] = yaml.safe_load(value), "command line"
        except yaml.YAMLError:
            raise UserError(f"command line: the value in '{setting}' is not valid YAML") from None
    unknown = [key for key in values if key not in schema]
    for key in unknown:
        where = values[key][1]
        meant = [valid for valid in schema if valid.startswith(f"{key}.") or key in valid.split(".")[-1]]
        meant = meant or difflib.get_close_matches(key, schema, n=1, cutoff=0)
        others = sum(values[other][1] == where for other in unknown) - 1
        stage = f"; {others} others are unknown too, as if it were another stage's" if others > 2 else ""
        raise UserError(f"{where}: unknown key '{key}'; the nearest valid key is {' or '.join(map(repr, meant))}{stage}")
    for key in schema:
        if key not in values:
            raise UserError(f"{name}: '{key}' is missing; a file without 'base:' gives every key")
    nested: dict = {}
    for key, example in schema.items():
        *group, item = key.split(".")
        (nested.setdefault(group[0], {}) if group else nested)[item] = _as_type_of(example, *values[key], key)
    return json.loads(json.dumps(nested), object_hook=lambda group: SimpleNamespace(**group))


# What the numbers of some keys may be, in whatever stage has them; no other key's may be negative either.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    key: (valid, words)
    for keys, valid, words in (
        ("model.decoder_depth model.cube data.actions data.frames data.stride data.size data.repeats data.test_clips data.test_crops", lambda x: x >= 1, "at least 1"),
        ("optim.batch_size optim.epochs run.batch_per_device run.log_every run.checkpoint_every", lambda x: x >= 1, "at least 1"),
        ("model.drop_path model.dropout optim.betas optim.label_smoothing optim.momentum", lambda x: 0 <= x < 1, "from 0 to below 1"),
        ("mask.ratio", lambda x: 0 <= x <= 1, "a share such as 0.9"),
        ("data.erase", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("data.scales data.crop_area", lambda x: 0 < x <= 1, "above 0, and 1 at most"),
        ("data.crop_aspect data.rate", lambda x: 0 < x < math.inf, "above 0"),
        ("run.seed", lambda x: 0 <= x < 2**32, "from 0 to 4294967295"),
    )
    for key in keys.split()
}


def as_dict(config: SimpleNamespace) -> dict:
    """The nested plain dict of a configuration, for YAML and checkpoints."""
    return json.loads(json.dumps(config, default=vars))


def pick(table: dict[str, Any], name: str, key: str) -> Any:
    """`table[name]`, or a UserError that lists the choices for the configuration key `key`."""
    if name not in table:
        raise UserError(f"{key}={name} is not known; choose one of {', '.join(table)}")
    return table[name]


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict:
    if path.resolve() in above:
        raise UserError(f"{path}: 'base:' leads back to the file itself")
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no configuration can be read from {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has to hold groups of 'key: value' lines")
    if "base" not in config:
        return config
    base = _flatten(_read_yaml(path.parent / str(config.pop("base")), (*above, path.resolve())))
    return base | _flatten(config)


def _flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_type_of(example: Any, value: Any, where: str, key: str) -> Any:
    if isinstance(example, list) and isinstance(value, list):
        if not value or 1 < len(example) != len(value):  # where the default names one value, there may be more
            raise UserError(f"{where}: {key} expects a list such as {example}, not {value}")
        return [_as_type_of(example[0], item, where, key) for item in value]
    if isinstance(example, float) and type(value) in (int, str):  # YAML reads 1e-3, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(example, str) and value is None:  # 'key=' empties a text
        return ""
    if type(value) is not type(example):
        raise UserError(f"{where}: {key} expects {type(example).__name__}, as in {example!r}, but is {value!r}")
    if isinstance(value, (int, float)):
        valid, words = RANGES.get(key, (lambda number: 0 <= number < math.inf, "a number from 0 on"))
        if not valid(value):
            raise UserError(f"{where}: {key}={value} has to be {words}")
    return value
