"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(folder: Path | str, runs_code: bool = False) -> PreTrainedTokenizerBase:
    """That of a folder, or of a repository in the hub's cache. Raises UserError for files that cannot be read.

    runs_code: whether Python code that comes with it may run; unset, transformers would ask on standard input.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=runs_code, local_files_only=Path(folder).is_dir()
        )
    except Exception as error:  # whatever its files make of them: several libraries read these
        raise UserError(
            f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {error}). Copy the original model's "
            "tokenizer files there."
        ) from error
