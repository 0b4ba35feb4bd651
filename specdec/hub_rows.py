"""Rows of a Hugging Face data set, streamed: nothing is downloaded as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HUB_PREFIX = "hf:"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubName:
    """A data set of Hugging Face's hub, as ``datasets.load_dataset`` names it."""

    dataset: str
    config: str | None = None
    split: str | None = None  # None: the reader's default, or else the only one


def parse_hub_name(text: str) -> HubName:
    """``hf:ORG/NAME[:CONFIG[:SPLIT]][@SPLIT]``.

    Raises:
        ValueError: not of that form.
    """
    body, _, at_split = text.removeprefix(HUB_PREFIX).partition("@")
    dataset, config, split, *rest = [*body.split(":"), "", ""]
    if not dataset or any(rest) or (split and at_split):
        raise ValueError(f"{text} does not name a data set; write hf:ORG/DATASET, with :CONFIG and @SPLIT where needed")
    return HubName(dataset=dataset, config=config or None, split=split or at_split or None)


def hub_rows(name: HubName, default_split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("ORG/NAME row N", row).

    Raises:
        ValueError: no such data set, config or split, or no way to the hub.
    """
    split = _open_split(name, default_split)
    number = -1
    try:
        for number, row in enumerate(split):
            yield f"{name.dataset} row {number}", dict(row)
    except GeneratorExit:
        raise
    except Exception as error:  # a network that goes away has a dozen kinds
        raise ValueError(f"{name.dataset} after row {number}: {_first_line(error)}; run the command again") from error


def _open_split(name: HubName, default_split: str) -> Any:
    import datasets

    try:
        splits: Any = datasets.load_dataset(name.dataset, name.config, streaming=True)
    except Exception as error:  # datasets raises a dozen kinds for no network, no such name, no such config
        raise ValueError(
            f"{name.dataset} could not be loaded; without a network give its files instead: {_first_line(error)}"
        ) from error
    wanted = name.split or (default_split if default_split in splits or len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise ValueError(
            f"{name.dataset} has the splits {', '.join(splits)}; name one: "
            f"hf:{name.dataset}{f':{name.config}' if name.config else ''}@SPLIT"
        )
    return splits[wanted]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
