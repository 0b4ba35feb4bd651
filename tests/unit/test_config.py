"""Strict configuration: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from specdec.config import RunConfig, ServeConfig, dump_yaml, from_dict, load_config, to_dict


def test_defaults_round_trip_through_dict_and_yaml():
    config = load_config()
    assert config == RunConfig()
    assert from_dict(RunConfig, to_dict(config)) == config
    assert from_dict(RunConfig, yaml.safe_load(dump_yaml(config))) == config


def test_changed_config_round_trips(tmp_path: Path):
    config = load_config(None, ["head.options.draft_vocab_size=4096", "traces.files=[a.jsonl, b.jsonl]"])
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config
    assert config.head.options == {"draft_vocab_size": 4096}
    assert config.traces.files == ["a.jsonl", "b.jsonl"]


def test_overrides_come_after_the_file_and_in_order(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  epochs: 3\n  seed: 7\nserve:\n")
    config = load_config(path, ["train.epochs=4", "train.epochs=5", "serve.port=9000"])
    assert (config.train.epochs, config.train.seed, config.serve.port) == (5, 7, 9000)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.learning_rate=1e-3", lambda c: c.train.learning_rate, 1e-3),
        ("train.clip_norm=1", lambda c: c.train.clip_norm, 1.0),
        ("traces.temperature=null", lambda c: c.traces.temperature, None),
        ("traces.temperature=0", lambda c: c.traces.temperature, 0.0),
        ("serve.enforce_eager=true", lambda c: c.serve.enforce_eager, True),
        ("serve.threads_bind=0-3", lambda c: c.serve.threads_bind, "0-3"),
        ("serve.threads_bind=0", lambda c: c.serve.threads_bind, "0"),
        ("serve.max_model_len=4096", lambda c: c.serve.max_model_len, 4096),
        ("traces.files=one.jsonl", lambda c: c.traces.files, ["one.jsonl"]),
        ("target.name=a=b", lambda c: c.target.name, "a=b"),
    ],
)
def test_override_is_read_as_its_type(override, read, value):
    got = read(load_config(None, [override]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", r"unknown setting train\.epoch; did you mean train\.epochs\?"),
        ("trian.epochs=3", r"unknown setting trian; did you mean train\?"),
        ("train.zzzzzz=3", r"unknown setting train\.zzzzzz; known: .*epochs"),
        ("train.epochs=three", r"train\.epochs must be float, got 'three'"),
        ("train.seed=2.5", r"train\.seed must be int, got 2\.5"),
        ("train.seed=true", r"train\.seed must be int, got True"),
        ("train.learning_rate=fast", r"train\.learning_rate must be float"),
        ("serve.enforce_eager=1", r"serve\.enforce_eager must be bool"),
        ("traces.files=[1.5]", r"traces\.files\[0\] must be str"),
        ("train=3", r"--set wants section\.key=value"),
        ("train.epochs", r"--set wants section\.key=value"),
        ("train.epochs.deep=3", r"train\.epochs must be float, got {'deep': 3}"),
        ("target.name=[", r"not valid YAML"),
    ],
)
def test_bad_override_is_refused(override, words):
    with pytest.raises(ValueError, match=words):
        load_config(None, [override])


def test_override_below_a_value_is_refused():
    with pytest.raises(ValueError, match="is a value, not a section"):
        load_config(None, ["train.epochs=3", "train.epochs.deep=3"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: 3\n", "train is a section, not a value"),
        (b"- train\n", "must hold sections"),
        (b"train: [\n", "cannot read config"),
        (b"\xff\xfe\x00", "cannot read config"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_config(path)


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot read config"):
        load_config(tmp_path / "none.yaml")


def test_sections_are_keyword_only():
    with pytest.raises(TypeError):
        ServeConfig("0.0.0.0")  # type: ignore[misc]


def test_off_is_a_word_where_words_are_wanted_and_a_truth_value_where_those_are(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("serve:\n  policy: off\n  speculation: no\n")
    assert load_config(path).serve.policy == "off" and load_config(path).serve.speculation is False
    config = load_config(None, ["serve.policy=off", "train.tensorboard=on", "eval.sampled=false"])
    assert (config.serve.policy, config.train.tensorboard, config.eval.sampled) == ("off", True, False)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config
    with pytest.raises(ValueError, match=r"train\.tensorboard must be bool, got 'maybe'"):
        load_config(None, ["train.tensorboard=maybe"])
