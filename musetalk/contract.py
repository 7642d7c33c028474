"""What preparing, training and inference must agree on: physical constants and the feature contract.

MuseTalk sees a video as 25 frames a second and its audio as 50 Whisper features a second. Everything else
follows by arithmetic. Shape legend of the package:
B batch, T video frames, F audio features, S encoder states, W window tokens, D their width, K margin variants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from reprlib import repr as short

from musetalk.errors import UserError

VIDEO_FPS = 25  # video frames a second, whatever the source had
AUDIO_SAMPLE_RATE = 16_000  # samples a second, mono
FEATURE_RATE = 50  # audio encoder states a second
SAMPLES_PER_FRAME = AUDIO_SAMPLE_RATE // VIDEO_FPS  # 640 samples
SAMPLES_PER_FEATURE = AUDIO_SAMPLE_RATE // FEATURE_RATE  # 320 samples
FEATURES_PER_FRAME = FEATURE_RATE // VIDEO_FPS  # 2
CONTEXT_FRAMES = 2  # video frames of audio context on either side
WINDOW_STEPS = FEATURES_PER_FRAME * (2 * CONTEXT_FRAMES + 1)  # 10 features; x S states = W tokens

SYNC_MEL_RATE = 80  # mel frames a second for the sync expert
SYNC_MEL_BINS = 80

IMAGE_SIZE = 256  # pixels, width and height of a face crop
MASK_TOP = IMAGE_SIZE // 2  # first row of the half that is repainted
VAE_FACTOR = 8  # pixels per latent pixel
LATENT_SIZE = IMAGE_SIZE // VAE_FACTOR  # 32
LATENT_CHANNELS = 4


def sync_mel_frames(frames: int) -> int:
    """Mel frames in the time of some video frames, rounded up."""
    return -(-frames * SYNC_MEL_RATE // VIDEO_FPS)


LARGEST = 1000  # number of pixels in a feature contract


class ContractError(UserError):
    """Two parts of the chain were made under different rules. The message names the field and both values."""


@dataclass(frozen=True)
class FeatureContract:
    """All that must be equal where features are made, learnt from and used.

    The fields down to `face_backend` are fixed when a cache is made, the rest when training starts.
    """

    crop: str = "nose_centred"  # MuseTalk's box, or "rigid": see crop.face_box
    bbox_shift: int = 0  # source pixels that the border moves down
    margins: tuple[int, ...] = (0,)  # source pixels added below the chin, one per variant
    mask: str = "lower_half"  # rows from MASK_TOP on are -1 before encoding
    posterior: str = "mode"  # "mode", or "sample" with noise seeded by clip, frame and variant
    final_layer_norm: bool = False  # is the last audio state taken after the encoder's final layer norm?
    mel_scope: str = "file"  # the mel's floor is relative to the loudest bin of the "file" or 30 s "segment"
    tail: str = "mel_zero"  # what fills the last 30 s segment: "mel_zero" or "silence"
    encode_dtype: str = "float32"  # of the VAE while a cache is made
    vae: str = ""  # fingerprint of the loaded tensors
    audio_encoder: str = ""  # fingerprint of the loaded tensors
    face_backend: str = ""  # whose landmarks the box is made of: "mediapipe" or "dwpose"; "" is not known
    window_edge: str = "zero"  # what an audio window sees beyond the clip: "zero" or "clamp"
    positional_encoding: bool = True  # is a sinusoid added to the window's tokens?

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
            object.__setattr__(self, "margins", tuple(self.margins))  # as JSON gives it
        for field in fields(self):
            if type(getattr(self, field.name)) is not type(field.default):
                kind = type(field.default).__name__
                raise ContractError(f"{field.name} must be of type {kind}, not {short(getattr(self, field.name))}")
        if not self.margins or any(type(margin) is not int or margin < 0 for margin in self.margins):
            raise ContractError(f"margins must be one or more whole pixels, 0 or more, not {short(self.margins)}")
        if max(*self.margins, abs(self.bbox_shift)) > LARGEST:
            raise ContractError(f"margins and bbox_shift must be at most {LARGEST}")

    @classmethod
    def from_dict(cls, values: object, names: tuple[str, ...], source: str) -> FeatureContract:
        """The contract that `as_dict` made of these fields. Raises ContractError naming `source` for anything else."""
        if not isinstance(values, dict):
            raise ContractError(f"{source}: holds no feature contract")
        if set(values) != set(names):
            odd = ", ".join(sorted(str(name)[:40] for name in set(names).symmetric_difference(values))[:5])
            raise ContractError(f"{source}: its feature contract has unknown or missing fields: {odd}")
        try:
            return cls(**values)
        except ContractError as error:
            raise ContractError(f"{source}: {error}") from error

    def as_dict(self, names: tuple[str, ...]) -> dict:
        """The values of these fields, plain for JSON."""
        return {name: value for name, value in asdict(self).items() if name in names}

    def require(self, wanted: FeatureContract, names: tuple[str, ...], source: str) -> None:
        """Refuse `source`, made under this contract, where a reader that wants `wanted` would misread it.

        A margin asked for must be among those this contract has; what one of the two does not know, as the rules of
        published weights know no fingerprints and no face_backend, fits any. Raises ContractError with both values.
        """
        for name in names:
            have, want = getattr(self, name), getattr(wanted, name)
            if "" in (have, want):
                continue
            if (not set(want) <= set(have)) if name == "margins" else (have != want):
                own = name in OWN_CONSTANTS
                mend = f"set {name} to {short(have)}" if own else "use the contract and the models it was made with"
                raise ContractError(
                    f"{source} was made with {name} = {short(have)}, but {short(want)} is asked for; "
                    f"{mend}, or make it again"
                )


ALL_FIELDS = tuple(field.name for field in fields(FeatureContract))
MODEL_FIELDS = ("window_edge", "positional_encoding")
CACHE_FIELDS = tuple(name for name in ALL_FIELDS if name not in MODEL_FIELDS)
# What a user sets by a constant of its own; the rest comes with the contract's name and with the models.
OWN_CONSTANTS = ("bbox_shift", "margins", "encode_dtype", "face_backend", "positional_encoding")

# The official inference of each version (https://github.com/TMElyralab/MuseTalk).
MUSETALK_V1 = FeatureContract(posterior="sample", window_edge="clamp")
MUSETALK_V15 = replace(
    MUSETALK_V1, margins=(10,), final_layer_norm=True, mel_scope="segment", tail="silence", window_edge="zero"
)
# For a training from scratch: v1.5's features, but a box that does not give the mouth away and no noise in the latents.
RIGID = replace(MUSETALK_V15, crop="rigid", margins=(0,), posterior="mode", encode_dtype="bfloat16")
CONTRACTS = {"rigid": RIGID, "musetalk_v15": MUSETALK_V15, "musetalk_v1": MUSETALK_V1}
