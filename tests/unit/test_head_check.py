"""What may take a running head's place: a head that is clean and of its shape. Everything else is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serving.head_check import RunningHead
from specdec.targets import Target
from tests.head_files import K, write_head, write_target


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return write_target(tmp_path / "target")


@pytest.fixture
def running(tmp_path: Path, target: Target) -> RunningHead:
    return RunningHead.read(write_head(tmp_path / "running", target))


def test_a_head_of_the_same_shape_fits_whatever_else_differs(running, tmp_path, target):
    other = write_head(tmp_path / "other", target, config={"dtype": "float32", "transformers_version": "9"})
    found = running.check_successor(other, target, K)
    assert found.manifest.head == "eagle3" and found.layout["d2t"] == ("I64", [16])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": "peagle"}, "head is peagle, the running one has eagle3"),
        ({"vllm_speculative": {"parallel_drafting": True}}, "vllm_speculative is {'parallel_drafting': True}"),
        ({"draft_vocab": 24}, "draft_vocab_size is 24, the running one has 16"),
        ({"config": {"norm_before_residual": True}}, "norm_before_residual in config.json is True"),
        ({"config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, "the running one has [2, 3, 4]"),
        ({"num_speculative_tokens": 2}, "was trained for 2 draft tokens, this server drafts up to 3"),
    ],
)
def test_a_head_of_another_shape_needs_a_restart(running, tmp_path, target, changes, says):
    other = write_head(tmp_path / "other", target, **changes)
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        running.check_successor(other, target, K)
    assert str(refused.value).endswith("restart the server with it")


def test_fewer_draft_tokens_do_where_the_server_drafts_fewer(running, tmp_path, target):
    assert running.check_successor(write_head(tmp_path / "other", target, num_speculative_tokens=2), target, 2)


def test_what_the_doctor_finds_is_the_reason(running, tmp_path, target):
    other = write_head(tmp_path / "other", target)
    config = json.loads((other / "config.json").read_text())
    del config["norm_before_residual"], config["eagle_aux_hidden_state_layer_ids"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the doctor finds in .*: eagle_aux_hidden_state_layer_ids.* \(and 1 more"):
        running.check_successor(other, target, K)


def test_a_swap_reads_safetensors_alone(running, tmp_path, target):
    other = write_head(tmp_path / "other", target)
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors, which a swap reads"):
        running.check_successor(other, target, K)


def test_a_head_of_another_target_is_refused(running, tmp_path, target):
    stranger = write_target(tmp_path / "stranger", fill=1.0)
    with pytest.raises(ValueError, match="trained for another target"):
        running.check_successor(write_head(tmp_path / "other", stranger), target, K)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", -8, "truncated"),
        ("model.safetensors", 5, "truncated"),
        ("model.safetensors", None, "no .safetensors"),
        ("specdec.json", 10, "damaged"),
        ("specdec.json", None, "not a head exported"),
        ("config.json", None, "no config.json"),
    ],
)
def test_missing_and_damaged_files_are_refused(running, tmp_path, target, name, content, says):
    path = write_head(tmp_path / "other", target) / name
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(whole[:content])
    with pytest.raises(ValueError, match=says):
        running.check_successor(tmp_path / "other", target, K)
    with pytest.raises(ValueError, match="does not exist"):
        running.check_successor(tmp_path / "nowhere", target, K)
