"""The physical constants and the feature contract."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from musetalk import contract
from musetalk.contract import (
    ALL_FIELDS,
    CACHE_FIELDS,
    CONTRACTS,
    FINGERPRINTS,
    MODEL_FIELDS,
    MUSETALK_V1,
    MUSETALK_V15,
    OWN_CONSTANTS,
    RIGID,
    ContractError,
    FeatureContract,
)
from musetalk.errors import UserError

OTHER = {
    "crop": "rigid",
    "bbox_shift": 3,
    "mask": None,  # has one value only
    "posterior": "sample",
    "final_layer_norm": True,
    "mel_scope": "segment",
    "tail": "silence",
    "encode_dtype": "bfloat16",
    "vae": "abc",
    "audio_encoder": "def",
    "face_backend": "dwpose",
    "window_edge": "clamp",
    "positional_encoding": False,
}


def test_constants_equal_musetalks():
    assert (contract.VIDEO_FPS, contract.AUDIO_SAMPLE_RATE, contract.FEATURE_RATE) == (25, 16_000, 50)
    assert (contract.SAMPLES_PER_FRAME, contract.SAMPLES_PER_FEATURE) == (640, 320)
    assert (contract.FEATURES_PER_FRAME, contract.WINDOW_STEPS) == (2, 10)
    assert (contract.SYNC_MEL_RATE, contract.SYNC_MEL_BINS) == (80, 80)
    assert (contract.IMAGE_SIZE, contract.MASK_TOP) == (256, 128)
    assert (contract.LATENT_SIZE, contract.LATENT_CHANNELS) == (32, 4)


def test_rates_divide_evenly():
    assert contract.SAMPLES_PER_FRAME * contract.VIDEO_FPS == contract.AUDIO_SAMPLE_RATE
    assert contract.SAMPLES_PER_FEATURE * contract.FEATURE_RATE == contract.AUDIO_SAMPLE_RATE
    assert contract.FEATURES_PER_FRAME * contract.VIDEO_FPS == contract.FEATURE_RATE
    assert contract.LATENT_SIZE * contract.VAE_FACTOR == contract.IMAGE_SIZE


def test_defaults_never_change():
    """Stored contracts rely on them, see FeatureContract. A new field is added here with its default."""
    assert FeatureContract().as_dict(ALL_FIELDS) == {
        "crop": "nose_centred",
        "bbox_shift": 0,
        "margins": (0,),
        "mask": "lower_half",
        "posterior": "mode",
        "final_layer_norm": False,
        "mel_scope": "file",
        "tail": "mel_zero",
        "encode_dtype": "float32",
        "vae": "",
        "audio_encoder": "",
        "face_backend": "",
        "window_edge": "zero",
        "positional_encoding": True,
    }


def test_musetalk_v1_is_the_official_inference():
    changes = {"posterior": "sample", "window_edge": "clamp"}
    assert MUSETALK_V1.as_dict(ALL_FIELDS) == FeatureContract().as_dict(ALL_FIELDS) | changes


def test_musetalk_v15_is_the_official_inference():
    assert MUSETALK_V15.as_dict(ALL_FIELDS) == MUSETALK_V1.as_dict(ALL_FIELDS) | {
        "margins": (10,),
        "final_layer_norm": True,
        "mel_scope": "segment",
        "tail": "silence",
        "window_edge": "zero",
    }


def test_rigid_differs_from_v15_in_box_margin_noise_and_precision():
    rigid, v15 = RIGID.as_dict(ALL_FIELDS), MUSETALK_V15.as_dict(ALL_FIELDS)
    assert {name for name in rigid if rigid[name] != v15[name]} == {"crop", "margins", "posterior", "encode_dtype"}
    assert CONTRACTS == {"rigid": RIGID, "musetalk_v15": MUSETALK_V15, "musetalk_v1": MUSETALK_V1}


def test_every_field_is_a_cache_field_or_a_model_field():
    assert set(CACHE_FIELDS) | set(MODEL_FIELDS) == set(ALL_FIELDS) == {field.name for field in fields(FeatureContract)}
    assert not set(CACHE_FIELDS) & set(MODEL_FIELDS)
    assert set(MODEL_FIELDS) == {"window_edge", "positional_encoding"}


@pytest.mark.parametrize("names", [ALL_FIELDS, CACHE_FIELDS, MODEL_FIELDS])
def test_a_stored_contract_is_read_unchanged(names):
    value = FeatureContract(**{name: value for name, value in OTHER.items() if value is not None}, margins=(0, 10))
    stored = json.loads(json.dumps(value.as_dict(names)))
    assert set(stored) == set(names)
    again = FeatureContract.from_dict(stored, names, "here")
    assert again.as_dict(names) == value.as_dict(names)
    hash(again)


@pytest.mark.parametrize("name", [name for name in ALL_FIELDS if name not in FINGERPRINTS])
def test_a_missing_field_has_its_default(name):
    stored = MUSETALK_V15.as_dict(ALL_FIELDS)
    del stored[name]
    default = getattr(FeatureContract(), name)
    assert FeatureContract.from_dict(stored, ALL_FIELDS, "here") == replace(MUSETALK_V15, **{name: default})


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_missing_fingerprint_is_refused_by_name(name):
    stored = RIGID.as_dict(CACHE_FIELDS)
    del stored[name]
    with pytest.raises(ContractError, match=f"^here: .*{name}"):
        FeatureContract.from_dict(stored, CACHE_FIELDS, "here")


@pytest.mark.parametrize("name", ["fps", "window_edge"])
def test_an_unknown_field_is_refused_by_name(name):
    with pytest.raises(ContractError, match=f"^here: .*{name}"):
        FeatureContract.from_dict(RIGID.as_dict(CACHE_FIELDS) | {name: "zero"}, CACHE_FIELDS, "here")


@pytest.mark.parametrize("name", [name for name, value in OTHER.items() if value is not None])
def test_a_mismatch_names_the_source_the_field_and_both_values(name):
    have = replace(FeatureContract(), vae="123", audio_encoder="456", face_backend="mediapipe")
    want = replace(have, **{name: OTHER[name]})
    with pytest.raises(ContractError) as caught:
        have.require(want, (name,), "data/cache")
    message = str(caught.value)
    assert message.startswith("data/cache ") and f"{name} = {getattr(have, name)!r}" in message
    assert repr(OTHER[name]) in message and issubclass(ContractError, UserError)
    assert (f"; set {name} to {getattr(have, name)!r}, or " in message) == (name in OWN_CONSTANTS)


@pytest.mark.parametrize("name", ["vae", "audio_encoder", "face_backend"])
def test_an_empty_value_matches_any(name):
    known = replace(FeatureContract(), **{name: OTHER[name]})
    known.require(FeatureContract(), ALL_FIELDS, "data/cache")
    FeatureContract().require(known, ALL_FIELDS, "data/cache")


def test_every_field_can_be_a_mismatch():
    assert set(OTHER) | {"margins"} == set(ALL_FIELDS)


def test_only_the_named_fields_are_compared():
    have, want = FeatureContract(), replace(FeatureContract(), window_edge="clamp", positional_encoding=False)
    have.require(want, CACHE_FIELDS, "data/cache")
    with pytest.raises(ContractError, match="window_edge"):
        have.require(want, MODEL_FIELDS, "a checkpoint")


@pytest.mark.parametrize("requested", [(0,), (10, 0), (0, 5)])
def test_requested_margins_must_be_a_subset(requested):
    stored = replace(FeatureContract(), margins=(0, 10, 20))
    if 5 in requested:
        with pytest.raises(ContractError, match="margins"):
            stored.require(replace(stored, margins=requested), ("margins",), "data/cache")
    else:
        stored.require(replace(stored, margins=requested), ("margins",), "data/cache")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop", "square"),
        ("mask", "upper_half"),
        ("posterior", "mean"),
        ("mel_scope", "global"),
        ("tail", ""),
        ("encode_dtype", "float16"),
        ("face_backend", "mmpose"),  # computes dwpose's landmarks
        ("window_edge", "repeat"),
        ("margins", ()),
        ("margins", (-1,)),
        ("margins", (1.5,)),
        ("margins", (True,)),
        ("margins", ("3",)),
    ],
)
def test_invalid_values_are_refused_by_name(name, value):
    with pytest.raises(ContractError, match=name) as caught:
        replace(FeatureContract(), **{name: value})
    assert repr(value) in str(caught.value)
