"""The bench. Every entry point, and every process it starts, passes here before it loads torch."""

import os

# Threads that wait for others by spinning make two processes on one machine ten times slower than one after the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
