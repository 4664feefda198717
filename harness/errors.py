"""The two ways a run can end early: the user can mend it, or a stage broke."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What was asked cannot be done; the message says what that implies and what is possible. Exit status 2."""


class StageError(Exception):
    """A stage failed at run time (a server died, an answer was not finite). Becomes a failed record, never a number."""


class DiskFullError(StageError):
    """What a stage makes does not fit on the disk."""


@contextmanager
def during(stage: str) -> Iterator[None]:
    """Whatever breaks in here, broke in this stage; of stages within stages, the innermost is the one that is named."""
    try:
        yield
    except Exception as problem:
        vars(problem).setdefault("stage", stage)
        raise


def stage_of(problem: Exception) -> str | None:
    """The stage in which it broke, where that was said (`during`)."""
    return vars(problem).get("stage")


def keep_log(problem: Exception, tail: str) -> None:
    """Note the last lines of a server's log with what broke, unless there are some already."""
    vars(problem).setdefault("log_tail", tail)


def log_tail_of(problem: Exception) -> str | None:
    """The last lines of the server's log, where a server was involved (`keep_log`)."""
    return vars(problem).get("log_tail")


def in_one_line(error: str | None) -> str:
    """Of a traceback what was raised, of a message what it begins with."""
    lines = (error or "").strip().splitlines() or ["nothing is known"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
