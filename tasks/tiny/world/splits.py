"""Which combinations are held out: decided by a hash, so no list has to be kept and no seed can change it.

    held_out("code", ("even", "square", "sum"), percent=28)

Also the one-line notation for word lists that all domains use.
"""

from zlib import crc32


def held_out(domain: str, combination: tuple[str, ...], percent: int) -> bool:
    """True for about `percent` % of the combinations of a domain: they never occur in training text."""
    return crc32(f"{domain}:{'/'.join(combination)}".encode()) % 100 < percent


def values(text: str) -> tuple[str, ...]:
    """The comma-separated entries of a word list."""
    return tuple(text.split(", "))
