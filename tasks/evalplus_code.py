"""HumanEval+ and MBPP+: the model completes functions, EvalPlus judges them.

Completions are generated concurrently here (EvalPlus sends one prompt at a time) with EvalPlus's prompts and stop
sequences for base models, and judged by EvalPlus's sanitiser and checker in a sandbox (``tasks.evalplus_judge``).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import UserError
from tasks import LLM, Item, Metric, Score
from tasks.completions import Completion, complete, degenerate
from tasks.judging import first_form, judge, why_not
from tasks.local_rows import check_alike, kind
from tasks.sandbox import FORMS, NO_SANDBOX

ROOT = Path(__file__).resolve().parents[1]
RELEASES = {"humaneval": ("HumanEvalPlus.jsonl.gz", 164), "mbpp": ("MbppPlus.jsonl.gz", 378)}  # file, problems
UNSANDBOXED = "I accept that generated code runs on this machine without isolation"
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol", "contract")
POSSIBLE = (
    "Generated programs are only run isolated, by bubblewrap or by unshare (util-linux 2.36), which need user "
    "namespaces: install bubblewrap; check `sysctl user.max_user_namespaces kernel.unprivileged_userns_clone "
    "kernel.apparmor_restrict_unprivileged_userns`; in Docker add --security-opt seccomp=unconfined "
    "--security-opt systempaths=unconfined. Or leave this task out. Or, if whatever a damaged model writes may read "
    f"and delete this machine's files and use its network, say so: unsandboxed='{UNSANDBOXED}'"
)
ALIKE = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "atol")  # MBPP+ has plus_input {}


@dataclass(frozen=True)
class EvalPlus:
    """pass@1 of greedy completions on a problem file in EvalPlus's schema (JSON lines, possibly gzipped).

    dataset: ``humaneval`` or ``mbpp``, whose stop sequences and special oracles EvalPlus applies.
    problems: a file, absolute or relative to the project; left out, the dataset itself: as EvalPlus released it, or
    its copy in ``data_dir``/evalplus. limit: only the first problems. max_tokens: of a completion.
    memory_gib: address space of a judged program (EvalPlus's own limit is 4). unsandboxed: the sentence `UNSANDBOXED`
    lets generated code run where no sandbox works; with one it changes nothing.
    """

    name: str
    dataset: str
    problems: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    max_tokens: int = 768
    request_timeout_s: float = 600
    judge_timeout_s: float = 3600
    memory_gib: int = 4
    unsandboxed: str | None = None

    kind = "code"

    def check(self) -> None:
        """Raise UserError if EvalPlus or the file is missing, a problem lacks a field, or there is no sandbox."""
        if importlib.util.find_spec("evalplus") is None:
            raise UserError(f"{self.name}: EvalPlus is not installed (pip install evalplus).")
        if self.dataset not in ("humaneval", "mbpp"):
            raise UserError(f"{self.name}: dataset={self.dataset} is neither humaneval nor mbpp.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.name}: limit={self.limit} leaves no problems. Leave it out for all.")
        problems = self._problems()
        for problem in problems:
            if not isinstance(problem, dict):
                raise UserError(f"{self.name}: a problem in {self._path} is {kind(problem)}, not a JSON object.")
            if missing := [field for field in FIELDS if field not in problem]:
                raise UserError(f"{self.name}: a problem in {self._path} has no {', '.join(missing)}.")
        check_alike(self.name, self._path, problems, ALIKE)
        ids = [problem["task_id"] for problem in problems]
        if not ids or len(set(ids)) < len(ids):
            raise UserError(f"{self.name}: {self._path} must hold problems, each with a task_id of its own.")
        self._isolation()

    def identity(self) -> dict[str, Any]:
        """EvalPlus's version, the problems by content, and the settings that can change a verdict."""
        return {
            "evalplus": importlib.metadata.version("evalplus"),
            "dataset": self.dataset,
            "problems": hashlib.sha256(self._path.read_bytes()).hexdigest(),
            "limit": self.limit,
            "max_tokens": self.max_tokens,
            "memory_gib": self.memory_gib,
            "prompt": "direct completion, greedy",
            "judge": 2,  # raise it when a change of the judge can change a verdict
        }

    def score(self, llm: LLM, workdir: Path) -> Score:
        """Complete and judge every problem. Raises StageError if a completion or a verdict is missing."""
        problems = self._problems()
        prompts = [problem["prompt"].strip() + "\n" for problem in problems]
        start = time.perf_counter()
        completions = complete(
            llm,
            prompts,
            max_tokens=self.max_tokens,
            stop=_stop_sequences(self.dataset),
            timeout_s=self.request_timeout_s,
        )
        answering_s = time.perf_counter() - start
        texts = [completion.text.replace("\t", "    ") for completion in completions]  # as EvalPlus's decoders do
        programs = {
            problem["task_id"]: prompt + text for problem, prompt, text in zip(problems, prompts, texts, strict=True)
        }
        form = self._isolation()
        verdicts = judge(self.dataset, self._path, programs, workdir, self.memory_gib, self.judge_timeout_s, form)
        samples = [
            _sample(problem, completion, verdicts[problem["task_id"]])
            for problem, completion in zip(problems, completions, strict=True)
        ]
        isolated = "unsandboxed" if form == NO_SANDBOX else f"sandbox_{form}"
        counts = {**degenerate(completions), **_ends(samples), isolated: len(samples)}
        return Score(_metrics(samples), samples, counts, answering_s, len(self._all_problems()))

    def items(self, samples: Sequence[Mapping[str, Any]]) -> list[Item]:
        """pass@1 of each problem is 0 or 1."""
        problems = {problem["task_id"]: problem for problem in self._problems()}
        return [
            Item(
                sample["task_id"],
                problems[sample["task_id"]]["prompt"],
                sample["completion"],
                None,
                {name: float(passed) for name, passed in _passed(sample).items()},
            )
            for sample in samples
        ]

    def _isolation(self) -> str:
        """How programs are isolated: the first form that works here. Raises UserError where none does."""
        if self.unsandboxed not in (None, UNSANDBOXED):
            raise UserError(f"{self.name}: unsandboxed must be left out, or be these words: {UNSANDBOXED}")
        if (form := first_form()) is not None:
            return form
        if self.unsandboxed == UNSANDBOXED:
            return NO_SANDBOX
        words = "; ".join(f"{form}: {why_not(form)}" for form in FORMS)
        raise UserError(f"{self.name}: this machine has no sandbox ({words}). {POSSIBLE}")

    @cached_property
    def _path(self) -> Path:
        if self.problems is not None:
            return ROOT / self.problems
        if self.data_dir is not None:
            return ROOT / self.data_dir / "evalplus" / RELEASES[self.dataset][0]
        return _released(self.name, self.dataset)

    def _problems(self) -> list[dict[str, Any]]:
        """Those that are asked, in the order of the file. Raises UserError."""
        return self._all_problems()[: self.limit]

    def _all_problems(self) -> list[dict[str, Any]]:
        read = gzip.open if self._path.suffix == ".gz" else open
        try:
            with read(self._path, "rt", encoding="utf-8") as file:
                problems = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: cannot read the problem file {self._path}: {error}") from error
        if self.problems is None and len(problems) != (whole := RELEASES[self.dataset][1]):
            raise UserError(f"{self.name}: {self._path} holds {len(problems)} of {whole} problems. Fetch it again.")
        return problems


def _released(name: str, dataset: str) -> Path:
    """The dataset as EvalPlus released it, in EvalPlus's own cache. Raises UserError where it cannot be had."""
    from evalplus.data import humaneval, mbpp

    fetch = {"humaneval": humaneval._ready_human_eval_plus_path, "mbpp": mbpp._ready_mbpp_plus_path}[dataset]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(fetch())
    except OSError as error:
        raise UserError(
            f"{name}: EvalPlus's release could not be fetched ({error}). Set data_dir to a folder that holds "
            f"evalplus/{RELEASES[dataset][0]}, or check the network."
        ) from error


def _stop_sequences(dataset: str) -> list[str]:
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    return EOS + extra_eos_for_direct_completion(dataset)


def _sample(problem: Mapping[str, Any], completion: Completion, verdict: Mapping[str, str]) -> dict[str, Any]:
    return {
        "task_id": problem["task_id"],
        "completion": completion.text,
        "solution": verdict["solution"],
        "base_status": verdict["base"],
        "plus_status": verdict["plus"],
        "finish_reason": completion.finish_reason,
    }


def _metrics(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    passed = [_passed(sample) for sample in samples]
    return {name: _share([one[name] for one in passed]) for name in passed[0]}


def _passed(sample: Mapping[str, Any]) -> dict[str, bool]:
    """As EvalPlus defines it: ``plus`` needs the base tests and the additional ones."""
    base = sample["base_status"] == "pass"
    return {"base_pass@1": base, "plus_pass@1": base and sample["plus_status"] == "pass"}


def _share(passed: Sequence[bool]) -> Metric:
    n, share = len(passed), sum(passed) / len(passed)
    return Metric(share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0, n)


def _ends(samples: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Programs that did not come to an end of their own."""
    return {
        "timeout": sum("timeout" in (sample["base_status"], sample["plus_status"]) for sample in samples),
        "killed": sum(sample["base_status"] == "killed" for sample in samples),
    }
