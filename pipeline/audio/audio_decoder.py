"""What every decoder offers; the address at which those who use decoders find it."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class AudioDecoder(Protocol):
    """A sound file that is open for decoding."""

    @property
    def rate_hz(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def codec(self) -> str: ...
    @property
    def seconds(self) -> float:
        """The length that the file declares, else the measured length."""

    @property
    def has_declared_length(self) -> bool:
        """Whether the file declares `seconds`, so that a shorter sound is truncated."""

    @property
    def filled_samples(self) -> int:
        """Samples of silence that `read_blocks` has put so far where time stamps leave a hole."""

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield samples [first, first + count) in float32 blocks `[channel, sample]`, as far as they decode."""
