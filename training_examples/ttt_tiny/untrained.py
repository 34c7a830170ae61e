"""The untrained ttt-tiny: text tokenizer, processor and a small Qwen2 backbone with random weights.

The text tokenizer is a byte-level BPE in which every word of the domain is one token: in a closed domain a word then
stands for one sound pattern. It lower-cases, drops punctuation and spells small numbers out, so users can type as they
like. Embeddings of the audio codes start as a projection of the codes' quantiser digits, so that codes that sound alike
start alike.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import EncodecFeatureExtractor, PreTrainedTokenizerFast, Qwen2Config

from modeling_ttt import TttConfig, TttForConditionalGeneration, TttGenerationConfig
from modeling_ttt.ttt_codec import TttCodecModel
from processing import TttProcessor
from processing.vocabulary_ttt import END_OF_TURN, added_tokens
from training_examples.ttt_tiny import domain

# One word of prompt leaves this domain's short sequences to speech; TttProcessor's defaults are the published ones.
SYSTEM_PROMPTS = {
    "spoken_chat": "answer",
    "spoken_qa": "answer",
    "text_chat": "answer",
    "asr": "transcribe",
    "tts": "read",
}


def build_tokenizer(num_codes: int) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE of the domain with the TtT tokens in the published order."""
    words = [*domain.vocabulary(), "system", "user", "assistant", *SYSTEM_PROMPTS.values()]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("+", " plus "),
            normalizers.Replace(Regex(r"(?<=\d) *[-\u2212] *(?=\d)"), " minus "),
            *(normalizers.Replace(Regex(rf"\b{n}\b"), f" {word} ") for n, word in enumerate(domain.NUMBERS)),
            normalizers.Replace(Regex(r"[^a-z\n]+"), " "),
            normalizers.Replace(Regex(r"\n *(?=[a-z])"), "\n "),  # every word carries its leading space
            normalizers.Replace(Regex(r" +\z"), ""),
            normalizers.Prepend(" "),
            normalizers.Replace(Regex(r"\A +(?=[a-z])"), " "),
            normalizers.Replace(Regex(r"\A +(?=\n)"), ""),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=1024, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "eos_token": END_OF_TURN})
    tokenizer.add_tokens(added_tokens(num_codes), special_tokens=True)
    split = [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1]
    if split:
        raise RuntimeError(f"these words are not one token each: {split}")
    return tokenizer


def initialise_code_embeddings(model: TttForConditionalGeneration, codec: TttCodecModel) -> None:
    """Write a random projection of each code's one-hot quantiser digits into its embedding row."""
    levels, start = codec.config.fsq_levels, model.config.audio_code_id_start
    weight: torch.Tensor = model.get_input_embeddings().weight.data  # type: ignore[assignment]
    tables = [torch.randn(level, weight.shape[1]) for level in levels]
    for code in range(codec.config.codebook_size):
        rest, row = code, torch.zeros(weight.shape[1])
        for level, table in zip(levels, tables, strict=True):
            row, rest = row + table[rest % level], rest // level
        weight[start + code] = 0.02 * row / len(levels) ** 0.5


def build_model(
    codec: TttCodecModel, hidden_size: int = 384, intermediate_size: int = 1024, num_layers: int = 4, num_heads: int = 6
) -> tuple[TttForConditionalGeneration, TttProcessor]:
    """
    Return the untrained model, its weights drawn from torch's generator, and its processor.

    Args:
        codec (`TttCodecModel`): the trained audio tokenizer.
        hidden_size, intermediate_size, num_layers, num_heads (`int`, *optional*): of the backbone.
    """
    tokenizer = build_tokenizer(codec.config.codebook_size)
    feature_extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=codec.config.sampling_rate)
    processor = TttProcessor(feature_extractor, tokenizer, codec, system_prompts=SYSTEM_PROMPTS)
    backbone = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    config = TttConfig(
        text_config=backbone,
        **processor.token_ids.config_arguments(),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = TttForConditionalGeneration(config)
    initialise_code_embeddings(model, codec)
    model.generation_config = TttGenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=400,
        audio_block_size=26,
        audio_steps_per_block=8,
        max_audio_codes_per_span=260,
    )
    return model, processor
