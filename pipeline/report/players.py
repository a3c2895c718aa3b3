"""Players on a page: the sounds of some rows, decoded again from the files that the store was built from."""

import math
from dataclasses import dataclass
from typing import Self

import polars as pl

from pipeline.audio.decode import AudioPolicy, load_clip_audio
from pipeline.audio.preview import encode_preview
from pipeline.audio.sources import ClipSources
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.errors import AudioError, StoreError
from pipeline.report.html import Markup, data_url, html_tag
from pipeline.report.store_header import read_build_json
from pipeline.store.feature_store import FeatureStore

# Accepts every clip, because the build has already decided which clips are good.
PLAYER_POLICY = AudioPolicy(accept_truncated=True, keep_silent=True, max_seconds=math.inf)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundPlayers:
    """The sounds of a store's rows, as the lists and folders of its build.json give them now."""

    sources: ClipSources
    plan: pl.DataFrame
    clip_seconds: float

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self:
        """Find the sounds; StoreError if they are not known or give other rows, InputError if a folder is gone."""
        asked = read_build_json(store).get("asked")
        if asked is None:
            raise StoreError(
                f"{store.location}: its build.json does not say where its sounds lie; leave out --sounds"
            )
        corpus = recreate_corpus(asked)
        if not corpus.plan["clip_id"].equals(store.manifest_columns("clip_id")["clip_id"]):
            raise StoreError(
                f"{store.location}: its lists and folders have other clips now than when it was built; "
                "put them back, or leave out --sounds"
            )
        return cls(sources=corpus.sources, plan=corpus.plan, clip_seconds=store.spec.clip_seconds)

    def player(self, row: int) -> Markup:
        """Return an audio element with the first seconds of a row; nothing if its sound cannot be decoded any more."""
        (locator,) = self.sources.locators_of_rows(range(row, row + 1))
        if locator is None:
            return Markup("")
        start, end = self.plan.select("start_seconds", "end_seconds").row(row)
        end = start + min(end - start, self.clip_seconds)
        try:
            audio = load_clip_audio(locator, start_seconds=start, end_seconds=end, policy=PLAYER_POLICY)
        except AudioError:
            return Markup("")
        sound = data_url(encode_preview(audio), "audio/mpeg")
        return html_tag("audio", src=sound, controls="", preload="metadata")


def optional_player(players: SoundPlayers | None, row: int) -> Markup:
    """Return the player of a row, or nothing on a page without sounds."""
    return Markup("") if players is None else players.player(row)
