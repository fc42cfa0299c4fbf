"""Files of features: written whole, and known again."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from support.config import UserError


def is_done(file: Path, settings: dict[str, Any]) -> bool:
    """Whether the file of features is there. UserError if it was made with other settings."""
    if not file.exists():
        return False
    try:
        with np.load(file) as stored:
            then = {key: str(stored[key]) for key in settings}
    except Exception as error:  # many types for one mistake
        raise UserError(f"{file} holds no features ({type(error).__name__}): delete it or give another --out") from None
    if differ := [f"{key}={then[key]}, not {now}" for key, now in settings.items() if then[key] != str(now)]:
        raise UserError(f"{file} was made with {'; '.join(differ)}: delete it or give another --out")
    return True


def write_features(file: Path, batches: Iterable[tuple[np.ndarray, list]], facts: dict[str, Any]) -> None:
    """Write features (B, ...) and the start and end of their windows, next to the file and renamed: it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part, seconds = file.with_suffix(".part"), []
    with tempfile.TemporaryFile(dir=file.parent) as rows:  # all tokens of a long video may not fit in memory
        for features, times in batches:
            rows.write(features)
            seconds += times
        rows.flush()
        features = np.memmap(rows, np.float32, "r", shape=(len(seconds), *features.shape[1:]))
        start, end = np.array(seconds).T
        with open(part, "wb") as opened:
            np.savez(opened, features=features, start=start, end=end, **facts)
    os.replace(part, file)
