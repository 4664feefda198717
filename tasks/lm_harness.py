"""Tasks of EleutherAI's lm-evaluation-harness, run by it against the served model.

The harness builds prompts, sends them (token ids, through its own ``local-completions`` client), filters answers and
computes metrics. We guard what it lets through: not-a-number log-likelihoods, which score perfectly, and lost items.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness.errors import StageError, UserError
from tasks import FLOOR, LLM, Item, Metric, Score, is_log_prob
from tasks.completions import degenerate_texts
from tasks.lm_task import ROOT, TaskFile, task_paths

SEED = 1234


@dataclass(frozen=True)
class LmEval:
    """One benchmark of lm-eval.

    task_file: a YAML file of ours (absolute, or relative to the project; its ``data_files`` are relative to its own
    folder), or one that lm-eval ships, as ``lm_eval:arc/arc_easy.yaml``. A pattern with ``*`` names several subtasks
    (MMLU), scored together: the mean over all their items.
    metrics: those to report; all if left out. num_fewshot: worked examples, instead of the file's number.
    data_dir: local copies instead of the hub's data, ``lm_eval/<copy>/<split>.jsonl``; ``copy`` may hold
    ``{dataset_name}``. limit: score only the first items (of each subtask).
    batch_size: prompts per request; as many requests are in flight as fill the server's batch.
    """

    name: str
    task_file: str
    metrics: tuple[str, ...] | None = None
    num_fewshot: int | None = None
    data_dir: str | None = None
    copy: str | None = None
    limit: int | None = None
    batch_size: int = 8
    timeout_s: int = 600

    def check(self) -> None:
        """Raise UserError if lm-eval, the task file or its data is missing, or the file cannot be read."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"{self.name}: lm-eval is not installed (pip install lm-eval[api]).")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.name}: limit={self.limit} leaves no items. Leave it out to score all.")
        for file in self._files:
            file.check()

    @property
    def kind(self) -> str:
        """By lm-eval's ``output_type``."""
        generates = self._files[0].config["output_type"] == "generate_until"
        return "generation" if generates else "multiple choice"

    def identity(self) -> dict[str, Any]:
        """lm-eval's version, the task files and their local data by content, and the number of items."""
        return {
            "lm_eval": importlib.metadata.version("lm_eval"),
            "limit": self.limit,
            "metrics": self.metrics,
            "tasks": [file.identity() for file in self._files],
        }

    def score(self, llm: LLM, workdir: Path) -> Score:
        """Run the task. Raises StageError if a request fails for good, an item is lost or a number is not finite."""
        if all(file.data_files for file in self._files):
            for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
                os.environ.setdefault(variable, "1")
        client = _client(llm, self.batch_size, self.timeout_s)
        return self.evaluate(client, workdir)

    def items(self, samples: Sequence[Mapping[str, Any]]) -> list[Item]:
        """One for each document; metrics of several filters together, named as in the score."""
        kinds = Counter(metric for kind in {row["filter"]: row for row in samples}.values() for metric in _worth(kind))
        values: dict[str, dict[str, float]] = defaultdict(dict)
        first: dict[str, Mapping[str, Any]] = {}
        for row in samples:
            name = f"{row['task']}/{row['doc_id']}"
            first.setdefault(name, row)
            for metric, value in _worth(row).items():
                values[name][metric if kinds[metric] == 1 else f"{metric}:{row['filter']}"] = float(value)
        return [Item(name, row["prompt"], *_answers(row), values[name]) for name, row in first.items()]

    def evaluate(self, model: Any, workdir: Path) -> Score:
        """Score a model given as an object of lm-eval, served or not: the same items, prompts, filters and metrics."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        try:
            with _without_detours():
                found = simple_evaluate(
                    model=model,
                    tasks=[file.loaded(workdir / "datasets") for file in self._files],
                    task_manager=TaskManager(include_defaults=False),
                    limit=self.limit,
                    log_samples=True,
                    random_seed=0,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                )
        except _AnswerError as error:
            raise StageError(f"{self.name}: {error}") from error
        except Exception as error:
            raise StageError(f"{self.name}: lm-eval failed: {type(error).__name__}: {error}") from error
        return self._checked(found, getattr(model, "capped", 0), getattr(model, "answering_s", 0.0))

    @cached_property
    def _files(self) -> list[TaskFile]:
        data_dir = None if self.data_dir is None else (ROOT / self.data_dir).resolve()
        return [
            TaskFile(self.name, path, self.num_fewshot, data_dir, self.copy or self.name)
            for path in task_paths(self.name, self.task_file)
        ]

    def _checked(self, found: Any, capped: int, answering_s: float) -> Score:
        whole = sum(self._check_complete(file, found) for file in self._files)
        samples = [{**sample, "task": task} for task, rows in found["samples"].items() for sample in rows]
        _check_finite(self.name, samples)
        by_filter = defaultdict(list)
        for sample in samples:
            by_filter[sample["filter"]].append(sample)
        metrics = _metrics(found, by_filter)
        if self.metrics is not None:
            if missing := set(self.metrics) - set(metrics):
                raise StageError(f"{self.name} gave no {', '.join(sorted(missing))}, only {', '.join(metrics)}.")
            metrics = {name: metrics[name] for name in self.metrics}
        rows = [_row(sample) for sample in samples]
        return Score(metrics, rows, _counts(by_filter, capped), answering_s, whole)

    def _check_complete(self, file: TaskFile, found: Any) -> int:
        """How many items the benchmark has. Raises StageError unless each that was to be scored was, once by each
        filter.
        """
        task = file.config["task"]
        number = found["n-samples"][task]
        whole = file.count(number["original"])
        expected = min(whole, self.limit or whole)
        by_filter: dict[str, Counter[int]] = defaultdict(Counter)
        for sample in found["samples"][task]:
            by_filter[sample["filter"]][sample["doc_id"]] += 1
        for kind, times in (by_filter or {"no filter": Counter()}).items():
            if twice := [item for item, count in times.items() if count > 1]:
                raise StageError(f"{self.name}: item {twice[0]} of {task} was scored {times[twice[0]]} times ({kind}).")
            if not len(times) == number["effective"] == expected:
                raise StageError(
                    f"{self.name}: {len(times)} of {expected} items of {task} were scored ({kind}). A score of some is "
                    "not the benchmark's."
                )
        return whole


@contextmanager
def _without_detours() -> Iterator[None]:
    """Spare what lm-eval does besides: it lists the machine's packages after each task (0.6 s; our provenance has the
    versions) and compiles a template anew for every item (a third of the time of 300 short generations).
    """
    from lm_eval import evaluator
    from lm_eval.utils import env

    compiled = functools.cache(env.from_string)
    with patch.object(evaluator, "add_env_info", lambda found: None), patch.object(env, "from_string", compiled):
        yield


def _client(llm: LLM, batch_size: int, timeout_s: int) -> Any:
    """lm-eval's own client for OpenAI-compatible servers, which also counts the generations cut at their limit and
    times the requests.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Client(LocalCompletionsAPI):
        api_key = ""  # not OPENAI_API_KEY: it would go to whatever server this is, and into logs of what it refuses
        capped = 0
        answering_s = 0.0

        def generate_until(self, *arguments: Any, **named: Any) -> list[str]:
            with self._timed():
                return super().generate_until(*arguments, **named)

        def _loglikelihood_tokens(self, *arguments: Any, **named: Any) -> list[tuple[float, bool]]:
            with self._timed():
                return super()._loglikelihood_tokens(*arguments, **named)

        @contextmanager
        def _timed(self) -> Iterator[None]:
            start = time.perf_counter()
            yield
            self.answering_s += time.perf_counter() - start

        async def amodel_call(self, session: Any, sem: Any, messages: Any, **named: Any) -> Any:
            answers = await super().amodel_call(session, sem, messages, **named)
            if len(answers) != len(messages):
                raise _AnswerError(f"The server answered {len(answers)} of {len(messages)} prompts of a request.")
            return answers

        def parse_generations(self, outputs: Any, **arguments: Any) -> list[str]:
            self.capped += _count_capped(_choices(outputs))
            return LocalCompletionsAPI.parse_generations(outputs, **arguments)

        def parse_logprobs(self, outputs: Any, tokens: Any = None, ctxlens: Any = None, **arguments: Any) -> Any:
            choices = _choices(outputs)
            if len(choices) != len(tokens):
                raise _AnswerError(f"The server answered {len(choices)} of {len(tokens)} prompts of a request.")
            for choice, ids, context in zip(choices, tokens, ctxlens, strict=True):
                _check_log_probs(choice["logprobs"], len(ids), context)
            return LocalCompletionsAPI.parse_logprobs(outputs, tokens, ctxlens, **arguments)

    client = Client(
        base_url=f"{llm.url}/v1/completions",
        model=llm.model,
        tokenizer=llm.tokenizer,
        tokenizer_backend="huggingface",
        trust_remote_code=llm.runs_code,
        tokenized_requests=True,
        max_length=llm.max_model_len,
        # At least two: its path for one request at a time obeys proxy variables.
        num_concurrent=max(2, -(-llm.concurrency // batch_size)),
        batch_size=batch_size,
        max_retries=3,
        timeout=timeout_s,
    )
    first = client.tokenizer("a").input_ids[:1]
    client.add_bos_token = client.tokenizer.bos_token_id is not None and first == [client.tokenizer.bos_token_id]
    return client


class _AnswerError(BaseException):
    """An answer that cannot be scored. Not an Exception, after each of which lm-eval asks again: the server would only
    say the same.
    """


def _choices(outputs: Any) -> list[dict[str, Any]]:
    """What a server answered, in the order of the prompts. Raises _AnswerError unless each has one answer."""
    replies = outputs if isinstance(outputs, list) else [outputs]
    choices = [choice for reply in replies for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise _AnswerError(f"The server numbered its answers {[choice['index'] for choice in choices]}.")
    return choices


def _count_capped(choices: Sequence[Mapping[str, Any]]) -> int:
    """Generations cut at their limit. Raises _AnswerError for one that was broken off or has no text, in whose place
    lm-eval would score a placeholder.
    """
    for choice in choices:
        if choice["finish_reason"] not in ("stop", "length"):
            raise _AnswerError(f"The server broke a generation off: finish_reason {choice['finish_reason']!r}.")
        if not isinstance(choice["text"], str):
            raise _AnswerError(f"The server answered with the text {choice['text']!r}.")
    return sum(choice["finish_reason"] == "length" for choice in choices)


def _check_log_probs(found: Any, tokens: int, context: int) -> None:
    """Raise _AnswerError unless the answer has the log-probability of every token behind the context, and of the one
    more that was asked for: lm-eval cuts off the last, whatever it is.
    """
    values = (found or {}).get("token_logprobs") or []
    if len(values) != tokens + 1:
        raise _AnswerError(f"The server gave {len(values)} log-probabilities for {tokens} tokens and one more.")
    for value in values[context:tokens]:
        if not is_log_prob(value):
            raise _AnswerError(
                f"The server gave a token the log-probability {value}, which is none (vLLM writes {FLOOR} for minus "
                "infinity). The model's weights are damaged or overflow."
            )


def _check_finite(name: str, samples: Iterable[Mapping[str, Any]]) -> None:
    for sample in samples:
        for value in _numbers(sample["resps"]):
            if not math.isfinite(value):
                raise StageError(f"{name}: item {sample['doc_id']} has the log-likelihood {value}.")


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


def _metrics(found: Any, by_filter: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Metric]:
    """lm-eval's ``metric,filter`` as ``metric``; as ``metric:filter`` where several filters give one metric.

    Over several subtasks: the mean weighted by their numbers of items, as lm-eval's groups define it.
    """
    results = found["results"]
    sizes = {task: number["effective"] for task, number in found["n-samples"].items()}
    first = next(iter(sizes))
    keys = [key for key in results[first] if "," in key and "_stderr," not in key]
    several = Counter(key.split(",")[0] for key in keys)
    metrics = {}
    for key in keys:
        metric, kind = key.split(",")
        rows = by_filter[kind]
        error = results[first].get(f"{metric}_stderr,{kind}") if len(sizes) == 1 else None
        if not isinstance(error, float) or not math.isfinite(error):
            error = _standard_error([row[metric] for row in rows])
        name = metric if several[metric] == 1 else f"{metric}:{kind}"
        value = sum(results[task][key] * size for task, size in sizes.items()) / sum(sizes.values())
        metrics[name] = Metric(float(value), error, len(rows), bool(found["higher_is_better"][first].get(metric, True)))
    return metrics


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _counts(by_filter: Mapping[str, Sequence[Mapping[str, Any]]], capped: int) -> dict[str, int]:
    """Degenerate outputs of tasks that generate."""
    rows = next(iter(by_filter.values()))
    texts = [text for row in rows for texts in row["resps"] for text in texts if isinstance(text, str)]
    if not texts:
        return {}
    return degenerate_texts(texts, capped)


def _row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One item in JSON values: what was asked, what came back, what it was worth (fields that are not in ``ROW``)."""
    return {
        "task": sample["task"],
        "doc_id": sample["doc_id"],
        "filter": sample["filter"],
        "prompt_hash": sample["prompt_hash"],
        "prompt": sample["arguments"][0][0],
        "target": sample["target"],
        "choices": [arguments[1] for arguments in sample["arguments"] if isinstance(arguments[1], str)],
        "responses": sample["resps"],
        "filtered": sample["filtered_resps"],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }


ROW = ("task", "doc_id", "filter", "prompt_hash", "prompt", "target", "choices", "responses", "filtered")


def _worth(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ROW}


def _answers(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """The model's answer and the right one, as texts: of choices, the likeliest and the one that the target names."""
    choices, responses, target = row["choices"], row["responses"], row["target"]
    if not choices:
        return str(responses[0][0]), str(target)
    likeliest = max(range(len(choices)), key=lambda place: responses[place][0][0])
    place = int(target) if str(target).isdecimal() and int(target) < len(choices) else None
    return choices[likeliest], str(target) if place is None else choices[place]
