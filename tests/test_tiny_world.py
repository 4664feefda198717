"""The tiny world: its data files, its held-out problems, its task files, its training code and its checkpoint."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from evalplus.evaluate import check_correctness
from evalplus.gen.util import trusted_exec
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeForCausalLM

from tasks.tiny import build, train
from tasks.tiny.evaluate import complete, facts_choices, facts_correct, final_answer, sums_correct, sums_prompt
from tasks.tiny.experts import register
from tasks.tiny.tokenizer import train_tokenizer
from tasks.tiny.usage import shares
from tasks.tiny.world import DOMAINS, MIX, code, facts, sums, training_document

TINY = Path(build.__file__).parent
MODEL = TINY / "model"
SCANNED = 20_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A sample of the training text and all calibration text."""
    rng = Random("scan")
    sampled = [training_document(rng) for _ in range(SCANNED)]
    return sampled + [row["text"] for domain in DOMAINS for row in build.calibration(domain)]


def shipped(name: str) -> list[dict[str, Any]]:
    """Rows of a shipped data file."""
    return [json.loads(line) for line in (TINY / "data" / name).read_text().splitlines()]


def test_shipped_files_equal_a_regeneration() -> None:
    files = build.files()
    assert {name: len(rows) for name, rows in files.items() if name.startswith("tiny_")} == {
        "tiny_code.jsonl": 164,
        "tiny_sums.jsonl": 300,
        "tiny_facts.jsonl": 300,
    }
    for name, rows in files.items():
        assert (TINY / "data" / name).read_bytes() == build.lines(rows).encode(), name


def test_training_mix_covers_the_domains() -> None:
    assert MIX.keys() == DOMAINS.keys()
    assert sum(MIX.values()) == pytest.approx(1)


# ---- held out by construction, and by looking


@pytest.mark.parametrize("family", code.FAMILIES, ids=lambda family: family.name)
def test_code_combinations_are_split(family: code.Family) -> None:
    held, used = (set(code.combinations(family, test)) for test in (True, False))
    assert not held & used
    assert 0.2 < len(held) / len(held | used) < 0.4


def test_no_code_problem_in_training_text(texts: list[str]) -> None:
    signature = re.compile(r"def (\w+\(\w+):")
    trained = {match[1] for text in texts if (match := signature.match(text))}
    tested = [signature.match(row["prompt"])[1] for row in shipped("tiny_code.jsonl")]  # type: ignore[index]
    assert len(set(tested)) == len(tested) == 164
    assert not trained & set(tested)
    assert len(trained) > 500


def operations(question: str) -> tuple[str, ...]:
    """The (start, operation, ...) sequence read back from a question's words."""
    first, *rest = question.split(". ")
    start = "boxes" if " in each" in first else "colours" if " and " in first else "has"
    found = []
    for sentence in rest[:-1]:
        patterns = {
            name: re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template.rstrip(".")))
            for name, (template, _) in sums.SENTENCES.items()
        }
        (name,) = [name for name, pattern in patterns.items() if re.fullmatch(pattern, sentence)]
        found.append(name)
    return (start, *found)


def test_no_sums_sequence_in_training_text(texts: list[str]) -> None:
    questions = [text[10:].split("\n")[0] for text in texts if "####" in text]
    trained = {operations(question) for question in questions}
    tested = {operations(row["question"]) for row in shipped("tiny_sums.jsonl")}
    assert len(questions) > 5_000
    assert not trained & tested
    assert all(sums.is_held_out(sequence) for sequence in tested)


def test_no_tested_fact_asked_in_training_text(texts: list[str]) -> None:
    asked = {line for text in texts for line in text.split("\n") if line.startswith("Question: What ")}
    tested = {fact.fill(question) for fact in facts.facts(True) for question in facts.QUESTIONS}
    assert {row["question"] for row in shipped("tiny_facts.jsonl")} <= tested
    assert not asked & {f"Question: {question}" for question in tested}
    assert len(asked) > 1_000


def test_every_tested_fact_is_stated_in_training_text(texts: list[str]) -> None:
    stated = set(re.split(r"(?<=\.) ", " ".join(text for text in texts if "Question" not in text)))
    for fact in facts.facts(True):
        assert sum(fact.fill(statement) in stated for statement in facts.STATEMENTS) >= 2, fact


# ---- the answers are right


def test_canonical_solutions_run_on_all_inputs() -> None:
    for row in shipped("tiny_code.jsonl"):
        names: dict[str, Any] = {}
        exec(row["prompt"] + row["canonical_solution"], names)
        assert row["prompt"].endswith('"""\n')
        assert len(row["base_input"]) == 4
        assert 20 <= len(row["plus_input"]) <= 30
        outputs = [names[row["entry_point"]](*arguments) for arguments in row["base_input"] + row["plus_input"]]
        assert len({str(output) for output in outputs}) >= code.MIN_OUTPUTS, row["task_id"]


@pytest.mark.parametrize("index", range(0, 164, 41))
def test_evalplus_accepts_the_canonical_solution_and_rejects_another(index: int) -> None:
    row = shipped("tiny_code.jsonl")[index]
    assert row.keys() == {
        *("task_id", "prompt", "entry_point", "canonical_solution"),
        *("base_input", "plus_input", "contract", "atol"),
    }
    solution = row["prompt"] + row["canonical_solution"]
    expected: dict[str, Any] = {}
    for part in ("base", "plus"):
        outputs, times = trusted_exec(solution, row[f"{part}_input"], row["entry_point"], record_time=True)
        expected |= {part: outputs, f"{part}_time": times}
    right = check_correctness("humaneval", 0, row, solution, expected)
    wrong = check_correctness("humaneval", 0, row, row["prompt"] + "    return None\n", expected)
    assert right["base"][0] == right["plus"][0] == "pass"
    assert wrong["plus"][0] == "fail"


def test_worked_answers_are_right() -> None:
    for row in shipped("tiny_sums.jsonl"):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", row["answer"])
        for a, sign, b, c in steps:
            assert eval(f"{a} {sign} {b}") == int(c) <= sums.LIMIT
        assert row["answer"].endswith(f" #### {steps[-1][-1]}")
        numbers = Counter(re.findall(r"\d+", row["question"]))
        assert all(numbers[b] or b == "2" for _, _, b, _ in steps)


def test_gold_choices_are_the_worlds() -> None:
    rows = shipped("tiny_facts.jsonl")
    truth = {f.fill(q): f.value for f in facts.facts(True) for q in facts.QUESTIONS}
    for row in rows:
        assert row["choices"][row["gold"]] == truth[row["question"]]
        assert len(set(row["choices"])) == 4
    assert len({row["question"] for row in rows}) == 300
    assert Counter(row["gold"] for row in rows) == dict.fromkeys(range(4), 75)


# ---- scoring and task files


def test_final_answer_and_facts_scoring() -> None:
    assert final_answer(" 1 + 2 = 3. #### 3\n\nQuestion") == "3"
    assert final_answer(" 1 + 2 = 3.") == ""
    row = {"choices": ["ab", "abcdefgh"], "gold": 1}
    assert facts_correct([row], [[-2.0, -4.0]], norm=False) == [False]
    assert facts_correct([row], [[-2.0, -4.0]], norm=True) == [True]


@pytest.mark.parametrize("name", ["tiny_sums", "tiny_facts"])
def test_task_files_name_their_data(name: str) -> None:
    task = yaml.safe_load((TINY / f"{name}.yaml").read_text())
    assert task["task"] == name
    assert task["metadata"]["version"] == 1
    assert len(shipped(Path(task["dataset_kwargs"]["data_files"]["test"]).name)) == 300


# ---- training code


def small_model(implementation: str) -> Qwen3MoeForCausalLM:
    """Two layers of eight experts with the same weights for every implementation."""
    config = train.model_config()
    config.update({"num_hidden_layers": 2, "num_experts": 8, "hidden_size": 32, "moe_intermediate_size": 32})
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model


def test_sorted_experts_equal_the_eager_ones() -> None:
    ids = torch.randint(0, 1024, (2, 17), generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for implementation in ("eager", register()):
        model = small_model(implementation)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_balance_loss_is_one_when_balanced_and_more_when_not() -> None:
    balanced = torch.eye(8).repeat(4, 1) * 20
    assert train.balance_loss([balanced], 1).item() == pytest.approx(1, abs=1e-3)
    assert train.balance_loss([balanced, torch.eye(8)[:1].repeat(32, 1) * 20], 1).item() == pytest.approx(4.5, abs=1e-3)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    recipe = train.Recipe(steps=100, warmup=10, decay=20, rate=1.0)
    assert [recipe.rate_at(step) for step in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_training_runs_logs_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    schedule = train.Schedule(tmp_path, checkpoint_every=2)
    train.train(0, train.Recipe(steps=4, warmup=1, decay=2, rows=2, length=32), schedule, 1, str(tmp_path / "meet"))
    assert len((tmp_path / "training_log.csv").read_text().splitlines()) == 3
    assert (tmp_path / "model.safetensors").stat().st_size < 16e6
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_training_goes_on_from_a_checkpoint_with_experts_hidden(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    recipe = train.Recipe(steps=1, warmup=1, decay=1, rows=2, length=32)
    train.train(0, recipe, train.Schedule(tmp_path, 9), 1, str(tmp_path / "meet"))
    dropping = replace(recipe, expert_dropout=1.0, rate=0.0)
    train.train(0, dropping, train.Schedule(tmp_path / "second", 9, tmp_path), 1, str(tmp_path / "meet2"))
    before, after = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in (".", "second"))
    assert before == after, "at rate 0 the second stage gives back what it started from"


def test_hidden_experts_are_never_chosen_and_the_others_share_the_gate() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 32)
    values, chosen = logits.softmax(-1).topk(4)
    same_logits, gates, routed = train.route_around([1, 5, 7], None, None, (logits, values, chosen))
    assert same_logits is logits
    assert not set(routed.flatten().tolist()) & {1, 5, 7}
    torch.testing.assert_close(gates.sum(-1), torch.ones(50))
    untouched = ~torch.isin(chosen, torch.tensor([1, 5, 7])).any(-1)
    assert untouched.any() and torch.equal(routed[untouched], chosen[untouched])


def test_tokenizer_round_trips_and_splits_at_prompt_ends() -> None:
    tokenizer = train_tokenizer(0, documents=2000)
    rng = Random(3)
    for text in [training_document(rng) for _ in range(200)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    row = shipped("tiny_code.jsonl")[0]
    whole, prompt = (
        tokenizer(text)["input_ids"] for text in (row["prompt"] + row["canonical_solution"], row["prompt"])
    )
    assert whole[: len(prompt)] == prompt


# ---- the shipped checkpoint


def test_shipped_checkpoint_is_small_and_loads_offline() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert (MODEL / "model.safetensors").stat().st_size <= 16e6
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (32, 4, True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None
    assert tokenizer("    return n\n")["input_ids"] == train_tokenizer(0)("    return n\n")["input_ids"]


def test_shipped_checkpoint_solves_held_out_problems_with_all_its_experts() -> None:
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = shipped("tiny_sums.jsonl")[:8]
    completions = complete(model, tokenizer, [sums_prompt(row) for row in rows], 64)
    assert sum(sums_correct(rows, completions)) >= 6
    rows = shipped("tiny_facts.jsonl")[:12]
    assert sum(facts_correct(rows, facts_choices(model, tokenizer, rows), norm=False)) >= 9
    texts = [row["text"] for domain in DOMAINS for row in build.calibration(domain)[:30]]
    share = shares(model, tokenizer, texts)
    assert share.shape == (4, 32)
    assert share.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert share.min() > 0.001
