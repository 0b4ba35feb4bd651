"""What the settings name as data, as one stream of examples: traces to learn from, or prompts to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_training.contamination import Contamination
from draft_training.drops import Drops
from draft_training.near_duplicates import NearDuplicates, numbers_of
from draft_training.prompts import embedded_prompts
from specdec.config import TracesConfig
from specdec.conventions import UnusableRowError, prompt_of, row_id, traces_of
from specdec.evaluation.suites.gym import TASKS
from specdec.record import text_sha256
from specdec.rows import Row, is_hub_name, read_rows, source_files
from specdec.traces import ReasoningTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One thing to learn from. Without a trace the target answers the prompt itself."""

    id: str
    prompt: str
    trace: ReasoningTrace | None = None


def examples(traces: TracesConfig, drops: Drops) -> Iterator[Example]:
    """Every usable example, in the order of the sources; the rest is counted in ``drops``.

    Raises:
        ValueError: a source can't be read, or a row asks nothing or follows no known convention, by its place.
    """
    if not traces.files and not traces.prompts:
        for number, prompt in enumerate(embedded_prompts(traces.num_prompts, traces.seed)):
            yield Example(id=f"embedded {number}", prompt=prompt)
    for source in traces.files if traces.files else [traces.prompts] if traces.prompts else []:
        answered = bool(traces.files) and not traces.regenerate
        for where, row in read_rows(source):
            yield from _traces(where, row, traces, drops) if answered else _prompt(where, row)


def _traces(where: str, row: Row, traces: TracesConfig, drops: Drops) -> Iterator[Example]:
    try:
        found = traces_of(row, traces.generations_per_prompt)
    except UnusableRowError as reason:
        drops.num_seen += 1
        drops.add(str(reason), row_id(row, where))
        return
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    yield from (Example(id=row_id(row, where), prompt=trace.prompt, trace=trace) for trace in found)


def _prompt(where: str, row: Row) -> Iterator[Example]:
    prompt = prompt_of(row)
    if prompt is None:
        raise ValueError(f"{where}: no prompt; want text in problem, question, prompt, messages; has {sorted(row)}")
    yield Example(id=row_id(row, where), prompt=prompt)


class PromptGroups:
    """Prompts that say the same in almost the same words share a group, and a split never parts them."""

    def __init__(self) -> None:
        self._texts = NearDuplicates()
        self._numbers: dict[str, int] = {}
        self._identities: list[str] = []

    def add(self, prompt: str) -> None:
        conversation_id = text_sha256(prompt)
        if conversation_id not in self._numbers:
            self._numbers[conversation_id] = len(self._identities)
            self._identities.append(conversation_id)
            self._texts.add(prompt, numbers_of(prompt))

    def group_of(self, conversation_id: str) -> str:
        """The conversation id of the group's earliest prompt."""
        return self._identities[self._texts.root(self._numbers[conversation_id])]


def filter_examples(
    stream: Iterator[Example], contamination: Contamination, groups: PromptGroups, drops: Drops
) -> Iterator[Example]:
    """Without what overlaps with a benchmark or repeats an earlier example; prompts enter ``groups``."""
    seen = NearDuplicates()
    for example in stream:
        drops.num_seen += 1
        benchmark = contamination.find(example.prompt)
        if benchmark is not None:
            drops.add(f"overlaps with {benchmark}", example.id)
            continue
        trace = example.trace
        text = f"{example.prompt} {trace.reasoning} {trace.response}" if trace else example.prompt
        if seen.add(text, numbers_of(example.prompt)) is not None:
            drops.add("near-duplicate of an earlier row", example.id)
            continue
        groups.add(example.prompt)
        yield example


def describe_source(traces: TracesConfig) -> dict[str, Any]:
    """What decides the rows' content: hashes of files, names of hub data sets, or the embedded tasks.

    Raises:
        ValueError: a file can't be read.
    """
    if traces.served:  # a server may be filling it: its rows are those of the first time
        return {"served": str(Path(traces.served).resolve())}
    if traces.files:
        return {"traces": {Path(source).name: _digest(source) for source in traces.files}}
    if traces.prompts:
        return {"prompts": _digest(traces.prompts)}
    return {"tasks": list(TASKS)}


def _digest(source: str) -> str:
    if is_hub_name(source):
        return source
    total = hashlib.sha256()
    for file in source_files(source):
        try:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}; check the path") from error
    return total.hexdigest()
