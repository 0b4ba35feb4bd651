"""The recipe's default and its switches, each flipped alone. One process computes the target's features for all."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens
from draft_training.heads import load_head
from draft_training.prepare import CARD_NAME
from draft_training.recipe import check_recipe
from draft_training.row_store import held_out_groups, load_rows
from draft_training.sources import PromptGroups
from specdec.config import RunConfig, dump_yaml, from_dict, load_config
from specdec.demo import DEMO_SETTINGS
from specdec.device import detect_device
from specdec.record import text_sha256
from specdec.targets import resolve_target
from specdec.traces import TokenRow

if TYPE_CHECKING:
    from draft_training.trainer import Trainer

DEFAULT = "default"
ARMS: dict[str, list[str]] = {
    DEFAULT: [],
    "loss-lk-hybrid": ["train.loss=lk_hybrid"],
    "loss-lk-log": ["train.loss=lk_log"],
    "weights-survival": ["train.position_weights=survival"],
    "weights-falling": ["train.step_decay=0.8"],
    "optimizer-adamw": ["train.optimizer=adamw"],
    "ema": ["train.ema=0.99"],
    "lm-head-frozen": ["train.lm_head_lr_scale=0"],
    "lm-head-slow": ["train.lm_head_lr_scale=0.3"],
    "vocab-coverage": ["head.options.draft_vocab_coverage=0.99"],
    "unrolled-deeper": ["head.num_speculative_tokens=5"],  # measured at the default's K all the same
    "no-norm-before-fc": ["head.options.norm_before_fc=false"],
    "no-norm-output": ["head.options.norm_output=false"],
    "no-norm-before-residual": ["head.options.norm_before_residual=false"],
    "packed": ["train.pack_tokens=1024"],
}
HELD_OUT_FRACTION = 0.25


def arm_config(arm: str, seed: int, overrides: list[str]) -> RunConfig:
    """The demo's recipe with ``overrides`` and the arm's flip; measured once, at the end, so that nothing is picked."""
    own = ["train.num_evals=1", f"train.seed={seed}"]
    config = load_config(None, [*DEMO_SETTINGS, *overrides, *own, *ARMS[arm]])
    check_recipe(config.train)
    return config


class Bench:
    """Rows split by groups of alike prompts, and what all arms share; the target is loaded when first needed.

    Raises:
        ValueError: no rows, or rows of another target than the settings name.
    """

    def __init__(self, rows_dir: Path, overrides: list[str]) -> None:
        self.base = arm_config(DEFAULT, 0, overrides)
        if not (rows_dir / CARD_NAME).is_file():
            raise ValueError(f"{rows_dir} holds no rows; make them with `make demo` or `specdec prepare`")
        card = json.loads((rows_dir / CARD_NAME).read_text())
        self.target, self.device = resolve_target(self.base.target), detect_device()
        if card["settings"]["target"] != dataclasses.asdict(self.target.fingerprint()):
            raise ValueError(f"{rows_dir} holds rows of another target than {self.target.name}")
        self.on_policy: bool = card["on_policy"]
        self.rows_sha256 = text_sha256(*(card["splits"][name]["input_ids_sha256"] for name in ("train", "val")))
        self.rows = split([*load_rows(rows_dir / "train"), *load_rows(rows_dir / "val")])
        self.counts = count_completion_tokens(self.rows["train"])
        self._stores: dict[str, Any] = {}

    def identity(self, config: RunConfig) -> str:
        """What a finished run must agree on to be kept."""
        return text_sha256(self.rows_sha256, str(HELD_OUT_FRACTION), *map(dump_yaml, (config.head, config.train)))

    def stores(self, aux_layer_ids: list[int]) -> dict[str, Any]:
        """Feature stores of both splits, filled."""
        from draft_training.features import FeatureStore
        from draft_training.target_model import TargetModel

        if not self._stores:
            model = TargetModel.load(self.target, self.device.settled(self.base.target.dtype), self.device)
            max_bytes = int(self.base.train.feature_cache_gib * 2**30)
            for name, rows in self.rows.items():
                self._stores[name] = FeatureStore(model, rows, aux_layer_ids, max_bytes)
                self._stores[name].fill(max(self.base.train.batch_tokens, 2048), f"target features ({name})")
        return self._stores


def split(rows: list[TokenRow]) -> dict[str, list[TokenRow]]:
    """A larger held-out share than training needs: what is compared here are small differences."""
    groups = PromptGroups()
    for row in rows:
        groups.add(row.prompt)
    group_of = {row.conversation_id: groups.group_of(text_sha256(row.prompt)) for row in rows}
    held_out = held_out_groups(group_of.values(), HELD_OUT_FRACTION, seed=0)
    parts: dict[str, list[TokenRow]] = {"train": [], "val": []}
    for row in rows:
        parts["val" if group_of[row.conversation_id] in held_out else "train"].append(row)
    return parts


@dataclass(kw_only=True, slots=True)
class ArmRun:
    """One arm, one seed; the accepted count of every held-out draft, by conversation."""

    arm: str
    seed: int
    identity: str
    train_sec: float
    num_steps: int
    draft_vocab_size: int
    acceptance_length: float
    per_position_rates: list[float]
    accepted_by_conversation: dict[str, list[int]]


def make_trainer(bench: Bench, config: RunConfig, work_dir: Path) -> Trainer:
    """A new head of ``config`` and what trains it on the bench's rows."""
    import torch

    from draft_training.distributed import Processes
    from draft_training.train import _precision
    from draft_training.trainer import Trainer

    spec = load_head(config.head.name)
    options = from_dict(spec.options_cls, config.head.options, "head.options.")
    stores = bench.stores(spec.aux_layer_ids(options, int(bench.target.config["num_hidden_layers"])))
    vocab_size = int(bench.target.config["vocab_size"])
    ids = choose_draft_tokens(bench.counts, vocab_size, spec.draft_vocab_size(options, vocab_size, bench.counts))
    model = stores["train"].target
    torch.manual_seed(config.train.seed)
    head = spec.build(model, torch.tensor(ids), options, config.head.num_speculative_tokens).to(model.device)
    return Trainer(
        head=head,
        train_store=stores["train"],
        val_store=stores["val"],
        config=config.train,
        precision=_precision(config, bench.device),
        on_policy=bench.on_policy,
        work_dir=work_dir,
        identity={"arm": bench.identity(config)},
        processes=Processes(config.train.parallel, bench.device),
    )


def train_arm(bench: Bench, arm: str, config: RunConfig, work_dir: Path) -> ArmRun:
    """Train, round to bf16 as an export does, and walk the held-out rows at the default's K.

    Raises:
        Interrupted: stopped by a signal; the same call resumes from ``work_dir``.
    """
    import torch

    from draft_training.selection import held_out_acceptance

    trainer = make_trainer(bench, config, work_dir)
    trainer.run()
    head = trainer.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.bfloat16().float())
    head.num_speculative_tokens = bench.base.head.num_speculative_tokens
    found = held_out_acceptance(head, trainer.val_store, bench.on_policy, config.train.batch_tokens)
    return ArmRun(
        arm=arm,
        seed=config.train.seed,
        identity=bench.identity(config),
        train_sec=trainer.state.train_sec,
        num_steps=trainer.state.step,
        draft_vocab_size=head.draft_vocab_size,
        acceptance_length=found.total.acceptance_length or 0.0,
        per_position_rates=[rate or 0.0 for rate in found.total.per_position_rates],
        accepted_by_conversation=found.accepted_by_conversation,
    )
