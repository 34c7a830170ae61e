"""The plugin by which lmms-eval's audio tasks run a TtT model.

    python -m lmms_eval --model ttt --model_args pretrained=DIR,task=asr --tasks librispeech_test_clean

lmms-eval finds it by the entry point `lmms_eval.models` of this package. It wants an environment of its own (the extra
`lmms`, without constraints.txt), and reads text answers alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm

from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.evaluation.options import read_pairs


class TttLmms(lmms):
    """
    A TtT model for lmms-eval.

    Args:
        pretrained (`str`): folder or Hub name.
        task (`str`, *optional*): one of the processor's tasks. By default audio with a question in text is asked as
            captioning is (the instruction before the audio), audio alone as a spoken question. With "asr" the question
            is left out, since the task's prompt says what to do.
        device (`str`, *optional*, defaults to `"cpu"`): where the model runs.
        dtype (`str`, *optional*, defaults to `"float32"`): of its weights.
        batch_size (`int` or `str`, *optional*, defaults to 1): samples answered at once.
        trust_remote_code (`bool`, *optional*, defaults to `False`): allow code in the checkpoint to run.
        generation (`str`, *optional*): options of `generate`, as `audio_block_size=8;audio_steps_per_block=4`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        task: str | None = None,
        device: str | None = "cpu",
        dtype: str = "float32",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
        generation: str = "",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        options = read_pairs("model_args generation", [item for item in generation.split(";") if item])
        self.backend = TttBackend(
            pretrained, device or "cpu", dtype, options, trust_remote_code=trust_remote_code
        )  # fmt: skip
        self.task, self.batch_size = task, int(batch_size)
        if task is not None:
            self.backend.processor.get_task(task)  # an unknown one is refused before any sample is read

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """
        Return the text of each answer. `max_new_tokens` of a task counts text; in TtT codes count, too, so the model's
        own limit holds. Answers end at the task's `until`.

        Raises:
            ValueError: If a sample has more than one recording.
        """
        answers: list[str] = []
        batches = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]
        for batch in tqdm(batches, desc="TtT answers"):
            asked = [self._sample(index, request.args) for index, request in enumerate(batch)]
            groups: dict[str, list[int]] = {}
            for index, sample in enumerate(asked):
                groups.setdefault(self._task_of(sample), []).append(index)
            texts = [""] * len(batch)
            for task, indices in groups.items():
                for index, answer in zip(indices, self.backend.answer([asked[i] for i in indices], task), strict=True):
                    texts[index] = _until(answer.text, batch[index].args[1])
            answers += texts
        return answers

    def _sample(self, index: int, arguments: tuple[Any, ...]) -> Sample:
        context, _, doc_to_visual, doc_id, task, split = arguments
        recordings = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual is not None else []
        if len(recordings) > 1:
            raise ValueError(f"sample {doc_id} of {task} has {len(recordings)} recordings; TtT is asked with one")
        text = context.strip() if self.task != "asr" or not recordings else ""
        return Sample(str(index), (Turn(recordings[0] if recordings else None, text or None),))

    def _task_of(self, sample: Sample) -> str:
        turn = sample.turns[0]
        if turn.audio is None:
            return "text_chat"
        return self.task or ("captioning" if turn.text else "spoken_chat")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise, for tasks of several rounds."""
        raise NotImplementedError("TtT answers lmms-eval's tasks of one round")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise, for tasks that compare likelihoods: of a diffused answer there are only bounds."""
        raise NotImplementedError("TtT has no likelihood of an answer, only a bound; use tasks of `generate_until`")


def _until(text: str, options: Mapping[str, Any]) -> str:
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def manifest() -> ModelManifest:
    """Return what the entry point tells lmms-eval: the model's name there and its class."""
    return ModelManifest("ttt", simple_class_path=f"{TttLmms.__module__}.{TttLmms.__qualname__}")
