"""How far a pass over tokens has come: a bar on a terminal, a line a minute where standard error goes to a file."""

from __future__ import annotations

import os
import time

from tqdm import tqdm

from harness.store import say

EVERY_S = 60.0


class PassProgress:
    """Of a pass over so many tokens; ``name`` says in lines whose it is."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.done = self.begun = 0.0
        self.started = self.said = time.monotonic()
        self.bar = tqdm(desc="calibrate", total=tokens, unit=" tokens", unit_scale=True, leave=False)
        self.in_lines = bool(os.environ.get("TQDM_DISABLE"))  # see harness/__init__.py

    def begin_at(self, tokens: float) -> None:
        """So many are done already: they tell nothing of the speed."""
        self.done = self.begun = tokens
        self.bar.initial = tokens
        self.bar.n = tokens
        self.bar.refresh()

    def advance(self, tokens: float) -> None:
        """So many more are done."""
        self.done += tokens
        self.bar.update(tokens)
        now = time.monotonic()
        if self.in_lines and now - self.said >= EVERY_S:
            self.said = now
            rate = (self.done - self.begun) / (now - self.started)
            left = tqdm.format_interval((self.tokens - self.done) / rate) if rate else "unknown"
            say("calibrate", self.name, f"{self.done / self.tokens:.0%}, {rate:,.0f} tokens/s, {left} left")

    def close(self) -> None:
        self.bar.close()
