"""Heads made wrong on purpose, one fault each: the doctor must name it, and must leave a clean head alone."""

from __future__ import annotations

import array
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec import cli
from specdec.config import RunConfig
from specdec.doctor import diagnose, find_head, kind_of
from specdec.doctor.files import HeadFiles
from specdec.doctor.parity import check_parity
from specdec.evaluation.answers import answers_of, write_answers
from specdec.evaluation.records import BlockRun, Measurement, Record, RequestResult
from specdec.manifest import HeadManifest, TargetFingerprint
from specdec.metrics import AcceptanceCounts
from specdec.safetensors_header import ITEM_BYTES
from specdec.targets import Target

H, V, DRAFT = 8, 2000, 300
TARGET = {"hidden_size": H, "vocab_size": V, "num_hidden_layers": 12, "rope_theta": 10000.0}
LAYER = {
    "self_attn.q_proj.weight": (H, 2 * H), "self_attn.k_proj.weight": (H, 2 * H), "self_attn.v_proj.weight": (H, 2 * H),
    "self_attn.o_proj.weight": (H, H), "mlp.gate_proj.weight": (H, H), "mlp.up_proj.weight": (H, H),
    "mlp.down_proj.weight": (H, H), "post_attention_layernorm.weight": (H,),
}  # fmt: skip
KEPT = [*range(200), *range(500, 600)]  # the drafted target ids


def write(
    directory: Path, config: dict, shapes: dict[str, tuple], integers: dict[str, list[int]] | None = None
) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    values = {name: array.array("q", numbers).tobytes() for name, numbers in (integers or {}).items()}
    header, body = {}, b""
    for name, shape in shapes.items():
        dtype = "I64" if name in values else "BOOL" if name == "t2d" else "BF16"
        data = values.get(name) or bytes(math.prod(shape) * ITEM_BYTES[dtype])
        if name == "t2d":
            data = bytes(i in KEPT for i in range(shape[0]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    return directory


def eagle3() -> tuple[dict, dict, dict]:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": H, "target_hidden_size": H, "vocab_size": V,
        "draft_vocab_size": DRAFT, "eagle_aux_hidden_state_layer_ids": [2, 6, 9], "norm_before_residual": False,
        "norm_before_fc": False, "fc_norm": False, "norm_output": False, "rope_theta": 10000.0,
    }  # fmt: skip
    shapes = {
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (DRAFT, H), "d2t": (DRAFT,),
        **{f"layers.0.{name}": shape for name, shape in LAYER.items()},
        "layers.0.input_layernorm.weight": (H,), "layers.0.hidden_norm.weight": (H,),
    }  # fmt: skip
    return config, shapes, {"d2t": [token - i for i, token in enumerate(KEPT)]}


def eagle1() -> tuple[dict, dict, dict]:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": H, "vocab_size": V, "rope_theta": 10000.0}
    return config, {"fc.weight": (H, 2 * H), **{f"layers.0.{name}": shape for name, shape in LAYER.items()}}, {}


def medusa() -> tuple[dict, dict, dict]:
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": H,
        "vocab_size": V,
        "num_heads": 2,
    }
    shapes = {f"blocks.{i}.layers.0.weight": (H, H) for i in range(2)}
    return config, shapes | {f"lm_heads.{i}.weight": (V, H) for i in range(2)}, {}


def codes(directory: Path, target: dict | None = None) -> set[str]:
    return {finding.code for finding in diagnose(directory, Target(name="t", path=directory, config=target or TARGET))}


@pytest.mark.parametrize(("make", "kind"), [(eagle3, "eagle3"), (eagle1, "eagle"), (medusa, "medusa")])
def test_a_clean_head_is_clean_and_its_kind_is_known(tmp_path, make, kind):
    head = write(tmp_path / "head", *make())
    assert kind_of(HeadFiles.read(head)) == kind
    assert codes(head) == set()


def pickled(head: Path, name: str = "pytorch_model.bin", **options) -> Path:
    """The same weights as ``torch.save`` writes them."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(head / "model.safetensors"), head / name, **options)
    (head / "model.safetensors").unlink()
    return head


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt"])
def test_published_heads_in_pytorch_s_own_format_are_read_too(tmp_path, name, options):
    for number, make in enumerate((eagle3, eagle1, medusa)):
        head = write(tmp_path / str(number), *make())
        from_safetensors = HeadFiles.read(head).tensors
        assert HeadFiles.read(pickled(head, name, **options)).tensors == from_safetensors
        (head / "optimizer.bin").write_bytes(b"of a training run")
        assert codes(head) == set()
    config, shapes, integers = eagle3()
    integers["d2t"] = KEPT  # target ids instead of offsets
    assert codes(pickled(write(tmp_path / "wrong", config, shapes, integers), name)) == {"d2t-absolute"}


def test_a_head_may_be_named_as_on_the_hub(tmp_path, monkeypatch):
    head = write(tmp_path / "snapshot", *eagle3())
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, "*.bin" in allow_patterns))
        return str(head)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_head("org/some-eagle3") == head and asked == [("org/some-eagle3", True)]
    monkeypatch.chdir(tmp_path)
    for path in ("snapshot", "./not/there", str(head)):
        assert find_head(path) == Path(path)
    assert len(asked) == 1

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"head org/other is not a directory here and could not be fetched"):
        find_head("org/other")


class Intruder:
    def __reduce__(self):
        return Path.touch, (Path("intruded"),)


def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    head = write(tmp_path / "head", *eagle3())
    (head / "model.safetensors").unlink()
    for content in ({"fc.weight": Intruder()}, ["no", "weights"]):
        torch.save(content, head / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin holds no weights that can be read"):
            codes(head)
    assert not Path("intruded").exists()


def drop(key):
    return lambda config, shapes, integers: (config.pop(key, None), shapes.pop(key, None))


def put(key, value):
    return lambda config, shapes, integers: config.__setitem__(key, value)


def add(name, shape):
    return lambda config, shapes, integers: shapes.__setitem__(name, shape)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (drop("eagle_aux_hidden_state_layer_ids"), "aux-layers-default"),
        (put("eagle_aux_hidden_state_layer_ids", [9, 6, 2]), "aux-layers-order"),
        (put("eagle_aux_hidden_state_layer_ids", [2, 6, 13]), "aux-layers-range"),
        (put("eagle_aux_hidden_state_layer_ids", [2, 6]), "fc-shape"),
        (put("eagle_aux_hidden_state_layer_ids", [2, 6]), "num-aux"),
        (drop("norm_before_residual"), "norm-before-residual"),
        (add("input_norm.weight", (3 * H,)), "norm-dropped"),
        (put("fc_norm", True), "norm-missing"),
        (drop("norm.weight"), "norm-missing"),
        (drop("d2t"), "d2t-missing"),
        (lambda c, s, i: i.__setitem__("d2t", list(KEPT)), "d2t-absolute"),
        (lambda c, s, i: i.__setitem__("d2t", [-k for k in range(DRAFT)]), "d2t-values"),
        (add("fc.bias", (H,)), "bias-dropped"),
        (add("layers.0.self_attn.q_proj.bias", (H,)), "bias-dropped"),
        (drop("lm_head.weight"), "lm-head-missing"),
        (put("draft_vocab_size", 299), "draft-vocab-size"),
        (put("vocab_size", V - 64), "vocab-size"),
        (put("target_hidden_size", 2 * H), "hidden-size"),
        (put("rope_theta", 500000.0), "rope"),
        (drop("layers.0.mlp.up_proj.weight"), "tensor-missing"),
    ],
)
def test_each_silent_mismatch_of_an_eagle3_head_is_found(tmp_path, fault, code):
    config, shapes, integers = eagle3()
    fault(config, shapes, integers)
    assert code in codes(write(tmp_path / "head", config, shapes, integers))


def test_t2d_settles_what_d2t_means(tmp_path):
    config, shapes, integers = eagle3()
    assert codes(write(tmp_path / "right", config, {**shapes, "t2d": (V,)}, integers)) == set()
    assert codes(write(tmp_path / "wrong", config, {**shapes, "t2d": (V,)}, {"d2t": list(KEPT)})) == {"d2t-absolute"}


def test_llama3_rope_of_the_target_must_be_in_the_head(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    head = write(tmp_path / "head", *eagle3())
    assert codes(head, {**TARGET, "rope_parameters": scaled}) == {"rope"}
    config, shapes, integers = eagle3()
    config |= {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8}}
    assert codes(write(tmp_path / "other", config, shapes, integers), {**TARGET, "rope_parameters": scaled}) == set()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (add("lm_head.weight", (V, H)), "unexpected-tensor"),
        (add("fc.bias", (H,)), "bias-dropped"),
        (add("fc.weight", (H, H)), "fc-shape"),
        (drop("layers.0.self_attn.o_proj.weight"), "tensor-missing"),
    ],
)
def test_each_silent_mismatch_of_an_eagle1_head_is_found(tmp_path, fault, code):
    config, shapes, integers = eagle1()
    fault(config, shapes, integers)
    assert code in codes(write(tmp_path / "head", config, shapes, integers))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (put("num_attention_heads", 4), "medusa-key"),
        (add("blocks.0.layers.0.bias", (H,)), "bias-dropped"),
        (put("num_heads", 4), "medusa-heads"),
        (lambda c, s, i: [s.pop(f"lm_heads.{k}.weight") for k in range(2)], "lm-head-missing"),
        (put("truncated_vocab_size", 100), "medusa-truncated"),
        (put("vocab_size", V + 1), "vocab-size"),
        (put("hidden_size", H + 1), "hidden-size"),
    ],
)
def test_each_silent_mismatch_of_a_medusa_head_is_found(tmp_path, fault, code):
    config, shapes, integers = medusa()
    fault(config, shapes, integers)
    assert code in codes(write(tmp_path / "head", config, shapes, integers))


@pytest.mark.parametrize("ids", [[0, 5, V], [-1, 5, 7], [5, 5, 7], [5, 7]])
def test_a_token_map_that_would_end_the_engine_is_found(tmp_path, ids):
    config, shapes, _ = medusa()
    del shapes["lm_heads.0.weight"], shapes["lm_heads.1.weight"]
    config |= {"truncated_vocab_size": 3, "original_lm_head": True}
    shapes |= {"lm_head.weight": (3, H), "token_map": (3,)}
    assert codes(write(tmp_path / "head", config, shapes, {"token_map": [0, 5, V - 1]})) == set()
    shapes["token_map"] = (len(ids),)
    assert codes(write(tmp_path / "head", config, shapes, {"token_map": ids})) == {"token-map"}


def test_truncated_and_foreign_files_are_refused(tmp_path):
    head = write(tmp_path / "head", *eagle3())
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        codes(head)
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        codes(head)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no weights"):
        codes(head)
    other = write(tmp_path / "other", {"architectures": ["LlamaForCausalLM"]}, {"x.weight": (2, 2)})
    with pytest.raises(ValueError, match="no EAGLE or Medusa head"):
        codes(other)


@pytest.mark.parametrize(
    "key", ["architectures", "eagle_aux_hidden_state_layer_ids", "rope_scaling", "rope_parameters"]
)
def test_a_config_that_holds_nonsense_is_one_line(tmp_path, key):
    config, shapes, integers = eagle3()
    head = write(tmp_path / "head", {**config, key: 7}, shapes, integers)
    try:
        assert codes(head)
    except ValueError as error:
        assert "can't be judged" in str(error)


@pytest.mark.parametrize(("served", "is_found"), [(2.04, False), (2.1, True), (1.9, True)])
def test_parity_measures_the_head_on_the_very_answers_that_were_served(tmp_path, monkeypatch, served, is_found):
    head = own_head(tmp_path / "head")
    asked = []

    def evaluate(config, head_dir, out):
        asked.append(config)
        record = Record(arm="spec", cell="greedy", suite="s", item_id="0")
        record.result = RequestResult(prompt_token_ids=[1, 2], token_ids=[3, 4, 5])
        plain, failed = replace(record, arm="plain"), replace(record, result=RequestResult(error="timeout"))
        run = BlockRun(
            arm="x", cell="greedy", suite="s", repeat=0, block=0, busy_sec=1.0, records=[plain, record, failed]
        )
        measured = Measurement(cells=[], baseline="plain", arms=["plain", "spec"], runs=[run])
        write_answers(answers_of(measured), out / "answers.jsonl")
        return {"summary": {"acceptance_length": served}, "notes": []}

    def measure(config, head_dir, answers):
        assert (head_dir, answers) == (head, [([1, 2], [3, 4, 5])])
        return AcceptanceCounts(num_drafts=10, num_draft_tokens=30, num_accepted_tokens=10)

    monkeypatch.setattr("specdec.evaluation.run.evaluate", evaluate)
    config = RunConfig()
    config.serve.num_speculative_tokens = 1
    findings = check_parity(config, head, None, measure)
    assert [finding.code for finding in findings] == ["parity"] * is_found
    assert asked[0].eval.suites == ["reasoning-gym"] and asked[0].serve.num_speculative_tokens is None
    assert asked[0].eval.greedy and not asked[0].eval.sampled
    check_parity(config, head, tmp_path / "mine.jsonl", measure)
    assert asked[1].eval.suites == [str(tmp_path / "mine.jsonl")]


def test_parity_of_a_head_that_training_did_not_make_is_refused_before_it_is_served(tmp_path):
    head = own_head(tmp_path / "head", trained_by="somebody")
    with pytest.raises(ValueError, match="was not made by `specdec train`"):
        check_parity(RunConfig(), head, None, lambda *_: AcceptanceCounts())


def own_head(directory: Path, **provenance: Any) -> Path:
    HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=3,
        target_name="t",
        target=TargetFingerprint(
            architecture="LlamaForCausalLM", hidden_size=H, num_hidden_layers=12, vocab_size=V, weights_sha256="0",
            chat_template_sha256="0",
        ),
        draft_vocab_size=1,
        provenance=provenance or {"config": {}},
    ).save(write(directory, *eagle3()))  # fmt: skip
    return directory


def test_the_command_s_exit_codes(tmp_path, monkeypatch):
    clean = write(tmp_path / "clean", *eagle3())
    config, shapes, integers = eagle3()
    del config["norm_before_residual"]
    wrong = write(tmp_path / "wrong", config, shapes, integers)
    monkeypatch.setattr("specdec.targets.resolve_target", lambda _: Target(name="t", path=clean, config=TARGET))
    runner = CliRunner()
    done = runner.invoke(cli.app, ["doctor", str(clean)])
    assert done.exit_code == 0 and "nothing found" in done.output
    done = runner.invoke(cli.app, ["doctor", str(wrong), "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and [finding["code"] for finding in report["findings"]] == ["norm-before-residual"]
    with pytest.raises(ValueError, match="does not exist"):
        runner.invoke(cli.app, ["doctor", str(tmp_path / "nowhere")], catch_exceptions=False)
    with pytest.raises(ValueError, match="not a head exported by `specdec train`"):
        runner.invoke(cli.app, ["doctor", str(clean), "--parity"], catch_exceptions=False)
