"""What every arm answered, a line each, beside the result: to be read, and to be measured again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from specdec.evaluation.records import Measurement

NAME = "answers.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer without an error; ids are empty where the server does not return them."""

    cell: str
    arm: str
    suite: str
    item_id: str
    repeat: int
    sample: int
    turn: int
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    accepted_per_step: list[int]  # of each verification, where the server tells


def answers_of(measurement: Measurement) -> list[Answer]:
    """In the order in which they were measured."""
    return [
        Answer(
            cell=record.cell,
            arm=record.arm,
            suite=record.suite,
            item_id=record.item_id,
            repeat=record.repeat,
            sample=record.sample,
            turn=record.turn,
            text=record.result.text,
            prompt_token_ids=record.result.prompt_token_ids,
            token_ids=record.result.token_ids,
            accepted_per_step=record.result.accepted_per_step,
        )
        for run in measurement.runs
        for record in run.records
        if not record.result.error
    ]


def write_answers(answers: list[Answer], path: Path) -> None:
    """One JSON object a line."""
    lines = (json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    path.write_text("".join(lines), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """The inverse of ``write_answers``."""
    with path.open(encoding="utf-8") as lines:
        return [Answer(**json.loads(line)) for line in lines]
