"""The tiny world: its data files, its held-out problems, its task files, its training code and its checkpoint."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evalplus.evaluate import check_correctness
from evalplus.gen.util import trusted_exec
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeForCausalLM

from harness import usage
from harness.sweep import expand
from tasks.tiny import build, train
from tasks.tiny.evaluate import complete, facts_choices, facts_correct, final_answer, sums_correct, sums_prompt
from tasks.tiny.experts import register
from tasks.tiny.tokenizer import train_tokenizer
from tasks.tiny.world import DOMAINS, MIX, code, facts, recipes, records, sums, tongue, training_document

TINY = Path(build.__file__).parent
MODEL = TINY / "model"
SCANNED = 20_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A sample of the training text and all calibration text."""
    rng = Random("scan")
    sampled = [training_document(rng)[1] for _ in range(SCANNED)]
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


def test_every_domain_is_told_apart_in_the_training_text() -> None:
    rng = Random("domains")
    drawn = Counter(training_document(rng)[0] for _ in range(2_000))
    assert {name: drawn[name] / 2_000 for name in MIX} == pytest.approx(MIX, abs=0.05)


@pytest.mark.parametrize("module", [records, recipes, tongue], ids=lambda module: module.__name__.split(".")[-1])
def test_the_domains_without_tests_are_text_of_their_own(module: Any) -> None:
    rng = Random(0)
    documents = [module.document(rng) for _ in range(200)]
    assert len(set(documents)) > 190
    assert not any(word in text for text in documents for word in ("def ", "Question:", "####"))


def test_records_agree_with_themselves() -> None:
    rng = Random(1)
    found = Counter()
    for record in [json.loads(line) for _ in range(200) for line in records.document(rng).splitlines()]:
        if "order" in record:
            assert record["total"] == sum(line["count"] * line["price"] for line in record["lines"])
        elif "sensor" in record:
            assert record["maximum"] == max(record["values"]) and record["alarm"] == (
                record["maximum"] > record["limit"]
            )
        else:
            assert record["until"] == record["from"] + record["nights"]
        found[next(iter(record))] += 1
    assert min(found.values()) > 50 and len(found) == 3


@pytest.mark.parametrize("family", code.FAMILIES, ids=lambda family: family.name)
def test_code_combinations_are_split(family: code.Family) -> None:
    held, used = (set(code.combinations(family, test)) for test in (True, False))
    assert not held & used
    assert 0.2 < len(held) / len(held | used) < 0.4


def steps_of(function: str) -> tuple[str, ...]:
    """What a function does, whatever its constants and wording: its argument and the lines of its body."""
    head, body = function.split('"""\n', 1)
    return (head[head.index("(") : head.index(")")], *(re.sub(r"\b[2-9]\b", "k", line) for line in body.splitlines()))


def test_no_code_problem_in_training_text(texts: list[str]) -> None:
    trained = {steps_of(text) for text in texts if text.startswith("def ")}
    tested = [steps_of(row["prompt"] + row["canonical_solution"]) for row in shipped("tiny_code.jsonl")]
    assert len(set(tested)) == len(tested) == 164
    assert not trained & set(tested)
    assert len(trained) > 1_000


def test_a_functions_name_does_not_tell_all_its_steps() -> None:
    long = [row for row in shipped("tiny_code.jsonl") if len(row["canonical_solution"].splitlines()) > 3]
    assert len(long) > 30
    assert all(row["entry_point"].count("_") <= 3 for row in long)


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


@pytest.mark.slow
def test_training_runs_logs_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    recipe = train.Recipe(steps=4, warmup=1, decay=2, rows=2, length=32)
    train.train(0, recipe, tmp_path, 2, 1, str(tmp_path / "meet"))
    assert len((tmp_path / "training_log.csv").read_text().splitlines()) == 3
    assert (tmp_path / "model.safetensors").stat().st_size < 16e6
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_every_token_of_a_batch_knows_its_domain() -> None:
    tokenizer = train_tokenizer(0, documents=2000)
    ids, domains = train.batch(train.Recipe(rows=24), 0, tokenizer)
    assert ids.shape == domains.shape == (24, 257)
    seen = {}
    for row, origin in zip(ids.tolist(), domains.tolist(), strict=True):
        start = row.index(tokenizer.eos_token_id)
        assert len(set(origin[: start + 1])) == 1, "a document is of one domain, its end token included"
        seen[list(DOMAINS)[origin[0]]] = tokenizer.decode(row[:start])
    assert seen["code"].startswith("def ") and "####" in seen["sums"] and "####" not in seen["facts"]


def test_spread_loss_is_what_a_domain_spreads_beyond_its_share() -> None:
    """Domain 0 on 4 experts evenly, domain 1 on all 16: ln 4 and ln 16 nats, over a bound of ln 4; others absent."""
    few, all_of_them = torch.full((4, 16), -50.0), torch.zeros(6, 16)
    few[:, :4] = 0
    domains = torch.tensor([0] * 4 + [1] * 6)
    loss = train.spread_loss([torch.cat([few, all_of_them])], domains, domain_experts=4)
    assert loss.item() == pytest.approx(math.log(4) / len(DOMAINS), abs=1e-5)
    assert train.spread_loss([torch.cat([few, all_of_them])], domains, domain_experts=16).item() == pytest.approx(0)


def test_spread_loss_draws_a_domain_together() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 16, requires_grad=True)
    domains = torch.arange(64) % 2
    before = train.spread_loss([logits], domains, 4)
    before.backward()
    with torch.no_grad():
        after = train.spread_loss([logits - 5 * logits.grad], domains, 4)
    assert after < before


def test_skipped_experts_are_replaced_by_the_next_best() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4_000, 32)
    values, chosen = logits.softmax(-1).topk(4)
    _, gates, same = train.SkipExperts(0.0)(None, None, (logits, values, chosen))  # type: ignore[arg-type]
    assert torch.equal(same, chosen)
    torch.testing.assert_close(gates, values / values.sum(-1, keepdim=True))
    _, gates, routed = train.SkipExperts(0.1)(None, None, (logits, values, chosen))  # type: ignore[arg-type]
    torch.testing.assert_close(gates.sum(-1), torch.ones(4_000))
    lost = ~(chosen[:, :, None] == routed[:, None, :]).any(-1)
    assert lost.float().mean().item() == pytest.approx(0.1, abs=0.01)
    order = logits.argsort(descending=True)
    untouched = ~lost.any(-1)
    assert torch.equal(routed[untouched], chosen[untouched])
    one = lost.sum(-1) == 1
    pairs = zip(routed[one].tolist(), chosen[one].tolist(), strict=True)
    newcomer = torch.tensor([(set(new) - set(old)).pop() for new, old in pairs])
    assert (newcomer == order[one, 4]).float().mean() > 0.8, "the fifth best steps in, unless it is skipped itself"


def test_tokenizer_round_trips_and_splits_at_prompt_ends() -> None:
    tokenizer = train_tokenizer(0, documents=2000)
    rng = Random(3)
    for _, text in [training_document(rng) for _ in range(200)]:
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


def test_shipped_checkpoint_uses_every_expert_and_sends_domains_to_different_ones() -> None:
    cells = {name: expand([f"calibration=tiny_{name}", "calibration.sequences=16"]).cells[0] for name in DOMAINS}
    sets = [
        usage._count(cell, cell.calibration.tokens(cell.model)[: cell.calibration.sequences]) for cell in cells.values()
    ]
    even = np.mean([usage.shares(counted) for counted in sets], axis=0)
    assert even.shape == (4, 32) and even.min() > 0.001
    control = usage.mean_divergence(usage.shuffled(sets, np.random.default_rng(0)))
    assert usage.mean_divergence(sets) > 3 * control
