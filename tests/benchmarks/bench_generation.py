"""Cost of generation: cached against the uncached published way, and a batch against single rows, in one run.

    python tests/benchmarks/bench_generation.py                      # golden model "b" with long conversations
    python tests/benchmarks/bench_generation.py --layers 8 --hidden_size 320 --max_new_tokens 200

Tokens are checked to be the same before anything is compared. Seconds depend on the machine; read the ratios.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from reference_sampler import Trace, golden_prompts, load_published, reference_generate  # noqa: E402

from modeling_ttt import TttForConditionalGeneration  # noqa: E402


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default="b", metadata={"help": "Golden model a, b or c."})
    layers: int = field(default=0, metadata={"help": "Use a random model with so many layers instead."})
    hidden_size: int = field(default=320, metadata={"help": "Hidden size of the random model."})
    prompts: int = field(default=4, metadata={"help": "Rows for the comparison with the uncached sampler."})
    batch_size: int = field(default=8, metadata={"help": "Rows of the batch."})
    prompt_repeats: int = field(default=4, metadata={"help": "Golden prompts strung together for one prompt."})
    max_new_tokens: int = field(default=120, metadata={"help": "New tokens per row, at most."})
    block_size: int = field(default=26, metadata={"help": "Codes per block."})
    steps: int = field(default=8, metadata={"help": "Denoising steps per block."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def build_model(arguments: Arguments) -> TttForConditionalGeneration:
    model = load_published(arguments.model, max_position_embeddings=4096)
    if arguments.layers:
        config = model.config
        config.text_config.update(
            {
                "num_hidden_layers": arguments.layers,
                "layer_types": ["full_attention"] * arguments.layers,
                "hidden_size": arguments.hidden_size,
                "intermediate_size": 3 * arguments.hidden_size,
                "num_attention_heads": max(1, arguments.hidden_size // 64),
                "num_key_value_heads": max(1, arguments.hidden_size // 64),
            }
        )
        torch.manual_seed(0)
        model = TttForConditionalGeneration(config).eval()
        # Untrained, it would end its spans anywhere: let them run to the limit.
        model.get_output_embeddings().weight.data[[176, 177]] = 0.0
    return model


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    model = build_model(arguments)
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "audio_block_size": arguments.block_size,
        "audio_steps_per_block": arguments.steps,
        "return_dict_in_generate": True,
    }
    golden = golden_prompts(arguments.model)
    prompts = [
        [token for j in range(arguments.prompt_repeats) for token in golden[(i + j) % len(golden)]]
        for i in range(max(arguments.prompts, arguments.batch_size))
    ]
    if arguments.layers:
        prompts = [[*prompt, 102] for prompt in prompts]  # an untrained model would hardly start a span either
    model.generate(torch.tensor([prompts[0]]), **options)  # warm up

    print(f"{model.num_parameters():,} parameters, {arguments.steps} steps a block, prompts {[*map(len, prompts)]}")
    for guidance in (0.0, 0.1):
        ours, theirs = [0, 0, 0.0], [0, 0, 0.0]
        for prompt in prompts[: arguments.prompts]:
            trace = Trace()
            reference, seconds = timed(
                lambda prompt=prompt, trace=trace, guidance=guidance: reference_generate(
                    model,
                    prompt,
                    arguments.max_new_tokens,
                    arguments.block_size,
                    arguments.steps,
                    guidance=guidance,
                    trace=trace,
                )
            )
            theirs = [a + b for a, b in zip(theirs, (trace.forwards, trace.positions, seconds), strict=True)]
            output, seconds = timed(
                lambda prompt=prompt, guidance=guidance: model.generate(
                    torch.tensor([prompt]), audio_guidance_scale=guidance, **options
                )
            )
            ours = [
                a + b for a, b in zip(ours, (output.num_forwards, output.num_token_positions, seconds), strict=True)
            ]
            same = min(len(reference), output.sequences.shape[1] - 1)
            if output.sequences[0, :same].tolist() != reference[:same]:
                raise SystemExit("The cached and the uncached tokens differ.")
        print(f"\nguidance {guidance}: {arguments.prompts} rows one by one")
        print(f"{'':16}{'cached':>12}{'uncached':>12}{'ratio':>8}")
        for name, a, b in zip(("forwards", "token positions", "seconds"), ours, theirs, strict=True):
            print(f"{name:16}{a:12,.6g}{b:12,.6g}{b / a:8.2f}")

    rows = prompts[: arguments.batch_size]
    width = max(map(len, rows))
    batch = {
        "inputs": torch.tensor([[105] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    alone, seconds_alone = timed(lambda: [model.generate(torch.tensor([row]), **options) for row in rows])
    together, seconds_together = timed(lambda: model.generate(**batch, **options))
    new = sum(output.sequences.shape[1] - len(row) for output, row in zip(alone, rows, strict=True))
    print(f"\n{len(rows)} rows, {new} new tokens, guidance 0")
    print(f"{'':16}{'batch':>12}{'one by one':>12}{'ratio':>8}")
    measured = (
        ("forwards", together.num_forwards, sum(output.num_forwards for output in alone)),
        ("seconds", seconds_together, seconds_alone),
        ("tokens/second", new / seconds_together, new / seconds_alone),
    )
    for name, a, b in measured:
        print(f"{name:16}{a:12,.6g}{b:12,.6g}{max(a, b) / min(a, b):8.2f}")


if __name__ == "__main__":
    main()
