"""Configuration: one YAML file per experiment, `key=value` overrides, and mistakes that end in one sentence.

A stage's default file, configs/<stage>/toy.yaml, holds and explains every key. It is also the schema: other files,
overrides and stored configurations have its keys and types. `base:` names the file, or a list of files, to start from.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

COUNTS = """model.decoder_depth model.cube moco.mlp_dim moco.dim data.actions data.frames data.stride data.size
    data.repeats data.test_clips data.test_crops optim.batch_size optim.epochs run.batch_per_device run.log_every
    run.checkpoint_every"""
RATES = "model.drop_path model.dropout optim.betas optim.label_smoothing optim.momentum mask.decoder_ratio"
LIMITS = {  # of some keys, in every stage that has them; all other numbers are from 0 to any finite one
    **dict.fromkeys(COUNTS.split(), (1, math.inf)),
    **dict.fromkeys(RATES.split(), (0, 0.9999)),
    **dict.fromkeys(["data.scales", "data.crop_area"], (0.01, 1)),
    **dict.fromkeys(["data.crop_aspect", "data.rate"], (0.01, 1000)),
    **dict.fromkeys(["mask.ratio", "data.erase", "moco.momentum"], (0, 1)),
    "moco.temperature": (0.001, math.inf),
    "run.seed": (0, 2**32 - 1),
}


class UserError(ValueError):
    """A mistake that the user can fix. Its text is one sentence that says what is wrong, where, and how to fix it."""


def say(text: str) -> None:
    """Print to stderr, apart from a command's results, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. Its .yaml file and key=value overrides, `settings`, may stand anywhere."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
    words = sys.argv[1:]
    settings = [word for word in words if re.match(r"[^-].*\.ya?ml$", word)]
    settings += [word for word in words if re.match(r"\w+(\.\w+)?=", word) and not Path(word).exists()]
    arguments = parser.parse_intermixed_args([word for word in words if word not in settings])
    arguments.settings += settings
    return arguments


def load_config(default: Path, settings: list[str], stored: dict | None = None) -> SimpleNamespace:
    """The configuration that a command line asks for: its .yaml file, else `stored`, else `default`; then overrides.

    stored: a checkpoint's configuration. Keys that it lacks take the schema's default, keys that the schema lacks are
    ignored, with a line that says so. An empty run.folder becomes runs/<stage>/<name of the file>.
    Raises UserError for what cannot be read, an unknown or missing key, or a value of the wrong type or out of range.
    """
    schema = {key: _typed(value) for key, value in read_yaml(default).items()}
    files = [word for word in settings if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) > 1:
        raise UserError(f"only one configuration file can be given, not {' and '.join(files)}")
    where = files[0] if files else "the checkpoint" if stored else str(default)
    given = flatten(stored) if stored and not files else read_yaml(Path(files[0]) if files else default)
    if stored and not files and (differ := schema.keys() ^ given.keys()):
        say(f"{where} is from another version: defaults or nothing instead of {', '.join(sorted(differ))}")
        given = {key: given.get(key, value) for key, value in schema.items()}
    values = {key: (value, where) for key, value in given.items()}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if separator:
            values[key] = (text, "command line")
        elif setting not in files:
            raise UserError(f"'{setting}' is neither a .yaml file nor key=value, which is written without spaces")
    if unknown := [key for key in values if key not in schema]:
        key, where = unknown[0], values[unknown[0]][1]
        near = [valid for valid in schema if valid.startswith(f"{key}.") or key in valid.split(".")[-1]]
        near = near or difflib.get_close_matches(key, schema, n=1, cutoff=0)
        others = f"; {len(unknown) - 1} others are unknown too: is it another stage's?" if len(unknown) > 3 else ""
        raise UserError(
            f"{where}: unknown key '{key}'; the nearest valid key is {' or '.join(map(repr, near))}{others}"
        )
    if missing := [key for key in schema if key not in values]:
        raise UserError(f"{where}: '{missing[0]}' is missing; a file without 'base:' gives every key")

    config = SimpleNamespace()
    for key, example in schema.items():
        group, _, item = key.rpartition(".")
        holder = vars(config).setdefault(group, SimpleNamespace()) if group else config
        setattr(holder, item, _convert(*values[key], key, example))
    config.run.folder = config.run.folder or f"runs/{default.parent.name}/{Path(files[0] if files else default).stem}"
    return config


def as_dict(config: SimpleNamespace) -> dict:
    """A configuration as nested plain dicts, for YAML and checkpoints."""
    return json.loads(json.dumps(config, default=vars))


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys such as "optim.base_lr"."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def pick(table: dict[str, Any], name: str, key: str) -> Any:
    """`table[name]`, or a UserError that lists the choices for the configuration key `key`."""
    if name not in table:
        raise UserError(f"{key}={name} is not known; choose one of {', '.join(table)}")
    return table[name]


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file over those of its bases, as one flat dict. Values are text: the schema says their type."""
    if path.resolve() in above:
        raise UserError(f"{path}: 'base:' leads back to the file itself")
    try:
        config = yaml.load(path.read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # safe_load without types
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"no configuration can be read from {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has to hold groups of 'key: value' lines")
    bases, flat = config.pop("base", []), {}
    for base in [bases] if isinstance(bases, str) else bases:
        flat |= read_yaml(path.parent / base, (*above, path.resolve()))
    return flat | flatten(config)


def _typed(text: Any) -> Any:
    """A schema's text as the bool, int or float that it looks like."""
    if isinstance(text, list):
        return [_typed(item) for item in text]
    for kind in (int, float, {"true": True, "false": False}.__getitem__):
        with suppress(ValueError, KeyError):
            return kind(text)
    return text


def _convert(value: Any, where: str, key: str, example: Any) -> Any:
    """A value, or its text, as the type of the schema's `example`. Raises UserError."""
    kind = type(example)
    try:
        if kind is list:
            items = yaml.load(str(value), Loader=yaml.BaseLoader)
            if not isinstance(items, list) or not items or 1 < len(example) != len(items):
                raise KeyError
            return [_convert(item, where, key, example[0]) for item in items]  # where the schema has one, any number
        if isinstance(value, list):
            raise KeyError
        value = yaml.SafeLoader.bool_values[str(value).lower()] if kind is bool else kind(str(value))
    except UserError:
        raise
    except (KeyError, ValueError, yaml.YAMLError):
        raise UserError(f"{where}: {key} expects {kind.__name__} such as {example!r}, not {value!r}") from None
    low, high = LIMITS.get(key, (0, math.inf))
    if kind in (int, float) and not (low <= value <= high and value < math.inf):
        limits = f"at least {low}" + (f" and at most {high}" if high < math.inf else " and finite")
        raise UserError(f"{where}: {key}={value} has to be {limits}")
    return value
