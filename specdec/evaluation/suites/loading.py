"""Finds a suite: by name in the data folder or on the hub, in a named file, or as the user's own prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from specdec.evaluation.suites.base import (
    BOXED_DIRECTIVE,
    Item,
    Suite,
    Verdict,
    draw,
    make_suite,
    refuse_duplicate_ids,
)
from specdec.evaluation.suites.catalogue import (
    RECIPES,
    SuiteRecipe,
    category_of,
    code_item,
    id_of,
    turns_of,
    with_directive,
)
from specdec.evaluation.suites.code import check_code
from specdec.evaluation.suites.gym import load_gym
from specdec.evaluation.suites.maths import check_exact, check_maths
from specdec.evaluation.suites.random_tokens import looks_like_random_tokens
from specdec.hub_rows import HUB_PREFIX, HubName, hub_rows, parse_hub_name
from specdec.row_files import FORMATS
from specdec.rows import Row, read_rows

DATA_VARIABLE = "SPECDEC_DATA_DIR"
GYM = "reasoning_gym"
OWN_CHECKERS = {"math": check_maths, "exact": check_exact, "code": check_code}


def suite_names() -> list[str]:
    """The names that ``load_suite`` knows."""
    return [*RECIPES, GYM]


def is_graded(name: str) -> bool:
    """Whether a suite of this name comes with gold answers."""
    return name in RECIPES and RECIPES[name].check is not None


def load_suite(spec: str, num_items: int | None, seed: int, data_dir: Path | None = None) -> Suite:
    """The suite that ``spec`` names, or ``num_items`` of it: a random part, the same for the same ``seed``.

    Args:
        spec: a name of ``suite_names()``; ``NAME=FILE``; ``NAME=hf:ORG/DATASET[:CONFIG[:SPLIT]]``; or your own
            prompts: a file in any format of ``specdec.row_files``, or ``hf:ORG/DATASET[:CONFIG][@SPLIT]``.
        num_items: None for all; more than there are is all. reasoning_gym makes as many as asked, 120 for None.
        data_dir: where ``bench/NAME*.jsonl[.gz]`` lie; by default the environment variable SPECDEC_DATA_DIR.

    Raises:
        ValueError: the suite can't be had, or a line, an id or the prompts themselves are not usable; says what to do.
    """
    if num_items is not None and num_items < 1:
        raise ValueError(f"the number of items is {num_items}; give at least 1, or none for all")
    name, named, place = spec.partition("=")
    if named and name in suite_names():
        return _named_elsewhere(name, place, num_items, seed)
    if spec.replace("-", "_") == GYM:  # the package spells it with a hyphen
        return load_gym(num_items, seed)
    if spec in RECIPES:
        path = _bench_file(spec, data_dir)
        if path is None:
            return _from_hub(spec, RECIPES[spec].hub, num_items, seed)
        return _from_file(spec, path, num_items, seed)
    if spec.startswith(HUB_PREFIX):
        return _own_prompts(spec, parse_hub_name(spec).dataset.rsplit("/", 1)[-1], num_items, seed)
    if not spec.endswith(tuple(FORMATS)):
        raise ValueError(
            f"{spec!r} is no suite; give one of {', '.join(suite_names())}, NAME=FILE, NAME=hf:ORG/DATASET, "
            f"or your own prompts: hf:ORG/DATASET, or a file that ends in {' or '.join(FORMATS)}"
        )
    return _own_prompts(spec, Path(spec).name.removesuffix(".gz").rsplit(".", 1)[0], num_items, seed)


def _named_elsewhere(name: str, place: str, num_items: int | None, seed: int) -> Suite:
    if name == GYM:
        raise ValueError(f"{GYM} is generated and takes no file; write {GYM} alone")
    if not place.startswith(HUB_PREFIX):
        return _from_file(name, Path(place), num_items, seed)
    return _from_hub(name, (parse_hub_name(place),), num_items, seed)


def _bench_file(name: str, data_dir: Path | None) -> Path | None:
    """The first file of the data folder whose name starts with the suite's; an exact name comes before longer ones."""
    root = data_dir or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if root is None:
        return None
    found = [path for suffix in (".jsonl", ".jsonl.gz") for path in (root / "bench").glob(f"{name}*{suffix}")]
    return min(found, key=lambda path: (len(path.name), path.name), default=None)


def _from_file(name: str, path: Path, num_items: int | None, seed: int) -> Suite:
    return _assemble(name, str(path), read_rows(path), RECIPES[name], num_items, seed)


def _from_hub(name: str, sources: tuple[HubName, ...], num_items: int | None, seed: int) -> Suite:
    """The first of the data sets that can be loaded."""
    advice = f"give {name}=FILE, or set {DATA_VARIABLE} to a folder with bench/{name}.jsonl"
    if not sources:
        raise ValueError(f"{name} is not on the hub; {advice}")
    failures = []
    for source in sources:
        try:
            rows = list(hub_rows(source, default_split="test"))
        except ValueError as error:
            failures.append(str(error))
            continue
        return _assemble(name, source.dataset, rows, RECIPES[name], num_items, seed)
    raise ValueError(
        f"{name} could not be loaded ({'; '.join(failures)}); {advice}, or name one with {name}=hf:ORG/DATASET"
    )


def _assemble(
    name: str, source: str, rows: Iterable[tuple[str, Row]], recipe: SuiteRecipe, num_items: int | None, seed: int
) -> Suite:
    items = [recipe.to_item(name, where, number, row) for number, (where, row) in enumerate(rows)]
    if not items:
        raise ValueError(f"{source} is empty; it needs one task a row")
    refuse_duplicate_ids(items, source)
    _refuse_random_tokens(items, source)
    return make_suite(name, source, draw(items, num_items, seed, recipe.balanced), recipe.check)


def _own_prompts(source: str, name: str, num_items: int | None, seed: int) -> Suite:
    """The user's prompts as they are; those with an answer to check by maths also ask for a box."""
    rows = read_rows(source)
    items = [_own_item(name, where, number, row) for number, (where, row) in enumerate(rows)]
    refuse_duplicate_ids(items, source)
    _refuse_random_tokens(items, source)
    return make_suite(name, source, draw(items, num_items, seed), check_own)


def _refuse_random_tokens(items: list[Item], source: str) -> None:
    prompts = ["\n".join(item.turns).replace(BOXED_DIRECTIVE, "") for item in items]  # that one does make sense
    num_soup = sum(map(looks_like_random_tokens, prompts))
    if num_soup > len(items) / 2:
        raise ValueError(
            f"{source}: {num_soup} of {len(items)} prompts look like random tokens; acceptance measured on random "
            "tokens says nothing about your traffic, because no draft head can foresee an answer to noise. Give "
            f"prompts that your users send, or a suite: {', '.join(suite_names())}"
        )


def _own_item(name: str, where: str, number: int, row: Row) -> Item:
    answer, checker = row.get("answer"), row.get("checker", "math")
    if checker not in OWN_CHECKERS:
        raise ValueError(f"{where}: the checker is {checker!r}; give one of {', '.join(OWN_CHECKERS)}")
    if isinstance(answer, list | dict | bool) or (answer is not None and not str(answer).strip()):
        raise ValueError(f"{where}: the answer must be text or a number; leave it out where there is none")
    if checker == "code":
        item = code_item(name, where, number, row)
        return replace(item, context={**item.context, "checker": checker})
    turns = turns_of(where, row)
    if answer is not None and checker == "math":
        turns = (*turns[:-1], with_directive(turns[-1]))
    return Item(
        suite=name,
        id=id_of(name, number, row),
        turns=turns,
        answer=None if answer is None else str(answer).strip(),
        category=category_of(row),
        context={"checker": checker},
    )


def check_own(item: Item, response: str) -> Verdict:
    """Judge by the checker that the item's line names."""
    return OWN_CHECKERS[item.context["checker"]](item, response)
