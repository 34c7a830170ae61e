"""Make a TtT checkpoint of a text language model and an audio tokenizer, ready to be trained.

    python training_examples/init_from_llm.py --llm Qwen/Qwen2.5-1.5B --audio_tokenizer model_cards/ttt-tiny \
        --output_dir runs/qwen/initial

The language model (Qwen2, Qwen3 or Llama; a folder, a GGUF file or a Hub name) keeps its weights and its text
behaviour: on text alone its logits stay what they were, and `text_chat` is asked as its own chat template asks. Its
vocabulary gains the special tokens and one token per code, in the published order; their rows are drawn around the mean
of the others, with their covariance. The output is one folder as on the Hub: model, processor, audio tokenizer,
pipeline and their code, and a card.
"""

from training_examples.command_line import ScriptParser
from training_examples.initialisation.arguments import InitArguments
from training_examples.threads import use_threads
from training_examples.user_errors import run_command


def main() -> None:
    (args,) = ScriptParser(InitArguments, __doc__).parse_args_into_dataclasses()
    # Loads PyTorch, which the options need not wait for.
    from training_examples.initialisation.first_checkpoint import make_first_checkpoint

    use_threads(args.threads)
    print(make_first_checkpoint(args))


if __name__ == "__main__":
    run_command(main)
