"""From a served folder to a head, and from a head to a better one: what a server keeps is what training reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draft_training.drops import Drops
from draft_training.prepare import prepare
from draft_training.row_store import load_rows
from draft_training.served import served_rows
from draft_training.train import train
from serving.traffic import TrafficLog, claim
from specdec.cli import app
from specdec.config import RunConfig, TargetConfig, load_config
from specdec.doctor import diagnose
from specdec.manifest import HeadManifest
from specdec.record import text_sha256
from specdec.targets import Target, resolve_target
from specdec.traces import prompt_ids
from tests.tiny import save_tiny_target, tiny_tokenizer

SMALL = ("train.epochs=2", "train.batch_tokens=256", "traces.val_fraction=0.25")
VOCAB = ("head.options.draft_vocab_size=64",)
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path_factory.mktemp("target")))))


@pytest.fixture
def served(target: Target, tmp_path: Path) -> Path:
    """Sixteen requests as a server keeps them, and a last one that was being written when it was killed."""
    directory = tmp_path / "served"
    claim(directory, target.fingerprint())
    log = TrafficLog(directory, 1.0, 10**6)
    for number in range(16):
        completion = TOKENIZER(f"Twice {number} is {2 * number}.</think>{2 * number}")["input_ids"]
        log.finished(prompt_ids(TOKENIZER, f"{number} + {number}?"), [*completion, TOKENIZER.eos_token_id])
    log.close()
    with log.files()[-1].open("a") as lines:
        lines.write('{"prompt_ids": [1, 2, 3], "comple')
    return directory


def config_for(target: Target, served: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"target.name={target.path}", f"traces.served={served}", *SMALL, *overrides])


def test_a_served_folder_trains_from_the_command_line(target, served, tmp_path):
    settings = [f"--set={item}" for item in (*SMALL, *VOCAB)]
    out = tmp_path / "head"
    arguments = ["train", "--target", str(target.path), "--from-served", str(served), "--out", str(out), *settings]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert diagnose(out, target) == []
    card = json.loads((out / "rows" / "card.json").read_text())
    assert card["on_policy"] is True and HeadManifest.load(out).acceptance["on_policy"] is True
    assert (card["splits"]["train"]["rows"], card["splits"]["val"]["rows"]) == (12, 4)
    [(reason, dropped)] = card["dropped"].items()
    assert "no whole row" in reason and dropped == {"rows": 1, "examples": ["served-00000000.jsonl line 17"]}
    prompts = [json.loads(line)["prompt"] for line in (out / "rows" / "val_prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 4 and all(prompt.endswith("?") for prompt in prompts)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and again.stdout == done.stdout


def test_rows_are_what_was_served_and_the_thinking_is_known(target, served):
    rows = [row for _, _, row in served_rows(served, target, TOKENIZER, Drops())]
    lines = [json.loads(line) for line in next(served.glob("served-*")).read_text().splitlines()[:-1]]
    assert [row.input_ids for row in rows] == [line["prompt_ids"] + line["completion_ids"] for line in lines]
    assert {row.prompt for row in rows} == {f"{number} + {number}?" for number in range(16)}
    for row in rows:
        assert row.conversation_id == text_sha256(row.prompt)
        start, end = row.think_span
        assert TOKENIZER.decode(row.input_ids[start:end]).endswith("</think>")
        assert sum(row.loss_mask) == row.num_completion_tokens


def test_bounds_hold(target, served, tmp_path):
    most = config_for(target, served, "traces.max_rows=5")
    assert sum(split["rows"] for split in prepare(most, tmp_path / "most")["splits"].values()) == 5
    lengths = [len(row.input_ids) for _, _, row in served_rows(served, target, TOKENIZER, Drops())]
    short = config_for(target, served, f"traces.max_length={max(lengths) - 1}")
    card = prepare(short, tmp_path / "short")
    dropped = card["dropped"][f"longer than traces.max_length of {max(lengths) - 1} tokens"]["rows"]
    assert dropped == lengths.count(max(lengths))
    for name in ("train", "val"):
        assert all(len(row.input_ids) < max(lengths) for row in load_rows(tmp_path / "short" / name))


def test_a_server_that_starts_again_ends_the_torn_line(served, target):
    log = TrafficLog(served, 1.0, 10**6)
    log.finished([7, 8], [9, 10, 11])
    log.close()
    drops = Drops()
    rows = [row for _, _, row in served_rows(served, target, TOKENIZER, drops)]
    assert rows[-1].input_ids == [7, 8, 9, 10, 11] and len(rows) == 17
    assert sum(drops.counts.values()) == 1
    TrafficLog(served, 1.0, 10**6).close()
    assert served.joinpath("served-00000000.jsonl").read_bytes().count(b"\n") == 18, "a whole line is left alone"


@pytest.mark.parametrize(
    "line",
    [
        "", "no json", "[1, 2]", "{}", '{"prompt_ids": [1], "completion_ids": []}', "null",
        '{"prompt_ids": [1], "completion_ids": [1, 100000]}', '{"prompt_ids": [-1], "completion_ids": [1]}',
        '{"prompt_ids": [1], "completion_ids": ["a"]}', '{"prompt_ids": "ab", "completion_ids": [1]}',
        '{"prompt_ids": [true], "completion_ids": [1, 2]}',
    ],
)  # fmt: skip
def test_what_is_no_row_of_this_target_is_dropped(target, tmp_path, line):
    (tmp_path / "served-00000000.jsonl").write_text(
        line + "\n" + json.dumps({"prompt_ids": [1], "completion_ids": [2]})
    )
    drops = Drops()
    assert [row.input_ids for _, _, row in served_rows(tmp_path, target, TOKENIZER, drops)] == [[1, 2]]
    assert sum(drops.counts.values()) == 1


def test_a_repeated_row_is_dropped_and_another_answer_kept(target, tmp_path):
    rows = [([1, 2], [3, 4, 5]), ([1, 2], [3, 4, 5]), ([1, 2], [6, 7, 8])]
    lines = [json.dumps({"prompt_ids": prompt, "completion_ids": answer}) for prompt, answer in rows]
    (tmp_path / "served-00000000.jsonl").write_text("\n".join(lines) + "\n")
    assert len(list(served_rows(tmp_path, target, TOKENIZER, Drops()))) == 2


def conversation(*turns: str, system: str = "") -> list[int]:
    """The served prompt of the last user turn; earlier reasoning is cut, as R1's template does."""
    text = f"<bos>{system}<|User|>{turns[0]}<|Assistant|>"
    for number, turn in enumerate(turns[1:]):
        text += f"answer {number}<eos><|User|>{turn}<|Assistant|>"
    return TOKENIZER(text + "<think>\n", add_special_tokens=False)["input_ids"]


def test_the_turns_of_a_conversation_stay_on_one_side_of_the_split(target, tmp_path):
    directory = tmp_path / "served"
    claim(directory, target.fingerprint())
    log = TrafficLog(directory, 1.0, 10**6)
    for number in range(8):
        opening = f"Tell me about topic number {number}"
        for turns in ([opening], [opening, "More."], [opening, "More.", "And then?"]):
            log.finished(conversation(*turns), [65, 66, 67, number, len(turns)])
        log.finished(conversation(opening, system=f"Be brief, {number}."), [65, 66, 67, 68])
    log.close()
    prepare(config_for(target, directory), tmp_path / "rows")
    sides = {}
    for name in ("train", "val"):
        for row in load_rows(tmp_path / "rows" / name):
            text = TOKENIZER.decode(row.input_ids[slice(*row.prompt_span)])
            if "Be brief" not in text:
                sides.setdefault(text[text.index("number ") + 7], set()).add((name, row.conversation_id))
    assert len(sides) == 8 and all(len(side) == 1 for side in sides.values()), sides
    assert {name for side in sides.values() for name, _ in side} == {"train", "val"}
    prompts = (tmp_path / "rows" / "val_prompts.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].startswith("Tell me") for line in prompts), "only what a prompt alone gives"


def test_another_targets_requests_are_refused_on_both_sides(target, served, tmp_path):
    other = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path / "other", "qwen2"))))
    with pytest.raises(ValueError, match="another target"):
        claim(served, other.fingerprint())
    claim(served, target.fingerprint())
    with pytest.raises(ValueError, match="another target"):
        prepare(config_for(other, served), tmp_path / "rows")
    with pytest.raises(ValueError, match="keep_traffic=DIR"):
        prepare(config_for(target, tmp_path), tmp_path / "rows")
    with pytest.raises(ValueError, match="not several"):
        prepare(config_for(target, served, "traces.files=[x.jsonl]"), tmp_path / "rows")


@pytest.mark.parametrize("name", ["eagle3", "peagle", "eagle", "medusa"])
def test_a_head_goes_on_learning_with_its_own_vocabulary_and_is_never_exported_worse(target, served, tmp_path, name):
    vocab = () if name == "eagle" else VOCAB
    first = train(config_for(target, served, f"head.name={name}", *vocab), None, tmp_path / "first")
    frozen = config_for(target, served, f"train.init_head={tmp_path / 'first'}", "train.learning_rate=0.0")
    same = train(frozen, tmp_path / "first" / "rows", tmp_path / "same")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("first", "same"))
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    assert (same.head, same.draft_vocab_size) == (name, first.draft_vocab_size)
    spoiling = config_for(target, served, f"train.init_head={tmp_path / 'first'}", "train.learning_rate=0.5")
    spoilt = train(spoiling, tmp_path / "first" / "rows", tmp_path / "spoilt")
    assert spoilt.acceptance["acceptance_length"] >= first.acceptance["acceptance_length"]


def test_heads_that_can_not_go_on_are_refused(target, served, tmp_path):
    train(config_for(target, served, *VOCAB), None, tmp_path / "first")
    init = f"train.init_head={tmp_path / 'first'}"
    with pytest.raises(ValueError, match="leave out --head"):
        train(config_for(target, served, init, "head.name=medusa"), None, tmp_path / "next")
    with pytest.raises(ValueError, match="does not exist"):
        train(config_for(target, served, "train.init_head=nowhere"), None, tmp_path / "next")
    manifest = HeadManifest.load(tmp_path / "first")
    dataclasses.replace(manifest, provenance={}).save(tmp_path / "first")
    with pytest.raises(ValueError, match="does not say how it was trained"):
        train(config_for(target, served, init), None, tmp_path / "next")
    dataclasses.replace(manifest, target=dataclasses.replace(manifest.target, hidden_size=4096)).save(
        tmp_path / "first"
    )
    with pytest.raises(ValueError, match="another target"):
        train(config_for(target, served, init), None, tmp_path / "next")
    manifest.save(tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["fc.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"holds no fc\.weight"):
        train(config_for(target, served, init), None, tmp_path / "next")
