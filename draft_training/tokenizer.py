"""The target's own tokenizer, refused when it doesn't fit the target."""

from __future__ import annotations

from typing import Any

from specdec.targets import Target


def load_tokenizer(target: Target) -> Any:
    """The tokenizer in the target's directory.

    Raises:
        ValueError: its ids go beyond the model's vocabulary, or it has no end token or chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target.path)
    check_tokenizer(tokenizer, target)
    return tokenizer


def check_tokenizer(tokenizer: Any, target: Target) -> None:
    """See ``load_tokenizer``. A model's vocabulary may be larger than the tokenizer's: that is padding."""
    largest, vocab_size = max(tokenizer.get_vocab().values()), int(target.config["vocab_size"])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {target.name} has ids up to {largest}, but config.json says vocab_size {vocab_size}: "
            f"{target.path} mixes the files of two models; put the model's own tokenizer there"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {target.name} has no eos_token; set it in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {target.name} has no chat template; put chat_template.jinja beside it")
