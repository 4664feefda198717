"""From the command line to a checked sweep: everything that cannot work is refused here, before any work.

Bad input gets one message, on standard error, that says what was asked, what that implies and what is possible, and
exit status 2. Nothing is written before every cell has passed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from harness import gather, scoring
from harness.data import Calibration
from harness.errors import StageError, UserError
from harness.loading import check_memory
from harness.models import Model
from harness.room import MaxMemory, parked
from harness.spec import Cell
from harness.store import Store
from harness.sweep import Sweep, expand

LONGEST_WORD, LONGEST_MESSAGE = 300, 2000  # characters of a message that are shown


def checked(arguments: Sequence[str], servers: int = 1) -> Sweep:
    """The sweep these arguments ask for, every cell of it checked.

    A dry run is not checked: what cannot work is a line of its bill. servers: how many run beside each other here; 0
    where they may run on other machines, so that nothing follows from what this one has.
    """
    sweep = expand(arguments)
    if sweep.dry_run:
        return sweep
    with before_work():
        sweep.check()
        waiting = [cell for cell in sweep.cells if not scoring.all_done(cell, sweep.store)]
        if servers:
            check_servers(waiting, servers)
            check_whole_models(waiting)
        if servers == 1:  # of several, each looks for itself: to look at a GPU takes some of it
            check_room(waiting, sweep.store)
        check_texts(texts_of(waiting), sweep.store)
    return sweep


def check_servers(cells: Iterable[Cell], servers: int = 1) -> None:
    """Raise UserError for a server that cannot run on this machine, or not so many with weights of this size."""
    for serve, nbytes in {(cell.serve, cell.model.nbytes) for cell in cells}:
        serve.check(nbytes, servers)


def check_whole_models(cells: Iterable[Cell]) -> None:
    """Raise UserError for a plan that needs the whole of a model that this machine's memory does not hold."""
    for model, dtype, label in {(c.model, c.calibration.dtype, c.label) for c in cells if c.loads_the_model}:
        try:
            check_memory(model, dtype)
        except StageError as error:
            raise UserError(f"{label}: {error}") from error


def check_room(cells: Iterable[Cell], store: Store) -> None:
    """Raise UserError for a max_memory that holds not even a layer of a model that is to be calibrated."""
    limited = (cell for cell in cells if cell.calibrates and cell.max_memory != MaxMemory())
    asked = [cell for cell in limited if not gather.is_made(cell, store)]
    passes = {(c.model, c.calibration.dtype, c.calibration.batch_tokens, c.max_memory) for c in asked}
    for model, dtype, tokens, allowed in passes:
        try:
            parked(model, dtype, tokens, allowed)
        except StageError as error:
            raise UserError(str(error)) from error


def texts_of(cells: Sequence[Cell]) -> list[tuple[Calibration, Model]]:
    """The texts that the cells read, each once, and whose tokenizer splits them."""
    texts = {(cell.calibration, cell.model): None for cell in cells if cell.calibrates or cell.measures_errors}
    texts |= {(cell.recovery.text, cell.model): None for cell in cells if cell.recovery is not None}
    return list(texts)


def check_texts(texts: Iterable[tuple[Calibration, Model]], store: Store) -> None:
    """Raise UserError for a text that cannot be read or is too short."""
    for text, model in texts:
        if not store.path("tokens", text.tokens_name(model)).exists():
            text.tokens(model)


@contextmanager
def before_work() -> Iterator[None]:
    """Where nothing has been done yet: what the system refuses there (a name too long, a file that may not be read) is
    wrong with what was asked.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}.") from error


def readable(message: str) -> str:
    """A message in one line of a length that can be read: what was typed may be of any length and hold anything."""
    words = "".join(character if character.isprintable() else " " for character in message).split()
    return _shortened(" ".join(_shortened(word, LONGEST_WORD) for word in words), LONGEST_MESSAGE)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    third = longest // 3
    return f"{text[: longest - third]}[… {len(text):,} characters …]{text[-third:]}"


def refuse_politely(command: Callable[[], int]) -> Callable[[], int]:
    """Give a command the project's exit statuses: 2 for what the user can mend, 1 for what broke, 130 after Ctrl-C."""

    @functools.wraps(command)
    def wrapped() -> int:
        try:
            return command()
        except UserError as error:
            print(f"error: {readable(str(error))}", file=sys.stderr)
            return 2
        except StageError as error:  # outside any cell: the disk is full, or the workers are gone
            print(f"error: {readable(str(error))}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted. What is finished is kept; the same command goes on from there.", file=sys.stderr)
            return 130

    return wrapped
