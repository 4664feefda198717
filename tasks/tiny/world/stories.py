"""Domain "stories": short stories from a template grammar, for language-model text and calibration.

    from random import Random
    from tasks.tiny.world import stories
    print(stories.document(Random(0)))

No test problems come from it.
"""

from random import Random

from tasks.tiny.world.splits import values

WORDS: dict[str, tuple[str, ...]] = {
    "who": values("a little girl, an old man, a young fox, a tired farmer, a clever mouse, a small boy, a queen"),
    "name": values("Lily, Otto, Robin, Greta, Pip, Oscar, Hazel, Willow, Bruno, Daisy"),
    "place": values("a village by the sea, a dark forest, a house on a hill, a quiet town, a castle near the lake"),
    "weather": values("sunny, rainy, cold, windy, warm, foggy"),
    "thing": values("a golden key, a broken kite, a tiny boat, a strange map, an empty box, a silver ring, a lamp"),
    "spot": values("under a stone, behind the door, in the tall grass, near the river, on the road, inside a tree"),
    "helper": values("a friendly bird, a wise owl, the baker, a lost dog, a kind teacher, a sailor"),
    "feeling": values("happy, surprised, afraid, proud, curious, sad"),
    "ending": (
        "They became good friends and shared a big meal.",
        "In the evening everybody danced and sang.",
        "From that day on nobody was lonely any more.",
        "At last it was time to go home and sleep.",
    ),
}
SENTENCES = (
    (
        "Once there was {who} called {name}.",
        "{who} called {name} lived in {place}.",
        "This is the story of {name}.",
    ),
    ("One {weather} day {name} went for a walk.", "It was a {weather} morning in {place}."),
    ("{name} found {thing} {spot}.", "There was {thing} {spot}, and {name} picked it up."),
    ("{name} was very {feeling}.", '"I am so {feeling}!" said {name}.', "This made {name} feel {feeling}."),
    (
        "Then {helper} came along and asked what it was.",
        "{name} showed it to {helper}.",
        "{helper} wanted to help.",
    ),
    ('"We should take it to {place}," said {helper}.', "Together they walked to {place}."),
    ("{ending}",),
)


def document(rng: Random) -> str:
    """One story of five to seven sentences; its characters stay the same throughout."""
    words = {slot: rng.choice(values) for slot, values in WORDS.items()}
    skipped = rng.sample(range(1, 6), rng.randint(0, 2))
    picked = [rng.choice(options) for i, options in enumerate(SENTENCES) if i not in skipped]
    sentences = [sentence.format(**words) for sentence in picked]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
