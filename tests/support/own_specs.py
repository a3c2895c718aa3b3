"""Mel specs as users write them into files, each away from its preset in another way."""

from pathlib import Path

from pipeline.audio.mel_spec import MelSpec, read_mel_spec

OWN = {
    "kaldi-slaney": 'base = "a-jepa"\nfilters = "slaney"\nwindow = "hann_periodic"\nflooring = "add"\npreemphasis = 0',
    "centred-kaldi": 'base = "audio-jepa"\nframing = "centred"\nremove_dc = false',
    "louder-floor": 'base = "passt"\nfloor = 1e-3\nflooring = "max"\nwindow_samples = 801',
    "cd-rate": 'base = "convnext"\nsample_rate_hz = 44100\nwindow_samples = 1411\nhop_samples = 441\n'
    "fft_samples = 2048\nhigh_hz = 20000",
}


def own_spec(name: str, folder: Path) -> MelSpec:
    (folder / f"{name}.toml").write_text(OWN[name])
    return read_mel_spec(folder / f"{name}.toml")
