"""Whether a benchmark's rows are on this machine, found out without asking the network."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from harness.errors import UserError
from tasks import Task
from tasks.evalplus_code import RELEASES, EvalPlus
from tasks.lm_harness import LmEval
from tasks.lm_task import TaskFile, task_paths


def absent_data(task: Task) -> str | None:
    """Why the task's rows cannot be read here, without asking the network; None where they are here."""
    return _absent_data(task)  # type: ignore[arg-type] # tasks are frozen dataclasses


@functools.cache
def _absent_data(task: Task) -> str | None:
    try:
        if isinstance(task, EvalPlus) and task.problems is None and task.data_dir is None:
            return _absent_release(task.dataset)
        task.check()
        return _absent_rows(task) if isinstance(task, LmEval) and task.data_dir is None else None
    except UserError as error:
        return str(error)


def _absent_release(dataset: str) -> str | None:
    from evalplus.data import humaneval, mbpp, utils

    versions = {"humaneval": humaneval.HUMANEVAL_PLUS_VERSION, "mbpp": mbpp.MBPP_PLUS_VERSION}
    release = RELEASES[dataset][0].removesuffix(".jsonl.gz")
    if Path(utils.CACHE_DIR, f"{release}-{versions[dataset]}.jsonl").exists():
        return None
    return f"{dataset}: EvalPlus's release is not in its cache (a download of about 1 MB, or set data_dir)"


def _absent_rows(task: LmEval) -> str | None:
    """Data sets of lm-eval's task files that are neither local nor in the caches of the hub and of datasets."""
    from huggingface_hub import constants

    files = [TaskFile(task.name, path) for path in task_paths(task.name, task.task_file)]
    wanted = {file.config["dataset_path"] for file in files if not file.data_files}
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets")))
    caches = (prepared / "{0}", Path(constants.HF_HUB_CACHE, "datasets--{1}"))
    absent = [
        name
        for name in sorted(wanted)
        if not any(
            Path(str(cache).format(name.replace("/", "___"), name.replace("/", "--"))).is_dir() for cache in caches
        )
    ]
    return f"{task.name}: rows of {', '.join(absent)} are not in the hub's cache (or set data_dir)" if absent else None
