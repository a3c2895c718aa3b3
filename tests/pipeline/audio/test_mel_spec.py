"""A mel spec is identified by its values; presets stay as they are, and users may write their own in a file."""

import json
import math
import tomllib
from dataclasses import replace

import pytest
import torch

from pipeline.audio.decode import MIN_SOUND_SECONDS
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import (
    DECODING_VERSION,
    MEL_PRESETS,
    SHORTEST_CLIP_SECONDS,
    MelSpec,
    preset_mel_spec,
    read_mel_spec,
    resolve_mel_spec,
    with_clip_seconds,
)
from pipeline.errors import InputError

SPEC = MEL_PRESETS["a-jepa"]

CENTRED = {"framing": "centred", "remove_dc": False}


@pytest.mark.parametrize(
    ("name", "frames", "bands"),
    [
        ("a-jepa", 998, 128),
        ("a-jepa-16k", 998, 128),
        ("audio-jepa", 254, 128),
        ("panns", 1001, 64),
        ("convnext", 1001, 224),
        ("passt", 1000, 128),
    ],
)
def test_ten_seconds_have_the_published_shape(name, frames, bands):
    """Models use 998 frames as 1024, and 254 as 256; pre-emphasis costs PaSST the last of 1001 frames."""
    spec = preset_mel_spec(name)
    assert (spec.frames, spec.mel_bands) == (frames, bands)
    assert log_mel(torch.zeros(1, spec.clip_samples), spec).shape == (1, frames, bands)


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_clip_that_is_long_enough_to_count_has_a_frame(name):
    """A good row without a frame could not be used for training."""
    spec = MEL_PRESETS[name]
    assert SHORTEST_CLIP_SECONDS == MIN_SOUND_SECONDS
    assert spec.frames_of(math.ceil(SHORTEST_CLIP_SECONDS * spec.sample_rate_hz)) >= 1


@pytest.mark.parametrize("spec", [*MEL_PRESETS.values(), replace(SPEC, **CENTRED, window_samples=801)])
def test_a_wave_has_as_many_frames_as_its_spec_says(spec):
    """Tried around every number of samples where one more frame begins."""
    hops = [
        spec.window_samples,
        spec.hop_samples,
        3 * spec.hop_samples,
        spec.window_samples + spec.hop_samples,
    ]
    for samples in [0, 1, 2, *(hop + more for hop in hops for more in (-1, 0, 1, 2))]:
        assert log_mel(torch.zeros(1, samples), spec).shape[1] == spec.frames_of(samples)


@pytest.mark.parametrize(
    ("name", "value"), [("a-jepa", -15.942385), ("panns", math.log(1e-10)), ("passt", math.log(1e-5))]
)
def test_the_floor_of_a_preset_is_known(name, value):
    """Loaders, reports and uint8 scales start from it."""
    assert MEL_PRESETS[name].floor_log == pytest.approx(value, rel=1e-6)


CHANGES = {
    "sample_rate_hz": 44_100,
    "window_samples": 801,
    "hop_samples": 321,
    "fft_samples": 2048,
    "high_hz": 15_000.0,
    "low_hz": 21.0,
    "mel_bands": 64,
    "clip_seconds": 5.0,
    "remove_dc": False,
    "preemphasis": 0.9,
    "floor": 1e-10,
    "decoding": "2: something else",
    "framing": "centred",
    "window": "hann_periodic",
    "filters": "slaney",
    "flooring": "add",
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_id_depends_on_everything_that_changes_a_value(field):
    """Two stores with one id may be mixed."""
    plain = replace(SPEC, remove_dc=False) if field == "framing" else SPEC
    changed = replace(plain, **{field: CHANGES[field]})
    assert changed.spec_id != plain.spec_id


def test_every_field_is_in_the_table_of_changes():
    """A field added later must be added to the list."""
    assert set(SPEC.to_json()) == set(CHANGES) | {"name"}


def test_the_id_does_not_depend_on_the_name_or_on_how_a_number_is_written():
    """10 and 10.0 seconds are the same clip."""
    other = replace(SPEC, name="mine", clip_seconds=10, high_hz=16_000, low_hz=20)
    assert other.spec_id == SPEC.spec_id


def test_the_ids_of_the_presets_stay():
    """A change of these makes every existing store unusable; it must be made knowingly."""
    assert DECODING_VERSION.startswith("1:")
    ids = {name: spec.spec_id for name, spec in MEL_PRESETS.items()}
    assert ids == {
        "a-jepa": "ff4c3612e71f",
        "a-jepa-16k": "b9f7a3829ee3",
        "audio-jepa": "664876e95222",
        "panns": "c35dfc122b6f",
        "convnext": "f18af435e4e7",
        "passt": "ea86c0ea5ab8",
    }


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_spec_survives_json(name):
    """Stores and checkpoints carry it as text."""
    spec = MEL_PRESETS[name]
    assert MelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"dither": 1.0}, "dither"),
        ({"window": "hamming"}, "hamming"),
        ({"hop_samples": 0}, "hop_samples"),
    ],
)
def test_a_spec_that_cannot_be_made_is_refused_by_name(change, names):
    """A store of a newer version must not be read as something else."""
    with pytest.raises(InputError, match=names):
        MelSpec.from_json(SPEC.to_json() | change)


def test_a_spec_that_lacks_a_field_is_refused():
    """A truncated zarr.json is no spec."""
    values = SPEC.to_json()
    del values["hop_samples"]
    with pytest.raises(InputError, match="hop_samples"):
        MelSpec.from_json(values)


@pytest.mark.parametrize(
    "change",
    [
        {"fft_samples": 512},
        {"high_hz": 16_001.0},
        {"low_hz": 16_000.0},
        {"preemphasis": 1.0},
        {"floor": 0.0},
        {"clip_seconds": 0.02},
        {"mel_bands": 0},
        {"mel_bands": 1025},
        {"clip_seconds": math.inf},
        {"clip_seconds": math.nan},
        {"floor": math.inf},
        {"high_hz": math.nan},
        {"fft_samples": 1025},
        {"window_samples": 1},
        {"fft_samples": 4096, "window_samples": 3201},
        {**CENTRED, "clip_seconds": 1e-5},
    ],
)
def test_impossible_values_are_refused_by_the_constructor(change):
    """Past the constructor nothing is checked again."""
    with pytest.raises(ValueError, match=str(next(reversed(change.values())))):
        replace(SPEC, **change)


def test_an_unknown_preset_is_answered_with_the_nearest():
    """The message shows the right name after a typing error."""
    with pytest.raises(InputError, match="did you mean 'a-jepa-16k'") as error:
        preset_mel_spec("ajepa-16k")
    assert all(name in str(error.value) for name in MEL_PRESETS)


def test_dc_removal_belongs_to_whole_frames():
    """A centred front end has no such step; silently skipping it would make two ids for one thing."""
    with pytest.raises(ValueError, match="remove_dc"):
        replace(SPEC, framing="centred")


def test_other_clip_lengths_have_the_same_front_end():
    """A checkpoint of ten-second clips fits a store of five."""
    five = with_clip_seconds(SPEC, 5)
    assert (five.clip_samples, five.frames) == (160_000, 498)
    assert five.spec_id != SPEC.spec_id
    assert with_clip_seconds(five, 10.0) == SPEC


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.01, math.nan, math.inf])
def test_an_impossible_clip_length_is_refused(seconds):
    """The length comes from a command line."""
    with pytest.raises(InputError, match=rf"mel spec 'a-jepa' on clips of {seconds} s: "):
        with_clip_seconds(SPEC, seconds)


@pytest.fixture
def write_spec(tmp_path):
    """A function that writes a spec file and returns its path."""

    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_file_may_change_a_preset(write_spec):
    """A whole number is accepted as a float; the name of the spec is that of the file."""
    path = write_spec('base = "passt"\nclip_seconds = 5\nmel_bands = 64\nhigh_hz = 14e3\n')
    wanted = replace(MEL_PRESETS["passt"], name="mine", clip_seconds=5.0, mel_bands=64, high_hz=14_000.0)
    assert read_mel_spec(path) == resolve_mel_spec(str(path)) == wanted


@pytest.mark.parametrize("name", MEL_PRESETS)
def test_a_file_may_state_every_field(write_spec, name):
    """Every preset could have been a user's own."""
    values = {key: value for key, value in MEL_PRESETS[name].to_json().items() if key != "decoding"}
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    assert tomllib.loads(text) == values
    assert read_mel_spec(write_spec(text)) == MEL_PRESETS[name]


def test_a_name_is_a_preset_unless_it_ends_in_toml():
    """`--spec` takes either."""
    assert resolve_mel_spec("panns") is MEL_PRESETS["panns"]
    with pytest.raises(InputError, match=r"no\.toml: cannot be read: No such file"):
        resolve_mel_spec("no.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "a-jepa"\nhop = 160', "unknown key 'hop'; did you mean 'hop_samples'"),
        ('base = "a-jepa"\nbasis = 1', "unknown key 'basis'; did you mean 'base'"),
        ('base = "a-jepa"\ndecoding = "mine"', "unknown key 'decoding'"),
        ('base = "ajepa"', "did you mean 'a-jepa'"),
        ("base = 3", "base must be a text in quotes, got 3"),
        ('base = "a-jepa"\nmel_bands = 64.0', "mel_bands must be a whole number, got 64.0"),
        ('base = "a-jepa"\nmel_bands = true', "mel_bands must be a whole number, got True"),
        ('base = "a-jepa"\nlow_hz = "20"', "low_hz must be a number, got '20'"),
        ('base = "a-jepa"\nlow_hz = true', "low_hz must be a number, got True"),
        ('base = "a-jepa"\nremove_dc = 0', "remove_dc must be true or false, got 0"),
        ('base = "a-jepa"\nwindow = 1', "window must be a text in quotes, got 1"),
        (
            'base = "a-jepa"\nwindow = "hamming"',
            "window must be one of hann_symmetric, hann_periodic, got 'hamming'",
        ),
        ('base = "a-jepa"\nfloor = nan', "floor must be positive"),
        ('base = "a-jepa"\nhigh_hz = 20000', "must be a range within 0 to 16000.0 Hz"),
        ('base = "a-jepa"\nname = "passt"', "'passt' is the name of a preset with other values"),
        ("sample_rate_hz = 32000\nhigh_hz = 16e3", "lacks window_samples, hop_samples, fft_samples"),
        ("sample_rate_hz: 32000", "is not TOML"),
    ],
)
def test_an_error_in_a_file_is_named(write_spec, text, message):
    """The message is one line and begins with the file."""
    path = write_spec(text)
    with pytest.raises(InputError) as error:
        read_mel_spec(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    """An example is a sound that is given in place of a spec."""
    path = tmp_path / "sound.toml"
    path.write_bytes(b"RIFF\xff\xfe\x00")
    with pytest.raises(InputError, match="is not TOML"):
        read_mel_spec(path)


@pytest.mark.parametrize("name", MEL_PRESETS)
@pytest.mark.parametrize("frames", [1, 2, 100])
def test_the_fewest_samples_of_some_frames_have_them_and_one_less_has_not(name, frames):
    spec = MEL_PRESETS[name]
    fewest = spec.samples_of(frames)
    assert (spec.frames_of(fewest), spec.frames_of(fewest - 1)) == (frames, frames - 1)
