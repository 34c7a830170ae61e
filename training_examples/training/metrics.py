"""What a training run tells about itself: losses and accuracies by side and noise level, while training and in
evaluation, the log as JSON lines and its curves as a picture."""

import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate.utils import reduce
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def accuracies(counts: np.ndarray) -> dict[str, float]:
    """
    Return the accuracy of text, of audio, and of audio by its noise level λ. Groups without a scored position are left
    out.

    Args:
        counts (`np.ndarray` of shape `(groups, 2)`): right and scored positions, in the groups of the `score_table` of
            [`TttCausalLMOutputWithPast`].
    """
    groups = {"text_accuracy": counts[0], "audio_accuracy": counts[1:].sum(0)}
    if len(counts) > 2:
        edges = np.linspace(0, 1, len(counts))
        groups |= {f"audio_accuracy_{edges[i]:.2f}-{edges[i + 1]:.2f}": counts[i + 1] for i in range(len(counts) - 1)}
    return {name: float(right / scored) for name, (right, scored) in groups.items() if scored}


def share_loss(loss: float, by_group: np.ndarray) -> dict[str, float]:
    """Return text's and audio's share of a loss, in proportion to the losses of the groups, (groups,)."""
    text = float(loss * by_group[0] / by_group.sum()) if by_group.any() else 0.0
    return {"text_loss": text, "audio_loss": float(loss) - text}


class EvaluationMetrics:
    """
    `compute_metrics` of the Trainer: `eval_loss`, its two parts, and the accuracies of text and masked audio.

    The model's only prediction is its `score_table`, (examples, groups, 3), with the losses of each example. Their mean
    takes the place of the Trainer's own `eval_loss`, which weights what each of several processes has by its labels,
    and counts the examples that fill up the last batch. With `batch_eval_metrics` the tables come batch by batch, and
    the result is that of all.
    """

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.batches.append(_as_array(prediction.predictions))
        if not compute_result:
            return {}
        table, self.batches = np.concatenate(self.batches), []
        loss = float(table[..., 0].sum(1).mean())
        return {"loss": loss} | share_loss(loss, table[..., 0].mean(0)) | accuracies(table[..., 1:].sum(0))


def _as_array(values: Any) -> Any:
    if isinstance(values, list):  # of batches, where `eval_do_concat_batches` is off
        return np.concatenate([_as_array(batch) for batch in values])
    return None if values is None else torch.as_tensor(values).double().cpu().numpy()


class TrainingScores(TrainerCallback):
    """
    Adds text and audio loss, the accuracies of `accuracies` and the speed to what the Trainer logs while it trains.

    A forward hook sums the model's score tables where they are; they are read, and summed over processes, once a log.
    The two losses are the shares of the logged loss; a side of which nothing was scored (batches that were left clean
    score no audio) is left out. `train_tokens_per_second` counts since the last log, and only the time of training
    steps: not evaluating, saving or answering, nor what a resumed run spends to find its place in the data.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.hook: Any = None
        self.mark: float | None = None  # when the time that counts began, None before the first step
        self.seconds, self.tokens = 0.0, 0

    @classmethod
    def attach_to(cls, trainer: Trainer) -> "TrainingScores":
        """Put these scores first in line, so that every reporter is handed the added values."""
        scores = cls()
        trainer.callback_handler.callbacks.insert(0, scores)
        return scores

    def skip_time(self) -> None:
        """Leave out the time since the last step."""
        self.mark = time.perf_counter()

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        assert model is not None
        self.total = self.mark = None
        self.seconds, self.tokens = 0.0, state.num_input_tokens_seen
        self.hook = model.register_forward_hook(self._add)

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.mark is None:
            self.skip_time()

    def on_step_end(self, args, state, control, **kwargs):
        if self.mark is not None:
            self.seconds += time.perf_counter() - self.mark
            self.skip_time()

    def on_evaluate(self, args, state, control, **kwargs):
        self.skip_time()

    def on_save(self, args, state, control, **kwargs):
        self.skip_time()

    def _add(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if model.training and outputs.get("score_table") is not None:
            table = outputs["score_table"].sum(0)  # (groups, 3)
            table[:, 0] /= len(outputs["score_table"])
            self.total = table if self.total is None else self.total + table

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs):
        if logs is None or "loss" not in logs or self.total is None:
            return
        table = reduce(self.total, reduction="sum").cpu().double().numpy()
        self.total = None
        added = share_loss(logs["loss"], table[:, 0]) | accuracies(table[:, 1:])
        for side, scored in (("text", table[0, 2]), ("audio", table[1:, 2].sum())):
            if not scored:
                del added[f"{side}_loss"]
        if self.seconds > 0 and args.include_num_input_tokens_seen != "no":
            added["train_tokens_per_second"] = (state.num_input_tokens_seen - self.tokens) / self.seconds
            self.tokens, self.seconds = state.num_input_tokens_seen, 0.0
        logs.update(added)
        state.log_history[-1].update(added)
        self.skip_time()


def write_log(log_history: list[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line, as the Trainer logged them."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in log_history), encoding="utf-8")


def plot_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses, accuracies and speed over the steps, as far as they were logged; those of evaluation are dashed."""
    logged = {name for entry in log_history if "step" in entry for name in entry}
    names = sorted({name for entry in log_history for name in entry if name.startswith("audio_accuracy_")})
    panels: list[tuple[str, list[str]]] = [
        ("loss (nats)", ["loss", "text_loss", "audio_loss"]),
        ("accuracy", ["text_accuracy", "audio_accuracy"]),
        ("accuracy of masked audio, by noise level", names),
        ("tokens per second", ["train_tokens_per_second"]),
    ]
    shown = [panel for panel in panels if not logged.isdisjoint({*panel[1], *(f"eval_{name}" for name in panel[1])})]
    shown = shown or panels[:1]
    rows = len(shown) // 4 + 1
    columns = len(shown) // rows
    figure, axes = plt.subplots(
        rows, columns, figsize=(11 if columns > 1 else 6, 3.5 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes.flat, shown, strict=True):
        for name in curves:
            label: str | None = name.removeprefix("train_").removeprefix("audio_accuracy_").replace("_", " ")
            colour = None
            for key, style in ((name, "-"), (f"eval_{name}", "--")):
                points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
                if points:
                    marker = "." if len(points) < 20 else None
                    (line,) = axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, label=label)
                    label, colour = None, line.get_color()
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="grey")
    if any(name.startswith("eval_") for name in logged):
        figure.suptitle("training solid, evaluation dashed", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
