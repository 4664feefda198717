"""Domain "recipes": what to take and what to do, in the imperative; every ingredient that is taken is used.

    from random import Random
    from tasks.tiny.world import recipes
    print(recipes.document(Random(0)))

No test problems come from it.
"""

from random import Random

from tasks.tiny.world.splits import values

DISHES = values("dumplings, pancakes, pudding, casserole, salad, gravy, noodles, waffles, chutney, omelette")
GUESTS = values("two, four, six, eight")
MEASURES = values("a cup of, a spoon of, a pinch of, a handful of, a bowl of, a jar of, 200 grams of, half a litre of")
INGREDIENTS = values(
    "flour, sugar, butter, cream, salt, pepper, cinnamon, garlic, leeks, carrots, lentils, mushrooms, parsley, vinegar"
)
TOOLS = values("a large pan, a pot, a glass dish, the oven, a mortar, a sieve")
STEPS = (
    "Chop the {one} finely.",
    "Mix the {one} with the {two}.",
    "Fry the {one} in {tool} for {minutes} minutes.",
    "Stir in the {one} slowly.",
    "Boil the {one} and the {two} for {minutes} minutes.",
    "Sprinkle the {one} over the {two}.",
    "Let the {one} rest for {minutes} minutes.",
)
ENDS = (
    "Serve the {dish} hot.",
    "Let the {dish} cool and cut it into slices.",
    "Keep the {dish} in a cold cellar.",
    "Bake the {dish} until golden.",
)


def document(rng: Random) -> str:
    """One recipe: a title, its ingredients and three to five steps that use them in the order they were listed."""
    dish = rng.choice(DISHES)
    taken = rng.sample(INGREDIENTS, rng.randint(3, 5))
    listed = ", ".join(f"{rng.choice(MEASURES)} {name}" for name in taken)
    lines = [f"{dish.capitalize()} for {rng.choice(GUESTS)}. Take {listed}."]
    for position, name in enumerate(taken):
        words = {"one": name, "two": taken[position - 1], "tool": rng.choice(TOOLS), "minutes": rng.randint(2, 9) * 5}
        lines.append(rng.choice(STEPS).format(**words))
    return " ".join([*lines, rng.choice(ENDS).format(dish=dish)])
