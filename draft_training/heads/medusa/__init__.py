"""Medusa: K residual blocks on the target's last hidden state, each guessing one token further ahead."""

from draft_training.heads import HeadSpec
from draft_training.heads.medusa.config import MedusaOptions

HEAD = HeadSpec(
    name="medusa",
    vllm_method="medusa",
    paper="arXiv 2401.10774",
    options_cls=MedusaOptions,
    builder="draft_training.heads.medusa.model:build",
)
