"""The commands that hand a plan to others: ``export`` and ``serve``."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from harness import share
from harness.errors import UserError
from harness.models import ROOT, Model
from harness.one_plan import one_plan

CELL = ["method=reap", "ratio=0.5", "calibration.sequences=8", "limit=6"]


def command(module: str, store: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"harness.{module}", f"store={store}", *arguments]


def run(module: str, store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(module, store, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the scores of one cell."""
    folder = tmp_path_factory.mktemp("store")
    assert run("run", folder, *CELL, "calibration.held_out=0").returncode == 0
    return folder


def test_what_recovery_made_is_what_is_exported(tmp_path: Path) -> None:
    """Trained weights, not the plan's; and a plan in a file takes no recovery."""
    quick = ["recovery.text.sequences=8", "recovery.text.held_out=1", "calibration.sequences=8", "ratio=0.5"]
    arguments = ["method=reap", "recovery=router", *quick, f"store={tmp_path / 'store'}"]
    share.share(one_plan(arguments, None), tmp_path / "trained")
    share.share(one_plan([*arguments[:1], *arguments[-3:]], None), tmp_path / "plain")
    trained, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("trained", "plain"))
    same = {name: torch.equal(value, plain.get_parameter(name)) for name, value in trained.named_parameters()}
    assert {name for name, equal in same.items() if not equal} == {n for n in same if n.endswith("mlp.gate.weight")}
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "REAP + router KD" in card and "bit for bit" not in card
    with pytest.raises(UserError, match="Leave recovery out"):
        one_plan(arguments, str(tmp_path / "plain" / "plan.json"))


def test_an_export_is_a_checkpoint_with_plan_scores_and_provenance(store: Path, tmp_path: Path) -> None:
    done = run("share", store, *CELL, "calibration.held_out=0", f"to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"folder: {tmp_path / 'out'}\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "REAP at a ratio of 0.5" in card and "16 router rows" in card
    assert re.search(r"\| tiny_sums \| exact_match \| \d+\.\d ± \d+\.\d \| 6 \| plan \|", card)
    about = json.loads(card.split("```json\n")[1].split("```")[0])
    assert about["original"] == Model("tiny", "tasks/tiny/model").digest and about["statistics"]["number_of_tokens"]
    assert str(ROOT) not in card
    again = run("share", store, "model=tiny", f"plan={tmp_path / 'out' / 'plan.json'}", f"to={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))
    assert "None was measured" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["method=reap"], "to=<folder>"),
        (["method=reap,ean", "to={}/new"], "takes one plan, and 2"),
        (["method=reap", "to={}"], "not empty"),
        (["plan={}/absent.json", "to={}/new"], "cannot be read"),
        (["plan={}/other.json", "to={}/new"], "not a readable plan"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    store: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other.json").write_text("{}")
    asked = ["share", f"store={store}", *(argument.format(tmp_path) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", asked)
    assert share.main() == 2
    assert words in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["other.json"]


def test_what_the_hub_does_not_take_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = one_plan(["method=none", f"store={tmp_path / 'store'}"], None)
    share.share(asked, tmp_path / "out")
    with pytest.raises(UserError, match="The checkpoint is complete in"):
        share.push(tmp_path / "out", "nobody/nothing")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_serving_in_the_foreground_answers_and_ends_with_ctrl_c(store: Path) -> None:
    file = next((store / "plans").glob("tiny-reap*.json"))
    process = subprocess.Popen(
        command("foreground", store, f"plan={file}", "model=tiny"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    url = re.search(r"http://\S+/v1", next(line for line in process.stdout if "http" in line))
    assert url
    request = {"model": "tiny", "prompt": "def ", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url[0]}/completions", json=request, trust_env=False, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 4
    running = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert psutil.wait_procs(running, timeout=20)[1] == []
