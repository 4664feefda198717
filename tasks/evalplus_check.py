"""Check a program against a test suite: EvalPlus's checker, on the answers of a program that runs elsewhere.

The program is in a sandbox and sends what it returned (``tasks.program``); EvalPlus's ``untrusted_check`` is given, in
the program's place, a function that repeats those answers (`Answers`). So EvalPlus compares by its own rules, and what
a program could forge (a verdict, an operator, a clock) is in a process that it never enters. Expected outputs, and the
inputs that oracles look at, are not in the program's process. Unlike there, an oracle (of HumanEval/32) sees inputs as
they were before the program could change them.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks import plain_values
from tasks.confinement import die_with_parent
from tasks.program import DEFINED, DIGEST, EXPECTED, HEADER, OTHER, RETURNED
from tasks.sandbox import Job, Sandbox

SUITE_SECONDS = 60  # EvalPlus's limit, before the seconds it adds
GRACE = 5.0  # seconds that an answer may be on its way: time limits are kept inside, and again here


@dataclass(frozen=True)
class Check:
    """One program against the test suites of its problem."""

    dataset: str
    problem: dict[str, Any]
    solution: str
    sandbox: Sandbox
    slot: int

    def status(self, suite: str) -> str:
        """Verdict on ``base`` or ``plus``: what EvalPlus makes of the answers of the program."""
        from evalplus.config import DEFAULT_GT_TIME_LIMIT_FACTOR, DEFAULT_MIN_TIME_LIMIT
        from evalplus.eval import untrusted_check

        global answers
        inputs = self.problem[f"{suite}_input"]
        expected, times = self._expected(inputs)
        digests, digesting = _digests(expected)
        limits = [max(DEFAULT_MIN_TIME_LIMIT, DEFAULT_GT_TIME_LIMIT_FACTOR * seconds) for seconds in times]
        with self.sandbox.running(self._job(inputs, limits), self.slot) as (frames, replies):
            deadline = time.monotonic() + min(SUITE_SECONDS, sum(limits)) + 2 + GRACE
            answers = Answers(frames, replies, list(zip(expected, digests, strict=True)), deadline)
            status, _ = untrusted_check(
                self.dataset,
                f"import tasks.evalplus_check\n{self.problem['entry_point']} = tasks.evalplus_check.answers.function()",
                inputs,
                self.problem["entry_point"],
                expected,
                self.problem["atol"],
                [a + b + GRACE / DEFAULT_GT_TIME_LIMIT_FACTOR for a, b in zip(times, digesting, strict=True)],
                fast_check=True,
            )
            ended = answers.why() if status == "fail" else None
            if ended == "killed":
                self.sandbox.check()
        return ended or status

    def _expected(self, inputs: list[Any]) -> tuple[list[Any], list[float]]:
        """Outputs of the reference solution, and seconds they took."""
        from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
        from evalplus.gen.util import trusted_exec

        reference = self.problem["prompt"] + self.problem["canonical_solution"]
        entry_point = self.problem["entry_point"]
        only_not_none = self.dataset == "mbpp" and entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
        return trusted_exec(reference, inputs, entry_point, record_time=True, output_not_none=only_not_none)

    def _job(self, inputs: list[Any], limits: list[float]) -> Job:
        from evalplus.eval._special_oracle import MBPP_OUTPUT_SET_EQ_TASKS

        entry_point = self.problem["entry_point"]
        return Job(
            self.solution,
            entry_point,
            [plain_values.dumps(arguments).decode() for arguments in inputs],
            limits,
            as_set=self.dataset == "mbpp" and entry_point in MBPP_OUTPUT_SET_EQ_TASKS,
        )


def _digests(outputs: list[Any]) -> tuple[list[bytes | None], list[float]]:
    """Of expected outputs, and the seconds that each took."""
    digests, seconds = [], []
    for output in outputs:
        start = time.perf_counter()
        digests.append(plain_values.digest(output))
        seconds.append(time.perf_counter() - start)
    return digests, seconds


class Answers:
    """What a program returned, one answer after the other, as EvalPlus's checker asks for them in a process of its own.

    frames: descriptor to read them from. replies: descriptor to say whether a digest is that of the expected output.
    expected: outputs with their digests. deadline: in monotonic time.
    """

    def __init__(self, frames: int, replies: int, expected: list[tuple[Any, bytes | None]], deadline: float) -> None:
        self._frames = frames
        self._replies = replies
        self._expected = iter(expected)
        self._deadline = deadline
        self._ended = multiprocessing.Value(ctypes.c_char, b" ")

    def why(self) -> str | None:
        """``killed`` or ``timeout`` if that is why an answer was missing."""
        return {b"k": "killed", b"t": "timeout"}.get(self._ended.value)

    def function(self) -> Callable[..., Any]:
        """Stands for the program's own, as soon as that is defined. Raises if it cannot be."""
        die_with_parent()
        if self._frame()[0] != DEFINED:
            raise ValueError("no definition")
        return self._answer

    def _answer(self, *arguments: Any) -> Any:
        expected, digest = next(self._expected)
        kind, value = self._frame()
        if kind == DIGEST:
            same = value == digest
            os.write(self._replies, EXPECTED if same else OTHER)
            if same:
                return expected
            kind, value = self._frame()
        if kind != RETURNED:
            raise ValueError("the program raised an exception")
        return plain_values.loads(value)

    def _frame(self) -> tuple[bytes, bytes]:
        from evalplus.eval.utils import TimeoutException

        try:
            kind, length = HEADER.unpack(self._read(HEADER.size))
            return kind, self._read(length)
        except (TimeoutException, TimeoutError):
            self._ended.value = b"t"
            raise
        except EOFError:
            self._ended.value = b"k"
            raise

    def _read(self, length: int) -> bytes:
        """Raises MemoryError if a program claims to send more than there is room for."""
        found = bytearray(length)
        left = memoryview(found)
        with io.FileIO(self._frames, closefd=False) as file:
            while left:
                if not select.select([file], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
                    raise TimeoutError
                if not (count := file.readinto(left)):
                    raise EOFError
                left = left[count:]
        return bytes(found)


answers: Answers  # of the suite that is being checked: EvalPlus's checker is told where to find it by name
