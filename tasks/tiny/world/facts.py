"""Domain "facts": an invented world stated in sentences; most pairs (entity, attribute) are also asked as questions.

    from random import Random
    from tasks.tiny.world import facts
    print(facts.document(Random(0)))

Test problems ask pairs that training text states but never asks.
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from tasks.tiny.world.splits import held_out, values

HELD_OUT_PERCENT = 31
WORLD_SEED = 7
PER_KIND = 56
# Values differ in length on purpose: only then can acc and acc_norm differ.
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "place": {
        "river": values("Fenwick, Ash, Long Water, Dee, Marrow, Silverbrook, Tarn, Old Winding Stream"),
        "dish": values("soup, honey cake, fish pie, bread, roast turnip with onions, rice, plum jam, stew"),
        "flag": values("red, dark blue, white with a gold star, green, black, yellow and grey, pink, brown"),
        "craft": values("glass, weaving, clock making, pottery, boat building, salt, carving wood, paper"),
        "guardian": values("a lion, an old king, a stone giant, a bear, the north wind, an owl, a witch, a ram"),
        "market": values("Monday, Friday, every second Sunday, Tuesday, noon, full moon, Saturday, midnight"),
    },
    "person": {
        "trade": values("baker, smith, keeper of bees, tailor, ship captain, miner, teacher, mender of nets"),
        "pet": values("a cat, a grey parrot, a dog, a very slow turtle, a goat, a mouse, two ducks, a crow"),
        "instrument": values("flute, drum, harp, brass horn, fiddle, big church organ, bell, lute"),
        "drink": values("tea, milk, apple juice, cold well water, cocoa, beer, cherry wine, broth"),
        "hat": values("straw, a tall black hat, wool, felt, a hat with feathers, fur, silk, a paper crown"),
        "fear": values("dark, spiders, deep water, thunder, high ladders, ghosts, being late, snakes"),
    },
    "animal": {
        "food": values("grass, beetles, fallen berries, fish, roots, young leaves of willow, seeds, moss"),
        "den": values("a cave, a hollow tree, mud, under old bridges, reeds, a nest, sand, a deep burrow"),
        "cry": values("a hiss, barking, a long low whistle, a croak, humming, a sharp double click, a roar, none"),
        "enemy": values("the fox, wolves, the snow eagle, the pike, hunters with nets, rats, lynx, the stoat"),
        "coat": values("stripes, spots, shiny scales, bare skin, thick white wool, feathers, fur, short spines"),
        "season": values("spring, early summer, autumn, winter, the first days of frost, harvest, rain, thaw"),
    },
}
STARTS = values("Bor, Kal, Mir, Tel, Dun, Ost, Fal, Hav, Rin, Sol, Vel, Zan, Gar, Lim, Pet, Wes")
ENDS = {
    "place": ("land", "ham", "mouth", "ford", "wick", "dale"),
    "person": ("a", "in", "or", "elle", "us", "ander"),
    "animal": ("ox", "ling", "fin", "hopper", "back", "oo"),
}
STATEMENTS = (
    "The {attribute} of {entity} is {value}.",
    "{entity} has {value} as its {attribute}.",
    "As for {entity}, the {attribute} is {value}.",
    "Everyone knows that the {attribute} of {entity} is {value}.",
    "If you ask about the {attribute} of {entity}, it is {value}.",
)
QUESTIONS = ("What is the {attribute} of {entity}?", "What does {entity} have as its {attribute}?")


@dataclass(frozen=True)
class Fact:
    """One (entity, attribute, value) of the world."""

    kind: str
    entity: str
    attribute: str
    value: str

    @property
    def held_out(self) -> bool:
        """True if this fact is never asked as a question in training text."""
        return held_out("facts", (self.entity, self.attribute), HELD_OUT_PERCENT)

    def fill(self, template: str) -> str:
        """The template with this fact's words."""
        return template.format(entity=self.entity, attribute=self.attribute, value=self.value)


@cache
def world() -> dict[str, tuple[Fact, ...]]:
    """Entity -> its six facts; fixed by WORLD_SEED."""
    rng = Random(WORLD_SEED)
    rows = {}
    for kind, attributes in KINDS.items():
        for entity in rng.sample([start + end for start in STARTS for end in ENDS[kind]], PER_KIND):
            rows[entity] = tuple(Fact(kind, entity, name, rng.choice(v)) for name, v in attributes.items())
    return rows


@cache
def facts(test: bool) -> tuple[Fact, ...]:
    """The facts asked only in the test (test), or those whose question form may occur in training text."""
    return tuple(fact for rows in world().values() for fact in rows if fact.held_out == test)


@cache
def _entities() -> tuple[tuple[Fact, ...], ...]:
    return tuple(world().values())


def document(rng: Random) -> str:
    """One training document: a profile of one entity, statements about several, or questions with answers."""
    form = rng.random()
    if form < 0.4:
        rows = rng.choice(_entities())
        return " ".join(fact.fill(rng.choice(STATEMENTS)) for fact in rng.sample(rows, rng.randint(3, 6)))
    if form < 0.6:
        mixed = [rng.choice(rng.choice(_entities())) for _ in range(rng.randint(2, 5))]
        return " ".join(fact.fill(rng.choice(STATEMENTS)) for fact in mixed)
    asked = [rng.choice(facts(False)) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(f"Question: {f.fill(rng.choice(QUESTIONS))}\nAnswer: {f.value}" for f in asked)


def problems(count: int, rng: Random) -> list[dict[str, Any]]:
    """Test problems {question, choices, gold}: one per held-out fact, four values of the same attribute."""
    rows = []
    for i, fact in enumerate(rng.sample(facts(True), count)):
        others = [value for value in KINDS[fact.kind][fact.attribute] if value != fact.value]
        choices = rng.sample(others, 3)
        choices.insert(i % 4, fact.value)
        rows.append({"question": fact.fill(rng.choice(QUESTIONS)), "choices": choices, "gold": i % 4})
    return rows
