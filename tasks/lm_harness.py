"""Tasks of EleutherAI's lm-evaluation-harness, run by it against the served model.

The harness builds prompts, sends them (token ids, through its own ``local-completions`` client), filters answers and
computes metrics. We guard what it lets through: not-a-number log-likelihoods, which score perfectly, and lost items.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StageError, UserError
from tasks import LLM, Metric, Score

ROOT = Path(__file__).resolve().parents[1]
SEED = 1234


@dataclass(frozen=True)
class LmEval:
    """One lm-eval task: a local YAML file (``task_file``) or the name of one that lm-eval ships (``task``).

    task_file: absolute, or relative to the project. Its ``data_files`` are relative to its own folder.
    limit: score only the first items. num_concurrent: requests in flight. batch_size: prompts per request.
    """

    name: str
    task_file: str | None = None
    task: str | None = None
    limit: int | None = None
    num_concurrent: int = 8
    batch_size: int = 8
    timeout_s: int = 600

    def check(self) -> None:
        """Raise UserError if lm-eval, the task file or its data is missing, or the file cannot be read."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"{self.name}: lm-eval is not installed (pip install lm-eval[api]).")
        if (self.task_file is None) == (self.task is None):
            raise UserError(f"{self.name}: give either task_file (a local YAML file) or task (a name lm-eval knows).")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.name}: limit={self.limit} leaves no items. Leave it out to score all.")
        for path in self._data_files():
            if not path.is_file():
                raise UserError(f"{self.name}: {self._path} names the data file {path}, which does not exist.")

    def identity(self) -> dict[str, Any]:
        """lm-eval's version, the task file and its data by content, and the number of items."""
        identity: dict[str, Any] = {"lm_eval": importlib.metadata.version("lm_eval"), "limit": self.limit}
        if self.task is not None:
            return {**identity, "task": self.task}
        # The file with what it includes, the functions it names, and the data; where they lie does not matter.
        folder = self._path.parent
        config = json.dumps(self._config(), sort_keys=True, default=str)
        files = [*_function_files(self._config()), *self._data_files()]
        hashes = [[os.path.relpath(path, folder), _sha256(path.read_bytes())] for path in files]
        return {**identity, "config": _sha256(config.replace(f"{folder}/", "").encode()), "files": hashes}

    def score(self, llm: LLM, workdir: Path) -> Score:
        """Run the task. Raises StageError if a request fails for good, an item is lost or a number is not finite."""
        if self.task_file is not None:
            for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
                os.environ.setdefault(variable, "1")
        from lm_eval import simple_evaluate

        client = _client(llm, self.num_concurrent, self.batch_size, self.timeout_s)
        task, manager = self._loaded(workdir)
        try:
            found = simple_evaluate(
                model=client,
                tasks=[task],
                task_manager=manager,
                limit=self.limit,
                log_samples=True,
                random_seed=0,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except Exception as error:
            raise StageError(f"{self.name}: lm-eval failed: {type(error).__name__}: {error}") from error
        return self._checked(found, client.capped)

    @property
    def _path(self) -> Path:
        assert self.task_file is not None
        return ROOT / self.task_file

    def _config(self) -> dict[str, Any]:
        """The YAML file, ``include`` followed; functions it names stay names. Raises UserError."""
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            config = load_yaml(self._path, resolve_func=False)
        except Exception as error:  # the YAML library has many
            raise UserError(f"{self.name}: cannot read the task file {self._path}: {error}") from error
        if not isinstance(config.get("task"), str):
            raise UserError(f"{self.name}: {self._path} has no line 'task: name'.")
        return config

    def _data_files(self) -> list[Path]:
        if self.task_file is None:
            return []
        given = (self._config().get("dataset_kwargs") or {}).get("data_files") or {}
        splits = given.values() if isinstance(given, Mapping) else [given]
        return [self._path.parent / file for split in splits for file in _as_list(split)]

    def _loaded(self, workdir: Path) -> tuple[Any, Any]:
        """What lm-eval takes as a task, and its task manager."""
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        if self.task_file is None:
            return self.task, TaskManager()
        config = load_yaml(self._path)
        options = dict(config.get("dataset_kwargs") or {})
        if "data_files" in options:
            options["data_files"] = _absolute(options["data_files"], self._path.parent)
        options["cache_dir"] = str(workdir / "datasets")  # a shared one would outlive an edited data file
        return {**config, "dataset_kwargs": options}, TaskManager(include_defaults=False)

    def _checked(self, found: Any, capped: int) -> Score:
        (samples,) = found["samples"].values()
        (results,) = found["results"].values()
        (number,) = found["n-samples"].values()
        (higher,) = found["higher_is_better"].values()
        by_filter = defaultdict(list)
        for sample in samples:
            by_filter[sample["filter"]].append(sample)
        for kind, rows in by_filter.items():
            ids = {row["doc_id"] for row in rows}
            if not len(ids) == len(rows) == number["effective"] == self._expected(number["original"]):
                raise StageError(
                    f"{self.name}: {len(ids)} items scored ({kind}), {self._expected(number['original'])} expected."
                )
        _check_finite(self.name, samples)
        metrics = _metrics(results, by_filter, higher)
        return Score(metrics, [_row(sample) for sample in samples], _counts(by_filter, capped))

    def _expected(self, original: int) -> int:
        """Items to score: all rows of the data files where we can count them, else what lm-eval says."""
        files = self._data_files()
        if len(files) == 1 and files[0].suffix == ".jsonl" and "process_docs" not in self._config():
            original = sum(1 for line in files[0].read_text().split("\n") if line.strip())
        return min(original, self.limit or original)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _function_files(config: Any) -> list[Path]:
    """Python files of the functions that a task names (``!function module.name`` is read as folder/module.name)."""
    if isinstance(config, Mapping | list):
        parts = config.values() if isinstance(config, Mapping) else config
        return sorted({path for part in parts for path in _function_files(part)})
    if isinstance(config, str) and (path := Path(config.rpartition(".")[0] + ".py")).is_absolute() and path.is_file():
        return [path]
    return []


def _as_list(files: str | Sequence[str]) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(names, folder) for split, names in files.items()}
    return [str(folder / name) for name in _as_list(files)]


def _client(llm: LLM, num_concurrent: int, batch_size: int, timeout_s: int) -> Any:
    """lm-eval's own client for OpenAI-compatible servers, which also counts the generations cut at their limit."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Client(LocalCompletionsAPI):
        capped = 0

        def parse_generations(self, outputs: Any, **arguments: Any) -> list[str]:
            replies = outputs if isinstance(outputs, list) else [outputs]
            reasons = {choice["finish_reason"] for reply in replies for choice in reply["choices"]}
            if not reasons <= {"stop", "length"}:
                raise StageError(f"The server broke a generation off: finish_reason {sorted(map(str, reasons))}.")
            self.capped += sum(choice["finish_reason"] == "length" for reply in replies for choice in reply["choices"])
            return LocalCompletionsAPI.parse_generations(outputs, **arguments)

    client = Client(
        base_url=f"{llm.url}/v1/completions",
        model=llm.model,
        tokenizer=llm.tokenizer,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=llm.max_model_len,
        num_concurrent=max(2, num_concurrent),  # its path for one request at a time obeys proxy variables
        batch_size=batch_size,
        max_retries=3,
        timeout=timeout_s,
    )
    first = client.tokenizer("a").input_ids[:1]
    client.add_bos_token = client.tokenizer.bos_token_id is not None and first == [client.tokenizer.bos_token_id]
    return client


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


def _metrics(
    results: Mapping[str, Any], by_filter: Mapping[str, Sequence[Mapping[str, Any]]], higher: Mapping[str, bool]
) -> dict[str, Metric]:
    """lm-eval's ``metric,filter`` as ``metric``; as ``metric:filter`` where several filters give one metric."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    several = Counter(key.split(",")[0] for key in keys)
    metrics = {}
    for key in keys:
        metric, kind = key.split(",")
        rows = by_filter[kind]
        error = results.get(f"{metric}_stderr,{kind}")
        if not isinstance(error, float) or not math.isfinite(error):
            error = _standard_error([row[metric] for row in rows])
        name = metric if several[metric] == 1 else f"{metric}:{kind}"
        metrics[name] = Metric(float(results[key]), error, len(rows), bool(higher.get(metric, True)))
    return metrics


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _counts(by_filter: Mapping[str, Sequence[Mapping[str, Any]]], capped: int) -> dict[str, int]:
    """Degenerate outputs of tasks that generate."""
    rows = next(iter(by_filter.values()))
    texts = [text for row in rows for texts in row["resps"] for text in texts if isinstance(text, str)]
    return {"empty": sum(not text.strip() for text in texts), "length_capped": capped} if texts else {}


def _row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One item in JSON values: what was asked, what came back, what it was worth."""
    return {
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
