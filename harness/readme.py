"""Put a sweep's generated table into the README, between its two markers.

python -m harness.readme sweep=demo
"""

from __future__ import annotations

import sys

from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.models import ROOT
from harness.report import costs, footer, frame, markdown, scores
from harness.spec import expand

BEGIN, END = "<!-- table: python -m harness.readme sweep=demo -->", "<!-- end of table -->"


@refuse_politely
def main() -> int:
    sweep = expand(sys.argv[1:])
    tidy = frame(sweep)
    if (tidy["status"] != "done").any():
        raise UserError(f"sweep {sweep.name!r} is not complete. Run it first; the README shows finished tables only.")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    sizes = costs(tidy)[["experts written per layer", "distinct", "MB written", "MB distinct"]]
    table = "\n\n".join([markdown(scores(tidy)), markdown(sizes), footer(tidy)])
    readme.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
