"""The paper's analyses: numbers against oracles and planted truths, and the command on a store without a server."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Canvas
from scipy import stats
from scipy.spatial.distance import jensenshannon
from transformers import AutoTokenizer

from harness import analyse, analysis_figures, gather, scoring, stages
from harness.analyses import (
    Analysis,
    Texts,
    angles,
    by_assignment,
    by_linear_program,
    cluster_sizes,
    manifold_distortion,
    ngram_diversity,
    pca,
    singleton_share,
    windows,
)
from harness.blocks import compress, moe_blocks
from harness.calibrate import calibrate
from harness.errors import StageError, UserError
from harness.examine import (
    Continuation,
    continuation,
    divergences,
    expert_inputs,
    expert_means,
    mean_nll,
    slot_means,
    weight_distances,
)
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.reference import log_probs
from harness.significance import interval
from harness.spec import Cell, Row
from harness.store import Store
from harness.sweep import Sweep, expand
from tasks import Task
from tests.conftest import EXPERTS, token_batches, write_model

CLUSTERS = [[0, 3], [1], [2, 5, 7], [4, 6]]
WEIGHTS = [1.0, 2, 3, 1, 0, 1, 0, 4]
MERGED = LayerPlan.merge(CLUSTERS, WEIGHTS)
PRUNED = LayerPlan.prune([1, 2, 5, 6], EXPERTS)
PLANS = {
    "pruned": PRUNED,
    "merged": MERGED,
    "aligned": LayerPlan.merge(CLUSTERS, WEIGHTS, align=True),
    "absorbed": LayerPlan.absorb({1: [1], 2: [0, 2], 5: [5], 7: [3, 4, 6, 7]}, WEIGHTS),
}


def points(seed: int, number: int, hidden: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, hidden))


# Principal components.


def test_components_are_the_leading_eigenvectors_of_the_covariance() -> None:
    cloud = points(0, 40) * [5, 1, 3, 1, 0.5, 2]
    found = pca(cloud)
    values, vectors = np.linalg.eigh(np.cov(cloud.T))
    np.testing.assert_allclose(found.explained, values[::-1][:2] / values.sum())
    for axis, expected in zip(found.axes, vectors.T[::-1], strict=False):
        assert abs(axis @ expected) == pytest.approx(1)
    np.testing.assert_allclose(found.project(cloud).var(0, ddof=1), values[::-1][:2])


def test_a_plane_is_found_whole_and_other_points_are_put_where_they_lie_in_it() -> None:
    basis = np.linalg.qr(points(1, 6))[0][:2]
    flat, others = points(2, 9, 2), points(3, 4, 2)
    found = pca(flat @ basis + 7)
    assert found.explained.sum() == pytest.approx(1)
    before = np.linalg.norm(flat[:, None] - others, axis=-1)
    after = np.linalg.norm(found.project(flat @ basis + 7)[:, None] - found.project(others @ basis + 7), axis=-1)
    np.testing.assert_allclose(after, before)


# Manifold distortion.


def test_angles_are_those_of_the_definition_and_exact_where_arccos_is_not() -> None:
    first, second = points(0, 5), points(1, 7)
    cosine = (first @ second.T) / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)
    np.testing.assert_allclose(angles(first, second), np.arccos(cosine) / math.pi)
    assert np.diag(angles(first, first)).max() == 0
    axes = np.eye(3)
    np.testing.assert_allclose(angles(axes, np.array([[2.0, 0, 0], [-3, 0, 0], [0, 0, 0]]))[0], [0, 1, 0.5])


def test_the_same_experts_in_another_order_and_size_are_no_distortion() -> None:
    cloud = points(0, 12)
    order = np.random.default_rng(1).permutation(12)
    assert manifold_distortion(cloud, cloud[order] * np.arange(1, 13)[:, None]) < 1e-12
    assert manifold_distortion(cloud, cloud.repeat(2, axis=0)) < 1e-12
    assert manifold_distortion(cloud, -cloud[order]) > 0.1


def test_transport_by_hand() -> None:
    """Two directions a right angle apart; one is lost: half of the weight moves by a half."""
    assert manifold_distortion(np.eye(2), np.eye(2)[:1]) == pytest.approx(0.25)
    assert manifold_distortion(np.eye(2)[:1], -np.eye(2)[:1]) == pytest.approx(1)
    three, diagonal = np.eye(2)[[0, 0, 1]], np.array([[1.0, 1]])
    assert manifold_distortion(three, diagonal) == pytest.approx(0.25)
    assert manifold_distortion(three, np.eye(2)) == pytest.approx(0.5 / 6), "1/6 of the weight moves by a half"


def test_the_transport_is_the_best_there_is() -> None:
    cost = angles(points(0, 5), points(1, 5))
    every = [cost[np.arange(5), order].mean() for order in map(list, itertools.permutations(range(5)))]
    assert by_assignment(cost) == pytest.approx(min(every)) and max(every) > min(every) + 0.01


@pytest.mark.parametrize(("many", "few"), [(12, 12), (12, 6), (12, 9), (7, 5), (5, 8), (9, 1)])
def test_both_ways_of_solving_it_agree(many: int, few: int) -> None:
    cost = angles(points(2, many), points(3, few))
    assert by_assignment(cost) == pytest.approx(by_linear_program(cost), abs=1e-9)


def test_large_coprime_numbers_are_solved_too() -> None:
    first, second = points(0, 41), points(1, 40)
    assert math.lcm(41, 40) > 1024
    assert manifold_distortion(first, second) == pytest.approx(by_assignment(angles(first, second)), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_distance_of_at_most_one(seed: int) -> None:
    a, b, c = points(seed, 8), points(seed + 10, 6) + 1, points(seed + 20, 5)
    assert manifold_distortion(a, b) == pytest.approx(manifold_distortion(b, a))
    assert 0 < manifold_distortion(a, c) <= manifold_distortion(a, b) + manifold_distortion(b, c) + 1e-12
    assert manifold_distortion(a, c) <= 1


# Clusters, n-grams, intervals.


def test_clusters_count_their_members_also_those_that_were_never_chosen() -> None:
    assert cluster_sizes(MERGED).tolist() == [2, 1, 3, 2]
    silent = LayerPlan.merge([[0, 1], [2], [3]], [1.0, 0, 1, 1])
    assert len(silent.slots[0]) == 1 and cluster_sizes(silent).tolist() == [2, 1, 1]
    assert cluster_sizes(PRUNED).tolist() == [1] * 4
    assert cluster_sizes(PLANS["absorbed"]).tolist() == [1, 2, 1, 2], "absorbed without weight and row: nowhere"
    assert singleton_share(Plan({0: MERGED, 4: silent})) == {0: 0.25, 4: pytest.approx(2 / 3)}


def test_ngram_diversity_by_hand_and_by_counting() -> None:
    assert ngram_diversity("a b a b", 2) == pytest.approx(2 / 3)
    assert ngram_diversity("a b  a\nb", 4) == 1
    assert ngram_diversity("a b a", 4) is None and ngram_diversity("", 2) is None
    words = np.random.default_rng(0).choice(list("abc"), 50).tolist()
    for n in (2, 3, 4):
        counted = Counter("".join(words[i : i + n]) for i in range(50 - n + 1))
        assert ngram_diversity(" ".join(words), n) == pytest.approx(len(counted) / counted.total())


def test_empty_and_short_texts_are_left_out_and_counted() -> None:
    texts = Texts(("a b c", " \n", "a"), np.array([math.log(2), np.nan, math.log(8)]))
    np.testing.assert_allclose(texts.perplexities, [2, 8])
    assert texts.empty == 1 and texts.diversities(2).tolist() == [1]


def test_the_interval_is_students_and_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=(6, 4000))
    low, high = interval(values)
    one = stats.t.interval(0.95, 5, values[:, 7].mean(), stats.sem(values[:, 7]))
    assert (low[7], high[7]) == pytest.approx(one)
    assert ((low < 3) & (high > 3)).mean() == pytest.approx(0.95, abs=0.015)
    assert np.isinf(interval(values[:1])[1]).all()


def test_windows_cover_every_position_once() -> None:
    middles, values = windows(np.arange(20.0).reshape(2, 10), 3)
    np.testing.assert_allclose(middles, [1.5, 5, 8])
    np.testing.assert_allclose(values, [[1.5, 5, 8], [11.5, 15, 18]])
    assert windows(np.ones((2, 3)), 9)[1].shape == (2, 3)


# What a model says.


def layers_of(model: Model, plan: LayerPlan) -> dict[int, LayerPlan]:
    return dict.fromkeys(model.experts, plan)


def test_means_are_over_all_tokens_and_pruning_only_leaves_some_of_them(family_model: Model) -> None:
    """Against the sums of the calibration pass, which comes to the experts another way; padding counts for nothing."""
    model, batches = family_model.load("float32"), token_batches()
    inputs = expert_inputs(model, batches)
    originals = expert_means(model, inputs)
    stats_ = calibrate(family_model.load("float32"), batches, frozenset({"all_output_sum"}))
    assert originals.keys() == stats_.layers.keys()
    for layer, seen in stats_.layers.items():
        np.testing.assert_allclose(originals[layer], seen["all_output_sum"] / seen.tokens, rtol=1e-4, atol=1e-6)
    left = slot_means(model, inputs, layers_of(family_model, PRUNED))
    for layer, means in left.items():
        np.testing.assert_allclose(means, originals[layer][list(PRUNED.kept_rows)], rtol=1e-4, atol=1e-6)


def test_a_merged_expert_says_what_the_mean_of_the_matrices_says(qwen_model: Model) -> None:
    """By hand, with plain products; slots in another order than their rows too."""
    model, batches = qwen_model.load("float32"), token_batches()
    inputs = expert_inputs(model, batches)
    turned = LayerPlan(MERGED.slots[::-1], tuple(3 - slot for slot in MERGED.routes if slot is not None))
    for plan in (MERGED, turned, PLANS["absorbed"]):
        found = slot_means(model, inputs, layers_of(qwen_model, plan))
        experts = moe_blocks(model)[1].experts
        for slot, sources in enumerate(plan.slots):
            gate_up = sum(s.weight * experts.gate_up_proj[s.expert] for s in sources).detach()
            down = sum(s.weight * experts.down_proj[s.expert] for s in sources).detach()
            gate, up = (inputs[1] @ gate_up.T).chunk(2, dim=-1)
            expected = ((torch.nn.functional.silu(gate) * up) @ down.T).mean(0)
            np.testing.assert_allclose(found[1][slot], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_an_untouched_set_is_not_distorted_and_a_pruned_one_is(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    inputs = expert_inputs(model, token_batches())
    originals = expert_means(model, inputs)
    same = slot_means(model, inputs, layers_of(qwen_model, LayerPlan.identity(EXPERTS)))
    pruned = slot_means(model, inputs, layers_of(qwen_model, PRUNED))
    for layer in originals:
        assert manifold_distortion(originals[layer], same[layer]) < 1e-4
        assert 0.02 < manifold_distortion(originals[layer], pruned[layer]) < 1


def test_means_that_are_not_finite_are_refused(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    inputs = expert_inputs(model, token_batches())
    inputs[2][0] = torch.nan
    with pytest.raises(StageError, match="layer 2"):
        expert_means(model, inputs)


def test_the_divergence_is_scipys_of_two_separate_models(family_model: Model) -> None:
    """Every layer under a plan of another kind."""
    ids = torch.cat([ids for ids, _ in token_batches(2, padded=False)])
    layers = dict(zip(family_model.experts, (PLANS[kind] for kind in ("absorbed", "aligned", "pruned")), strict=False))
    model, other = family_model.load("float32"), family_model.load("float32")
    compress(other, layers)
    with torch.no_grad():
        before, after = (which(input_ids=ids).logits[:, :-1].double().softmax(-1).numpy() for which in (model, other))
        untouched = model(input_ids=ids).logits
        found = divergences(model, layers, ids.numpy())
        assert torch.equal(model(input_ids=ids).logits, untouched), "the model is as it was"
    expected = jensenshannon(before, after, axis=-1, base=2) ** 2
    assert found.shape == (4, 23) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert expected.mean() > 0.01


def test_nothing_changed_is_no_divergence_and_impossible_tokens_do_no_harm(qwen_model: Model) -> None:
    from harness.examine import _jensen_shannon

    ids = token_batches(1, padded=False)[0][0].numpy()
    model = qwen_model.load("float32")
    assert divergences(model, layers_of(qwen_model, LayerPlan.identity(EXPERTS)), ids).max() < 1e-6
    never = -torch.inf
    logits = torch.tensor([[0.0, never, never], [0.0, 0, never]])
    found = _jensen_shannon(logits, torch.tensor([[never, 0, never], [0.0, 0, never]]))
    np.testing.assert_allclose(found.numpy(), [1, 0], atol=1e-6)
    assert torch.isnan(_jensen_shannon(torch.full((1, 3), torch.nan), torch.zeros(1, 3))).all()


def test_a_broken_model_has_no_divergence(tmp_path: Path) -> None:
    def damage(model: torch.nn.Module) -> None:
        model.lm_head.weight[3] = torch.nan

    broken = write_model("qwen3_moe", tmp_path, damage)
    with pytest.raises(StageError, match="not finite"):
        divergences(broken.load("float32"), layers_of(broken, PRUNED), token_batches(1)[0][0].numpy())


# Distance in weights.


def permuted_copies(model: torch.nn.Module) -> None:
    """Expert 3 of each layer computes what expert 0 does, its hidden units in another order; 1 is 5 times two."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for block in moe_blocks(model).values():  # type: ignore[arg-type]
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        gate_up[3] = gate_up[0][torch.cat([order, order + 16])]
        down[3] = down[0][:, order]
        gate_up[1], down[1] = 2 * gate_up[5], 2 * down[5]


def test_distances_see_through_a_permutation_once_aligned(tmp_path: Path) -> None:
    model = write_model("qwen3_moe", tmp_path, permuted_copies)
    plan = LayerPlan.merge([[0, 3], [1, 5], [2], [4], [6], [7]], [1.0, 1, 1, 2, 1, 3, 1, 1])
    found = weight_distances(model.load("float32"), layers_of(model, plan))
    assert found.keys() == model.experts.keys()
    for pairs in found.values():
        (apart, aligned), doubled = pairs
        assert apart > 1 and aligned < 1e-6
        np.testing.assert_allclose(doubled, [1, 1], rtol=1e-5)  # relative to the weightiest, 5: |2 W - W| / |W|


def test_distances_are_those_of_the_definition_and_of_merged_experts_only(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    found = weight_distances(model, {**layers_of(qwen_model, PRUNED), 1: MERGED})
    assert list(found) == [1]
    pairs = [(0, 3), (7, 2), (7, 5), (4, 6)]  # weightiest first
    experts = moe_blocks(model)[1].experts
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    for (reference, member), (stored, aligned) in zip(pairs, found[1], strict=True):
        matrices = [(gate_up[e, :16], gate_up[e, 16:], down[e]) for e in (reference, member)]
        relative = [float((b - a).norm() / a.norm()) for a, b in zip(*matrices, strict=True)]
        assert stored == pytest.approx(np.mean(relative), rel=1e-4)
        assert 0 < aligned <= stored


def test_experts_that_are_no_plain_matrices_are_refused(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    moe_blocks(model)[0].experts.is_transposed = True
    with pytest.raises(UserError, match="plain gate, up and down"):
        weight_distances(model, layers_of(qwen_model, MERGED))


# Cross-perplexity.

TINY = expand(["model=tiny"]).cells[0].model
ASKED = "Question: Ana has 40 pens. She finds 8 more. How many pens are there now?\nAnswer:"
TEXTS = [(ASKED, " 40 + 8 = 48. #### 48"), (ASKED, " 9"), ("def f(n: int) -> int:\n", "    return n * n + 3\n")]


def test_the_likelihood_is_the_references_token_by_token_given_the_prompt() -> None:
    """Texts of other lengths in the batch change nothing; another prompt does."""
    tokenizer = AutoTokenizer.from_pretrained(TINY.folder)
    texts = [continuation(tokenizer, prompt, answer) for prompt, answer in TEXTS]
    found = mean_nll(TINY.load("float32"), texts)
    for value, text, (prompt, _) in zip(found, texts, TEXTS, strict=True):
        assert text.start == len(tokenizer(prompt).input_ids)
        known = log_probs(TINY.load("float32"), list(text.ids))[text.start - 1 :]
        assert value == pytest.approx(-np.mean(known), rel=1e-4)
    unasked = mean_nll(TINY.load("float32"), [continuation(tokenizer, "", TEXTS[0][1])])
    assert unasked[0] > found[0] + 0.5, "the answer to the question is no surprise after it"


def test_a_text_of_one_token_has_no_likelihood_and_none_is_lost() -> None:
    found = mean_nll(TINY.load("float32"), [Continuation((5,), 0), Continuation((5, 6, 7), 1), Continuation((5, 6), 2)])
    assert np.isnan(found).tolist() == [True, False, True]
    assert len(mean_nll(TINY.load("float32"), [])) == 0


class Words:
    """A tokenizer that joins a prompt's last space with what follows, and may begin texts with a token of its own."""

    def __init__(self, begin: bool) -> None:
        self.bos_token_id, self.begin = 1 if begin else None, begin

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = [sum(map(ord, piece)) + 10 for piece in re.findall(r" ?\w+| ", text)]
        return type("Encoding", (), {"input_ids": ([1] if self.begin and add_special_tokens else []) + ids})


@pytest.mark.parametrize("begin", [False, True])
def test_a_token_across_the_border_belongs_to_the_answer(begin: bool) -> None:
    text = continuation(Words(begin), "say this ", "now please")
    assert text.start == 2 + begin and len(text.ids) == 4 + begin
    assert text.ids[0] == (1 if begin else sum(map(ord, "say")) + 10)


# The command, on plans that were really made and answers that were written by hand.

COMMAND = ["method=none,reap,hc_smoe", "ratio=0.5", "calibration.sequences=4", "calibration.held_out=2"]
ANSWERS = {"uncompressed": " 40 + 8 = 48. #### 48", "REAP": " 40 + 8 = 47. #### 47", "HC-SMoE": " 8 8 8 8 8 8 8 8"}


def prepared(store: Path) -> Sweep:
    """Plans of the sweep; of each row a score on tiny_sums, four answers, one of them empty, and one on tiny_facts."""
    sweep = expand([*COMMAND, f"store={store}"])
    for cell in (replace(cell, collect=frozenset(sweep.extras)) for cell in sweep.cells):
        stages.plan(cell, gather.statistics(cell, sweep.store), sweep.store)
        said = ANSWERS[cell.label]
        rows = [sample(place, responses=[[answer]]) for place, answer in enumerate([said, said * 2, "", "48 48"])]
        chosen = [sample(0, choices=[" tea", " broth"], responses=[[[-1.0, True]], [[-2.0, False]]], target=0)]
        for task in cell.tasks:
            if task.name in (found := {"tiny_sums": rows, "tiny_facts": chosen}):
                keep_score(sweep.store, cell, task, found[task.name])
    return sweep


def sample(place: int, **changes: object) -> dict[str, object]:
    """As lm-eval's samples are kept (`tasks.lm_harness`)."""
    known = {"task": "tiny", "doc_id": place, "filter": "x", "prompt": ASKED, "target": "48", "choices": []}
    return {**known, "exact_match": 1.0, **changes}


def keep_score(store: Store, cell: Cell, task: Task, rows: list[dict[str, object]]) -> None:
    name = f"{cell.slug}-{task.name}.json"
    store.put("samples", scoring._samples_name(name), lambda path: scoring._write_samples(path, rows))
    store.write_json("records", cell.record_name(task), {"status": "done", "error": None, "score": name})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that needs the model measured."""
    folder = tmp_path_factory.mktemp("analyses")
    assert analyse.measure(prepared(folder), texts=3)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["analyse", *arguments])
    return analyse.main()


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Model, "load", refuse)


def test_what_was_measured_is_found_again_without_the_model(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    loaded = analyse.load(expand([*COMMAND, f"store={store}"]), texts=3)
    assert [row.label for row in loaded] == ["uncompressed", "REAP", "HC-SMoE"]
    base, reap, hc_smoe = loaded.values()
    assert base.plan is None and not base.slots and base.divergence is None
    for one in (reap, hc_smoe):
        assert {layer: means.shape for layer, means in one.slots.items()} == dict.fromkeys(range(4), (16, 128))
        assert one.divergence is not None and one.divergence.shape == (2, 255)
        assert all(0 < value < 1 for value in one.distortions.values())
    assert not reap.distances and {pairs.shape[1] for pairs in hc_smoe.distances.values()} == {2}
    assert sum(map(len, hc_smoe.distances.values())) == 4 * 16, "16 of 32 experts lie in another's slot"
    assert list(base.texts) == ["tiny_sums"], "of tasks that choose there are no texts"
    for one in loaded.values():
        assert len(one.texts["tiny_sums"].answers) == 3 and one.texts["tiny_sums"].empty == 1
    typical = {
        name: np.median(one.texts["tiny_sums"].perplexities) for name, one in zip("orh", loaded.values(), strict=True)
    }
    assert 1 <= typical["o"] < typical["r"] < typical["h"], "what the original would have said, a slip, babble"


def test_the_command_measures_once_and_draws_from_what_is_kept(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (store / "analyses").iterdir()}
    no_model(monkeypatch)
    assert run(monkeypatch, *COMMAND, f"store={store}", "n=3") == 0
    printed = capsys.readouterr()
    assert "examine" in printed.err and "failed" not in printed.err
    assert all(line.endswith("cached") for line in printed.err.splitlines())
    assert {path: path.stat().st_mtime_ns for path in (store / "analyses").iterdir()} == before
    table = {line.split("|")[2].strip(): line for line in printed.out.splitlines() if line.startswith("|")}
    assert re.search(r"\| — +\| — ", table["uncompressed"]) and "0." in table["HC-SMoE"]
    titles = ["functional-subspace", "manifold-distortion", "cluster-sizes", "distance-in-weights"]
    titles += ["divergence-by-position", "n-gram-diversity", "cross-perplexity"]
    for title in titles:
        for suffix in ("png", "pdf"):
            path = store / "figures" / f"analyses-run-{title}.{suffix}"
            assert path.stat().st_size > 5_000 and str(path) in printed.out


def test_cells_of_one_row_bring_their_tasks_together(store: Path) -> None:
    """As in experiments, where each domain has tasks of its own and the uncompressed model is one row."""
    sweep = expand([*COMMAND, f"store={store}"])
    parts = [replace(cell, tasks=(task,)) for task in sweep.cells[0].tasks for cell in sweep.cells]
    whole = analyse.load(sweep, texts=3)
    for order in (parts, parts[::-1]):
        apart = analyse.load(replace(sweep, cells=tuple(order)), texts=3)
        assert whole.keys() == apart.keys()
        for row, one in whole.items():
            assert list(apart[row].texts) == list(one.texts) == ["tiny_sums"]
            assert apart[row].slots.keys() == one.slots.keys()


def test_another_model_text_or_number_of_texts_is_measured_anew(store: Path) -> None:
    """Nothing that was kept is found under other circumstances."""
    (cell,) = expand([*COMMAND, f"store={store}", "method=reap"]).cells
    found = analyse.plan_of(cell, Store(store))
    assert found is not None and (store / "analyses" / analyse._plan_name(cell, found)).exists()
    for change in (["calibration=tiny_code"], ["calibration.held_out=3"], ["calibration.dtype=bfloat16"]):
        (cell,) = expand([*COMMAND, f"store={store}", "method=reap", *change]).cells
        names = analyse._originals_name(cell), analyse._plan_name(cell, found)
        assert not any((store / "analyses" / name).exists() for name in names)
    sweep = expand([*COMMAND, f"store={store}"])
    assert all(one.texts["tiny_sums"].nll is None for one in analyse.load(sweep, texts=2).values())


def test_what_fails_is_said_and_costs_only_itself(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(store, copied)
    sweep = expand([*COMMAND, f"store={copied}"])
    reap, hc_smoe = (cell for cell in sweep.cells if cell.compresses)
    for cell in (reap, hc_smoe):
        made = analyse.plan_of(cell, sweep.store)
        assert made is not None
        (copied / "analyses" / analyse._plan_name(cell, made)).unlink()

    def refuse(*_: object) -> None:
        raise UserError("no plain matrices")

    def break_down(model: object, layers: dict[int, LayerPlan], ids: np.ndarray) -> np.ndarray:
        if layers[0].only_prunes:
            raise StageError("not finite")
        return np.zeros((2, 255), np.float32)

    with monkeypatch.context() as patched:
        patched.setattr("harness.examine.weight_distances", refuse)
        patched.setattr("harness.examine.divergences", break_down)
        assert not analyse.measure(sweep, texts=3)
    errors = capsys.readouterr().err
    assert "StageError: not finite" in errors and "no plain matrices" in errors
    loaded = analyse.load(sweep, texts=3)
    assert not loaded[reap.row].slots and loaded[hc_smoe.row].slots and not loaded[hc_smoe.row].distances
    titles = [figure.title for figure in analysis_figures.all_figures(sweep, loaded)]
    assert "Distance in weights" not in titles and "Manifold distortion" in titles
    assert "skipped" in capsys.readouterr().err
    assert not list((copied / "analyses").glob(".*")), "nothing half-written stays"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=none"], "compresses nothing"),
        (["method=reap", "calibration.held_out=0"], "calibration.held_out=0"),
        (["method=reap", "ratio=0.25"], "None of the 1 plans"),
        (["method=reap", "n=none"], "n=none is no number of texts"),
        (["method=reap", "n=0"], "n=0 is no number of texts"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_model(monkeypatch)
    assert run(monkeypatch, *arguments, f"store={tmp_path / 'results'}") == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and words in errors
    assert not (tmp_path / "results").exists()


# Figures: lines of many methods, seeds and models.


def planted(label: str, ratio: float, seed: int = 0, model: str = "toy", calibration: str = "tiny") -> Analysis:
    rng = np.random.default_rng([seed, len(label)])
    plan = Plan(dict.fromkeys((1, 2), MERGED if label.startswith("merge") else PRUNED))
    return Analysis(
        Row(model, label, calibration, "actual", ratio, seed),
        plan,
        {layer: rng.normal(size=(EXPERTS, 5)) for layer in (1, 2)},
        {layer: rng.normal(size=(4, 5)) for layer in (1, 2)},
        rng.uniform(0, 0.1, (3, 20)).astype(np.float32),
        {1: rng.uniform(0.5, 1, (4, 2))} if label.startswith("merge") else {},
        {"sums": Texts(("a b c d e", "a a a a a"), rng.uniform(0, 3, 2))},
    )


def test_many_methods_go_on_in_the_next_panel_and_keep_their_colours() -> None:
    rows = [planted(f"method {i}", ratio, seed) for i in range(13) for ratio in (0.25, 0.5) for seed in (0, 1)]
    shown = analysis_figures.panels(rows, lambda _: True)
    assert [(panel.title, len(panel.lines)) for panel in shown] == [
        ("25 % removed", 10), ("25 % removed", 3), ("50 % removed", 10), ("50 % removed", 3),
    ]  # fmt: skip
    assert all(len(line.seeds) == 2 for panel in shown for line in panel.lines)
    only = analysis_figures.panels(rows, lambda one: one.row.label == "method 11")
    (line,) = only[0].lines
    assert line == shown[1].lines[1], "the same colour and mark, whatever else is shown"
    looks = {(line.colour, line.dashes, line.hatch) for panel in shown for line in panel.lines}
    assert len(looks) == 13, "no two methods look alike"


def test_a_line_says_how_it_was_calibrated_where_that_differs() -> None:
    both = [planted("reap", 0.5, calibration=name).row for name in ("code", "facts")]
    assert list(analysis_figures.names(both).values()) == ["reap on code", "reap on facts"]
    assert list(analysis_figures.names(both[:1]).values()) == ["reap"]


def test_nothing_is_cut_off_where_the_next_panel_goes_higher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["reap", "merge", *(f"a method of many words and the number {i}" for i in range(11))]
    lower = [
        replace(one, slots={layer: means[:4] for layer, means in one.originals.items()})
        for one in (planted(label, 0.25) for label in labels)
    ]
    higher = [
        replace(one, divergence=one.divergence * 5, distances={k: 3 * v for k, v in one.distances.items()})
        for one in (planted(label, 0.5) for label in labels)
        if one.divergence is not None
    ]
    own = Analysis(Row("toy", "uncompressed", "none", "none", 0.0, None), texts=lower[0].texts)
    loaded = {one.row: one for one in (own, *lower, *higher)}
    drawn: list[Canvas] = []
    monkeypatch.setattr(analysis_figures.plt, "close", drawn.append)
    figures = list(analysis_figures.all_figures(Sweep("toy", (), Store(tmp_path)), loaded))
    for figure in figures:
        figure.draw("png", tmp_path / "figure.png")
    assert len(drawn) == len(figures) == 7
    for canvas in drawn:
        for axes in (axes for axes in canvas.axes if axes.get_visible()):
            (low, high), (lowest, highest) = axes.get_ylim(), (axes.dataLim.y0, axes.dataLim.y1)
            assert low <= lowest + 1e-9 and highest <= high + 1e-9, axes.get_title()
        for legend in canvas.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= canvas.bbox.x1, "names of methods"


def test_every_model_has_figures_of_its_own_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [planted(label, 0.5, model=model) for model in ("one", "two") for label in ("reap", "merge all")]
    rows = [one for one in rows if (one.row.model, one.row.label) != ("two", "merge all")]
    sweep = Sweep("toy", (), Store(tmp_path))
    found = {figure.title: figure for figure in analysis_figures.all_figures(sweep, {one.row: one for one in rows})}
    assert len(found) == 12 and "Cluster sizes, one" in found and "Cluster sizes, two" not in found
    assert "Cluster sizes, two" in capsys.readouterr().err
    assert "3 x 21 held-out tokens" in found["Manifold distortion, one"].caption
    assert "4 pairs" in found["Distance in weights, one"].caption
    assert "the first 2 of sums" in found["Cross-perplexity, two"].caption
    found["Functional subspace, two"].draw("png", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert list(analysis_figures.all_figures(sweep, {})) == []


def test_seeds_that_lack_a_number_leave_their_row_without_it() -> None:
    whole, part = planted("reap", 0.5, 0), planted("reap", 0.5, 1)
    part = Analysis(part.row, part.plan, texts=part.texts)
    tidy = analyse.frame({one.row: one for one in (whole, part)})
    line = analyse.table(tidy).iloc[0]
    assert line["divergence, bits"] == "—" and line["manifold distortion"] == "—"
    both = [np.median(one.texts["sums"].perplexities) for one in (whole, part)]
    assert float(line["cross-perplexity, median: sums"]) == pytest.approx(np.mean(both), abs=6e-4)
    assert line["2, 3, 4-gram diversity: sums"] == "0.625 0.667 0.750"
    assert json.loads(tidy.to_json()), "plain numbers"
