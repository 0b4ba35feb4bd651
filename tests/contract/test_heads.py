"""The contract of every folder in draft_training/heads: a new one is covered the moment it exists."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from draft_training.exported import acceptance_on, open_head
from draft_training.features import FeatureStore
from draft_training.heads import list_heads, load_head
from draft_training.padding import padded_length
from draft_training.recipe import Objective
from draft_training.recompute import recompute_activations
from draft_training.reference import greedy_decode, speculative_decode
from draft_training.selection import accepted_prefix, held_out_acceptance, walk
from draft_training.target_model import TargetModel
from draft_training.windows import anchor_positions
from specdec.config import HeadConfig, RunConfig, TargetConfig
from specdec.device import Device
from specdec.doctor import diagnose
from specdec.manifest import HeadManifest
from specdec.targets import Target, resolve_target
from specdec.traces import TokenRow, prompt_ids, row_from_ids
from tests.tiny import save_tiny_target, tiny_tokenizer

CPU = Device(kind="cpu", core_ids=(0,), native_bf16=False)
K = 3


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def target_files(request, tmp_path_factory) -> Target:
    directory = save_tiny_target(tmp_path_factory.mktemp(request.param), request.param)
    return resolve_target(TargetConfig(name=str(directory)))


@pytest.fixture(scope="module")
def target(target_files) -> TargetModel:
    return TargetModel.load(target_files, "float32", CPU)


@pytest.fixture(scope="module")
def rows(target) -> list[TokenRow]:
    """On-policy greedy rows of different lengths."""
    tokenizer = tiny_tokenizer()
    result = []
    for i, text in enumerate(["2+2?", "Why is the sky blue?", "Count to ten."]):
        prefix = prompt_ids(tokenizer, text)
        result.append(row_from_ids(tokenizer, text, prefix, greedy_decode(target, prefix, 24 + 5 * i)))
    return result


@pytest.fixture(params=list_heads())
def spec(request):
    return load_head(request.param)


def truncates(spec) -> bool:
    """Some heads share the target's output layer, and with it the whole vocabulary."""
    return hasattr(spec.options_cls(), "draft_vocab_size")


def build(spec, target, draft_vocab_size=None, perturb=0.1, seed=1):
    """A head whose zero-initialised parts are shaken, so that every path matters."""
    torch.manual_seed(seed)
    options = spec.options_cls()
    if draft_vocab_size is not None and truncates(spec):
        options.draft_vocab_size = draft_vocab_size
    size = spec.draft_vocab_size(options, target.config.vocab_size, Counter())
    head = spec.build(target, torch.arange(size), options, K)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    return head


def make_store(head, target, rows) -> FeatureStore:
    return FeatureStore(target, rows, head.aux_layer_ids, max_bytes=2**30)


def test_drafts_have_one_id_per_position_and_stay_in_the_draft_vocabulary(spec, target, rows):
    head = build(spec, target, draft_vocab_size=100)
    drafts = head.draft_along(make_store(head, target, rows).batch([0, 1, 2]))
    assert drafts.shape == (3, padded_length(max(row.num_completion_tokens for row in rows) - 1), K)
    assert drafts.max() < head.draft_vocab_size == (100 if truncates(spec) else target.config.vocab_size)


def test_a_later_token_changes_no_earlier_draft(spec, target, rows):
    head = build(spec, target)
    changed = list(rows[0].input_ids)
    position = len(changed) - 6
    changed[position] = (changed[position] + 7) % 200
    other = TokenRow(**{**{f: getattr(rows[0], f) for f in rows[0].__slots__}, "input_ids": changed})
    before = head.draft_along(make_store(head, target, rows[:1]).batch([0]))
    after = head.draft_along(make_store(head, target, [other]).batch([0]))
    for q, anchor in enumerate(anchor_positions(rows[0])):
        for j in range(K):  # position j of anchor t reads tokens up to t + 1 + j
            assert anchor + 1 + j >= position or before[0, q, j] == after[0, q, j]
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(loss="lk_hybrid", position_weights="survival"), Objective(loss="lk_log")]
)
def test_loss_falls_and_the_target_is_untouched(spec, target, rows, objective):
    head = build(spec, target, perturb=0.0)
    store = make_store(head, target, rows)
    frozen = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    optimizer = torch.optim.AdamW(head.parameter_groups(3e-3, 1.0, 0.0))
    batch = store.batch([0, 1, 2])
    losses = []
    for _ in range(25):
        output = head.compute_loss(batch, objective)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]  # soft labels: the entropy of the target is its floor
    assert all(torch.equal(frozen[name], tensor) for name, tensor in target.model.state_dict().items())
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_loss_equals_autograd_on_the_plain_formula(spec, target, rows):
    """Position 0 of the loss, its gradient too, against an unfused cross-entropy over the same anchors."""
    head = build(spec, target)
    batch = make_store(head, target, rows).batch([0, 1, 2])
    head.zero_grad()
    head.compute_loss(batch, Objective(step_decay=0.0)).loss.backward()  # 0 ** 0 = 1: only position 0 weighs
    fused = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    states, weight = next(head.outputs(batch))
    teacher = target.lm_head_weight[head.draft_token_ids]
    terms = []
    for b, row in enumerate(rows):
        for q, t in enumerate(range(row.prompt_span[1] - 1, len(row.input_ids) - 2)):
            probs = (batch.final_hidden_BTH[b, t + 1] @ teacher.T - batch.logsumexp_BT[b, t + 1]).exp()
            terms.append(-(probs * (weight @ states[b, q]).log_softmax(-1)).sum())
    torch.stack(terms).mean().backward()
    for name, parameter in head.named_parameters():
        if parameter.grad is None:  # a part that later positions alone use
            assert name not in fused or not fused[name].any(), name
        else:
            torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def gradients(head, batches, objective) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradient of batches that are parts of one step."""
    head.zero_grad()
    counts = torch.stack([head.count_targets(batch) for batch in batches]).sum(0)
    total = 0.0
    for batch in batches:
        batch.step_counts_2K = counts
        loss = head.compute_loss(batch, objective).loss
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in head.named_parameters()}


def variants_of(spec, target):
    """The head, and with every loss that it has."""
    heads = [build(spec, target, draft_vocab_size=100)]
    if spec.name == "eagle":
        heads.append(build(spec, target))
        heads[-1].feature_loss_weight = 0.5
    return heads


@pytest.mark.parametrize("objective", [Objective(), Objective(loss="lk_hybrid", position_weights="survival")])
def test_the_parts_of_a_step_add_up_to_the_whole_step(spec, target, rows, objective):
    for head in variants_of(spec, target):
        store = make_store(head, target, rows)
        whole_loss, whole = gradients(head, [store.batch([0, 1, 2])], objective)
        nothing = store.batch([1])
        nothing.anchor_mask_BQ.zero_()
        parts_loss, parts = gradients(head, [store.batch([2]), nothing, store.batch([0, 1])], objective)
        assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
        undivided = head.compute_loss(store.batch([0, 1, 2]), objective).loss.detach()
        assert whole_loss == pytest.approx(float(undivided), rel=1e-6)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_activations_give_the_same_gradient_from_less_memory(spec, target, rows):
    head = build(spec, target, draft_vocab_size=100)
    batch = make_store(head, target, rows).batch([0, 1, 2])

    def measured():
        kept = {}  # storage to bytes: views share one

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            head.zero_grad()
            loss = head.compute_loss(batch, Objective()).loss
        num_bytes = sum(kept.values())
        loss.backward()
        return num_bytes, {name: p.grad.clone() for name, p in head.named_parameters()}

    bytes_before, before = measured()
    if not recompute_activations(head):
        pytest.skip("has neither attention nor MLP")
    bytes_after, after = measured()
    assert bytes_after < 0.8 * bytes_before
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_greedy_chain_is_lossless_and_the_walk_counts_what_the_decoder_counts(spec, target, rows):
    head = build(spec, target, perturb=0.02)
    store = make_store(head, target, rows)
    optimizer = torch.optim.AdamW(head.parameter_groups(5e-3, 1.0, 0.0))
    for _ in range(60):  # a head that is right sometimes: otherwise the comparison is empty
        head.compute_loss(store.batch([0, 1, 2]), Objective()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    num_accepted = 0
    for index, row in enumerate(rows):
        prompt_length = row.prompt_span[1]
        decoded = speculative_decode(target, head, row.input_ids[:prompt_length], row.num_completion_tokens)
        assert decoded.output_ids == row.input_ids[prompt_length:]
        batch = store.batch([index])
        accepted = accepted_prefix(head.draft_along(batch), batch, on_policy=True)[0].tolist()
        by_anchor = dict(zip(anchor_positions(row), accepted, strict=False))  # the rest is padding
        walked = [count for _, count in walk(by_anchor, prompt_length)]
        # The decoder may accept past the row's last token, so its last draft is not compared.
        assert walked[:-1] == decoded.accepted[: len(walked) - 1]
        num_accepted += sum(walked)
    assert num_accepted > 0
    total = held_out_acceptance(head, store, True, 256).total
    assert total.num_accepted_tokens == num_accepted


def test_out_of_vocabulary_tokens_are_rejects(spec, target, rows):
    if not truncates(spec):
        pytest.skip("drafts the whole vocabulary")
    head = build(spec, target, draft_vocab_size=1)
    total = held_out_acceptance(head, make_store(head, target, rows), True, 256).total
    occurrences = sum(row.input_ids[row.prompt_span[1] :].count(0) for row in rows)
    assert total.num_accepted_tokens <= occurrences


@pytest.mark.parametrize("draft_vocab_size", [100, None])
def test_export_holds_the_weights_and_the_doctor_finds_nothing(spec, target, target_files, tmp_path, draft_vocab_size):
    head = build(spec, target, draft_vocab_size)
    head.export(tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in head.named_parameters():
        assert torch.equal(tensors[name].flatten(), parameter.detach().bfloat16().flatten()), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == target.config.vocab_size
    manifest_for(spec, head, target_files).save(tmp_path)
    assert diagnose(tmp_path, target_files) == []


@pytest.mark.parametrize("draft_vocab_size", [100, None])
def test_an_exported_head_that_is_opened_again_accepts_the_same(
    spec, target, target_files, rows, tmp_path, draft_vocab_size
):
    head = build(spec, target, draft_vocab_size, perturb=0.02)
    head.export(tmp_path, torch.float32)
    config = HeadConfig(name=spec.name, num_speculative_tokens=K, options=asdict(spec.options_cls()))
    manifest_for(spec, head, target_files, config={"head": asdict(config)}).save(tmp_path)
    opened = open_head(tmp_path, target)
    assert opened.draft_token_ids.tolist() == head.draft_token_ids.tolist()
    store = make_store(head, target, rows)
    drafts = head.draft_along(store.batch([0, 1, 2]))
    assert torch.equal(opened.draft_along(store.batch([0, 1, 2])), drafts)
    run = RunConfig(target=TargetConfig(name=str(target_files.path), dtype="float32"))
    answers = [(row.input_ids[: row.prompt_span[1]], row.input_ids[row.prompt_span[1] :]) for row in rows]
    assert acceptance_on(run, tmp_path, answers) == held_out_acceptance(head, store, True, 256).total
    with pytest.raises(ValueError, match="nothing to measure the head on"):
        acceptance_on(run, tmp_path, [])


def test_features_hold_what_the_head_taps_and_no_more(spec, target, rows):
    store = make_store(build(spec, target), target, rows)
    batch = store.batch([0, 1, 2])
    assert batch.aux_hidden_BTAH.shape[2:] == (len(store.aux_layer_ids), target.config.hidden_size)
    width = target.config.hidden_size * (1 + len(store.aux_layer_ids)) * 4 + 4 + 8  # float32; logsumexp, argmax
    assert store.num_bytes == width * sum(len(row.input_ids) for row in rows)


def manifest_for(spec, head, target_files, **provenance) -> HeadManifest:
    return HeadManifest(
        head=spec.name,
        vllm_method=spec.vllm_method,
        vllm_speculative=spec.vllm_speculative,
        num_speculative_tokens=K,
        target_name=target_files.name,
        target=target_files.fingerprint(),
        draft_vocab_size=head.draft_vocab_size,
        provenance=provenance,
    )
