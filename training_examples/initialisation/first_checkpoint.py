"""A text language model becomes a TtT model: new tokens, their rows, the chat template, and the folder that holds all.
What a user may say of it lives in arguments.py."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_ttt import TttConfig, TttForConditionalGeneration, TttGenerationConfig
from modeling_ttt.generation_config_ttt import AUDIO_DEFAULTS
from pipelines import save_repository
from processing import TttAudioFormat, TttProcessor, TttTokenIds, load_audio_codec, load_feature_extractor
from processing.audio_tokenizer_ttt import AUDIO_TOKENIZER_FOLDER
from processing.tasks_ttt import PROMPT_AUDIO, RESPONSE_AUDIO
from processing.vocabulary_ttt import AUDIO_PLACEHOLDER, END_OF_TURN, START_OF_TURN, TEXT_TOKENS, audio_tokens
from training_examples.initialisation.arguments import ROW_SPREAD, InitArguments
from training_examples.training.card import initial_card, write_card

BACKBONES = ("qwen2", "qwen3", "llama")  # a plain head on a plain decoder, under the names TtT uses
BLOCKS_PER_SPAN = AUDIO_DEFAULTS["max_audio_codes_per_span"] // AUDIO_DEFAULTS["audio_block_size"]


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, num_codes: int) -> None:
    """
    Add what a text tokenizer lacks: ChatML's tokens and the begin tokens on the text side, then, in the published
    order, `<|audio|>`, the codes, the mask token and the two end tokens. `<|im_end|>` becomes its end-of-sequence
    token; the former one pads where there was no padding token.

    Raises:
        ValueError: If tokens that are there already break the order, so that a text token would count as audio.
    """
    audio_side = audio_tokens(num_codes)
    before = tokenizer.get_vocab()
    missing = [token for token in (*TEXT_TOKENS, *audio_side) if token not in before]
    tokenizer.add_tokens(missing, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    start = vocabulary[AUDIO_PLACEHOLDER]
    wrong = [(t, vocabulary[t], start + i) for i, t in enumerate(audio_side) if vocabulary[t] != start + i]
    if wrong:
        token, found, expected = wrong[0]
        known = [t for t in audio_side if t in before]
        raise ValueError(
            f"The {len(audio_side)} audio tokens must follow each other in the published order, because every id from "
            f"{AUDIO_PLACEHOLDER} to the last of them counts as audio; but {token} has the id {found} and should have "
            f"{expected}. The language model's tokenizer already has {known[0] if known else 'ids out of sequence'}"
            f"{' and more' if len(known) > 1 else ''}: remove or rename it there first."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    tokenizer.eos_token = END_OF_TURN


@torch.no_grad()
def draw_rows(rows: torch.Tensor, count: int, spread: float, generator: torch.Generator) -> torch.Tensor:
    """
    Draw new rows around the old ones, from the normal distribution with their mean m and covariance spread² Σ.

    It is what `resize_token_embeddings(mean_resizing=True)` does, but estimated in slices: that makes several float32
    copies of the embedding, here there is none.

    Args:
        rows (`torch.Tensor` of shape `(old, hidden)`): the old rows.
        count (`int`): how many to draw.
        spread (`float`): multiplies the standard deviation; 0 gives the mean.
        generator (`torch.Generator`): draws them.

    Returns:
        `torch.Tensor` of shape `(count, hidden)`, float32.
    """
    slices = rows.split(8192)
    mean = torch.stack([part.double().sum(0) for part in slices]).sum(0) / len(rows)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32)
    for part in slices:
        centred = (part.double() - mean).float()
        covariance += centred.T @ centred / len(rows)
    jitter = 1e-6 * covariance.diagonal().mean().clamp(min=1e-12)  # keeps the factor real where Σ is singular
    factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance)))
    noise = torch.randn(count, rows.shape[1], generator=generator)
    return mean.float() + spread * noise @ factor.T


def extend_embeddings(llm: PreTrainedModel, old_size: int, new_size: int, spread: float, seed: int) -> None:
    """
    Give the input embedding and, where it is not the same, the head `new_size` rows. Rows from `old_size` up, which no
    text token has (padding rows of the language model among them), are drawn by `draw_rows` from the others.
    """
    llm.resize_token_embeddings(new_size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    weights = [llm.get_input_embeddings().weight, llm.get_output_embeddings().weight]
    for weight in weights[:1] if weights[0] is weights[1] else weights:
        weight.data[old_size:] = draw_rows(weight.data[:old_size], new_size - old_size, spread, generator).to(weight)


def locate_llm(name: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes to load `--llm`: a folder or Hub name, and the file of a GGUF one."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})


def check_backbone(llm: str) -> None:
    """Raise a ValueError unless `--llm` has an architecture that TtT knows."""
    name, file = locate_llm(llm)
    kind = AutoConfig.from_pretrained(name, **file).model_type
    if kind not in BACKBONES:
        raise ValueError(f"`--llm` {llm} is a {kind!r} model; supported are {', '.join(BACKBONES)}.")


def own_system_prompt(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    Return what a language model's chat template says before a conversation that begins without a system turn, "" if it
    says nothing; `None` if there is no template, or it writes turns otherwise than ChatML, in which TtT answers.
    """
    if not tokenizer.chat_template:
        return None
    question = [{"role": "user", "content": "Q"}]
    rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    start, end = re.escape(START_OF_TURN), re.escape(END_OF_TURN)
    turns = rf"(?:{start}system\n(.*?){end}\n)?{start}user\nQ{end}\n{start}assistant\n"
    found = re.fullmatch(turns, rendered, re.DOTALL)
    return None if found is None else found.group(1) or ""


def with_audio_parts(template: str) -> str:
    """
    Return a language model's chat template for messages whose content may be a list of parts: text, and audio, which
    becomes the placeholders of the TtT template.
    """
    return (
        "{%- set ttt = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- set said = namespace(text='') -%}"
        "{%- if message['content'] is string -%}{%- set said.text = message['content'] -%}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{%- set said.text = said.text + '{RESPONSE_AUDIO}' -%}}"
        f"{{%- else -%}}{{%- set said.text = said.text + '{PROMPT_AUDIO}' -%}}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{%- set ttt.messages = ttt.messages + [dict(message, content=said.text)] -%}"
        "{%- endfor -%}{%- set messages = ttt.messages -%}\n"
    ) + template


def check_template(name: str, tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> None:
    """Raise a ValueError unless the language model's own template writes conversations that TtT can be trained on."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    turn = f"{START_OF_TURN}assistant\nA{END_OF_TURN}"
    if prompt is None or turn not in tokenizer.apply_chat_template(messages, tokenize=False):
        raise ValueError(
            f"--keep_chat_template: the chat template of {name} "
            + ("is missing" if not tokenizer.chat_template else "writes answers otherwise than ChatML")
            + f", but TtT's answers stand between {START_OF_TURN}assistant and {END_OF_TURN}. Leave the option out to "
            "have the TtT template."
        )


def build_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    old_size: int,
    dtype: str = "auto",
    spread: float = ROW_SPREAD,
    seed: int = 0,
) -> TttForConditionalGeneration:
    """
    Return the language model as a TtT model.

    Args:
        name (`str`): folder or Hub name of a Qwen2, Qwen3 or Llama model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, extended.
        old_size (`int`): number of ids the tokenizer had before.
        dtype (`str`, *optional*, defaults to `"auto"`): as `from_pretrained` takes it.
        spread (`float`, *optional*): of the new rows, see `draw_rows`.
        seed (`int`, *optional*, defaults to 0): of the new rows.

    Raises:
        ValueError: If the weights are not those of its language model.
    """
    name, file = locate_llm(name)
    llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **file)
    # What only the loading needed: the folder, and how the weights lay in the file.
    for stale in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        vars(llm.config).pop(stale, None)
    new_size = max(tokenizer.get_vocab().values()) + 1
    extend_embeddings(llm, old_size, new_size, spread, seed)
    config = TttConfig(
        text_config=llm.config,
        **TttTokenIds.from_tokenizer(tokenizer).config_arguments(),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):  # its weights are the language model's own, not a copy
        model = TttForConditionalGeneration(config)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    remaining = [key for key, value in model.named_parameters() if value.is_meta]
    if remaining:
        raise ValueError(f"`--llm` {name} gives no weights for {', '.join(remaining)}.")
    model.generation_config = TttGenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(2048, llm.config.max_position_embeddings // 2),  # the prompt needs room
        do_sample=True,
        top_k=10,
        top_p=0.95,
        **AUDIO_DEFAULTS,
    )
    return model.eval()


def check_num_quantizers(number: int, name: str, config: PreTrainedConfig) -> None:
    """Raise a ValueError unless the audio tokenizer of a name and configuration can do with so many codebooks."""
    most = getattr(config, "num_quantizers", None)
    if most is None:
        raise ValueError(
            f"`--num_quantizers` is {number}, but {name} is a {config.model_type!r} audio tokenizer, whose number of "
            "codebooks cannot be chosen: leave the option out."
        )
    least = getattr(config, "num_semantic_quantizers", 0) + 1  # beside those, there is always one more
    if not least <= number <= most:
        raise ValueError(f"`--num_quantizers` is {number}, but {name} needs at least {least} and has {most} codebooks.")


def load_audio_tokenizer(args: InitArguments) -> tuple[Any, Any]:
    """
    Load the audio tokenizer, in float32, and its feature extractor: the one beside it or in the root of its repository,
    or, for one that takes plain waveforms, one that only pads them.

    Raises:
        ValueError: If it has no such number of codebooks.
    """
    name, subfolder = args.audio_tokenizer, args.audio_tokenizer_subfolder
    if not subfolder and (Path(name) / AUDIO_TOKENIZER_FOLDER / "config.json").is_file():
        subfolder = AUDIO_TOKENIZER_FOLDER
    options = {}
    if args.num_quantizers is not None:
        trust = {"trust_remote_code": args.trust_remote_code}
        check_num_quantizers(args.num_quantizers, name, AutoConfig.from_pretrained(name, subfolder=subfolder, **trust))
        options["num_quantizers"] = args.num_quantizers
    audio_tokenizer = load_audio_codec(
        name, subfolder, dtype=torch.float32, trust_remote_code=args.trust_remote_code, **options
    )
    if args.feature_extractor:
        return audio_tokenizer, AutoFeatureExtractor.from_pretrained(args.feature_extractor)
    return audio_tokenizer, load_feature_extractor(audio_tokenizer, [(name, subfolder), (name, "")])


def build_processor(args: InitArguments, tokenizer: PreTrainedTokenizerBase, audio_tokenizer: Any, extractor: Any):
    """
    Return the processor, with its chat template set for the tokenizer too, after a try that the audio tokenizer fits.

    Its `text_chat` has the language model's own default system prompt, where that has a ChatML template, so that the
    prompt is, to the letter, the one that the language model was made for.

    Raises:
        ValueError: If the language model's own template shall be kept and cannot.
    """
    prompts = json.loads(args.system_prompts.read_text(encoding="utf-8")) if args.system_prompts else {}
    own = own_system_prompt(tokenizer)
    if args.keep_chat_template:
        check_template(args.llm, tokenizer, own)
    if own is not None:
        asked = ("text_chat", "spoken_chat", "spoken_qa") if args.keep_chat_template else ("text_chat",)
        prompts = dict.fromkeys(asked, own) | prompts
    processor = TttProcessor(
        extractor,
        tokenizer,
        audio_tokenizer,
        chat_template=with_audio_parts(tokenizer.get_chat_template()) if args.keep_chat_template else None,
        text_chunk_size=args.text_chunk_size,
        audio_chunk_size=args.audio_chunk_size,
        system_prompts=prompts,
    )
    tokenizer.chat_template = processor.chat_template
    processor.encode_audio(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor.sampling_rate)
    return processor


def say(stage: str) -> None:
    """Tell what is done next, where it may take a minute."""
    print(f"{stage} ...", file=sys.stderr, flush=True)


def make_first_checkpoint(args: InitArguments) -> str:
    """Write the checkpoint, and return what is to be said of it: its size, its vocabulary, and how it is asked."""
    check_backbone(args.llm)
    audio_tokenizer, extractor = load_audio_tokenizer(args)
    num_codes = TttAudioFormat.from_config(audio_tokenizer.config).num_codes
    name, file = locate_llm(args.llm)
    say(f"Reading the tokenizer of {args.llm}")
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    old_size = max(tokenizer.get_vocab().values()) + 1
    extend_tokenizer(tokenizer, num_codes)
    processor = build_processor(args, tokenizer, audio_tokenizer, extractor)
    say(f"Reading the weights of {args.llm} and drawing rows for {num_codes} codes")
    model = build_model(args.llm, tokenizer, old_size, args.dtype, args.row_spread, args.seed)
    # Blocks last as long as the published ones, in whole frames; so does the longest span.
    model.generation_config.audio_block_size = processor.audio_format.chunk_size
    model.generation_config.max_audio_codes_per_span = BLOCKS_PER_SPAN * processor.audio_format.chunk_size
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    tokens = f"{old_size} text tokens of the language model, {model.config.vocab_size - old_size} new ones"
    tokens += f" with {num_codes} codes"
    prompt = processor.get_task("text_chat").system_prompt
    card = initial_card(
        args.output_dir.resolve().name,
        args.llm,
        args.audio_tokenizer,
        {"size": size, "vocabulary": tokens, "text_chat is asked with": repr(prompt)},
        args.license,
    )
    say(f"Writing {args.output_dir}")
    save_repository(model, processor, args.output_dir)
    write_card(args.output_dir, card)
    return f"{args.output_dir}: {size}, {tokens}\ntext_chat is asked with the system prompt {prompt!r}"
