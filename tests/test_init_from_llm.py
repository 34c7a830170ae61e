"""TtT checkpoints made of text language models: unchanged on text, the published order of tokens, rows like the others,
and a folder that works as on the Hub."""

import sys

import numpy as np
import pytest
import torch
from builders import NUM_CODES, build_codec, tone
from test_other_audio_tokenizers import build as build_codec_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)

from modeling_ttt import TttGenerationConfig
from processing import TttTokenIds
from training_examples import init_from_llm
from training_examples.initialisation.first_checkpoint import draw_rows, extend_tokenizer

CHATML = ["<|im_start|>", "<|im_end|>"]
CODES = [f"<|audio_{code}|>" for code in range(NUM_CODES)]
TEXT_SIDE = ["<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_quad|>"]
AUDIO_SIDE = ["<|audio|>", *CODES, "<|mask_token|>", "<|end_of_audio_new|>", "<|end_of_audio_span_last|>"]


def text_tokenizer(special=()):
    """One token per byte and `<|endoftext|>`, then `special`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def save_llm(folder, config_class, special=(), padding_rows=0, max_position_embeddings=512, **options):
    """A random language model in a folder; `padding_rows` are rows of its vocabulary that no token has."""
    tokenizer = text_tokenizer(special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer) + padding_rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_position_embeddings,
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """The folder of an audio tokenizer alone, without a feature extractor."""
    folder = tmp_path_factory.mktemp("codec")
    build_codec().save_pretrained(folder)
    return folder


@pytest.fixture
def initialise(tmp_path, codec, monkeypatch):
    """Runs the script on a folder; returns its output folder."""

    def run(llm, *options):
        output = tmp_path / "ttt"
        arguments = ["--llm", str(llm), "--audio_tokenizer", str(codec), "--output_dir", str(output), *options]
        monkeypatch.setattr(sys, "argv", ["init_from_llm.py", *arguments])
        init_from_llm.main()
        return output

    return run


BACKBONES = {
    "qwen2, tied, padding rows left over": (Qwen2Config, CHATML, {"tie_word_embeddings": True, "padding_rows": 40}),
    "qwen2, untied, padding rows exceeded": (Qwen2Config, CHATML, {"tie_word_embeddings": False, "padding_rows": 3}),
    "qwen3, tied": (Qwen3Config, CHATML, {"tie_word_embeddings": True}),
    "llama, untied, no ChatML": (LlamaConfig, (), {"tie_word_embeddings": False}),
    "llama, tied": (LlamaConfig, (), {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_on_text_alone_the_logits_are_the_language_models(name, initialise, tmp_path):
    config_class, special, options = BACKBONES[name]
    old = save_llm(tmp_path / "llm", config_class, special, **options)
    model = AutoModel.from_pretrained(initialise(tmp_path / "llm")).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ttt")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()

    tokenizer = processor.tokenizer
    assert {token: tokenizer.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings == options["tie_word_embeddings"]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == options["tie_word_embeddings"]
    ids = torch.tensor([old("a text of some words")["input_ids"], list(range(20))])
    with torch.no_grad():
        expected = llm(ids).logits[..., : len(old)]
        torch.testing.assert_close(model(ids).logits[..., : len(old)], expected, atol=1e-5, rtol=1e-5)


def test_new_tokens_follow_the_old_ones_in_the_published_order(initialise, tmp_path):
    old = save_llm(tmp_path / "llm", LlamaConfig)
    model = AutoModel.from_pretrained(initialise(tmp_path / "llm"))
    processor = AutoProcessor.from_pretrained(tmp_path / "ttt")
    added = [*CHATML, *TEXT_SIDE, *AUDIO_SIDE]
    assert processor.tokenizer.convert_tokens_to_ids(added) == list(range(len(old), len(old) + len(added)))
    ids = TttTokenIds.from_tokenizer(processor.tokenizer)
    for name in ("audio_token_id_start", "audio_code_id_start", "num_audio_codes", "mask_token_id"):
        assert getattr(model.config, name) == getattr(ids, name)
    assert processor.tokenizer.eos_token == "<|im_end|>" and processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ids.end_of_turn_token_id


def test_the_folder_works_as_on_the_hub(initialise, tmp_path):
    save_llm(tmp_path / "llm", Qwen2Config, CHATML)
    output = initialise(tmp_path / "llm", "--audio_chunk_size", "5")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "modeling_ttt.py", "processing_ttt.py", "pipeline_ttt.py", "audio_tokenizer"} <= names
    pipe = pipeline("audio-to-audio", model=str(output), trust_remote_code=True)
    assert pipe.processor.audio_chunk_size == 5
    assert pipe.processor.feature_extractor.sampling_rate == 16_000
    assert pipe.processor.tokenizer.chat_template == pipe.processor.chat_template
    settings = pipe.model.generation_config
    assert isinstance(settings, TttGenerationConfig) and settings.audio_block_size == 26 and settings.top_k == 10
    answer = pipe(tone(0.5), generate_kwargs={"max_new_tokens": 12, "seed": 0})
    assert isinstance(answer["text"], str) and answer["sampling_rate"] == 16_000

    example = pipe.processor.build_example("hi", [1, 2, 3], audio_codes=[4, 5])
    batch = {name: torch.tensor([values]) for name, values in example.items()}
    loss = pipe.model.train()(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)


CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tiny.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_instruct_llm(folder, template, special=CHATML):
    save_llm(folder, Qwen2Config, special)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("options", [[], ["--keep_chat_template"]])
def test_an_instruct_model_is_asked_as_its_own_template_asks(options, initialise, tmp_path):
    """Typed questions get, to the letter, the prompt that the language model was made for."""
    old = save_instruct_llm(tmp_path / "llm", CHATML_TEMPLATE)
    processor = AutoProcessor.from_pretrained(initialise(tmp_path / "llm", *options))
    question = [{"role": "user", "content": "what is the capital of France?"}]
    expected = old.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    messages = processor.build_messages("text_chat", text="what is the capital of France?")
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    ids = processor(text="what is the capital of France?", task="text_chat")["input_ids"][0].tolist()
    assert ids == old(expected)["input_ids"]
    spoken = processor.get_task("spoken_chat").system_prompt
    assert (spoken == "You are Tiny.") == bool(options)
    assert "Speech Recognition" in processor.get_task("asr").system_prompt


def test_the_language_models_template_takes_speech_too_and_is_trained_on(initialise, tmp_path):
    marked = CHATML_TEMPLATE.replace("'<|im_end|>' + '\n' }}{% endfor", "'<|im_end|>' + '\n' }}{# its own #}{% endfor")
    save_instruct_llm(tmp_path / "llm", marked)
    output = initialise(tmp_path / "llm", "--keep_chat_template")
    processor = AutoProcessor.from_pretrained(output)
    assert "its own" in processor.chat_template and processor.tokenizer.chat_template == processor.chat_template
    example = processor.build_example("hi", [1, 2, 3], audio_codes=[4, 5], text="say")
    text = processor.tokenizer.decode(example["input_ids"])
    assert text == (
        "<|im_start|>system\nYou are Tiny.<|im_end|>\n<|im_start|>user\nsay<|begin_of_audio|><|audio_4|><|audio_5|>"
        "<|end_of_audio|><|im_end|>\n<|im_start|>assistant\nhi<|begin_of_quad|><|audio_1|><|audio_2|><|audio_3|>"
        "<|end_of_audio_span_last|><|im_end|>"
    )
    scored = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert processor.tokenizer.decode(scored).startswith("hi<|begin_of_quad|>")
    pipe = pipeline("audio-to-audio", model=str(output), trust_remote_code=True)
    assert isinstance(pipe(tone(0.3), generate_kwargs={"max_new_tokens": 4})["text"], str)


def test_a_template_of_another_form_is_not_kept(initialise, tmp_path):
    """Without the option, such a model is asked as TtT models are."""
    other = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant]"
    save_instruct_llm(tmp_path / "llm", other)
    processor = AutoProcessor.from_pretrained(initialise(tmp_path / "llm"))
    assert processor.get_task("text_chat").system_prompt.startswith("You are a text-to-audio chat model")
    with pytest.raises(ValueError, match="--keep_chat_template: .*llm writes answers otherwise than ChatML"):
        initialise(tmp_path / "llm", "--keep_chat_template")
    save_llm(tmp_path / "base", Qwen2Config, CHATML)
    with pytest.raises(ValueError, match="--keep_chat_template: the chat template of .*base is missing"):
        initialise(tmp_path / "base", "--keep_chat_template")


def test_a_template_that_says_nothing_first_leaves_the_system_turn_out(initialise, tmp_path):
    quiet = CHATML_TEMPLATE.replace("{{ '<|im_start|>system\nYou are Tiny.<|im_end|>\n' }}", "")
    old = save_instruct_llm(tmp_path / "llm", quiet)
    processor = AutoProcessor.from_pretrained(initialise(tmp_path / "llm"))
    messages = processor.build_messages("text_chat", text="hello")
    assert [message["role"] for message in messages] == ["user"]
    expected = old.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_a_first_checkpoint_says_what_it_is(initialise, tmp_path, capsys):
    save_instruct_llm(tmp_path / "llm", CHATML_TEMPLATE)
    output = initialise(tmp_path / "llm")
    said = capsys.readouterr()
    assert "text_chat is asked with the system prompt 'You are Tiny.'" in said.out
    stages = [line.split()[0] for line in said.err.splitlines() if line.endswith(" ...")]
    assert stages == ["Reading", "Reading", "Writing"]  # what takes long has a sign of life
    card = (output / "README.md").read_text()
    assert "license: unknown" in card and "It is there to be trained" in card and "'You are Tiny.'" in card
    assert "license: mit" in (initialise(tmp_path / "llm", "--license", "mit") / "README.md").read_text()
    for path in [*output.rglob("*.json"), output / "README.md"]:
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8"), path


def test_system_prompts_and_precision_are_chosen(initialise, tmp_path):
    save_llm(tmp_path / "llm", Qwen2Config, CHATML)
    (tmp_path / "prompts.json").write_text('{"asr": "write it down"}')
    output = initialise(tmp_path / "llm", "--system_prompts", str(tmp_path / "prompts.json"), "--dtype", "bfloat16")
    processor = AutoProcessor.from_pretrained(output)
    assert processor.system_prompts["asr"] == "write it down"
    assert AutoModel.from_pretrained(output).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [[], ["--row_spread", "1.0"]])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_around_the_mean_of_the_old_ones(tied, options, initialise, tmp_path):
    old_size = len(save_llm(tmp_path / "llm", Qwen2Config, CHATML, tie_word_embeddings=tied))
    model = AutoModel.from_pretrained(initialise(tmp_path / "llm", *options))
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        old, new = embedding.weight[:old_size].detach(), embedding.weight[old_size:].detach()
        ratio = (new - old.mean(0)).square().mean().sqrt() / old.std(0).mean()
        assert ratio == pytest.approx(1.0 if options else 1e-9**0.5, rel=0.15)


def test_padding_rows_have_no_part_in_the_new_ones(tmp_path, initialise):
    save_llm(tmp_path / "llm", Qwen2Config, CHATML, padding_rows=30, tie_word_embeddings=True)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    llm.get_input_embeddings().weight.data[-30:] = 1e4
    llm.save_pretrained(tmp_path / "llm")
    model = AutoModel.from_pretrained(initialise(tmp_path / "llm"))
    assert model.get_input_embeddings().weight.abs().max() < 1


def test_rows_are_drawn_with_the_mean_and_covariance_of_the_others():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    old = torch.randn(20_000, 6, generator=generator) @ mixing + torch.arange(6.0)
    new = draw_rows(old, 40_000, 1.0, generator)
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(new.T.cov(), old.T.cov(), atol=0.25, rtol=0.05)
    half = draw_rows(old, 40_000, 0.5, generator)
    torch.testing.assert_close(half.T.cov(), old.T.cov() / 4, atol=0.1, rtol=0.05)
    torch.testing.assert_close(draw_rows(old, 2, 0.0, generator), old.mean(0).expand(2, 6), atol=1e-4, rtol=1e-5)


def test_fewer_rows_than_dimensions_still_give_new_ones():
    new = draw_rows(torch.randn(4, 16), 10, 1.0, torch.Generator().manual_seed(0))
    assert torch.isfinite(new).all() and len(torch.unique(new, dim=0)) == 10


def test_tokens_that_are_there_already_keep_their_ids_where_the_order_holds():
    tokenizer = text_tokenizer([*CHATML, "<|begin_of_audio|>", "<|begin_of_quad|>"])
    before = tokenizer.get_vocab()
    extend_tokenizer(tokenizer, NUM_CODES)
    after = tokenizer.get_vocab()
    assert {token: after[token] for token in before} == before
    assert len(after) == len(before) + 1 + len(AUDIO_SIDE)
    assert after["<|end_of_audio|>"] < after["<|audio|>"]
    complete = dict(after)
    extend_tokenizer(tokenizer, NUM_CODES)
    assert tokenizer.get_vocab() == complete


@pytest.mark.parametrize(
    ("special", "named"),
    [
        (["<|audio|>"], "already has <|audio|>"),
        ([*CHATML, "<|mask_token|>"], "<|mask_token|>"),
        ([*CHATML, *TEXT_SIDE, "<|audio|>", *CODES[::-1]], "<|audio_"),
        ([*CHATML, *TEXT_SIDE, "<|audio|>", *CODES, f"<|audio_{NUM_CODES}|>"], "<|mask_token|> has the id"),
    ],
)
def test_tokens_that_break_the_order_are_refused(special, named):
    with pytest.raises(ValueError, match="must follow each other in the published order") as error:
        extend_tokenizer(text_tokenizer(special), NUM_CODES)
    assert named in str(error.value)


def test_text_tokens_may_stand_above_the_audio_tokens():
    tokenizer = text_tokenizer([*CHATML, *TEXT_SIDE, *AUDIO_SIDE, "<|later|>"])
    before = tokenizer.get_vocab()
    extend_tokenizer(tokenizer, NUM_CODES)
    assert tokenizer.get_vocab() == before
    assert TttTokenIds.from_tokenizer(tokenizer).is_text(before["<|later|>"])


def test_what_cannot_be_used_is_refused_before_anything_is_read(initialise, tmp_path, capsys):
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llm")
    small = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "llm")
    capsys.readouterr()
    with pytest.raises(ValueError, match="'gpt2' model; supported are qwen2, qwen3, llama"):
        initialise(tmp_path / "llm")
    assert "Reading" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="--row_spread` is -1"):
        initialise(tmp_path / "llm", "--row_spread", "-1")


def test_an_audio_tokenizer_of_several_codebooks_gives_a_token_for_each_of_their_codes(initialise, tmp_path):
    save_llm(tmp_path / "llm", Qwen2Config, CHATML)
    build_codec_of("mimi").save_pretrained(tmp_path / "mimi")
    output = initialise(tmp_path / "llm", "--audio_tokenizer", str(tmp_path / "mimi"), "--num_quantizers", "2")
    processor = AutoProcessor.from_pretrained(output)
    assert processor.audio_format.num_codes == AutoModel.from_pretrained(output).config.num_audio_codes == 32
    assert processor.feature_extractor.sampling_rate == 24_000 and processor.audio_chunk_size == 52
    assert len(processor.encode_audio(tone(1.0, 24_000))[0]) == 2 * 13
    settings = AutoModel.from_pretrained(output).generation_config
    assert (settings.audio_block_size, settings.max_audio_codes_per_span) == (52, 5200)


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        ("mimi", 1, "is 1, but .* needs at least 2 and has 4 codebooks"),
        ("mimi", 5, "is 5, but .* needs at least 2 and has 4 codebooks"),
        ("ttt_codec", 1, "'ttt_codec' audio tokenizer, whose number of codebooks cannot be chosen"),
    ],
)
def test_a_number_of_codebooks_that_there_is_not_is_named(kind, number, message, initialise, codec, tmp_path):
    """With more than there are, some would be random."""
    save_llm(tmp_path / "llm", Qwen2Config, CHATML)
    folder = codec
    if kind == "mimi":
        folder = tmp_path / "mimi"
        build_codec_of("mimi").save_pretrained(folder)
    with pytest.raises(ValueError, match=f"--num_quantizers. is {number}.*" + message.removeprefix(f"is {number}")):
        initialise(tmp_path / "llm", "--audio_tokenizer", str(folder), "--num_quantizers", str(number))


def test_a_checkpoint_with_an_audio_tokenizer_may_be_named_in_its_place(initialise, tmp_path):
    save_llm(tmp_path / "llm", Qwen2Config, CHATML)
    first = initialise(tmp_path / "llm").rename(tmp_path / "first")
    output = initialise(tmp_path / "llm", "--audio_tokenizer", str(first))
    codes = [
        AutoProcessor.from_pretrained(folder).encode_audio(np.sin(np.arange(9000) / 20)) for folder in (first, output)
    ]
    assert torch.equal(codes[0][0], codes[1][0])
