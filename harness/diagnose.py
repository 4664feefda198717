"""What HodgeCover's diagnostics say of a model's layers, beside the controls without which they say little.

python -m harness.diagnose method=hodgecover ratio=0.5

The cell's method must read merge barriers (hodgecover, barrier_merge). Nothing is served or scored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from harness import gather, stages
from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.plan import Plan
from harness.stats import Stats
from harness.sweep import expand
from harness.tables import markdown
from methods.hodge import diagnose, retained_mass
from methods.hodgecover import by_saliency
from methods.reap import REAP


def layers(stats: Stats, plan: Plan, mode: str) -> Iterator[dict[str, Any]]:
    """One row for each layer: shares of the barriers' energy, their controls, and the plan beside REAP's."""
    for index, layer in stats.layers.items():
        barriers, made = by_saliency(layer, mode), plan.layers[index]
        kept = set(made.kept_rows)
        other = set(REAP().plan_layer(layer, len(kept)).kept_rows)
        places = [place for place, expert in enumerate(barriers.order) if expert in kept]
        found = diagnose(barriers)
        parts = barriers.space.split(barriers.edge_barrier)
        yield {
            "layer": index,
            "harmonic": f"{found['harmonic']:.3f}",
            "shuffles above": f"{100 * found['shuffled_above']:.0f} %",
            "relabelled": f"{found['relabelled_low']:.3f} to {found['relabelled_high']:.3f}",
            "additive R²": f"{found['additive']:.3f}",
            "curl": f"{found['curl']:.4f}",
            "hard triangles": f"{found['hard_triangles']:.3f}",
            "Betti": f"{found['betti']:.0f}",
            "harmonic retained": f"{retained_mass(parts.harmonic, barriers.space.edges, places):.3f}",
            "Jaccard with REAP": f"{len(kept & other) / len(kept | other):.2f}",
        }


@refuse_politely
def main() -> int:
    sweep = expand(sys.argv[1:])
    if len(sweep.cells) != 1:
        raise UserError(f"This command takes one plan, and {len(sweep.cells)} cells are asked for.")
    (cell,) = sweep.cells
    mode = getattr(cell.method, "mode", None)
    if mode is None or not any(name.endswith(f".{mode}") for name in cell.needs):
        raise UserError(f"{cell.label} reads no merge barriers. Choose method=hodgecover or barrier_merge.")
    cell.check()
    given = gather.statistics(cell, sweep.store)
    rows: list[Mapping[str, Any]] = list(layers(given, stages.plan(cell, given, sweep.store), mode))
    print(markdown(pd.DataFrame(rows).set_index("layer")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
