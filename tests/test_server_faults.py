"""Servers that die, freeze, or find too little memory: noticed at once, ended for good, and never a number."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from harness import engine, gather, hf, report, scoring, serve, stages, vllm_host
from harness.engine import Watch
from harness.engine_memory import LEAST_UTILIZATION, instead
from harness.errors import StageError, during, keep_log, log_tail_of
from harness.host import Running, cause, child_environment, tail, without_secrets
from harness.models import ROOT
from harness.scoring import Failure
from harness.serve import VLLM
from harness.served import Weights
from harness.spec import Cell
from harness.store import Store
from harness.sweep import Sweep, expand
from tasks import LLM
from tasks.completions import complete
from tests.conftest import vllm
from tests.test_serve import wait_until_gone
from tests.tiny_checkpoint import write_checkpoint

SOON = 20  # seconds that count as soon on a busy machine; what is measured on an idle one is 1 to 4

STUB = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(float(sys.argv[1]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        time.sleep(600)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("INFO it listens", server.server_port, flush=True)
print("ValueError: planted in the log", flush=True)
server.serve_forever()
"""


@contextmanager
def stub(folder: Path, answers_after: float = 0.0) -> Iterator[tuple[Running, subprocess.Popen[bytes], Path]]:
    """A real process that listens, says that it is well, and never completes anything."""
    log = folder / "stub.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", STUB, str(answers_after)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + SOON
        while "planted" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield Running(int(log.read_text().split()[3]), process.poll, process.kill), process, log
    finally:
        process.kill()
        process.wait()


def watching(running: Running, log: Path, silence_s: float) -> Watch:
    return Watch(running, lambda timeout_s: hf._ask(running.url, timeout_s), silence_s, log)


def eventually(found: Callable[[], object], seconds: float = SOON) -> float:
    """Wait until it is so; the seconds it took."""
    start = time.monotonic()
    while not found():
        assert time.monotonic() - start < seconds, "it never came to be"
        time.sleep(0.02)
    return time.monotonic() - start


def completes(url: str, ended: list[str]) -> threading.Thread:
    """Somebody who waits for an answer, with all the patience in the world."""

    def wait() -> None:
        try:
            httpx.post(f"{url}/v1/completions", json={}, timeout=600, trust_env=False)
        except httpx.HTTPError as error:
            ended.append(repr(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_server_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    with stub(tmp_path) as (running, process, log), watching(running, log, 300).looking() as watch:
        assert watch.problem() is None
        process.send_signal(signal.SIGKILL)
        eventually(lambda: watch._found)  # by the thread: nobody asked
        found = watch.problem()
        assert found is not None and "was killed by SIGKILL while it was used. Cause: ValueError: planted" in str(found)
        assert "ValueError: planted in the log" in str(log_tail_of(found))


def test_a_server_that_is_stopped_is_killed_and_its_port_is_free_again(tmp_path: Path) -> None:
    with stub(tmp_path) as (running, process, log), watching(running, log, 1.5).looking() as watch:
        ended: list[str] = []
        waiting = completes(running.url, ended)
        process.send_signal(signal.SIGSTOP)
        waiting.join(SOON)
        assert ended, "who waited for an answer heard that there will be none"
        eventually(watch.problem)
        assert "gave no sign of life for 1.5 s (serve.silence_timeout_s). It was killed." in str(watch.problem())
        assert process.wait(SOON) == -signal.SIGKILL
        socket.create_server(("127.0.0.1", running.port)).close()


@pytest.mark.parametrize("answers_after, silence_s", [(0.0, 2.0), (1.0, 3.0)])
def test_a_server_that_answers_is_left_alone_however_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_after: float, silence_s: float
) -> None:
    monkeypatch.setattr(engine, "ASK_S", 0.2)
    with stub(tmp_path, answers_after) as (running, process, log):
        with watching(running, log, silence_s).looking() as watch:
            time.sleep(3.8)
            assert watch.problem() is None
        assert process.poll() is None


def test_what_fails_is_told_with_why_the_server_ended(tmp_path: Path) -> None:
    with stub(tmp_path) as (running, process, log), watching(running, log, 300).looking() as watch:
        with pytest.raises(ValueError, match="^the task is wrong$") as own, watch.blamed():
            raise ValueError("the task is wrong")
        assert "planted in the log" in str(log_tail_of(own.value))
        process.kill()
        with pytest.raises(StageError) as told, watch.blamed():
            raise ValueError("no connection\nand more")
        assert "was killed by SIGKILL" in str(told.value) and str(told.value).endswith("nothing: no connection")
        assert "planted in the log" in str(log_tail_of(told.value))


def test_clients_give_up_within_seconds_of_a_servers_death(tmp_path: Path) -> None:
    """Not after their own time limits, which are for slow answers; lm-eval's client is measured below."""
    with stub(tmp_path) as (running, process, _):
        llm = LLM(running.url, "m", "t", 256)
        threading.Timer(1.0, process.kill).start()
        start = time.monotonic()
        with pytest.raises(StageError, match="is gone"):
            complete(llm, ["a", "b"] * 20, max_tokens=8, stop=[], timeout_s=600)
        assert time.monotonic() - start < SOON


@pytest.mark.slow
def test_lm_eval_gives_up_within_seconds_of_a_servers_death(tmp_path: Path) -> None:
    (task,) = cells(tmp_path)[0].tasks
    with stub(tmp_path) as (running, process, _):
        llm = LLM(running.url, "m", str(ROOT / "tasks" / "tiny" / "model"), 2048)
        killed: list[float] = []

        def kill_when_busy() -> None:
            me = psutil.Process()
            eventually(lambda: any(c.raddr and c.raddr.port == running.port for c in me.net_connections()), 120)
            killed.append(time.monotonic())
            process.kill()

        threading.Thread(target=kill_when_busy, daemon=True).start()
        with pytest.raises(StageError, match="lm-eval failed: Client"):
            task.score(llm, tmp_path)
        assert time.monotonic() - killed[0] < SOON


# Ports.


def test_a_port_is_taken_before_the_server_starts(tmp_path: Path) -> None:
    """So neither another worker nor anybody else can come between choosing it and listening there."""
    with (
        hf._running(["--model", str(tmp_path), "--name", "a"], tmp_path / "a") as one,
        hf._running(["--model", str(tmp_path), "--name", "b"], tmp_path / "b") as other,
    ):
        assert one.port != other.port
        for running in (one, other):
            assert is_taken(running.port)
    assert not is_taken(one.port) and not is_taken(other.port)


def test_the_process_that_forks_servers_takes_their_ports(tmp_path: Path) -> None:
    servers: set[int] = set()
    orders = [{"do": "start", "arguments": [], "log": str(tmp_path / name)} for name in "ab"]
    with (tmp_path / "answers").open("w") as answers:
        started = [vllm_host.obey(order, servers, answers.fileno()) for order in orders]
        try:
            assert len({one["port"] for one in started}) == 2 and all(is_taken(one["port"]) for one in started)
            assert all(os.getpgid(one["pid"]) == one["pid"] for one in started)  # a kill that comes at once finds them
        finally:
            for one in started:
                assert vllm_host.obey({"do": "kill", "pid": one["pid"]}, servers, answers.fileno()) == {}
                eventually(lambda pid=one["pid"]: vllm_host._has_exited(pid))
                ended = vllm_host.obey({"do": "poll", "pid": one["pid"]}, servers, answers.fileno())
                assert ended == {"status": -signal.SIGKILL}
    assert not servers and not any(is_taken(one["port"]) for one in started)


def is_taken(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            assert error.errno == errno.EADDRINUSE
            return True
    return False


# Too little memory.

GPU_FREE = (
    "ValueError: Free memory on device cuda:0 (60.0/80.0 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 72.0 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
GPU_CACHE = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
GPU_NEEDED = (
    "ValueError: To serve at least one request with the model's max seq len (2048), (1.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.50 GiB)."
)
CPU_CACHE = (
    "ValueError: Available memory on node 0 (18.0/23.4 GiB) on kv cache allocation is less than requested memory for "
    "kv (64.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory"
)
KILLED = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
)


@pytest.mark.parametrize(
    "words, is_cpu, share",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", False, 0.8),
        (GPU_FREE, False, 0.73),
        (GPU_CACHE, False, 0.95),
        (GPU_NEEDED, False, 0.95),
        (KILLED, False, 0.8),
        ("MemoryError", True, 0.9),
        ("terminate called after throwing an instance of 'std::bad_alloc'", True, 0.9),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes", True, 0.9),
        (CPU_CACHE, True, 0.9),
        (KILLED, True, 0.9),
        ("Cause: RuntimeError: Engine core initialization failed. Failed core proc(s): {}", True, 0.9),
        ("The server was killed by SIGKILL while starting.", True, 0.9),
    ],
)
def test_too_little_memory_asks_for_smaller_settings_that_change_no_number(
    words: str, is_cpu: bool, share: float
) -> None:
    asked = vllm(kv_cache_gib=8)
    smaller = instead(asked, f"INFO all is well\n{words}\nmore", is_cpu)
    assert smaller is not None and smaller.identity() == asked.identity()
    assert smaller.max_num_seqs == 128
    assert smaller.kv_cache_gib == (4 if is_cpu else 8)
    assert smaller.gpu_memory_utilization == pytest.approx(share)
    assert smaller.changed_from(asked)["max_num_seqs"] == [256, 128]


@pytest.mark.parametrize(
    "words",
    [
        "error: unrecognized arguments: --no-such",
        "Cause: ValueError: size 48\nRuntimeError: Engine core initialization failed. Failed core proc(s): {}",
        "safetensors: EOF",
    ],
)
def test_what_smaller_settings_cannot_mend_is_not_tried_again(words: str) -> None:
    assert instead(vllm(), words, on_cpu=True) is None


def test_what_cannot_be_smaller_is_not_tried_again() -> None:
    least = vllm(max_num_seqs=1, kv_cache_gib=1, gpu_memory_utilization=LEAST_UTILIZATION)
    assert instead(least, "MemoryError", on_cpu=True) is None
    other_port = instead(least, "OSError: [Errno 98] Address already in use", on_cpu=True)
    assert other_port == least, "a taken port is another matter"


# Failures as records.


def cells(store: Path, *overrides: str) -> list[Cell]:
    """Of the embedded model on a few word problems; as it is, unless the overrides say otherwise."""
    settings = ["suite=tiny_sums", "limit=40", "calibration.held_out=0", f"store={store}"]
    return list(expand([*settings, *(overrides or ["method=none"])]).cells)


def recorded(cell: Cell, store: Store, failure: Failure | None) -> dict:
    (task,) = cell.tasks
    scoring.record(cell, None, None, task, failure, store, run="run-7")
    found = store.read_json("records", cell.record_name(task))
    assert found is not None
    return found


def test_a_failed_record_says_what_was_asked_where_it_broke_and_why(tmp_path: Path) -> None:
    store, (cell,) = Store(tmp_path), cells(tmp_path)
    failures: dict[str, Failure] = {}
    with scoring.noting(failures, cell.tasks), during("serve"), during("export"):
        problem = StageError("The server ended with status 3. Cause: none")
        keep_log(problem, "one\ntwo")
        raise problem
    found = recorded(cell, store, failures["tiny_sums"])
    assert (found["status"], found["stage"], found["run"]) == ("failed", "export", "run-7")
    assert found["error"] == "The server ended with status 3. Cause: none"
    assert found["reason"] == f"{cell.slug} on tiny_sums: export failed. {found['error']}"
    assert found["log_tail"] == "one\ntwo" and "metrics" not in found
    tidy = report.frame(Sweep("one", (cell,), store))
    assert tidy["status"].tolist() == ["failed"] and tidy["metric"].isna().all()


def test_what_nobody_foresaw_is_kept_in_full_and_told_in_a_line(tmp_path: Path) -> None:
    store, (cell,) = Store(tmp_path), cells(tmp_path)
    failures: dict[str, Failure] = {}
    with scoring.noting(failures, cell.tasks), during("plan"):
        raise MemoryError("not enough")
    found = recorded(cell, store, failures["tiny_sums"])
    assert found["error"].startswith("Traceback") and found["stage"] == "plan" and found["log_tail"] is None
    assert found["reason"].endswith("plan failed. MemoryError: not enough")


def test_a_score_that_is_gone_makes_a_failed_record_not_the_end_of_the_sweep(tmp_path: Path) -> None:
    store, (cell,) = Store(tmp_path), cells(tmp_path)
    given = gather.statistics(cell, store)
    made = stages.plan(cell, given, store)
    (task,) = cell.tasks
    scoring.record(cell, given, made, task, None, store, run="")
    found = store.read_json("records", cell.record_name(task))
    assert found is not None and (found["status"], found["stage"]) == ("failed", "record")
    assert "metrics" not in found and "is gone" in found["reason"]


FULL = """
import sys
from pathlib import Path
from harness import scoring
from harness.errors import DiskFullError
from harness.store import Store
from tests.test_server_faults import cells
store = Path(sys.argv[1])
(cell,) = cells(store)
(store / "filling").write_bytes(b"x" * 300_000)
try:
    scoring.record(cell, None, None, cell.tasks[0], scoring.Failure("score", "y" * 200_000, None), Store(store), "")
except DiskFullError as problem:
    print("REFUSED", problem, [path.name for path in (store / "records").glob("*")])
"""


@pytest.mark.slow
def test_a_disk_too_full_for_a_failed_record_is_said(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=400k none "{tmp_path}" && exec "$@"'
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets us mount nothing")
    run = [*isolated, sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "REFUSED The disk is full: records" in done.stdout and done.stdout.strip().endswith("[]"), done.stderr


# Secrets.

PLANTED = {
    "HF_TOKEN": "hf_plantedsecret1234567890",
    "OPENAI_API_KEY": "sk-planted-9876543210",
    "MY_SERVICE_PASSWORD": "plantedpassword",
    "HTTPS_PROXY_OF_OURS": "http://user:plantedproxy@127.0.0.1:9",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_secrets_reach_no_server_and_no_text(planted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHORT_KEY", "a")
    given = child_environment()
    assert not set(PLANTED) & set(given) and "PATH" in given
    said = " and ".join(PLANTED.values())
    assert without_secrets(f"a {said} a") == f"a {' and '.join(f'<{name}>' for name in PLANTED)} a"
    (tmp_path / "log").write_text("x" * 490 + f"{PLANTED['HF_TOKEN']}\nValueError: {PLANTED['OPENAI_API_KEY']}\n")
    for text in (cause(tmp_path / "log"), tail(tmp_path / "log")):
        assert not any(value[:12] in text for value in PLANTED.values()), "not even cut off"
        assert "<OPENAI_API_KEY>" in text


def test_a_traceback_in_a_record_holds_no_secret(planted: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store, (cell,) = Store(tmp_path), cells(tmp_path)
    failures: dict[str, Failure] = {}
    with scoring.noting(failures, cell.tasks):
        raise KeyError(f"refused: {PLANTED['HF_TOKEN']}")
    recorded(cell, store, failures["tiny_sums"])
    assert "<HF_TOKEN>" in failures["tiny_sums"].happened
    assert holding(tmp_path, list(PLANTED.values())) == []
    assert PLANTED["HF_TOKEN"] not in capsys.readouterr().err


def holding(folder: Path, values: list[str]) -> list[Path]:
    """Files that hold one of these; compressed ones are looked into."""
    import gzip

    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            content = gzip.decompress(raw) if path.suffix == ".gz" else raw
            if any(value.encode() in content for value in values):
                found.append(path)
    return found


@pytest.mark.slow
def test_no_secret_is_anywhere_in_a_store(planted: None, tmp_path: Path) -> None:
    """After a cell that passed, one that never started, and one whose engine died while lm-eval asked it: the server
    then refuses, and of a refusal lm-eval logs what it had sent.
    """
    store = tmp_path / "store"
    command = [sys.executable, "-m", "harness.run", "suite=tiny_sums", "limit=40", "calibration.held_out=0"]
    command += [f"store={store}", "method=none", "serve.max_model_len=512"]
    run(command, "serve=hf")
    run(command, "serve=vllm", "serve.extra_args=[--no-such-argument]")
    run(command, "serve=plan", "limit=300", breaks=lambda: processes("EngineCore"))
    records = [json.loads(path.read_text()) for path in store.glob("records/*.json")]
    assert sorted(found["status"] for found in records) == ["done", "failed", "failed"]
    assert holding(store, list(PLANTED.values())) == []


def run(command: list[str], *more: str, breaks: Callable[[], list[psutil.Process]] | None = None) -> None:
    """A run to its end; ``breaks``: what is killed once it is scored."""
    process = subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if breaks is not None:
            eventually(lambda: process.poll() is not None or is_busy(process.pid), 250)
            for victim in breaks():
                victim.kill()
        process.wait(300)
    finally:
        process.kill()
        process.wait()


def is_busy(pid: int) -> bool:
    """Whether this process asks a server many things at once, as lm-eval's client does."""
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return sum(connection.status == psutil.CONN_ESTABLISHED for connection in connections) >= 8
    return False


def processes(word: str) -> list[psutil.Process]:
    """Those below this one whose command line or name holds the word."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
    return found


# The real vLLM under fire.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    serve.release()


def small(**changes: object) -> VLLM:
    return vllm(dtype="float32", max_model_len=256, how="plan", **changes)


def servers_of(part: str) -> list[psutil.Process]:
    """Processes of vLLM that run for this one: the engine, the server before it, or what they are forked from."""
    hosts = [psutil.Process(host._process.pid) for host in serve._hosts.values() if host.is_alive]
    if part == "host":
        return hosts
    engines = [p for host in hosts for p in host.children(recursive=True) if "Engine" in p.name()]
    return engines if part == "engine" else [p for host in hosts for p in host.children() if p not in engines]


def cell_to_record(cell: Cell, store: Store, breaks: Callable[[], None] | None = None) -> dict:
    """As `harness.run.run` goes; ``breaks`` is called while the model is scored."""
    given = gather.statistics(cell, store)
    made = stages.plan(cell, given, store)
    (task,) = cell.tasks
    failures: dict[str, Failure] = {}
    with scoring.noting(failures, [task]), scoring.serving(cell, made, store) as serving:
        if breaks is not None:
            threading.Thread(target=breaks, daemon=True).start()
        with scoring.noting(failures, [task]):
            scoring.score(cell, made, task, serving, store)
    scoring.record(cell, given, made, task, failures.get(task.name), store, run="")
    found = store.read_json("records", cell.record_name(task))
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, what, words",
    [
        ("engine", signal.SIGKILL, "exited unexpectedly"),
        ("server", signal.SIGKILL, "was killed by SIGKILL"),
        ("host", signal.SIGKILL, "The process that runs vLLM"),
        ("engine", signal.SIGSTOP, "gave no sign of life for 6 s"),
        ("server", signal.SIGSTOP, "gave no sign of life for 6 s"),
    ],
)
def test_a_server_that_breaks_while_it_is_scored_fails_its_cell_and_no_other(
    tmp_path: Path, part: str, what: signal.Signals, words: str
) -> None:
    store = Store(tmp_path)
    first, second = cells(tmp_path, "method=none,random", "limit=300", "serve.silence_timeout_s=6")
    broken: list[float] = []
    gone: list[psutil.Process] = []

    def break_it() -> None:
        eventually(lambda: is_busy(os.getpid()), 200)
        time.sleep(0.5)
        gone.extend([*servers_of("engine"), *servers_of("server")])
        broken.append(time.monotonic())
        for victim in servers_of(part):
            victim.send_signal(what)

    found = cell_to_record(first, store, break_it)
    took = time.monotonic() - broken[0]
    assert (found["status"], found["stage"]) == ("failed", "score") and "metrics" not in found
    assert words in found["reason"] and len(found["log_tail"].splitlines()) >= 10
    assert took < SOON + (10 if what == signal.SIGSTOP else 0), took
    print(f"{part} {what.name}: recorded after {took:.1f} s")
    second_record = cell_to_record(second, store)
    assert second_record["status"] == "done" and second_record["served"]["changed_settings"] == {}
    assert gone and not wait_until_gone(gone, 10), "whatever was stopped or killed is no more"
    serve.release()


def at_first(part: str, what: signal.Signals, times: int) -> list[int]:
    """Send this signal to the first so many processes of that kind, as soon as they are there; their pids."""
    done: list[int] = []

    def wait() -> None:
        deadline = time.monotonic() + 300
        while len(done) < times and time.monotonic() < deadline:
            for process in servers_of(part):
                with contextlib.suppress(psutil.Error):
                    if process.pid not in done:
                        process.send_signal(what)
                        done.append(process.pid)
            time.sleep(0.02)

    threading.Thread(target=wait, daemon=True).start()
    return done


@pytest.mark.slow
def test_an_engine_killed_for_memory_starts_again_smaller_and_says_so(folder: Path, tmp_path: Path) -> None:
    done = at_first("engine", signal.SIGKILL, times=1)
    with small().serve(Weights(folder), "tiny-a", tmp_path / "log") as served:
        assert len(done) == 1, "the first start was killed"
        assert served.changed_settings == {"max_num_seqs": [256, 128]}
        assert served.llm.concurrency == 128
        assert serve.in_words(served.changed_settings) == ", max_num_seqs 128 instead of 256"


@pytest.mark.slow
def test_memory_that_never_suffices_fails_after_three_starts_and_says_what_was_tried(
    folder: Path, tmp_path: Path
) -> None:
    """What this build of vLLM refuses itself: a key-value cache that no machine holds."""
    if not serve._is_cpu_build():
        pytest.skip("this is about vLLM's CPU build")
    start = pytest.raises(StageError, match="3 starts: max_num_seqs 256, kv_cache_gib 400000, .* kv_cache_gib 100000")
    with start as refused, small(kv_cache_gib=400_000).serve(Weights(folder), "tiny-b", tmp_path / "log"):
        pass
    assert "less than requested memory for kv" in str(refused.value)
    assert log_tail_of(refused.value)
    for key in [key for key in serve._hosts if key[0] >= 100_000]:
        serve._hosts.pop(key).close()


@pytest.mark.slow
def test_an_engine_frozen_while_it_starts_ends_in_time(folder: Path, tmp_path: Path) -> None:
    with small().serve(Weights(folder), "tiny-c", tmp_path / "log"):
        pass  # so that the process that forks servers is up
    before = {process.pid for process in [*servers_of("engine"), *servers_of("server")]}
    frozen = at_first("engine", signal.SIGSTOP, times=1)
    late = pytest.raises(StageError, match="not up within serve.startup_timeout_s")
    with late, small(startup_timeout_s=15).serve(Weights(folder), "tiny-d", tmp_path / "log"):
        pass
    assert frozen and not psutil.pid_exists(frozen[0])
    assert {process.pid for process in [*servers_of("engine"), *servers_of("server")]} <= before


@pytest.mark.slow
def test_an_engine_frozen_at_its_first_question_ends_in_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = serve.probe

    def freeze_and_ask(llm: LLM) -> list[float]:
        for process in servers_of("engine"):
            process.send_signal(signal.SIGSTOP)
        return ask(llm)

    monkeypatch.setattr(serve, "probe", freeze_and_ask)
    silent = pytest.raises(StageError, match="gave no sign of life for 5 s")
    start = time.monotonic()
    with silent, small(silence_timeout_s=5).serve(Weights(folder), "tiny-e", tmp_path / "log"):
        pass
    assert time.monotonic() - start < 120
    assert servers_of("engine") == []


@pytest.mark.slow
def test_an_engine_frozen_between_plans_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = cells(tmp_path, "method=none,random", "serve.startup_timeout_s=60")
    first = replace(first, serve=replace(first.serve, startup_timeout_s=60))
    assert cell_to_record(first, store)["status"] == "done"
    (frozen,) = servers_of("engine")
    frozen.send_signal(signal.SIGSTOP)
    assert cell_to_record(second, store)["status"] == "done"
    assert not wait_until_gone([frozen], 10)
    serve.release()


@pytest.mark.slow
def test_two_workers_start_servers_at_once_and_each_gets_its_own(folder: Path, tmp_path: Path) -> None:
    """Each with a process of its own that servers are forked from; whatever listens, does so for this machine alone."""
    workers: dict[str, subprocess.Popen[str]] = {}
    for name in ("one", "two"):
        script = [sys.executable, "-c", WORKER, str(folder), name, str(tmp_path / name)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": outside() or "lo"}
        workers[name] = subprocess.Popen(
            script, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    try:
        addresses = {}
        for name, worker in workers.items():
            assert worker.stdout
            addresses[name] = worker.stdout.readline().strip()
        assert len(set(addresses.values())) == 2 and all(addresses.values())
        for name, url in addresses.items():
            served = httpx.get(f"{url}/v1/models", timeout=30, trust_env=False).json()["data"]
            assert [card["id"] for card in served] == [name]
            listening = listening_of(workers[name].pid)
            assert listening and {address for address, _ in listening} <= {"127.0.0.1", "::1"}, listening
    finally:
        for worker in workers.values():
            worker.communicate("", timeout=120)


WORKER = """
import sys
from pathlib import Path
from harness.served import Weights
from tests.conftest import vllm
with vllm(dtype="float32", max_model_len=256).serve(Weights(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])) as one:
    print(one.llm.url, flush=True)
    sys.stdin.read()
"""


def outside() -> str | None:
    """An interface that others reach too, if there is one."""
    return next((name for name in psutil.net_if_addrs() if name != serve.loopback()), None)


def listening_of(pid: int) -> set[tuple[str, int]]:
    """Where a process and all below it listen."""
    found = set()
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            connections = process.net_connections("inet")
            found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_what_a_server_opens_for_its_own_processes_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "eth0")
    given = vllm()._environment()
    assert given["GLOO_SOCKET_IFNAME"] == given["NCCL_SOCKET_IFNAME"] == serve.loopback()
    assert given["VLLM_HOST_IP"] == "127.0.0.1"
