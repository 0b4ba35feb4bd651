"""EAGLE-1 and EAGLE-2: one decoder layer over the token's embedding and the target's last hidden state."""

from draft_training.heads import HeadSpec
from draft_training.heads.eagle.config import EagleOptions

HEAD = HeadSpec(
    name="eagle",
    vllm_method="eagle",
    paper="arXiv 2401.15077",
    options_cls=EagleOptions,
    builder="draft_training.heads.eagle.model:build",
)
