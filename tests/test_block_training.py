"""Training in blocks: what is cut, filled, copied and scored, against plain computations without any of it."""

import pytest
import torch
from conftest import make_config, make_model, no_compilation
from torch.nn import functional as F

from modeling_ttt.objective_ttt import draw_noise
from processing import TttDataCollator, pack_examples

MASK, END, LAST, PAD = 175, 176, 177, 105
PLAIN = {
    "clean_batch_probability": 0.0,
    "prefix_preservation_probability": 0.0,
    "span_truncation_probability": 0.0,
    "noise_epsilon": 0.2,
}
ALIGNED = {**PLAIN, "block_masking_probability": 1.0, "block_lengths": (3, 4)}
CAUSAL = {**PLAIN, "span_attention": "block_causal", "block_lengths": (3, 4)}
# User audio in the prompt; a span of 4 codes, a last span of 5; a response of text alone; one long span.
EXAMPLES = [
    ([1, 100, 111, 112, 113, 101, 3], [10, 100, 120, 121, 122, 123, END, 12, 102, 130, 131, 132, 133, 134, LAST, 104]),
    ([1, 4, 5], [20, 21, 104]),
    ([2, 6], [22, 102, 140, 141, 142, 143, 144, 145, 146, LAST, 104]),
]


def collate(examples=EXAMPLES, packing: bool = False, left: bool = False) -> dict[str, torch.Tensor]:
    if packing:
        ids, labels = [p + a for p, a in examples], [[-100] * len(p) + a for p, a in examples]
        rows = pack_examples({"input_ids": ids, "labels": labels}, max_length=64)
        return TttDataCollator(pad_token_id=PAD)(
            [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        )
    length = max(len(p) + len(a) for p, a in examples)
    columns = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, answer in examples:
        room = length - len(prompt) - len(answer)
        rows = prompt + answer, [-100] * len(prompt) + answer, [1] * (length - room)
        for name, row, filling in zip(columns, rows, (PAD, -100, 0), strict=True):
            columns[name].append([filling] * room + row if left else row + [filling] * room)
    return {name: torch.tensor(values) for name, values in columns.items()}


def draws_of(monkeypatch) -> list:
    drawn = []
    monkeypatch.setattr(
        "modeling_ttt.modeling_ttt.draw_noise", lambda *args: drawn.append(draw_noise(*args)) or drawn[-1]
    )
    return drawn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(answer: list[int], length: int) -> list[tuple[int, list[int]]]:
    """Where each block of an answer starts, and the block, filled up."""
    found, place = [], 0
    for index, token in enumerate(answer):
        if not 110 <= token <= LAST:
            place = 0
            continue
        if place % length == 0:
            found.append((index, []))
        found[-1][1].append(token)
        place += 1
        if token in (END, LAST):
            found[-1][1].extend([token] * (length - len(found[-1][1])))
    return found


def text_loss(model, ids: list[int], num_prompt: int, **options) -> torch.Tensor:
    """Next-token loss of the text in ids after the prompt, all of it clean."""
    logits = model(torch.tensor([ids]), **options).logits[0]
    at = [i for i in range(num_prompt, len(ids)) if ids[i] < 110]
    return F.cross_entropy(logits[[i - 1 for i in at]], torch.tensor([ids[i] for i in at]))


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_is_cut_after_a_block_that_is_filled_up_and_scored_alone(seed, monkeypatch):
    model = make_model(**ALIGNED, block_filling_weight=0.25).train()
    drawn = draws_of(monkeypatch)
    output = model(**collate(), generator=seeded(seed))
    (noise,) = drawn
    expected = []
    for row, (prompt, answer) in enumerate(EXAMPLES):
        is_token = noise.batch.attention_mask[row].bool()
        ids, seen = noise.batch.input_ids[row][is_token].tolist(), noise.input_ids[row][is_token].tolist()
        if row == 1:  # nothing but text: whole
            assert ids == seen == prompt + answer
            expected.append(text_loss(model, ids, len(prompt)))
            continue
        cuts = [
            (len(prompt) + start, length)
            for length in (3, 4)
            for start, block in blocks_of(answer, length)
            if prompt + answer[:start] + block == ids
        ]
        assert cuts, ids
        start = max(first for first, _ in cuts if not noise.maskable[row, :first].any())
        assert noise.maskable[row, : len(ids)].tolist() == [False] * start + [True] * (len(ids) - start)
        assert seen[:start] == ids[:start]
        level = noise.levels[row, 0]
        num_real = len([t for t in (prompt + answer)[start : len(ids)] if 110 <= t])
        num_real = min(num_real, 1 + next((i for i, t in enumerate(ids[start:]) if t in (END, LAST)), len(ids)))
        weights = torch.tensor([1.0] * num_real + [0.25] * (len(ids) - start - num_real))
        logits = model(torch.tensor([seen]), span_ids=model.model.get_span_ids(torch.tensor([ids]))).logits[0, start:]
        losses = F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none")
        hidden = torch.tensor(seen[start:]) == MASK
        audio = (losses * weights * hidden).sum() / level / weights.sum()
        span_ids = model.model.get_span_ids(torch.tensor([ids]))
        at = [i for i in range(len(prompt), start) if ids[i] < 110]
        text_logits = model(torch.tensor([seen]), span_ids=span_ids).logits[0, [i - 1 for i in at]]
        expected.append(audio + F.cross_entropy(text_logits, torch.tensor([ids[i] for i in at])))
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())


def test_every_block_is_cut_after_in_time(monkeypatch):
    model = make_model(**ALIGNED).train()
    drawn = draws_of(monkeypatch)
    for seed in range(80):
        model(**collate(EXAMPLES[2:]), generator=seeded(seed))
    prompt, answer = EXAMPLES[2]
    wanted = {tuple(prompt + answer[:s] + b) for length in (3, 4) for s, b in blocks_of(answer, length)}
    assert {tuple(noise.batch.input_ids[0].tolist()) for noise in drawn} == wanted


def test_without_blocks_and_in_clean_batches_nothing_is_cut(monkeypatch):
    drawn = draws_of(monkeypatch)
    for options in ({"block_masking_probability": 0.0}, {"clean_batch_probability": 1.0}):
        batch = collate()
        make_model(**{**ALIGNED, **options}).train()(**batch, generator=seeded())
        kept = drawn[-1].batch.input_ids[batch["attention_mask"].bool()]
        assert torch.equal(kept, batch["input_ids"][batch["attention_mask"].bool()])
    assert not drawn[-1].masked.any()


def test_a_span_cut_off_without_an_end_is_scored_in_its_full_blocks_only(monkeypatch):
    prompt, answer = [2, 6], [22, 102, 140, 141, 142, 143, 144]
    drawn = draws_of(monkeypatch)
    model = make_model(**{**ALIGNED, "block_lengths": (3,)}).train()
    for seed in range(20):
        model(**collate([(prompt, answer)]), generator=seeded(seed))
    assert {tuple(noise.batch.input_ids[0].tolist()) for noise in drawn} == {tuple(prompt + answer[:5])}


@pytest.mark.parametrize("options", [ALIGNED, {**ALIGNED, "block_masking_probability": 0.5}, CAUSAL])
@pytest.mark.parametrize("full", [0.0, 0.5])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(options, full):
    results = []
    for batch in (collate(), collate(packing=True), collate(left=True)):
        model = make_model(**options, full_block_probability=full).train()
        output = model(**batch, generator=seeded(2))
        output.loss.backward()
        results.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_block_causal_spans_score_every_block_behind_what_is_clean(seed, monkeypatch):
    """Against one forward a block, over the clean tokens before it and the block."""
    model = make_model(**{**CAUSAL, "block_lengths": (3,)}, block_filling_weight=0.25).train()
    drawn = draws_of(monkeypatch)
    output = model(**collate(), generator=seeded(seed))
    (noise,) = drawn
    texts, audios = [], []
    for row, (prompt, answer) in enumerate(EXAMPLES):
        texts.append(text_loss(model, prompt + answer, len(prompt)))
        copies = noise.maskable[row].nonzero()[:, 0].tolist()
        total, weight_sum = torch.tensor(0.0), 0.0
        for start, block in blocks_of(answer, 3):
            columns, copies = copies[: len(block)], copies[len(block) :]
            assert noise.batch.labels[row, columns].tolist() == block
            seen, before = noise.input_ids[row, columns].tolist(), prompt + answer[:start]
            level = noise.levels[row, columns[0]]
            assert (noise.levels[row, columns] == level).all()
            span_ids = model.model.get_span_ids(torch.tensor([before + block]))
            logits = model(torch.tensor([before + seen]), span_ids=span_ids).logits[0, len(before) :]
            losses = F.cross_entropy(logits, torch.tensor(block), reduction="none")
            first_end = next((i for i, token in enumerate(block) if token in (END, LAST)), len(block))
            weights = torch.tensor([1.0 if i <= first_end else 0.25 for i in range(len(block))])
            total = total + (losses * weights * (torch.tensor(seen) == MASK) / level).sum()
            weight_sum += weights.sum()
        assert copies == []
        audios.append(total / max(weight_sum, 1.0))
    torch.testing.assert_close(output.text_loss, torch.stack(texts).mean())
    torch.testing.assert_close(output.audio_loss, torch.stack(audios).mean())


def test_a_code_sees_the_blocks_before_its_own_and_its_own():
    model = make_model(**{**CAUSAL, "block_lengths": (3,)})
    ids = torch.tensor([EXAMPLES[2][0] + EXAMPLES[2][1]])  # 2 6 | 22 102 | 3 codes, 3 codes, code and end | 104
    assert model.model.get_span_ids(ids).tolist() == [[-1] * 4 + [0, 0, 0, 1, 1, 1, 2, 2, -1]]
    assert model.model.get_span_ids(ids, block_length=5).tolist() == [[-1] * 4 + [0] * 5 + [1] * 3 + [-1]]
    before = model(ids).logits
    changed = ids.clone()
    changed[0, 8] = 150  # in the second block
    differs = (model(changed).logits != before).any(-1)[0].tolist()
    assert differs == [False] * 7 + [True] * 6


@pytest.mark.parametrize("seen", [0, 2, 3])
def test_a_span_that_the_prompt_begins_is_scored_behind_what_it_holds(seen, monkeypatch):
    """Blocks of 3 on the span's own grid, as `generate` goes on: no copy sees what it is to predict."""
    model = make_model(**{**CAUSAL, "block_lengths": (3,)}, full_block_probability=1.0).train()
    drawn = draws_of(monkeypatch)
    prompt, answer = [1, 2, 102, 120, 121, 122][: 3 + seen], [130, 131, 132, 133, LAST, 104]

    def states_of(answer: list[int]) -> torch.Tensor:
        model(**collate([(prompt, answer)]), generator=seeded())
        noise = drawn.pop()
        hidden = model.model(**model._inputs_of(noise)).last_hidden_state[0]
        return hidden[noise.masked[0]]

    before = states_of(answer)
    for place in range(4):
        changed = [*answer[:place], 150, *answer[place + 1 :]]
        differs = (states_of(changed) - before).abs().amax(-1) > 1e-6
        later = [(seen + index) // 3 > (seen + place) // 3 for index in range(len(before))]  # in a block behind it
        assert differs.tolist() == later


@pytest.mark.parametrize("num_codes", [2, 3, 7])
def test_a_users_audio_that_is_scored_is_one_block(num_codes, monkeypatch):
    model = make_model(**{**CAUSAL, "block_lengths": (3,)}, full_block_probability=1.0).train()
    drawn = draws_of(monkeypatch)
    codes = list(range(120, 120 + num_codes))
    model(**collate([([1], [100, *codes, 101, 104])]), generator=seeded())
    noise = drawn.pop()
    assert noise.batch.labels[0][noise.masked[0]].tolist() == codes
    assert noise.batch.span_ids[0][noise.masked[0]].unique().numel() == 1


def test_what_starts_the_next_packed_sequence_closes_no_span():
    model = make_model(**{**CAUSAL, "block_lengths": (2,)})
    ids, positions = torch.tensor([[1, 102, 120, 121, 122, 101, 2]]), torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    assert model.model.get_span_ids(ids, position_ids=positions).tolist() == [[-1, -1, 0, 0, 1, -1, -1]]
    assert model.model.get_span_ids(ids).tolist() == [[-1, -1, 0, 0, 0, -1, -1]]


def test_a_users_audio_stays_whole_or_causal_as_the_configuration_says():
    ids = torch.tensor([[1, 100, 111, 112, 113, 114, 101, 2, 102, 120, 121, 122]])
    for causal, numbers in ((False, [-1, -1, 0, 0, 0, 0, -1, -1, -1, 1, 1, 2]), (True, [-1] * 9 + [1, 1, 2])):
        model = make_model(span_attention="block_causal", block_lengths=(2,), causal_prompt_audio=causal)
        assert model.model.get_span_ids(ids).tolist() == [numbers]


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("packing", [False, True])
def test_attention_backends_agree_on_copies(implementation, packing):
    losses = []
    for name in ("sdpa", implementation):
        model = make_model(**CAUSAL).train()
        model.set_attn_implementation(name)
        with no_compilation(name), torch.no_grad():
            losses.append(model(**collate(packing=packing), generator=seeded()).loss)
    torch.testing.assert_close(*losses)


def test_evaluation_of_block_causal_spans_is_the_same_in_every_batch():
    model = make_model(**CAUSAL)
    together = model(**collate())
    again, packed, left = model(**collate()), model(**collate(packing=True)), model(**collate(left=True))
    assert torch.equal(together.loss, again.loss)
    for other in (packed, left):
        torch.testing.assert_close(other.loss, together.loss)
    alone = torch.stack([model(**collate([example])).loss for example in EXAMPLES])
    torch.testing.assert_close(alone.mean(), together.loss)


def test_the_bound_of_block_causal_spans_is_that_of_training_on_average():
    options = {**CAUSAL, "block_lengths": (3,), "stratified_noise": True}
    model = make_model(**options, eval_noise_levels=[0.2 + 0.8 * (k + 0.5) / 200 for k in range(200)])
    with torch.no_grad():
        expected = model(**collate()).audio_loss
        model.train()
        drawn = [model(**collate(), generator=seeded(seed)).audio_loss for seed in range(150)]
    assert torch.stack(drawn).mean().item() == pytest.approx(expected.item(), rel=0.04)


def test_training_in_blocks_refuses_masks_that_it_cannot_lay_out():
    batch = collate()
    for options in (ALIGNED, CAUSAL):
        model = make_model(**options).train()
        with pytest.raises(ValueError, match="leave `span_ids` out"):
            model(**batch, span_ids=torch.zeros_like(batch["input_ids"]))
        mask = torch.ones(3, 1, *[batch["input_ids"].shape[1]] * 2)
        with pytest.raises(ValueError, match="`attention_mask` as"):
            model(batch["input_ids"], labels=batch["labels"], attention_mask=mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_lengths": []}, "`block_lengths`"),
        ({"block_lengths": [0]}, "`block_lengths`"),
        ({"block_filling_weight": -1}, "`block_filling_weight`"),
        ({"block_masking_probability": 1.5}, "`block_masking_probability`"),
        ({"full_block_probability": -0.1}, "`full_block_probability`"),
        ({"span_attention": "causal"}, "`span_attention`"),
        ({"span_attention": "block_causal", "text_objective": "diffusion"}, "one span without blocks"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_the_twin_ignores_blocks():
    plain = make_model(audio_objective="autoregressive")
    twin = make_model(audio_objective="autoregressive", **{**CAUSAL, "block_masking_probability": 0.0})
    assert torch.equal(plain.train()(**collate()).loss, twin.train()(**collate()).loss)
