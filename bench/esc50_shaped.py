"""A data set in ESC-50's shape out of a demo corpus, for `ajepa-data build-esc50`: its clips of one label, in halves.

python -m bench.esc50_shaped demo/corpus demo/esc50

Each clip of one label gives takes A and B, 5 s each, 44.1 kHz, in one of five folds; the clips of a class take
turns, so that folds hold about as many of each. Both takes of a clip lie in one fold, as ESC-50's pieces of one
recording do.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import soundfile
from tqdm import tqdm

from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SoundLocator

RATE_HZ, SECONDS, FOLDS = 44_100, 5, 5

FIELDS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="what ajepa-data demo-corpus made")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    print(f"{asked.out}: {esc50_shaped(asked.corpus, asked.out)} clips")


def esc50_shaped(corpus: Path, out: Path) -> int:
    """Write `audio/` and `meta/esc50.csv`; how many clips there are."""
    (out / "audio").mkdir(parents=True)
    (out / "meta").mkdir()
    with (corpus / "truth.csv").open(encoding="utf-8", newline="") as file:
        clips = [row for row in csv.DictReader(file) if row["kind"] == "clip" and row["expected"] == "good"]
    of_class = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip["clip_id"]):
        if ";" not in clip["labels"]:
            of_class[clip["parts"]].append(clip)
    lines = []
    for target, (name, mine) in enumerate(tqdm(sorted(of_class.items()), unit="classes")):
        for place, clip in enumerate(mine):
            fold = 1 + place % FOLDS
            locator = SoundLocator.from_path(corpus / clip["file"])
            wave_S = load_clip_audio(locator, start_seconds=0.0, end_seconds=2.0 * SECONDS).resample_wave(
                RATE_HZ
            )
            samples = RATE_HZ * SECONDS
            for take, start in (("A", 0), ("B", samples)):
                file_name = f"{fold}-{100_000 + len(lines)}-{take}-{target}.wav"
                part_S = wave_S[start : start + samples]
                if not len(part_S):  # a clip may end before
                    continue
                soundfile.write(out / "audio" / file_name, part_S, RATE_HZ, subtype="PCM_16")
                category = name.lower().replace(" ", "_").replace(",", "")
                lines.append((file_name, fold, target, category, False, clip["clip_id"], take))
    with (out / "meta" / "esc50.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([FIELDS, *lines])
    return len(lines)


if __name__ == "__main__":
    main()
