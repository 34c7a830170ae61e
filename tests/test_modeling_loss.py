"""The loss of the model: noise while training, a fixed bound in evaluation, and gradients that fit the Trainer."""

import copy
import logging

import pytest
import torch
from conftest import make_model
from torch.utils.data import Dataset
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_ttt.modeling_ttt import logger
from modeling_ttt.objective_ttt import diffusion_targets, draw_noise, next_token_targets, sample_weights
from modeling_ttt.samples_ttt import Samples

AUDIO = 110
NO_TRICKS = {
    "clean_batch_probability": 0.0,
    "prefix_preservation_probability": 0.0,
    "span_truncation_probability": 0.0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def full_loss(logits, targets, weights):
    """The loss from the logits of every position, the long way."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return (losses * weights).sum()


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def spy_on_noise(monkeypatch):
    """The noise that models draw from now on, in a list."""
    drawn = []
    monkeypatch.setattr(
        "modeling_ttt.modeling_ttt.draw_noise", lambda *args: drawn.append(draw_noise(*args)) or drawn[-1]
    )
    return drawn


def rows(batch, start, stop):
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def test_training_loss_is_text_plus_audio_of_one_noisy_forward(batch, monkeypatch):
    """Against logits of all positions, with the noise that the model drew."""
    model = make_model(**NO_TRICKS).train()
    drawn = spy_on_noise(monkeypatch)
    outputs = model(**batch, generator=generator())
    (noise,) = drawn
    labels = batch["labels"]
    samples = Samples(torch.arange(2)[:, None].expand(labels.shape), 2)
    weight = sample_weights(labels, samples)
    assert torch.equal(noise.maskable, labels >= AUDIO) and noise.masked.any()
    span_ids = model.model.get_span_ids(batch["input_ids"], batch["attention_mask"])
    logits = model(noise.input_ids, attention_mask=batch["attention_mask"], span_ids=span_ids).logits
    text = next_token_targets(labels, (labels != -100) & (labels < AUDIO), samples, weight)
    audio = diffusion_targets(labels, noise.masked, samples, noise.levels, noise.maskable.sum(-1), weight)
    torch.testing.assert_close(outputs.text_loss, full_loss(logits, *text))
    torch.testing.assert_close(outputs.audio_loss, full_loss(logits, *audio))
    assert outputs.loss == outputs.text_loss + outputs.audio_loss
    assert outputs.logits is None and outputs.past_key_values is None


def test_a_generator_makes_the_training_loss_reproducible(batch):
    model = make_model().train()
    losses = {seed: [model(**batch, generator=generator(seed)).loss.item() for _ in range(2)] for seed in (1, 2)}
    assert losses[1][0] == losses[1][1] != losses[2][0] == losses[2][1]


def test_a_clean_batch_scores_text_only(batch):
    model = make_model(clean_batch_probability=1.0)
    trained, evaluated = model.train()(**batch), model.eval()(**batch)
    assert trained.audio_loss.item() == 0.0
    torch.testing.assert_close(trained.text_loss, evaluated.text_loss)


def test_prefix_preservation_scores_the_later_spans_only(batch, monkeypatch):
    drawn = spy_on_noise(monkeypatch)
    model = make_model(clean_batch_probability=0.0, prefix_preservation_probability=1.0).train()
    for seed in range(8):
        model(**batch, generator=generator(seed))
    assert {tuple(noise.maskable.sum(-1).tolist()) for noise in drawn} == {(8, 5), (3, 5)}


def test_evaluation_is_the_same_to_the_bit_and_leaves_the_random_state(batch):
    model = make_model()
    state = torch.get_rng_state()
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.audio_loss, second.audio_loss)
    assert first.audio_loss > 0 and first.text_loss > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_of_a_sample_depends_on_neither_neighbours_nor_padding(batch):
    model = make_model()
    together = model(**batch)
    alone = [model(**rows(batch, index, index + 1)) for index in range(2)]
    unpadded = model(input_ids=batch["input_ids"][1:, :12], labels=batch["labels"][1:, :12])
    for part in ("text_loss", "audio_loss"):
        torch.testing.assert_close(together[part], (alone[0][part] + alone[1][part]) / 2)
        torch.testing.assert_close(unpadded[part], alone[1][part])


def test_evaluation_estimates_what_training_averages(batch):
    model = make_model(eval_noise_levels=[(k + 0.5) / 64 for k in range(64)], **NO_TRICKS)
    with torch.no_grad():
        bound = model(**batch).audio_loss
        model.train()
        samples = torch.stack([model(**batch, generator=generator(seed)).audio_loss for seed in range(300)])
    assert abs(samples.mean() - bound) < 0.15 * bound


def test_only_scored_positions_reach_the_vocabulary(batch):
    projected = []
    for objective in ("diffusion", "autoregressive"):
        model = make_model(audio_objective=objective, clean_batch_probability=1.0).train()
        model.lm_head.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0].shape[0]))
        model(**batch)
    labels = batch["labels"]
    text = ((labels != -100) & (labels < AUDIO)).sum().item()
    assert projected == [text, text + (labels >= AUDIO).sum().item()]


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["audio", "text", "everything"])
def test_loss_and_gradient_are_finite_whatever_is_missing(batch, missing, training, objective):
    labels = batch["labels"].clone()
    if missing != "text":
        labels[labels >= AUDIO] = -100
    if missing != "audio":
        labels[labels < AUDIO] = -100
    model = make_model(audio_objective=objective, clean_batch_probability=0.0).train(training)
    outputs = model(**{**batch, "labels": labels}, num_items_in_batch=(labels != -100).sum())
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (outputs.audio_loss == 0) == (missing != "text")
    assert (outputs.text_loss == 0) == (missing != "audio")


def test_sequences_without_any_audio_token():
    model = make_model().train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_text_tokens_added_above_the_audio_side_are_scored_as_text(batch, training):
    """Two of them inside what would be a span: the loss is that of any other text there."""
    model = make_model({"vocab_size": 200}, clean_batch_probability=0.0).train(training)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 122, 190)
    batch |= {"input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}
    outputs, twin = model(**batch, generator=generator()), make_model({"vocab_size": 200}).train(training)
    with torch.no_grad():  # another text token with the row of this one
        for weight in (twin.get_input_embeddings().weight, twin.lm_head.weight):
            weight[50], weight[190] = weight[190].clone(), weight[50].clone()
    moved = {name: tensor.masked_fill(tensor == 190, 50) for name, tensor in batch.items()}
    twin.config.clean_batch_probability = 0.0
    expected = twin(**moved, generator=generator())
    torch.testing.assert_close(outputs.text_loss, expected.text_loss)
    torch.testing.assert_close(outputs.audio_loss, expected.audio_loss)


def test_micro_batches_of_any_sizes_add_up_to_the_large_batch(batch):
    model = make_model(noise_epsilon=1 - 1e-7, **NO_TRICKS).train()  # every code masked: no draw matters
    whole = {name: torch.cat([tensor, tensor.flip(0)[:1]]) for name, tensor in batch.items()}  # three rows
    items = (whole["labels"][:, 1:] != -100).sum()
    expected = gradients(model, **whole, num_items_in_batch=items)
    first = gradients(model, **rows(whole, 0, 1), num_items_in_batch=items)
    second = gradients(model, **rows(whole, 1, 3), num_items_in_batch=items)
    for name, gradient in expected.items():
        torch.testing.assert_close(first[name] + second[name], gradient, atol=1e-6, rtol=1e-4)


class Rows(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_accumulation_in_the_plain_trainer_equals_one_large_batch(batch, objective, tmp_path):
    """Three samples with different numbers of labels: at once, and as micro-batches of two and one."""
    whole = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in batch.items()}
    start = make_model(audio_objective=objective, clean_batch_probability=1.0)
    updated = []
    for size, accumulation in ((3, 1), (2, 2)):
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = copy.deepcopy(start)
        trainer = Trainer(model, arguments, train_dataset=Rows(whole))
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        updated.append(dict(model.named_parameters()))
    for (name, once), before in zip(updated[0].items(), start.parameters(), strict=True):
        torch.testing.assert_close(updated[1][name], once, atol=1e-5, rtol=1e-4)
        if "embed_tokens" in name:
            assert not torch.equal(once, before)


def test_the_plain_trainer_evaluates_and_hands_the_score_table_to_metrics(batch, tmp_path):
    """In batches of two rows and one: means over rows of the table are the parts of the loss that it reports."""
    whole = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in batch.items()}
    arguments = TrainingArguments(
        output_dir=tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2
    )
    tables = []

    def parts(prediction):
        tables.append(prediction.predictions)
        return {"text": prediction.predictions[:, 0, 0].mean(), "audio": prediction.predictions[:, 1:, 0].sum(1).mean()}

    model = make_model()
    plain = Trainer(model, arguments, eval_dataset=Rows(whole)).evaluate()
    measured = Trainer(model, arguments, eval_dataset=Rows(whole), compute_metrics=parts).evaluate()
    assert plain["eval_loss"] == measured["eval_loss"]
    assert measured["eval_text"] + measured["eval_audio"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert tables[0].shape == (3, 5, 3)


def test_score_table_counts_what_is_predicted_right_by_side_and_noise_level(batch, monkeypatch):
    """Against logits of all positions, for a model that has learnt to write one code, but not where audio ends."""
    for name in ("input_ids", "labels"):
        is_code = (batch[name] > AUDIO) & (batch[name] < 175)
        batch[name] = batch[name].masked_fill(is_code, 120)
    model = make_model(**NO_TRICKS).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for seed in range(8):
        optimizer.zero_grad()
        model(**batch, generator=generator(seed)).loss.backward()
        optimizer.step()
    drawn = spy_on_noise(monkeypatch)
    outputs, labels = model(**batch, generator=generator(1)), batch["labels"]
    (noise,) = drawn
    span_ids = model.model.get_span_ids(batch["input_ids"], batch["attention_mask"])
    predicted = model(noise.input_ids, attention_mask=batch["attention_mask"], span_ids=span_ids).logits.argmax(-1)
    is_text = ((labels != -100) & (labels < AUDIO))[:, 1:]
    text_right = (is_text & (predicted[:, :-1] == labels[:, 1:])).sum(-1)
    audio_right = (noise.masked & (predicted == labels)).sum(-1)
    assert 0 < text_right.sum() < is_text.sum() and 0 < audio_right.sum() < noise.masked.sum()

    loss, correct, scored = outputs.score_table.unbind(-1)  # (rows, groups)
    assert correct[:, 0].tolist() == text_right.tolist() and scored[:, 0].tolist() == is_text.sum(-1).tolist()
    for row, level in enumerate(noise.levels[:, 0].tolist()):
        expected = [0, 0, 0, 0]
        expected[int(4 * level)] = audio_right[row].item()
        assert correct[row, 1:].tolist() == expected
        assert scored[row, 1 + int(4 * level)] == noise.masked[row].sum()
    torch.testing.assert_close(loss[:, 0].mean(), outputs.text_loss)
    torch.testing.assert_close(loss[:, 1:].sum(-1).mean(), outputs.audio_loss)
    assert not outputs.score_table.requires_grad


def test_an_evaluation_does_not_depend_on_which_examples_share_a_batch(batch):
    """The Trainer hands every batch its number of labels, and averages batches by their examples."""
    model = make_model()

    def loss(part):
        return model(**part, num_items_in_batch=(part["labels"] != -100).sum()).loss

    alone = [loss(rows(batch, row, row + 1)) for row in range(2)]
    torch.testing.assert_close(loss(batch), sum(alone) / 2)
    assert (batch["labels"] != -100).sum(1).unique().numel() == 2 and not torch.isclose(*alone)


@pytest.mark.parametrize("elsewhere", [0, 7, 50])
def test_the_score_table_of_an_evaluation_has_the_losses_of_examples_that_are_alone(batch, elsewhere):
    """However many labels other processes have of the batch, in which every process is told the number of all."""
    model = make_model().eval()
    num_items = (batch["labels"] != -100).sum() + elsewhere
    table = model(**batch, num_items_in_batch=num_items).score_table
    alone = [model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss for row in range(2)]
    torch.testing.assert_close(table[..., 0].sum(1), torch.stack(alone).detach())


LONG = [1, 2, 10, 102, *range(111, 171), 177, 104]  # a text token, then 60 codes in the last span


def test_in_training_an_answer_is_cut_short_as_if_it_ended_there(monkeypatch):
    """Loss and gradients are those of the tokens that are left; nothing that is kept sees what was cut off."""
    ids = torch.tensor([LONG, [*LONG[:3], 5, *LONG[3:-1]]])
    labels = ids.clone()
    labels[:, :2] = -100
    options = NO_TRICKS | {"noise_epsilon": 1 - 1e-7}  # every code masked: no draw but that of the cut matters
    model = make_model(**options).train()
    kept = torch.arange(66) <= torch.tensor([[30], [40]])
    left = {"input_ids": ids.masked_fill(~kept, 105), "labels": labels.masked_fill(~kept, -100), "attention_mask": kept}
    expected = gradients(model, **left)
    monkeypatch.setattr("modeling_ttt.modeling_ttt.truncate_last_spans", lambda *_: ~kept)
    ours = gradients(model, input_ids=ids, labels=labels)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_answers_are_cut_short_in_training_mode_alone_and_never_those_of_the_twin():
    ids = torch.tensor([LONG] * 8)
    for options, training, expected in (
        ({}, True, True), ({}, False, False), ({"audio_objective": "autoregressive"}, True, False)
    ):  # fmt: skip
        model = make_model(span_truncation_probability=1.0, clean_batch_probability=1.0, **options).train(training)
        scored = model(input_ids=ids, labels=ids, generator=generator()).score_table[:, 0, 2]
        # Of the text side, the end of the turn is what is cut off.
        assert scored.tolist() == [3 if expected else 4] * 8


def test_score_table_of_an_evaluation_has_every_noise_level(batch):
    outputs = make_model()(**batch)
    num_scored = outputs.score_table[..., 2].sum(0).tolist()
    assert num_scored[0] == ((batch["labels"] != -100) & (batch["labels"] < AUDIO)).sum()
    assert num_scored[1:] == sorted(num_scored[1:]) and 0 < num_scored[1] < num_scored[4]
    torch.testing.assert_close(outputs.score_table[..., 0].sum(-1).mean(), outputs.loss)


def test_score_table_of_the_twin_has_one_audio_group(batch):
    outputs = make_model(audio_objective="autoregressive")(**batch)
    labels = batch["labels"]
    assert outputs.score_table.shape == (2, 2, 3)
    assert outputs.score_table[:, 1, 2].tolist() == (labels >= AUDIO).sum(-1).tolist()


def test_gradient_checkpointing_changes_no_gradient(batch):
    model = make_model(clean_batch_probability=0.0).train()
    expected = gradients(model, **batch, generator=generator())
    model.gradient_checkpointing_enable()
    assert model.is_activation_checkpointing
    actual = gradients(model, **batch, generator=generator())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


def test_loss_under_bfloat16_autocast_is_float32(batch):
    model = make_model().train()
    expected = model(**batch, generator=generator()).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, generator=generator()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.02)


def test_lora_adapters_train_through_peft(batch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    model(**batch).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_behind_a_cache_is_refused(batch, training):
    """Each of its forwards would go on where the one before has stopped."""
    model, ids = make_model().train(training), batch["input_ids"]
    with pytest.raises(ValueError, match="`past_key_values` came with `labels`"):
        model(**batch, past_key_values=DynamicCache())
    wider = torch.ones(len(ids), ids.shape[1] + 3, dtype=torch.long)
    with pytest.raises(ValueError, match="`attention_mask` has shape .*`input_ids`"):
        model(**batch | {"attention_mask": wider})


def test_bad_labels_are_refused(batch):
    model = make_model()
    with pytest.raises(ValueError, match="`labels` has shape"):
        model(batch["input_ids"], labels=batch["labels"][:, 1:])
    with pytest.raises(ValueError, match="`labels` has shape .*batch, length"):
        model(batch["input_ids"][0], labels=batch["labels"][0])
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), labels=batch["labels"])


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_a_training_forward_without_labels_warns_once(batch, objective, caplog, monkeypatch):
    """As `label_smoothing_factor` makes it: the Trainer takes the labels out and scores the logits itself."""
    monkeypatch.setattr(logging.getLogger("modeling_ttt"), "propagate", True)
    model = make_model(audio_objective=objective).train()
    logger.warning_once.cache_clear()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    for _ in range(2):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    found = [record for record in caplog.records if "without `labels`" in record.getMessage()]
    assert len(found) == (objective == "diffusion")
    assert not found or "`label_smoothing_factor`" in found[0].getMessage()


def test_neither_evaluation_nor_generation_warns_of_missing_labels(batch, caplog):
    logger.warning_once.cache_clear()
    model = make_model()
    model(batch["input_ids"])
    model.train().generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=1)
    assert not [record for record in caplog.records if "without `labels`" in record.getMessage()]


def test_labels_shifted_by_others_are_refused(batch):
    with pytest.raises(ValueError, match="`shift_labels`.*cannot be scored"):
        make_model()(**batch, shift_labels=batch["labels"])
