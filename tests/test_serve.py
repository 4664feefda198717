"""Real vLLM: it comes up, is refused when broken, and never outlives us."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch

from harness import reference, serve
from harness.build import build
from harness.errors import StageError, UserError, log_tail_of
from harness.external import Server
from harness.models import ROOT, Model
from harness.plan import Plan
from harness.probe import Expected, probe_tokens
from harness.served import Weights
from tasks import LLM
from tests.conftest import conf, vllm
from tests.tiny_checkpoint import write_checkpoint

SMALL = vllm(dtype="float32", max_model_len=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with SMALL.serve(Weights(folder), "tiny", folder / "server.log") as served:
        yield served.llm


def server_processes() -> list[psutil.Process]:
    """All processes of all servers of this test run."""
    hosts = [psutil.Process(host._process.pid) for host in serve._hosts.values() if host.is_alive]
    return [child for host in hosts for child in host.children(recursive=True)]


def is_open(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as connection:
        return connection.connect_ex((address.hostname, address.port)) == 0


def wait_until_gone(processes: list[psutil.Process], seconds: float = 15) -> list[psutil.Process]:
    """Those still running when the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        processes = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not processes:
            break
        time.sleep(0.1)
    return processes


def test_server_is_up_and_knows_its_length(llm: LLM, folder: Path):
    assert httpx.get(f"{llm.url}/health", trust_env=False).status_code == 200
    assert llm.model == "tiny"
    assert llm.tokenizer == str(folder)
    assert llm.max_model_len == 256
    assert llm.url.startswith("http://127.0.0.1:")


def test_all_that_listens_does_so_for_this_machine_alone(llm: LLM):
    addresses = {
        connection.laddr.ip
        for process in server_processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses and addresses <= {"127.0.0.1", "::1"}


def test_length_is_at_most_the_models(folder: Path):
    arguments = vllm(max_model_len=4096)._arguments(Weights(folder), "tiny")
    assert arguments[arguments.index("--max-model-len") + 1] == "512"


def test_nothing_is_left_after_leaving_and_after_an_exception(folder: Path, tmp_path: Path):
    before = set(server_processes())
    with SMALL.serve(Weights(folder), "second", tmp_path / "log") as served:
        started = set(server_processes()) - before
        assert started and is_open(served.llm.url)
    assert not wait_until_gone(list(started), 2)
    assert not is_open(served.llm.url)
    with pytest.raises(KeyboardInterrupt), SMALL.serve(Weights(folder), "third", tmp_path / "log") as served:
        started = set(server_processes()) - before
        raise KeyboardInterrupt
    assert not wait_until_gone(list(started), 2)
    assert not is_open(served.llm.url)


def test_two_servers_at_once_do_not_disturb_each_other(llm: LLM, folder: Path, tmp_path: Path):
    with SMALL.serve(Weights(folder), "other", tmp_path / "log") as other:
        assert other.llm.url != llm.url
    serve.probe(llm)


def test_broken_checkpoints_fail_fast_with_the_cause(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    start = time.monotonic()
    with (
        pytest.raises(StageError, match="Cause: .*Error: ") as empty,
        SMALL.serve(Weights(tmp_path / "empty"), "x", tmp_path / "1"),
    ):
        pass
    assert time.monotonic() - start < 60
    assert len(str(log_tail_of(empty.value)).splitlines()) > 5 and "\n" not in str(empty.value)

    cut = write_checkpoint(tmp_path / "cut")
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)
    with (
        pytest.raises(StageError, match="^The server ended .*Cause: .*(S|s)afetensor"),
        SMALL.serve(Weights(cut), "x", tmp_path / "2"),
    ):
        pass


def test_start_up_time_is_limited(folder: Path, tmp_path: Path, llm: LLM):
    before = set(server_processes())
    hasty = vllm(dtype="float32", max_model_len=256, startup_timeout_s=0.3)
    with pytest.raises(StageError, match="startup_timeout_s"), hasty.serve(Weights(folder), "x", tmp_path / "log"):
        pass
    assert not wait_until_gone(list(set(server_processes()) - before), 2)


def test_a_model_that_computes_nan_is_refused(tmp_path: Path):
    def spoil(model: torch.nn.Module) -> None:
        model.model.layers[1].mlp.gate.weight[3, 5] = float("nan")

    spoilt = write_checkpoint(tmp_path / "nan", spoil)
    with pytest.raises(StageError, match="not finite"), SMALL.serve(Weights(spoilt), "nan", tmp_path / "log"):
        pass


def test_a_running_server_is_used_and_left_alone(llm: LLM, folder: Path, tmp_path: Path):
    running = Server(llm.url + "/", "tiny")
    running.check()
    with running.serve(Weights(folder), "ignored", tmp_path / "log") as served:
        assert served.llm == replace(llm, max_stops=4, concurrency=32), "we know nothing of its limits but the API's"
    assert is_open(llm.url)
    expected = {"engine": "external server", "url": llm.url, "model": "tiny", "tokenizer": None}
    assert running.identity() == expected


def test_a_running_server_with_another_tokenizer_is_refused(llm: LLM, tmp_path: Path):
    other = Server(llm.url, "tiny", str(ROOT / "tasks" / "tiny" / "model"))
    with (
        pytest.raises(StageError, match="another tokenizer"),
        other.serve(Weights(tmp_path), "ignored", tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    "url, model, words", [(None, "huge", "it serves tiny"), ("http://127.0.0.1:9", "tiny", "no Op")]
)
def test_a_server_that_cannot_be_used_is_refused(llm: LLM, url: str | None, model: str, words: str):
    with pytest.raises(UserError, match=words):
        Server(url or llm.url, model).check()


def test_what_does_not_fit_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"needs about 100\d.* GiB are free. At most"):
        vllm().check(1000 * 2**30)
    with pytest.raises(UserError, match="serve.dtype=int3 is none of"):
        vllm(dtype="int3").check()
    with pytest.raises(UserError, match="extra_args sets --host"):
        vllm(extra_args=["--host=0.0.0.0"]).check()
    vllm().check(1000)


def test_in_16_bits_a_plan_may_differ_more_that_rounding_changes_more(tmp_path: Path):
    llm, off = LLM("http://127.0.0.1:9", "m", "t", 256), [-1.3] * 4

    def seen(noise: float, dtype: str) -> float | None:
        return serve.difference(llm, off, Weights(tmp_path, expected=Expected((-1.0,) * 4, noise)), dtype)

    assert seen(0.1, "auto") == pytest.approx(0.3)
    for noise, dtype in ((0.0, "auto"), (0.1, "float32")):
        with pytest.raises(StageError, match="not the model it should be"):
            seen(noise, dtype)


def test_noise_is_what_rounding_changes(folder: Path):
    """None in a model stored in float32; some in the embedded one, which is stored in 16 bits."""
    exact, rounded = (
        reference.expected(Model("m", str(path)).load("auto"), Plan({}), probe_tokens(str(path)))
        for path in (folder, ROOT / "tasks" / "tiny" / "model")
    )
    assert exact.noise < 1e-5 and 1e-4 < rounded.noise < 0.5


def test_a_project_that_vllm_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"pip install --no-deps -e \."):
        vllm().check()
    vllm(how="checkpoint").check()


def test_quantised_weights_are_not_served_by_transformers(folder: Path, tmp_path: Path):
    hf = build("serve", conf("serve/hf.yaml"))
    hf.check_model(Model("plain", str(folder)))
    shutil.copytree(folder, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UserError, match="is quantised"):
        hf.check_model(Model("fp8", str(tmp_path / "fp8")))


def test_identity_has_what_determines_numbers_only():
    identity = vllm(max_num_seqs=3, startup_timeout_s=1).identity()
    assert identity == vllm().identity()
    assert identity != vllm(dtype="float32").identity()
    assert identity != vllm(max_model_len=7).identity()


def test_secrets_do_not_reach_the_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("OPENAI_API_KEY", "planted")
    monkeypatch.setenv("VLLM_API_KEY", "planted")
    environment = vllm()._environment()
    assert "planted" not in environment.values()
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["HF_HUB_OFFLINE"] == "1"


SCRIPT = """
import sys, time
from pathlib import Path
from harness.served import Weights
from harness.build import build
from tests.conftest import conf
folder = Path(sys.argv[1])
settings = {"dtype": "float32", "max_model_len": 256}
with build("serve", {**conf(sys.argv[2]), **settings}).serve(Weights(folder), "tiny", folder / "killed.log"):
    print("READY", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "kind, victim",
    [
        ("vllm", "harness"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("vllm", "host"), ("hf", "harness"))),
    ],
)
def test_killing_us_or_the_host_leaves_no_process(folder: Path, kind: str, victim: str):
    harness = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), f"serve/{kind}.yaml"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert harness.stdout and harness.stdout.readline() == b"READY\n"
        processes = psutil.Process(harness.pid).children(recursive=True)
        assert len(processes) >= (1 if kind == "hf" else 3), "host, server, engine"
        os.kill(harness.pid if victim == "harness" else processes[0].pid, signal.SIGKILL)
        assert not wait_until_gone(processes)
    finally:
        harness.kill()
        harness.wait()
        if harness.stdout:
            harness.stdout.close()


@pytest.mark.slow
def test_a_host_whose_harness_was_killed_while_it_imported_leaves_no_folder(tmp_path: Path):
    folder = tmp_path / "serve"
    folder.mkdir()
    host = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "harness" / "vllm_host.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert host.stdin and host.stdout
    host.stdin.close()
    host.stdout.close()  # nobody is left to hear that it is ready
    host.wait(120)
    assert not folder.exists()
