"""TttAudioToAudioPipeline: requests in, `{"text", "audio", "sampling_rate"}` out, whole or as a stream. What a request
becomes in tokens, and tokens in speech, is the processor's business."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import Pipeline, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

ARGUMENTS: dict[str, tuple[type, str]] = {
    "text": (str, "a string"),
    "task": (str, "a string"),
    "stream": (bool, "True or False"),
    "batch_size": (Integral, "an integer"),
    "num_workers": (Integral, "an integer"),
    "system_prompt": (str, "a string"),
    "sampling_rate": (Real, "a number, in Hz"),
    "generate_kwargs": (Mapping, "a mapping of options to values"),
}


class TttAudioToAudioPipeline(Pipeline):
    """
    `pipeline("audio-to-audio", model=..., trust_remote_code=True)`.

    ```python
    pipe("question.wav")                                           # {"text", "audio", "sampling_rate"}
    pipe(["a.wav", "b.wav"], batch_size=2)                         # a list of them
    pipe("read this aloud", task="tts")
    pipe("song.wav", task="captioning", text="Which instrument is this?")
    pipe([{"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]}])
    for piece in pipe("question.wav", stream=True): ...            # {"text"} or {"audio", "sampling_rate"}
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _pipeline_calls_generate = True

    def __init__(self, *args: Any, **kwargs: Any):
        for name in ("tokenizer", "feature_extractor"):
            if isinstance(kwargs.get(name), (str, os.PathLike, tuple)):
                raise ValueError(
                    f"`{name}` is {kwargs[name]!r}, but the pipeline takes the processor's own: leave it out, and pass "
                    "`processor` where it is to be another than the model's."
                )
        model = kwargs.get("model", args[0] if args else None)
        if not hasattr(model, "prepare_call"):
            raise ValueError(
                f"`model` is a {type(model).__name__}, which writes no answers; pass a TttForConditionalGeneration."
            )
        super().__init__(*args, **kwargs)
        self._check_batch_size(self._batch_size)
        if self._generate_kwargs or self._forward_params:  # else the call may still override the checkpoint's
            self._check_options(self._forward_params)
        if getattr(self.processor, "audio_tokenizer", None) is None:
            raise ValueError(
                "The pipeline needs a processor with an audio tokenizer. Leave `processor` out to have the model's own "
                "loaded, or load it with `AutoProcessor.from_pretrained(..., trust_remote_code=True)`."
            )
        self.processor.make_importable(type(self))
        # Weights on "meta" are offloaded: accelerate's hooks bring them to where they compute, and nothing else may.
        if all(parameter.device.type != "meta" for parameter in self.processor.audio_tokenizer.parameters()):
            self.processor.audio_tokenizer.to(self.device)

    def __call__(  # type: ignore[override]
        self,
        inputs: Any = None,
        *,
        text: str | None = None,
        task: str | None = None,
        stream: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Answer requests.

        Args:
            inputs (`Any`):
                One request; a list of them; or an iterable (generator, `datasets` dataset or column), answered as it is
                iterated over. A request is

                - audio in any form the processor takes: path, address, array, file in memory or opened, decoded
                  dataset item, mapping of samples and their rate such as an answer of this pipeline;
                - for a task that takes text alone ("tts", "text_chat"), the text;
                - a mapping of `text` and audio (`{"text": ..., "audio": ...}`), or of one of them;
                - a conversation: a list of messages, or `{"messages": [...]}`.

                Of a `datasets` dataset's rows, the column `audio` is taken (`text` for such a task), and its files are
                read by the processor, so that torchcodec is not needed.
            text (`str`, *optional*): text that goes with every audio of `inputs`; without `inputs`, the request itself.
            task (`str`, *optional*, defaults to `"spoken_chat"`, for text alone to `"text_chat"`):
                One of the processor's `tasks`. A conversation has no default: without a system turn of its own it is
                given that of the task that is named here, or none.
            stream (`bool`, *optional*, defaults to `False`):
                For one request, return an iterator over `{"text"}` and `{"audio", "sampling_rate"}` pieces, filled
                while the answer is generated.
            batch_size (`int`, *optional*, defaults to 1): requests answered at once.
            num_workers (`int`, *optional*): as every pipeline takes it; requests are prepared in this process.
            system_prompt (`str`, *optional*): replaces the task's.
            sampling_rate (`float`, *optional*): of samples that bring none of their own, Hz.
            generate_kwargs (`dict`, *optional*): options of `generate`, such as `{"audio_steps_per_block": 8}`.

        Returns:
            `dict`: `{"text": str, "audio": float32 array of shape (samples,), "sampling_rate": int}`; a list of them
            for a list, an iterator over them for any other iterable.

        Raises:
            TypeError: if an argument is unknown or of a wrong type.
            ValueError: if a request cannot be used; the message names it by its position. Its batch is then answered
                one by one, so that an iterator yields all answers before it, and the error of a list has them in its
                attribute `results`. Or if options make no sense: a `batch_size` below 1, several answers to a request.
        """
        _check_types(text=text, task=task, stream=stream, num_workers=num_workers)
        preprocess_params, forward_params, postprocess_params = self._sanitize_parameters(**kwargs)
        params = (
            {**self._preprocess_params, **preprocess_params, "task": task, "text": text},
            {**self._forward_params, **forward_params},
            {**self._postprocess_params, **postprocess_params},
        )
        self._check_batch_size(batch_size)
        batch_size = batch_size or self._batch_size or 1
        self._check_options(params[1])
        if stream and params[1].get("streamer") is not None:
            raise ValueError("`generate_kwargs` has a `streamer`, but `stream=True` brings its own; leave one out.")
        if inputs is None and text is None:
            raise ValueError("Pass a request, or `text`.")
        if isinstance(inputs, Mapping) and any(hasattr(split, "column_names") for split in inputs.values()):
            raise ValueError(
                f"The request is a {type(inputs).__name__} of several data sets: {', '.join(map(repr, inputs))}. Pass "
                "one of them."
            )
        if inputs is None or self._is_single(inputs):
            if stream:
                return self._stream(self.preprocess([inputs], **params[0]), params[1])
            return next(self._answer([inputs], 0, *params))
        if stream:
            raise ValueError("`stream=True` takes one request at a time; call the pipeline once for each.")
        answers = self._answer_all(inputs, batch_size, *params)
        return _to_list(answers) if isinstance(inputs, (list, tuple)) else answers

    def _sanitize_parameters(
        self,
        system_prompt: str | None = None,
        sampling_rate: float | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in unknown:
            if name in ARGUMENTS:
                raise TypeError(f"`{name}` belongs to a request: give it where the pipeline is called.")
            raise TypeError(f"There is no argument `{name}`; options of `generate` go into `generate_kwargs`.")
        _check_types(system_prompt=system_prompt, sampling_rate=sampling_rate, generate_kwargs=generate_kwargs)
        given = {"system_prompt": system_prompt, "sampling_rate": sampling_rate}
        preprocess_params = {name: value for name, value in given.items() if value is not None}
        return preprocess_params, dict(generate_kwargs or {}), {}

    def _check_batch_size(self, batch_size: int | None) -> None:
        _check_types(batch_size=batch_size)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; use 1 or more.")

    def _check_options(self, generate_kwargs: Mapping[str, Any]) -> None:
        """Refuse options that `generate` would refuse whatever the request, so that no request is blamed for them."""
        generate_kwargs = self._prepare_generate_kwargs(dict(generate_kwargs))
        several = self._get_set_generation_params(generate_kwargs).get("num_return_sequences") or 1
        if several > 1:
            raise ValueError(
                f"`num_return_sequences` is {several}, but a request gets one answer: pass it several times, or call "
                "the model's `generate`."
            )
        for name in ("inputs", "input_ids", "attention_mask", "labels"):
            if generate_kwargs.get(name) is not None:
                raise ValueError(f"`generate_kwargs` has `{name}`, which the request becomes; leave it out.")
        options = dict(generate_kwargs)
        self.model._prepare_generation_config(options.pop("generation_config", None), **options)
        if self.model.config.audio_objective == "diffusion":
            # These fit some requests, or numbers of them, and not others.
            for name in ("seed", "streamer", "past_key_values", "max_new_tokens", "max_length"):
                options.pop(name, None)
            token = torch.ones(1, 1, dtype=torch.long)
            config = generate_kwargs.get("generation_config")
            self.model.prepare_call(token, config, attention_mask=token, **options)

    def _answer_all(self, inputs: Iterable[Any], batch_size: int, *params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        column, first = "text" if self._takes_text_alone(params[0]["task"]) else "audio", 0
        for batch in _batches(_rows(inputs, column), batch_size):
            yield from self._answer(batch, first, *params)
            first += len(batch)

    def _answer(self, batch: list[Any], first: int, *params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answer a batch at once; where that fails, one by one, so that only what cannot be answered is not."""
        try:
            answers = self.run_single(batch, {**params[0], "first": first}, *params[1:])
        except Exception as error:
            if len(batch) == 1:
                _raise_named(error, f"input {first}")
            answers = None
        if answers is not None:
            yield from answers
        else:
            for position, request in enumerate(batch, first):
                yield from self._answer([request], position, *params)

    def preprocess(  # type: ignore[override]
        self,
        input_: list[Any],
        task: str | None = None,
        text: str | None = None,
        system_prompt: str | None = None,
        sampling_rate: float | None = None,
        first: int = 0,
    ) -> dict[str, Any]:
        """Write a batch of requests as left-padded ids; `first` is the position of the first of them among all."""
        names = [f"input {first + index}" for index in range(len(input_))]
        features = self.processor.apply_chat_template(
            [self._messages(request, task, text, system_prompt) for request in input_],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            task=task,
            system_prompt=system_prompt,
            sampling_rate=sampling_rate,
            names=names,
            max_audio_codes=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        return dict(features)

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        prompt_length = input_tensors["input_ids"].shape[1]
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        generated = self.model.generate(**input_tensors, **generate_kwargs)
        return {"generated_ids": getattr(generated, "sequences", generated), "prompt_length": prompt_length}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        answers = self.processor.post_process(model_outputs["generated_ids"], model_outputs["prompt_length"])
        return [{key: answer[key] for key in ("text", "audio", "sampling_rate")} for answer in answers]

    def _stream(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        streamer = self.processor.streamer()

        def generate() -> None:
            try:
                self.forward(model_inputs, **generate_kwargs, streamer=streamer)
            except BaseException as error:  # handed to the reader, in whose thread it is raised
                streamer.fail(error)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.cancel()
            thread.join()

    def _messages(
        self, request: Any, task: str | None, text: str | None, system_prompt: str | None
    ) -> list[dict[str, Any]]:
        """The conversation of one request."""
        if isinstance(request, Mapping) and "messages" in request:
            if len(request) > 1:
                raise ValueError(f"`messages` stands alone, but the request has {', '.join(map(repr, request))}.")
            request = request["messages"]
            if not _is_conversation(request):
                raise ValueError("`messages` must be a list of mappings with `role` and `content`.")
        if _is_conversation(request):
            if text is not None:
                raise ValueError("`text` goes with audio; put it into the conversation's messages.")
            return list(request)
        if isinstance(request, Mapping):
            given = {key: value for key, value in request.items() if value is not None}
            misplaced = [key for key in given if key in ARGUMENTS and key not in ("text", "sampling_rate")]
            if misplaced:
                raise ValueError(
                    f"`{misplaced[0]}` is an option of the call, for all its requests, and no part of one: pass it as "
                    f"pipe(..., {misplaced[0]}=...)."
                )
            text, request = given.pop("text", text), given or None
        elif isinstance(request, str) and self._takes_text_alone(task):
            if text is not None:
                raise ValueError(f"The request is the text of {task!r} itself; leave `text` out.")
            text, request = request, None
        if request is None and text is None:
            raise ValueError("There is nothing in it. A request is audio, a text, a mapping of both or a conversation.")
        task = task or ("text_chat" if request is None else "spoken_chat")
        return self.processor.build_messages(task, text=text, audio=request, system_prompt=system_prompt)

    def _takes_text_alone(self, task: str | None) -> bool:
        return task is not None and self.processor.get_task(task).takes_text_alone

    def _is_single(self, inputs: Any) -> bool:
        if _is_conversation(inputs) or self.processor.is_single_audio(inputs):
            return True
        return not hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__")

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> None:
        """
        Save the whole Hub folder, which names this pipeline's own class: see [`save_repository`].

        Args:
            save_directory (`str` or `os.PathLike`): folder to write; made if missing.
            push_to_hub (`bool`, *optional*, defaults to `False`): upload it too.
            repo_id (`str`, *optional*): where to; the folder's name in your namespace by default.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): of the model's weights.
            kwargs: passed to `push_to_hub`.
        """
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory)
        impl = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        self.model.config.custom_pipelines = {
            "audio-to-audio": {"impl": impl, "pt": ["AutoModel"], "type": "multimodal"}
        }
        save_repository(self.model, self.processor, save_directory, max_shard_size=max_shard_size)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, max_shard_size=max_shard_size, **kwargs)


def save_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | os.PathLike,
    card: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Write a whole Hub folder, all that `pipeline("audio-to-audio", model=folder, trust_remote_code=True)` needs: model,
    generation settings, processor with its audio tokenizer, pipeline, the code of all of them, and a model card.

    Args:
        model (`TttForConditionalGeneration`): the model.
        processor (`TttProcessor`): its processor, with an audio tokenizer.
        folder (`str` or `os.PathLike`): folder to write; made if missing.
        card (`str`, *optional*): text of the model card. A README.md that is there already is kept.
        kwargs: passed to the model's `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: if the processor has no audio tokenizer, without which the folder could not talk.
    """
    if getattr(processor, "audio_tokenizer", None) is None:
        raise ValueError("`processor` has no audio tokenizer, so the folder could not talk. Load it with its own.")
    model.save_pretrained(folder, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    processor.save_pretrained(folder)
    readme = Path(folder) / "README.md"
    if card is not None and not readme.exists():
        readme.write_text(card, encoding="utf-8")


def _is_conversation(request: Any) -> bool:
    return (
        isinstance(request, (list, tuple))
        and len(request) > 0
        and isinstance(request[0], Mapping)
        and "role" in request[0]
    )


def _check_types(**arguments: Any) -> None:
    for name, value in arguments.items():
        kind, described = ARGUMENTS[name]
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not is_right:
            raise TypeError(f"`{name}` is {value!r}; it must be {described}.")


def _raise_named(error: Exception, name: str) -> NoReturn:
    """Raise an error with the name of the request that it came with, where it does not tell it yet."""
    if name in str(error):
        raise error
    if type(error) is ValueError:
        raise ValueError(f"{name}: {error}") from error
    error.add_note(f"It came with {name}.")
    raise error


def _to_list(answers: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """All answers; an error brings those that came before it along."""
    results: list[dict[str, Any]] = []
    try:
        for answer in answers:
            results.append(answer)
    except Exception as error:
        error.results = results  # type: ignore[attr-defined]
        if results:
            error.add_note(f"The answers before it, {len(results)} of them, are this error's attribute `results`.")
        raise
    return results


def _rows(inputs: Any, column: str) -> Iterator[Any]:
    """Yield requests one by one. Of a dataset's rows one column is taken: others, such as the transcript of a
    recording, are not part of the request."""
    is_dataset = hasattr(inputs, "features") and hasattr(inputs, "column_names")
    if not is_dataset:
        yield from inputs
        return
    names = inputs.column_names
    if names is not None and column not in names:
        raise ValueError(f"The dataset has no column `{column}`; it has {', '.join(names)}. Pass one column instead.")
    feature: Any = (inputs.features or {}).get(column)
    if getattr(feature, "decode", False):
        inputs = inputs.cast_column(column, type(feature)(decode=False))
    for row in inputs:
        yield row[column]


def _batches(requests: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` requests; where they cannot be read on, what there is comes before the error."""
    while True:
        batch: list[Any] = []
        try:
            for request in islice(requests, size):
                batch.append(request)
        except Exception:
            if batch:
                yield batch
            raise
        if not batch:
            return
        yield batch


__all__ = ["TttAudioToAudioPipeline", "save_repository"]
