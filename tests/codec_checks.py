"""What both audio tokenizers are held to as models of the library: one graph, weights elsewhere, half precision."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn


class Method(nn.Module):
    """A method of a model as its forward: tensors in, tensors out."""

    def __init__(self, model: nn.Module, name: str, **options: Any):
        super().__init__()
        self.model, self.name, self.options = model, name, options

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self.model, self.name)(*tensors, **self.options).values())


def waveforms() -> tuple[torch.Tensor, torch.Tensor]:
    """Two of 9,000 and 5,000 samples, and their mask."""
    waves = 0.3 * torch.sin(torch.arange(9000) / torch.tensor([[9.0], [13.0]]))
    mask = torch.arange(9000) < torch.tensor([[9000], [5000]])
    return waves * mask, mask.long()


def assert_compiles_whole(model: nn.Module, name: str, *tensors: torch.Tensor, **options: Any) -> None:
    """As one graph, the method gives what it gives."""
    method = Method(model, name, **options)
    torch._dynamo.reset()
    assert_same(torch.compile(method, fullgraph=True, backend="eager")(*tensors), method(*tensors))


def assert_exports(model: nn.Module, name: str, *tensors: torch.Tensor, **options: Any) -> None:
    """Exported, the method gives what it gives, each time."""
    method = Method(model, name, **options)
    exported = torch.export.export(method, tensors, strict=False).module()
    for _ in range(2):
        assert_same(exported(*tensors), method(*tensors))


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def assert_works_from_elsewhere(model: Any, folder: Path) -> None:
    """With all weights on the CPU or on disk, as accelerate puts them, codes and speech are the same."""
    waves, mask = waveforms()
    codes, codes_mask = model.encode(waves, mask).values()
    speech = model.decode(codes, codes_mask).audio_values
    streamed = _stream(model, codes[:1])
    for place in ("cpu", "disk"):
        away = copy.deepcopy(model)
        if place == "cpu":
            cpu_offload(away, execution_device=torch.device("cpu"))
        else:
            disk_offload(away, folder / "weights", execution_device=torch.device("cpu"))
        assert next(away.parameters()).device.type == "meta" and away.device.type == "cpu"
        assert torch.equal(away.encode(waves, mask).audio_codes, codes)
        assert torch.equal(away.decode(codes, codes_mask).audio_values, speech)
        assert torch.equal(_stream(away, codes[:1]), streamed)


def _stream(model: Any, codes: torch.Tensor) -> torch.Tensor:
    decoder = model.streaming_decoder()
    return torch.cat([decoder.push(codes), decoder.flush()])


def assert_half_precision_works(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Converted and loaded, from half and full precision waveforms: most codes are the same, and nearly the speech."""
    waves, mask = waveforms()
    codes, codes_mask = model.encode(waves, mask).values()
    speech = model.decode(codes, codes_mask).audio_values
    model.save_pretrained(folder)
    for half in (copy.deepcopy(model).to(dtype), type(model).from_pretrained(folder, dtype=dtype).eval()):
        assert half.dtype == dtype
        for given in (waves, waves.to(dtype)):
            found = half.encode(given, mask).audio_codes
            assert (found == codes).float().mean() >= 0.6
        spoken = half.decode(codes, codes_mask).audio_values.float()
        assert spoken.isfinite().all()
        assert (spoken - speech).square().mean() < 0.01 * speech.square().mean()
