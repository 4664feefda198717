"""Generated programs: EvalPlus's verdicts, and no way out."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from harness.errors import StageError, UserError
from harness.models import ROOT
from tasks import evalplus_code
from tasks.evalplus_code import EvalPlus, judge
from tests.conftest import needs_shared

TINY = ROOT / "tasks" / "tiny" / "data" / "tiny_code.jsonl"
PROMPT = 'def add(a, b):\n    """Return the sum."""\n'
PROBLEM = {
    "task_id": "Test/0",
    "prompt": PROMPT,
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "base_input": [[1, 2], [3, 4]],
    "plus_input": [[-1, 1], [0, 0]],
    "atol": 0,
    "contract": "",
}


def read(path: Path) -> list[dict]:
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt") as file:
        return [json.loads(line) for line in file]


def write_problems(folder: Path, number: int) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({**PROBLEM, "task_id": f"Test/{i}"}) + "\n" for i in range(number)))
    return path


def verdicts(folder: Path, *programs: str) -> list[tuple[str, str]]:
    """Base and plus verdicts of definitions of ``add``, judged together."""
    problems = write_problems(folder, len(programs))
    named = {f"Test/{i}": textwrap.dedent(program) for i, program in enumerate(programs)}
    found = judge("humaneval", problems, named, folder, memory_gib=1, timeout_s=300)
    return [(found[name]["base"], found[name]["plus"]) for name in named]


def running(argument: str) -> list[psutil.Process]:
    """Processes with this argument."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += [process] if argument in process.cmdline() else []
    return found


def assert_ends(argument: str) -> None:
    """Processes with this argument are gone soon."""
    deadline = time.monotonic() + 10
    while running(argument) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(argument)


def test_canonical_solutions_pass_and_wrong_ones_fail(tmp_path: Path):
    problems = read(TINY)[:20]
    good = {p["task_id"]: p["prompt"] + p["canonical_solution"] for p in problems[:12]}
    bad = {p["task_id"]: p["prompt"] + "    return 'no'\n" for p in problems[12:]}
    found = judge("humaneval", TINY, good | bad, tmp_path)
    assert {found[name]["plus"] for name in good} == {"pass"}
    assert {found[name]["base"] for name in bad} == {"fail"}
    assert len(found) == 20


def test_base_and_plus_tests_are_told_apart(tmp_path: Path):
    found = verdicts(
        tmp_path,
        "def add(a, b):\n    return a + b",
        "def add(a, b):\n    return abs(a) + b",
        "def add(a, b):\n    return a + b if a < 1 else None",
        "this is no program (((",
        "",
    )
    fail = ("fail", "fail")
    assert found == [("pass", "pass"), ("pass", "fail"), ("fail", "pass"), fail, fail]


def test_what_follows_the_function_is_cut_off(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    code = PROMPT + "    return a + b\n\nprint(add(1, 2))\nassert False\n"
    found = judge("humaneval", problems, {"Test/0": code}, tmp_path)
    assert found["Test/0"]["base"] == "pass"
    assert "assert" not in found["Test/0"]["solution"]


def test_hostile_programs_fail_and_the_judge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLANTED_TOKEN", "secret")
    kept = tmp_path / "kept"
    kept.write_text("kept")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]
    honest = "def add(a, b):\n    return a + b"
    programs = {
        "loops": "def add(a, b):\n    while True: pass",
        "loops whatever is raised": """
            def add(a, b):
                while True:
                    try:
                        while True: pass
                    except BaseException: pass
            """,
        "loops when defined": """
            def spin():
                while True: pass
                return 0
            x = spin()
            def add(a, b):
                return a + b + x
            """,
        "takes all memory": "def add(a, b):\n    x = bytearray(3 * 2**30)\n    return a + b",
        "exits": "import os\ndef add(a, b):\n    os._exit(0)\n    return a + b",
        "kills itself": "import signal\ndef add(a, b):\n    signal.raise_signal(9)\n    return a + b",
        "prints without end": "def add(a, b):\n    while True: print('x' * 10**6)\n    return 1",
        "writes without end": "import os\ndef add(a, b):\n    while True: os.write(1, b'x' * 10**6)\n    return 1",
        "reads the environment": """
            import os
            def add(a, b):
                return a + b if "PLANTED_TOKEN" in os.environ else None
            """,
        "reads the environment of others": """
            import io, glob
            def add(a, b):
                text = b"".join(io.open(f, "rb").read() for f in glob.glob("/proc/[0-9]*/environ"))
                return a + b if b"PLANTED_TOKEN" in text else None
            """,
        "connects": f"""
            import socket
            def add(a, b):
                socket.create_connection(("127.0.0.1", {port}), timeout=1)
                return a + b
            """,
        "deletes a file": f"import posix\ndef add(a, b):\n    posix.unlink({str(kept)!r})\n    return a + b",
        "writes a file": f"""
            import io
            def add(a, b):
                io.open({str(tmp_path / "made")!r}, "w").write("x")
                return a + b
            """,
        "mounts its way out": """
            import ctypes
            def add(a, b):
                libc = ctypes.CDLL(None)
                return a + b if libc.mount(b"none", b"/", None, 0x1020, None) == 0 else None
            """,
        "fills the scratch space": """
            import io
            def add(a, b):
                for i in range(1000): io.open(f"f{i}", "wb").write(b"x" * 2**22)
                return a + b
            """,
        "leaves a process": """
            import os
            def add(a, b):
                os.posix_spawn("/bin/sleep", ["sleep", "98765"], {})
                return None
            """,
        "writes its own verdict": """
            import os
            def add(a, b):
                for i in range(30):
                    line = '{"task_id": "Test/%d", "solution": "", "base": "pass", "plus": "pass"}' % i
                    for descriptor in range(1, 60):
                        try: os.write(descriptor, line.encode() + b"\\n")
                        except OSError: pass
                return None
            """,
        "kills all it sees": "import ctypes\ndef add(a, b):\n    ctypes.CDLL(None).kill(-1, 9)\n    return None",
    }
    start = time.monotonic()
    found = verdicts(tmp_path, honest, *programs.values(), honest)
    assert found[0] == found[-1] == ("pass", "pass")
    passed = [name for name, (base, plus) in zip(programs, found[1:-1], strict=True) if "pass" in (base, plus)]
    assert not passed
    assert found[1] == ("fail", "fail")
    assert time.monotonic() - start < 200
    assert kept.read_text() == "kept"
    assert not (tmp_path / "made").exists()
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert not running("98765")


def test_a_judge_that_takes_too_long_is_ended(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    code = "import time\ndef add(a, b):\n    time.sleep(60)\n    return a + b"
    with pytest.raises(StageError, match="not done after 1 s"):
        judge("humaneval", problems, {"Test/0": code}, tmp_path, timeout_s=1)
    assert_ends(str(problems))


def test_a_broken_problem_is_an_error_and_no_verdict(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    problems.write_text(problems.read_text().replace("return a + b", "return a + undefined"))
    with pytest.raises(StageError, match=r"(?s)Test/0: .*undefined"):
        judge("humaneval", problems, {"Test/0": "def add(a, b): return 1"}, tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from tasks.evalplus_code import judge
folder = Path(sys.argv[1])
loop = "import time\\ntime_ = [time.sleep(1) for _ in range(60)]\\ndef add(a, b):\\n    return time_"
judge("humaneval", folder / "problems.jsonl", {"Test/0": loop}, folder)
"""


def test_the_judge_ends_with_the_harness(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    harness = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT)

    deadline = time.monotonic() + 60
    # unshare, the judge, two processes around the program, the program
    while len(running(str(problems))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running(str(problems))) >= 5
    harness.kill()
    harness.wait()
    assert_ends(str(problems))


def test_no_sandbox_means_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    task = EvalPlus("code", "humaneval", str(write_problems(tmp_path, 1)))
    task.check()
    monkeypatch.setattr(evalplus_code, "SANDBOX", ("unshare-that-is-not-there",))
    with pytest.raises(UserError, match="is not installed.*user namespaces"):
        task.check()
    monkeypatch.setattr(evalplus_code, "SANDBOX", ("sh", "-c", "echo unshare failed: not permitted >&2; exit 1"))
    with pytest.raises(UserError, match="has no sandbox .unshare failed: not permitted"):
        task.check()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dataset": "apps"}, "neither humaneval nor mbpp"),
        ({"problems": "no/such.jsonl"}, "cannot read the problem file"),
        ({"limit": 0}, "leaves no problems"),
    ],
)
def test_bad_settings_are_refused(change: dict, words: str):
    settings = {"name": "code", "dataset": "humaneval", "problems": str(TINY), **change}
    with pytest.raises(UserError, match=words):
        EvalPlus(**settings).check()


def test_a_problem_without_a_field_is_refused(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({key: value for key, value in PROBLEM.items() if key != "atol"}))
    with pytest.raises(UserError, match="has no atol"):
        EvalPlus("code", "humaneval", str(path)).check()


def test_equal_programs_are_judged_once_but_not_after_a_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def run(dataset, problems, programs, workdir, memory_gib, timeout_s):
        asked.append(set(programs))
        return {name: {"solution": code, "base": code, "plus": code} for name, code in programs.items()}

    monkeypatch.setattr(evalplus_code, "_run", run)
    monkeypatch.setattr(evalplus_code, "_judged", {})
    problems = tmp_path / "problems"
    problems.write_text("")
    for programs in ({"a": "pass", "b": "timeout"}, {"a": "pass", "b": "timeout"}, {"a": "fail"}, {"a": "fail"}):
        found = evalplus_code.judge("humaneval", problems, programs, tmp_path)
        assert {name: verdict["base"] for name, verdict in found.items()} == programs
    assert asked == [{"a", "b"}, {"b"}, {"a"}]


def test_identity_follows_the_content(tmp_path: Path):
    path = write_problems(tmp_path, 2)
    task = EvalPlus("code", "humaneval", str(path))
    before = task.identity()
    assert EvalPlus("code", "humaneval", str(path), judge_timeout_s=9).identity() == before
    write_problems(tmp_path, 3)
    assert task.identity() != before


@pytest.mark.slow
def test_verdicts_equal_evalplus_evaluate(tmp_path: Path):
    problems = read(TINY)[:8]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    bodies = [p["canonical_solution"] for p in problems[:4]]
    bodies += ["    return None\n", "    while True: pass\n", "    return (\n", "    raise ValueError\n"]
    programs = {p["task_id"]: p["prompt"] + body for p, body in zip(problems, bodies, strict=True)}
    found = judge("humaneval", path, programs, tmp_path)

    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"task_id": t, "solution": found[t]["solution"]}) + "\n" for t in programs))
    subprocess.run(
        [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(samples)],
        env={**os.environ, "HUMANEVAL_OVERRIDE_PATH": str(path), "XDG_CACHE_HOME": str(tmp_path)},
        check=True,
        timeout=300,
    )
    theirs = json.loads((tmp_path / "samples_eval_results.json").read_text())["eval"]
    for task_id, verdict in found.items():
        (row,) = theirs[task_id]
        assert (row["base_status"], row["plus_status"]) == (verdict["base"], verdict["plus"]), task_id


@pytest.mark.slow
@pytest.mark.parametrize("dataset, file, passing", [("humaneval", "HumanEvalPlus", 163), ("mbpp", "MbppPlus", 376)])
def test_published_problems_canonical_solutions(tmp_path: Path, dataset: str, file: str, passing: int):
    path = needs_shared(f"data/evalplus/{file}.jsonl.gz")
    problems = read(path)
    programs = {p["task_id"]: p["prompt"] + p["canonical_solution"] for p in problems}
    found = judge(dataset, path, programs, tmp_path)
    statuses = Counter((verdict["base"], verdict["plus"]) for verdict in found.values())
    assert statuses["pass", "pass"] >= passing, statuses
