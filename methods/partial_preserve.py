"""Partial-preservation merging (SlimQwen, arXiv 2605.08738)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import LayerMethod, ScoreMethod, gram_cosine, highest, one_of, within

SIMILARITY = {"outputs": {"all_output_sum"}, "logits": {"logit_gram", "logit_sum"}}  # and the sums it is made of


@dataclass(frozen=True)
class PartialPreserve(LayerMethod):
    """The best experts are copied bit for bit; only the rest are merged.

    Of ``keep`` experts the floor(keep * preserved) most important stay as they are; the next most important are the
    bases of groups. Every other expert i joins the base j with the largest cosine,

        m(i) = argmax over bases j of cos(i, j),        E'_j = sum over i in group j of I_i E_i / sum of I_i

    with I the importance. Router rows of absorbed experts are dropped, so the model really shrinks.

    Options: ``importance``, any score of this collection (REAP by default); ``similarity`` outputs (cosine of the mean
    outputs over all tokens, the paper's expert vectors) or logits (of the router's logits over all tokens, centred);
    ``preserved`` (0.5 as in the paper; 1 is plain pruning).

    Source: SlimQwen, arXiv 2605.08738, Algorithm 1 and eq. 8.

    Where we differ: eq. 8 is written for pairs and Algorithm 1 for groups; we take the groups. "Bases from the rest" is
    read as the next most important. That expert vectors average over all tokens, routed or not, is our reading. The
    paper's third similarity, of router weight rows, is not offered. The paper trains on afterwards; here nothing is
    trained. Hidden units are not aligned, as in the paper. A group without importance, and every group of a layer where
    an importance is negative (AIMER's are), is averaged uniformly.
    """

    importance: ScoreMethod
    similarity: str
    preserved: float
    nested: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("similarity", self.similarity, tuple(SIMILARITY))
        within("preserved", self.preserved, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        return self.importance.needs | SIMILARITY[self.similarity]

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        score = self.importance.score(stats)
        order = highest(stats.experts, score, self.importance.second_score(stats))
        alone = min(int(keep * self.preserved + 1e-9), keep)
        groups = {int(expert): [int(expert)] for expert in order[:keep]}
        bases = sorted(int(expert) for expert in order[alone:keep])
        cosine = self._cosine(stats)
        for expert in sorted(int(expert) for expert in order[keep:]) if bases else ():
            groups[bases[int(np.argmax(cosine[expert, bases]))]].append(expert)
        return LayerPlan.absorb(groups, positive(score))

    def _cosine(self, stats: LayerStats) -> np.ndarray:
        if self.similarity == "logits":
            total = stats["logit_sum"]
            return gram_cosine(stats["logit_gram"] - np.outer(total, total) / max(stats.tokens, 1))
        return gram_cosine(stats["all_output_sum"] @ stats["all_output_sum"].T)


def positive(score: np.ndarray) -> list[float]:
    """Scores as weights of a mean: as they are, or all equal if one is negative (AIMER's are)."""
    return (score if (score >= 0).all() else np.ones_like(score)).tolist()
