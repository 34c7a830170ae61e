"""TttProcessor, the one object between a user and the model. How its methods do their work lives beside it: prompts in
conversation_ttt.py, options in options_ttt.py, audio in audio_input_ttt.py and audio_codes_ttt.py, streams in
streaming_ttt.py."""

import copy
import dataclasses
import inspect
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AUDIO_TOKENIZER_KWARGS, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PROCESSOR_NAME, cached_file

from .audio_codes_ttt import decode_codes, encode_waveforms
from .audio_input_ttt import is_single_audio, list_audio, shorten
from .audio_tokenizer_ttt import (
    AUDIO_TOKENIZER_FOLDER,
    check_audio_tokenizer,
    make_importable,
    read_audio_tokenizer,
    write_audio_tokenizer,
)
from .codebooks_ttt import TttAudioFormat, flatten_codes, unflatten_codes
from .conversation_ttt import ConversationEncoder, Encoding, check_all_used, read_audio_parts
from .interleaving_ttt import deinterleave
from .options_ttt import TttProcessorKwargs, check_options, check_spelling
from .streaming_ttt import TttStreamer
from .tasks_ttt import (
    CHAT_TEMPLATE,
    TttTask,
    audio_parts,
    check_messages,
    default_tasks,
    name_audio_parts,
    replace_audio_parts,
    resolve_task,
)
from .vocabulary_ttt import AUDIO_PLACEHOLDER, START_OF_TURN, TttTokenIds, to_list


class TttProcessor(ProcessorMixin):
    """
    Everything between a user and [`TttForConditionalGeneration`].

    Args:
        feature_extractor (`FeatureExtractionMixin`):
            Prepares waveforms for the audio tokenizer, at the `sampling_rate` (Hz) that one takes.
        tokenizer (`PreTrainedTokenizerBase`): with the TtT special tokens and one token per code.
        audio_tokenizer (`PreTrainedModel`, *optional*):
            Any Transformers audio codec with discrete codes, of one or several codebooks (see `TttAudioFormat` for how
            several become one stream of codes, which is what `audio_codes` are everywhere here). May be left out where
            audio only ever comes as codes, as in training.
        chat_template (`str`, *optional*):
            Jinja template; audio parts are written as placeholders (see tasks_ttt.py for the default).
        text_chunk_size (`int`, *optional*, defaults to 13): text tokens between two spans of a response.
        audio_chunk_size (`int`, *optional*):
            Codes of such a span, a multiple of the codebooks. By default as many as last 2.08 s, in whole frames: the
            published 26 at 12.5 codes a second, 208 for eight codebooks at 12.5 frames, 104 for one at 50; 26 frames
            where no audio tokenizer tells their rate. A good block is as long (`generation_config.audio_block_size`),
            or a part of it in whole frames.
        system_prompts (`dict`, *optional*):
            By task, its system prompt (an empty one leaves the system turn out) or a mapping of `TttTask`'s arguments,
            replacing those of the default tasks. Tasks of its own need neither audio nor text unless they say so:
            `{"translate": {"system_prompt": "Translate.", "needs_text": True}}`.
        num_codebooks (`int`, *optional*): codes of a frame; the audio tokenizer's, or 1 where there is none.

    Raises:
        TypeError: if `audio_tokenizer` is no audio codec of Transformers.
        ValueError: if the parts do not belong together, or a chunk size or task cannot be used.
    """

    valid_processor_kwargs = TttProcessorKwargs
    is_single_audio = staticmethod(is_single_audio)
    make_importable = staticmethod(make_importable)
    text_kwargs = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        audio_tokenizer=None,
        chat_template=None,
        text_chunk_size=13,
        audio_chunk_size=None,
        system_prompts=None,
        num_codebooks=None,
    ):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        make_importable(type(self))
        self.token_ids = TttTokenIds.from_tokenizer(tokenizer)
        self.audio_token, self.audio_token_id = AUDIO_PLACEHOLDER, self.token_ids.audio_token_id_start
        # Not through ProcessorMixin, whose own check knows a fixed list of audio tokenizers.
        self.audio_tokenizer = None
        self.num_codebooks = num_codebooks
        if audio_tokenizer is not None:
            self._attach(audio_tokenizer)
        self.num_codebooks = self.num_codebooks or 1
        self.text_chunk_size = text_chunk_size
        self.audio_chunk_size = self.audio_format.chunk_size if audio_chunk_size is None else audio_chunk_size
        if self.text_chunk_size < 1 or self.audio_chunk_size < 1:
            raise ValueError(
                "`text_chunk_size` and `audio_chunk_size` must be at least 1, "
                f"got {self.text_chunk_size} and {self.audio_chunk_size}."
            )
        if self.audio_chunk_size % self.num_codebooks:
            raise ValueError(
                f"`audio_chunk_size` is {self.audio_chunk_size}; it must be a multiple of the {self.num_codebooks} "
                "codebooks, so that a span ends with a whole frame."
            )
        defaults = default_tasks(self.text_chunk_size, self.audio_chunk_size)
        self.system_prompts = {name: task.system_prompt for name, task in defaults.items()}
        system_prompts = {} if system_prompts is None else system_prompts
        if not isinstance(system_prompts, Mapping) or not all(isinstance(name, str) for name in system_prompts):
            raise ValueError(f"`system_prompts` is {shorten(system_prompts)}; it must be a mapping by names of tasks.")
        for name, settings in system_prompts.items():
            self.system_prompts[name] = dataclasses.asdict(settings) if isinstance(settings, TttTask) else settings
            self.get_task(name)  # refuses settings that are none

    def _attach(self, audio_tokenizer: Any) -> None:
        rate = self.feature_extractor.sampling_rate
        audio_format = check_audio_tokenizer(audio_tokenizer, rate, self.token_ids.num_audio_codes)
        if self.num_codebooks not in (None, audio_format.num_codebooks):
            raise ValueError(
                f"The audio tokenizer has {audio_format.num_codebooks} codebooks, but the processor is one for "
                f"{self.num_codebooks}. Use the two that belong together."
            )
        self.audio_tokenizer, self.num_codebooks = audio_tokenizer, audio_format.num_codebooks
        for part in (audio_tokenizer, audio_tokenizer.config):
            make_importable(type(part))

    @property
    def audio_format(self) -> TttAudioFormat:
        """What the codes are. Without an audio tokenizer, what is known of them: rates are then `None`."""
        if self.audio_tokenizer is not None:
            return TttAudioFormat.from_config(self.audio_tokenizer.config)
        codebook_size = self.token_ids.num_audio_codes // self.num_codebooks
        return TttAudioFormat(self.num_codebooks, codebook_size, None, None, None)

    @property
    def sampling_rate(self) -> int:
        """Rate of the waveforms that come out, Hz. It may differ from the feature extractor's, of those that go in."""
        return self.audio_format.output_sampling_rate or self.feature_extractor.sampling_rate

    @property
    def tasks(self) -> list[str]:
        """Names accepted as `task`."""
        return list(self.system_prompts)

    def get_task(self, name: str) -> TttTask:
        """
        Return a task: its system prompt, and what a request of it needs.

        Raises:
            ValueError: if there is no such task.
        """
        if not isinstance(name, str):
            raise ValueError(f"`task` is {name!r}; it must be a string, the same for all of a batch.")
        if name not in self.system_prompts:
            raise ValueError(f"There is no task {name!r}; choose one of {', '.join(self.tasks)}.")
        default = default_tasks(self.text_chunk_size, self.audio_chunk_size).get(name)
        return resolve_task(name, self.system_prompts[name], default)

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns, unless asked for more."""
        return ["input_ids", "attention_mask"]

    @property
    def audio_token_ids(self) -> list[int]:
        """Ids of the codes, which `return_mm_token_type_ids` marks as audio."""
        start = self.token_ids.audio_code_id_start
        return list(range(start, start + self.token_ids.num_audio_codes))

    # ------------------------------------------------------------------ prompts

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any | None = None,
        *,
        task: str | None = None,
        system_prompt: str | None = None,
        **kwargs: Unpack[TttProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepare prompts for `generate`, from speech, text or both; conversations go through `apply_chat_template`.

        With `task`, or without `text`, each item becomes one user turn of that task (`"spoken_chat"` by default). With
        `text` alone and no task, `text` is taken as a rendered prompt, whose placeholders (see `apply_chat_template`
        with `tokenize=False`) stand for the audios in order.

        Args:
            text (`str` or `list[str]`, *optional*): one text or a list.
            audio (`Any`, *optional*):
                One audio or a list, each in any form `load_waveform` takes (array, path, address, mapping, decoder) or
                already encoded, `{"audio_codes": ...}`.
            task (`str`, *optional*): one of `tasks`.
            system_prompt (`str`, *optional*): replaces the task's.
            kwargs (`TttProcessorKwargs`, *optional*):
                The usual options of a tokenizer's call (`padding`, `padding_side`, `truncation`, `max_length`,
                `pad_to_multiple_of`, `return_tensors`, `return_offsets_mapping` and the like), flat or as
                `text_kwargs`; `sampling_rate` (Hz) of samples that bring none, flat or in `audio_kwargs`;
                `return_mm_token_type_ids`, which are 3 at codes. By default prompts are padded on the left.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask`, each of shape `(batch, length)`, and what was asked for.

        Raises:
            TypeError: if there is no such option.
            ValueError: if the task is unknown, input it needs is missing or one it cannot use is given, an audio cannot
                be used, or an option cannot be met; the message names the item or option.
        """
        check_options(kwargs)
        if text is None and audio is None:
            raise ValueError("Pass `text`, `audio` or both.")
        texts = None if text is None else self._check_texts(text)
        if texts is None or task is not None:
            requests = self._requests(task or "spoken_chat", texts, audio, system_prompt)
            return self.apply_chat_template(
                requests,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                names=[f"item {index}" for index in range(len(requests))],
                processor_kwargs=kwargs,
            )
        if system_prompt is not None:
            raise ValueError("`system_prompt` goes with a `task`; without one, `text` is a whole prompt.")
        for rendered in texts:
            if os.path.isfile(rendered):
                raise ValueError(f"`text` is {shorten(rendered)}, the name of a file: give a recording as `audio=`.")
        # Its padding side is a tokenizer's own affair: a batch of prompts is padded on the left.
        init_kwargs = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        options = self._merge_kwargs(tokenizer_init_kwargs=init_kwargs, **kwargs)
        codes = iter(self._encode_list(audio, options["audio_kwargs"].get("sampling_rate")))
        encodings = [
            self._encoder.encode(
                rendered,
                codes,
                f"text {index}",
                return_offsets=bool(options["text_kwargs"].get("return_offsets_mapping")),
                sanitize_control_tokens=bool(options["text_kwargs"].get("sanitize_control_tokens")),
            )
            for index, rendered in enumerate(texts)
        ]
        check_all_used(codes, "text")
        return self._batch(encodings, options)

    def build_messages(
        self,
        task: str = "spoken_chat",
        text: str | None = None,
        audio: Any | None = None,
        audio_codes: Any | None = None,
        system_prompt: str | None = None,
    ) -> list[dict[str, Any]]:
        """
        Return the chat messages of one request: the task's system prompt, then a user turn with its text before its
        audio.

        Args:
            task (`str`, *optional*, defaults to `"spoken_chat"`): one of `tasks`.
            text (`str`, *optional*): the user's text; captioning has a default.
            audio (`Any`, *optional*): the user's audio, in any form.
            audio_codes (`Sequence[int]` of shape `(codes,)`, *optional*): the same, already encoded.
            system_prompt (`str`, *optional*): replaces the task's.

        Raises:
            ValueError: if the task is unknown, or input it needs is missing or one it cannot use is given.
        """
        settings = self.get_task(task)
        has_audio = audio is not None or audio_codes is not None
        text = text if text is not None else settings.default_text
        if settings.needs_audio and not has_audio:
            raise ValueError(f"The task {task!r} needs `audio`.")
        if settings.needs_text and not text:
            raise ValueError(f"The task {task!r} needs `text`.")
        if settings.takes_text_alone and has_audio:
            raise ValueError(f"The task {task!r} takes `text` alone; leave `audio` out or choose another task.")
        if not text and not has_audio:
            raise ValueError(f"The task {task!r} needs `text` or `audio`.")
        content: list[dict[str, Any]] = []
        if text:
            content.append({"type": "text", "text": text})
        if audio_codes is not None:
            content.append({"type": "audio", "audio_codes": audio_codes})
        elif audio is not None:
            content.append({"type": "audio", **(audio if isinstance(audio, Mapping) else {"audio": audio})})
        return [*self._system_turn(task, system_prompt), {"role": "user", "content": content}]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        audio: Any | None = None,
        sampling_rate: float | None = None,
        task: str | None = None,
        system_prompt: str | None = None,
        names: Sequence[str] | None = None,
        max_audio_codes: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Write one conversation or a batch of them as a prompt, as `ProcessorMixin.apply_chat_template` does.

        A message's content is a string or a list of parts: `{"type": "text", "text": ...}`, and `{"type": "audio"}`
        with the audio in one of the forms of a mapping that `load_waveform` takes (under `audio`, `path`, `url` or
        `array` with `sampling_rate`, ...), or its codes under `audio_codes`; parts that bring nothing take the items of
        `audio` in order. An assistant's turn holds its text and at most one audio, which are interleaved as the model
        itself writes them, or a string in which they are already.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): messages, or a batch of lists of messages.
            chat_template (`str`, *optional*): a template or the name of one, instead of the processor's own.
            tokenize (`bool`, *optional*, defaults to `False`):
                Otherwise the rendered text is returned, with a placeholder for each audio.
            audio (`Any`, *optional*): one audio or a list, for the audio parts that bring none.
            sampling_rate (`float`, *optional*): of samples that bring none of their own, Hz.
            task (`str`, *optional*): where a conversation does not begin with a system turn, give it this task's.
            system_prompt (`str`, *optional*): replaces the task's.
            names (`Sequence[str]`, *optional*): how errors call the conversations; "conversation 0" and so on.
            max_audio_codes (`int`, *optional*):
                Refuse an audio that becomes more codes, such as more than the model has positions, before it is
                encoded: that takes time and memory.
            processor_kwargs (`dict`, *optional*): options of the call that `tokenize` makes, see `__call__`.
            kwargs (`dict`, *optional*):
                `add_generation_prompt`, `continue_final_message`, `return_dict`, `return_assistant_tokens_mask` (the
                key is `assistant_masks`), `return_tensors` and `sanitize_control_tokens`, as Transformers has them;
                variables of the template; and options of the call, which belong in `processor_kwargs`.

        Returns:
            `str`, or with `tokenize` a tensor of ids of shape `(batch, length)`, or with `return_dict` what a call
            returns. A list of texts for a batch.

        Raises:
            TypeError: if there is no such option, and the template has no such variable.
            ValueError: if there are more audio parts than audios or the reverse, an audio cannot be used, or a message
                does not have the form of one.
        """
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"`conversation` is {shorten(conversation)}; pass a list of messages, or a list of such.")
        if task is not None:
            self.get_task(task)  # refuses one that there is not, needed or not
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations = [list(messages) for messages in (conversation if batched else [conversation])]
        names = names or [f"conversation {index}" for index in range(len(conversations))]
        template = self._resolve_chat_template(chat_template)
        for index, (messages, name) in enumerate(zip(conversations, names, strict=True)):
            allow_placeholders = not tokenize or bool(kwargs.get("sanitize_control_tokens"))
            check_messages(messages, name, template, allow_placeholders)
            if (task is not None or system_prompt is not None) and messages[0]["role"] != "system":
                conversations[index] = [*self._system_turn(task or "spoken_chat", system_prompt), *messages]
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in template:
                raise ValueError(f"`{name}` is given, but the chat template does not know it; leave it out.")
        if kwargs.get("load_audio_from_video"):
            raise ValueError("`load_audio_from_video` is True, but TttProcessor takes no video; pass it as audio.")
        if kwargs.get("continue_final_message"):
            for messages, name in zip(conversations, names, strict=True):
                content = messages[-1]["content"]
                if not isinstance(content, str) and content and content[-1]["type"] == "audio":
                    raise ValueError(
                        f"`continue_final_message` goes on with a text, but the last message of {name} ends with audio."
                    )
        if audio is not None and not tokenize:
            raise ValueError("`audio` is encoded where `tokenize=True`; without, the text has only its placeholders.")
        processor_kwargs = processor_kwargs or {}
        parts: Iterator[dict[str, Any]] = itertools.repeat({"type": "audio"})  # all that a template sees of them
        if tokenize:
            given = {**processor_kwargs, **processor_kwargs.get("audio_kwargs", {})}
            rate = given.get("sampling_rate") if sampling_rate is None else sampling_rate
            codes = self._encode(name_audio_parts(conversations, names), audio, rate, max_audio_codes=max_audio_codes)
            parts = iter([{"type": "audio", "audio": {"audio_codes": row}} for row in codes])
        conversations = [replace_audio_parts(messages, parts) for messages in conversations]
        return super().apply_chat_template(
            conversations if batched else conversations[0],
            chat_template,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    # ------------------------------------------------------------------ training examples

    def build_response(self, text: str, audio_codes: Any | None = None) -> list[int]:
        """
        Return the ids of an answer: its text and codes interleaved, `<|im_end|>` at the end.

        Args:
            text (`str`): what it says.
            audio_codes (`Sequence[int]` of shape `(codes,)`, *optional*): its speech; a written answer has none.
        """
        return self._encoder.response(text, [] if audio_codes is None else audio_codes)

    def build_example(
        self,
        response_text: str,
        response_codes: Any | None = None,
        *,
        task: str = "spoken_chat",
        text: str | None = None,
        audio: Any | None = None,
        audio_codes: Any | None = None,
        system_prompt: str | None = None,
    ) -> dict[str, list[int]]:
        """
        Return a training example of one request and its answer. With codes throughout, no audio tokenizer is needed.

        Args:
            response_text (`str`): what the answer says.
            response_codes (`Sequence[int]` of shape `(codes,)`, *optional*): its speech; a written answer has none.
            task, text, audio, audio_codes, system_prompt: the request, as `build_messages` takes it.

        Returns:
            `dict[str, list[int]]`: `input_ids`, and `labels` that are -100 on the prompt.
        """
        answer: list[dict[str, Any]] = [{"type": "text", "text": response_text}]
        if response_codes is not None and len(response_codes) > 0:
            answer.append({"type": "audio", "audio_codes": response_codes})
        request = self.build_messages(task, text, audio, audio_codes, system_prompt)
        return self.build_conversation_example([*request, {"role": "assistant", "content": answer}])

    def build_conversation_example(self, messages: list[dict[str, Any]]) -> dict[str, list[int]]:
        """
        Return a training example of a whole conversation, in which every assistant turn is scored.

        Args:
            messages (`list[dict]`): as `apply_chat_template` takes them.

        Returns:
            `dict[str, list[int]]`: `input_ids`, and `labels` that are -100 on what others than the assistant say.
        """
        rendered = self.apply_chat_template(messages)
        codes = self._encode(name_audio_parts([messages], ["conversation"]), None, None)
        encoding = self._encoder.encode(rendered, iter(codes), "conversation")
        ids, scored = encoding.ids, encoding.scored
        while scored and not scored[-1] and messages[-1]["role"] == "assistant":
            ids.pop()  # the line break the template writes after the last turn
            scored.pop()
        return {"input_ids": ids, "labels": [i if s else -100 for i, s in zip(ids, scored, strict=True)]}

    # ------------------------------------------------------------------ audio and codes

    def encode_audio(self, audio: Any, sampling_rate: float | None = None, batch_size: int = 16) -> list[torch.Tensor]:
        """
        Turn audio into codes. Those of several codebooks come as one stream, frame by frame; `unflatten_codes` gives
        them back as the audio tokenizer has them.

        Args:
            audio (`Any`): one audio or any iterable of them, each in any form `load_waveform` takes.
            sampling_rate (`float`, *optional*): of samples that bring none of their own, Hz.
            batch_size (`int`, *optional*, defaults to 16): audios encoded at once.

        Returns:
            `list[torch.Tensor]`, each of shape `(codes,)`, long, on the CPU.

        Raises:
            ValueError: if an audio cannot be used; the message names it by its position. Or if `batch_size` is no
                number of audios.
        """
        _check_batch_size(batch_size)
        return self._encode_list(audio, sampling_rate, batch_size)

    def decode_audio(self, audio_codes: Any, batch_size: int = 16) -> list[np.ndarray]:
        """
        Turn codes into waveforms.

        Args:
            audio_codes (`Sequence[int]` of shape `(codes,)`, or a list of them):
                Empty ones give empty waveforms. Of several codebooks, an incomplete last frame is left out, and a code
                at another codebook's position is replaced by that of the frame before, as a model may generate both;
                see `unflatten_codes`.
            batch_size (`int`, *optional*, defaults to 16): sequences decoded at once.

        Returns:
            `list[np.ndarray]`, each of shape `(samples,)`, float32, at `sampling_rate`.

        Raises:
            ValueError: if a code is outside the codebook; the message names the sequence and position. Or if
                `batch_size` is no number of sequences.
        """
        _check_batch_size(batch_size)
        single = len(audio_codes) > 0 and np.ndim(audio_codes[0]) == 0
        sequences = [to_list(codes) for codes in ([audio_codes] if single else audio_codes)]
        for index, codes in enumerate(sequences):
            self.token_ids.codes_to_ids(codes, name=f"audio_codes {index}")
        if not any(sequences):
            return [np.zeros(0, dtype=np.float32) for _ in sequences]
        return decode_codes(self._require_audio_tokenizer(), sequences, batch_size)

    def flatten_codes(self, codes: Any) -> torch.Tensor:
        """Return codes of shape `(codebooks, frames)`, as the audio tokenizer has them, as one stream `(codes,)`."""
        return flatten_codes(codes, self.audio_format.codebook_size)

    def unflatten_codes(self, audio_codes: Any) -> torch.Tensor:
        """Return a stream of codes of shape `(codes,)` as `(codebooks, frames)`; the inverse of `flatten_codes`."""
        return unflatten_codes(audio_codes, self.num_codebooks, self.audio_format.codebook_size)

    def _require_audio_tokenizer(self) -> Any:
        if self.audio_tokenizer is None:
            raise ValueError(
                "This processor has no audio tokenizer, so it takes and gives codes only. Load it from a folder with "
                f"`{AUDIO_TOKENIZER_FOLDER}/`, or pass `audio_tokenizer`."
            )
        return self.audio_tokenizer

    # ------------------------------------------------------------------ answers

    def post_process(
        self, generated_ids: Any, prompt_length: int = 0, decode_audio: bool = True
    ) -> list[dict[str, Any]]:
        """
        Return what `generate` gave, as text and speech. An answer cut off anywhere gives the whole frames it holds.

        Args:
            generated_ids (`torch.Tensor` of shape `(batch, length)` or `(length,)`, or a list of rows): prompt first.
            prompt_length (`int`, *optional*, defaults to 0):
                Ids of the prompt, padding included: `inputs["input_ids"].shape[1]`.
            decode_audio (`bool`, *optional*, defaults to `True`):
                Otherwise the waveforms are left out, for those who only want text and codes.

        Returns:
            `list[dict]`: for each row `text`, `audio_codes` (a long tensor of shape `(codes,)`), `audio` (a float32
            array of shape `(samples,)`, empty for an answer without speech, or `None`) and `sampling_rate` (Hz).

        Raises:
            ValueError: if `generated_ids` are no rows of integers, or `prompt_length` is below 0.
        """
        generated_ids = getattr(generated_ids, "sequences", generated_ids)
        if prompt_length < 0:
            raise ValueError(f"`prompt_length` is {prompt_length}; use 0 or more.")
        if len(generated_ids) > 0 and np.ndim(generated_ids[0]) == 0:
            generated_ids = [generated_ids]
        answers = []
        for index, row in enumerate(generated_ids):
            ids = to_list(row)
            if not all(isinstance(token_id, (int, np.integer)) for token_id in ids):
                raise ValueError(
                    f"Row {index} of `generated_ids` is {shorten(row)}; pass token ids, which are integers, of shape "
                    "(batch, length) or (length,)."
                )
            text_ids, codes = deinterleave(ids[prompt_length:], self.token_ids, self.num_codebooks)
            text = self.tokenizer.decode(text_ids, skip_special_tokens=True) if text_ids else ""
            answers.append({"text": text, "audio_codes": torch.tensor(codes, dtype=torch.long), "audio": None})
        if decode_audio:
            waveforms = self.decode_audio([answer["audio_codes"] for answer in answers])
            for answer, waveform in zip(answers, waveforms, strict=True):
                answer["audio"] = waveform
        return [{**answer, "sampling_rate": self.sampling_rate} for answer in answers]

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Return text or speech of what `generate` gave, as `pipeline("any-to-any")` wants it; `post_process` gives both.

        Args:
            generated_outputs (`torch.Tensor` of shape `(batch, length)`): prompt first.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): of the text.
            generation_mode (`str`, *optional*):
                "text", the default, gives texts, prompts included; "audio" the speech of each row's last turn.
            kwargs: passed to the tokenizer's `decode`, for text.

        Returns:
            `list[str]`, or `list[np.ndarray]`, each of shape `(samples,)`, float32, at `sampling_rate`.

        Raises:
            ValueError: if `generation_mode` is another.
        """
        if generation_mode != "audio":
            return super().post_process_multimodal_output(
                generated_outputs, skip_special_tokens, generation_mode=generation_mode, **kwargs
            )
        start = self.tokenizer.convert_tokens_to_ids(START_OF_TURN)
        rows = [to_list(row) for row in generated_outputs]
        answers = [row[len(row) - row[::-1].index(start) :] if start in row else row for row in rows]
        return [answer["audio"] for answer in self.post_process(answers)]

    def streamer(self, timeout: float | None = None) -> TttStreamer:
        """Return a streamer for `generate(streamer=...)`, which yields pieces of text and waveform: `TttStreamer`."""
        return TttStreamer(self.tokenizer, self.token_ids, self.audio_tokenizer, self.sampling_rate, timeout=timeout)

    # ------------------------------------------------------------------ saving and loading

    def __repr__(self) -> str:
        """As any processor's, but for the tokenizer's list of a token for each code, and with the audio tokenizer."""
        codec = self.audio_tokenizer
        lines = [
            f"- tokenizer: {type(self.tokenizer).__name__} of {len(self.tokenizer)} tokens, "
            f"{self.token_ids.num_audio_codes} of them codes",
            f"- audio_tokenizer: {codec if codec is None else f'{type(codec).__name__} in {codec.dtype}'}",
        ]
        return "\n".join([f"{type(self).__name__}:", *lines, "", self.to_json_string()])

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's own settings; the audio tokenizer is saved beside them, not in them."""
        settings = copy.copy(self)
        for name in ("audio_tokenizer", "token_ids"):
            settings.__dict__.pop(name, None)
        folder = None if self.audio_tokenizer is None else AUDIO_TOKENIZER_FOLDER
        return super(TttProcessor, settings).to_dict() | {"audio_tokenizer_folder": folder}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """
        Save the tokenizer and the settings, and the audio tokenizer in the subfolder `audio_tokenizer`.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; made if missing.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Upload everything to `repo_id` (by default the folder's name), with `commit_message`, `token`, `private`
                and the like as `push_to_hub` takes them.

        Returns:
            `list[str]`: the settings file, as `ProcessorMixin.save_pretrained` does.
        """
        save_directory = os.fspath(save_directory)
        files = super().save_pretrained(save_directory)
        if self.audio_tokenizer is not None:
            write_audio_tokenizer(self.audio_tokenizer, save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory))), **kwargs)
        return files

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        audio_tokenizer: Any | None = None,
        load_audio_tokenizer: bool = True,
        trust_remote_code: bool | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> "TttProcessor":
        """
        Load a processor and its audio tokenizer from a folder or Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): the folder or Hub name.
            audio_tokenizer (`PreTrainedModel`, *optional*): use this one instead of the repository's.
            load_audio_tokenizer (`bool`, *optional*, defaults to `True`):
                Whether to load the repository's; without one, audio only comes as codes.
            trust_remote_code (`bool`, *optional*): allow the code in the repository to run.
            subfolder (`str`, *optional*, defaults to `""`): where in the repository the processor lies.
            kwargs (`dict`, *optional*):
                `revision`, `token`, `cache_dir` and the like; `dtype` and `device_map` are the audio tokenizer's
                (float32 by default, for "auto", and in a pipeline, whose `dtype` is the model's: codes and waveforms
                depend on its precision).

        Raises:
            OSError: if there is no processor_config.json, or an audio tokenizer that it names is not there.
            TypeError: if an option of the processor is misspelled.
        """
        check_spelling(kwargs, [*inspect.signature(cls.__init__).parameters, "load_audio_tokenizer"])
        located = {name: kwargs[name] for name in ("revision", *AUDIO_TOKENIZER_KWARGS) if name in kwargs}
        if located.get("dtype") in (None, "auto") or "_from_pipeline" in kwargs:  # a pipeline's is the model's
            located["dtype"] = torch.float32
        for name in ("dtype", "device_map"):
            kwargs.pop(name, None)
        if trust_remote_code is not None:
            kwargs["trust_remote_code"] = trust_remote_code
        # ProcessorMixin takes a missing file for an empty one: prompts would be others than the model was trained on.
        hub_options = {name: value for name, value in located.items() if name not in ("dtype", "device_map")}
        file = cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, subfolder=subfolder, **hub_options)
        processor = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if audio_tokenizer is None and load_audio_tokenizer:
            with open(file, encoding="utf-8") as reader:
                has_one = json.load(reader).get("audio_tokenizer_folder", AUDIO_TOKENIZER_FOLDER) is not None
            if has_one:
                audio_tokenizer = read_audio_tokenizer(
                    pretrained_model_name_or_path, subfolder, trust_remote_code=trust_remote_code, **located
                )
        if audio_tokenizer is not None:
            processor._attach(audio_tokenizer)
        return processor

    # ------------------------------------------------------------------ requests to messages

    def _system_turn(self, task: str, system_prompt: str | None) -> list[dict[str, Any]]:
        settings = self.get_task(task)
        prompt = settings.system_prompt if system_prompt is None else system_prompt
        return [{"role": "system", "content": prompt}] if prompt else []

    def _check_texts(self, text: Any) -> list[str]:
        texts = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        if not texts:
            raise ValueError("`text` is an empty list. Pass a text or more.")
        for index, item in enumerate(texts):
            if not isinstance(item, str):
                raise ValueError(f"text {index} is a {type(item).__name__}, not a string. Pass audio as `audio`.")
        return texts

    def _requests(
        self, task: str, texts: list[str] | None, audio: Any | None, system_prompt: str | None
    ) -> list[list[dict[str, Any]]]:
        """Return the messages of each request; one text or audio goes with all of several of the other."""
        audios = None if audio is None else list_audio(audio)
        size = max(len(texts or []), len(audios or []))
        if size == 0:
            raise ValueError("`audio` is an empty list. Pass an audio or more.")
        for name, values in (("text", texts), ("audio", audios)):
            if values is not None and len(values) not in (1, size):
                raise ValueError(f"`{name}` has {len(values)} items, but the other input has {size}.")
        for index, item in enumerate(audios or []):
            if item is None:
                raise ValueError(f"audio {index} is None, not audio. Leave the item out.")
        return [
            self.build_messages(
                task,
                text=None if texts is None else texts[index % len(texts)],
                audio=None if audios is None else audios[index % len(audios)],
                system_prompt=system_prompt,
            )
            for index in range(size)
        ]

    def _prepare_processor_kwargs(self, chat_template: str, processor_kwargs: dict, kwargs: dict, **flags: Any) -> dict:
        """Called by `ProcessorMixin.apply_chat_template`, whether or not it goes on to tokenize."""
        processor_kwargs = super()._prepare_processor_kwargs(chat_template, processor_kwargs, kwargs, **flags)
        check_options(processor_kwargs)
        return processor_kwargs

    # ------------------------------------------------------------------ from messages to ids

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes a copy: all but the texts that were tokenised."""
        return {name: value for name, value in self.__dict__.items() if name != "_cached_encoder"}

    @property
    def _encoder(self) -> ConversationEncoder:
        """Kept for the texts it has tokenised, made anew where the tokenizer has grown."""
        made_of = (self.tokenizer, len(self.tokenizer), self.text_chunk_size, self.audio_chunk_size)
        cached = self.__dict__.get("_cached_encoder")
        if cached is None or cached[0] != made_of:
            encoder = ConversationEncoder(self.tokenizer, self.token_ids, self.text_chunk_size, self.audio_chunk_size)
            cached = self._cached_encoder = (made_of, encoder)
        return cached[1]

    def _encode(
        self,
        parts: Sequence[tuple[Mapping[str, Any], str]],
        audio: Any,
        sampling_rate: Any,
        batch_size: int = 16,
        max_audio_codes: int | None = None,
    ) -> list[Any]:
        """Return the codes of every named audio part, in order; those that come as audio are encoded together."""
        codes, waveforms = read_audio_parts(parts, self.feature_extractor.sampling_rate, audio, sampling_rate)
        for position, (_, name) in enumerate(parts):
            if codes[position] is not None:  # refused here where they are none: later nobody knows where they are from
                ids = self.token_ids.codes_to_ids(codes[position], name)
                codes[position] = torch.tensor(ids, dtype=torch.long) - self.token_ids.audio_code_id_start
        if waveforms:
            names, arrays = [parts[position][1] for position in waveforms], list(waveforms.values())
            audio_tokenizer = self._require_audio_tokenizer()
            if max_audio_codes is not None and self.audio_format.frame_rate:
                codes_per_second = self.audio_format.frame_rate * self.num_codebooks
                for name, array in zip(names, arrays, strict=True):
                    seconds = len(array) / self.feature_extractor.sampling_rate
                    if seconds * codes_per_second > max_audio_codes:
                        raise ValueError(
                            f"{name} lasts {seconds:.1f} s, which become more than {max_audio_codes} codes. Pass less "
                            f"than {max_audio_codes / codes_per_second:.0f} s: prompt and answer take room, too."
                        )
            rows = encode_waveforms(audio_tokenizer, self.feature_extractor, arrays, batch_size, names)
            for position, row in zip(waveforms, rows, strict=True):
                codes[position] = row
        return codes

    def _encode_list(self, audio: Any, sampling_rate: Any, batch_size: int = 16) -> list[Any]:
        """Return the codes of one audio or several."""
        audios = list_audio(audio)
        return self._encode([({}, f"audio {i}") for i in range(len(audios))], audios, sampling_rate, batch_size)

    def _multimodal_inputs_from_conversations(self, conversations: list, *args: Any) -> tuple[list, list, list, dict]:
        """Called by `ProcessorMixin.apply_chat_template`; the parts hold codes by then."""
        return [], [], [part["audio"] for messages in conversations for part in audio_parts(messages)], {}

    def _adjust_assistant_masks_indices(self, processed_dict: BatchFeature, generation_indices: list) -> BatchFeature:
        """Called by `ProcessorMixin.apply_chat_template`. The masks have the form of the ids."""
        ids, offsets = processed_dict["input_ids"], processed_dict["offset_mapping"]
        processed_dict["offset_mapping"] = offsets if isinstance(offsets, list) else offsets.tolist()
        processed = super()._adjust_assistant_masks_indices(processed_dict, generation_indices)
        if not isinstance(ids, list):
            convert = torch.tensor if isinstance(ids, torch.Tensor) else np.array
            processed["assistant_masks"] = convert(processed["assistant_masks"])
        return processed

    def _batch(self, encodings: list[Encoding], options: Mapping[str, Any]) -> BatchFeature:
        """Cut and pad the rows as a tokenizer does, and return what was asked for."""
        text_kwargs = options["text_kwargs"]
        names = ("padding", "truncation", "max_length", "pad_to_multiple_of", "verbose")
        asked = {name: text_kwargs[name] for name in names if name in text_kwargs}
        padding, truncation, max_length, _ = self.tokenizer._get_padding_truncation_strategies(**asked)
        kept = slice(None)
        if truncation != TruncationStrategy.DO_NOT_TRUNCATE:
            kept = slice(max_length) if self.tokenizer.truncation_side == "right" else slice(-max_length, None)
        side = text_kwargs.get("padding_side") or self.text_kwargs["padding_side"]
        columns = {"input_ids": [encoding.ids[kept] for encoding in encodings]}
        if text_kwargs.get("return_special_tokens_mask"):
            special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            columns["special_tokens_mask"] = [[int(i in special) for i in row] for row in columns["input_ids"]]
        data = dict(
            self.tokenizer.pad(
                columns,
                padding=padding,
                max_length=max_length,
                padding_side=side,
                pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
                return_attention_mask=text_kwargs.get("return_attention_mask") is not False,
            )
        )
        rows = data["input_ids"]
        if text_kwargs.get("return_offsets_mapping"):
            offsets = [encoding.offsets[kept] for encoding in encodings]
            fillings = [[(0, 0)] * (len(row) - len(places)) for row, places in zip(rows, offsets, strict=True)]
            pairs = zip(*((fillings, offsets) if side == "left" else (offsets, fillings)), strict=True)
            data["offset_mapping"] = [first + second for first, second in pairs]
        if text_kwargs.get("return_length"):
            data["length"] = [len(row) for row in rows]
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(rows)
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))


def _check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; use an integer of at least 1.")


TttProcessor.register_for_auto_class()

__all__ = ["TttProcessor"]
