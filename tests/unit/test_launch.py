"""The server's plan for each device, and what is refused before anything starts."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from serving import launch
from serving.launch import ServerPlan, plan_server
from serving.serve import serve
from serving.sockets import check_port_free
from specdec.config import RunConfig, ServeConfig, TargetConfig
from specdec.device import Device, core_ranges
from specdec.manifest import HeadManifest
from specdec.targets import Target

CPU = Device(kind="cpu", core_ids=(0, 1), native_bf16=False)
CUDA = Device(kind="cuda", core_ids=(0, 1), native_bf16=True)
TARGET = Target(
    name="tiny",
    path=Path("/models/tiny"),
    config={
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 32768,
        "dtype": "bfloat16",
    },
)


def manifest(num_speculative_tokens: int = 3) -> HeadManifest:
    return HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=num_speculative_tokens,
        target_name="tiny",
        target=None,  # type: ignore[arg-type]
        draft_vocab_size=32,
    )


def plan(*extra: str, device: Device = CPU, head: bool = True, dtype: str = "auto", **serve_options) -> ServerPlan:
    return plan_server(
        TARGET,
        ServeConfig(**serve_options),
        TargetConfig(name="tiny", dtype=dtype),
        device,
        Path("/heads/a") if head else None,
        manifest() if head else None,
        list(extra),
        environ={},
    )


def flag(planned: ServerPlan, name: str) -> str:
    assert planned.argv.count(name) == 1, planned.argv
    return planned.argv[planned.argv.index(name) + 1]


def test_a_cpu_plan_prefills_each_prompt_in_one_step_with_room_for_running_requests():
    planned = plan()
    assert planned.argv[:3] == [sys.executable, "-m", launch.ENTRY_MODULE]
    assert flag(planned, "--model") == "/models/tiny"
    assert flag(planned, "--dtype") == planned.dtype == "float32"
    assert "--no-enable-chunked-prefill" in planned.argv
    assert int(flag(planned, "--max-num-batched-tokens")) == launch.CPU_DEFAULT_MODEL_LEN + 16 * 4
    assert planned.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    many = plan(device=Device(kind="cpu", core_ids=tuple(range(8)), native_bf16=True))
    assert many.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-7"
    assert planned.env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    expected = {"method": "eagle3", "model": "/heads/a", "num_speculative_tokens": 3}
    assert json.loads(flag(planned, "--speculative-config")) == expected
    assert (planned.head, planned.num_speculative_tokens, planned.url) == ("eagle3", 3, "http://127.0.0.1:8000")


def test_a_cuda_plan_leaves_dtype_length_and_environment_to_vllm():
    planned = plan(device=CUDA)
    assert "--dtype" not in planned.argv
    assert "--no-enable-chunked-prefill" not in planned.argv
    assert flag(planned, "--max-model-len") == "auto"
    assert (planned.env, planned.dtype) == ({}, "bfloat16")
    assert flag(plan(device=CUDA, dtype="float16"), "--dtype") == "float16"


def test_speculation_off_serves_plain_even_with_a_head():
    for planned in (plan(speculation=False), plan(speculation=False, head=False)):
        assert "--speculative-config" not in planned.argv
        assert (planned.head, planned.num_speculative_tokens) == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": False}, r"--head DIR, or --no-speculation"),
        ({"num_speculative_tokens": 4}, r"4 but head .* trained for 3"),
        ({"num_speculative_tokens": 0}, r"at least 1, got 0"),
        ({"max_model_len": 65536}, r"takes 1 to 32768 tokens"),
        ({"kv_cache_gib": 0}, r"kv_cache_gib=0 holds no request"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_fewer_draft_tokens_than_trained_and_options_of_the_config_reach_the_plan():
    planned = plan(num_speculative_tokens=2, max_model_len=512, max_num_seqs=4, threads_bind="0", enforce_eager=True)
    assert json.loads(flag(planned, "--speculative-config"))["num_speculative_tokens"] == 2
    assert (flag(planned, "--max-model-len"), flag(planned, "--max-num-seqs")) == ("512", "4")
    assert int(flag(planned, "--max-num-batched-tokens")) == 512 + 4 * 3
    assert planned.env["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert "--enforce-eager" in planned.argv


def test_the_length_shrinks_to_what_the_kv_space_holds(monkeypatch):
    monkeypatch.setattr(launch, "_kv_bytes_per_token", lambda target, dtype: 2**20)
    assert flag(plan(), "--max-model-len") == str(2048 - launch.KV_BLOCK_TOKENS)


def test_flags_after_the_dashes_win_in_every_spelling():
    planned = plan(
        "--max_model_len=1k", "--port", "9000", "--host=::", "--served-model-name", "mine", "--dtype", "bfloat16",
        "--max-num-seqs=2", "-sc", '{"method": "ngram", "num_speculative_tokens": 5}',
    )  # fmt: skip
    for name in ("--max-model-len", "--port", "--host", "--speculative-config", "--enforce-eager"):
        assert name not in planned.argv[: planned.argv.index("--max_model_len=1k")]
    assert (planned.url, planned.served_model_name, planned.dtype) == ("http://[::1]:9000", "mine", "bfloat16")
    assert (planned.head, planned.num_speculative_tokens) == ("ngram", 5)
    assert int(flag(planned, "--max-num-batched-tokens")) == 1000 + 2 * 6
    assert "--no-enable-chunked-prefill" not in plan("--enable-chunked-prefill").argv
    with pytest.raises(ValueError, match="one JSON object"):
        plan("--speculative-config.method", "ngram")


def test_several_ranks_leave_the_cores_to_vllm():
    assert plan("-tp", "2").env["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert core_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


def test_a_port_in_use_is_refused_before_anything_starts():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use; stop what listens there or pass --port"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)
    with pytest.raises(ValueError, match="out of range"):
        check_port_free("127.0.0.1", 80)
    with pytest.raises(ValueError, match="not an address of this machine"):
        check_port_free("192.0.2.1", 8000)


def test_serve_asks_for_a_head_before_it_fetches_a_target():
    with pytest.raises(ValueError, match=r"--head DIR, or --no-speculation"):
        serve(RunConfig(target=TargetConfig(name="nobody/has-this")), None, [])


def test_a_policy_brings_its_scheduler_and_what_training_measured():
    assert "--scheduler-cls" not in plan().argv
    chosen = plan(policy="auto")
    assert chosen.argv[chosen.argv.index("--scheduler-cls") + 1] == "serving.scheduler.make_scheduler"
    assert json.loads(chosen.env["SPECDEC_POLICY"])["policy"] == "auto"
    with pytest.raises(ValueError, match="auto, off or fixed:K"):
        plan(policy="sometimes")


def test_a_head_s_own_keys_reach_vllm_and_its_masks_are_given_room():
    head = manifest()
    head.vllm_speculative = {"parallel_drafting": True}
    arguments = (TARGET, ServeConfig(), TargetConfig(name="tiny"), CPU, Path("/heads/a"), head, [])
    planned = plan_server(*arguments, environ={})
    assert json.loads(flag(planned, "--speculative-config"))["parallel_drafting"] is True
    # Beside the verified tokens, 3 drafts and 1 more, a step holds 2 masks.
    assert int(flag(planned, "--max-num-batched-tokens")) == launch.CPU_DEFAULT_MODEL_LEN + 16 * 6


@pytest.mark.parametrize(("method", "keys"), [("medusa", {}), ("eagle3", {"parallel_drafting": True})])
def test_a_head_whose_k_vllm_cannot_change_is_refused_a_policy(method, keys):
    head = manifest()
    head.vllm_method, head.vllm_speculative = method, keys
    serve_config = ServeConfig(policy="auto")
    with pytest.raises(ValueError, match="leave out --policy"):
        plan_server(TARGET, serve_config, TargetConfig(name="tiny"), CPU, Path("/heads/a"), head, [], environ={})
