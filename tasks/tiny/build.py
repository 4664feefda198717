"""Write the test sets and the calibration text of the tiny world; running it again gives the same bytes.

    python -m tasks.tiny.build

The checkpoint is made by tasks.tiny.train.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from tasks.tiny.world import DOMAINS, code, facts, sums

DATA = Path(__file__).parent / "data"
SEED = 2026
CALIBRATION_BYTES = 250_000


def calibration(domain: str) -> list[dict[str, str]]:
    """Documents of one domain's training distribution, about CALIBRATION_BYTES in all, from a seed of their own."""
    rng = Random(f"calibration/{domain}/{SEED}")
    rows: list[dict[str, str]] = []
    size = 0
    while size < CALIBRATION_BYTES:
        rows.append({"text": DOMAINS[domain](rng)})
        size += len(rows[-1]["text"])
    return rows


def files() -> dict[str, list[dict[str, Any]]]:
    """Every data file, path below data/ -> rows."""
    rows: dict[str, list[dict[str, Any]]] = {
        "tiny_code.jsonl": code.problems(164, Random(f"code/{SEED}")),
        "tiny_sums.jsonl": list(sums.problems(300, Random(f"sums/{SEED}"))),
        "tiny_facts.jsonl": facts.problems(300, Random(f"facts/{SEED}")),
    }
    return rows | {f"calibration/{domain}.jsonl": calibration(domain) for domain in DOMAINS}


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write all files below the chosen folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    out = parser.parse_args().out
    for name, rows in files().items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(rows))
        print(f"{name}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
