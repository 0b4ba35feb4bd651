"""The contract between training and serving: it survives a round trip and refuses what it doesn't know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from specdec.manifest import MANIFEST_NAME, HeadManifest, TargetFingerprint


def fingerprint(**changes) -> TargetFingerprint:
    facts = TargetFingerprint(
        architecture="LlamaForCausalLM",
        hidden_size=64,
        num_hidden_layers=4,
        vocab_size=128,
        weights_sha256="w" * 64,
        chat_template_sha256="c" * 64,
    )
    return dataclasses.replace(facts, **changes)


def manifest() -> HeadManifest:
    return HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=3,
        target_name="tiny",
        target=fingerprint(),
        draft_vocab_size=32,
        acceptance={"acceptance_length": 2.1},
        acceptance_by_prompt={"abc": [3, 0, 1]},
    )


def test_saved_manifest_loads_equal(tmp_path: Path):
    manifest().save(tmp_path)
    assert HeadManifest.load(tmp_path) == manifest()


def test_same_target_passes():
    manifest().check_target(fingerprint())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 65}, r"hidden_size 64 != 65"),
        ({"vocab_size": 129}, r"vocab_size 128 != 129"),
        ({"architecture": "Qwen2ForCausalLM"}, r"architecture LlamaForCausalLM != Qwen2ForCausalLM"),
        ({"weights_sha256": "x" * 64}, r"weights_sha256"),
        ({"chat_template_sha256": "x" * 64}, r"chat_template_sha256"),
    ],
)
def test_another_target_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        manifest().check_target(fingerprint(**change))
    assert "--target tiny" in str(caught.value)


def test_a_quantised_copy_of_the_target_may_have_other_weights_and_nothing_else():
    manifest().check_target(fingerprint(weights_sha256="x" * 64), quantised=True)
    with pytest.raises(ValueError, match="hidden_size 64 != 65"):
        manifest().check_target(fingerprint(weights_sha256="x" * 64, hidden_size=65), quantised=True)


def test_missing_directory_and_missing_manifest(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist; train one"):
        HeadManifest.load(tmp_path / "none")
    with pytest.raises(ValueError, match=f"holds no {MANIFEST_NAME}"):
        HeadManifest.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[1]", b"{}", b'{"head": 3}', b"\xff\xfe"])
def test_damaged_manifest_says_so(tmp_path: Path, content: bytes):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        HeadManifest.load(tmp_path)


def test_manifest_of_another_format_is_refused(tmp_path: Path):
    tree = dataclasses.asdict(manifest()) | {"format_version": 99, "of_the_future": True}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="format version 99"):
        HeadManifest.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({}, {"use_local_argmax_reduction": True}),
        (
            {"vllm_speculative": {"parallel_drafting": True}},
            {"use_local_argmax_reduction": True, "parallel_drafting": True},
        ),
        ({"vllm_method": "medusa"}, {}),
    ],
)
def test_a_head_says_how_vllm_serves_it(changes, beside):
    head = dataclasses.replace(manifest(), **changes)
    assert head.speculative_config(Path("/heads/a"), 2) == {
        "method": head.vllm_method, "model": "/heads/a", "num_speculative_tokens": 2, **beside
    }  # fmt: skip
