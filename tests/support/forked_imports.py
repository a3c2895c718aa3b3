"""The imports of the process that `forked.py` forks: what takes seconds and starts no thread.

A fork copies one thread alone: whatever the others hold would be held for ever. polars and pyarrow start threads when
they are imported, so each forked process imports them itself, and all of this project.
"""

import contextlib
from pathlib import Path

import pytest  # noqa: F401
import scipy.sparse
import scipy.special  # noqa: F401
import torch._dynamo  # every optimiser imports it
import torch.utils.tensorboard  # noqa: F401

with contextlib.suppress(ImportError):  # only Linux has it
    import nvidia.dali.fn  # noqa: F401

THREADS = Path("/proc/self/task")

assert not THREADS.exists() or len(list(THREADS.iterdir())) == 1
