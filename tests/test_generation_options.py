"""Text options, limits, refusals and what generation reports."""

import copy
import logging
import warnings

import numpy as np
import pytest
import torch
from builders import build_tokenizer
from reference_sampler import golden_cases, golden_prompts, load_published, reference_generate
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StoppingCriteria,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
)

from modeling_ttt import TttGenerationConfig

MODELS: dict = {}


def model_of(name: str):
    if name not in MODELS:
        MODELS[name] = load_published(name)
    return MODELS[name]


def answer_of(model, prompt, **options) -> list[int]:
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def spans_of(answer: list[int]) -> list[tuple[int, int | None, int | None]]:
    """(codes, begin token, end token) of each span."""
    spans, begin, codes = [], None, 0
    for token in answer:
        if token in (100, 102):
            begin, codes = token, 0
        elif token >= 110 and token not in (176, 177):
            codes += 1
        elif token in (176, 177):
            spans.append((codes, begin, token))
            begin = None
    if begin is not None:
        spans.append((codes, begin, None))
    return spans


class Ban(LogitsProcessor):
    def __init__(self, tokens, shapes):
        self.tokens, self.shapes = tokens, shapes

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


def test_processors_and_penalties_act_on_text_as_in_ordinary_generation():
    model, prompt = model_of("c"), golden_prompts("c")[0]
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    theirs = reference_generate(
        model, prompt, 40, 10, process_text=lambda ids, s: penalty(torch.tensor([ids]), pad_audio(s))[0, : len(s)]
    )
    ours = answer_of(model, prompt, repetition_penalty=1.8, max_new_tokens=41, audio_block_size=10)
    assert ours[:40] == theirs[len(prompt) :][:40]
    assert ours[:40] != answer_of(model, prompt, max_new_tokens=41, audio_block_size=10)[:40]


def pad_audio(scores: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(scores[None], (0, 178 - len(scores)), value=-torch.inf)


def test_a_custom_processor_sees_all_ids_and_the_whole_vocabulary():
    model, prompt, shapes = model_of("c"), golden_prompts("c")[0], []
    plain = answer_of(model, prompt, max_new_tokens=30, audio_block_size=10)
    banned = answer_of(
        model, prompt, max_new_tokens=30, audio_block_size=10, logits_processor=[Ban([plain[0]], shapes)]
    )
    assert plain[0] not in banned
    assert shapes[0] == ((1, len(prompt)), (1, 178))


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.8},
        {"repetition_penalty": 1.8},
        {"bad_words_ids": [[9, 9], [7, 7, 7], [1, 1, 1, 1]]},
        {"sequence_bias": {(7, 7, 7): 5.0, (1, 1, 1, 1): 5.0, (9, 9, 9): 5.0}},
    ],
)
def test_padding_is_no_token_to_processors(tiny_model, options):
    """Few tokens are allowed, among them those that the prompts begin with and the padding."""
    model, allowed = tiny_model(), (1, 2, 7, 9, 100, 105)
    options["suppress_tokens"] = [token for token in range(110) if token not in allowed]
    options |= {"max_new_tokens": 14, "max_audio_codes_per_span": 3, "audio_block_size": 3, "do_sample": True}
    prompts = [[1, 2, 3, 1, 1, 2, 5], [1, 1, 2], [7, 7], [9]]
    rows = torch.tensor([[105] * (7 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for seed in range(6):
        together = model.generate(rows, attention_mask=mask, seed=seed, **options)[:, 7:].tolist()
        for i, prompt in enumerate(prompts):
            alone = answer_of(model, prompt, seed=seed + i, **options)
            assert together[i][: len(alone)] == alone


def test_padding_is_no_part_of_a_stop_string(tiny_model):
    tokenizer, model = build_tokenizer(), tiny_model()
    a, b = tokenizer("ab")["input_ids"]
    model.generation_config.eos_token_id = None
    options = {"stop_strings": ["aab"], "tokenizer": tokenizer, "max_new_tokens": 3}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [b]
    rows, mask = torch.tensor([[a, b, b], [0, 0, a]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert model.generate(rows, attention_mask=mask, **options)[1, 3:].tolist() == [b, b, b]
    assert model.generate(torch.tensor([[a, a, a]]), **options)[0, 3:].tolist() == [b]


def test_a_watermark_that_follows_rows_in_step_is_for_one(tiny_model):
    model, watermark = tiny_model(), SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    options = {"watermarking_config": watermark, "do_sample": True, "max_new_tokens": 3}
    assert len(answer_of(model, [1, 2, 3], **options)) == 3
    with pytest.raises(ValueError, match="`watermarking_config` is SynthID's, .* this call writes 2"):
        model.generate(torch.tensor([[1, 2, 3], [1, 2, 3]]), **options)


def test_a_function_of_allowed_tokens_knows_its_row():
    model, prompt = model_of("b"), golden_prompts("b")[0]
    inputs = torch.tensor([prompt, prompt])
    output = model.generate(inputs, max_new_tokens=5, prefix_allowed_tokens_fn=lambda row, ids: [7 + row])
    assert output[:, len(prompt) :].tolist() == [[7] * 5, [8] * 5]


def test_a_function_of_allowed_tokens_is_never_asked_what_follows_tokens_that_nobody_wrote(tiny_model):
    """One row waits at its span while the other writes text."""
    plans, prompts = ([100, 7, 8, 9, 104], [1, 2, 3, 4, 5, 6, 104]), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def allowed(row, ids):
        written = [token for token in ids[3:].tolist() if token < 110]
        plan = plans[row]
        return [plan[len(written)]] if written == plan[: len(written)] else []

    options = {"max_new_tokens": 30, "audio_block_size": 4, "max_audio_codes_per_span": 4, "pad_token_id": 105}
    by_name = tiny_model().generate(prompts, prefix_allowed_tokens_fn=allowed, **options)
    as_processor = [PrefixConstrainedLogitsProcessor(allowed, 1)]
    assert torch.equal(tiny_model().generate(prompts, logits_processor=as_processor, **options), by_name)
    for answer, plan in zip(by_name[:, 3:].tolist(), plans, strict=True):
        assert [token for token in answer if token < 110 and token != 105] == plan


class Spoilt(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * torch.nan


@pytest.mark.parametrize(
    "options", [{"prefix_allowed_tokens_fn": lambda row, ids: [120]}, {"logits_processor": [Spoilt()]}]
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_where_no_text_token_is_left_none_is_made_up(tiny_model, options, do_sample):
    with pytest.raises(ValueError, match="No text token is left to choose for row 0 after 0 new tokens"):
        tiny_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=do_sample, **options)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1, 2, 100]])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "audio_temperature": 1.0}, {"audio_guidance_scale": 0.5}])
def test_a_model_that_gives_no_numbers_is_refused(tiny_model, prompt, options):
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits for row 0 are NaN after 0 new tokens: its weights hold NaN, or"):
        model.generate(torch.tensor([prompt]), max_new_tokens=6, **options)


def test_sampling_text_follows_top_k():
    model, prompt = model_of("c"), golden_prompts("c")[0]
    greedy = answer_of(model, prompt, max_new_tokens=20)
    assert answer_of(model, prompt, max_new_tokens=20, do_sample=True, top_k=1) == greedy
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 20}
    assert any(answer_of(model, prompt, seed=seed, **hot) != greedy for seed in range(3))


def test_a_stopping_criterion_ends_text_and_closes_a_span():
    model, case = model_of("c"), golden_cases("c")[3]

    class After(StoppingCriteria):
        def __init__(self, length):
            self.length = length

        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)

    prompt, options = case["prompt"], {"max_new_tokens": 100, "audio_block_size": 10, "audio_steps_per_block": 10}
    in_text = answer_of(model, prompt, stopping_criteria=[After(len(prompt) + 2)], **options)
    assert in_text == case["output"][len(prompt) :][:2]
    in_span = answer_of(model, prompt, stopping_criteria=[After(len(prompt) + 30)], **options)
    assert 30 <= len(in_span) <= 42 and in_span[-1] in (176, 177)
    assert in_span[:-1] == case["output"][len(prompt) :][: len(in_span) - 1]
    assert len(answer_of(model, prompt, max_time=0.0, **options)) == 1


@pytest.mark.parametrize("block_causal", [{}, {"span_attention": "block_causal", "block_lengths": [4]}])
def test_the_end_of_a_span_may_end_the_answer(tiny_model, block_causal):
    """As of the twin, which any such token ends."""
    model, options = tiny_model(**block_causal), {"max_new_tokens": 40, "audio_block_size": 4}
    options |= {"max_audio_codes_per_span": 6}
    prompt = [1, 2, 100]  # a span is open
    whole = answer_of(model, prompt, **options)
    end = whole.index(176)
    assert end < len(whole) - 1
    assert answer_of(model, prompt, eos_token_id=[104, 176], **options) == whole[: end + 1]
    longer = answer_of(model, prompt, eos_token_id=[104, 176], min_new_tokens=end + 2, **options)
    assert longer[: end + 2] == whole[: end + 2]


def test_eos_can_be_several_tokens_or_none():
    model, case = model_of("a"), golden_cases("a")[0]
    answer = case["output"][len(case["prompt"]) :]
    options = {"max_new_tokens": 40, "audio_block_size": 10, "audio_steps_per_block": 10}
    assert answer_of(model, case["prompt"], eos_token_id=[104, answer[0]], **options) == answer[:1]
    endless = answer_of(model, case["prompt"], eos_token_id=[109], **options)
    assert endless[: len(answer)] == answer and len(endless) == 40


@pytest.mark.parametrize("limit", range(1, 24))
def test_the_length_limit_is_never_exceeded_and_cuts_without_changing(limit):
    model, prompt = model_of("c"), golden_prompts("c")[2]
    options = {"audio_block_size": 10, "audio_steps_per_block": 2}
    unlimited = answer_of(model, prompt, max_new_tokens=60, **options)
    cut = answer_of(model, prompt, max_new_tokens=limit, **options)
    assert len(cut) == limit
    assert cut[:-1] == unlimited[: limit - 1]
    spans = spans_of(cut)
    if cut[-1] in (176, 177) and cut[-1] != unlimited[limit - 1]:
        assert spans[-1][2] == {100: 176, 102: 177}[spans[-1][1]]


@pytest.mark.parametrize("most", [1, 9, 10, 11, 25])
def test_a_span_without_end_is_closed_at_its_own_limit(most):
    model, case = model_of("c"), golden_cases("c")[3]
    options = {"max_new_tokens": 80, "audio_block_size": 10, "audio_steps_per_block": 10}
    answer = answer_of(model, case["prompt"], max_audio_codes_per_span=most, **options)
    spans = spans_of(answer)
    assert all(codes <= most for codes, _, _ in spans)
    codes, begin, end = spans[0]
    assert codes == most and end == {100: 176, 102: 177}[begin]
    position = answer.index(begin) + 1 + most
    assert answer[:position] == case["output"][len(case["prompt"]) :][:position]
    assert len(answer) > position + 1  # text goes on


def test_a_context_too_short_is_refused_before_any_forward(monkeypatch):
    model, prompt = load_published("a", max_position_embeddings=64), golden_prompts("a")[0]
    assert len(answer_of(model, prompt, max_new_tokens=48, eos_token_id=[109])) == 48
    monkeypatch.setattr(model.model.language_model, "forward", None)
    with pytest.raises(ValueError, match=r"16 tokens.*49.*65 positions.*64"):
        model.generate(torch.tensor([prompt]), max_new_tokens=49)


def test_a_limit_that_the_call_does_not_name_is_cut_to_the_room_there_is():
    model, prompt = load_published("a", max_position_embeddings=64), golden_prompts("a")[0]
    explicit = answer_of(model, prompt, max_new_tokens=48, eos_token_id=[109])
    for limits in ({"max_new_tokens": 2048}, {"max_new_tokens": None, "max_length": 2048}, {"max_length": None}):
        model.generation_config.update(**limits)
        assert answer_of(model, prompt, eos_token_id=[109]) == explicit
    model.generation_config.update(max_new_tokens=2048)
    for settings in (TttGenerationConfig(eos_token_id=[109]), copy.deepcopy(model.generation_config)):
        settings.eos_token_id = [109]
        assert answer_of(model, prompt, generation_config=settings) == explicit
    for named in ({"max_new_tokens": 49}, {"generation_config": TttGenerationConfig(max_new_tokens=49)}):
        with pytest.raises(ValueError, match=r"`max_new_tokens` \(49\)"):
            answer_of(model, prompt, **named)
    model.generation_config.update(max_new_tokens=5)
    assert len(answer_of(model, prompt, eos_token_id=[109])) == 5
    with pytest.raises(ValueError, match="longest prompt has 64 tokens"):
        answer_of(model, prompt * 4)


def test_a_prompt_ends_where_its_labels_begin(tiny_model):
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3, 10, 11, 104], [105, 105, 4, 5, 12, 104]])
    labels = torch.tensor([[-100, -100, -100, 10, 11, 104], [-100, -100, -100, -100, 12, 104]])
    options = {"max_new_tokens": 4, "eos_token_id": [109]}
    rows = model.generate(ids, attention_mask=(ids != 105).long(), labels=labels, **options)
    assert torch.equal(rows[:, :6], ids)
    assert rows[:, 6:].tolist() == [answer_of(model, prompt, **options) for prompt in ([1, 2, 3], [4, 5])]
    with pytest.raises(ValueError, match="`labels`, leaves a row without"):
        model.generate(ids, labels=ids)
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 5\)"):
        model.generate(ids, labels=labels[:, 1:])


class Prompts(Dataset):
    """Rows of an evaluation: prompt and answer."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ids = [1, 2, 3, 10 + index, 11, 104]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * 3 + ids[3:])}


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_what_a_processor_says_of_prompts_is_taken(tiny_model, objective):
    model, ids = tiny_model(audio_objective=objective), torch.tensor([[1, 2, 100, 111, 112, 101]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**inputs, max_new_tokens=5)
    kinds = torch.tensor([[0, 0, 0, 3, 3, 0]])
    assert torch.equal(model.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=5), expected)


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_the_sequence_to_sequence_trainer_predicts_with_generate(tiny_model, objective, tmp_path):
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        predict_with_generate=True,
        generation_max_length=16,
        per_device_eval_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny_model(audio_objective=objective)
    model.generation_config.eos_token_id = [109]
    trainer = Seq2SeqTrainer(model, arguments, eval_dataset=Prompts(), processing_class=Padding())
    for _ in range(2):  # it sets defaults of the library in the model's settings
        prediction = trainer.predict(Prompts())
        assert prediction.predictions.shape == (3, 20) and np.isfinite(prediction.metrics["test_loss"])
        expected = model.generate(torch.tensor([[1, 2, 3]] * 3), max_new_tokens=10, eos_token_id=[109])
        assert prediction.predictions[:, 6:16].tolist() == expected[:, 3:].tolist()
        assert prediction.predictions[:, :6].tolist() == [Prompts()[index]["input_ids"].tolist() for index in range(3)]


class Padding:
    """What the trainer needs of a tokenizer."""

    pad_token_id = 105

    def save_pretrained(self, folder):
        pass


def test_padding_does_not_count_against_the_context():
    model, prompt = load_published("a", max_position_embeddings=64), golden_prompts("a")[0]
    padded = {"inputs": torch.tensor([[105] * 30 + list(prompt)]), "attention_mask": torch.ones(1, 46).long()}
    padded["attention_mask"][:, :30] = 0
    assert model.generate(**padded, max_new_tokens=48)[0, 46:].tolist() == answer_of(model, prompt, max_new_tokens=48)


def test_without_a_length_the_answer_gets_room(recwarn):
    model, case = model_of("a"), golden_cases("a")[3]
    answer = answer_of(model, case["prompt"], audio_block_size=10, audio_steps_per_block=10)
    assert answer == case["output"][len(case["prompt"]) :]  # 48 tokens: more than GenerationMixin's 20
    assert not [warning for warning in recwarn if "max_length" in str(warning.message)]


@pytest.mark.parametrize("objective", [{}, {"text_objective": "diffusion"}])
def test_continuous_batching_is_refused_at_every_entry(tiny_model, objective):
    model = tiny_model(**objective)
    entries = (
        lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=3),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
    )
    for entry in entries:
        with pytest.raises(ValueError, match="Continuous batching .* call `generate`"):
            entry()
    with pytest.raises(ValueError, match="`cache_implementation"):
        model.generate(torch.tensor([[1, 2, 3]]), cache_implementation="paged")
    twin = tiny_model(audio_objective="autoregressive")
    assert type(twin.init_continuous_batching()).__name__ == "ContinuousBatchingManager"


@pytest.mark.parametrize("normalize", [True, False])
def test_transition_scores_are_those_of_the_text_and_none_of_the_audio(normalize):
    model, case = model_of("a"), golden_cases("a")[0]
    output = model.generate(
        torch.tensor([case["prompt"]]),
        max_new_tokens=40,
        audio_block_size=10,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert isinstance(output, GenerateDecoderOnlyOutput)
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=normalize)
    answer = output.sequences[0, len(case["prompt"]) :]
    assert transitions.shape == (1, len(answer)) and (answer >= 110).any() and (answer < 110).any()
    logits = model(output.sequences).logits[0, len(case["prompt"]) - 1 : -1]
    logits[:, 110:] = -torch.inf
    expected = (logits.log_softmax(-1) if normalize else logits).gather(1, answer[:, None])[:, 0]
    torch.testing.assert_close(transitions[0], expected.where(answer < 110, 0.0), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`scores` has 0 entries"):
        model.compute_transition_scores(output.sequences, ())


@pytest.mark.parametrize(
    "backbone, message",
    [
        ({"model_type": "mistral", "sliding_window": 4}, "`sliding_window` = 4"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "= 4"),
        ({"model_type": "mistral", "sliding_window": 256}, None),
    ],
)
def test_a_backbone_that_sees_a_window_only_is_refused_however_its_configuration_says_so(tiny_model, backbone, message):
    model, prompt = tiny_model(backbone), torch.tensor([[1, 2, 3, 4, 5, 6]])
    if message is None:
        answer = model.generate(prompt, max_new_tokens=1)[0, -1]
        assert answer == model(prompt).logits[0, -1, :110].argmax()
        return
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, max_new_tokens=3)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_beams", 3),
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 1),
        ("force_words_ids", [[1]]),
        ("use_mtp", True),
        ("guidance_scale", 2.0),
        ("prefill_chunk_size", 8),
        ("output_attentions", True),
        ("cache_implementation", "static"),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "offloaded"),
        ("assistant_model", "any"),
        ("negative_prompt_ids", torch.tensor([[1]])),
        ("position_ids", torch.tensor([[0, 1, 2]])),
        ("generator", torch.Generator()),
        ("logits_to_keep", 1),
        ("num_items_in_batch", 3),
        ("assistant_tokenizer", "any"),
        ("negative_prompt_attention_mask", torch.tensor([[1]])),
        ("inputs_embeds", torch.zeros(1, 3, 32)),
        ("synced_gpus", True),
        ("stop_strings", "stop"),
        ("input_ids", torch.tensor([[1]])),
        ("generation_mode", "text"),
        ("attention_mask", torch.tensor([[-1e9, 0.0, 0.0]])),
        ("suppress_tokens", [111]),
        ("begin_suppress_tokens", [1, 111]),
        ("bad_words_ids", [[1], [1, 111]]),
        ("sequence_bias", {(1, 111): 1.0}),
    ],
)
def test_modes_without_meaning_are_refused_by_name(tiny_model, name, value):
    with pytest.raises(ValueError, match=f"`{name}"):
        tiny_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, **{name: value})


@pytest.mark.parametrize("name", ["bad_words_ids", "sequence_bias"])
def test_a_text_token_is_kept_from_standing_behind_audio(tiny_model, name):
    model, options = tiny_model(), {"max_new_tokens": 12, "max_audio_codes_per_span": 2, "eos_token_id": [109]}
    before = answer_of(model, [1, 2, 100], **options)
    end = next(place for place, token in enumerate(before) if token in (176, 177))
    value = [[before[end], before[end + 1]]] if name == "bad_words_ids" else {tuple(before[end : end + 2]): -100.0}
    after = answer_of(model, [1, 2, 100], **options, **{name: value})
    assert after[: end + 1] == before[: end + 1] and after[end + 1] != before[end + 1]


def test_processors_of_the_twin_do_not_see_labels(tiny_model):
    model = tiny_model(audio_objective="autoregressive")
    ids, labels = torch.tensor([[1, 2, 3, 67, 6, 104]]), torch.tensor([[-100] * 3 + [67, 6, 104]])
    options = {"max_new_tokens": 5, "no_repeat_ngram_size": 1, "eos_token_id": [109]}
    alone = model.generate(ids[:, :3], **options)[0, 3:]
    assert torch.equal(model.generate(ids, labels=labels, **options)[0, 6:], alone)
    assert model.generate(ids, generation_mode="audio", max_new_tokens=2).shape == (1, 8)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("audio_step_per_block", "audio_steps_per_block"),
        ("max_audio_codes_per_spans", "max_audio_codes_per_span"),
    ],
)
def test_a_misspelled_option_of_audio_is_refused_wherever_it_stands(tiny_model, name, meant):
    model, prompt = tiny_model(), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=f"no option `{name}`; did you mean `{meant}`"):
        TttGenerationConfig(**{name: 3})
    setattr(model.generation_config, name, 3)
    with pytest.raises(ValueError, match=f"no option `{name}`"):
        model.generate(prompt, max_new_tokens=3)


def test_a_limit_that_the_checkpoint_alone_sets_is_no_reason_for_a_warning(tiny_model, caplog):
    model = tiny_model()
    model.generation_config.max_length = 7
    logger = logging.getLogger("transformers.generation.utils")
    logger.addHandler(caplog.handler)
    try:
        assert model.generate(torch.tensor([[1, 2, 3]]), eos_token_id=[109]).shape == (1, 7)
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, eos_token_id=[109]).shape == (1, 5)
    finally:
        logger.removeHandler(caplog.handler)
    assert "seem to have been set" not in caplog.text


def test_refusals_also_come_from_the_models_own_settings_and_a_passed_config(tiny_model):
    model, prompt = tiny_model(), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="`num_beams=2`.*beam search"):
        model.generate(prompt, generation_config=GenerationConfig(num_beams=2, max_new_tokens=3))
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="`num_beams=2`.*beam search"):
        model.generate(prompt, max_new_tokens=3)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"inputs": None}, "inputs"),
        ({"inputs": torch.tensor([1, 2])}, "shape"),
        ({"inputs": torch.zeros(0, 3).long()}, r"shape \(0, 3\); use \(batch, length\)"),
        ({"inputs": [[1, 2]]}, "`inputs` is a list; pass a tensor"),
        ({"attention_mask": torch.ones(1, 5).long()}, "whole conversation"),
        ({"attention_mask": [[1, 1, 1]]}, "`attention_mask` is a list"),
        ({"logits_processor": "penalty"}, "`logits_processor` is 'penalty'"),
        ({"stopping_criteria": [3]}, "`stopping_criteria` is"),
        ({"streamer": print}, "`streamer` is a builtin_function_or_method"),
        ({"attention_mask": torch.zeros(1, 3).long()}, "without any token"),
        ({"inputs": torch.tensor([[105, 1], [105, 105]])}, "Row 1 of `inputs` is padding throughout"),
        ({"inputs": torch.tensor([[1, 178]])}, "Row 0 of `inputs` holds 178, .* ids 0 to 177"),
        ({"inputs": torch.tensor([[1, -100]])}, "Row 0 of `inputs` holds -100"),
        ({"inputs": torch.ones(1, 3)}, "`inputs` is of type torch.float32; pass token ids"),
        ({"generation_config": {"max_new_tokens": 3}, "max_new_tokens": None}, "`generation_config` is a dict"),
        ({"eos_token_id": [104, 120]}, r"`eos_token_id` has 120, .* \(176 and 177\)"),
        ({"eos_token_id": 175}, "`eos_token_id` has 175, a code or the mask token"),
        ({"seed": [1, 2], "do_sample": True}, "seed"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_unusable_calls_are_refused(tiny_model, call, message):
    model = tiny_model()
    for method in (model.generate, model.prepare_call):
        with pytest.raises(ValueError, match=message):
            method(**{"inputs": torch.tensor([[1, 2, 3]]), "max_new_tokens": 3, **call})


def test_training_with_gradient_checkpointing_is_refused(tiny_model):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="model.eval"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)


def test_training_mode_gives_no_false_alarm(tiny_model):
    prompt = torch.tensor([[1, 2, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = tiny_model().train().generate(prompt, max_new_tokens=3)
    assert written.equal(tiny_model().generate(prompt, max_new_tokens=3))


def test_a_model_without_values_says_so(tiny_model):
    with pytest.raises(ValueError, match="'meta' device, which holds no values: load it with"):
        tiny_model().to("meta").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)


def test_the_result_reports_forwards_and_tokens_per_forward():
    model, case = model_of("a"), golden_cases("a")[0]
    output = model.generate(
        torch.tensor([case["prompt"]]),
        max_new_tokens=40,
        audio_block_size=10,
        audio_steps_per_block=2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    new = output.sequences.shape[1] - len(case["prompt"])
    text = sum(token < 110 for token in output.sequences[0, len(case["prompt"]) :].tolist())
    assert output.forwards_per_row.tolist() == [output.num_forwards]
    assert output.num_forwards <= text + 4
    assert 1 <= output.denoising_steps_per_row.tolist()[0] <= output.num_forwards - text + 1
    assert output.tokens_per_forward.tolist() == pytest.approx([new / output.num_forwards])
    assert output.tokens_per_forward[0] > 1
    assert len(output.scores) == len(output.logits) == new
    assert sum(bool(scores.isfinite().any()) for scores in output.scores) == text
    assert output.scores[0].shape == (1, 178) and output.scores[0][0, 110:].max() == -torch.inf
    assert int(output.scores[0].argmax()) == int(output.sequences[0, len(case["prompt"])])


def test_guidance_costs_forwards_only_above_zero():
    model, case = model_of("a"), golden_cases("a")[0]
    options = {"max_new_tokens": 40, "audio_block_size": 10, "return_dict_in_generate": True}
    plain, zero, guided = (
        model.generate(torch.tensor([case["prompt"]]), **options, **extra).num_forwards
        for extra in ({}, {"audio_guidance_scale": 0.0}, {"audio_guidance_scale": 1e-6})
    )
    assert plain == zero < guided


def test_the_first_unconditional_step_is_shared_by_rows_of_one_length():
    model, prompt = model_of("a"), torch.tensor([golden_prompts("a")[0]])
    options = {
        "max_new_tokens": 10,
        "audio_block_size": 4,
        "audio_guidance_scale": 0.5,
        "return_dict_in_generate": True,
    }
    one, two = (model.generate(prompt.repeat(n, 1), **options) for n in (1, 2))
    assert two.num_forwards == one.num_forwards
    assert two.num_token_positions < 2 * one.num_token_positions


def test_a_confident_model_takes_fewer_steps_with_a_threshold():
    model, case = model_of("b"), golden_cases("b")[0]
    options = {"max_new_tokens": 60, "audio_block_size": 10, "return_dict_in_generate": True}
    prompt = torch.tensor([case["prompt"]])
    eager, careful, single = (
        model.generate(prompt, **options, **extra)
        for extra in (
            {"audio_confidence_threshold": 0.5},
            {"audio_confidence_threshold": 1.0},
            {"audio_steps_per_block": 10},
        )
    )
    assert eager.num_forwards < careful.num_forwards <= single.num_forwards


def test_the_autoregressive_twin_generates_as_any_model(tiny_model):
    model, prompt = tiny_model(audio_objective="autoregressive"), torch.tensor([[1, 2, 3]])
    output = model.generate(prompt, max_new_tokens=6, audio_steps_per_block=3, eos_token_id=[109])
    logits = model(output).logits.argmax(-1)
    assert output.shape == (1, 9) and torch.equal(output[:, 3:], logits[:, 2:-1])
    assert model.generate(prompt, max_new_tokens=3, num_beams=2).shape[0] == 1


@pytest.mark.parametrize("as_config", [False, True])
def test_a_max_length_in_the_call_goes_before_the_checkpoints_max_new_tokens(tiny_model, as_config):
    model, prompt = tiny_model(), torch.randint(0, 100, (1, 240))  # 256 positions
    model.generation_config.max_new_tokens = 40

    def generate(max_length):
        if as_config:
            return model.generate(prompt, generation_config=GenerationConfig(max_length=max_length, eos_token_id=104))
        return model.generate(prompt, max_length=max_length)

    assert generate(max_length=250).shape[1] <= 250
    with pytest.raises(ValueError, match="`max_length` is 240, but the prompts are 240 tokens wide"):
        generate(max_length=240)


def test_a_prompt_longer_than_the_context_is_what_the_error_names(tiny_model):
    with pytest.raises(ValueError, match="longest prompt has 300 tokens.*= 256. Shorten the prompt"):
        tiny_model().generate(torch.ones(1, 300, dtype=torch.long))


def test_a_config_in_the_call_gets_the_default_limit_without_a_warning(tiny_model, caplog):
    model, config = tiny_model(), GenerationConfig(do_sample=False, eos_token_id=104)
    model.generation_config.max_new_tokens = 3
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        answer = model.generate(torch.tensor([[1, 2, 3]]), generation_config=config)
    finally:
        logger.removeHandler(caplog.handler)
    assert answer.shape[1] <= 6 and config.max_new_tokens is None
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"do_sample": False}, None), ({"do_sample": False, "top_p": 0.5}, "['top_p']")],
    ids=["of the checkpoint", "of the call"],
)
def test_settings_for_sampling_are_warned_of_where_the_call_has_them(tiny_model, caplog, options, named):
    model = tiny_model()
    model.generation_config.update(do_sample=True, top_k=10, top_p=0.95)
    logger = logging.getLogger("transformers")
    type(logger).warning_once.cache_clear()  # which says nothing twice in one process
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):  # commands turn it down
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, **options)
    finally:
        logger.removeHandler(caplog.handler)
    # Once or twice: an earlier test may have let the library's records through to the root logger.
    warned = {record.getMessage() for record in caplog.records if "generation flags" in record.getMessage()}
    assert len(warned) == (named is not None) and all(named in line for line in warned)
