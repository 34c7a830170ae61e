"""`generate` for TtT: what may be asked for, and the way from GenerationMixin's preparation to the decoding loop."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import TransformersKwargs, logging

from .cache_ttt import TttCache
from .decoding_ttt import Call, TttDecoder
from .generation_config_ttt import (
    AUDIO_DEFAULTS,
    AUDIO_OPTIONS,
    SURE_RULES,
    TttGenerationConfig,
    asks_for_fixing,
    read_options,
    refuse_two_rules,
)
from .response_diffusion_ttt import ResponseDecoder

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 512

# Options of GenerationMixin that have no meaning here: (name, is it asked for, what it is, what to do).
REFUSED_OPTIONS = (
    ("constraints", lambda v: v is not None, "constrained beam search", "leave it out"),
    ("force_words_ids", lambda v: v is not None, "constrained beam search", "leave it out"),
    ("num_beam_groups", lambda v: v is not None and v > 1, "group beam search", "leave it out"),
    ("num_beams", lambda v: v is not None and v > 1, "beam search", "use num_beams=1, or do_sample=True"),
    ("penalty_alpha", lambda v: v is not None and v > 0, "contrastive search", "leave it out"),
    ("dola_layers", lambda v: v is not None, "DoLa decoding", "leave it out"),
    ("prompt_lookup_num_tokens", lambda v: v is not None, "prompt lookup decoding", "leave it out"),
    ("assistant_early_exit", lambda v: v is not None, "assisted decoding", "leave it out"),
    ("use_mtp", bool, "multi-token prediction", "leave it out"),
    ("speculation_type", lambda v: v is not None, "speculative decoding", "leave it out"),
    ("is_assistant", bool, "serving as an assistant model", "leave it out"),
    ("guidance_scale", lambda v: v is not None and v != 1, "guidance of text", "use audio_guidance_scale for audio"),
    ("prefill_chunk_size", lambda v: v is not None, "chunked prefill", "leave it out"),
    ("token_healing", bool, "token healing", "leave it out"),
    ("output_attentions", bool, "returning attentions of every step", "call the model itself on the sequences"),
    ("output_hidden_states", bool, "returning hidden states of every step", "call the model itself on the sequences"),
    (
        "cache_implementation",
        lambda v: v not in (None, "dynamic"),
        "a cache whose last tokens cannot be taken back",
        "leave it out",
    ),
)

# Options that name tokens, of text alone: processors never see the probabilities of audio.
TEXT_TOKEN_OPTIONS = ("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "suppress_tokens")

# Arguments of GenerationMixin and of forwards that do nothing here.
REFUSED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "inputs_embeds",
    "logits_to_keep",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "span_ids",
    *sorted(TransformersKwargs.__optional_keys__ - {"output_attentions", "output_hidden_states"}),
)


@dataclass
class TttGenerateOutput(GenerateDecoderOnlyOutput):
    """
    What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new)`): prompts as given, then the new tokens, then the
            padding token for rows that ended earlier.
        past_key_values (`TttCache`): hand it to the next turn of the conversation; `None` with `use_cache=False`.
        scores, logits (`tuple(torch.FloatTensor)`, *optional*): with `output_scores` / `output_logits`, after and
            before the logits processors, one `(1, vocab)` entry per new token: of text tokens with audio-side ids at
            -inf, of audio, which is not written left to right, all -inf.
        num_forwards (`int`): forwards of the backbone in this call, shared ones counted once: prompt, text, denoising
            steps, commits of finished spans and unconditional branches.
        num_token_positions (`int`): token positions these forwards computed, filling included.
        forwards_per_row (`torch.LongTensor` of shape `(batch,)`): forwards each row took part in.
        denoising_steps_per_row (`torch.LongTensor` of shape `(batch,)`): how many of them wrote speech. A row's
            codes by these are its codes a step, whatever its prompt and its text took.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`): each row's new tokens by its forwards.
    """

    num_forwards: int | None = None
    num_token_positions: int | None = None
    forwards_per_row: torch.Tensor | None = None
    denoising_steps_per_row: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None


class TttGenerationMixin(GenerationMixin):
    """Generation of interleaved text and audio. The model's class sets `generation_config_class` to ours."""

    output_modalities = ("text", "audio")

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        **kwargs: Any,
    ) -> None:
        """At loading time: the checkpoint's generation_config.json as a TttGenerationConfig, whatever wrote it."""
        if generation_config is not None:
            self.generation_config = TttGenerationConfig.upgrade(generation_config)
        elif pretrained_model_name_or_path is not None:
            kwargs.pop("trust_remote_code", None)
            try:
                self.generation_config = TttGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
                )
            except OSError:
                logger.info("No generation_config.json: token ids come from the model's configuration.")

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[TttGenerationConfig, dict[str, Any]]:
        if generation_config is not None:
            generation_config = TttGenerationConfig.upgrade(generation_config)
        # None asks for the default, as it does in a generation configuration.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in AUDIO_DEFAULTS}
        kwargs |= read_options(kwargs)
        # What the call asks for, steps too, is not overruled by a rule that the checkpoint alone sets. A copy of the
        # checkpoint's settings asks for what was changed in it.
        names = ("audio_steps_per_block", "audio_remasking", "audio_order_bias", *SURE_RULES)
        asked = {name: getattr(generation_config, name, None) for name in names}
        own = vars(self.generation_config)
        given = {name: value for name, value in asked.items() if value != own.get(name)} | kwargs
        refuse_two_rules(given)
        if asks_for_fixing(kwargs):
            kwargs |= {name: given.get(name) for name in SURE_RULES}
        # The library checks this one without knowing that audio may be drawn where text is not.
        several = kwargs.pop("num_return_sequences", None) if self.config.audio_objective == "diffusion" else None
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        options = TttGenerationConfig.upgrade(prepared)
        if asks_for_fixing(given):
            for name in SURE_RULES:
                setattr(options, name, given.get(name))
        if several is not None:
            options.update(num_return_sequences=several)
        if kwargs.get("max_new_tokens") is not None and kwargs.get("max_length") is None and generation_config is None:
            options.max_length = None  # the checkpoint's, which gives way; the library would warn of both
        asked_rule = next((name for name in SURE_RULES if kwargs.get(name) is not None), None)
        if asked_rule is not None and kwargs.get("audio_steps_per_block") is not None:
            logger.warning_once(f"`audio_steps_per_block` has no effect beside `{asked_rule}`: leave one of them out.")
        rule = options.audio_prefix_probability
        if rule is not None and given.get("audio_prefix_probability") is None and given.get("audio_order_bias"):
            logger.warning_once(
                f"`audio_order_bias` has no effect beside the checkpoint's `audio_prefix_probability` of {rule}: ask "
                "for `audio_steps_per_block` as well."
            )
        return options, model_kwargs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """
        As any model, for the autoregressive twin. The other entries, `generate_batch` among them, lead here.

        Raises:
            ValueError: for a model that diffuses, which this would write left to right.
        """
        if self.config.audio_objective == "diffusion":
            raise ValueError(
                "Continuous batching (`generate_batch`, `init_continuous_batching`) writes one token after the other, "
                "but this model's `audio_objective` is 'diffusion': call `generate`, which takes several prompts."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """
        As any model. Of audio that was diffused there is none: its tokens get 0.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, prompt + new)`): prompts and answers.
            scores (`tuple(torch.FloatTensor)`): one `(batch, vocab)` entry per new token.

        Returns:
            `torch.FloatTensor` of shape `(batch, new)`.
        """
        if self.config.audio_objective == "autoregressive":
            return super().compute_transition_scores(sequences, scores, beam_indices, normalize_logits)
        if not len(scores) or sequences.shape[1] <= len(scores) or beam_indices is not None:
            raise ValueError(
                f"`scores` has {len(scores)} entries for `sequences` of {sequences.shape[1]} tokens: pass both as one "
                "call of `generate` with `output_scores=True` returned them, without `beam_indices`."
            )
        answers = sequences[:, -len(scores) :]
        transitions = torch.zeros(answers.shape, device=sequences.device)
        for place, of_place in enumerate(scores):
            is_text = ~self.config.is_audio(answers[:, place])
            chosen = of_place[is_text].log_softmax(dim=-1) if normalize_logits else of_place[is_text]
            transitions[is_text, place] = chosen.gather(1, answers[is_text, place, None]).squeeze(1)
        return transitions

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TttGenerateOutput | torch.Tensor:
        r"""
        Write text and audio after the prompts, each row of the batch as if it were alone.

        1. Prompts: one forward computes their keys and values (left padding is taken off; what `past_key_values` holds
           already is skipped). It gives the logits of the first new token.
        2. Text: one token per forward, chosen among text-side ids by the usual options (`do_sample`, `temperature`,
           `repetition_penalty`, processors, ...). A begin token starts a span; an end-of-sequence token ends the row,
           as does one that ends a span, where `eos_token_id` has it too.
        3. Span, block by block:
           a. append `audio_block_size` mask tokens;
           b. one forward over the span's own tokens, behind the cache, gives the logits of the block: codes and both
              end tokens only. With `audio_guidance_scale` above 0, a second forward over the whole sequence, all
              masked before the block, is mixed in;
           c. take a token for every position: the most probable, or a sample (`audio_temperature` above 0);
           d. fix the most confident of the undecided positions (`audio_remasking`), an even share of the block per step
              or those that `audio_confidence_threshold` or `audio_prefix_probability` says; the cache forgets the step;
              back to b;
           e. when the block is decided up to its first end token, the span ends there (an end token of either kind, as
              published) and the rest is dropped; without one, the next block follows.
        4. Commit: a forward over the finished span stores its keys and values and gives the next text token's logits.

        With block-causal spans (`config.span_attention`) a finished block is final: a step runs its block alone, the
        first step of a block also stores the block before it, and the commit runs the last block. Blocks stand on a
        grid from the start of their span, `audio_block_size` apart, in the prompt too.

        Steps 3 and 4 recompute the span because its tokens see each other; nothing before it changes, so the tokens are
        those of the uncached published sampler. Rows of a batch share forwards: on an accelerator each one advances
        every row; on a CPU rows that write text go first and wait at their next span, so that spans are run together.

        Limits. `max_new_tokens` counts all new tokens and is never exceeded. A span that meets it, or
        `max_audio_codes_per_span`, keeps the codes that fit beside the end token of its kind and is closed with it (a
        begin token that is itself the last token stays open). Stopping criteria are asked after each text token, block
        and span; a span they stop is closed in the same way. Without `max_new_tokens` and `max_length` in the call, the
        checkpoint's own, or 512 tokens, or what the context leaves. A prompt that ends with a begin token, or with
        codes, is continued inside that span.

        A model whose `text_objective` is "diffusion" writes its whole response as [`ResponseDecoder`] says.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, length)`): the prompts, also accepted as `input_ids`; with
                `attention_mask` of the same shape (0 is padding). Always the whole conversation.
            generation_config ([`TttGenerationConfig`], *optional*), or its options as keywords, all the `audio_...` and
                `seed` among them.
            streamer (`BaseStreamer`, *optional*; one row only): receives `put(prompt)` of shape (1, length), then
                `put(ids)` with 1-D ids on the CPU: each text token (begin and end-of-sequence tokens too) alone; audio
                as one tensor per final block, its codes and, where the span ends there, the end token as the last id.
                Nothing put is ever taken back. `end()` comes last.
            past_key_values ([`TttCache`] or `DynamicCache`, *optional*): the cache of an earlier call, or of a forward
                over the first columns of `inputs`, or an empty one. Whatever it holds of the prompts is used, the rest
                is computed. Both are changed in place: a `TttCache` holds all that is final afterwards, a
                `DynamicCache`, whose rows have one length, the first columns of the result that are final in every row.
            labels (`torch.LongTensor` of the shape of `inputs`, *optional*): where a row has labels, as the rows of an
                evaluation, its prompt is what stands before the first of them.
            kwargs: `attention_mask`, `num_return_sequences` (with sampling of text or audio), `tokenizer` (for
                `stop_strings`), `prefix_allowed_tokens_fn`, and options of the generation config. What the processor
                says of the prompts beside ids and mask (`mm_token_type_ids`) is taken and not needed.

        Returns:
            `torch.LongTensor` of shape `(batch, prompt + new)`, or [`TttGenerateOutput`]. The autoregressive twin
            (`config.audio_objective="autoregressive"`) is handed to the ordinary `generate`, which ignores the audio
            options with a warning.

        Raises:
            ValueError: for options that make no sense here (beams, assisted decoding, ...), invalid values, prompts and
                answers that do not fit the model's context: before any forward, naming the argument.
        """
        self.generation_config = TttGenerationConfig.upgrade(self.generation_config)
        if generation_config is not None:
            generation_config = TttGenerationConfig.upgrade(generation_config)
        kwargs.pop("mm_token_type_ids", None)  # the ids say themselves which of them are codes
        if self.config.audio_objective == "autoregressive" or kwargs.get("custom_generate") is not None:
            if past_key_values is not None:
                kwargs["past_key_values"] = past_key_values
            ignored = sorted(name for name in (*AUDIO_OPTIONS, "generator") if kwargs.get(name) is not None)
            if ignored and kwargs.get("custom_generate") is None:
                logger.warning_once(f"{ignored} have no effect: the audio is not written by block diffusion.")
            kwargs |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            if kwargs.get("custom_generate") is None:
                _refuse_mode(kwargs.pop("generation_mode", None))
                if kwargs.get("labels") is not None:
                    return self._write_before_labels(inputs, generation_config, streamer=streamer, **kwargs)
                kwargs.pop("labels", None)
            return super().generate(inputs, generation_config, streamer=streamer, **kwargs)

        call = self.prepare_call(inputs, generation_config, logits_processor, stopping_criteria, streamer, **kwargs)
        return self._write(call, past_key_values)

    def _write_before_labels(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        labels: Any,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> TttGenerateOutput | torch.Tensor:
        """Have the ordinary `generate` answer what stands before the labels, and return rows that begin as given."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        _refuse_ids(input_ids)
        _refuse_shapes(input_ids, {"attention_mask": attention_mask, "labels": labels})
        is_prompt = _prompt_mask(input_ids, attention_mask, labels)
        order = is_prompt.sort(dim=1, stable=True).indices  # the library wants padding on the left
        prompts, mask = input_ids.gather(1, order), is_prompt.gather(1, order)
        first = prompts.gather(1, mask.long().argmax(dim=1, keepdim=True))
        prompts = torch.where(mask, prompts, first)  # what is padding now is shown as the first token, see `_process`
        output = super().generate(prompts, generation_config, attention_mask=mask.long(), **kwargs)
        sequences = getattr(output, "sequences", output)
        rows = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences[:, : input_ids.shape[1]] = rows.to(sequences.device)
        return output

    def prepare_call(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Call:
        """
        Check and prepare a call of `generate`, whose arguments it takes, without running it: for those who run the
        decoding loop themselves.

        Returns:
            [`Call`]: the rows, their options, processors, criteria and noise.

        Raises:
            ValueError: as `generate`.
        """
        self.generation_config = TttGenerationConfig.upgrade(self.generation_config)
        shared = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "streamer": streamer,
            **kwargs,
        }
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        options = self._prepare_generation_config(
            generation_config, **{k: v for k, v in kwargs.items() if k in self.generation_config.__dict__}
        )[0]
        lists = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("`inputs` and `input_ids` are the same argument; leave one of them out.")
        self._refuse_calls(input_ids, options, streamer, {**kwargs, **lists})
        for name in ("input_ids", "generation_mode"):
            shared.pop(name, None)
        input_ids = input_ids.to(self.device)
        mask, labels = shared.pop("attention_mask", None), shared.pop("labels", None)
        if mask is not None or labels is not None:
            mask = _prompt_mask(input_ids, mask, labels).long()
        shared["attention_mask"] = mask
        longest = input_ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
        default = self._default_max_new_tokens(options, generation_config, kwargs, input_ids.shape[1], longest)
        if default is not None:
            shared.pop("max_length", None)  # the default keeps it
            if generation_config is None:
                shared["max_new_tokens"] = default
            else:  # beside a config the library warns of options
                shared["generation_config"] = copied = copy.deepcopy(generation_config)
                copied.max_new_tokens, copied.max_length = default, None
        if options.stop_strings is not None:
            # `generate` keeps the tokenizer from custom decoding loops, and without it refuses stop strings.
            criterion = StopStringCriteria(shared.pop("tokenizer"), options.stop_strings)
            shared["stopping_criteria"] = StoppingCriteriaList([*(stopping_criteria or []), criterion])
            shared["stop_strings"] = None

        def prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            mask = model_kwargs.get("attention_mask")
            return Call(self.config, input_ids, mask, generation_config, logits_processor, stopping_criteria, streamer)

        call = super().generate(input_ids, custom_generate=prepared, **shared)
        self.decoder_class.check(call)
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        refuse_overflow(max(row.prompt_length for row in call.rows), call.max_new_tokens, most)
        return call

    @property
    def decoder_class(self) -> type[TttDecoder]:
        """The decoding loop of this kind of model."""
        return ResponseDecoder if self.config.text_objective == "diffusion" else TttDecoder

    def _write(self, call: Call, past_key_values: Cache | None) -> TttGenerateOutput | torch.Tensor:
        """Run the decoding loop on one call, and pack its result."""
        as_dict = bool(call.options.return_dict_in_generate)
        cache = _import_cache(past_key_values, call.input_ids, call.attention_mask)
        keep_cache = past_key_values is not None or (as_dict and call.options.use_cache is not False)
        if cache is None:
            cache = TttCache(self.config.get_text_config().num_hidden_layers, len(call.rows))
        longest = max(row.prompt_length for row in call.rows) + call.max_new_tokens + 1
        decoder = self.decoder_class(self, cache, longest)
        decoder.run(call, keep_cache)

        new_tokens = [row.ids[row.prompt_length :] for row in call.rows]
        longest = max(map(len, new_tokens))
        if isinstance(past_key_values, DynamicCache):
            if call.block_length not in (None, self.config.block_lengths[0]):  # not what a forward would put there
                cache.drop_spans(self.config.is_audio)
            mask = torch.ones_like(call.input_ids) if call.attention_mask is None else call.attention_mask
            cache.copy_to(past_key_values, nn.functional.pad(mask, (0, longest), value=1))
        pad = call.options._pad_token_tensor
        padding = int(pad) if pad is not None else 0
        answers = torch.tensor(
            [answer + [padding] * (longest - len(answer)) for answer in new_tokens], device=self.device
        )
        sequences = torch.cat([call.input_ids, answers], dim=1)
        if not as_dict:
            return sequences
        forwards = torch.tensor([row.forwards for row in call.rows])
        return TttGenerateOutput(
            sequences=sequences,
            past_key_values=cache if keep_cache else None,
            num_forwards=decoder.runner.num_forwards,
            num_token_positions=decoder.runner.num_token_positions,
            forwards_per_row=forwards,
            denoising_steps_per_row=torch.tensor([row.denoising_steps for row in call.rows]),
            tokens_per_forward=torch.tensor([len(answer) for answer in new_tokens]) / forwards,
            scores=tuple(call.scores) if call.scores is not None else None,
            logits=tuple(call.logits) if call.logits is not None else None,
        )

    def _default_max_new_tokens(
        self,
        options: TttGenerationConfig,
        generation_config: TttGenerationConfig | None,
        kwargs: dict[str, Any],
        width: int,
        longest_prompt: int,
    ) -> int | None:
        """
        How many tokens to write where the call does not give `max_new_tokens`: what its `max_length` leaves, else the
        checkpoint's own limit, or 512, cut to the room that the context leaves. None where the call gives it.
        """
        own, library = self.generation_config, GenerationConfig._get_default_generation_params()
        said = {}
        for name in ("max_new_tokens", "max_length"):
            given = getattr(generation_config, name, None)
            given = given if given != getattr(own, name) else None
            said[name] = given if kwargs.get(name) is None else kwargs[name]
        if said["max_new_tokens"] is not None:
            return None
        if said["max_length"] is not None:
            # Of prompt and answer. The checkpoint's `max_new_tokens`, which the library would prefer, gives way.
            if said["max_length"] <= width:
                raise ValueError(
                    f"`max_length` is {said['max_length']}, but the prompts are {width} tokens wide already: raise it, "
                    "or give `max_new_tokens` instead."
                )
            return said["max_length"] - width
        limit = DEFAULT_MAX_NEW_TOKENS
        if own.max_new_tokens is not None:
            limit = own.max_new_tokens
        elif own.max_length not in (None, library["max_length"]):  # of prompt and answer
            if own.max_length <= width:
                return None  # refused further on, by name
            limit = own.max_length - width
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if most is None else max(1, min(limit, most - longest_prompt))

    def _refuse_calls(
        self,
        input_ids: torch.Tensor | None,
        options: TttGenerationConfig,
        streamer: BaseStreamer | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Raise a ValueError that names the argument for every call that cannot be served."""
        if self.device.type == "meta":
            raise ValueError(
                "The model's weights are on the 'meta' device, which holds no values: load it with `device_map='cpu'` "
                "or that of an accelerator."
            )
        _refuse_ids(input_ids)
        for name in TEXT_TOKEN_OPTIONS:
            audio = [token for token in _chosen_ids(getattr(options, name, None)) if self.config.is_audio(token)]
            if audio:
                raise ValueError(
                    f"`{name}` has {audio[0]}, which is audio, but acts on text alone: leave it out. Audio is drawn by "
                    "`audio_temperature`, `audio_top_k` and `audio_top_p`."
                )
        for name, is_asked, what, remedy in REFUSED_OPTIONS:
            value = getattr(options, name, None)
            if is_asked(value):
                raise ValueError(f"`{name}={value!r}` asks for {what}, which TtT generation does not do; {remedy}.")
        for name in REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is not used by TtT generation; leave it out.")
        if kwargs.get("generator") is not None:
            raise ValueError("`generator` is not used by TtT generation, which draws by `seed`; give that instead.")
        if kwargs.get("synced_gpus"):
            raise ValueError("`synced_gpus=True` is not supported: gather the model on each device to generate.")
        _refuse_mode(kwargs.get("generation_mode"))
        _refuse_shapes(input_ids, {name: kwargs.get(name) for name in ("attention_mask", "labels")})
        for name in ("logits_processor", "stopping_criteria"):
            value = kwargs.get(name)
            if value is not None and not (isinstance(value, list | tuple) and all(map(callable, value))):
                raise ValueError(f"`{name}` is {value!r}; pass a list of callables.")
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ValueError(f"`streamer` is a {type(streamer).__name__}; pass an object with methods `put` and `end`.")
        rows = input_ids.shape[0] * (options.num_return_sequences or 1)
        if streamer is not None and rows > 1:
            raise ValueError(f"`streamer` follows one row, but this call writes {rows}: call `generate` for each.")
        for name in ("output_scores", "output_logits"):
            if getattr(options, name) and options.return_dict_in_generate and rows > 1:
                raise ValueError(
                    f"`{name}` is for one row (rows reach their text tokens at different times), but this call "
                    f"writes {rows}: call `generate` for each."
                )
            if getattr(options, name) and self.config.text_objective == "diffusion":
                raise ValueError(f"`{name}` is of text written left to right, which a diffused response is not.")
        if rows > 1 and isinstance(options.watermarking_config, SynthIDTextWatermarkingConfig):
            raise ValueError(
                "`watermarking_config` is SynthID's, which follows rows that are written in step, as here they "
                f"are not, but this call writes {rows}: call `generate` for each, or use a WatermarkingConfig."
            )
        if options.stop_strings is not None and kwargs.get("tokenizer") is None:
            raise ValueError("`stop_strings` needs the tokenizer: pass `tokenizer=`.")
        if self.training and self.is_activation_checkpointing:
            raise ValueError("Gradient checkpointing in training mode disables the cache: call `model.eval()` first.")
        kinds = _partial_attention(self.config.get_text_config())
        if kinds:
            raise ValueError(
                f"The backbone's attention is limited ({', '.join(kinds)}), which TtT generation does not support: use "
                "one with full attention, or a window as long as its context."
            )


def _refuse_mode(mode: Any) -> None:
    """Raise a ValueError for a mode that is not "audio", which `pipeline("any-to-any")` asks for by that name."""
    if mode not in (None, "audio"):
        raise ValueError(f"`generation_mode` is {mode!r}, but an answer is text with speech: leave it out.")


def _refuse_ids(input_ids: Any) -> None:
    """Raise a ValueError for what is no batch of token ids."""
    if input_ids is None:
        raise ValueError("`inputs` is missing: pass the prompts' token ids (`inputs_embeds` hide what is audio).")
    if not torch.is_tensor(input_ids):
        raise ValueError(f"`inputs` is a {type(input_ids).__name__}; pass a tensor (batch, length) of token ids.")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"`inputs` is of type {input_ids.dtype}; pass token ids, which are integers.")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"`inputs` has shape {tuple(input_ids.shape)}; use (batch, length), with a row and a token or more."
        )


def _refuse_shapes(input_ids: Any, tensors: dict[str, Any]) -> None:
    """Raise a ValueError for tensors that do not have the shape of the prompts, and for masks of other than 0 and 1."""
    for name, value in tensors.items():
        if value is not None and not torch.is_tensor(value):
            raise ValueError(f"`{name}` is a {type(value).__name__}; pass a tensor of the shape of `inputs`.")
        if value is not None and tuple(value.shape) != tuple(input_ids.shape):
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, `inputs` {tuple(input_ids.shape)}: pass the whole "
                "conversation, not only its new part, and what belongs to it."
            )
    mask = tensors.get("attention_mask")
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("`attention_mask` has values other than 0 (padding) and 1 (a token); pass those alone.")


def _prompt_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """Which tokens are the prompts': neither padding nor, where there are labels, from the first of them on."""
    is_prompt = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        is_prompt &= attention_mask.to(input_ids.device).bool()
    if labels is not None:
        is_prompt &= (labels.to(input_ids.device) >= 0).cumsum(dim=1) == 0
    if not is_prompt.any(dim=1).all():
        raise ValueError("`attention_mask`, or `labels`, leaves a row without any token; give every row a prompt.")
    return is_prompt


def _chosen_ids(option: Any) -> list[int]:
    """Return the token ids that an option is about: of sequences the last ones, which may stand behind audio."""
    sequences = (token if isinstance(token, list | tuple) else [token] for token in option or ())
    return [sequence[-1] for sequence in sequences if sequence and isinstance(sequence[-1], int)]


def _partial_attention(config: Any) -> list[str]:
    """What keeps a backbone's layers from seeing its whole context, as `transformers.masking_utils` decides it."""
    most = getattr(config, "max_position_embeddings", None)
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    short = {
        kind: f"`{name}` = {limit}"
        for kind, name in limits.items()
        if (limit := getattr(config, name, None)) is not None and (most is None or limit < most)
    }
    if not hasattr(config, "layer_types"):
        return list(short.values())[:1]
    kinds = sorted(set(config.layer_types or ()) - {"full_attention"})
    return [short.get(kind, f"layers of type {kind}") for kind in kinds if kind in short or kind not in limits]


def refuse_overflow(longest_prompt: int, max_new_tokens: int, max_positions: int | None) -> None:
    """Raise a ValueError where prompt and answer, in tokens, do not fit the positions of the model."""
    if max_positions is not None and longest_prompt >= max_positions:
        raise ValueError(
            f"The longest prompt has {longest_prompt} tokens, which leaves no room for an answer: the model has "
            f"`max_position_embeddings` = {max_positions}. Shorten the prompt."
        )
    needed = longest_prompt + max_new_tokens
    if max_positions is not None and needed > max_positions:
        raise ValueError(
            f"The longest prompt ({longest_prompt} tokens) and `max_new_tokens` ({max_new_tokens}) make {needed} "
            f"positions, but the model has `max_position_embeddings` = {max_positions}: shorten the prompt or lower "
            "`max_new_tokens`."
        )


def _import_cache(
    past_key_values: Cache | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> TttCache | None:
    """The caller's cache as one that the decoding loop can use; None where it holds nothing."""
    batch_size, width = input_ids.shape
    if past_key_values is None:
        return None
    if isinstance(past_key_values, TttCache):
        if past_key_values.num_rows != batch_size:
            raise ValueError(
                f"`past_key_values` holds {past_key_values.num_rows} rows, but this call writes {batch_size}."
            )
        return past_key_values
    is_plain = isinstance(past_key_values, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in past_key_values.layers
    )
    if not is_plain:
        raise ValueError(
            f"`past_key_values` is a {type(past_key_values).__name__} whose last tokens cannot be taken back; pass the "
            "cache that `generate` returned, or a DynamicCache with full attention."
        )
    length = past_key_values.get_seq_length()
    if length == 0:
        return None
    if length > width or past_key_values.layers[0].keys.shape[0] != batch_size:
        raise ValueError(
            f"`past_key_values` holds {past_key_values.layers[0].keys.shape[0]} rows of {length} tokens, but `inputs` "
            f"has shape {(batch_size, width)}: pass the whole conversation, cached part included."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = [row.nonzero().squeeze(-1) for row in mask[:, :length].bool()]
    token_ids = [ids[kept].tolist() for ids, kept in zip(input_ids, columns, strict=True)]
    return TttCache.from_dynamic_cache(past_key_values, token_ids, columns)


__all__ = ["TttGenerateOutput", "TttGenerationMixin"]
