"""Score the tiny model with plain transformers on its three test sets; no server needed.

    python -m tasks.tiny.evaluate --model tasks/tiny/model --dtype bfloat16

Greedy decoding; generated functions run in EvalPlus's sandboxed processes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from evalplus.evaluate import check_correctness
from evalplus.gen.util import trusted_exec
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
BATCH = 32
CausalLM = Any  # transformers has no type for a model that both returns logits and generates


def load_rows(name: str) -> list[dict[str, Any]]:
    """The rows of data/NAME.jsonl."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


@torch.no_grad()
def complete(model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy completion of each prompt up to the end token, without it."""
    texts: list[str] = []
    for batch in _batches(prompts):
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def sums_prompt(row: dict[str, Any]) -> str:
    """The prompt of one tiny_sums row, as in tiny_sums.yaml."""
    return f"Question: {row['question']}\nAnswer:"


def final_answer(text: str) -> str:
    """What stands after `####`, up to the line's end; "" without it."""
    return text.partition("####")[2].strip().split("\n")[0].strip()


def sums_correct(rows: Sequence[dict[str, Any]], completions: Sequence[str]) -> list[bool]:
    """Whether each completion ends in its row's final answer."""
    return [final_answer(text) == final_answer(row["answer"]) for row, text in zip(rows, completions, strict=True)]


def code_correct(rows: Sequence[dict[str, Any]], completions: Sequence[str]) -> list[bool]:
    """Whether each completion passes base and plus inputs, run in EvalPlus's own sandboxed processes."""
    passed = []
    for row, text in zip(rows, completions, strict=True):
        solution, entry = row["prompt"] + row["canonical_solution"], row["entry_point"]
        expected: dict[str, Any] = {}
        for part in ("base", "plus"):
            expected[part], expected[f"{part}_time"] = trusted_exec(
                solution, row[f"{part}_input"], entry, record_time=True
            )
        result = check_correctness("humaneval", 0, row, row["prompt"] + text, expected)
        passed.append(result["base"][0] == "pass" and result["plus"][0] == "pass")
    return passed


@torch.no_grad()
def facts_choices(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> list[list[float]]:
    """The log-likelihood of every choice as a continuation of its question, [row][choice]."""
    scores = []
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        inputs = tokenizer([f"{prompt} {c}" for c in row["choices"]], return_tensors="pt", padding=True)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logp = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        picked = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        scores.append(picked[:, start - 1 :].sum(-1).tolist())
    return scores


def facts_correct(rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]], norm: bool) -> list[bool]:
    """acc (norm=False) or acc_norm (log-likelihood per byte of the choice) of each row, as the harness defines them."""
    correct = []
    for row, values in zip(rows, scores, strict=True):
        scaled = [v / len(c) if norm else v for v, c in zip(values, row["choices"], strict=True)]
        correct.append(scaled.index(max(scaled)) == row["gold"])
    return correct


def evaluate(model: CausalLM, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> dict[str, Any]:
    """Scores in [0, 1] on the first `limit` problems of each test set, and the greedy completions themselves."""
    model.eval()
    sums, code, facts = (load_rows(f"tiny_{name}")[:limit] for name in ("sums", "code", "facts"))
    sums_text = complete(model, tokenizer, [sums_prompt(row) for row in sums], 96)
    code_text = complete(model, tokenizer, [row["prompt"] for row in code], 96)
    scores = facts_choices(model, tokenizer, facts)
    results = {
        "tiny_code": code_correct(code, code_text),
        "tiny_sums": sums_correct(sums, sums_text),
        "tiny_facts_acc": facts_correct(facts, scores, norm=False),
        "tiny_facts_acc_norm": facts_correct(facts, scores, norm=True),
    }
    summary = {name: sum(rows) / len(rows) for name, rows in results.items()}
    return {"scores": summary, "sums": sums_text, "code": code_text, "facts": scores}


def main() -> None:
    """Print the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--limit", type=int, help="problems per test set (default: all)")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    print(json.dumps(evaluate(model, AutoTokenizer.from_pretrained(options.model), options.limit)["scores"], indent=1))


if __name__ == "__main__":
    main()
