"""P-EAGLE: EAGLE-3 that drafts all K tokens in one forward, from mask inputs."""

from draft_training.heads import HeadSpec
from draft_training.heads.peagle.config import PEagleOptions

HEAD = HeadSpec(
    name="peagle",
    vllm_method="eagle3",
    paper="arXiv 2602.01469",
    options_cls=PEagleOptions,
    builder="draft_training.heads.peagle.model:build",
    vllm_speculative={"parallel_drafting": True},
)
