"""Domain "records": JSON objects of orders, sensor readings and bookings, whose fields agree with one another.

    from random import Random
    from tasks.tiny.world import records
    print(records.document(Random(0)))

No test problems come from it.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tasks.tiny.world.splits import values

CUSTOMERS = values("Abel, Bianca, Cyrus, Dora, Edgar, Flora, Gustav, Helga, Ivo, Judith, Konrad, Livia")
ARTICLES = values("bolt, bracket, cable, fuse, hinge, nail, pipe, plug, relay, screw, switch, valve")
CITIES = values("Antwerp, Bergen, Cadiz, Dresden, Evora, Freiburg, Ghent, Hamburg, Izmir, Jena")
SENSORS = {"temperature": ("celsius", 10, 39), "pressure": ("hectopascal", 80, 99), "humidity": ("percent", 20, 95)}
STATES = values("open, packed, shipped, returned")


def _order(rng: Random) -> dict[str, Any]:
    lines = [(article, rng.randint(1, 9), rng.randint(1, 9)) for article in rng.sample(ARTICLES, rng.randint(1, 3))]
    return {
        "order": rng.randint(100, 999),
        "customer": rng.choice(CUSTOMERS),
        "lines": [{"article": article, "count": count, "price": price} for article, count, price in lines],
        "total": sum(count * price for _, count, price in lines),
    }


def _reading(rng: Random) -> dict[str, Any]:
    quantity = rng.choice(tuple(SENSORS))
    unit, low, high = SENSORS[quantity]
    series = [rng.randint(low, high) for _ in range(rng.randint(2, 4))]
    limit = rng.randint(low, high)
    alarm = max(series) > limit
    return {"sensor": quantity, "unit": unit, "values": series, "maximum": max(series), "limit": limit, "alarm": alarm}


def _booking(rng: Random) -> dict[str, Any]:
    start, nights = rng.randint(1, 20), rng.randint(1, 8)
    return {
        "booking": rng.randint(100, 999),
        "guest": rng.choice(CUSTOMERS),
        "city": rng.choice(CITIES),
        "from": start,
        "nights": nights,
        "until": start + nights,
        "state": rng.choice(STATES),
    }


KINDS: tuple[Callable[[Random], dict[str, Any]], ...] = (_order, _reading, _booking)


def document(rng: Random) -> str:
    """One to three objects of one kind, one a line."""
    kind = rng.choice(KINDS)
    return "\n".join(json.dumps(kind(rng)) for _ in range(rng.randint(1, 3)))
