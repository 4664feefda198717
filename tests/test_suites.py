"""The suites of real benchmarks: lm-eval's own task files on local rows, and what our path makes of planted answers."""

from __future__ import annotations

import json
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from harness.errors import StageError, UserError
from harness.sweep import expand
from tasks import Task
from tasks.evalplus_code import EvalPlus
from tasks.lm_harness import LmEval
from tests.conftest import needs_shared

PAPER = {
    **dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag", "openbookqa"), "acc_norm"),
    **dict.fromkeys(("boolq", "mmlu", "rte", "winogrande"), "acc"),
}


def suite(name: str, *overrides: str) -> dict[str, Any]:
    (cell,) = expand([f"suite={name}", "method=none", *overrides]).cells
    return {task.name: task for task in cell.tasks}


def local(name: str, *overrides: str) -> dict[str, Any]:
    return suite(name, f"data_dir={needs_shared('data')}", *overrides)


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in needs_shared(f"data/lm_eval/{path}.jsonl").read_text().split("\n") if line]


class Planted(LM):
    """Prefers the choice of one position, and generates what ``answer`` makes of the item."""

    def __init__(self, position: int = 0, answer: Any = None) -> None:
        super().__init__()
        self.position, self.answer = position, answer
        self.prompts: list[str] = []

    def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(0.0 if request.idx == self.position else -1e3, False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
        raise AssertionError("no task of ours asks for it")

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.doc) for request in requests]


# ---- multiple choice


def test_the_papers_eight_zero_shot_with_its_metrics() -> None:
    tasks = suite("mc")
    assert {name: task.metrics for name, task in tasks.items()} == {name: (metric,) for name, metric in PAPER.items()}
    for task in tasks.values():
        task.check()  # by default the rows come from the hub: nothing local is needed
        assert task.num_fewshot == 0
        assert not any(file.data_files for file in task._files)
        assert all(file.config["dataset_path"] != "json" for file in task._files)


GOLD = {
    "arc_easy": ("arc_easy/test", lambda row: row["choices"]["label"].index(row["answerKey"])),
    "arc_challenge": ("arc_challenge/test", lambda row: row["choices"]["label"].index(row["answerKey"])),
    "openbookqa": ("openbookqa/test", lambda row: row["choices"]["label"].index(row["answerKey"])),
    "hellaswag": ("hellaswag/validation", lambda row: int(row["label"])),
    "boolq": ("boolq/validation", lambda row: row["label"]),
    "rte": ("rte/validation", lambda row: row["label"]),
    "piqa": ("piqa/validation", lambda row: row["label"]),
}


@pytest.mark.parametrize("name", GOLD)
def test_a_planted_preference_scores_the_share_of_such_golds(name: str, tmp_path: Path) -> None:
    """What lm-eval's file makes of local rows, against golds read from the rows by this test alone."""
    task = local("smol" if name == "piqa" else "mc", "limit=60")[name]
    task.check()
    path, gold = GOLD[name]
    expected = [gold(row) == 1 for row in rows(path)[:60]]
    score = task.evaluate(Planted(1), tmp_path)
    assert 0 < sum(expected) < 60
    for metric in task.metrics or ("acc", "acc_norm"):
        assert score.metrics[metric].value == pytest.approx(sum(expected) / 60)
        assert score.metrics[metric].n == 60
        assert [bool(sample[metric]) for sample in score.samples] == expected
    assert set(score.metrics) == set(task.metrics or ("acc", "acc_norm"))


def test_mmlu_is_the_mean_over_all_items_of_57_subjects(tmp_path: Path) -> None:
    task = local("mc", "limit=1")["mmlu"]
    task.check()
    model = Planted(2)
    score = task.evaluate(model, tmp_path)
    subjects = [path.parent.name for path in sorted(needs_shared("data/lm_eval/mmlu").glob("*/test.jsonl"))]
    golds = [row["answer"] == 2 for subject in subjects for row in rows(f"mmlu/{subject}/test")[:1]]
    assert len(subjects) == 57
    assert score.metrics["acc"].n == len(score.samples) == 57
    assert score.metrics["acc"].value == pytest.approx(sum(golds) / 57)
    assert len({sample["task"] for sample in score.samples}) == 57
    assert not any(prompt.count("Answer:") > 1 for prompt in model.prompts), "zero-shot"


def test_winogrande_asks_for_the_rest_of_the_sentence(tmp_path: Path) -> None:
    task = local("mc", "limit=40")["winogrande"]
    score = task.evaluate(Planted(0), tmp_path)
    expected = [row["answer"] == "1" for row in rows("winogrande/validation")[:40]]
    assert score.metrics["acc"].value == pytest.approx(sum(expected) / 40)


def test_local_rows_and_the_hubs_are_not_the_same_benchmark() -> None:
    assert local("mc")["arc_easy"].identity() != suite("mc")["arc_easy"].identity()


def test_identity_does_not_depend_on_where_local_rows_lie(tmp_path: Path) -> None:
    folder = tmp_path / "copy" / "lm_eval" / "arc_easy"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(needs_shared(f"data/lm_eval/arc_easy/{split}.jsonl").read_bytes())
    task = local("mc")["arc_easy"]
    moved = replace(task, data_dir=str(tmp_path / "copy"))
    assert moved.identity() == task.identity()
    (folder / "test.jsonl").write_text(json.dumps(rows("arc_easy/test")[0]) + "\n")
    assert replace(task, data_dir=str(tmp_path / "copy")).identity() != task.identity()


def test_missing_rows_are_refused_with_the_place_they_should_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_dir=.* has no rows .*arc_easy/test.jsonl or .*validation.jsonl"):
        LmEval("arc_easy", "lm_eval:arc/arc_easy.yaml", data_dir=str(tmp_path)).check()


def test_a_place_that_cannot_be_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="asks for what .*nothing"):
        LmEval("x", "lm_eval:arc/arc_easy.yaml", data_dir=str(tmp_path), copy="{nothing}").check()


def test_a_task_file_that_lm_eval_does_not_ship_is_refused() -> None:
    with pytest.raises(UserError, match="ships no task file"):
        LmEval("x", "lm_eval:arc/arc_impossible.yaml").check()


def test_a_metric_that_a_task_does_not_give_is_no_score(tmp_path: Path) -> None:
    task = LmEval("rte", "lm_eval:glue/rte/default.yaml", ("acc_norm",), data_dir=str(needs_shared("data")), limit=2)
    with pytest.raises(StageError, match="gave no acc_norm, only acc"):
        task.evaluate(Planted(0), tmp_path)


# ---- mathematics


def test_gsm8k_reads_the_reference_answers_as_right_and_others_as_wrong(tmp_path: Path) -> None:
    task = local("math", "limit=30")["gsm8k"]
    task.check()
    model = Planted(answer=lambda doc: doc["answer"])
    right = task.evaluate(model, tmp_path).metrics
    assert {name: metric.value for name, metric in right.items()} == {
        "exact_match:strict-match": 1.0,
        "exact_match:flexible-extract": 1.0,
    }
    assert all(prompt.count("Question:") == 6 for prompt in model.prompts), "five worked examples"
    wrong = task.evaluate(Planted(answer=lambda doc: "#### 12345678"), tmp_path).metrics
    assert all(metric.value == 0 for metric in wrong.values())


def test_math500_reads_the_reference_solutions_as_right_and_others_as_wrong(tmp_path: Path) -> None:
    task = local("math", "limit=25")["math500"]
    task.check()
    model = Planted(answer=lambda doc: doc["solution"])
    assert task.evaluate(model, tmp_path).metrics["math_verify"].value == 1.0
    assert all(prompt.count("Problem:") == 5 and prompt.endswith("Solution:") for prompt in model.prompts)
    assert "find $\\det (\\mathbf{A} \\mathbf{B})" in model.prompts[0], "lm-eval's own worked examples"
    wrong = task.evaluate(Planted(answer=lambda doc: r"The answer is $\boxed{12345678}$."), tmp_path)
    assert wrong.metrics["math_verify"].value == 0.0


# ---- code


def test_the_code_suite_is_evalplus_on_its_own_problems() -> None:
    tasks: dict[str, Task] = local("code")
    assert {name: len(task._problems()) for name, task in tasks.items()} == {"humaneval": 164, "mbpp": 378}  # type: ignore[attr-defined]
    for task in tasks.values():
        task.check()


def test_part_of_a_dataset_is_not_taken_for_the_dataset(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "evalplus").mkdir()
    whole = gzip.decompress(needs_shared("data/evalplus/HumanEvalPlus.jsonl.gz").read_bytes()).splitlines()
    (tmp_path / "evalplus" / "HumanEvalPlus.jsonl.gz").write_bytes(gzip.compress(b"\n".join(whole[:100])))
    with pytest.raises(UserError, match="holds 100 of 164 problems"):
        EvalPlus("humaneval", "humaneval", data_dir=str(tmp_path)).check()


def test_a_release_that_cannot_be_fetched_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from evalplus.data import humaneval

    def unreachable() -> str:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(humaneval, "_ready_human_eval_plus_path", unreachable)
    with pytest.raises(UserError, match=r"could not be fetched .*no network.* Set data_dir"):
        EvalPlus("humaneval", "humaneval").check()
