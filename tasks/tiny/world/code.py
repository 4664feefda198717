"""Domain "code": a Python function from its signature and docstring, as a composition of two to four steps.

    from random import Random
    from tasks.tiny.world import code
    print(code.document(Random(0)))

Test problems come from step sequences that never occur in training text.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from random import Random
from typing import Any

from tasks.tiny.world.splits import held_out

HELD_OUT_PERCENT = 28
MIN_OUTPUTS = 4


@dataclass(frozen=True)
class Step:
    """One step: its tag in function names, its line of Python and the clauses that describe it ({k} is a constant)."""

    tag: str
    line: str
    clauses: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """Functions over one argument. `slots` lists the steps allowed at each place, None where a place may stay empty."""

    name: str
    argument: str
    annotation: str
    slots: tuple[tuple[Step | None, ...], ...]
    returns: dict[str, str]


def _keep(tag: str, condition: str, *clauses: str, over: str = "numbers") -> Step:
    return Step(tag, f"{over} = [x for x in {over} if {condition}]", clauses)


def _each(tag: str, expression: str, *clauses: str, over: str = "numbers") -> Step:
    return Step(tag, f"{over} = [{expression} for x in {over}]", clauses)


FILTERS = (
    _keep("even", "x % 2 == 0", "keep the even numbers", "take only the even numbers"),
    _keep("odd", "x % 2 == 1", "keep the odd numbers", "take only the odd numbers"),
    _keep("positive", "x > 0", "keep the positive numbers", "take only the numbers above zero"),
    _keep("negative", "x < 0", "keep the negative numbers", "take only the numbers below zero"),
    _keep("above", "x > {k}", "keep the numbers greater than {k}", "take only the numbers above {k}"),
    _keep("below", "x < {k}", "keep the numbers less than {k}", "take only the numbers below {k}"),
)
MAPS = (
    _each("square", "x * x", "square each number", "replace each number by its square"),
    _each("negate", "-x", "negate each number", "flip the sign of each number"),
    _each("plus", "x + {k}", "add {k} to each number", "raise each number by {k}"),
    _each("minus", "x - {k}", "subtract {k} from each number", "lower each number by {k}"),
    _each("times", "x * {k}", "multiply each number by {k}", "take each number {k} times"),
    _each("absolute", "abs(x)", "drop the sign of each number", "take the absolute value of each number"),
)
ORDERS = (
    Step("distinct", "numbers = sorted(set(numbers))", ("drop repeated numbers and sort", "sort the distinct numbers")),
    Step("first", "numbers = numbers[:{k}]", ("keep the first {k}", "cut the list after {k}")),
    Step("tail", "numbers = numbers[{k}:]", ("skip the first {k}", "leave out the first {k}")),
    Step("reversed", "numbers = numbers[::-1]", ("reverse the list", "turn the list around")),
)
FINISHES = (
    Step("sum", "return sum(numbers)", ("return the sum", "return the total")),
    Step("count", "return len(numbers)", ("return how many there are", "return the count")),
    Step(
        "largest",
        "return max(numbers, default=0)",
        ("return the largest or zero", "return the maximum or zero"),
    ),
    Step(
        "smallest",
        "return min(numbers, default=0)",
        ("return the smallest or zero", "return the minimum or zero"),
    ),
    Step("sorted", "return sorted(numbers)", ("return them in order", "return them sorted")),
    Step("list", "return numbers", ("return the list", "return the result")),
)
ARITHMETIC = (
    Step("add", "n = n + {k}", ("add {k}", "increase it by {k}")),
    Step("subtract", "n = n - {k}", ("subtract {k}", "decrease it by {k}")),
    Step("multiply", "n = n * {k}", ("multiply by {k}", "take it {k} times")),
    Step("divide", "n = n // {k}", ("divide by {k} rounding down", "take the whole quotient by {k}")),
    Step("remainder", "n = n % {k}", ("take the remainder by {k}", "reduce it modulo {k}")),
    Step("square", "n = n * n", ("square it", "multiply it by itself")),
    Step("negate", "n = -n", ("negate it", "flip its sign")),
    Step("absolute", "n = abs(n)", ("drop its sign", "take the absolute value")),
)
EDITS = (
    Step("upper", "text = text.upper()", ("make it upper case", "turn it into capital letters")),
    Step("lower", "text = text.lower()", ("make it lower case", "turn it into small letters")),
    Step("reverse", "text = text[::-1]", ("reverse it", "turn it around")),
    Step("strip", "text = text.strip()", ("strip the spaces around it", "remove the outer spaces")),
    Step("head", "text = text[:{k}]", ("keep the first {k} characters", "cut it after {k} characters")),
    Step("skip", "text = text[{k}:]", ("skip the first {k} characters", "leave out the first {k} characters")),
    Step("repeat", "text = text * {k}", ("repeat it {k} times", "write it {k} times")),
)
TEXT_FINISHES = (
    Step("text", "return text", ("return the text", "return the result")),
    Step("length", "return len(text)", ("return its length", "return how long it is")),
    Step("words", "return text.split()", ("return its words", "return the list of words")),
)
_keep_word, _each_word = partial(_keep, over="words"), partial(_each, over="words")
WORD_FILTERS = (
    _keep_word("long", "len(x) > {k}", "keep the words of more than {k} letters", "take only words above {k} letters"),
    _keep_word("short", "len(x) < {k}", "keep the words of less than {k} letters", "take only words below {k} letters"),
    _keep_word("with_a", "'a' in x", "keep the words with an a", "take only words that contain a"),
    _keep_word("without_e", "'e' not in x", "keep the words without an e", "take only words that lack e"),
)
WORD_MAPS = (
    _each_word("capital", "x.upper()", "make each word upper case", "turn each word into capital letters"),
    _each_word("mirror", "x[::-1]", "reverse each word", "turn each word around"),
    _each_word("start", "x[:{k}]", "cut each word after {k} letters", "keep {k} letters of each word"),
    _each_word("doubled", "x * 2", "double each word", "write each word twice"),
    _each_word("starred", "x + '*'", "add a star to each word", "mark each word with a star"),
)
WORD_FINISHES = (
    Step("joined", "return ' '.join(words)", ("join them with spaces", "return them as one text")),
    Step("letters", "return sum(len(x) for x in words)", ("return the number of letters", "count all letters")),
    Step("longest", "return max(words, key=len, default='')", ("return the longest word", "find the longest")),
    Step("alphabetic", "return sorted(words)", ("return them in order", "return them sorted")),
)
RETURN_N = Step("", "return n", ("return the number", "return the result"))

NUMBERS, INTEGER, TEXT, WORDS = FAMILIES = (
    Family(
        "numbers",
        "numbers",
        "list[int]",
        ((None, *FILTERS), (None, *MAPS), (None, *ORDERS), FINISHES),
        dict.fromkeys(("sum", "count", "largest", "smallest"), "int") | dict.fromkeys(("sorted", "list"), "list[int]"),
    ),
    Family("n", "n", "int", ((None, *ARITHMETIC), ARITHMETIC, ARITHMETIC, (RETURN_N,)), {"": "int"}),
    Family(
        "text",
        "text",
        "str",
        ((None, *EDITS), EDITS, TEXT_FINISHES),
        {"text": "str", "length": "int", "words": "list[str]"},
    ),
    Family(
        "words",
        "words",
        "list[str]",
        ((None, *WORD_FILTERS), (None, *WORD_MAPS), (None, *WORD_MAPS), WORD_FINISHES),
        {"joined": "str", "letters": "int", "longest": "str", "alphabetic": "list[str]"},
    ),
)
TURNS = (NUMBERS, INTEGER, WORDS, TEXT, NUMBERS, INTEGER, WORDS)
Combination = tuple[Step, ...]


def tags(steps: Combination) -> tuple[str, ...]:
    """The key of a combination."""
    return tuple(step.tag for step in steps)


@cache
def combinations(family: Family, test: bool) -> tuple[Combination, ...]:
    """All step sequences of a family that are held out (test) or used in training text.

    One that fills the slots in two ways (a single edit of words) stands there twice.
    """
    rows = []
    for choice in product(*family.slots):
        steps = tuple(step for step in choice if step is not None)
        repeats = any(a == b for a, b in pairwise(steps))
        if len(steps) > 1 and not repeats and is_held_out(family, steps) == test:
            rows.append(steps)
    return tuple(rows)


def is_held_out(family: Family, steps: Combination) -> bool:
    """Whether this sequence of steps is reserved for test problems."""
    return held_out(f"code-{family.name}", tags(steps), HELD_OUT_PERCENT)


@dataclass(frozen=True)
class Function:
    """One rendered function: `prompt` ends in the docstring's line end, `body` is indented and ends in a line end."""

    name: str
    prompt: str
    body: str


def _docstring(clauses: list[str], rng: Random) -> str:
    style = rng.randrange(3)
    if style == 0:
        text = ", ".join(clauses[:-1]) + " and " + clauses[-1]
    elif style == 1:
        text = ", then ".join(clauses)
    else:
        text = ", ".join(clauses[:-1])
        return f"{text.capitalize()}. {clauses[-1].capitalize()}."
    return text.capitalize() + "."


def render(family: Family, steps: Combination, rng: Random) -> Function:
    """Write one function for a combination, with random wording and constants 2..9."""
    clauses, lines = [], []
    for step in steps:
        k = rng.randint(2, 9)
        clauses.append(rng.choice(step.clauses).format(k=k))
        lines.append("    " + step.line.format(k=k) + "\n")
    first, *_, last = (tag for tag in tags(steps) if tag)  # the steps between stand in the docstring only
    name = f"{first}_{last}"
    head = f"def {name}({family.argument}: {family.annotation}) -> {family.returns[steps[-1].tag]}:\n"
    return Function(name, head + f'    """{_docstring(clauses, rng)}"""\n', "".join(lines))


def document(rng: Random) -> str:
    """One training document: a whole function of a combination that is not held out."""
    family = rng.choice(FAMILIES)
    function = render(family, rng.choice(combinations(family, False)), rng)
    return function.prompt + function.body


EDGES: dict[str, tuple[Any, ...]] = {
    "numbers": ([], [0], [1], [-1], [2, 2], [-5, -4, -3], [3, 5, 7], [2, 4, 6, 8, 10]),
    "n": (0, 1, -1, 2, 9, 10, -10, 100),
    "text": ("", "a", " ", "  Two Words ", "ABC", "xyz "),
    "words": ([], ["a"], ["tree", "tree"], ["Be", "seed", "rosettes"], ["", "ease"]),
}


def _draw(family: Family, rng: Random) -> Any:
    """One random argument of a family's type."""
    if family is INTEGER:
        return rng.randint(-60, 60)
    if family is TEXT:
        return "".join(rng.choice("abcdeABCDE  xyz") for _ in range(rng.randint(2, 16)))
    if family is WORDS:
        return ["".join(rng.choice("abcdeorst") for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(2, 7))]
    return [rng.randint(-12, 15) for _ in range(rng.randint(2, 12))]


def _inputs(family: Family, count: int, rng: Random) -> list[list[Any]]:
    """Distinct argument lists: edge cases first, then random ones."""
    rows = list(EDGES[family.name])
    while len(rows) < count:
        row = _draw(family, rng)
        if row not in rows:
            rows.append(row)
    return [[row] for row in rows]


def _outputs(function: Function, inputs: list[list[Any]]) -> list[Any]:
    names: dict[str, Any] = {}
    exec(function.prompt + function.body, names)
    return [names[function.name](*arguments) for arguments in inputs]


def _problem(family: Family, pool: list[Combination], rng: Random) -> tuple[Function, list[list[Any]]]:
    """The next function of the pool with its inputs; functions that hardly depend on their argument are passed over."""
    while True:
        function, inputs = render(family, pool.pop(), rng), _inputs(family, 28, rng)
        if len({repr(output) for output in _outputs(function, inputs)}) >= MIN_OUTPUTS:
            return function, inputs


def problems(count: int, rng: Random) -> list[dict[str, Any]]:
    """Test problems in EvalPlus's HumanEval+ schema, each of another held-out combination."""
    pools = {}
    for family in FAMILIES:
        distinct = tuple(dict.fromkeys(combinations(family, True)))
        pools[family.name] = rng.sample(distinct, len(distinct))
    rows: list[dict[str, Any]] = []
    for i in range(count):
        family = TURNS[i % len(TURNS)]
        function, inputs = _problem(family, pools[family.name], rng)
        rows.append(
            {
                "task_id": f"Tiny/{i}",
                "prompt": function.prompt,
                "entry_point": function.name,
                "canonical_solution": function.body,
                "base_input": inputs[-4:],
                "plus_input": inputs[:-4],
                "contract": "",
                "atol": 0,
            }
        )
    return rows
