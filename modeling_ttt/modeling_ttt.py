"""The TtT model: a causal backbone with bidirectional audio spans, its head and the training loss."""

import copy
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .attention_ttt import (
    NO_SPAN,
    compute_span_ids,
    create_copies_mask,
    extend_span_ids,
    overlay_response_spans,
)
from .configuration_ttt import TttConfig
from .generation_config_ttt import TttGenerationConfig
from .generation_ttt import TttGenerationMixin
from .objective_ttt import Noise, Scores, draw_noise, noise_grid, sample_weights, score, truncate_last_spans
from .pipeline_code_ttt import register_pipeline
from .samples_ttt import IGNORE_INDEX, NO_PIECE, Batch, Samples, find_sample_starts

logger = logging.get_logger(__name__)

WITHOUT_MASKS = ("bloom", "opt")  # find positions in the padding mask, so that they take no other
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM")


@dataclass
class TttCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`TttForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor`, *optional*): text part plus audio part.
        text_loss (`torch.FloatTensor`, *optional*): autoregressive part, L_AR of the paper.
        audio_loss (`torch.FloatTensor`, *optional*): the diffusion bound (or the twin's next-code loss), L_audio.
        score_table (`torch.FloatTensor` of shape `(batch, groups, 3)`, *optional*):
            What the losses are made of, without gradient. Group 0 is text; the others are audio by its noise level in
            equal bins from 0 to 1, or one group if audio is autoregressive. Of each, by row: its loss, scaled so that
            the mean over rows is that of the batch, in evaluation whatever `num_items_in_batch` says; the scored
            positions predicted right; the scored positions.
        logits (`torch.FloatTensor` of shape `(batch, kept, vocab)`, *optional*): absent where labels were given.
        past_key_values (`Cache`, *optional*): keys and values of the tokens seen.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): as any model returns them, on request.
    """

    loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    audio_loss: torch.Tensor | None = None
    score_table: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TttPreTrainedModel(PreTrainedModel):
    """What every TtT model shares with the library: configuration, attention backends, parallel and memory features."""

    config_class = TttConfig
    config: TttConfig
    base_model_prefix = "model"
    input_modalities = ("text", "audio")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # the twin; an instance that diffuses says otherwise

    def __init__(self, config: TttConfig, *inputs, **kwargs):
        config.validate()
        self._can_compile_fullgraph = config.audio_objective == "autoregressive"
        for sub_config in (config, config.text_config):
            _refuse_flash_attention(sub_config._attn_implementation)
        super().__init__(config, *inputs, **kwargs)
        for part in (self, config):
            _make_importable(type(part))

    @property
    def device(self) -> torch.device:
        """Where the model computes, also while accelerate keeps its weights on the CPU or on disk."""
        device = next(parameter.device for parameter in self.parameters())
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(place) for place in places if place is not None), device)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs) -> None:
        """
        Choose the attention backend: "eager", "sdpa" or "flex_attention".

        Raises:
            ValueError: for FlashAttention of any kind, before anything is changed.
        """
        _refuse_flash_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """
        As any model.

        Raises:
            ValueError: if an audio code or a token of `TttConfig` would be cut off, before anything is changed.
        """
        if new_num_tokens is not None:
            copy.deepcopy(self.config).vocab_size = new_num_tokens
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class TttModel(TttPreTrainedModel):
    """The backbone of `text_config` under the modality-aware mask, without a head."""

    def __init__(self, config: TttConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        kind = config.text_config.model_type
        if self.language_model._is_stateful or kind in WITHOUT_MASKS:
            raise ValueError(
                f"`text_config` is a {kind}, whose layers take no mask of who sees whom: audio spans need a backbone "
                "of attention layers whose mask comes from `transformers.masking_utils`, such as qwen2, qwen3 or llama."
            )
        self.post_init()

    def get_span_ids(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        block_length: int | None = None,
    ) -> torch.Tensor | None:
        """
        Return span ids of clean token ids by the configuration's rules, see `compute_span_ids`; with block-causal spans
        those of blocks, `config.block_lengths[0]` tokens long where `block_length` does not say otherwise. `None` for
        the autoregressive twin, which has no bidirectional spans. Where text is diffused the response is a span too,
        but only labels, or whoever generates, know where it lies: see `overlay_response_spans`.
        """
        config = self.config
        if config.audio_objective == "autoregressive":
            return None
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        return compute_span_ids(
            input_ids,
            config.audio_token_id_start,
            config.audio_token_id_end,
            attention_mask,
            position_ids,
            config.end_of_prompt_audio_token_id,
            config.causal_prompt_audio,
            (block_length or config.block_lengths[0]) if config.is_block_causal else None,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        span_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            attention_mask (`torch.Tensor`, *optional*):
                `(batch, seen + length)`, 0 for padding; or a mask that is already prepared (4-D, a `BlockMask`, or a
                dictionary of them by layer type), which is used as it is.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Without attention mask and cache, positions that start again mark packed sequences.
            span_ids (`torch.LongTensor`, *optional*):
                `(batch, length)` for the tokens given or `(batch, seen + length)` for all, -1 outside spans. Tokens
                with the same number see each other. Computed from `input_ids`, which must then be clean, if not given.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, `input_ids` have another number
                of dimensions, or `span_ids` is missing and cannot be computed, or has another length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; use (batch, length).")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        is_prepared = not (attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2))
        if not is_prepared:
            span_ids = self._prepare_span_ids(
                span_ids, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
            )
            _refuse_flash_attention(self.language_model.config._attn_implementation)
            attention_mask = create_masks_for_generate(
                self.language_model.config,
                inputs_embeds,
                attention_mask,
                past_key_values,
                position_ids,
                block_sequence_ids=span_ids,
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _prepare_span_ids(
        self, span_ids, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values
    ) -> torch.Tensor | None:
        """Span ids of all positions in the mask, cached ones included; `None` where the mask is just causal."""
        length = inputs_embeds.shape[1]
        if length == 1 or self.config.audio_objective == "autoregressive":
            return None  # one query has no later token to look at
        if span_ids is None:
            if input_ids is None:
                raise ValueError("`inputs_embeds` do not tell text from audio: give `span_ids` with them.")
            span_ids = self.get_span_ids(input_ids, attention_mask, position_ids)
        num_seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        return extend_span_ids(span_ids, length, num_seen)


class TttForConditionalGeneration(TttPreTrainedModel, TttGenerationMixin):
    """TtT with its language modelling head: text left to right, audio spans by absorbing diffusion."""

    generation_config_class = TttGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TttConfig):
        super().__init__(config)
        self.model = TttModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()  # some backbones call them otherwise
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        register_pipeline(config)
        self.post_init()

    @staticmethod
    def _load_pretrained_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """As any model's. An adapter has the rows that it trained in embedding and head once where the two are tied, so
        that those of the head are not missing."""
        loading_info, *others = TttPreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        if model.config.tie_word_embeddings:
            rows = "lm_head.token_adapter."
            loading_info.missing_keys = {key for key in loading_info.missing_keys if not key.startswith(rows)}
        return loading_info, *others

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As any model; the saved configuration names this class for every auto class that resolves to it."""
        # `fully_shard` gives a model a class of PyTorch's own: code and configuration are saved for the original one.
        current_class = type(self)
        # No file holds the code of a class that a script or notebook defines.
        unnamed = ("torch.", "__main__")
        original_class = next(cls for cls in current_class.__mro__ if not cls.__module__.startswith(unnamed))
        if any(cls.__module__ == "__main__" for cls in current_class.__mro__):
            logger.warning(
                f"{current_class.__name__} is defined in a script or notebook, whose code is not saved: the folder "
                f"loads as {original_class.__name__}. Define it in a module of its own to save its code, too."
            )
        reference = f"{original_class.__module__.split('.')[-1]}.{original_class.__name__}"
        auto_map = dict(getattr(self.config, "auto_map", None) or {})
        self.config.auto_map = auto_map | dict.fromkeys(AUTO_CLASSES, reference)
        self.__class__ = original_class
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current_class

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        span_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        generator: torch.Generator | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TttCausalLMOutputWithPast:
        r"""
        Without `labels`: logits of the given tokens, mask tokens included. With `labels`: the loss, and no logits.

        In training mode answers are cut short (SST) and noise is drawn here, so `input_ids` are whole and clean. In
        eval mode the loss is a fixed estimate of the same bound (text on the clean sequence, audio averaged over
        `config.eval_noise_levels` with fixed noise): it costs one forward more than there are levels and never differs
        between two calls.

        Sequences packed into a row count as samples of their own, with the loss that they have as padded rows: mark
        them by `position_ids` that start again, and leave `attention_mask` out.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Not shifted, -100 where unscored (prompt and padding; a sample's first token never is). Text-side labels
                are scored as the next token, audio-side ones (codes and end tokens) by diffusion, or as the
                configuration's objectives say.
            span_ids (`torch.LongTensor`, *optional*): see [`TttModel`].
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in all micro-batches of a step, as the `Trainer` passes it, see `sample_weights`.
                Without it, samples are averaged as published.
            generator (`torch.Generator`, *optional*): draws the noise, for reproducible training losses.
            logits_to_keep (`int` or `torch.Tensor`): how many last positions (0: all), or which, get logits.

        Raises:
            ValueError: if `labels` come without `input_ids`, differ in shape or come with `past_key_values`, if there
                are `shift_labels`, or as [`TttModel`] does.
        """
        if kwargs.get("shift_labels") is not None:
            raise ValueError(
                "`shift_labels` (sequence or context parallelism) cannot be scored: diffused tokens are predicted in "
                "place, and spans lie in one piece. Pass whole rows with `labels`."
            )
        if labels is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("The loss needs `input_ids`: noise is applied to tokens, not to `inputs_embeds`.")
            if labels.shape != input_ids.shape or labels.ndim != 2:
                raise ValueError(
                    f"`labels` has shape {tuple(labels.shape)}, `input_ids` {tuple(input_ids.shape)}; both are "
                    "(batch, length)."
                )
            if past_key_values is not None:
                raise ValueError(
                    "`past_key_values` came with `labels`: the loss takes several forwards over whole sequences, so "
                    "leave it out. Prefix tuning, which is done with it, is not possible; LoRA is."
                )
            is_matrix = torch.is_tensor(attention_mask) and attention_mask.ndim == 2
            if is_matrix and attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}, `input_ids` {tuple(input_ids.shape)}."
                )
            if use_cache is None:
                use_cache = False
        backbone_inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if labels is None:
            if (
                self.training
                and torch.is_grad_enabled()
                and self.config.audio_objective == "diffusion"
                and not torch.compiler.is_compiling()
            ):
                logger.warning_once(
                    "A forward in training mode without `labels` has no loss. If these logits are trained on as next "
                    "tokens (`label_smoothing_factor`, or a loss of your own), audio learns nothing, since its tokens "
                    "see each other. Pass `labels`."
                )
            outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, span_ids=span_ids, **backbone_inputs)
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            return TttCausalLMOutputWithPast(
                logits=logits,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        assert input_ids is not None
        return self._score(input_ids, labels, span_ids, num_items_in_batch, generator, backbone_inputs)

    def _score(self, input_ids, labels, span_ids, num_items_in_batch, generator, backbone_inputs):
        """The loss: noise, a forward for each draw of it, scores."""
        config = self.config
        attention_mask, position_ids = backbone_inputs["attention_mask"], backbone_inputs["position_ids"]
        padding_mask = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
        if config.is_block_causal or (self.training and config.block_masking_probability > 0):
            if span_ids is not None or (attention_mask is not None and padding_mask is None):
                raise ValueError(
                    "Training in blocks lays the batch out anew: leave `span_ids` out, and give `attention_mask` as "
                    "(batch, length) or not at all."
                )
        sample_starts = find_sample_starts(labels, position_ids if padding_mask is None else None)
        labels = labels.masked_fill(sample_starts, IGNORE_INDEX)
        samples = Samples.from_starts(sample_starts, labels)
        weight = sample_weights(labels, samples, num_items_in_batch)
        if self.training:
            cut_off = truncate_last_spans(input_ids, labels, samples, config, generator)
            labels = labels.masked_fill(cut_off, IGNORE_INDEX)
        else:
            # The Trainer averages the batches of an evaluation by their examples: it shall not matter which share one.
            weight = weight.mean().expand_as(weight)
        is_scored, is_audio = labels != IGNORE_INDEX, config.is_audio(labels)

        # The mask is that of the clean sequence, whatever the noise.
        if span_ids is None:
            span_ids = self.model.get_span_ids(input_ids, padding_mask, position_ids)
            if span_ids is not None and config.text_objective == "diffusion":
                span_ids = overlay_response_spans(span_ids, is_scored, sample_starts)
        if span_ids is not None and self.training:
            span_ids = span_ids.masked_fill(cut_off, NO_SPAN)

        diffused = is_scored if config.text_objective == "diffusion" else is_audio
        if config.audio_objective == "autoregressive":
            diffused = torch.zeros_like(diffused)
        pieces = sample_starts.long().cumsum(-1)
        batch = Batch(
            input_ids,
            labels,
            is_audio,
            diffused,
            samples,
            pieces if padding_mask is None else pieces.masked_fill(padding_mask == 0, NO_PIECE),
            None if position_ids is None else position_ids.expand_as(input_ids),
            attention_mask,
            span_ids,
        )
        noises = [draw_noise(batch, config, generator)] if self.training else noise_grid(batch, config)
        forwards, scores = [], []
        for noise in noises:
            forwards.append(self.model(**(backbone_inputs | self._inputs_of(noise))))
            scores.append(score(forwards[-1].last_hidden_state, self.lm_head, noise, weight, config))
        text_loss, audio_loss, score_table = Scores.total(scores)
        if not self.training:  # of a batch that several processes share, the labels here are a part
            share, one = weight.sum(), torch.ones_like(weight[0])
            score_table = score_table / torch.stack([torch.where(share > 0, share, one), one, one])
        return TttCausalLMOutputWithPast(
            loss=text_loss + audio_loss,
            text_loss=text_loss,
            audio_loss=audio_loss,
            score_table=score_table,
            past_key_values=forwards[0].past_key_values,
            hidden_states=forwards[0].hidden_states,
            attentions=forwards[0].attentions,
        )

    def _inputs_of(self, noise: Noise) -> dict[str, Any]:
        """What the backbone is given of a draw of noise."""
        batch = noise.batch
        inputs = {"input_ids": noise.input_ids, "position_ids": batch.position_ids}
        if batch.limits is None or batch.span_ids is None:
            return inputs | {"attention_mask": batch.attention_mask, "span_ids": batch.span_ids}
        backbone = self.model.language_model
        mask = create_copies_mask(backbone.config, batch.limits, batch.span_ids, batch.pieces, backbone.dtype)
        return inputs | {"attention_mask": mask, "use_cache": False}


def _refuse_flash_attention(attn_implementation: str | dict | None) -> None:
    """Raise a `ValueError` if an attention implementation (or one in a nested dictionary) is FlashAttention."""
    if isinstance(attn_implementation, dict):
        for value in attn_implementation.values():
            _refuse_flash_attention(value)
    elif attn_implementation is not None and "flash" in attn_implementation.lower():
        raise ValueError(
            f"`attn_implementation={attn_implementation!r}` cannot express audio spans that are bidirectional inside a "
            "causal sequence: choose 'sdpa', 'flex_attention' or 'eager'."
        )


def _make_importable(cls: type) -> None:
    """
    Put the module of a class into its package, which Transformers leaves out for code from a model folder: dill looks
    there, and `datasets.Dataset.map` fingerprints with dill. The processor does the same for its own.
    """
    package, _, name = cls.__module__.rpartition(".")
    if package in sys.modules and not hasattr(sys.modules[package], name):
        setattr(sys.modules[package], name, sys.modules[cls.__module__])


for model_class in (TttModel, TttForConditionalGeneration):  # so that their code goes along
    model_class.register_for_auto_class("AutoModel")
if not __name__.startswith("transformers_modules."):  # code from a model's folder serves that folder alone
    AutoConfig.register("ttt", TttConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
        auto_class.register(TttConfig, TttForConditionalGeneration, exist_ok=True)

__all__ = ["TttCausalLMOutputWithPast", "TttForConditionalGeneration", "TttModel", "TttPreTrainedModel"]
