"""The task files of lm-eval: our own beside their data, or those it ships, on the hub's data or on local copies."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from harness.errors import UserError
from tasks.local_rows import check_alike, rows

ROOT = Path(__file__).resolve().parents[1]
STOCK = "lm_eval:"  # such paths lie in lm-eval's own folder of tasks
SPLITS = ("train", "validation", "test", "dev")
TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")  # a field's name, or Jinja over the fields
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class TaskFile:
    """One YAML task file.

    label: whom messages speak of. num_fewshot: worked examples before each item, instead of the file's number.
    data_dir: folder of local copies, ``lm_eval/<copy>/<split>.jsonl``, read instead of the hub; ``copy`` may hold
    ``{dataset_name}``.
    """

    label: str
    path: Path
    num_fewshot: int | None = None
    data_dir: Path | None = None
    copy: str = ""

    def check(self) -> None:
        """Raise UserError if the file cannot be read, its local data is missing, or a row that will be asked about is
        not what the others are.
        """
        for path in self.data_files:
            if not path.is_file():
                raise UserError(f"{self.label}: {self.path} names the data file {path}, which does not exist.")
        fields = set() if "process_docs" in self.config else _fields(self.config)
        for path in self.splits.get(self._scored or "", []):
            if path.suffix == ".jsonl":
                check_alike(self.label, path, rows(self.label, path), fields)

    @property
    def _scored(self) -> str | None:
        """The split whose rows are asked about."""
        return self.config.get("test_split") or self.config.get("validation_split")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The YAML file with what it includes and where its data lies; functions it names stay names."""
        return self._read(resolve_func=False)

    def loaded(self, cache: Path) -> dict[str, Any]:
        """The same with functions resolved, for lm-eval. Local data is read anew into ``cache``."""
        config = self._read(resolve_func=True)
        if self.data_files:  # a shared cache would outlive an edited data file
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": str(cache)}
        return config

    @cached_property
    def splits(self) -> dict[str, list[Path]]:
        """Local files by split; none for a task on the hub's data."""
        return {split: [Path(file) for file in files] for split, files in (_data_files(self.config) or {}).items()}

    @property
    def data_files(self) -> list[Path]:
        """Local files of all splits."""
        return [file for files in self.splits.values() for file in files]

    def identity(self) -> dict[str, Any]:
        """What determines items and scoring, wherever it lies: the resolved file, its functions and local data."""
        folder = self.path.parent
        if self.path.is_relative_to(stock_folder()):
            folder = stock_folder()
        files = [*_function_files(self.config), *self.data_files]
        config = json.dumps(self.config, sort_keys=True, default=str)
        for place in filter(None, (folder, self.data_dir)):
            config = config.replace(f"{place}/", "")
        return {
            "config": _sha256(config.encode()),
            "files": [[self._relative(path, folder), _sha256(path.read_bytes())] for path in files],
        }

    def count(self, original: int) -> int:
        """Rows of the scored split where we can count them, else what lm-eval says."""
        files = self.splits.get(self._scored or "", [])
        if len(files) != 1 or files[0].suffix != ".jsonl" or "process_docs" in self.config:
            return original
        return sum(1 for line in files[0].read_text().split("\n") if line.strip())

    def _relative(self, path: Path, folder: Path) -> str:
        inside_data = self.data_dir is not None and path.is_relative_to(self.data_dir)
        return os.path.relpath(path, self.data_dir if inside_data else folder)

    def _read(self, resolve_func: bool) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            config = load_yaml(self.path, resolve_func=resolve_func)
        except Exception as error:  # the YAML library has many
            raise UserError(f"{self.label}: cannot read the task file {self.path}: {error}") from error
        if not isinstance(config.get("task"), str):
            raise UserError(f"{self.label}: {self.path} has no line 'task: name'.")
        if self.num_fewshot is not None:
            config["num_fewshot"] = self.num_fewshot
        if self.data_dir is not None:
            return self._on_copies(config)
        return _absolute(config, self.path.parent)

    def _on_copies(self, config: dict[str, Any]) -> dict[str, Any]:
        """The task on local copies of its rows; a split without a file is left out."""
        assert self.data_dir is not None
        try:
            folder = self.data_dir / "lm_eval" / self.copy.format(**config)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.label}: copy={self.copy!r} asks for what {self.path.name} has not: {error}"
            ) from error
        splits = {split: [str(folder / f"{split}.jsonl")] for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
        absent = {key: None for key in SPLIT_KEYS if config.get(key) not in splits}
        wanted = [split for key in SPLIT_KEYS[1:3] if (split := config.get(key))]
        if not set(wanted) & set(splits):
            possible = " or ".join(f"{folder}/{split}.jsonl" for split in reversed(wanted))
            raise UserError(
                f"{self.label}: data_dir={self.data_dir} has no rows for it; it needs {possible}. "
                "Leave data_dir out to read them from the Hugging Face hub."
            )
        options = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
        return {**config, **absent, **options}


def task_paths(label: str, task_file: str) -> list[Path]:
    """The files that ``task_file`` names: one of ours (relative to the project), or one or, by a pattern with ``*``,
    several of lm-eval's. Raises UserError if there is none.
    """
    if not task_file.startswith(STOCK):
        return [ROOT / task_file]
    pattern = task_file.removeprefix(STOCK)
    paths = sorted(path for path in stock_folder().glob(pattern) if not path.name.startswith("_"))
    if not paths:
        raise UserError(f"{label}: lm-eval ships no task file {pattern!r}. They lie in {stock_folder()}.")
    return paths


def stock_folder() -> Path:
    """Where lm-eval's own task files lie."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


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


def _fields(config: Mapping[str, Any]) -> set[str]:
    """The fields of a row that the prompt, the choices and the answer are made of, where these are templates."""
    texts = [text for name in TEMPLATES if isinstance(text := config.get(name), str) and "!function" not in text]
    templates = [text if "{" in text else f"{{{{{text}}}}}" for text in texts if "{" in text or text.isidentifier()]
    found: set[str] = set()
    for template in templates:
        with suppress(TemplateSyntaxError):
            found |= meta.find_undeclared_variables(Environment().parse(template))
    return found


def _absolute(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With every data file as an absolute path, by split."""
    given = _data_files(config)
    if not given:
        return config
    splits = given if isinstance(given, Mapping) else {"train": given}
    files = {split: [str(folder / file) for file in _as_list(names)] for split, names in splits.items()}
    return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": files}}


def _data_files(config: Mapping[str, Any]) -> Any:
    """The entry ``dataset_kwargs: {data_files: ...}``, in whichever form it is written; None if there is none."""
    return (config.get("dataset_kwargs") or {}).get("data_files")


def _as_list(files: str | Sequence[str]) -> list[str]:
    return [files] if isinstance(files, str) else list(files)
