"""Packed batches: attention stays within an example, and loss, gradients and training are those of padded rows."""

import pytest
import torch
from conftest import make_model, no_compilation
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from processing import TttDataCollator, pack_examples

# From the longest to the shortest, so that packing keeps the order: audio in the prompt, several spans, an answer that
# ends inside a span, one that starts with audio, text alone.
EXAMPLES = [
    {"input_ids": [1, 100, 111, 112, 113, 101, 3, 10, 11, 100, 120, 121, 122, 176, 12, 102, 130, 131, 177, 104]},
    {"input_ids": [1, 4, 5, 20, 21, 100, 125, 126, 127, 128, 176, 22, 102, 140, 141, 142]},
    {"input_ids": [2, 102, 150, 151, 152, 153, 154, 155, 156]},
    {"input_ids": [120, 121, 122, 176, 7, 8, 9]},
    {"input_ids": [1, 6, 30, 31, 104]},
]
PROMPTS = [7, 3, 1, 0, 2]
EXAMPLES = [example | {"prompt_length": length} for example, length in zip(EXAMPLES, PROMPTS, strict=True)]
LABELLED = [
    {"input_ids": example["input_ids"], "labels": [-100] * number + example["input_ids"][number:]}
    for example, number in zip(EXAMPLES, PROMPTS, strict=True)
]
OBJECTIVES = {
    "ttt": {},
    "autoregressive": {"audio_objective": "autoregressive"},
    "diffused": {"text_objective": "diffusion"},
}


def pack(examples, max_length=40):
    rows = pack_examples({name: [row[name] for row in examples] for name in examples[0]}, max_length)
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def collate(examples, packing, max_length=40):
    return TttDataCollator(pad_token_id=105)(pack(examples, max_length) if packing else examples)


def outputs_and_gradients(model, batch, seed, **inputs):
    """Gradients are left out where PyTorch has none: flex attention on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    if model.model.language_model.config._attn_implementation == "flex_attention":
        with torch.no_grad():
            return model(**batch, generator=generator, **inputs), {}
    model.zero_grad()
    outputs = model(**batch, generator=generator, **inputs)
    outputs.loss.backward()
    return outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_packed_equals_padded(model, seed=0, **inputs):
    padded, packed = collate(EXAMPLES, packing=False), collate(EXAMPLES, packing=True)
    assert packed["input_ids"].shape == (2, 40)
    in_sequence = packed["input_ids"][packed["input_ids"] != 105]
    assert torch.equal(in_sequence, padded["input_ids"][padded["attention_mask"].bool()])
    expected, expected_gradients = outputs_and_gradients(model, padded, seed, **inputs)
    actual, gradients = outputs_and_gradients(model, packed, seed, **inputs)
    for part in ("loss", "text_loss", "audio_loss"):
        torch.testing.assert_close(actual[part], expected[part], atol=1e-5, rtol=1e-5)
    assert expected.text_loss > 0 and expected.audio_loss > 0
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert torch.equal(actual.score_table[..., 2].sum(0), expected.score_table[..., 2].sum(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_packed_loss_and_gradients_equal_those_of_padded_rows(implementation, objective, training):
    """The noise is the same: levels, prefix choices and masks are drawn by sample and token, whatever the layout."""
    options = {"clean_batch_probability": 0.0, "prefix_preservation_probability": 0.5, "eval_noise_levels": [0.5]}
    model = make_model(**options, **OBJECTIVES[objective]).train(training)
    model.set_attn_implementation(implementation)
    with no_compilation(implementation):
        assert_packed_equals_padded(model)
        assert_packed_equals_padded(model, seed=1, num_items_in_batch=57)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_no_example_sees_another_even_where_both_are_audio(implementation, objective):
    model = make_model(**OBJECTIVES[objective])
    model.set_attn_implementation(implementation)
    hidden_states = []
    model.model.register_forward_hook(lambda module, inputs, output: hidden_states.append(output.last_hidden_state))
    batch = collate(EXAMPLES, packing=True, max_length=64)
    assert batch["input_ids"].shape == (1, 64) and batch["input_ids"][0, 35:37].tolist() == [142, 2]
    with torch.no_grad(), no_compilation(implementation):
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), 64]
        before = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
        for start, stop in zip(starts, starts[1:], strict=False):
            changed = batch["input_ids"].clone()
            changed[0, start:stop] = torch.where(changed[0, start:stop] >= 110, 160, 50)
            after = model.model(changed, position_ids=batch["position_ids"]).last_hidden_state
            differs = (after != before).any(-1)[0]
            assert differs[start:stop].any() and not differs[:start].any() and not differs[stop:].any()


@pytest.mark.parametrize("objective", ["ttt", "diffused"])
def test_answers_are_cut_short_alike_in_packed_and_padded_rows(objective):
    examples = [
        {"input_ids": [1, 2, 10, 102, *range(111, 111 + number), 177, 104], "prompt_length": 2}
        for number in (50, 40, 30, 20)
    ]
    model = make_model(span_truncation_probability=1.0, clean_batch_probability=0.0, **OBJECTIVES[objective]).train()
    padded, packed = (collate(examples, packing, max_length=200) for packing in (False, True))
    assert packed["input_ids"].shape[0] == 1
    ours, theirs = (model(**batch, generator=torch.Generator().manual_seed(0)) for batch in (packed, padded))
    torch.testing.assert_close(ours.loss, theirs.loss)
    scored = ours.score_table[..., 2].sum()
    assert 0 < scored < sum(len(example["input_ids"]) for example in examples) - 50


class Rows(Dataset):
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


class Stream(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        yield from self.examples


def train(tmp_path, dataset, batch_size, accumulation=1, **model_options):
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = make_model(**model_options)
    collator = TttDataCollator(pad_token_id=105)
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=Rows(LABELLED), data_collator=collator)
    trainer.train()
    return trainer


def assert_same_weights(first, second):
    start = dict(make_model().named_parameters())
    for (name, ours), theirs in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(first.model.lm_head.weight, start["lm_head.weight"])


@pytest.mark.parametrize("kind", [Rows, Stream])
def test_the_plain_trainer_takes_the_same_step_packed_and_padded(tmp_path, kind):
    """The noise is drawn from the global generator, as in any training."""
    options = {"clean_batch_probability": 0.0}
    padded, packed = (train(tmp_path, kind(rows), len(rows), **options) for rows in (LABELLED, pack(LABELLED)))
    assert_same_weights(padded, packed)


@pytest.mark.parametrize("objective", ["ttt", "autoregressive"])
def test_accumulated_packed_batches_equal_one_large_padded_batch(tmp_path, objective):
    options = {"clean_batch_probability": 1.0, **OBJECTIVES[objective]}
    large = train(tmp_path, Rows(LABELLED), 5, **options)
    accumulated = train(tmp_path, Rows(pack(LABELLED)), 1, accumulation=2, **options)
    assert_same_weights(large, accumulated)
