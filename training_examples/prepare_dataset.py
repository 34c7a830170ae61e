"""Turn any speech or text dataset into tokenised training examples: `input_ids`, `labels`, `length` and `task`.

    python training_examples/prepare_dataset.py --model model_cards/ttt-tiny --output_dir data/questions \
        --source data/ttt_tiny/eval/spoken_qa_seen.jsonl --tasks spoken_chat asr --columns text=question

    python training_examples/prepare_dataset.py --model MODEL --output_dir data/published --data_config data_config.json

Records are read in chunks; each becomes one Parquet shard, so a run that was killed goes on with the first missing
shard when it is started again with the same arguments. A record that gives no example is listed with its reason in
`rejected-SPLIT.jsonl`, and `summary-SPLIT.json` tells hours, tokens and lengths. preparation/mixtures.py
reads the result.
"""

import json

from training_examples.command_line import ScriptParser
from training_examples.preparation.arguments import PrepareArguments
from training_examples.threads import use_threads
from training_examples.user_errors import run_command


def main() -> None:
    (args,) = ScriptParser(PrepareArguments, __doc__).parse_args_into_dataclasses()
    from training_examples.preparation.preparing import prepare  # loads PyTorch, which the options need not wait for

    use_threads(args.threads, args.num_proc)
    print(json.dumps(prepare(args), indent=2))


if __name__ == "__main__":
    run_command(main)
