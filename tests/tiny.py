"""Tiny random targets of the real shapes, with a byte-level tokenizer and an R1-like chat template. No network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from draft_training.heads import load_head
from draft_training.target_model import TargetModel

# What the R1-Distill templates do: earlier reasoning is cut, and the reply is opened with <think>.
R1_TEMPLATE = (
    "{{bos_token}}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}"
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{eos_token}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<think>", "</think>"]


# The family's own special tokens, and what its published templates do with plain turns: the later revision.
R1_SPECIAL = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
]  # fmt: skip
R1_LATE_TEMPLATE = (
    "{% set first = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set first.text = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ first.text }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
R1_EARLY_TEMPLATE = R1_LATE_TEMPLATE.replace("<think>\\n", "")


def tiny_tokenizer(special: list[str] = SPECIAL, template: str = R1_TEMPLATE) -> PreTrainedTokenizerFast:
    """256 bytes and six special tokens: beginning, end, the turns' openings and the think tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        extra_special_tokens=special[2:],
    )
    fast.chat_template = template
    return fast


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# By kind: the class, query and key/value heads, whether the embedding is tied, ids beyond the tokenizer's, and rope.
# The last three are the R1-Distill family's own proportions: heads of 32 instead of 128, and few layers.
KINDS: dict[str, tuple[type, int, int, bool, int, dict[str, Any]]] = {
    "llama": (
        LlamaConfig, 2, 1, True, 0, {**LLAMA3_ROPE, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    ),
    "qwen2": (Qwen2Config, 2, 1, False, 26, {}),
    "r1-qwen-1.5b": (Qwen2Config, 12, 2, False, 271, {"rope_type": "default", "rope_theta": 10000.0}),
    "r1-qwen-7b": (Qwen2Config, 28, 4, False, 399, {"rope_type": "default", "rope_theta": 10000.0}),
    "r1-llama-8b": (
        LlamaConfig, 32, 8, False, 0, {**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 64},
    ),
}  # fmt: skip
HEAD_DIM = 32  # the narrowest that vLLM runs on CPU


def save_tiny_target(
    directory: Path,
    kind: str = "llama",
    initializer_range: float = 0.2,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_position_embeddings: int = 512,
) -> Path:
    """A few layers of one of ``KINDS``, random. ``initializer_range`` is that of the narrowest: where it is small,
    outputs loop, and a head can learn them."""
    torch.manual_seed(0)
    tokenizer = tokenizer or tiny_tokenizer()
    config_cls, num_heads, num_kv_heads, tied, num_padded, rope = KINDS[kind]
    config = config_cls(
        vocab_size=len(tokenizer) + num_padded,
        tie_word_embeddings=tied,
        hidden_size=HEAD_DIM * num_heads,
        intermediate_size=24 * num_heads,
        num_hidden_layers=5,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=initializer_range * (2 / num_heads) ** 0.5,
        **({"rope_parameters": rope} if rope else {}),
    )
    model = (LlamaForCausalLM if config_cls is LlamaConfig else Qwen2ForCausalLM)(config)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def shaken_head(name: str, target: TargetModel, num_speculative_tokens: int) -> Any:
    """A new head of an architecture. Parts that start at zero are shaken, so that every path matters."""
    spec = load_head(name)
    torch.manual_seed(1)
    options = spec.options_cls()
    size = spec.draft_vocab_size(options, target.config.vocab_size, Counter())
    head = spec.build(target, torch.arange(size), options, num_speculative_tokens)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head
