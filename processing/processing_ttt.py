"""TttProcessor, the one object between a user and the model. How its methods do their work lives beside it: prompts in
conversation_ttt.py, audio in audio_input_ttt.py and audio_codes_ttt.py, streams in streaming_ttt.py."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AUDIO_TOKENIZER_KWARGS, ProcessorMixin
from transformers.utils.hub import hf_api

from .audio_codes_ttt import decode_codes, encode_waveforms
from .audio_input_ttt import is_single_audio, load_waveform
from .audio_tokenizer_ttt import (
    AUDIO_TOKENIZER_FOLDER,
    check_audio_tokenizer,
    read_audio_tokenizer,
    write_audio_tokenizer,
)
from .codebooks_ttt import TttAudioFormat, flatten_codes, unflatten_codes
from .conversation_ttt import ConversationEncoder, check_all_used, read_audio_parts, render
from .interleaving_ttt import deinterleave
from .streaming_ttt import TttStreamer
from .tasks_ttt import CHAT_TEMPLATE, TASKS, check_messages, default_system_prompts
from .vocabulary_ttt import TttTokenIds, to_list


class TttProcessor(ProcessorMixin):
    """Everything between a user and `TttForConditionalGeneration`.

    Args:
        feature_extractor: prepares waveforms for the audio tokenizer, at the `sampling_rate` (Hz) that one takes.
        tokenizer: with the TtT special tokens and one token per code.
        audio_tokenizer: any Transformers audio codec with discrete codes, of one or several codebooks (see
            `TttAudioFormat` for how several become one stream of codes, which is what `audio_codes` are everywhere
            here). May be left out where audio only ever comes as codes, as in training.
        chat_template: Jinja template; audio parts are written as placeholders (see tasks_ttt.py for the default).
        text_chunk_size: text tokens between two spans of a response.
        audio_chunk_size: codes of such a span, a multiple of the codebooks. By default as many as last 2.08 s, in whole
            frames: the published 26 at 12.5 codes a second, 208 for eight codebooks at 12.5 frames, 104 for one at 50;
            26 frames where no audio tokenizer tells their rate. A good block is as long
            (`generation_config.audio_block_size`), or a part of it in whole frames.
        system_prompts: system prompt by task, replacing the defaults of `TASKS`; an empty one leaves the system turn
            out. May name tasks of its own.
        num_codebooks: codes of a frame; the audio tokenizer's, or 1 where there is none.

    Raises:
        TypeError: `audio_tokenizer` is no audio codec of Transformers.
        ValueError: the parts do not belong together, or a chunk size cannot be used.
    """

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
        self.token_ids = TttTokenIds.from_tokenizer(tokenizer)
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
        prompts = default_system_prompts(self.text_chunk_size, self.audio_chunk_size)
        self.system_prompts = prompts | dict(system_prompts or {})

    def _attach(self, audio_tokenizer: Any) -> None:
        rate = self.feature_extractor.sampling_rate
        audio_format = check_audio_tokenizer(audio_tokenizer, rate, self.token_ids.num_audio_codes)
        if self.num_codebooks not in (None, audio_format.num_codebooks):
            raise ValueError(
                f"The audio tokenizer has {audio_format.num_codebooks} codebooks, but the processor is one for "
                f"{self.num_codebooks}. Use the two that belong together."
            )
        self.audio_tokenizer, self.num_codebooks = audio_tokenizer, audio_format.num_codebooks

    @property
    def audio_format(self) -> TttAudioFormat:
        """What the codes are. Without an audio tokenizer, what is known of them: rates are then None."""
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

    # ------------------------------------------------------------------ prompts

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any | None = None,
        *,
        task: str | None = None,
        system_prompt: str | None = None,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prompts ready for `generate`, from speech, text or both; conversations go through `apply_chat_template`.

        With `task`, or without `text`, each item becomes one user turn of that task (`"spoken_chat"` by default). With
        `text` alone and no task, `text` is taken as a rendered prompt, whose placeholders (see `apply_chat_template`
        with `tokenize=False`) stand for the audios in order.

        Args:
            text: one text or a list.
            audio: one audio or a list, each in any form `load_waveform` takes (array, path, address, mapping, decoder).
            task: one of `tasks`.
            system_prompt: replaces the task's.
            sampling_rate: of arrays that bring none of their own, Hz; the feature extractor's by default.
            padding_side: "left" for generation.

        Returns:
            `input_ids` and `attention_mask`, (batch, length).

        Raises:
            ValueError: an unknown task, input the task needs is missing or one it cannot use is given, or an audio
                that cannot be used; the message names the item.
        """
        if text is None and audio is None:
            raise ValueError("Pass `text`, `audio` or both.")
        texts = None if text is None else self._check_texts(text)
        if task is None and texts is not None:
            codes = iter([] if audio is None else self.encode_audio(audio, sampling_rate))
            rows = [self._encoder.encode(rendered, codes, f"text {index}")[0] for index, rendered in enumerate(texts)]
            check_all_used(codes, "text")
            return self._pad(rows, padding, padding_side, pad_to_multiple_of, return_tensors)
        audios = None if audio is None else self.encode_audio(audio, sampling_rate)
        size = max(len(texts or []), len(audios or []))
        if size == 0:
            raise ValueError("`audio` is an empty list. Pass an audio or more.")
        for name, values in (("text", texts), ("audio", audios)):
            if values is not None and len(values) not in (1, size):
                raise ValueError(f"`{name}` has {len(values)} items, but the other input has {size}.")
        conversations = [
            self.build_messages(
                task or "spoken_chat",
                text=None if texts is None else texts[index % len(texts)],
                audio_codes=None if audios is None else audios[index % len(audios)],
                system_prompt=system_prompt,
            )
            for index in range(size)
        ]
        names = [f"item {index}" for index in range(size)]
        codes = self._encode_parts(conversations, names)
        rendered_prompts = [self._render(messages, None, True) for messages in conversations]
        rows = [
            self._encoder.encode(rendered, codes, name)[0]
            for rendered, name in zip(rendered_prompts, names, strict=True)
        ]
        return self._pad(rows, padding, padding_side, pad_to_multiple_of, return_tensors)

    def build_messages(
        self,
        task: str = "spoken_chat",
        text: str | None = None,
        audio: Any | None = None,
        audio_codes: Any | None = None,
        system_prompt: str | None = None,
    ) -> list[dict[str, Any]]:
        """The chat messages of one request: the task's system prompt, then a user turn with its text before its audio.

        Args:
            text: the user's text; captioning has a default.
            audio: the user's audio, in any form; or `audio_codes`, already encoded.
            system_prompt: replaces the task's.

        Raises:
            ValueError: an unknown task, or input the task needs is missing or it cannot use.
        """
        if task not in self.system_prompts:
            raise ValueError(f"There is no task {task!r}; choose one of {', '.join(self.tasks)}.")
        has_audio = audio is not None or audio_codes is not None
        spec = TASKS.get(task)
        if spec is not None:
            text = text if text is not None else spec.default_text
            if spec.needs_audio and not has_audio:
                raise ValueError(f"The task {task!r} needs `audio`.")
            if spec.needs_text and not text:
                raise ValueError(f"The task {task!r} needs `text`.")
            if spec.needs_text and has_audio:
                raise ValueError(f"The task {task!r} takes `text` alone; leave `audio` out or choose another task.")
        content: list[dict[str, Any]] = []
        if text:
            content.append({"type": "text", "text": text})
        if audio_codes is not None:
            content.append({"type": "audio", "audio_codes": audio_codes})
        elif audio is not None:
            content.append({"type": "audio", "audio": audio})
        return [*self._system_turn(task, system_prompt), {"role": "user", "content": content}]

    def _system_turn(self, task: str, system_prompt: str | None) -> list[dict[str, Any]]:
        prompt = self.system_prompts[task] if system_prompt is None else system_prompt
        return [{"role": "system", "content": prompt}] if prompt else []

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        audio: Any | None = None,
        sampling_rate: int | None = None,
        task: str | None = None,
        system_prompt: str | None = None,
        names: Sequence[str] | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
        **template_kwargs: Any,
    ) -> Any:
        """One conversation or a batch of them as a prompt.

        A message's content is a string or a list of parts: `{"type": "text", "text": ...}`, and `{"type": "audio"}`
        with the audio under `audio`, `path`, `url` or `array` (with `sampling_rate`), or its codes under
        `audio_codes`; parts that bring nothing take the items of `audio` in order. An assistant's turn holds its text
        and at most one audio, which are interleaved as the model itself writes them.

        Args:
            task: where a conversation does not begin with a system turn, give it this task's.
            system_prompt: replaces the task's.
            tokenize: False returns the rendered text, with a placeholder for each audio.
            names: how errors call the conversations; "conversation 0" and so on by default.
            template_kwargs: passed to the template.

        Returns:
            Rendered text; or ids (batch, length); or, with `return_dict`, `input_ids` and `attention_mask`. A list of
            texts for a batch.

        Raises:
            ValueError: more audio parts than audios or the reverse, or an audio that cannot be used.
        """
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations: list[list[dict[str, Any]]] = [list(m) for m in (conversation if batched else [conversation])]
        names = names or [f"conversation {index}" for index in range(len(conversations))]
        for index, messages in enumerate(conversations):
            check_messages(messages, names[index])
            if task is not None or system_prompt is not None:
                self._check_task(task)
                if messages[0]["role"] != "system":
                    conversations[index] = [*self._system_turn(task or "spoken_chat", system_prompt), *messages]
        rendered = [self._render(m, chat_template, add_generation_prompt, **template_kwargs) for m in conversations]
        if not tokenize:
            return rendered if batched else rendered[0]
        codes = self._encode_parts(conversations, names, audio, sampling_rate)
        rows = [self._encoder.encode(text, codes, name)[0] for text, name in zip(rendered, names, strict=True)]
        check_all_used(codes, "conversation")
        features = self._pad(rows, padding, padding_side, pad_to_multiple_of, return_tensors)
        return features if return_dict else features["input_ids"]

    # ------------------------------------------------------------------ training examples

    def build_response(self, text: str, audio_codes: Any | None = None) -> list[int]:
        """Ids of an answer: its text and codes interleaved, `<|im_end|>` at the end. No codes give a written answer."""
        return self._encoder.response(text, [] if audio_codes is None else audio_codes, ends=True)

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
        """A training example of one request and its answer: `input_ids`, and `labels` that are -100 on the prompt.

        `response_codes` are the answer's speech, None for a written answer; the request is given as to
        `build_messages`. With codes throughout, no audio tokenizer is needed.
        """
        answer: list[dict[str, Any]] = [{"type": "text", "text": response_text}]
        if response_codes is not None and len(response_codes) > 0:
            answer.append({"type": "audio", "audio_codes": response_codes})
        request = self.build_messages(task, text, audio, audio_codes, system_prompt)
        return self.build_conversation_example([*request, {"role": "assistant", "content": answer}])

    def build_conversation_example(self, messages: list[dict[str, Any]]) -> dict[str, list[int]]:
        """A training example of a whole conversation, in which every assistant turn is scored."""
        check_messages(messages, "conversation")
        codes = self._encode_parts([messages], ["conversation"])
        ids, scored = self._encoder.encode(self._render(messages, None, False), codes, "conversation")
        while scored and not scored[-1] and messages[-1]["role"] == "assistant":
            ids.pop()  # the line break the template writes after the last turn
            scored.pop()
        return {"input_ids": ids, "labels": [i if s else -100 for i, s in zip(ids, scored, strict=True)]}

    # ------------------------------------------------------------------ audio and codes

    def encode_audio(self, audio: Any, sampling_rate: int | None = None, batch_size: int = 16) -> list[torch.Tensor]:
        """Audios to codes.

        Codes of several codebooks come as one stream, frame by frame; `unflatten_codes` gives them back as the audio
        tokenizer has them.

        Args:
            audio: one audio or any iterable of them, each in any form `load_waveform` takes.
            sampling_rate: of arrays that bring none of their own, Hz.
            batch_size: audios encoded at once.

        Returns:
            One (codes,) long tensor per audio, on the CPU.

        Raises:
            ValueError: an audio that cannot be used; the message names it by its position.
        """
        rate = self.feature_extractor.sampling_rate
        audios = [audio] if is_single_audio(audio) else list(audio)
        waveforms = [load_waveform(item, rate, sampling_rate, f"audio {i}") for i, item in enumerate(audios)]
        return encode_waveforms(self._require_audio_tokenizer(), self.feature_extractor, waveforms, batch_size)

    def decode_audio(self, audio_codes: Any, batch_size: int = 16) -> list[np.ndarray]:
        """Codes to waveforms.

        Args:
            audio_codes: one sequence of codes or a list of them; empty ones give empty waveforms. Of several codebooks,
                an incomplete last frame is left out, and a code at another codebook's position is replaced by that of
                the frame before, as a model may generate both; see `unflatten_codes`.

        Returns:
            One (samples,) float32 array per sequence, at `sampling_rate`.

        Raises:
            ValueError: a code outside the codebook; the message names the sequence and position.
        """
        single = len(audio_codes) > 0 and np.ndim(audio_codes[0]) == 0
        sequences = [to_list(codes) for codes in ([audio_codes] if single else audio_codes)]
        for index, codes in enumerate(sequences):
            self.token_ids.codes_to_ids(codes, name=f"audio_codes {index}")
        if not any(sequences):
            return [np.zeros(0, dtype=np.float32) for _ in sequences]
        return decode_codes(self._require_audio_tokenizer(), sequences, batch_size)

    def flatten_codes(self, codes: Any) -> torch.Tensor:
        """Codes as the audio tokenizer has them, (codebooks, frames), as one stream (codes,) long."""
        return flatten_codes(codes, self.audio_format.codebook_size)

    def unflatten_codes(self, audio_codes: Any) -> torch.Tensor:
        """A stream of codes (codes,) as the audio tokenizer has them, (codebooks, frames) long; the exact inverse."""
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
        """What `generate` returned, as text and speech. An answer cut off anywhere gives the whole frames it holds.

        Args:
            generated_ids: (batch, length), (length,) or a list of rows, the prompt first.
            prompt_length: ids of the prompt, padding included: `inputs["input_ids"].shape[1]`.
            decode_audio: False leaves the waveforms out, for those who only want text and codes.

        Returns:
            For each row `{"text": str, "audio_codes": (codes,) long tensor, "audio": (samples,) float32 array or None,
            "sampling_rate": int}`; the waveform of an answer without speech is empty.
        """
        generated_ids = getattr(generated_ids, "sequences", generated_ids)
        if len(generated_ids) > 0 and np.ndim(generated_ids[0]) == 0:
            generated_ids = [generated_ids]
        answers = []
        for row in generated_ids:
            text_ids, codes = deinterleave(to_list(row)[prompt_length:], self.token_ids, self.num_codebooks)
            text = self.tokenizer.decode(text_ids, skip_special_tokens=True) if text_ids else ""
            answers.append({"text": text, "audio_codes": torch.tensor(codes, dtype=torch.long), "audio": None})
        if decode_audio:
            waveforms = self.decode_audio([answer["audio_codes"] for answer in answers])
            for answer, waveform in zip(answers, waveforms, strict=True):
                answer["audio"] = waveform
        return [{**answer, "sampling_rate": self.sampling_rate} for answer in answers]

    def streamer(self, timeout: float | None = None) -> TttStreamer:
        """A streamer for `generate(streamer=...)`, which yields pieces of text and waveform; see `TttStreamer`."""
        return TttStreamer(self.tokenizer, self.token_ids, self.audio_tokenizer, self.sampling_rate, timeout=timeout)

    # ------------------------------------------------------------------ saving and loading

    def to_dict(self) -> dict[str, Any]:
        """The processor's own settings; the audio tokenizer is saved beside them, not in them."""
        settings = copy.copy(self)
        settings.__dict__.pop("audio_tokenizer", None)
        settings.__dict__.pop("token_ids", None)
        return super(TttProcessor, settings).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the tokenizer and the settings, and the audio tokenizer in the subfolder `audio_tokenizer`.

        Args:
            push_to_hub: upload everything to `repo_id` (by default the folder's name), `commit_message`, `token`,
                `private` and the like are taken from `kwargs`.

        Returns:
            The settings file, as `ProcessorMixin.save_pretrained` does.
        """
        save_directory = os.fspath(save_directory)
        os.makedirs(save_directory, exist_ok=True)
        if push_to_hub:
            commit_message = kwargs.pop("commit_message", None)
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            repo_id = hf_api().create_repo(repo_id, exist_ok=True, **kwargs).repo_id
            timestamps = self._get_files_timestamps(save_directory)
        files = super().save_pretrained(save_directory)
        if self.audio_tokenizer is not None:
            write_audio_tokenizer(self.audio_tokenizer, save_directory)
        if push_to_hub:
            # The folder's own time stamp does not tell which of its files changed: send it whole.
            timestamps.pop(AUDIO_TOKENIZER_FOLDER, None)
            self._upload_modified_files(
                save_directory, repo_id, timestamps, commit_message=commit_message, token=kwargs.get("token")
            )
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
    ) -> TttProcessor:
        """Loads a processor and its audio tokenizer from a folder or Hub repository.

        Args:
            audio_tokenizer: use this one instead of the repository's.
            load_audio_tokenizer: False leaves it out, where audio only comes as codes.
            trust_remote_code: allow the code in the repository to run.
            kwargs: `revision`, `token`, `cache_dir` and the like; `dtype` and `device_map` are the audio tokenizer's
                (float32 by default and for "auto": codes and waveforms depend on its precision).
        """
        located = {name: kwargs[name] for name in ("revision", *AUDIO_TOKENIZER_KWARGS) if name in kwargs}
        if located.get("dtype") in (None, "auto"):
            located["dtype"] = torch.float32
        for name in ("dtype", "device_map"):
            kwargs.pop(name, None)
        if trust_remote_code is not None:
            kwargs["trust_remote_code"] = trust_remote_code
        processor = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if audio_tokenizer is None and load_audio_tokenizer:
            audio_tokenizer = read_audio_tokenizer(
                pretrained_model_name_or_path, subfolder, trust_remote_code=trust_remote_code, **located
            )
        if audio_tokenizer is not None:
            processor._attach(audio_tokenizer)
        return processor

    # ------------------------------------------------------------------ from messages to ids

    def _check_task(self, task: str | None) -> None:
        if task is not None and task not in self.system_prompts:
            raise ValueError(f"There is no task {task!r}; choose one of {', '.join(self.tasks)}.")

    def _check_texts(self, text: Any) -> list[str]:
        texts = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        if not texts:
            raise ValueError("`text` is an empty list. Pass a text or more.")
        for index, item in enumerate(texts):
            if not isinstance(item, str):
                raise ValueError(f"text {index} is a {type(item).__name__}, not a string. Pass audio as `audio`.")
        return texts

    @property
    def _encoder(self) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer, self.token_ids, self.text_chunk_size, self.audio_chunk_size)

    def _encode_parts(
        self,
        conversations: list[list[dict[str, Any]]],
        names: Sequence[str],
        audio: Any | None = None,
        sampling_rate: int | None = None,
    ) -> Iterator[Any]:
        """Codes of every audio part, in order; those that come as audio are encoded together."""
        rate = self.feature_extractor.sampling_rate
        codes, waveforms = read_audio_parts(conversations, names, rate, audio, sampling_rate)
        if waveforms:
            for position, row in zip(waveforms, self.encode_audio(list(waveforms.values())), strict=True):
                codes[position] = row
        return iter(codes)

    def _render(
        self, messages: list[dict[str, Any]], chat_template: str | None, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        template = self._resolve_chat_template(chat_template)
        return render(messages, template, add_generation_prompt, **{**self.tokenizer.special_tokens_map, **kwargs})

    def _pad(
        self,
        rows: list[list[int]],
        padding: bool | str,
        padding_side: str,
        pad_to_multiple_of: int | None,
        return_tensors: str | None,
    ) -> BatchFeature:
        features = self.tokenizer.pad(
            {"input_ids": rows},
            padding=padding,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        return BatchFeature(dict(features), tensor_type=return_tensors)


TttProcessor.register_for_auto_class()

__all__ = ["TttProcessor"]
