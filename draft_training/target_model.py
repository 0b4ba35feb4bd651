"""The frozen target in plain transformers, with taps on some of its layers.

Heads are built from its ends alone: embeddings, final norm and lm_head. Its layers are read from disk when a row is,
and can go again: a training whose features are all kept never holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from draft_training.feature_cache import RowFeatures
from draft_training.padding import padded_length
from specdec.device import Device
from specdec.safetensors_header import read_header
from specdec.targets import Target

LOGITS_CHUNK_TOKENS = 128  # bounds the [tokens, vocabulary] buffer
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class TargetModel:
    """Its ends, and what opens the whole model."""

    def __init__(self, config: Any, ends: tuple[Tensor, Tensor, Tensor], open_model: Callable[[], nn.Module]) -> None:
        """``ends``: embeddings [V, H], lm_head [V, H] (the same tensor when tied), final norm [H]."""
        self.config = config
        self.embedding, self.lm_head_weight, self.final_norm_weight = ends
        self._open_model = open_model
        self._model: nn.Module | None = None

    @classmethod
    def load(cls, target: Target, dtype: str, device: Device) -> TargetModel:
        """The target in ``dtype`` on ``device``, from its files.

        Raises:
            ValueError: its files lack embeddings, final norm or lm_head.
        """
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch_dtype: torch.dtype = getattr(torch, dtype)

        def open_model() -> nn.Module:
            model = AutoModelForCausalLM.from_pretrained(target.path, dtype=torch_dtype, attn_implementation="sdpa")
            return model.to(device.kind)

        config = AutoConfig.from_pretrained(target.path)
        is_tied = bool(config.tie_word_embeddings)
        return cls(config, _read_ends(target, is_tied, torch_dtype, device), open_model)

    @classmethod
    def of(cls, model: nn.Module) -> TargetModel:
        """A model that is in memory already, and stays there."""
        return cls(model.config, _ends_of(model), lambda: model)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def model(self) -> nn.Module:
        """Opened when it is first asked for."""
        if self._model is None:
            with torch.inference_mode(False):  # heads compute gradients through its ends
                self._model = self._open_model().eval().requires_grad_(False)
            self.embedding, self.lm_head_weight, self.final_norm_weight = _ends_of(self._model)
        return self._model

    def drop_layers(self) -> None:
        """Give back the memory of all but the ends, until a row is to be read again."""
        if self._model is None:
            return
        is_tied = self.lm_head_weight.data_ptr() == self.embedding.data_ptr()
        self.embedding = self.embedding.clone()  # out of the file's mapping, which stays whole otherwise
        self.lm_head_weight = self.embedding if is_tied else self.lm_head_weight.clone()
        self.final_norm_weight = self.final_norm_weight.clone()
        self._model = None

    @torch.inference_mode()
    def forward_rows(self, rows: list[list[int]], aux_layer_ids: list[int]) -> list[RowFeatures]:
        """Features of a right-padded batch of id lists."""
        lengths = [len(ids) for ids in rows]
        input_ids = torch.zeros(len(rows), padded_length(max(lengths)), dtype=torch.long)
        for i, ids in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
        decoder = self.model.get_decoder()
        taps: dict[int, Tensor] = {}

        def tap(layer_id: int):
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                taps[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        # After layer index k - 1 the residual stream has passed k layers.
        hooks = [decoder.layers[k - 1].register_forward_hook(tap(k)) for k in aux_layer_ids]
        try:
            # Right padding under a causal mask needs no attention mask: no real token sees a pad.
            final = decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        # A head that taps no layer stores nothing for it: A = 0.
        aux = torch.stack([taps[k] for k in aux_layer_ids], dim=2) if aux_layer_ids else final[:, :, None][:, :, :0]
        return [self._row(aux[i], final[i], length) for i, length in enumerate(lengths)]

    def _row(self, aux: Tensor, final: Tensor, length: int) -> RowFeatures:
        """Of a padded row."""
        logsumexps, argmaxes = [], []
        for chunk in final[: padded_length(length)].split(LOGITS_CHUNK_TOKENS):
            logits = (chunk @ self.lm_head_weight.T).float()
            logsumexps.append(logits.logsumexp(-1))
            argmaxes.append(logits.argmax(-1))
        return RowFeatures(
            aux_hidden=aux[:length],
            final_hidden=final[:length],
            logsumexp=torch.cat(logsumexps)[:length],
            argmax=torch.cat(argmaxes)[:length],
        )


def _ends_of(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return embedding, lm_head, model.get_decoder().norm.weight


def _read_ends(target: Target, is_tied: bool, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    places = {name: path for path in target.path.glob("*.safetensors") for name in read_header(path)}
    names = [EMBEDDING, FINAL_NORM] + ([] if is_tied else [LM_HEAD])
    if missing := [name for name in names if name not in places]:
        raise ValueError(f"target {target.name} lacks {', '.join(missing)} in {target.path}; download or save it again")
    found = {}
    for name in names:
        with safe_open(places[name], framework="pt") as file:
            found[name] = file.get_tensor(name).to(device.kind, dtype, copy=True)  # a copy: not in the file's mapping
    return found[EMBEDDING], found[EMBEDDING if is_tied else LM_HEAD], found[FINAL_NORM]
