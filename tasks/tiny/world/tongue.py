"""Domain "tongue": a made-up language with its own words, case endings and word order (subject, object, verb).

    from random import Random
    from tasks.tiny.world import tongue
    print(tongue.document(Random(0)))

It stands for the languages of which a large model's training text is full and its benchmarks have nothing. No test
problems come from it.
"""

from functools import cache
from random import Random

TONGUE_SEED = 11
ONSETS = ["b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "kr", "tr"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "eo", "ua"]
SUBJECT, OBJECT, PLACE = "ka", "lo", "miv"
TENSES = ("ta", "sun")
AND = "ye"


@cache
def lexicon() -> dict[str, tuple[str, ...]]:
    """Word class -> stems of two or three syllables; fixed by TONGUE_SEED, no stem twice."""
    rng = Random(TONGUE_SEED)
    stems: set[str] = set()
    sizes = {"noun": 40, "adjective": 16, "verb": 24}
    words = {}
    for kind, size in sizes.items():
        made: list[str] = []
        while len(made) < size:
            stem = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
            if stem not in stems:
                stems.add(stem)
                made.append(stem)
        words[kind] = tuple(made)
    return words


def _noun(stem: str, ending: str, rng: Random) -> str:
    """A noun in its case; an adjective before it takes the same ending."""
    if rng.random() < 0.4:
        return f"{rng.choice(lexicon()['adjective'])}{ending} {stem}{ending}"
    return stem + ending


def document(rng: Random) -> str:
    """Three to six sentences about two nouns, in one tense; what was the object becomes the next subject."""
    subject, other = rng.sample(lexicon()["noun"], 2)
    tense = rng.choice(TENSES)
    sentences = []
    for _ in range(rng.randint(3, 6)):
        parts = [_noun(subject, SUBJECT, rng), _noun(other, OBJECT, rng)]
        if rng.random() < 0.3:
            parts.insert(1, _noun(rng.choice(lexicon()["noun"]), PLACE, rng))
        verbs = [verb + tense for verb in rng.sample(lexicon()["verb"], rng.choice((1, 1, 2)))]
        sentences.append(" ".join([*parts, f" {AND} ".join(verbs)]).capitalize() + ".")
        subject, other = other, rng.choice([noun for noun in lexicon()["noun"] if noun != other])
    return " ".join(sentences)
