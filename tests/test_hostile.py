"""Programs that attack the machine, the judge or the verdict: contained, judged wrong, and nothing of them left.

A program that tries to get out returns the right answer if it succeeded, and one that forges returns a wrong one: none
may pass. All of a table are judged together, with honest programs among them, in either form of the sandbox.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

import psutil
import pytest

from tasks.judging import judge, why_not
from tasks.sandbox import FORMS, NO_SANDBOX

HONEST = "    return a + b"
MARK = "86421"  # seconds that leftover processes would sleep

# What stands in add(a, b); names in capitals are filled in. The answer is right if "escaped" is true at the end.
ATTACKS = {
    # files
    "deletes a file": "import posix; posix.unlink('KEPT'); escaped = True",
    "deletes a file through libc": "import ctypes; escaped = ctypes.CDLL(None).unlink(b'KEPT') == 0",
    "writes a file": "import io; io.open('FOLDER/made', 'w').write('x'); escaped = True",
    "writes through a link": "import io, posix; posix.symlink('KEPT', 'l'); io.open('l', 'w').write(''); escaped = 1",
    "writes into Python": "import io; io.open('PACKAGES/made.py', 'w').write('x'); escaped = True",
    "reads a secret": "import io; escaped = 'secret' in io.open('FOLDER/secret').read()",
    "reads a file of root's that it sees": "import io; escaped = 'secret' in io.open('VISIBLE').read()",
    "reads the problems": "import io; escaped = 'canonical_solution' in io.open('PROBLEMS').read()",
    "looks for homes": "import os; escaped = os.path.exists('/root/.bashrc') or bool(os.listdir('/home'))",
    "opens a disk": "import glob, io; escaped = bool([io.open(f, 'rb') for f in glob.glob('/dev/[mnsv][emvd]*')])",
    "fills the scratch space": """
        import io
        for i in range(100): io.open(f"f{i}", "wb").write(b"x" * 2**22)
        escaped = True
        """,
    "writes one endless file": """
        import io
        with io.open("f", "wb") as file:
            for i in range(100): file.write(b"x" * 2**22)
        escaped = True
        """,
    # secrets in memory
    "reads the environment": "import os; escaped = 'PLANTED_TOKEN' in os.environ",
    "reads the environments of all": """
        import glob, io
        escaped = b"PLANTED" in b"".join(io.open(f, "rb").read() for f in glob.glob("/proc/[0-9]*/environ"))
        """,
    "sees others": "import os; escaped = sum(name.isdigit() for name in os.listdir('/proc')) > 3",
    "reads the memory of others": """
        import glob, io, os
        others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
        escaped = bool([io.open(f"/proc/{pid}/mem", "rb") for pid in others])
        """,
    "looks for the reference solution": """
        import gc
        found = [o for o in gc.get_objects() if isinstance(o, dict) and "canonical_solution" in o]
        escaped = bool(found)
        """,
    # network
    "connects": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1); escaped = True",
    "sends a datagram": "import socket; s = socket.socket(type=2); s.sendto(b'x', ('127.0.0.1', PORT))",
    "asks for a name": "import socket; socket.getaddrinfo('pypi.org', 443); escaped = True",
    "connects to a file": "import socket; s = socket.socket(1); s.connect('FOLDER/socket'); escaped = True",
    "connects without a file": "import socket; s = socket.socket(1); s.connect('\\0hostile-PORT'); escaped = True",
    # processes
    "forks without end": """
        import posix
        while posix.fork() >= 0: escaped = True
        """,
    "forks through libc": "import ctypes; escaped = ctypes.CDLL(None).fork() >= 0",
    "leaves a process": "import os; escaped = os.posix_spawn('/bin/sleep', ['sleep', 'MARK'], {}) > 0",
    "leaves a daemon": """
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.fork() == 0:
            libc.setsid()
            if libc.fork() == 0: libc.sleep(MARK)
        """,
    "becomes another program": "import os; os.execv('/bin/sleep', ['sleep', 'MARK'])",
    "starts threads without end": """
        import threading, time
        threads = [threading.Thread(target=time.sleep, args=(0.5,), daemon=True) for _ in range(150)]
        for thread in threads: thread.start()
        escaped = True
        """,
    "leaves threads": """
        import threading, time
        for _ in range(3): threading.Thread(target=time.sleep, args=(MARK,)).start()
        """,
    "registers an endless farewell": "import atexit, time; atexit.register(time.sleep, MARK)",
    "kills all it sees": "import ctypes; ctypes.CDLL(None).kill(-1, 9)",
    "kills the harness": "import ctypes; escaped = ctypes.CDLL(None).kill(HARNESS, 9) == 0",
    "kills itself": "import signal; signal.raise_signal(9); escaped = True",
    "aborts": "import os; os.abort()",
    "crashes": "import ctypes; ctypes.string_at(0); escaped = True",
    "exits with success": "import os; os._exit(0)",
    "exits politely": "import sys; sys.exit(0)",
    "traces its parent": "import ctypes, os; escaped = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    # privileges
    "is root": "import os; escaped = 0 in os.getresuid() + os.getresgid()",
    "becomes root": "import posix; posix.setuid(0); escaped = True",
    "mounts": "import ctypes; escaped = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "makes files writable": "import ctypes; escaped = ctypes.CDLL(None).mount(b'none', b'/', None, 0x1020, None) == 0",
    "changes its root": "import posix; posix.chroot('/tmp'); escaped = True",
    "makes a user namespace": "import ctypes; escaped = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "clones a user namespace": "import ctypes; escaped = ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0",
    "keeps memory beyond its life": "import ctypes; escaped = ctypes.CDLL(None).shmget(0, 2**20, 0o1600) >= 0",
    "hides memory in a file": "import os; escaped = os.memfd_create('x') > 0",
    # memory and output
    "takes all memory": "x = bytearray(3 * 2**30); escaped = True",
    "recurses without end": "def f(): return f() + 1\nescaped = f()",
    "writes to all descriptors": """
        import os
        for _ in range(300):
            for descriptor in range(1, 20):
                try: os.write(descriptor, b"x" * 2**20)
                except OSError: pass
        """,
    "closes all descriptors": "import os; os.closerange(0, 1000); escaped = True",
    "returns a quarter of a gigabyte": "return 'x' * 2**28",
    "returns a long integer": "return 1 << 2**27",
    "returns itself": "x = []; x.append(x); return x",
    "returns something deep": "x = []\nfor _ in range(10**6): x = [x]\nreturn x",
    # the verdict
    "returns what equals everything": """
        class Equal:
            def __eq__(self, other): return True
            __ne__ = lambda self, other: False
            __hash__ = lambda self: 0
        return Equal()
        """,
    "returns an integer that equals everything": """
        class Equal(int):
            def __eq__(self, other): return True
            def __reduce__(self): return eval, ("a + b",)
        return Equal(-77)
        """,
    "sets the verdict where EvalPlus keeps it": """
        import sys
        frame = sys._getframe()
        while frame:
            for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
                if name in ("stat", "progress", "details"): value.value = 0
                if name == "expected": return value[0]
            frame = frame.f_back
        """,
    "sets all shared memory to success": """
        import ctypes, io
        for line in io.open("/proc/self/maps"):
            if " rw-s" in line:
                start, end = (int(x, 16) for x in line.split()[0].split("-"))
                ctypes.memset(start, 0, end - start)
        """,
    "says that all is close": """
        import builtins, numpy
        numpy.allclose = numpy.testing.assert_allclose = lambda *given, **named: True
        builtins.isinstance = builtins.all = builtins.abs = builtins.type = lambda *given: True
        """,
    "replaces EvalPlus": """
        import sys, types
        import evalplus.eval, evalplus.eval._special_oracle
        evalplus.eval.unsafe_execute = evalplus.eval.untrusted_check = lambda *given, **named: ("pass", [True] * 9)
        sys.modules["evalplus.eval"] = sys.modules["numpy"] = types.SimpleNamespace()
        """,
    "replaces how answers are written": """
        import json, sys
        sys.modules["tasks.plain_values"].dumps = json.dumps = lambda value, **named: b"true"
        """,
    "answers with a pickle": """
        import os, struct
        text = b"cposix\\nsystem\\n(S'touch FOLDER/made'\\ntR."
        for descriptor in range(3, 30):
            try: os.write(descriptor, struct.pack("<cQ", b"=", len(text)) + text)
            except OSError: pass
        """,
    "answers with a verdict": """
        import os
        for i in range(120):
            line = '{"task_id": "Test/%d", "solution": "", "base": "pass", "plus": "pass"}' % i
            for descriptor in range(1, 30):
                try: os.write(descriptor, line.encode() + b"\\n")
                except OSError: pass
        """,
    "promises an endless answer": """
        import os, struct
        for descriptor in range(3, 30):
            try: os.write(descriptor, struct.pack("<cQ", b"=", 2**62))
            except OSError: pass
        """,
    "raises what nobody catches": "class Quiet(BaseException): pass\nraise Quiet",
}
# Each takes seconds: until EvalPlus's limit of one second per input, or until nobody waits for an answer any more.
SLOW_ATTACKS = {
    "recurses beyond the stack": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nescaped = f()",
    "loops": "while True: pass",
    "loops whatever is raised": """
        x = 0
        while True:
            try:
                while True: x += 1
            except BaseException: x = 0
        """,
    "loops deaf to signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "blocks signals and sleeps": """
        import signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        while True: time.sleep(1)
        """,
    "switches the clock off and takes its time": """
        import signal, time
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(8)
        escaped = True
        """,
    "sleeps": "import time; time.sleep(10**6)",
    "computes in C": "return 9 ** 9 ** 9",
    "matches without end": "import re; return re.match(r'(a|a)*b', 'a' * 60)",
    "prints without end": "while True: print('x' * 10**6)",
    "writes without end": "import os\nwhile True: os.write(1, b'x' * 10**6)",
    "returns half a gigabyte of numbers": "return [float(i) for i in range(2**24)]",
}
AT_DEFINITION = {
    "exits when defined": "import sys\nx = sys.exit(0)\ndef add(a, b):\n    return a + b + x",
    "forks when defined": "import posix\nx = posix.fork() * 0\ndef add(a, b):\n    return a + b + x",
}
SLOW_AT_DEFINITION = {
    "loops when defined": "def f():\n    while True: pass\n    return 0\nx = f()\ndef add(a, b):\n    return a + b + x",
}


def program(attack: str) -> str:
    body = f"escaped = False\n{dedent(attack).strip()}\nreturn a + b if escaped else None"
    return f"def add(a, b):\n{indent(body, '    ')}\n"


@dataclass
class Judged:
    """What became of a table of programs, by name; what the host saw of them, and which processes are left."""

    verdicts: dict[str, tuple[str, str]]
    honest: list[tuple[str, str]]
    folder: Path
    connections: int
    left: list[psutil.Process]


def problem(i: int) -> dict:
    return {
        "task_id": f"Test/{i}",
        "prompt": 'def add(a, b):\n    """Return the sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "base_input": [[4096, 2]],
        "plus_input": [[-10, 1]],
        "atol": 0,
        "contract": "",
    }


def judge_table(programs: dict[str, str], folder: Path, form: str) -> Judged:
    """Judge the programs with honest ones among them, beside files, sockets and secrets that they may try to reach."""
    (folder / "kept").write_text("kept")
    (folder / "secret").write_text("secret")
    visible = Path(sysconfig.get_path("purelib"), f"planted-{os.getpid()}.txt")
    if os.geteuid() == 0:  # an ordinary user's programs are that user's, outside of the sandbox
        visible.touch(0o600)
        visible.write_text("secret")
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    port = listeners[0].getsockname()[1]
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", port))
    listeners[1].bind(str(folder / "socket"))
    listeners[2].bind(f"\0hostile-{port}")
    for listener in listeners[1:]:
        listener.listen()
    names = {
        **{"FOLDER": folder, "KEPT": folder / "kept", "PACKAGES": sysconfig.get_path("purelib"), "VISIBLE": visible},
        **{"PROBLEMS": folder / "problems.jsonl", "PORT": port, "MARK": MARK, "HARNESS": os.getpid()},
    }
    codes = [re.sub(r"\b[A-Z]{4,}\b", lambda m: str(names.get(m[0], m[0])), code) for code in programs.values()]
    middle = len(codes) // 2
    honest = f"def add(a, b):\n{HONEST}\n"
    all_codes = [honest, *codes[:middle], honest, *codes[middle:], honest]
    task_ids = [f"Test/{i}" for i in range(len(all_codes))]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem(i)) + "\n" for i in range(len(all_codes))))
    try:
        with watching() as seen:
            found = judge(
                "humaneval",
                folder / "problems.jsonl",
                dict(zip(task_ids, all_codes, strict=True)),
                folder,
                memory_gib=1,
                timeout_s=500,
                form=form,
            )
    finally:
        visible.unlink(missing_ok=True)
    connections = 0
    for listener in (*listeners, datagrams):
        listener.settimeout(0)
        try:
            listener.recv(1) if listener is datagrams else listener.accept()
            connections += 1
        except BlockingIOError:
            pass
        listener.close()
    verdicts = [(found[task_id]["base"], found[task_id]["plus"]) for task_id in task_ids]
    places = (0, middle + 1, len(all_codes) - 1)
    hostile = [verdict for i, verdict in enumerate(verdicts) if i not in places]
    return Judged(
        dict(zip(programs, hostile, strict=True)), [verdicts[i] for i in places], folder, connections, left_of(seen)
    )


@contextmanager
def watching() -> Iterator[set[psutil.Process]]:
    """Every process that this one and its descendants start meanwhile (looked for every 50 ms)."""
    before = set(psutil.Process().children(recursive=True))  # servers that earlier tests have started may stay
    seen: set[psutil.Process] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            with suppress(psutil.Error):
                seen.update(set(psutil.Process().children(recursive=True)) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def left_of(seen: set[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended some seconds later."""
    assert len(seen) > 4, "the judge, its workers and programs were seen"
    _, alive = psutil.wait_procs(seen, timeout=20)
    return alive


QUICK = {**{name: program(attack) for name, attack in ATTACKS.items()}, **AT_DEFINITION}
SLOW = {**{name: program(attack) for name, attack in SLOW_ATTACKS.items()}, **SLOW_AT_DEFINITION}


def needs(form: str) -> str:
    if (problem := why_not(form)) is not None:
        pytest.skip(f"no {form} here: {problem}")
    return form


@pytest.fixture(scope="module", params=FORMS)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """The quick table, judged once in each form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANTED_TOKEN", "secret")
        yield judge_table(QUICK, tmp_path_factory.mktemp("hostile"), needs(request.param))


@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_program_does_not_pass(judged: Judged, name: str):
    assert set(judged.verdicts[name]) <= {"fail", "killed", "timeout"}


def test_honest_programs_beside_them_pass(judged: Judged):
    assert judged.honest == [("pass", "pass")] * 3


def test_nothing_of_the_host_was_touched_or_reached(judged: Judged):
    assert (judged.folder / "kept").read_text() == "kept"
    ours = {"kept", "secret", "socket", "problems.jsonl", "programs.jsonl"}
    assert {path.name for path in judged.folder.iterdir()} == ours
    assert not Path(sysconfig.get_path("purelib"), "made.py").exists()
    assert judged.connections == 0


def test_nothing_is_left_running(judged: Judged):
    assert not judged.left


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_programs_that_take_their_time_end_and_do_not_pass(tmp_path: Path, form: str):
    found = judge_table(SLOW, tmp_path, needs(form))
    assert {name for name, verdict in found.verdicts.items() if "pass" in verdict} == set()
    assert found.honest == [("pass", "pass")] * 3
    assert not found.left


def test_without_a_sandbox_the_same_programs_get_out(tmp_path: Path):
    """What is tried is possible here: it is the sandbox that stops it."""
    names = ("deletes a file", "writes a file", "reads a secret", "reads the problems", "connects", "sees others")
    found = judge_table({name: QUICK[name] for name in names}, tmp_path, NO_SANDBOX)
    assert {name: base for name, (base, _) in found.verdicts.items()} == dict.fromkeys(names, "pass")
    assert found.connections == 1
    assert not (tmp_path / "kept").exists()
