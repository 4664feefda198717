"""The byte-level BPE tokenizer of the tiny model, trained on the world's own text.

    from tasks.tiny.tokenizer import train_tokenizer
    train_tokenizer(seed=0).save_pretrained("model")

Every text of the world round-trips exactly.
"""

from collections.abc import Iterator
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.tiny.world import training_document

END = "<|endoftext|>"
VOCAB_SIZE = 1536
# Line ends and digits are tokens of their own: a prompt that ends in a line end tokenises as it does inside a document.
PATTERN = r"\n| ?\d|[ _]?[A-Za-z]+| ?[^\sA-Za-z0-9]+| +(?!\S)| +|\s"


def _sample(seed: int, documents: int) -> Iterator[str]:
    rng = Random(f"tokenizer/{seed}")
    return (training_document(rng)[1] for _ in range(documents))


def train_tokenizer(seed: int, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A fast tokenizer with at most VOCAB_SIZE tokens; END (id 0) ends documents and pads; no begin token."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(seed, documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
