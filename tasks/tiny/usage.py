"""How evenly the tiny model uses its experts, by layer and domain of the calibration text.

    python -m tasks.tiny.usage --model tasks/tiny/model

A share is the part of all (token, expert) choices of a layer that fell on one expert; 1/32 = 3.1 % when even.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from tasks.tiny.evaluate import DATA, load_rows

DOCUMENTS = 200


@torch.no_grad()
def shares(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """[layers, experts] shares of choices over all tokens of the texts; every row sums to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = torch.stack(model(input_ids=ids, output_router_logits=True).router_logits)
        chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten(1)
        counts += torch.stack([layer.bincount(minlength=config.num_experts) for layer in chosen])
    return counts / counts.sum(1, keepdim=True)


def main() -> None:
    """Print a Markdown table: smallest and largest share, and experts under 0.1 %, by domain and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    folder = parser.parse_args().model
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    domains = sorted(path.stem for path in (DATA / "calibration").glob("*.jsonl"))
    texts = {name: [row["text"] for row in load_rows(f"calibration/{name}")[:DOCUMENTS]] for name in domains}
    table = {name: shares(model, tokenizer, rows) for name, rows in texts.items()}
    table["all, evenly"] = torch.stack(list(table.values())).mean(0)
    print("| domain | layer | smallest share | largest share | experts under 0.1 % |\n|---|---|---|---|---|")
    for name, rows in table.items():
        for layer, row in enumerate(rows):
            print(f"| {name} | {layer} | {row.min():.2%} | {row.max():.2%} | {(row < 0.001).sum()} |")


if __name__ == "__main__":
    main()
