"""Arms as typed, and the processes that serve them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from serving.sockets import free_port
from specdec.config import RunConfig, ServeConfig, load_config
from specdec.device import Device
from specdec.evaluation import arms
from specdec.evaluation.arm_specs import ArmSpec, default_specs, parse_specs, serve_arguments
from specdec.manifest import HeadManifest, TargetFingerprint


@pytest.fixture
def head(tmp_path):
    fingerprint = TargetFingerprint(
        architecture="LlamaForCausalLM", hidden_size=1, num_hidden_layers=1, vocab_size=1,
        weights_sha256="w", chat_template_sha256="c",
    )  # fmt: skip
    HeadManifest(
        head="eagle3", vllm_method="eagle3", num_speculative_tokens=3, target_name="t", target=fingerprint,
        draft_vocab_size=8,
    ).save(tmp_path / "head")  # fmt: skip
    return tmp_path / "head"


def test_arms_as_typed(head):
    texts = ["a=http://h:1/v1", "b=plain", "c=k=2", "d=method=ngram,k=4,serve.max_num_seqs=2", "e=head=other"]
    specs = parse_specs(texts, head)
    assert [spec.name for spec in specs] == list("abcde")
    assert specs[0].url == "http://h:1/v1" and specs[1].is_plain
    assert specs[2].options == {"k": "2", "head": str(head)}
    assert specs[3].options["method"] == "ngram" and "head" not in specs[3].options
    served, started = parse_specs(["a=http://h:1,xargs.specdec=2", "b=head=other,xargs.specdec=off"], None)
    assert (served.url, served.xargs, started.xargs) == ("http://h:1", {"specdec": "2"}, {"specdec": "off"})
    assert "xargs" not in " ".join(serve_arguments(ArmSpec(name="b", options={"xargs.specdec": "off"})))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=plain"], "two or more"),
        (["a=plain", "a=method=ngram"], "one name"),
        (["a=plain", "plain"], "an arm is"),
        (["a=plain", "b=nonsense=1"], "can't read 'nonsense=1'"),
        (["a=plain", "b=method=eagle"], "ngram or suffix"),
        (["a=plain", "b=k=2"], "needs a head"),
        (["a=plain", "b=http://h:1,k=2"], "can't read 'k=2'"),
        (["a=plain", "b=head=h,table=1:3"], "1-4:3"),
        (["a=plain", "b=head=h,synthetic=many"], "number above 0"),
        (["a=head=h,synthetic=2", "b=plain"], "give the baseline first"),
    ],
)
def test_arms_that_make_no_sense(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_specs(texts, None)


@pytest.mark.parametrize(("asked", "width"), [({}, 3), ({"specdec": "off"}, 0), ({"specdec": "2"}, 2)])
def test_an_arm_drafts_no_more_than_its_requests_ask_for(asked, width):
    arm = arms.Arm(name="a", url="http://h:1", model="m", xargs=asked)
    assert (arm.asked_width(3), arm.asked_width(0)) == (width, 0)


def test_nothing_to_compare_without_head_or_arms():
    with pytest.raises(ValueError, match="give --head DIR"):
        default_specs(None)


def speculative(arguments: list[str]) -> dict:
    return json.loads(arguments[arguments.index("--speculative-config") + 1])


def test_each_arm_asks_for_its_own_server(head):
    plain = serve_arguments(ArmSpec(name="p"))
    assert plain[0] == "--no-speculation"
    assert "--" not in plain  # vLLM refuses flags of speculation on a plain server
    narrow = serve_arguments(ArmSpec(name="n", options={"head": str(head), "k": "2"}))
    assert narrow[:2] == ["--head", str(head)] and "serve.num_speculative_tokens=2" in narrow
    ngram = serve_arguments(ArmSpec(name="g", options={"method": "ngram", "k": "4"}))
    assert ngram[0] == "--no-speculation" and speculative(ngram)["num_speculative_tokens"] == 4
    table = speculative(serve_arguments(ArmSpec(name="t", options={"head": str(head), "table": "1-4:3/5-16:0"})))
    assert table["num_speculative_tokens_per_batch_size"] == [[1, 4, 3], [5, 16, 0]]
    assert table.items() >= HeadManifest.load(head).speculative_config(head, 3).items()
    pretended = ArmSpec(name="s", options={"head": str(head), "synthetic": "2.5"})
    assert pretended.is_synthetic
    assert speculative(serve_arguments(pretended))["synthetic_acceptance_length"] == 2.5
    own = serve_arguments(
        ArmSpec(name="o", options={"vllm.max-num-seqs": "8", "vllm.trust-it": "true", "quantization": "fp8"})
    )
    assert "--trust-it" in own
    assert "--max-num-seqs=8" in own[own.index("--") :] and own[-2] != "--" and "fp8" in own


def settings(arguments: list[str]) -> ServeConfig:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return load_config(None, [own[i + 1] for i, word in enumerate(own) if word == "--set"]).serve


def test_a_measured_server_neither_degrades_nor_restarts_whatever_the_arm_says(head):
    options = {"head": str(head), "serve.require_head": "false", "serve.max_restarts": "3", "serve.max_num_seqs": "2"}
    for spec in (ArmSpec(name="plain"), ArmSpec(name="spec", options=options)):
        chosen = settings(serve_arguments(spec))
        assert (chosen.require_head, chosen.max_restarts, chosen.drain_sec) == (True, 0, 0)
        assert chosen.policy == "static"
    assert chosen.max_num_seqs == 2
    ruled = ArmSpec(name="auto", options={"head": str(head), "serve.policy": "auto"})
    assert settings(serve_arguments(ruled)).policy == "auto"


STAND_IN = """
import json, os, signal, sys, time
settings = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--set"]
port = [setting for setting in settings if setting.startswith("serve.port=")][-1].removeprefix("serve.port=")
spec = "--head" in sys.argv
target = sys.argv[sys.argv.index("--target") + 1]
print("a line that is no message", flush=True)
if {fails} and spec:
    sys.exit("head does not fit")
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", file=sys.stderr, flush=True), sys.exit(0)))
print(json.dumps({{"ready": True, "url": f"http://127.0.0.1:{{port}}/{{os.getpid()}}", "model": target,
                   "num_speculative_tokens": {k} if spec else 0}}), flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(monkeypatch, tmp_path, head):
    """``open_arms`` with a script in the place of ``specdec serve``."""

    def open_stand_ins(fails=False, k=3, specs=None):
        script = tmp_path / "serve.py"
        script.write_text(STAND_IN.format(fails=fails, k=k))
        popen = subprocess.Popen
        monkeypatch.setattr(
            arms.subprocess, "Popen", lambda command, **kw: popen([sys.executable, str(script), *command[3:]], **kw)
        )
        return arms.open_arms(specs or default_specs(head), RunConfig(), tmp_path / "out")

    return open_stand_ins


def test_started_arms_are_ready_and_stopped(start, tmp_path):
    with start() as started:
        assert list(started) == ["plain", "spec"]
        assert started["plain"].num_speculative_tokens == 0 and started["spec"].num_speculative_tokens == 3
        assert started["plain"].url != started["spec"].url
        assert all(":0/" in arm.url for arm in started.values())  # each server finds a port of its own
    assert "stopped" in (tmp_path / "out" / "plain-server.log").read_text()
    assert "stopped" in (tmp_path / "out" / "spec-server.log").read_text()


def test_an_arm_may_serve_another_target(start):
    specs = [
        ArmSpec(name="plain"),
        ArmSpec(name="int8", options={"target.name": "quantised", "target.dtype": "float32"}),
    ]
    with start(specs=specs) as started:
        assert [arm.model for arm in started.values()] == [RunConfig().target.name, "quantised"]
    own = serve_arguments(specs[1])
    assert "target.dtype=float32" in own and not any("quantised" in word for word in own)


def test_an_arm_may_name_its_port(start):
    with start(specs=[ArmSpec(name="plain", options={"serve.port": "8123"})]) as started:
        assert ":8123/" in started["plain"].url


def test_no_more_servers_start_at_once_than_there_are_cores(start, tmp_path, monkeypatch, head):
    monkeypatch.setattr(arms, "detect_device", lambda: Device(kind="cpu", core_ids=(0, 1), native_bf16=False))
    awaited = []
    wait = arms._await_ready
    monkeypatch.setattr(arms, "_await_ready", lambda servers, end: awaited.append(len(servers)) or wait(servers, end))
    monkeypatch.setattr(arms, "open_arms", lambda *args: args)
    specs = parse_specs([f"s{i}=k={i + 1}" for i in range(5)], head)
    _, config, out = start()
    servers: list = []
    try:
        assert len(arms._start(specs, config, out, servers)) == 5
    finally:
        arms._stop(servers)
    assert awaited == [2, 4, 5]


def test_a_server_that_ends_early_shows_its_log(start):
    with (
        pytest.raises(ValueError, match=r"spec server ended with status 1 [\s\S]*head does not fit"),
        start(fails=True),
    ):
        pass


def test_a_spec_server_without_speculation_is_refused(start):
    with pytest.raises(ValueError, match="came up without speculation"), start(k=0):
        pass


def test_a_given_server_that_does_not_answer_is_named(tmp_path):
    specs = [
        ArmSpec(name="mine", url=f"http://127.0.0.1:{free_port('127.0.0.1')}"),
        ArmSpec(name="b", url="http://x:1"),
    ]
    with (
        pytest.raises(ValueError, match=r"the mine server .* does not answer"),
        arms.open_arms(specs, RunConfig(), tmp_path),
    ):
        pass
