"""A small real language model: SmolLM2-135M-Instruct, dense, from the Python package that carries it.

    ./bench smol                                      # results/models/smol_dense, an ordinary Hugging Face folder
    ./bench run model=smol_dense method=none suite=mc limit=200 data_dir=<folder>
    python -m tasks.smol.parity limit=200 data_dir=<folder>   # the same items through lm-eval's own hf backend

It has no experts to compress. It proves the scoring path on real data: real tokenizer, real text, real benchmarks.
"""
