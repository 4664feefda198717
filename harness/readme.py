"""Put a sweep's generated table into a Markdown file, between its two markers.

python -m harness.readme README.md sweep=demo

The first marker holds this command, so that a reader knows what made the table: ``<!-- table: <command> -->``; the
second is ``<!-- end of table -->``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness import items, separation, tables
from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.footer import footer
from harness.models import ROOT
from harness.report import frame
from harness.sweep import expand

END = "<!-- end of table -->"
SIZES = ["experts written per layer", "distinct", "MB written", "MB distinct"]


def begin(arguments: Sequence[str]) -> str:
    """The marker of the table that this command makes."""
    return f"<!-- table: python -m harness.readme {' '.join(arguments)} -->"


def between_markers(text: str, arguments: Sequence[str]) -> tuple[str, str, str]:
    """What stands before the table, the table itself, and what stands after it. Raises UserError without markers."""
    head, mark, rest = text.partition(begin(arguments))
    table, end, tail = rest.partition(END)
    if not mark or not end:
        raise UserError(f"{arguments[0]} has no place for this table: the line {begin(arguments)}, then {END}.")
    return head, table, tail


@refuse_politely
def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or not (ROOT / arguments[0]).is_file():
        raise UserError("Name a Markdown file of the project and a sweep: README.md sweep=demo.")
    file = ROOT / arguments[0]
    head, _, tail = between_markers(file.read_text(), arguments)
    sweep = expand(arguments[1:])
    tidy = frame(sweep)
    if (tidy["status"] != "done").any():
        raise UserError(f"sweep {sweep.name!r} is not complete. Run it first; documents show finished tables only.")
    made = tables.all_of(tidy, separation.best(tidy, items.values(items.read(sweep))))
    if "costs" in made:
        made["costs"] = made["costs"][SIZES].join(made.pop("serving")["MB in memory"])
        made.pop("errors", None)  # by layer: on the page
    table = f"{tables.text(made)}\n\n{footer(tidy)}"
    file.write_text(f"{head}{begin(arguments)}\n{table}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
