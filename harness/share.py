"""A plan as a checkpoint to share: a normal Hugging Face folder with a model card.

python -m harness.share method=reap ratio=0.5 to=<folder> [push=owner/name]
python -m harness.share plan=<file> model=tiny to=<folder>
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from harness import checkpoint, combinations, inventory, stages
from harness import plan as plans
from harness.commandline import before_work, refuse_politely
from harness.errors import UserError
from harness.one_plan import OnePlan, one_plan, split
from harness.provenance import provenance
from harness.spec import Cell
from harness.store import remove, say

CARD, PLAN = "README.md", "plan.json"


def share(asked: OnePlan, folder: Path) -> None:
    """Write, check and describe the checkpoint; the folder appears when all of it is there."""
    if asked.remade is None:
        checkpoint.check_stock(asked.cell.model, asked.plan)
    check_new(folder)
    partial = folder.with_name(f".partial-{folder.name}")
    remove(partial)
    try:
        if asked.remade is None:
            partial.mkdir(parents=True)
            checkpoint.export(asked.cell.model, asked.plan, partial)
            checkpoint.verify(partial, asked.cell.model)
        else:
            inventory.check_unchanged(asked.remade)
            shutil.copytree(asked.remade, partial)
        if (partial / CARD).exists():
            shutil.move(partial / CARD, partial / "README.original.md")
        (partial / PLAN).write_text(plans.to_json(asked.plan))
        written = sum(tensor.nbytes for tensor in checkpoint.tensors_of(partial))
        (partial / CARD).write_text(card(asked, written))
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        remove(partial)


def check_new(folder: Path) -> None:
    """Raise UserError unless the folder is new, or empty, and can be made."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"to={folder}: {nearest} is a file, so there can be no folder. Name another.")
    if nearest == folder and any(folder.iterdir()):
        raise UserError(f"to={folder} is there already and not empty. Name a new folder.")
    if not os.access(nearest if nearest != folder else folder.parent, os.W_OK | os.X_OK):
        raise UserError(f"to={folder}: nothing may be written there. Name another folder.")


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push={name} names no repository on the hub; write owner/name. {error}") from error
    if name.count("/") != 1:
        raise UserError(f"push={name} names no repository on the hub; write owner/name.")


def card(asked: OnePlan, written: int) -> str:
    """The model card: what was done to which model, what it scores, how to do it again. written: bytes of tensors."""
    made, model = asked.plan, asked.cell.model
    distinct, about = checkpoint.measure(model, made).distinct, made.provenance
    rows = made.written_experts().values()
    padded = " (layers with fewer are padded with experts that the router never chooses)" if len(set(rows)) > 1 else ""
    lines = [
        "---",
        *([f"base_model: {model.path}"] if model.path.count("/") == 1 and not Path(model.path).exists() else []),
        "tags: [mixture-of-experts, expert-pruning]",
        "---",
        "",
        f"# {model.name}, {about.get('label', 'a plan')} at a ratio of {about.get('ratio', 0):g}",
        "",
        f"{len(made.layers)} MoE layers of {max(model.experts.values(), default=0)} experts each became "
        f"{max(rows, default=0)} router rows{padded} with {distinct:.4g} distinct experts on average; "
        f"{model.nbytes / 1e6:.1f} MB became {written / 1e6:.1f} MB. {_weights(asked)} "
        f"`{PLAN}` says what became of every expert; `README.original.md`, if it is here, is the original's card.",
        "",
        "## Scores",
        "",
        _scores(asked),
        "",
        "## Provenance",
        "",
        "```json",
        json.dumps({**about, "original": model.digest, "plan": made.digest, "written_by": provenance()}, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _weights(asked: OnePlan) -> str:
    if asked.remade is None:
        return "Kept tensors are the original's, bit for bit."
    return f"The weights were then made anew ({asked.cell.label}); `{stages.REPORT}` says on how much text."


def _scores(asked: OnePlan) -> str:
    """Those that the store holds for this cell, with n and standard error."""
    rows = []
    for task in asked.cell.tasks if asked.is_cells else ():
        found = asked.store.read_json("records", asked.cell.record_name(task)) or {}
        how = found.get("served", {}).get("how")
        for metric, value in found.get("metrics", {}).items():
            rows.append(
                f"| {task.name} | {metric} | {100 * value['value']:.1f} ± {100 * value['stderr']:.1f} "
                f"| {value['n']} | {how} |"
            )
    if not rows:
        return "None was measured before this checkpoint was written."
    return "\n".join(["| task | metric | points ± standard error | n | served by |", "|:-|:-|:-|:-|:-|", *rows])


def push(folder: Path, repository: str) -> str:
    """Upload the folder to the Hugging Face hub, as a private repository if it is new; its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"push={repository}: the hub did not take it ({type(error).__name__}: {error}). The checkpoint is "
            f"complete in {folder}; log in (hf auth login) and push again, or upload the folder yourself."
        ) from error
    return str(url)


def _check_exported(cell: Cell) -> None:
    if cell.recovery is None:
        combinations.check_stock(cell)


@refuse_politely
def main() -> int:
    options, rest = split(sys.argv[1:], ("to", "push", "plan"))
    if not options.get("to", "").strip():
        raise UserError("Say where to: to=<folder>, a new one.")
    folder = Path(options["to"]).resolve()
    with before_work():
        check_new(folder)
    if "push" in options:
        _check_repository(options["push"])
    asked = one_plan(rest, options.get("plan"), _check_exported)
    share(asked, folder)
    say("export", str(folder), f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")
    found: dict[str, Any] = {"folder": str(folder)}
    if "push" in options:
        found["hub"] = push(folder, options["push"])
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
