"""TttAudioToAudioPipeline: requests in, `{"text", "audio", "sampling_rate"}` out, whole or as a stream. What a request
becomes in tokens, and tokens in speech, is the processor's business."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Pipeline, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

TEXT_TASKS = ("tts", "text_chat")


class TttAudioToAudioPipeline(Pipeline):
    """`pipeline("audio-to-audio", model=..., trust_remote_code=True)`.

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
        super().__init__(*args, **kwargs)
        if getattr(self.processor, "audio_tokenizer", None) is None:
            raise ValueError(
                "The pipeline needs a processor with an audio tokenizer. Leave `processor` out to have the model's own "
                "loaded, or load it with `AutoProcessor.from_pretrained(..., trust_remote_code=True)`."
            )
        self.processor.audio_tokenizer.to(self.device)

    def __call__(  # type: ignore[override]
        self,
        inputs: Any = None,
        *,
        text: str | None = None,
        task: str | None = None,
        stream: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers requests.

        Args:
            inputs: one request, a list of them, or an iterable (generator, `datasets` dataset or column), answered as
                it is iterated over. A request is audio in any form the processor takes (path, address, array,
                mapping with `array` and `sampling_rate`, decoded dataset item); for the tasks "tts" and "text_chat" a
                text; a mapping with `text` and / or `audio`; or a conversation, a list of messages. Of a `datasets`
                dataset's rows, the column `audio` is taken (`text` for the text tasks), and its files are read by the
                processor, so that torchcodec is not needed.
            text: user text that goes with every audio of `inputs`; without `inputs`, the request itself.
            task: "spoken_chat" (default), "asr", "tts", "captioning", "spoken_qa", "text_chat" (default for text
                alone), or another the processor has a system prompt for. For conversations, gives those without a
                system turn this task's.
            stream: for one request, return an iterator over `{"text"}` and `{"audio", "sampling_rate"}` pieces, filled
                while the answer is generated.
            batch_size: requests answered at once, 1 by default.
            system_prompt: replaces the task's.
            sampling_rate: of arrays that bring none of their own, Hz.
            generate_kwargs: passed to `generate`, for example `{"audio_steps_per_block": 8}`.

        Returns:
            `{"text": str, "audio": (samples,) float32 array, "sampling_rate": int}`; a list of them for a list, an
            iterator over them for any other iterable.

        Raises:
            ValueError: a request that cannot be used; the message names it by its position. Options that make no sense:
                a `batch_size` below 1, several answers to a request.
        """
        preprocess_params, forward_params, postprocess_params = self._sanitize_parameters(**kwargs)
        preprocess_params = {**self._preprocess_params, **preprocess_params, "task": task, "text": text}
        forward_params = {**self._forward_params, **forward_params}
        postprocess_params = {**self._postprocess_params, **postprocess_params}
        batch_size = batch_size if batch_size is not None else self._batch_size or 1
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; use 1 or more.")
        if (forward_params.get("num_return_sequences") or 1) > 1:
            raise ValueError(
                f"`num_return_sequences` is {forward_params['num_return_sequences']}, but a request gets one answer: "
                "pass it several times, or call the model's `generate`."
            )
        if inputs is None and text is None:
            raise ValueError("Pass a request, or `text`.")
        if inputs is None or self._is_single(inputs):
            if stream:
                return self._stream(self.preprocess([inputs], **preprocess_params), forward_params)
            return self.run_single([inputs], preprocess_params, forward_params, postprocess_params)[0]
        if stream:
            raise ValueError("`stream=True` takes one request at a time; call the pipeline once for each.")
        results = self._run_batches(inputs, batch_size, preprocess_params, forward_params, postprocess_params)
        return list(results) if isinstance(inputs, (list, tuple)) else results

    def _sanitize_parameters(
        self,
        system_prompt: str | None = None,
        sampling_rate: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params: dict[str, Any] = {}
        if system_prompt is not None:
            preprocess_params["system_prompt"] = system_prompt
        if sampling_rate is not None:
            preprocess_params["sampling_rate"] = sampling_rate
        return preprocess_params, dict(generate_kwargs or {}), {}

    def _run_batches(self, inputs: Iterable[Any], batch_size: int, *params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        preprocess_params, forward_params, postprocess_params = params
        column = "text" if preprocess_params["task"] in TEXT_TASKS else "audio"
        first = 0
        batch: list[Any] = []
        for item in _rows(inputs, column):
            batch.append(item)
            if len(batch) == batch_size:
                yield from self.run_single(
                    batch, {**preprocess_params, "first": first}, forward_params, postprocess_params
                )
                first, batch = first + len(batch), []
        if batch:
            yield from self.run_single(batch, {**preprocess_params, "first": first}, forward_params, postprocess_params)

    def preprocess(  # type: ignore[override]
        self,
        input_: list[Any],
        task: str | None = None,
        text: str | None = None,
        system_prompt: str | None = None,
        sampling_rate: int | None = None,
        first: int = 0,
    ) -> dict[str, Any]:
        """A batch of requests as left-padded ids; `first` is the position of the first of them among all."""
        names = [f"input {first + index}" for index in range(len(input_))]
        conversations = []
        for request, name in zip(input_, names, strict=True):
            try:
                conversations.append(self._messages(request, task, text, system_prompt))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        features = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            task=task,
            system_prompt=system_prompt,
            sampling_rate=sampling_rate,
            names=names,
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
        if _is_conversation(request):
            return list(request)
        audio = request
        if isinstance(request, Mapping) and not ({"array", "bytes", "path"} & set(request)):
            audio, text = request.get("audio"), request.get("text") or text
        elif isinstance(request, str) and task in TEXT_TASKS:
            audio, text = None, request
        task = task or ("spoken_chat" if audio is not None else "text_chat")
        return self.processor.build_messages(task, text=text, audio=audio, system_prompt=system_prompt)

    def _is_single(self, inputs: Any) -> bool:
        if _is_conversation(inputs) or isinstance(inputs, (str, bytes, Mapping)):
            return True
        if hasattr(inputs, "ndim") or hasattr(inputs, "get_all_samples") or hasattr(inputs, "__fspath__"):
            return True
        if isinstance(inputs, (list, tuple)):
            return len(inputs) > 0 and isinstance(inputs[0], (int, float))
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
    processor.save_pretrained(folder)
    readme = Path(folder) / "README.md"
    if card is not None and not readme.exists():
        readme.write_text(card, encoding="utf-8")


def _is_conversation(request: Any) -> bool:
    return (
        isinstance(request, (list, tuple))
        and len(request) > 0
        and isinstance(request[0], Mapping)
        and {"role", "content"} <= set(request[0])
    )


def _rows(inputs: Any, column: str) -> Iterator[Any]:
    """Requests one by one. Of a dataset's rows one column is taken: others, such as the transcript of a recording, are
    not part of the request."""
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


__all__ = ["TttAudioToAudioPipeline", "save_repository"]
