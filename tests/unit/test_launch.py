"""The server's plan for each device, and what is refused before anything starts."""

from __future__ import annotations

import json
import socket
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from serving import launch, sockets
from serving.flags import ServerFlags
from serving.launch import ServerPlan, plan_server
from serving.serve import serve
from serving.sockets import check_port_free, free_port
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


def plan(
    *extra: str, device: Device = CPU, head: bool = True, dtype: str = "auto", environ: dict | None = None,
    **serve_options,
) -> ServerPlan:  # fmt: skip
    return plan_server(
        TARGET,
        ServeConfig(**serve_options),
        TargetConfig(name="tiny", dtype=dtype),
        device,
        Path("/heads/a") if head else None,
        manifest() if head else None,
        list(extra),
        environ=environ or {},
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
    assert int(flag(planned, "--kv-cache-memory-bytes")) == 2 * 2**30
    assert int(flag(plan(kv_cache_gib=0.5), "--kv-cache-memory-bytes")) == 2**29
    assert "VLLM_CPU_KVCACHE_SPACE" not in planned.env
    inherited = plan(environ={"VLLM_CPU_KVCACHE_SPACE": "4"}).env["VLLM_CPU_KVCACHE_SPACE"]
    assert inherited == "", "vLLM takes whole GiB from it, whatever the flag says: it must go"
    expected = manifest().speculative_config(Path("/heads/a"), 3)
    assert json.loads(flag(planned, "--speculative-config")) == expected
    assert flag(planned, "--per-request-spec-decode-metrics") == "summary"
    assert (planned.head, planned.num_speculative_tokens, planned.url) == ("eagle3", 3, "http://127.0.0.1:8000")


def test_a_cuda_plan_leaves_dtype_length_and_environment_to_vllm():
    planned = plan(device=CUDA)
    assert "--dtype" not in planned.argv
    assert "--no-enable-chunked-prefill" not in planned.argv
    assert flag(planned, "--max-model-len") == "auto"
    assert (set(planned.env), planned.dtype) == ({"VLLM_PLUGINS"}, "bfloat16")
    assert flag(plan(device=CUDA, dtype="float16"), "--dtype") == "float16"


def test_speculation_off_serves_plain_even_with_a_head():
    for planned in (plan(speculation=False), plan(speculation=False, head=False)):
        assert "--speculative-config" not in planned.argv
        assert "--per-request-spec-decode-metrics" not in planned.argv, "vLLM refuses it on a plain server"
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


TABLE = "num_speculative_tokens_per_batch_size"
PASSED_ON = {
    "tensor parallelism": ["--tensor-parallel-size", "2"],
    "fp8 weights": ["--quantization", "fp8"],
    "AWQ weights": ["-q=awq_marlin"],
    "GPTQ weights": ["--quantization=gptq_marlin"],
    "prefix caching": ["--enable-prefix-caching"],
    "no prefix caching": ["--no-enable-prefix-caching"],
    "chunked prefill": ["--enable-chunked-prefill", "--max-num-batched-tokens", "8192"],
    "no chunked prefill": ["--no-enable-chunked-prefill"],
    "prefill and decode apart": ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
}
COMPATIBLE = ("tensor parallelism", "fp8 weights", "no prefix caching", "chunked prefill", "prefill and decode apart")
TOGETHER = [arg for name in COMPATIBLE for arg in PASSED_ON[name]]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("given", [*PASSED_ON.values(), TOGETHER], ids=[*PASSED_ON, "together"])
def test_vllms_own_features_pass_untouched_beside_a_head(given, device):
    planned = plan(*given, device=device, policy="auto")
    assert planned.argv[-len(given) :] == given
    ours = ServerFlags(planned.argv[3 : -len(given)])
    assert [arg for arg in given if arg.startswith("-") and arg in ours] == [], "nothing of ours contradicts"
    given_to_vllm = json.loads(ours.get("--speculative-config") or "")
    assert (given_to_vllm.pop(TABLE, None) is not None) == (device is CUDA), "graphs of every K"
    assert given_to_vllm == manifest().speculative_config(Path("/heads/a"), 3) and "--scheduler-cls" in ours
    assert planned.warnings == ()


def test_a_gpu_has_graphs_of_every_k_that_a_policy_may_choose_and_static_only_its_own():
    named = json.loads(flag(plan("--max-num-seqs=8", device=CUDA, policy="auto"), "--speculative-config"))[TABLE]
    assert named == [[1, 5, 3], [6, 6, 2], [7, 7, 1], [8, 8, 0]]
    for planned in (plan(device=CUDA), plan(device=CUDA, policy="static"), plan(policy="auto")):
        assert TABLE not in json.loads(flag(planned, "--speculative-config"))


def test_a_quantised_kv_cache_passes_with_a_warning():
    for given in (["--kv-cache-dtype", "fp8"], ["--kv_cache_dtype=fp8_e5m2"]):
        planned = plan(*given, device=CUDA)
        (warning,) = planned.warnings
        assert planned.argv[-len(given) :] == given
        assert "fp8" in warning and "accuracy" in warning
    assert plan("--kv-cache-dtype=bfloat16").warnings == plan("--kv-cache-dtype", "auto").warnings == ()


def test_the_server_is_local_and_one_that_anybody_may_use_is_warned_about(tmp_path):
    assert flag(plan(), "--host") == "127.0.0.1"
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    for host in ("127.0.0.1", "localhost", "::1"):
        assert plan(host=host).warnings == ()
    for planned in (plan(host="0.0.0.0"), plan("--host", "::"), plan(host="192.0.2.7"), plan("--host=box.example")):
        (warning,) = planned.warnings
        assert "without an API key" in warning
    assert plan("--api-key", "s3cret", host="0.0.0.0").warnings == ()
    assert plan(host="0.0.0.0", api_key_file=str(key)).warnings == ()
    assert plan(host="0.0.0.0", environ={"VLLM_API_KEY": "s3cret"}).warnings == ()


def test_a_key_from_a_file_reaches_vllm_and_is_never_shown(tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    planned = plan(api_key_file=str(key))
    assert planned.env["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in repr(planned)
    assert "VLLM_API_KEY" not in plan("--api-key", "other", api_key_file=str(key)).env
    key.write_text(" \n")
    for bad, words in ((key, "is empty"), (tmp_path / "none", "cannot read")):
        with pytest.raises(ValueError, match=words):
            plan(api_key_file=str(bad))


def test_serve_says_what_the_plan_warns_about(monkeypatch, caplog):
    monkeypatch.setattr("serving.serve.resolve_target", lambda config: TARGET)
    monkeypatch.setattr("serving.serve.supervise", lambda *arguments: 0)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    config = RunConfig(serve=ServeConfig(host="0.0.0.0", port=8000, speculation=False))
    assert serve(config, None, ["--kv-cache-dtype", "fp8"]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "without an API key" in caplog.text and "KV cache" in caplog.text
    caplog.clear()
    assert serve(config, None, ["--api-key", "s3cret"]) == 0 and caplog.records == []


def test_flags_of_speculation_can_be_taken_out_in_every_spelling():
    given = ["-sc", '{"method": "ngram"}', "--seed=-1", "--speculative_config.num_speculative_tokens", "2", "--a", "-2"]
    assert ServerFlags(given).without("--speculative-config") == ["--seed=-1", "--a", "-2"]
    assert ServerFlags(["--no-x", "--y", "1", "--x=2"]).without("--x") == ["--y", "1"]
    assert ServerFlags(given).without("--b") == given


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


def test_a_free_port_is_none_that_a_connection_may_take(tmp_path, monkeypatch):
    port = free_port("127.0.0.1")
    table = tmp_path / "range"
    table.write_text(f"{port + 1}\t60999\n")
    monkeypatch.setattr(sockets, "LOWEST_PORT", port)
    monkeypatch.setattr(sockets, "EPHEMERAL_RANGE", table)
    assert free_port("127.0.0.1") == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert free_port("127.0.0.1") != port  # no other is left below: the system's choice
    monkeypatch.setattr(sockets, "EPHEMERAL_RANGE", tmp_path / "nowhere")
    assert 1024 <= free_port("127.0.0.1") <= 65535
    with pytest.raises(ValueError, match="not an address of this machine"):
        free_port("192.0.2.1")


def test_serve_asks_for_a_head_before_it_fetches_a_target():
    with pytest.raises(ValueError, match=r"--head DIR, or --no-speculation"):
        serve(RunConfig(target=TargetConfig(name="nobody/has-this")), None, [])


def test_our_endpoints_load_and_no_plugin_is_lost():
    everything = plan().env["VLLM_PLUGINS"].split(",")
    assert "specdec" in everything and len(set(everything)) == len(everything)
    general = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert general <= set(everything)
    assert plan(environ={"VLLM_PLUGINS": "theirs"}).env["VLLM_PLUGINS"] == "theirs,specdec"
    assert plan(environ={"VLLM_PLUGINS": ""}).env["VLLM_PLUGINS"] == "specdec"


def test_a_policy_brings_its_scheduler_and_what_training_measured():
    for chosen in (plan(), plan(policy="auto", device=CUDA)):
        assert flag(chosen, "--scheduler-cls") == "serving.scheduler.make_scheduler"
        assert json.loads(chosen.env["SPECDEC_POLICY"])["policy"] == "auto"
    assert "--scheduler-cls" not in plan(device=CUDA).argv
    with pytest.raises(ValueError, match="auto, off or fixed:K"):
        plan(policy="sometimes")
    with pytest.raises(ValueError, match="policy fixed:9 asks for more draft tokens than the 3 that are served"):
        plan(policy="fixed:9")


def test_nobody_else_s_choice_of_k_is_taken_over():
    table = '{"method": "ngram", "num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 4, 3]]}'
    for given in (["--speculative-config", table], ["--data-parallel-size=2"], ["--scheduler-cls", "theirs"]):
        planned = plan(*given)
        assert "SPECDEC_POLICY" not in planned.env and "serving.scheduler.make_scheduler" not in planned.argv
    assert "serving.scheduler.make_scheduler" in plan().argv
    assert "serving.scheduler.make_scheduler" not in plan(policy="static").argv


def test_traffic_is_kept_only_when_asked_and_where_it_can_be(tmp_path):
    assert json.loads(plan(policy="auto").env["SPECDEC_POLICY"])["traffic"] is None
    kept = json.loads(plan(policy="auto", keep_traffic=str(tmp_path / "rows")).env["SPECDEC_POLICY"])["traffic"]
    assert kept == {"directory": str(tmp_path / "rows"), "share": 0.1, "max_bytes": 2**30}
    with pytest.raises(ValueError, match="--policy auto"):
        plan(policy="static", keep_traffic=str(tmp_path))
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan(policy="auto", keep_traffic=str(tmp_path), keep_share=2.0)


def test_a_head_s_own_keys_reach_vllm_and_its_masks_are_given_room():
    head = manifest()
    head.vllm_speculative = {"parallel_drafting": True}
    arguments = (TARGET, ServeConfig(), TargetConfig(name="tiny"), CPU, Path("/heads/a"), head, [])
    planned = plan_server(*arguments, environ={})
    assert json.loads(flag(planned, "--speculative-config"))["parallel_drafting"] is True
    # Beside the verified tokens, 3 drafts and 1 more, a step holds 2 masks.
    assert int(flag(planned, "--max-num-batched-tokens")) == launch.CPU_DEFAULT_MODEL_LEN + 16 * 6


def test_servers_share_what_they_learn_of_step_times_if_their_steps_are_alike():
    def times(*extra: str, **options) -> str:
        return json.loads(plan(*extra, policy="auto", **options).env["SPECDEC_POLICY"])["times"]

    assert times() == times(port=9999, max_num_seqs=2)
    others = [times(num_speculative_tokens=2), times(dtype="float16"), times("--block-size", "64")]
    assert len({times(), *others}) == 4
