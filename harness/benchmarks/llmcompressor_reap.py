"""REAP by llm-compressor on a checkpoint and tokens, timed. For `harness.benchmarks.calibration_speed`, which starts it
with the Python of an environment that has the package llmcompressor; nothing of ours is imported.

python llmcompressor_reap.py <checkpoint> <tokens.npy> <batch size> <dtype>

Prints JSON: the seconds of ``oneshot``, which calibrates and prunes layer after layer with the model in memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from transformers import AutoModelForCausalLM


def main(checkpoint: str, tokens: str, batch_size: str, dtype: str) -> None:
    ids = np.load(tokens)
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    if torch.cuda.is_available():
        model.cuda()
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[REAPPruningModifier(sparsity=0.5)],
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        batch_size=int(batch_size),
        moe_calibrate_all_experts=False,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    names = ("llmcompressor", "transformers", "torch")
    print(json.dumps({"seconds": seconds, **{name: importlib.metadata.version(name) for name in names}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
