"""Run a module as a program that ends when its standard input does, from its first moment on.

    python -m harness.ends_with_input <module> <arguments>

However the process at the other end dies, and be it while the module still imports its libraries, nothing is left.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_input() -> None:
    while os.read(0, 1024):  # not sys.stdin, whose lock an ordinary end would wait for
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
