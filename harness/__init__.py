"""The bench. Every entry point, and every process it starts, passes here before it loads torch."""

import os
import sys

# Threads that wait for others by spinning make two processes on one machine ten times slower than one after the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log file
