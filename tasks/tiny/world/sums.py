"""Domain "sums": word problems with worked steps and the answer after `####`.

    from random import Random
    from tasks.tiny.world import sums
    print(sums.document(Random(0)))

Test problems come from operation sequences that never occur in training text.
"""

from functools import cache
from itertools import product
from random import Random

from tasks.tiny.world.splits import held_out, values

HELD_OUT_PERCENT = 28
LIMIT = 99
STARTS = ("has", "boxes", "colours")
SENTENCES = {
    "find": ("{he} finds {k} more.", "+"),
    "buy": ("{he} buys {k} more.", "+"),
    "get": ("{other} gives {him} {k} more.", "+"),
    "give": ("{he} gives {k} to {other}.", "-"),
    "lose": ("{he} loses {k}.", "-"),
    "sell": ("{he} sells {k}.", "-"),
    "double": ("The number then doubles.", "* 2"),
    "halve": ("{he} gives half of them away.", "/ 2"),
}
QUESTIONS = ("How many {things} does {name} have now?", "How many {things} are there now?")
BOYS = values("Tom, Ben, Max, Sam, Leo, Jack, Paul, Adam, Finn, Hugo")
GIRLS = values("Ana, Eva, Mia, Lucy, Nora, Ida, Rosa, Jane, Clara, Emma")
THINGS = values("apples, books, coins, shells, cards, stones, pens, eggs, cakes, stamps, nuts, beads")
BOXES = ("boxes", "bags", "baskets", "tins")
COLOURS = ("red", "blue", "green", "white", "black")
Combination = tuple[str, ...]


def is_held_out(combination: Combination) -> bool:
    """Whether this (start, operation, ...) sequence is reserved for test problems; single operations never are."""
    return len(combination) > 2 and held_out("sums", combination, HELD_OUT_PERCENT)


@cache
def combinations(operations: int, test: bool) -> tuple[Combination, ...]:
    """All (start, operation, ...) sequences with that many operations that are held out (test) or used in training."""
    rows = product(STARTS, *[tuple(SENTENCES)] * operations)
    return tuple(row for row in rows if is_held_out(row) == test)


def _start(kind: str, words: dict[str, str], rng: Random) -> tuple[str, list[str], int]:
    """The first sentence, the worked steps it needs and the number it leads to."""
    name, things = words["name"], words["things"]
    if kind == "has":
        a = rng.randint(2, 40)
        return f"{name} has {a} {things}.", [], a
    if kind == "boxes":
        a, b = rng.randint(2, 6), rng.randint(2, 9)
        sentence = f"{name} has {a} {rng.choice(BOXES)} with {b} {things} in each."
        return sentence, [f"{a} * {b} = {a * b}."], a * b
    a, b = rng.randint(2, 20), rng.randint(2, 9)
    one, two = rng.sample(COLOURS, 2)
    return f"{name} has {a} {one} {things} and {b} {two} {things}.", [f"{a} + {b} = {a + b}."], a + b


def _apply(operation: str, value: int, rng: Random) -> tuple[int, str, int] | None:
    """(constant, worked step, new value), or None where the operation does not fit the value."""
    sign = SENTENCES[operation][1]
    k = rng.randint(2, 9)
    if sign == "+":
        new, text = value + k, f"{value} + {k}"
    elif sign == "-":
        new, text = value - k, f"{value} - {k}"
    elif sign == "* 2":
        new, text = value * 2, f"{value} * 2"
    else:
        new, text = value // 2, f"{value} / 2"
        if value % 2:
            return None
    return (k, f"{text} = {new}.", new) if 0 <= new <= LIMIT else None


def _attempt(combination: Combination, rng: Random) -> tuple[str, str] | None:
    boy = rng.random() < 0.5
    name, other = rng.sample(BOYS if boy else GIRLS, 1)[0], rng.choice(GIRLS if boy else BOYS)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    words |= {"he": "He", "him": "him"} if boy else {"he": "She", "him": "her"}
    sentence, steps, value = _start(combination[0], words, rng)
    sentences = [sentence]
    for operation in combination[1:]:
        done = _apply(operation, value, rng)
        if done is None:
            return None
        k, step, value = done
        sentences.append(SENTENCES[operation][0].format(k=k, **words))
        steps.append(step)
    question = " ".join([*sentences, rng.choice(QUESTIONS).format(**words)])
    return question, " ".join([*steps, f"#### {value}"])


def render(combination: Combination, rng: Random) -> tuple[str, str]:
    """(question, worked answer) of a combination, drawn again until every number fits 0..99."""
    while (done := _attempt(combination, rng)) is None:
        pass
    return done


def document(rng: Random) -> str:
    """One training document: one to four operations in a sequence that is not held out."""
    operations = rng.choice((1, 2, 2, 3, 3, 4))
    question, answer = render(rng.choice(combinations(operations, False)), rng)
    return f"Question: {question}\nAnswer: {answer}"


def problems(count: int, rng: Random) -> list[dict[str, str]]:
    """Test problems {question, answer}: as many with two as with three and with four operations; all held out."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        operations = 2 + len(rows) % 3
        question, answer = render(rng.choice(combinations(operations, True)), rng)
        rows[question] = answer
    return [{"question": question, "answer": answer} for question, answer in rows.items()]
