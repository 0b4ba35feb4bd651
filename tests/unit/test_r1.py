"""The R1-Distill family: its template, token for token, and what it is served with by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.launch import ServerPlan, plan_server
from specdec import r1
from specdec.config import ServeConfig, TargetConfig
from specdec.device import Device
from specdec.manifest import HeadManifest
from specdec.targets import Target
from specdec.traces import ReasoningTrace, prompt_ids, tokenize_trace
from tests.tiny import R1_EARLY_TEMPLATE, R1_LATE_TEMPLATE, R1_SPECIAL, tiny_tokenizer

CPU = Device(kind="cpu", core_ids=(0, 1), native_bf16=False)
CUDA = Device(kind="cuda", core_ids=(0, 1), native_bf16=True)
LATE = tiny_tokenizer(R1_SPECIAL, R1_LATE_TEMPLATE)
EARLY = tiny_tokenizer(R1_SPECIAL, R1_EARLY_TEMPLATE)
CHAT_ML = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


# -- the template


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def served_ids(messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
    return LATE.apply_chat_template(
        messages, chat_template=r1.template(), add_generation_prompt=add_generation_prompt, return_dict=False
    )


def served_text(messages: list[dict]) -> str:
    return LATE.apply_chat_template(messages, chat_template=r1.template(), tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "messages",
    [
        turns("2+2?"),
        turns(" Two\n\nlines, and {{ braces }} \n"),
        turns("2+2?", "<think>\nTwo and two.\n</think>\n\nIt is 4.", "And 3+3?"),
        turns("a", "no thinking", "b", "\n\nparsed by the server", "c"),
        turns("2+2?", "<think>\nhm\n</think>\n\n4"),
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_plain_turns_are_token_for_token_the_published_templates(messages, add_generation_prompt):
    published = LATE.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert served_ids(messages, add_generation_prompt) == published


@pytest.mark.parametrize("tokenizer", [LATE, EARLY], ids=["late revision", "early revision"])
def test_training_sees_the_prompt_that_is_served(tokenizer):
    ids = prompt_ids(tokenizer, "2+2?")
    assert ids == served_ids(turns("2+2?"))
    begin, _, user, assistant, think, _ = tokenizer.convert_tokens_to_ids(R1_SPECIAL)
    question, newline = tokenizer("2+2?")["input_ids"], tokenizer("\n")["input_ids"]
    assert ids == [begin, user, *question, assistant, think, *newline]
    row = tokenize_trace(tokenizer, ReasoningTrace(prompt="2+2?", reasoning="Hm.", response="4"))
    assert row.input_ids[: len(ids)] == ids
    assert tokenizer.decode(row.input_ids).count("<think>") == 1


def test_instructions_go_into_the_next_user_turn():
    system, developer = {"role": "system", "content": " Be brief.\n"}, {"role": "developer", "content": "Say sir."}
    one, answer, two = turns("one", "1", "two")
    start, end = "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n"
    earlier = "<｜Assistant｜>1<｜end▁of▁sentence｜>"
    assert served_text([system, one]) == f"{start}Be brief.\n\none{end}"
    assert served_text([system, developer, one]) == f"{start}Be brief.\n\nSay sir.\n\none{end}"
    assert served_text([one, answer, system, two]) == f"{start}one{earlier}<｜User｜>Be brief.\n\ntwo{end}"
    assert served_text([one, answer, system]) == f"{start}one{earlier}<｜User｜>Be brief.{end}"
    assert served_text([{"role": "system", "content": "  "}, one]) == f"{start}one{end}"


def test_tool_turns_are_refused_with_the_way_out():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    for messages in ([*turns("one"), called], [*turns("one"), {"role": "tool", "content": "1"}]):
        with pytest.raises(Exception, match="--chat-template FILE"):
            served_text(messages)


def test_other_targets_keep_their_own_template():
    assert not r1.has_r1_turns(CHAT_ML) and not r1.has_r1_turns(None)
    other = tiny_tokenizer()
    assert other.decode(prompt_ids(other, "2+2?")) == "<bos><|User|>2+2?<|Assistant|><think>\n"


# -- what is served by default


def r1_target(directory: Path, name: str = "org/DeepSeek-R1-Distill-Qwen-7B", template: str = "", **facts) -> Target:
    if template:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 131072,
    }
    return Target(name=name, path=directory, config=config, **facts)


def plan(target: Target, *extra: str, device: Device = CUDA, head: bool = True, **serve_options) -> ServerPlan:
    manifest = HeadManifest(
        head="eagle3", vllm_method="eagle3", num_speculative_tokens=3, target_name="r1", target=None,  # type: ignore[arg-type]
        draft_vocab_size=32,
    )  # fmt: skip
    serve = ServeConfig(speculation=head, **serve_options)
    head_dir = Path("/heads/r1") if head else None
    return plan_server(
        target, serve, TargetConfig(), device, head_dir, manifest if head else None, list(extra), environ={}
    )


def ours(planned: ServerPlan, flag: str) -> str | None:
    return planned.argv[planned.argv.index(flag) + 1] if flag in planned.argv else None


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    ("name", "template"),
    [
        *[(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}", R1_LATE_TEMPLATE) for size in ("1.5B", "7B", "14B", "32B")],
        *[(f"deepseek-ai/DeepSeek-R1-Distill-Llama-{size}", R1_EARLY_TEMPLATE) for size in ("8B", "70B")],
        ("/models/deepseek_r1_distill_llama", ""),
        ("/models/some-fine-tune", R1_EARLY_TEMPLATE),
    ],
)
def test_the_family_is_told_by_name_or_template_and_gets_its_defaults(tmp_path, name, template, head):
    planned = plan(r1_target(tmp_path, name, template), head=head)
    assert ours(planned, "--reasoning-parser") == "deepseek_r1"
    assert json.loads(ours(planned, "--override-generation-config") or "") == {"temperature": 0.6, "top_p": 0.95}
    assert ours(planned, "--chat-template") == str(r1.TEMPLATE_PATH)
    assert ours(planned, "--max-model-len") == "auto"
    assert json.loads(ours(planned, "--hf-overrides") or "") == {"max_seq_len": 32768}


@pytest.mark.parametrize("name", ["org/Llama-3.1-8B", "/models/r1-distill/smollm2"])
def test_other_targets_get_none_of_it(tmp_path, name):
    planned = plan(r1_target(tmp_path, name, CHAT_ML))
    for flag in ("--reasoning-parser", "--override-generation-config", "--chat-template", "--hf-overrides"):
        assert ours(planned, flag) is None


def test_preset_none_turns_it_off_and_anything_else_is_refused(tmp_path):
    target = r1_target(tmp_path, template=R1_LATE_TEMPLATE)
    assert "--reasoning-parser" not in plan(target, preset="none").argv
    with pytest.raises(ValueError, match="auto or none, got 'r1'"):
        plan(target, preset="r1")


def test_every_default_loses_against_a_flag(tmp_path):
    given = [
        "--reasoning-parser=qwen3", "--chat_template", "mine.jinja", "--override-generation-config.temperature", "1",
        "--hf-overrides", "{}",
    ]  # fmt: skip
    planned = plan(r1_target(tmp_path, template=R1_LATE_TEMPLATE), *given)
    assert planned.argv[-len(given) :] == given
    decided = planned.argv[: -len(given)]
    for flag in ("--reasoning-parser", "--chat-template", "--override-generation-config", "--hf-overrides"):
        assert flag not in decided
    assert ours(plan(r1_target(tmp_path), "--generation-config", "vllm"), "--override-generation-config") is None


def test_the_length_is_the_users_where_one_is_set(tmp_path):
    target = r1_target(tmp_path)
    for planned in (plan(target, max_model_len=65536), plan(target, "--max-model-len", "65536")):
        assert ours(planned, "--max-model-len") == "65536" and "--hf-overrides" not in planned.argv
    on_cpu = plan(target, device=CPU)
    assert ours(on_cpu, "--max-model-len") == "4096" and "--hf-overrides" not in on_cpu.argv


def test_a_targets_own_sampling_and_turns_are_kept(tmp_path):
    planned = plan(r1_target(tmp_path, template=CHAT_ML, sampling={"temperature": 0.3}))
    assert json.loads(ours(planned, "--override-generation-config") or "") == {"temperature": 0.3, "top_p": 0.95}
    assert ours(planned, "--chat-template") is None


def test_a_template_in_its_own_file_is_read_as_well(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(R1_EARLY_TEMPLATE)
    assert r1_target(tmp_path, "/models/own").is_r1_distill
