"""A small synthetic world in seven domains, of which three have tests. All its text is generated from a seed.

    from random import Random
    from tasks.tiny.world import DOMAINS, training_document
    print(*training_document(Random(0)))

What is held out for tests is fixed by construction in splits.py, whatever the seed.
"""

from collections.abc import Callable
from random import Random

from tasks.tiny.world import code, facts, recipes, records, stories, sums, tongue

DOMAINS: dict[str, Callable[[Random], str]] = {
    "code": code.document,
    "sums": sums.document,
    "facts": facts.document,
    "stories": stories.document,
    "records": records.document,
    "recipes": recipes.document,
    "tongue": tongue.document,
}
# Shares of documents in the training text, weighted towards what is hard to learn.
MIX = {"code": 0.27, "sums": 0.30, "facts": 0.22, "stories": 0.05, "records": 0.06, "recipes": 0.05, "tongue": 0.05}


def training_document(rng: Random) -> tuple[str, str]:
    """(domain, text) of one document of the training distribution, without the end-of-text token."""
    domain = rng.choices(list(MIX), weights=list(MIX.values()))[0]
    return domain, DOMAINS[domain](rng)
