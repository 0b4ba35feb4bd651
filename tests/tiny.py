"""Tiny random targets of the real shapes, with a byte-level tokenizer and an R1-like chat template. No network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from draft_training.features import TargetModel
from draft_training.heads import load_head

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


def save_tiny_target(
    directory: Path,
    kind: str = "llama",
    initializer_range: float = 0.2,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_position_embeddings: int = 512,
) -> Path:
    """A few layers of the named architecture: ``llama`` tied with grouped queries and llama3 rope scaling,
    ``qwen2`` untied, biased and with a padded vocabulary."""
    torch.manual_seed(0)
    tokenizer = tokenizer or tiny_tokenizer()
    shared = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,  # of 32, the narrowest that vLLM runs on CPU
        "num_key_value_heads": 1,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": initializer_range,  # small: outputs loop, and a head can learn them
    }
    if kind == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, rope_parameters=rope, **shared)
        )
    else:
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer) + 26, tie_word_embeddings=False, **shared))
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
