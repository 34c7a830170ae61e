"""A process of test_tensor_parallel.py: model folders, sharded over the processes, against the whole models."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_ttt import TttForConditionalGeneration

IDS = torch.tensor([[1, 2, 100, 120, 121, 122, 176, 3, 102, 130, 131, 177, 4]])


@torch.no_grad()
def compare(folder: Path) -> dict:
    whole = TttForConditionalGeneration.from_pretrained(folder).eval()
    plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    sharded = TttForConditionalGeneration.from_pretrained(folder, distributed_config=plan).eval()
    answers = {}
    for guidance in (0.0, 0.5):
        options = {"max_new_tokens": 20, "audio_block_size": 5, "audio_guidance_scale": guidance}
        answers[guidance] = torch.equal(sharded.generate(IDS, **options), whole.generate(IDS, **options))
    return {
        "logits": (sharded(IDS).logits - whole(IDS).logits).abs().max().item(),
        "loss": (sharded(IDS, labels=IDS).loss - whole(IDS, labels=IDS).loss).abs().item(),
        "same_answers": all(answers.values()),
        "head": list(sharded.lm_head.weight.to_local().shape),
        "embeddings": list(sharded.get_input_embeddings().weight.to_local().shape),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        folder = Path(sys.argv[1])
        results = {name: compare(folder / name) for name in ("tied", "untied")}
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    finally:
        dist.destroy_process_group()
