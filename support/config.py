"""Configuration: one YAML file per experiment, `key=value` overrides, and one sentence for every mistake.

configs/<stage>/defaults.yaml names every key of a stage with its default, its meaning and its choices. It is also the
schema: other files, overrides and stored configurations have its keys and types. A file changes some of the keys, and
`base:` names the file, or a list of files, to start from.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

LIMITS = (  # the lowest and the highest value of these keys; other numbers may be from 0 to infinity
    (1, math.inf, "data.actions data.frames data.stride data.size data.repeats data.test_clips data.test_crops"),
    (1, math.inf, "model.decoder_depth model.cube moco.mlp_dim moco.dim optim.batch_size optim.epochs"),
    (1, math.inf, "run.batch_per_device run.log_every run.checkpoint_every"),
    (0, 0.9999, "model.drop_path model.dropout optim.betas optim.label_smoothing optim.momentum mask.decoder_ratio"),
    (0.01, 1, "data.scales data.crop_area"),
    (0.01, 1000, "data.crop_aspect data.rate"),
    (0, 1, "mask.ratio data.erase moco.momentum"),
    (0.001, math.inf, "moco.temperature"),
    (-1, math.inf, "data.workers"),
    (0, 2**32 - 1, "run.seed"),
)
LIMITS_OF = {key: (low, high) for low, high, keys in LIMITS for key in keys.split()}


class UserError(ValueError):
    """A mistake that the user can fix. Its text is one sentence that says what is wrong, where, and how to fix it."""


def say(text: str) -> None:
    """Print to stderr, on rank 0 only. A command's results go to stdout."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def parse(parser: argparse.ArgumentParser, default: Path | None = None) -> argparse.Namespace:
    """Parse the command line. The .yaml file and key=value overrides may stand anywhere in it; they become `settings`.

    default: the stage's default configuration; --help then names the file that lists all keys.
    """
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
    keys = {}
    if default:
        defaults = default.with_name("defaults.yaml")
        keys = read_yaml(defaults)
        parser.epilog = f"{defaults} lists all keys with their meaning; any of them can be given as group.key=value."
    words = sys.argv[1:]
    settings = [word for word in words if is_setting(word)]
    words = [word for word in words if word not in settings]
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        option, _, value = unknown[0].partition("=")
        following = [*words, "VALUE"][words.index(unknown[0]) + 1]
        near = _nearest_keys(option.lstrip("-").replace("-", "_"), keys)
        if near:
            raise UserError(f"there is no option {option}; keys are given as {near[0]}={value or following}")
        parser.error(f"unknown option {option}")
    arguments.settings += settings
    return arguments


def is_setting(word: str) -> bool:
    """Return whether a word of the command line is a .yaml file or key=value, and not a file with "=" in its name."""
    if re.match(r"[^-].*\.ya?ml$", word):
        return True
    return bool(re.match(r"\w+(\.\w+)?=", word)) and not Path(word).exists()


def load_config(default: Path, settings: list[str], stored: dict | None = None) -> SimpleNamespace:
    """Return the configuration that a command line asks for.

    The defaults.yaml next to `default` is changed by the .yaml file in `settings`, or else by `stored`, or else by the
    file `default`; then by the overrides in `settings`. stored: a checkpoint's configuration. Keys that it lacks take
    their defaults, keys that no longer exist are ignored, and a line says so. An empty run.folder becomes
    runs/<stage>/<name of the file>. Raises UserError for a file that cannot be read, an unknown key, or a value of the
    wrong type or out of range.
    """
    defaults = read_yaml(default.with_name("defaults.yaml"))
    files = [word for word in settings if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) > 1:
        raise UserError(f"only one configuration file can be given, not {' and '.join(files)}")
    if files:
        source, chosen = files[0], read_yaml(Path(files[0]))
    elif stored:
        source, chosen = "the checkpoint", flatten(stored)
        if differ := sorted(defaults.keys() ^ chosen.keys()):
            _check_stage(default.parent, chosen)
            what = f"these keys take their defaults or are gone: {', '.join(differ)}"
            say(f"{source} was made by another version: {what}")
            chosen = {key: value for key, value in chosen.items() if key in defaults}
    else:
        source, chosen = str(default), read_yaml(default)
    values = {key: (value, source) for key, value in (defaults | chosen).items()}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if separator:
            values[key] = (text, "command line")
        elif setting not in files:
            raise UserError(f"'{setting}' is neither a .yaml file nor key=value, which is written without spaces")
    _check_keys(values, defaults)
    _check_length(values)

    config = SimpleNamespace()
    for key, (value, where) in values.items():
        group, _, name = key.rpartition(".")
        if group and not hasattr(config, group):
            setattr(config, group, SimpleNamespace())
        setattr(getattr(config, group) if group else config, name, _convert(value, where, key, _typed(defaults[key])))
    if not config.run.folder:
        config.run.folder = f"runs/{default.parent.name}/{Path(files[0] if files else default).stem}"
    return config


def _check_stage(folder: Path, chosen: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint's keys are those of another stage, not of another version of this one."""
    unknown = {}
    for file in folder.parent.glob("*/defaults.yaml"):
        unknown[file.parent.name] = len(chosen.keys() - read_yaml(file).keys())
    stage = min(unknown, key=unknown.__getitem__)
    if unknown[stage] < unknown[folder.name]:
        raise UserError(f"the checkpoint is one of another stage, {stage}: {folder.name} needs one of its own")


def as_dict(config: SimpleNamespace) -> dict:
    """Return a configuration as nested plain dicts, for YAML and checkpoints."""
    return json.loads(json.dumps(config, default=vars))


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with keys such as "optim.base_lr"."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def pick(table: dict[str, Any], name: str, key: str) -> Any:
    """Return `table[name]`, the choice that the configuration key `key` names. Raises UserError with all choices."""
    if name not in table:
        raise UserError(f"{key}={name} is not known; choose one of {', '.join(table)}")
    return table[name]


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the keys of a file and of its bases as one flat dict. Values are text; their type is that of the default."""
    if path.resolve() in above:
        raise UserError(f"{path}: 'base:' leads back to the file itself")
    try:
        config = yaml.load(path.read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # all values stay text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"no configuration can be read from {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has to hold groups of 'key: value' lines")
    bases = config.pop("base", [])
    values = {}
    for base in [bases] if isinstance(bases, str) else bases:
        values |= read_yaml(path.parent / base, (*above, path.resolve()))
    return values | flatten(config)


def _nearest_keys(key: str, keys: dict[str, Any]) -> list[str]:
    """Return the valid keys that a wrong one may stand for: those that contain it, else the most similar one."""
    near = [valid for valid in keys if valid.startswith(f"{key}.") or key in valid.split(".")[-1]]
    near.sort(key=lambda valid: valid.split(".")[-1] != key)  # exact names first
    return near or difflib.get_close_matches(key, keys, n=1, cutoff=0)


def _check_keys(values: dict[str, tuple[Any, str]], defaults: dict[str, Any]) -> None:
    """Raise UserError for an unknown key, with the nearest valid ones."""
    unknown = [key for key in values if key not in defaults]
    if not unknown:
        return
    key = unknown[0]
    others = ""
    if len(unknown) > 3:
        others = f"; {len(unknown) - 1} others are unknown too: is it another stage's?"
    near = " or ".join(map(repr, _nearest_keys(key, defaults)))
    raise UserError(f"{values[key][1]}: unknown key '{key}'; the nearest valid key is {near}{others}")


def _check_length(values: dict[str, tuple[Any, str]]) -> None:
    """Raise UserError if the command line sets epochs for a recipe in steps, or warm-up steps for one in epochs."""
    steps, where = values.get("optim.steps", ("0", "command line"))  # other schemas may lack it
    if where == "command line":
        return
    unused = ["optim.warmup_steps"]
    advice = "set optim.steps as well, or optim.warmup_epochs"
    if str(steps) != "0":
        unused = ["optim.epochs", "optim.warmup_epochs"]
        advice = "set optim.steps=0 as well, or change optim.steps instead"
    for key in unused:
        if values[key][1] == "command line":
            raise UserError(f"{key}={values[key][0]} has no effect with optim.steps={steps} of {where}: {advice}")


def _typed(text: Any) -> Any:
    """Convert the text of a default to the bool, int or float that it looks like."""
    if isinstance(text, list):
        return [_typed(item) for item in text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _convert(value: Any, where: str, key: str, example: Any) -> Any:
    """Convert a value, or its text, to the type of the default `example`. Raises UserError."""
    if isinstance(example, list):
        return _convert_list(value, where, key, example)
    kind = type(example)
    try:
        if isinstance(value, list):
            raise ValueError
        if kind is bool:
            value = yaml.SafeLoader.bool_values[str(value).lower()]
        else:
            value = kind(str(value))
    except (KeyError, ValueError):
        raise UserError(f"{where}: {key} expects {kind.__name__} such as {example!r}, not {value!r}") from None
    if kind in (int, float):
        low, high = LIMITS_OF.get(key, (0, math.inf))
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low} and finite" if high == math.inf else f"at least {low} and at most {high}"
            raise UserError(f"{where}: {key}={value} has to be {limits}")
    return value


def _convert_list(value: Any, where: str, key: str, example: list) -> list:
    """Convert a list, or its text, to items of the default's type. Only data.scales may have another number of them."""
    try:
        items = yaml.load(str(value), Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        items = None
    if not isinstance(items, list) or not items or (key != "data.scales" and len(items) != len(example)):
        raise UserError(f"{where}: {key} expects list such as {example!r}, not {value!r}")
    return [_convert(item, where, key, example[0]) for item in items]
