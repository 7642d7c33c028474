"""Constants, which all follow from 25, 16000 and 50, and the feature contract."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk import contract
from musetalk.contract import (
    ALL_FIELDS,
    CACHE_FIELDS,
    CONTRACTS,
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

contracts = st.builds(
    FeatureContract,
    crop=st.sampled_from(["nose_centred", "rigid"]),
    bbox_shift=st.integers(-20, 20),
    margins=st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
    posterior=st.sampled_from(["mode", "sample"]),
    final_layer_norm=st.booleans(),
    mel_scope=st.sampled_from(["file", "segment"]),
    tail=st.sampled_from(["mel_zero", "silence"]),
    encode_dtype=st.sampled_from(["float32", "bfloat16"]),
    vae=st.text(max_size=8),
    audio_encoder=st.text(max_size=8),
    face_backend=st.sampled_from(["", "mediapipe", "dwpose"]),
    window_edge=st.sampled_from(["zero", "clamp"]),
    positional_encoding=st.booleans(),
)


def test_the_constants_are_those_of_musetalk():
    assert (contract.VIDEO_FPS, contract.AUDIO_SAMPLE_RATE, contract.FEATURE_RATE) == (25, 16_000, 50)
    assert (contract.SAMPLES_PER_FRAME, contract.SAMPLES_PER_FEATURE) == (640, 320)
    assert (contract.FEATURES_PER_FRAME, contract.WINDOW_STEPS) == (2, 10)
    assert (contract.SYNC_MEL_RATE, contract.SYNC_MEL_BINS) == (80, 80)
    assert (contract.IMAGE_SIZE, contract.MASK_TOP) == (256, 128)
    assert (contract.LATENT_SIZE, contract.LATENT_CHANNELS) == (32, 4)


def test_all_rates_divide_evenly():
    assert contract.SAMPLES_PER_FRAME * contract.VIDEO_FPS == contract.AUDIO_SAMPLE_RATE
    assert contract.SAMPLES_PER_FEATURE * contract.FEATURE_RATE == contract.AUDIO_SAMPLE_RATE
    assert contract.FEATURES_PER_FRAME * contract.VIDEO_FPS == contract.FEATURE_RATE
    assert contract.LATENT_SIZE * contract.VAE_FACTOR == contract.IMAGE_SIZE


def test_musetalk_v1_is_the_official_inference():
    assert MUSETALK_V1.as_dict(ALL_FIELDS) == {
        "crop": "nose_centred",
        "bbox_shift": 0,
        "margins": (0,),
        "mask": "lower_half",
        "posterior": "sample",
        "final_layer_norm": False,
        "mel_scope": "file",
        "tail": "mel_zero",
        "encode_dtype": "float32",
        "vae": "",
        "audio_encoder": "",
        "face_backend": "",
        "window_edge": "clamp",
        "positional_encoding": True,
    }


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


@given(value=contracts, names=st.sampled_from([ALL_FIELDS, CACHE_FIELDS, MODEL_FIELDS]))
def test_a_contract_survives_json(value, names):
    again = FeatureContract.from_dict(json.loads(json.dumps(value.as_dict(names))), names, "here")
    assert again.as_dict(names) == value.as_dict(names)
    assert set(again.as_dict(names)) == set(names)
    again.require(value, names, "the copy")
    assert isinstance(again.margins, tuple)
    hash(again)


@pytest.mark.parametrize("names", [ALL_FIELDS, CACHE_FIELDS])
def test_unknown_and_missing_fields_are_refused_by_name(names):
    values = FeatureContract().as_dict(names)
    with pytest.raises(ContractError, match="fps"):
        FeatureContract.from_dict(values | {"fps": 25}, names, "here")
    with pytest.raises(ContractError, match="posterior"):
        FeatureContract.from_dict({k: v for k, v in values.items() if k != "posterior"}, names, "here")


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


margin_sets = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)


@given(have=margin_sets, want=margin_sets)
def test_requested_margins_must_be_a_subset(have, want):
    has, wants = replace(FeatureContract(), margins=have), replace(FeatureContract(), margins=want)
    if all(margin in have for margin in want):
        has.require(wants, ("margins",), "data/cache")
    else:
        with pytest.raises(ContractError, match="margins"):
            has.require(wants, ("margins",), "data/cache")


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
