"""Generated programs: EvalPlus's verdicts. What hostile ones may do is in test_hostile.py."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness.errors import StageError, UserError
from harness.models import ROOT
from tasks import judging, plain_values, sandbox
from tasks.evalplus_code import UNSANDBOXED, EvalPlus
from tasks.judging import judge
from tasks.sandbox import FORMS, NO_SANDBOX
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


def write_problems(folder: Path, number: int, **changes: object) -> Path:
    path = folder / "problems.jsonl"
    problems = ({**PROBLEM, "task_id": f"Test/{i}", **changes} for i in range(number))
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def write_long_problems(folder: Path) -> Path:
    """Two that give a program a minute: it is defined in the time of all its inputs."""
    return write_problems(folder, 2, base_input=[[1, 2]] * 60)


def verdicts(folder: Path, *programs: str) -> list[tuple[str, str]]:
    """Base and plus verdicts of definitions of ``add``, judged together."""
    problems = write_problems(folder, len(programs))
    named = {f"Test/{i}": textwrap.dedent(program) for i, program in enumerate(programs)}
    found = judge("humaneval", problems, named, folder, memory_gib=1, timeout_s=300)
    return [(found[name]["base"], found[name]["plus"]) for name in named]


def needs(form: str) -> str:
    if (problem := judging.why_not(form)) is not None:
        pytest.skip(f"no {form} here: {problem}")
    return form


def descendants(process: psutil.Process, at_least: int) -> list[psutil.Process]:
    """Processes that this one started, as soon as there are so many."""
    deadline = time.monotonic() + 60
    while len(found := process.children(recursive=True)) < at_least and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) >= at_least
    return found


def with_words(processes: list[psutil.Process], words: str) -> list[psutil.Process]:
    """Those whose command line has these words; some may have ended since."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [process] if words in " ".join(process.cmdline()) else []
    return found


def assert_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


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


def test_a_judge_that_takes_too_long_is_ended(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    code = "import time\ndef add(a, b):\n    time.sleep(60)\n    return a + b"
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(StageError, match="not done after 1 s"):
        judge("humaneval", problems, {"Test/0": code}, tmp_path, timeout_s=1)
    assert_end(list(set(psutil.Process().children(recursive=True)) - before))


def test_a_broken_problem_is_an_error_and_no_verdict(tmp_path: Path):
    problems = write_problems(tmp_path, 1)
    problems.write_text(problems.read_text().replace("return a + b", "return a + undefined"))
    with pytest.raises(StageError, match=r"(?s)Test/0: .*undefined"):
        judge("humaneval", problems, {"Test/0": "def add(a, b): return 1"}, tmp_path)


SCRIPT = """
import sys
import tempfile
from pathlib import Path
from tasks.judging import judge
folder = Path(sys.argv[1])
loop = "def spin():\\n    while True: pass\\n    return 0\\nx = spin()\\ndef add(a, b):\\n    return a + b + x"
honest = "def add(a, b):\\n    return a + b"
print(judge("humaneval", folder / "problems.jsonl", {"Test/0": loop, "Test/1": honest}, folder, form=sys.argv[2]))
"""
PROCESSES = 8  # the judge, a worker and its checker; the sandbox's two, one per program and two of it


@pytest.mark.parametrize("form", FORMS)
def test_the_judge_ends_with_the_harness(tmp_path: Path, form: str):
    write_long_problems(tmp_path)
    harness = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), needs(form)], cwd=ROOT)
    found = descendants(psutil.Process(harness.pid), PROCESSES)
    harness.kill()
    harness.wait()
    assert_end(found)


def test_a_worker_that_is_killed_costs_one_program_its_verdict(tmp_path: Path):
    write_long_problems(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), judging.first_form()]
    harness = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert harness.stdout is not None
    found = descendants(psutil.Process(harness.pid), PROCESSES)
    workers = with_words(found, "evalplus_judge.py")
    judge_process = next(process for process in workers if process.ppid() == harness.pid)
    deadline = time.monotonic() + 60
    while len(left := judge_process.children()) > 2 and time.monotonic() < deadline:  # the loop's, and the sandbox
        time.sleep(0.05)
    next(process for process in left if process in workers).kill()
    verdicts = ast.literal_eval(harness.stdout.read())
    assert harness.wait() == 0
    assert {name: verdict["base"] for name, verdict in verdicts.items()} == {"Test/0": "killed", "Test/1": "pass"}
    assert_end(found)


def test_a_sandbox_that_ends_is_no_verdict(tmp_path: Path):
    write_long_problems(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), judging.first_form()]
    harness = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = descendants(psutil.Process(harness.pid), PROCESSES)
    inside = with_words(found, "tasks.program import main")
    next(process for process in inside if process.name().startswith("python")).kill()
    _, errors = harness.communicate(timeout=120)
    assert "StageError" in errors and "the sandbox ended" in errors
    assert_end(found)


UNSANDBOXED_SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from harness.errors import UserError
from tasks.evalplus_code import UNSANDBOXED, EvalPlus
from tasks.judging import judge
folder = Path(sys.argv[1])
task = EvalPlus("code", "humaneval", str(folder / "problems.jsonl"))
said = []
for words in (None, "yes", UNSANDBOXED):
    try:
        replace(task, unsandboxed=words).check()
    except UserError as error:
        said.append(str(error))
form = replace(task, unsandboxed=UNSANDBOXED)._isolation()
codes = ["def add(a, b):\\n    return a + b", "import posix\\ndef add(a, b):\\n    return posix.fork()"]
found = judge("humaneval", task._path, {f"Test/{i}": code for i, code in enumerate(codes)}, folder, form=form)
print(json.dumps([said, form, [found[f"Test/{i}"]["base"] for i in range(2)]]))
"""


def test_no_sandbox_means_no_run_unless_one_says_so_in_so_many_words(tmp_path: Path):
    """Where no user namespace can be made: inside a bubblewrap that forbids it."""
    write_problems(tmp_path, 2)
    command = [needs("bwrap"), "--dev-bind", "/", "/", "--unshare-user", "--disable-userns", "--die-with-parent", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", UNSANDBOXED_SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (refused, unclear), form, bases = json.loads(done.stdout)
    assert re.search(r"has no sandbox \(bwrap: .+; unshare: .+\)", refused) and UNSANDBOXED in refused
    assert f"be these words: {UNSANDBOXED}" in unclear
    assert form == NO_SANDBOX
    assert bases == ["pass", "fail"]


def test_the_folder_of_a_try_in_which_the_harness_was_killed_is_removed(tmp_path: Path, monkeypatch):
    """By the next try; that of one that is going on stays, and so does another machine's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = judging._here()
    left = [f"{here}{gone.pid}-a", f"{here}{os.getpid()}-b", f"judge-elsewhere-{gone.pid}-c", f"judge-{gone.pid}"]
    for name in left:
        (tmp_path / name).mkdir()
    judging.why_not.__wrapped__("none")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left[1:])


def test_where_there_is_a_sandbox_it_is_used_whatever_one_says(tmp_path: Path):
    needs(FORMS[-1])
    task = EvalPlus("code", "humaneval", str(write_problems(tmp_path, 1)), unsandboxed=UNSANDBOXED)
    assert task._isolation() in FORMS


USERS_SCRIPT = """
import json, sys
from pathlib import Path
from tasks.judging import judge
folder, form = Path(sys.argv[1]), sys.argv[2]
codes = [
    "import os\\ndef add(a, b):\\n    return a + b if os.getuid() not in (0, 12345) else None",
    "import io\\ndef add(a, b):\\n    return a + b if io.open(%r).read() else None" % str(folder / "problems.jsonl"),
    "import threading, time\\ndef add(a, b):\\n"
    "    for _ in range(150): threading.Thread(target=time.sleep, args=(.5,), daemon=True).start()\\n    return a + b",
]
programs = {f"Test/{i}": code for i, code in enumerate(codes)}
found = judge("humaneval", folder / "problems.jsonl", programs, folder, form=form)
print(json.dumps([found[name]["base"] for name in programs]))
"""


@pytest.mark.parametrize("form", FORMS)
def test_an_ordinary_user_has_the_same_sandbox(tmp_path: Path, form: str):
    """Root, here, becomes one first, with this Python where that user can reach it."""
    needs(form)
    write_problems(tmp_path, 3)
    command: list[str] = []
    folder = str(tmp_path)
    if os.geteuid() == 0:
        needs("bwrap")
        os.chown(tmp_path, 12345, 12345)
        folder = "/mnt"
        prefix = Path(sys.base_prefix).resolve()
        hidden = [
            word for parent in prefix.parents if not parent.stat().st_mode & 1 for word in ("--tmpfs", str(parent))
        ]
        parents = [word for parent in reversed(prefix.parents) for word in ("--dir", str(parent))] if hidden else []
        as_user = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all")
        files = (*hidden, *parents, "--ro-bind", str(prefix), str(prefix), "--bind", str(tmp_path), folder)
        command = ["bwrap", "--dev-bind", "/", "/", *files, *as_user]
    command += [sys.executable, "-c", USERS_SCRIPT, folder, form]
    environment = {**os.environ, "TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["pass", "fail", "fail"]


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

    def run(dataset, problems, programs, workdir, memory_gib, timeout_s, form):
        asked.append(set(programs))
        return {name: {"solution": code, "base": code, "plus": code} for name, code in programs.items()}

    monkeypatch.setattr(judging, "_run", run)
    monkeypatch.setattr(judging, "_judged", {})
    problems = tmp_path / "problems"
    problems.write_text("")
    for programs in ({"a": "pass", "b": "timeout"}, {"a": "pass", "b": "timeout"}, {"a": "fail"}, {"a": "fail"}):
        found = judging.judge("humaneval", problems, programs, tmp_path)
        assert {name: verdict["base"] for name, verdict in found.items()} == programs
    assert asked == [{"a", "b"}, {"b"}, {"a"}]


def test_identity_follows_the_content(tmp_path: Path):
    path = write_problems(tmp_path, 2)
    task = EvalPlus("code", "humaneval", str(path))
    before = task.identity()
    assert EvalPlus("code", "humaneval", str(path), judge_timeout_s=9).identity() == before
    write_problems(tmp_path, 3)
    assert task.identity() != before


HONEST = {
    # entry point of a problem: its reference solution, inputs, tolerance, and programs that are right or nearly so
    "add": (
        "return [a, b, a / 3]",
        [[1, 2], [3, 4]],
        0,
        [
            "return [a, b, a / 3 + 1e-9]",
            "return [a, b, a / 3 + 1e-3]",
            "return (a, b, a / 3)",
            "import numpy; return numpy.array([a, b, a / 3])",
            "import numpy; return [numpy.int64(a), numpy.float64(b), numpy.float64(a / 3)]",
            "from fractions import Fraction; return [a, Fraction(b), a / 3]",
            "from decimal import Decimal; return [Decimal(a), b, a / 3]",
            "return [x for x in (a, b, a / 3)]",
            "import tempfile; return [a, b, a / 3] if tempfile.mkdtemp() else None",
            "import tempfile; tempfile.TemporaryFile('w').write('x'); return [a, b, a / 3]",
            "import threading; t = threading.Thread(target=print); t.start(); t.join(); return [a, b, a / 3]",
            "import multiprocessing; multiprocessing.Lock(); return [a, b, a / 3]",
            "return (x for x in (a, b, a / 3))",
            "return {a: 1, b: 2}",
            "return lambda: a",
            "return None",
            "import time; time.sleep(1.5); return [a, b, a / 3]",
            "raise ValueError",
            "print('x'); return [a, b, a / 3]",
            "return [a, b, a / 3] if input() else None",
            "exit(0)",
            "import sys; sys.exit(0)",
        ],
    ),
    "count": (
        "return {x: text.count(x) for x in text}",
        [["abca"], [""]],
        0,
        [
            "from collections import Counter; return Counter(text)",
            "from collections import OrderedDict, Counter; return OrderedDict(Counter(text))",
            "from collections import defaultdict; return defaultdict(int, {'a': 2, 'b': 1, 'c': 1})",
            "return [(x, text.count(x)) for x in text]",
        ],
    ),
    "mean": (
        "return sum(values) / len(values)",
        [[[1.0, 2.0]], [[1e30, 1.0, 3.0]]],
        1e-4,
        [
            "import numpy; return numpy.mean(values)",
            "import numpy; return float(numpy.mean(values)) + 1e-5",
            "values.sort(); return sum(values) / len(values)",
            "return int(sum(values)) // len(values)",
            "return True",
            "return complex(sum(values) / len(values))",
        ],
    ),
    "large": (
        "return n ** 4000",
        [[10**9], [3]],
        0,
        [
            "x = 1\n    for _ in range(4000): x *= n\n    return x",
            "return n ** 4000 + 1",
            "return str(n ** 40)",
            "return float(n)",
        ],
    ),
    "pair": (
        "return a, b",
        [["x", 2.5], ["\ud800", -0.0]],
        0,
        [
            "from collections import namedtuple; return namedtuple('Pair', 'a b')(a, b)",
            "return [a, b]",
            "class Pair(tuple): pass\n    return Pair((a, b))",
            "class Text(str): pass\n    return Text(a), b",
        ],
    ),
    # special oracles of EvalPlus
    "find_zero": (
        "return 1.0",
        [[[-1.0, 1.0]], [[1.0, -1.0]]],
        1e-4,
        ["return 1.00001", "return 1.1", "return 'x'", "return float('nan')"],
    ),
    "similar_elements": (
        "return tuple(set(a) & set(b))",
        [[[1, 2, 3], [2, 3]], [[1], [2]]],
        0,
        [
            "return (x for x in a if x in b)",
            "return {x: 1 for x in a if x in b}.keys()",
            "return [x for x in a if x in b] * 2",
            "return filter(b.__contains__, a)",
            "return 5",
            "return a",
        ],
    ),
    "check_str": (
        "import re\n    return re.search('^a', text)",
        [["ab"], ["ba"]],
        0,
        [
            "import re; return re.match('a', text)",
            "return text[:1] == 'a'",
            "return object()",
            "return 'yes' if text[:1] == 'a' else None",
        ],
    ),
    "are_equivalent": ("return a == b", [[1, 1], [2, 1]], 0, ["return object()", "return None", "raise ValueError"]),
    "sum_div": ("return n", [[3], [4]], 0, ["return 0", "return 1"]),
    "long": (
        "return [float(i) / n for i in range(n)]",
        [[60000], [70000]],
        0,
        [
            "return [i / n for i in range(n)]",
            "return [i / n + 1e-9 for i in range(n)]",
            "return [i / n + (i == 59999) for i in range(n)]",
            "return [i / n for i in range(60000)]",
            "return [0] + [i / n for i in range(1, n)]",
            "import numpy; return list(numpy.arange(n) / n)",
            "import numpy; return numpy.arange(n) / n",
            "return [i / n for i in range(n)] if n == 60000 else 1 / 0",
        ],
    ),
    "surface_Area": ("return 33", [[3, 4], [3, 4]], 0, ["return 34", "return 35", "return None"]),
    "digit_distance_nums": ("return 6", [[1, 7], [1, 7]], 0, ["return 6", "return '6'"]),
}
OF_MBPP = ("similar_elements", "check_str", "are_equivalent", "sum_div", "surface_Area", "digit_distance_nums")
LONG = ("long",)
OTHERS = tuple(name for name in HONEST if name not in (*OF_MBPP, *LONG))
PARAMETERS = {
    "count": "text",
    "mean": "values",
    "large": "n",
    "long": "n",
    "find_zero": "xs",
    "check_str": "text",
    "sum_div": "n",
}
ORACLE_SCRIPT = """
import json, os, sys, types
dataset, problems, programs = sys.argv[1:]
os.environ["HUMANEVAL_OVERRIDE_PATH" if dataset == "humaneval" else "MBPP_OVERRIDE_PATH"] = problems
sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)
from evalplus import evaluate
from evalplus.data import get_human_eval_plus, get_mbpp_plus
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
found = get_human_eval_plus() if dataset == "humaneval" else get_mbpp_plus()
expected = evaluate.get_groundtruth(found, "unused", MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else [])
for task_id, code in json.load(open(programs)).items():
    verdict = evaluate.check_correctness(dataset, 0, found[task_id], code, expected[task_id], fast_check=True)
    print(json.dumps([task_id, verdict["base"][0], verdict["plus"][0]]))
"""


@pytest.mark.parametrize(
    "dataset, entry_points",
    [("humaneval", OTHERS), ("mbpp", OF_MBPP), pytest.param("humaneval", LONG, marks=pytest.mark.slow)],
)
def test_honest_programs_get_the_verdict_that_evalplus_gives_in_their_own_process(
    tmp_path: Path, dataset: str, entry_points: tuple[str, ...]
):
    """Values of many classes, tolerances, special oracles and exceptions: EvalPlus's own check is the oracle."""
    problems, programs = [], {}
    for entry_point in entry_points:
        reference, inputs, atol, bodies = HONEST[entry_point]
        head = f"def {entry_point}({PARAMETERS.get(entry_point, 'a, b')}):\n"
        for body in (reference, *bodies):
            task_id = f"Test/{9000 + len(problems)}"  # EvalPlus turns the inputs of some MBPP numbers into tuples
            programs[task_id] = f"{head}    {body}\n"
            solution = {"prompt": head, "canonical_solution": f"    {reference}\n", "entry_point": entry_point}
            suites = {"base_input": inputs[:1], "plus_input": inputs[1:], "atol": atol, "contract": ""}
            problems.append({"task_id": task_id, **solution, **suites})
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    found = judge(dataset, path, programs, tmp_path)

    (tmp_path / "solutions.json").write_text(json.dumps({name: found[name]["solution"] for name in programs}))
    done = subprocess.run(
        [sys.executable, "-c", ORACLE_SCRIPT, dataset, str(path), str(tmp_path / "solutions.json")],
        env={**sandbox.environment(str(tmp_path)), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    theirs = {name: verdict for name, *verdict in map(json.loads, filter(is_row, done.stdout.splitlines()))}
    ours = {name: [found[name]["base"], found[name]["plus"]] for name in programs}
    different = {programs[name]: (ours[name], theirs[name]) for name in programs if ours[name] != theirs[name]}
    assert different == {}
    assert {"pass", "fail"} <= {verdict for pair in ours.values() for verdict in pair}


def is_row(line: str) -> bool:
    return line.startswith('["Test/')


VALUES = [
    *(None, True, 0, -1, 2**63, -(2**64), 10**5000, 0.1, -0.0, math.inf, 1e-320, 1 + 2j, "", "\ud800é", b"\x00\xff"),
    *([], [1, "a", None, [2.5]], (), (1, (2, [3])), {1, 2}, set(), frozenset({"a"}), {}, {(1, 2): [3], "a": {None: 1}}),
    *([1, 10**400], Counter("abca"), OrderedDict([(1, 2)]), Decimal("0.10"), Fraction(1, 3), bytearray(b"x")),
    *({"tuple": [1]}, {"unknown": None}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_arrive_as_they_were(value: object):
    arrived = plain_values.loads(plain_values.dumps(value))
    assert type(arrived) is type(value)
    assert arrived == value
    with contextlib.suppress(ValueError):  # integers that are too long to be printed
        assert repr(arrived) == repr(value)


def test_only_equal_long_lists_of_equal_classes_have_equal_digests():
    values = [i / 7 if i % 2 else i for i in range(plain_values.LONG + 10)]
    assert plain_values.digest(values) == plain_values.digest(list(values)) != None  # noqa: E711
    for place, other in ((0, False), (2, 2.0), (3, 3 / 7 + 1e-15), (-1, None), (5, [5 / 7])):
        changed = list(values)
        changed[place] = other
        assert plain_values.digest(changed) != plain_values.digest(values)
    assert plain_values.digest(values[:-1]) != plain_values.digest(values)
    texts = ["".join("ab") for _ in values]  # neither interned nor one object
    assert plain_values.digest(texts) == plain_values.digest(["ab"] * len(values))
    pairs = [("a", "b")] * len(values)
    assert plain_values.digest(pairs) == plain_values.digest([("a", "".join("b")) for _ in values])
    for other in (("a\1b",), ("a", "b", ""), ("a", b"b"), ["a", "b"], "ab", ("b", "a"), ("a", None)):
        assert plain_values.digest([*pairs[:-1], other]) != plain_values.digest(pairs)
    assert plain_values.digest(values[:9]) is plain_values.digest(tuple(values)) is None
    assert plain_values.digest([*values, object()]) is None


def test_numbers_of_numpy_arrive_as_they_were():
    for value in (
        np.float32(0.1),
        np.int64(-3),
        np.bool_(True),
        np.arange(6.0).reshape(2, 3),
        np.array([]),
        np.array(5),
    ):
        arrived = plain_values.loads(plain_values.dumps(value))
        assert np.array_equal(arrived, value) and arrived.dtype == value.dtype and arrived.shape == value.shape


def test_what_is_no_value_arrives_as_something_that_equals_nothing():
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

    for value in (Equal(), object(), print, (x for x in "ab"), np.array(["a", None], dtype=object)):
        arrived = plain_values.loads(plain_values.dumps(value))
        assert type(arrived) is plain_values.Unknown
        assert arrived not in (None, 0, "", [], True)


def test_text_that_no_value_was_written_as_is_an_error_and_runs_nothing():
    objects = ('{"system": "id"}', '{"int": 5}', '{"numpy": ["O", [1], "AAAAAAAAAAA="]}', '{"tuple": [1], "set": [2]}')
    for text in (*objects, "{}", "[", ""):
        with pytest.raises(Exception):  # noqa: B017 (of whatever class)
            plain_values.loads(text.encode())


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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset, file, passing", [("humaneval", "HumanEvalPlus", 163), ("mbpp", "MbppPlus", 376)])
def test_published_problems_canonical_solutions(tmp_path: Path, dataset: str, file: str, passing: int, form: str):
    path = needs_shared(f"data/evalplus/{file}.jsonl.gz")
    problems = read(path)
    programs = {p["task_id"]: p["prompt"] + p["canonical_solution"] for p in problems}
    found = judge(dataset, path, programs, tmp_path, form=needs(form))
    statuses = Counter((verdict["base"], verdict["plus"]) for verdict in found.values())
    assert statuses["pass", "pass"] >= passing, statuses
