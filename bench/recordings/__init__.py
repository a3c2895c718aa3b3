"""Recordings in Debian packages, read, labelled, split and mixed; `bench/real_recordings.py` builds stores of them."""
