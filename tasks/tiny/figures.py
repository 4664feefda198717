"""Draw the pictures of the model card: the loss curve, and which experts each domain uses.

    python -m tasks.tiny.figures

The first is a function of model/training_log.csv, the second of the model and the calibration text of its domains.
"""

from pathlib import Path

import matplotlib
import pandas as pd

from harness import usage
from harness.sweep import expand
from tasks.tiny.world import DOMAINS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

HERE = Path(__file__).parent
FIGURES = HERE / "figures"


def draw_loss(log: pd.DataFrame, path: Path) -> None:
    """Cross-entropy, learning rate and the two losses on the router against the tokens seen."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    tokens = log["tokens"] / 1e6
    top.plot(tokens, log["loss"], color="C0")
    top.set_yscale("log")
    top.yaxis.set_major_locator(FixedLocator([0.3, 0.5, 1, 2, 5]))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_locator(NullLocator())
    top.set_ylabel("cross-entropy, nats per token")
    top.grid(alpha=0.25)
    bottom.plot(tokens, log["balance"], color="C1", label="balance (1: even)")
    bottom.plot(tokens, log["spread"], color="C2", label="spread beyond 12 experts, nats")
    bottom.plot(tokens, log["rate"] / log["rate"].max(), color="0.6", linestyle="--", label="learning rate / highest")
    bottom.set_xlabel("tokens, millions")
    bottom.set_ylim(0, 2)
    bottom.grid(alpha=0.25)
    bottom.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Write both pictures."""
    FIGURES.mkdir(exist_ok=True)
    draw_loss(pd.read_csv(HERE / "model" / "training_log.csv"), FIGURES / "loss.png")
    sweep = expand([f"calibration={','.join(f'tiny_{name}' for name in DOMAINS)}"])
    sets = {cell.calibration.name: usage.counts(cell, sweep.store) for cell in sweep.cells}
    usage.draw(sets, "png", FIGURES / "usage.png")


if __name__ == "__main__":
    main()
