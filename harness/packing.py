"""A calibration text as the token ids that a model reads, kept in the store."""

from __future__ import annotations

import numpy as np

from harness.data import Calibration
from harness.models import Model
from harness.store import Store


def packed(text: Calibration, model: Model, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text, int64: [sequences, length] to learn from and [held_out, length] that nothing learns from."""
    from safetensors.numpy import load_file, save_file

    name = text.tokens_name(model)
    nbytes = 8 * (text.sequences + text.held_out) * text.length
    path = store.once("tokens", name, lambda path: save_file({"tokens": text.tokens(model)}, path), nbytes)
    ids = load_file(path)["tokens"]
    return ids[: text.sequences], ids[text.sequences :]
