"""The harnesses against a real vLLM server with a tiny model, and against independent computations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.errors import StageError, UserError
from harness.models import ROOT
from harness.served import Weights
from tasks import LLM
from tasks.completions import complete, is_looping
from tasks.evalplus_code import EvalPlus
from tasks.lm_harness import LmEval, _check_finite
from tests.conftest import vllm
from tests.tiny_checkpoint import write_checkpoint

QUESTIONS = [
    {"question": f"What is {a} + {b}?", "choices": [str(a + b), "a dog", f"{a}{b} cats", "x"], "gold": (a + b) % 4}
    for a in range(5)
    for b in range(4)
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {data_files: {test: data/generate.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs: {until: ["STOP"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with vllm(dtype="float32", max_model_len=256).serve(Weights(folder), "tiny", folder / "server.log") as served:
        yield served.llm


@pytest.fixture(scope="module")
def reference(folder: Path):
    """The same model in transformers, float32, and a byte's token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def write_task(folder: Path, name: str, text: str, rows: list[dict]) -> LmEval:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(text)
    return LmEval(name, str(folder / f"{name}.yaml"))


@torch.no_grad()
def loglikelihood(reference, context: str, continuation: str) -> float:
    model, tokenizer = reference
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    n = len(tokenizer(continuation).input_ids)
    logprobs = model(ids).logits.log_softmax(-1)[0, -n - 1 : -1]
    return logprobs.gather(1, ids[0, -n:, None]).sum().item()


@torch.no_grad()
def greedy(reference, prompt: str, tokens: int) -> str:
    model, tokenizer = reference
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_multiple_choice_equals_log_likelihoods_of_transformers(llm: LLM, reference, tmp_path: Path):
    task = write_task(tmp_path, "choice", CHOICE, QUESTIONS)
    task.check()
    score = task.score(llm, tmp_path)
    plain = normed = 0
    for row, sample in zip(QUESTIONS, score.samples, strict=True):
        found = [loglikelihood(reference, f"Question: {row['question']}\nAnswer:", f" {c}") for c in row["choices"]]
        assert [response[0][0] for response in sample["responses"]] == pytest.approx(found, abs=2e-4)
        plain += max(range(4), key=found.__getitem__) == row["gold"]
        normed += max(range(4), key=lambda i: found[i] / len(row["choices"][i])) == row["gold"]
    assert score.metrics["acc"].value == pytest.approx(plain / 20)
    assert score.metrics["acc_norm"].value == pytest.approx(normed / 20)
    assert score.metrics["acc"].n == 20
    assert score.metrics["acc"].stderr > 0
    assert set(score.metrics) == {"acc", "acc_norm"}
    json.dumps(list(score.samples))


def test_generation_equals_greedy_decoding_of_transformers(llm: LLM, reference, tmp_path: Path):
    prompts = [f"Item {i}:" for i in range(10)]
    answers = [greedy(reference, prompt, 8) if i < 6 else "something else" for i, prompt in enumerate(prompts)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    score = write_task(tmp_path, "generate", GENERATE, rows).score(llm, tmp_path)
    assert score.metrics["exact_match"].value == pytest.approx(0.6)
    assert score.metrics["exact_match"].n == 10
    assert score.counts == {"empty": 0, "length_capped": 10, "looping": 0}
    assert [sample["target"] for sample in score.samples] == answers


def test_limit_scores_the_first_items(llm: LLM, tmp_path: Path):
    write_task(tmp_path, "choice", CHOICE, QUESTIONS)
    task = LmEval("choice", str(tmp_path / "choice.yaml"), limit=7)
    score = task.score(llm, tmp_path)
    assert score.metrics["acc"].n == len(score.samples) == 7


def test_an_edited_data_file_is_scored_anew(llm: LLM, tmp_path: Path):
    write_task(tmp_path, "choice", CHOICE, QUESTIONS[:4]).score(llm, tmp_path)
    task = write_task(tmp_path, "choice", CHOICE, [{**QUESTIONS[5], "question": "Another one?"}])
    (sample,) = task.score(llm, tmp_path).samples
    assert "Another one?" in sample["prompt"]


def test_an_answer_that_does_not_fit_fails_the_task(llm: LLM, tmp_path: Path):
    text = GENERATE.replace("max_gen_toks: 8", "max_gen_toks: 8, n: -3")
    task = write_task(tmp_path, "generate", text, [{"prompt": "a", "answer": "b"}] * 3)
    with pytest.raises(StageError, match="generate: lm-eval failed: .*400"):
        task.score(llm, tmp_path)


def test_a_server_that_is_gone_fails_the_task(folder: Path, tmp_path: Path):
    gone = LLM("http://127.0.0.1:9", "tiny", str(folder), 256)
    task = write_task(tmp_path, "choice", CHOICE, QUESTIONS[:1])
    with pytest.raises(StageError, match="choice: lm-eval failed"):
        task.score(gone, tmp_path)
    with pytest.raises(StageError, match="gone"):
        complete(gone, ["a"], max_tokens=4, stop=[], timeout_s=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_log_likelihoods_must_be_finite(value: float):
    with pytest.raises(StageError, match="item 3 has the log-likelihood"):
        _check_finite("x", [{"doc_id": 3, "resps": [[(-1.0, True)], [(value, False)]]}])


def test_identity_follows_the_content(tmp_path: Path):
    task = write_task(tmp_path, "choice", CHOICE, QUESTIONS)
    before = task.identity()
    (tmp_path / "moved").mkdir()
    assert write_task(tmp_path / "moved", "choice", CHOICE, QUESTIONS).identity() == before
    assert write_task(tmp_path, "choice", CHOICE, QUESTIONS[:-1]).identity() != before
    assert (
        write_task(tmp_path, "choice", CHOICE.replace("num_fewshot: 0", "num_fewshot: 1"), QUESTIONS).identity()
        != before
    )
    assert LmEval("choice", task.task_file, limit=3).identity() != task.identity()


@pytest.mark.parametrize(
    "text, words",
    [("task: [", "cannot read the task file"), ("a: 1", "no line 'task: name'"), (CHOICE, "does not exist")],
)
def test_bad_task_files_are_refused(tmp_path: Path, text: str, words: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        LmEval("bad", str(tmp_path / "bad.yaml")).check()


def test_no_items_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="limit=0"):
        replace(write_task(tmp_path, "choice", CHOICE, QUESTIONS), limit=0).check()


def test_completions_come_in_order_and_do_not_depend_on_company(llm: LLM, reference):
    prompts = [f"def f{i}(x):" for i in range(12)]
    settings = {"max_tokens": 6, "stop": [], "timeout_s": 60}
    together = complete(llm, prompts, **settings)
    assert together == complete(replace(llm, concurrency=1), prompts, **settings)
    assert [done.text for done in together] == [greedy(reference, prompt, 6) for prompt in prompts]
    assert {done.finish_reason for done in together} == {"length"}


def test_completions_stop_before_a_stop_sequence(llm: LLM, reference):
    text = greedy(reference, "abc", 6)
    (done,) = complete(llm, ["abc"], max_tokens=6, stop=[text[3]], timeout_s=60)
    assert done.text == text[: text.index(text[3])]
    assert done.finish_reason == "stop"


def test_a_server_that_allows_few_stop_sequences_gives_the_same_completions(llm: LLM):
    stop = [*"abcdefgh", "\nxyz"]
    prompts = [f"def f{i}(x):" for i in range(12)]
    settings = {"max_tokens": 24, "stop": stop, "timeout_s": 60}
    few = complete(replace(llm, max_stops=4), prompts, **settings)
    assert few == complete(llm, prompts, **settings)
    assert "stop" in {done.finish_reason for done in few}, "some sequence occurs, or this shows nothing"


def test_identity_is_what_determines_the_score_and_not_where_it_lies(tmp_path: Path):
    def write(folder: Path, **changes: str) -> LmEval:
        texts = {
            "base.yaml": "output_type: multiple_choice\ndataset_path: json\n",
            "task.yaml": "include: base.yaml\ntask: t\ndoc_to_text: !function code.text\n"
            "dataset_kwargs: {data_files: {test: [a/d.jsonl, b/d.jsonl]}}\n",
            "code.py": "def text(doc): return doc['q']\n",
            "a/d.jsonl": "{}\n",
            "b/d.jsonl": "{}\n",
            "unrelated.py": "",
        }
        for name, text in {**texts, **changes}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return LmEval("t", str(folder / "task.yaml"))

    plain = write(tmp_path / "0").identity()
    assert write(tmp_path / "1", **{"unrelated.py": "x = 1"}).identity() == plain
    for number, name in enumerate(("base.yaml", "code.py", "a/d.jsonl", "b/d.jsonl"), 2):
        changed = {name: '{"q": 1}\n' if name.endswith("jsonl") else "output_type: x\n" if "yaml" in name else "#"}
        assert write(tmp_path / str(number), **changed).identity() != plain, name


def test_a_refused_completion_fails_with_the_servers_words(llm: LLM):
    with pytest.raises(StageError, match=r"refused a request \(400\).*256"):
        complete(llm, ["a", "b"], max_tokens=999, stop=[], timeout_s=60)


def test_evalplus_completes_and_judges_every_problem(llm: LLM, tmp_path: Path):
    task = EvalPlus("code", "humaneval", "tasks/tiny/data/tiny_code.jsonl", limit=6, max_tokens=16)
    task.check()
    score = task.score(llm, tmp_path)
    assert {name: (metric.value, metric.n) for name, metric in score.metrics.items()} == {
        "base_pass@1": (0.0, 6),
        "plus_pass@1": (0.0, 6),
    }
    assert len(score.samples) == 6
    assert score.counts["empty"] == 0
    assert score.counts["length_capped"] == sum(sample["finish_reason"] == "length" for sample in score.samples)
    assert set(score.samples[0]) == {
        *("task_id", "completion", "solution", "base_status", "plus_status", "finish_reason")
    }
    json.dumps(list(score.samples))


def test_importing_tasks_imports_nothing_heavy():
    code = (
        "import sys, tasks.lm_harness, tasks.evalplus_code, tasks.completions, harness.serve\n"
        "print([name for name in ('torch', 'vllm', 'lm_eval', 'evalplus', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text, loops",
    [
        ("", False),
        ("a" * 39, False),
        ("start " + "a" * 40, True),
        ("    return x\n" * 4, True),
        ("    return x\n" * 3 + "    return y\n", False),
        ("x = 1\n" * 50 + "done", False),
        ("1 + 1 = 2, so " * 4, True),
    ],
)
def test_an_answer_that_ends_in_repetitions_is_a_loop(text: str, loops: bool) -> None:
    assert is_looping(text) == loops
