"""What may stand on a command line: settings of the project's own config, as Hydra's grammar reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import islice

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString, ValueType
from hydra.errors import HydraException

from harness.build import CONF, one_message
from harness.errors import UserError

MOST_CELLS = 10_000  # composing each takes a tenth of a second
NODE = re.compile(r"\$\{[\w.]+\}")  # ${seed}: another setting; all else between ${ and } runs something
GROUPS = frozenset({"hydra/launcher"} | {path.name for path in CONF.iterdir() if path.is_dir()})
LONGEST = 200  # characters of a setting's or an option's name; names of files end soon after
EXAMPLE = "Give settings as name=value, for example method=reap ratio=0.25."


def parsed(arguments: Sequence[str]) -> list[Override]:
    """The settings, read. Raises UserError for what is none, or has no meaning here."""
    for argument in arguments:
        _check_characters(argument)
        if argument.startswith("-"):
            raise UserError(f"Unknown option {argument}. {EXAMPLE}")
        if "${" in NODE.sub("", argument):
            raise UserError(
                f"{argument}: a value may name another setting, as ${{seed}}, and nothing else between ${{ and }}: "
                "environment variables and functions are not read, for what they hold would be kept in records."
            )
    overrides = [_parsed(argument) for argument in arguments]
    for override in overrides:
        _check_key(override)
        _check_listed(override)
        _check_option(override)
    _check_grid(overrides)
    return overrides


def chooses_a_file(override: Override) -> bool:
    """Whether it names a file of conf/."""
    return override.key_or_group in GROUPS and not override.package


def sets_a_value(override: Override) -> bool:
    """Whether it does no more than to give a setting that is there another value."""
    name = override.key_or_group
    plain = override.type is OverrideType.CHANGE and not override.package and "/" not in name
    is_ours = plain and not name.startswith("hydra.")  # Hydra's own part is not in what it composes for a cell
    return is_ours and not chooses_a_file(override) and not isinstance(override.value(), dict)


def _parsed(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError, RecursionError) as error:
        raise UserError(f"{argument} cannot be read as a setting: {one_message(error)} {EXAMPLE}") from error


def _check_characters(argument: str) -> None:
    if not argument.isprintable():
        raise UserError(f"{argument!r} holds characters that cannot be printed, such as line breaks. Leave them out.")


def _check_key(override: Override) -> None:
    if override.is_delete():
        raise UserError(
            f"{override.input_line}: no setting can be taken away. Leave it out, and the default of "
            "conf/config.yaml holds."
        )
    if not override.key_or_group:
        raise UserError(f"{override.input_line}: there is no name before the equals sign. {EXAMPLE}")
    if len(override.key_or_group) > LONGEST:
        raise UserError(f"There is no setting {override.key_or_group}. {EXAMPLE}")
    first = re.split(r"[./]", override.key_or_group)
    if first[0] == "hydra" and first[1:2] != ["launcher"]:
        raise UserError(
            f"{override.input_line}: of Hydra's own settings only its launcher's mean something here. Results go where "
            "store=<folder> says, and a grid is made of values with commas."
        )


def _check_option(override: Override) -> None:
    """A group is set to one of its files' names."""
    if not chooses_a_file(override):
        return
    values = list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]
    texts = [str(value.text if isinstance(value, QuotedString) else value) for value in values]
    if None in values or any("/" in text or len(text) > LONGEST for text in texts):
        possible = ", ".join(sorted(file.stem for file in (CONF / override.key_or_group).glob("*.yaml")))
        raise UserError(
            f"{override.input_line} names no file of conf/{override.key_or_group}/. There are {possible}. "
            "To have none, where that is the default, leave the setting out."
        )


def _check_listed(override: Override) -> None:
    """What is swept over is a list of values or a range, from which values come."""
    if not override.is_sweep_override():
        return
    listed = override.value_type in (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP)
    if not listed or getattr(override.value(), "shuffle", False):
        raise UserError(
            f"{override.input_line}: a grid is made of values that are named, in their order: ratio=0.25,0.5 or "
            "seed=range(0,3)."
        )
    try:
        values = sum(1 for _ in islice(override.sweep_iterator(), 1))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}.") from error
    if not values:
        raise UserError(f"{override.input_line} names no value, so there is no cell to run.")


def _check_grid(overrides: Sequence[Override]) -> None:
    """Raise UserError for a grid too large to compose. It is not written out to be counted."""
    swept = [override for override in overrides if override.is_sweep_override()]
    counts = [sum(1 for _ in islice(override.sweep_iterator(), MOST_CELLS + 1)) for override in swept]
    if math.prod(counts) > MOST_CELLS:
        raise UserError(
            f"{' '.join(override.input_line or '' for override in swept)} asks for "
            f"{' x '.join(f'{count:,}' for count in counts)} cells or more, and at most {MOST_CELLS:,} are composed at "
            "once. Ask for parts of the grid; they share one store."
        )
