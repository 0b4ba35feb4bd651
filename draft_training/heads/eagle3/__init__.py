"""EAGLE-3: one decoder layer over fused low, middle and high features of the target."""

from draft_training.heads import HeadSpec
from draft_training.heads.eagle3.config import Eagle3Options

HEAD = HeadSpec(
    name="eagle3",
    vllm_method="eagle3",
    paper="arXiv 2503.01840",
    options_cls=Eagle3Options,
    builder="draft_training.heads.eagle3.model:build",
)
