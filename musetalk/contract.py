"""What preparing, training and inference must agree on: physical constants and the feature contract.

MuseTalk uses video at 25 frames a second and audio as 50 Whisper features a second; the other constants follow by
arithmetic. Shape legend of the package:
B batch, T video frames, F audio features, S encoder states, W window tokens, D their width, K margin variants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from reprlib import repr as short

from musetalk.errors import UserError

VIDEO_FPS = 25  # video frames a second; sources are resampled
AUDIO_SAMPLE_RATE = 16_000  # samples a second, mono
FEATURE_RATE = 50  # audio encoder states a second
SAMPLES_PER_FRAME = AUDIO_SAMPLE_RATE // VIDEO_FPS  # 640 samples
SAMPLES_PER_FEATURE = AUDIO_SAMPLE_RATE // FEATURE_RATE  # 320 samples
FEATURES_PER_FRAME = FEATURE_RATE // VIDEO_FPS  # 2
CONTEXT_FRAMES = 2  # video frames of audio context on either side
AUDIO_MARGIN = 15  # video frames of audio that a cached clip has on either side
WINDOW_STEPS = FEATURES_PER_FRAME * (2 * CONTEXT_FRAMES + 1)  # 10 features; x S states = W tokens

SYNC_MEL_RATE = 80  # mel frames a second for the sync expert
SYNC_MEL_BINS = 80

IMAGE_SIZE = 256  # pixels, width and height of a face crop
MASK_TOP = IMAGE_SIZE // 2  # first row of the masked half
VAE_FACTOR = 8  # pixels per latent pixel
LATENT_SIZE = IMAGE_SIZE // VAE_FACTOR  # 32
LATENT_CHANNELS = 4


def sync_mel_frames(frames: int) -> int:
    """The number of mel frames that spans a number of video frames, rounded up."""
    return -(-frames * SYNC_MEL_RATE // VIDEO_FPS)


MAX_PIXELS = 1000  # largest margin or shift


class ContractError(UserError):
    """Two artefacts were made under different feature contracts. The message names the field and both values."""


@dataclass(frozen=True)
class FeatureContract:
    """The settings that preparation, training and inference must share.

    The fields down to `face_backend` are fixed when a cache is made, the others when training starts.

    A stored contract that lacks a field was written before the field existed and has its default. Therefore the default
    of a new field is the behaviour until then, and a default never changes: new behaviour is set in `CONTRACTS`.
    """

    crop: str = "nose_centred"  # MuseTalk's box, or "rigid"; see crop.face_box
    bbox_shift: int = 0  # source pixels by which the box border is moved down
    margins: tuple[int, ...] = (0,)  # source pixels added below the chin, one per variant
    mask: str = "lower_half"  # rows from MASK_TOP on are set to -1 before encoding
    posterior: str = "mode"  # "mode", or "sample" with noise seeded by clip, frame and variant
    final_layer_norm: bool = False  # whether the last audio state is taken after the encoder's final layer norm
    mel_scope: str = "file"  # the mel floor is relative to the loudest bin of the "file" or of the 30 s "segment"
    tail: str = "mel_zero"  # padding of the last 30 s segment: "mel_zero" or "silence"
    encode_dtype: str = "float32"  # dtype of the VAE while a cache is made
    vae: str = ""  # fingerprint of the loaded tensors
    audio_encoder: str = ""  # fingerprint of the loaded tensors
    face_backend: str = ""  # source of the landmarks: "mediapipe" or "dwpose"; "" if unknown
    window_edge: str = "zero"  # padding of audio windows beyond the clip: "zero" or "clamp"
    positional_encoding: bool = True  # whether a sinusoid is added to the window tokens

    def __post_init__(self) -> None:
        choices = {
            "crop": ("nose_centred", "rigid"),
            "mask": ("lower_half",),
            "posterior": ("mode", "sample"),
            "mel_scope": ("file", "segment"),
            "tail": ("mel_zero", "silence"),
            "encode_dtype": ("float32", "bfloat16"),
            "face_backend": ("", "mediapipe", "dwpose"),
            "window_edge": ("zero", "clamp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ContractError(f"{name} must be one of {str(allowed)[1:-1]}, not {short(getattr(self, name))}")
        if isinstance(self.margins, list):
            object.__setattr__(self, "margins", tuple(self.margins))  # JSON has no tuples
        for field in fields(self):
            if type(getattr(self, field.name)) is not type(field.default):
                kind = type(field.default).__name__
                raise ContractError(f"{field.name} must be of type {kind}, not {short(getattr(self, field.name))}")
        if not self.margins or any(type(margin) is not int or margin < 0 for margin in self.margins):
            raise ContractError(f"margins must be one or more non-negative integers, not {short(self.margins)}")
        if max(*self.margins, abs(self.bbox_shift)) > MAX_PIXELS:
            raise ContractError(f"margins and bbox_shift must be at most {MAX_PIXELS}")

    @classmethod
    def from_dict(cls, values: object, names: tuple[str, ...], source: str) -> FeatureContract:
        """Returns a stored contract, `values`, which has fields of `names`. Missing fields have their defaults.

        Raises ContractError naming `source` for an unknown field, an invalid value or a missing fingerprint, since an
        empty one matches any network.
        """
        if not isinstance(values, dict):
            raise ContractError(f"{source}: contains no feature contract")
        if unknown := sorted(str(name)[:40] for name in set(values).difference(names)):
            raise ContractError(
                f"{source}: its feature contract has unknown fields: {', '.join(unknown[:5])}; use the version that "
                "wrote it, or newer"
            )
        if missing := [name for name in FINGERPRINTS if name in names and name not in values]:
            raise ContractError(f"{source}: its feature contract lacks {', '.join(missing)}; recreate it")
        try:
            return cls(**values)
        except ContractError as error:
            raise ContractError(f"{source}: {error}") from error

    def as_dict(self, names: tuple[str, ...]) -> dict:
        """The values of the fields in `names`, for JSON."""
        return {name: value for name, value in asdict(self).items() if name in names}

    def require(self, requested: FeatureContract, names: tuple[str, ...], source: str) -> None:
        """Raises ContractError if `source`, made under this contract, cannot be used under the requested one.

        Compares the fields in `names`; the error has both values. Requested margins must be a subset of this
        contract's. An empty value matches any: the contracts of released weights have no fingerprints and no
        face_backend.
        """
        for name in names:
            have, want = getattr(self, name), getattr(requested, name)
            if "" in (have, want):
                continue
            if (not set(want) <= set(have)) if name == "margins" else (have != want):
                own = name in OWN_CONSTANTS
                remedy = f"set {name} to {short(have)}" if own else "use the contract and the models it was made with"
                raise ContractError(
                    f"{source} was made with {name} = {short(have)}, but {short(want)} is requested; "
                    f"{remedy}, or recreate it"
                )


ALL_FIELDS = tuple(field.name for field in fields(FeatureContract))
MODEL_FIELDS = ("window_edge", "positional_encoding")
FINGERPRINTS = ("vae", "audio_encoder")
CACHE_FIELDS = tuple(name for name in ALL_FIELDS if name not in MODEL_FIELDS)
# Fields that users set by constants of the same name; the others follow from the contract's name and the models.
OWN_CONSTANTS = ("bbox_shift", "margins", "encode_dtype", "face_backend", "positional_encoding")

# The official inference of each version (https://github.com/TMElyralab/MuseTalk).
MUSETALK_V1 = FeatureContract(posterior="sample", window_edge="clamp")
MUSETALK_V15 = replace(
    MUSETALK_V1, margins=(10,), final_layer_norm=True, mel_scope="segment", tail="silence", window_edge="zero"
)
# For training from scratch: v1.5's features, but a box that does not depend on the mouth, and latents without noise.
RIGID = replace(MUSETALK_V15, crop="rigid", margins=(0,), posterior="mode", encode_dtype="bfloat16")
CONTRACTS = {"rigid": RIGID, "musetalk_v15": MUSETALK_V15, "musetalk_v1": MUSETALK_V1}
