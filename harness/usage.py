"""Do domains use different experts? How often each expert is chosen, by calibration set, and how far the sets differ.

python -m harness.usage calibration=tiny_code,tiny_sums,tiny_facts

The divergence of two sets is the Jensen-Shannon divergence of their shares of choices, in bits (0: alike, 1: no expert
in common), averaged over layers. The control shuffles the sets' sequences among the sets: what is left then is chance.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

from harness import checkpoint, gather
from harness.commandline import before_work, check_texts, refuse_politely
from harness.errors import UserError
from harness.models import Model
from harness.spec import Cell
from harness.store import Store, key, say
from harness.sweep import expand
from harness.tables import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = 16  # of a set's sequences, counted apart so that the control can shuffle them
SHUFFLES = 200


def counts(cell: Cell, store: Store) -> np.ndarray:
    """Choices of each expert in each part of the cell's calibration set, int64 [parts, layers, experts]."""
    ids = gather.tokens(cell, store)
    name = key(parts=PARTS, **cell.observed(ids)) + ".npy"
    path = store.path("usage", name)
    say("usage", cell.calibration.name, "cached" if path.exists() else f"{ids.size} tokens")

    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, _count(cell, ids))

    return np.load(store.once("usage", name, make))


def _count(cell: Cell, ids: np.ndarray) -> np.ndarray:
    from harness.calibrate import calibrate, packed_batches

    model = _loaded(cell.model, cell.calibration.dtype)
    parts = [
        calibrate(model, packed_batches(part, cell.calibration.batch_size))
        for part in np.array_split(ids, min(PARTS, len(ids)))
    ]
    return np.stack([[layer["count"] for layer in part.layers.values()] for part in parts]).astype(np.int64)


@functools.lru_cache(maxsize=1)
def _loaded(model: Model, dtype: str) -> PreTrainedModel:
    """Loaded once for all calibration sets."""
    return model.load(dtype)


def shares(counted: np.ndarray) -> np.ndarray:
    """The part of a layer's choices that fell on each expert, [layers, experts], from [parts, layers, experts]."""
    total = counted.sum(0)
    return total / total.sum(1, keepdims=True)


def divergence(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over layers of the Jensen-Shannon divergence of two usages [layers, experts], in bits."""
    return float(np.mean(np.square(jensenshannon(first, second, axis=1, base=2))))


def mean_divergence(sets: Sequence[np.ndarray]) -> float:
    """Over all pairs of sets, each [parts, layers, experts]."""
    usages = [shares(counted) for counted in sets]
    return float(np.mean([divergence(a, b) for i, a in enumerate(usages) for b in usages[i + 1 :]]))


def shuffled(sets: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Sets of the same sizes with their parts dealt out at random."""
    parts = np.concatenate(sets)[rng.permutation(sum(map(len, sets)))]
    return np.split(parts, np.cumsum([len(counted) for counted in sets])[:-1])


def table(sets: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Divergence of every two sets, in bits."""
    usages = {name: shares(counted) for name, counted in sets.items()}
    rows = {a: {b: f"{divergence(usages[a], usages[b]):.3f}" for b in usages} for a in usages}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("bits")


def conclusion(sets: Mapping[str, np.ndarray]) -> str:
    """The mean divergence against the control's, in words."""
    rng = np.random.default_rng(0)
    found = mean_divergence(list(sets.values()))
    control = [mean_divergence(shuffled(list(sets.values()), rng)) for _ in range(SHUFFLES)]
    reached = 1 + sum(value >= found for value in control)
    return (
        f"Mean over pairs: {found:.3f} bits. Sequences shuffled among the sets, {SHUFFLES} times: mean "
        f"{np.mean(control):.3f}, largest {max(control):.3f}; p = {reached / (SHUFFLES + 1):.3f}."
    )


def draw(sets: Mapping[str, np.ndarray], suffix: str, path: Path) -> None:
    """Layer x expert for every set: its share of the layer's choices, as a multiple of the even share."""
    usages = {name: shares(counted) for name, counted in sets.items()}
    layers, experts = next(iter(usages.values())).shape
    size = (max(6.0, 0.22 * experts), (0.25 * layers + 0.55) * len(usages) + 0.6)
    figure, grid = plt.subplots(len(usages), 1, figsize=size, squeeze=False, sharex=True, layout="constrained")
    highest = max(usage.max() for usage in usages.values()) * experts
    for axes, (name, usage) in zip(grid.flat, usages.items(), strict=True):
        image = axes.imshow(usage * experts, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_ylabel("layer", fontsize=8)
        axes.set_yticks(range(0, layers, max(1, layers // 4)))
    grid.flat[-1].set_xlabel("expert")
    figure.colorbar(image, ax=grid.ravel().tolist(), label="share of choices / even share", shrink=0.6)
    figure.savefig(path, format=suffix, dpi=150)
    plt.close(figure)


@refuse_politely
def main() -> int:
    """Print the divergences, and draw the usages."""
    sweep = expand(sys.argv[1:])
    cells = {(cell.model.name, cell.calibration.name): cell for cell in sweep.cells}
    if len(cells) < 2 or len({name for name, _ in cells}) > 1:
        raise UserError("Name one model and several calibration sets, as in calibration=tiny_code,tiny_sums.")
    if sweep.dry_run:
        raise UserError("dry_run=true: this command has no bill. Leave it out.")
    with before_work():
        for cell in cells.values():
            cell.model.check_compressible()
            checkpoint.check_structure(cell.model)
            cell.model.check_tokenizer()
            cell.calibration.check()
        check_texts([(cell.calibration, cell.model) for cell in cells.values()], sweep.store)
    sets = {name: counts(cell, sweep.store) for (_, name), cell in cells.items()}
    print(markdown(table(sets)), conclusion(sets), sep="\n\n")
    for suffix in ("png", "pdf"):
        name = f"usage-{sweep.cells[0].model.name}.{suffix}"
        print(sweep.store.put("figures", name, functools.partial(draw, sets, suffix)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
