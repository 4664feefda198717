"""An embedded testbed: a small synthetic world, problems about it, and a small Qwen3-MoE really trained on it.

    python -m tasks.tiny.build                        # data/: test sets and calibration text, the same bytes every time
    python -m tasks.tiny.train --seed 0 --out model   # a checkpoint like the one in model/
    python -m tasks.tiny.evaluate                     # its scores, with plain transformers
    python -m tasks.tiny.usage                        # how evenly it uses its experts

It shows within minutes, on a CPU, whether a compression keeps what a model learned. See model/README.md for what it
can and cannot tell.
"""
