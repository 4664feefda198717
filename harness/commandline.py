"""From the command line to a checked sweep: everything that cannot work is refused here, before any work.

Bad input gets one message, on standard error, that says what was asked, what that implies and what is possible, and
exit status 2. Nothing is written before every cell has passed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from harness import scoring
from harness.errors import UserError
from harness.sweep import Sweep, expand


def checked(arguments: Sequence[str]) -> Sweep:
    """The sweep these arguments ask for, every cell of it checked.

    A dry run is not checked: what cannot work is a line of its bill.
    """
    sweep = expand(arguments)
    if sweep.dry_run:
        return sweep
    sweep.check()
    waiting = [cell for cell in sweep.cells if not scoring.all_done(cell, sweep.store)]
    for serve, nbytes in {(cell.serve, cell.model.nbytes) for cell in waiting}:
        serve.check(nbytes)
    texts = {(cell.calibration, cell.model): None for cell in waiting if cell.calibrates or cell.measures_errors}
    texts |= {(cell.recovery.text, cell.model): None for cell in waiting if cell.recovery is not None}
    for text, model in texts:
        if not sweep.store.path("tokens", text.tokens_name(model)).exists():
            text.tokens(model)  # refuses too little text
    return sweep


def refuse_politely(command: Callable[[], int]) -> Callable[[], int]:
    """Give a command the project's exit statuses: 2 for what the user can mend, 130 after Ctrl-C."""

    @functools.wraps(command)
    def wrapped() -> int:
        try:
            return command()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted. What is finished is kept; the same command goes on from there.", file=sys.stderr)
            return 130

    return wrapped
