"""Short sounds for pages: a few seconds of a clip as MP3, small enough to be part of the page."""

import io

import numpy as np
import soundfile

from pipeline.audio.decode import ClipAudio

PREVIEW_SECONDS = 5.0

PREVIEW_RATE_HZ = 16_000

# Of libsndfile's range 0 to 1; at 1 its MP3 encoder refuses this rate. Five seconds take about 14 kB.
COMPRESSION_LEVEL = 0.9

PREVIEW_PEAK = 0.7  # quiet clips are amplified to it, so that a page needs no volume knob for each


def encode_preview(audio: ClipAudio) -> bytes:
    """The first PREVIEW_SECONDS of a clip as MP3, mono, at PREVIEW_RATE_HZ, with the peak at PREVIEW_PEAK."""
    wave_S = audio.resample_wave(PREVIEW_RATE_HZ)[: round(PREVIEW_SECONDS * PREVIEW_RATE_HZ)]
    peak = float(np.abs(wave_S).max(initial=0.0))
    if peak:
        wave_S = wave_S * (PREVIEW_PEAK / peak)
    file = io.BytesIO()
    soundfile.write(
        file,
        wave_S,
        PREVIEW_RATE_HZ,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=COMPRESSION_LEVEL,
    )
    return file.getvalue()
