"""A critic of waveforms for the decoder of ttt-tiny's audio tokenizer: it learns to tell decoded speech from recorded
speech, and the decoder learns to be taken for it. Spectral losses alone leave the phase, and so the voice, buzzing.

Small complex-spectrogram discriminators at several resolutions (after EnCodec, Défossez et al., 2022, and Vocos,
Siuzdak, 2023), with hinge losses and feature matching.
"""

import torch
from torch import nn
from torch.nn import functional as F

RESOLUTIONS = (512, 1024, 2048)


class SpectrogramDiscriminator(nn.Module):
    """Scores patches of the complex spectrogram at one resolution."""

    def __init__(self, n_fft: int, channels: int = 12):
        super().__init__()
        self.n_fft = n_fft
        sizes = [2, channels, channels, 2 * channels, 2 * channels]
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(
                nn.Conv2d(before, after, (3, 7), stride=(1, 2 if place else 1), padding=(1, 3))
            )
            for place, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False))
        )
        self.score = nn.Conv2d(sizes[-1], 1, (3, 3), padding=(1, 1))

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return scores of patches of (batch, samples), and what the layers found."""
        window = torch.hann_window(self.n_fft, device=waveform.device)
        spectrum = torch.stft(
            waveform.float(), self.n_fft, self.n_fft // 4, window=window, normalized=True, return_complex=True
        )
        # (batch, 2, frames, bins); the square root of the magnitude keeps quiet parts in sight.
        spectrum = spectrum * (spectrum.abs() + 1e-6).rsqrt()
        hidden = torch.stack([spectrum.real, spectrum.imag], 1).transpose(2, 3)
        found = []
        for conv in self.convs:
            hidden = F.leaky_relu(conv(hidden), 0.1)
            found.append(hidden)
        return self.score(hidden), found


class Discriminator(nn.Module):
    """Discriminators at all `RESOLUTIONS`."""

    def __init__(self, channels: int = 12):
        super().__init__()
        self.parts = nn.ModuleList(SpectrogramDiscriminator(n_fft, channels) for n_fft in RESOLUTIONS)

    def forward(self, waveform: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Return each resolution's scores of (batch, samples) and what its layers found."""
        return [part(waveform) for part in self.parts]

    def own_loss(self, real: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Return the hinge loss of telling recorded from decoded speech, each (batch, samples)."""
        losses = [
            F.relu(1 - for_real).mean() + F.relu(1 + for_decoded).mean()
            for (for_real, _), (for_decoded, _) in zip(self(real), self(decoded.detach()), strict=True)
        ]
        return torch.stack(losses).mean()

    def decoder_losses(self, real: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the decoder loses by being found out, and how far the layers' findings lie apart."""
        with torch.no_grad():
            expected = self(real)
        adversarial, matching = [], []
        for (_, wanted), (score, found) in zip(expected, self(decoded), strict=True):
            adversarial.append(-score.mean())
            matching += [(x - y).abs().mean() / x.abs().mean() for x, y in zip(wanted, found, strict=True)]
        return torch.stack(adversarial).mean(), torch.stack(matching).mean()
