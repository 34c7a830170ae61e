"""Tiny random models that write varied answers: spans begin and end often, and no two contexts go on alike."""

import torch

from modeling_ttt import TttConfig, TttForConditionalGeneration
from processing import TttProcessor


def build_varied_model(processor: TttProcessor, attention: str = "sdpa", **config) -> TttForConditionalGeneration:
    """
    A model for the vocabulary of a processor, in float64: what differs between a batch and a row alone is rounding, and
    must not decide anything in a test.
    """
    torch.manual_seed(0)
    ids = processor.token_ids
    backbone = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    config = TttConfig(text_config=backbone, **ids.config_arguments(), **config)
    config._attn_implementation = attention
    model = TttForConditionalGeneration(config).double().eval()
    with torch.no_grad():  # rows of a larger norm are chosen more often
        head = model.get_output_embeddings().weight
        head[[ids.begin_of_audio_token_id, ids.begin_of_last_audio_token_id]] *= 4
        head[[ids.end_of_audio_token_id, ids.end_of_last_audio_token_id]] *= 1.5
        head[ids.end_of_turn_token_id] *= 2.5
    return model
