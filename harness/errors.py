"""The two ways a run can end early: the user can mend it, or a stage broke."""


class UserError(Exception):
    """What was asked cannot be done; the message says what that implies and what is possible. Exit status 2."""


class StageError(Exception):
    """A stage failed at run time (a server died, an answer was not finite). Becomes a failed record, never a number."""
