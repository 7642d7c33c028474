"""Creates the small weights in models/mini: a VAE that loads like the real one and runs fast on a CPU.

    python -m tools.make_mini --clips ../shared/clips

Trains on a folder of videos of talking people and on the built-in sample. The clips named in `HELD_OUT` are held out;
the figures printed at the end are measured on them.

Writes `models/mini/whisper/tiny.pt`, an untrained Whisper, and
`models/mini/sd-vae-ft-mse/{config.json,diffusion_pytorch_model.safetensors}`, a diffusers `AutoencoderKL` in fp16. The
EMA of the VAE is saved every `save_every` steps, so it can be used before the end.

Takes about 50 minutes on one core that supports bfloat16; more threads help only on idle cores. The same clips, seed
and number of threads give the same weights, up to rounding on other CPUs.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from torch.nn import functional
from torch.nn.init import dirac_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from whisper.model import ModelDimensions, Whisper

from musetalk.cli import run_script
from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, MASK_TOP, VAE_FACTOR
from musetalk.data.crop import crop_face, face_box, in_crop
from musetalk.data.face import load_face_backend
from musetalk.data.face.face import FaceBackend
from musetalk.data.face.tracking import follow_person
from musetalk.data.sample import SEEDS, render_frames
from musetalk.data.video import read_frames
from musetalk.files import atomic_write
from musetalk.images import mask_lower_half, to_tensor

HELD_OUT = ("talking_b", "portrait_hevc_1080x1920", "person_3", "person_5", "person_l8")

# Landmarks of mouth and eyes, and the shares of patches drawn around them
MOUTH, EYES = slice(48, 68), slice(36, 48)
MOUTH_SHARE, EYES_SHARE = 0.3, 0.2
MOUTH_BORDER = 8  # px around the mouth landmarks

CONSTANT = 4.0  # magnitude of the constants that make a GroupNorm ignore contrast
SCALING_FACTOR = 0.18215  # scales latents to a standard deviation of 1, as in the real VAE

# As many encoder states as Whisper tiny, but narrower; the smallest possible decoder
AUDIO_DIMENSIONS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=64,
    n_audio_head=4,
    n_audio_layer=4,
    n_vocab=100,
    n_text_ctx=8,
    n_text_state=64,
    n_text_head=4,
    n_text_layer=1,
)
CONV_GAIN = 3  # of the random convolutions, so that audio outweighs the positional embedding


@dataclass(frozen=True)
class Config:
    """The constants; override them on the command line."""

    clips: Path = Path("../shared/clips")  # folder of videos, searched to any depth
    models_dir: Path = Path(__file__).parents[1] / "models" / "mini"
    seed: int = 0
    num_threads: int = 1

    # Crops
    frame_step: int = 5  # every 5th frame of a clip
    sample_frame_step: int = 20  # for the built-in sample, which shows one person
    held_out_frame_step: int = 25  # for held-out clips
    max_margin: int = 20  # source px below the chin
    max_zoom_out: float = 1.8  # size of the largest crop, relative to MuseTalk's
    max_shift: float = 0.15  # largest offset of a wide crop, relative to its size

    # Network
    block_out_channels: tuple[int, ...] = (16, 32, 48, 128)
    norm_num_groups: int = 4

    # Training
    num_steps: int = 5600
    num_whole_steps: int = 900  # the last steps use whole crops, for the statistics of GroupNorm
    batch_size: int = 8  # patches
    whole_batch_size: int = 2  # crops
    patch_size: int = 128  # px
    masked_share: float = 0.25  # of the patches have their lower half masked
    sampled_every: int = 4  # steps; in these the latents are sampled from the posterior, else its mode is used
    learning_rate: float = 6e-4  # peak
    betas: tuple[float, float] = (0.9, 0.99)
    num_warmup_steps: int = 200
    kl_weight: float = 1e-6  # per latent
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    save_every: int = 300  # steps


def main(config: Config) -> None:
    """Creates all of the small weights."""
    torch.set_num_threads(config.num_threads)
    make_audio_encoder(config)
    try:
        make_vae(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {config.models_dir} has the VAE of the last save, and the same command starts again"
        ) from None


def make_audio_encoder(config: Config) -> None:
    """Writes a Whisper with random weights, whose features still distinguish different mel spectrograms.

    In openai-whisper's format, including an unused decoder, as in the real file.
    """
    torch.manual_seed(config.seed)
    model = Whisper(AUDIO_DIMENSIONS)
    with torch.no_grad():
        model.decoder.positional_embedding.normal_(std=0.01)  # uninitialised by Whisper
        for conv in (model.encoder.conv1, model.encoder.conv2):
            conv.weight *= CONV_GAIN
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    with atomic_write(config.models_dir / "whisper" / "tiny.pt") as path:
        torch.save({"dims": asdict(AUDIO_DIMENSIONS), "model_state_dict": tensors}, path)


def make_vae(config: Config) -> None:
    """Trains the VAE on crops, writes it to `models_dir` and prints figures on held-out people."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    images, points = training_crops(config, rng)
    print(f"{len(images)} crops to train on")
    vae = build_vae(config)
    start_as_colour_pyramid(vae)
    average = train_vae(vae, images, points, config, rng)
    folder = save_vae(average, images, config)
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    for clip, (faces, landmarks) in held_out_crops(config).items():
        figures = evaluate(vae, faces, landmarks)
        print(json.dumps({"clip": clip} | {name: round(value, 4) for name, value in figures.items()}))


# ---- Crops -----------------------------------------------------------------------------------------------


def training_crops(config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops of all people not held out and of the sample: BGR uint8 (N, 256, 256, 3), landmarks (N, 68, 2)."""
    backend = load_face_backend("mediapipe", Path(), "cpu")
    paths = [path for path in sorted(config.clips.rglob("*.mp4")) if path.stem not in HELD_OUT]
    sources = [islice(read_frames(path), 0, None, config.frame_step) for path in paths]
    sources += [islice(render_frames(k), 0, None, config.sample_frame_step) for k in range(len(SEEDS))]
    images, points = [], []
    for frames in tqdm(sources, "crops", unit="clip"):
        for frame, landmarks, box in face_boxes(frames, backend, config.max_margin, rng):
            for crop in (box, wider_box(box, frame.shape, config, rng)):
                images.append(crop_face(frame, crop))
                points.append(in_crop(landmarks, crop))
    return np.stack(images), np.stack(points)


def held_out_crops(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Crops of the held-out people: for each clip images (N, 256, 256, 3), landmarks (N, 68, 2)."""
    backend, rng = load_face_backend("mediapipe", Path(), "cpu"), np.random.default_rng(config.seed)
    crops = {}
    for path in sorted(path for path in config.clips.rglob("*.mp4") if path.stem in HELD_OUT):
        frames = islice(read_frames(path), 0, None, config.held_out_frame_step)
        faces = list(face_boxes(frames, backend, config.max_margin, rng))
        images = np.stack([crop_face(frame, box) for frame, _, box in faces])
        crops[path.stem] = images, np.stack([in_crop(landmarks, box) for _, landmarks, box in faces])
    return crops


def face_boxes(
    frames: Iterable[np.ndarray], backend: FaceBackend, max_margin: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames that show the person, with landmarks (68, 2) and MuseTalk's box (4,) at a random margin."""
    frames = list(frames)
    for frame, face in zip(frames, follow_person(backend.detect(frames)), strict=True):
        if face is None:
            continue
        box = face_box(face.landmarks, frame.shape, 0, int(rng.integers(max_margin + 1)))
        if box is not None:
            yield frame, face.landmarks, box


def wider_box(box: np.ndarray, frame_shape: tuple[int, ...], config: Config, rng: np.random.Generator) -> np.ndarray:
    """A random larger box around a box int32 (4,), off-centre but inside the frame."""
    height, width = frame_shape[:2]
    size = (box[2:] - box[:2]) * rng.uniform(1, config.max_zoom_out)
    centre = (box[:2] + box[2:]) / 2 + size * rng.uniform(-config.max_shift, config.max_shift, 2)
    corners = np.concatenate([centre - size / 2, centre + size / 2])
    return np.clip(corners.round(), 0, [width, height, width, height]).astype(np.int32)


# ---- Network ---------------------------------------------------------------------------------------------


def build_vae(config: Config) -> AutoencoderKL:
    """The small VAE with random weights."""
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_out_channels,
        norm_num_groups=config.norm_num_groups,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


@torch.no_grad()
def start_as_colour_pyramid(vae: AutoencoderKL) -> None:
    """Initialises some weights so that training starts from area downsampling and bilinear upsampling of the colours.

    Channels 0-2 carry the colours along the residual path: averaged in the encoder's downsampling, converted to
    opponent colours (luma and two differences) in latents 0-2, interpolated in the decoder's upsampling. All other
    weights stay random, but do not write to these channels initially.

    Pairs of channels cancel the SiLU before both last convolutions, silu(x) - silu(-x) = x, and constants +-CONSTANT in
    the same group make its GroupNorm ignore the contrast of the image.
    """
    average, tent = torch.zeros(3, 3), torch.tensor([1.0, 2.0, 1.0]) / 4
    average[:2, :2] = 1 / 4
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    opponent *= torch.tensor([[2.0], [3.0], [6.0]])  # to a similar spread

    encoder, decoder = vae.encoder, vae.decoder
    blocks = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
    for resnet in [resnet for block in blocks for resnet in block.resnets]:
        resnet.conv2.weight *= 0.5
        _write(resnet.conv2, torch.zeros(3, 3), torch.zeros(3, 3))
        if resnet.conv_shortcut is not None:
            _write(resnet.conv_shortcut, torch.eye(3), torch.ones(1, 1))
    for block in encoder.down_blocks[:-1]:
        _write(block.downsamplers[0].conv, torch.eye(3), average)
    for block in decoder.up_blocks[:-1]:
        _write(block.upsamplers[0].conv, torch.eye(3), torch.outer(tent, tent))
    _write(encoder.conv_in, torch.eye(3), centre)
    _write(decoder.conv_in, torch.linalg.inv(opponent), centre)

    last = encoder.down_blocks[-1].resnets
    _pair_colours(last[0], [*last[1:], *encoder.mid_block.resnets], encoder.conv_out, 3, opponent)
    last = decoder.up_blocks[-1].resnets
    _pair_colours(last[0], last[1:], decoder.conv_out, 1, torch.eye(3))
    encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
    encoder.conv_out.bias[LATENT_CHANNELS:] = -6  # log variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        dirac_(conv.weight)
        conv.bias.zero_()


def _write(conv: torch.nn.Conv2d, matrix: torch.Tensor, kernel: torch.Tensor) -> None:
    """Makes the first outputs of a convolution `matrix` (outputs, inputs) times the first inputs, through `kernel`."""
    outputs, inputs = matrix.shape
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :inputs] = matrix[:, :, None, None] * kernel
    conv.bias[:outputs] = 0


def _pair_colours(
    first: torch.nn.Module,
    later: Iterable[torch.nn.Module],
    conv_out: torch.nn.Conv2d,
    num_constants: int,
    matrix: torch.Tensor,
) -> None:
    """Makes `conv_out` return `matrix` (3, 3) times the colours, which are input channels 0-2 of the resnet `first`.

    Group c of the GroupNorm starts with +colour c, -colour c and `num_constants` pairs of constants; the resnets
    `later` do not change these channels.
    """
    shortcut, norm = first.conv_shortcut, first.norm2
    size = norm.num_channels // norm.num_groups
    reserved = 2 + 2 * num_constants
    rows = torch.cat([torch.arange(reserved) + c * size for c in range(3)])
    signs = torch.tensor([1.0, -1.0]).repeat(num_constants)
    for conv in (shortcut, first.conv2, *(resnet.conv2 for resnet in later)):
        conv.weight[rows] = 0
        conv.bias[rows] = 0
    # Mean squares in a group: colours 1/4, other channels 1/2, roughly
    gain = math.sqrt((2 * num_constants * CONSTANT**2 + 2 / 4 + (size - reserved) / 2) / size)
    conv_out.bias[:3] = 0
    conv_out.weight[:3] *= 0.1
    for c in range(3):
        shortcut.weight[c * size : c * size + 2, c, 0, 0] = signs[:2]
        shortcut.bias[c * size + 2 : c * size + reserved] = CONSTANT * signs
        conv_out.weight[:3, c * size : c * size + reserved] = 0
        conv_out.weight[:3, c * size, 1, 1] = gain * matrix[:, c]
        conv_out.weight[:3, c * size + 1, 1, 1] = -gain * matrix[:, c]


# ---- Training --------------------------------------------------------------------------------------------


def train_vae(
    vae: AutoencoderKL, images: np.ndarray, points: np.ndarray, config: Config, rng: np.random.Generator
) -> AutoencoderKL:
    """Trains on squared error in bfloat16, saves regularly and returns the EMA of the weights."""
    optimizer = torch.optim.AdamW(vae.parameters(), config.learning_rate, config.betas, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    progress = tqdm(range(config.num_steps), "vae", unit="step", mininterval=5)
    for step in progress:
        # A batch of patches, or of whole crops
        whole = step >= config.num_steps - config.num_whole_steps
        size = IMAGE_SIZE if whole else config.patch_size
        count = config.whole_batch_size if whole else config.batch_size
        target = torch.stack([draw_patch(images, points, size, config, rng) for _ in range(count)])

        # Reconstruction and KL loss
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            latents = posterior.sample() if step % config.sampled_every == 0 else posterior.mode()
            pred = vae.decode(latents).sample.float()
        mse = functional.mse_loss(pred, target)
        loss = 10 * mse + config.kl_weight * posterior.kl().mean() / latents[0].numel()

        # Update
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f}", refresh=False)
        if step and step % config.save_every == 0:
            save_vae(average.module, images, config)
    return average.module


def learning_rate_factor(step: int, config: Config) -> float:
    """Linear warmup, then cosine decay to 0.001."""
    warmup = min(1.0, (step + 1) / config.num_warmup_steps)
    return warmup * (0.5 + 0.5 * math.cos(math.pi * step / config.num_steps)) + 1e-3


def draw_patch(
    images: np.ndarray, points: np.ndarray, size: int, config: Config, rng: np.random.Generator
) -> torch.Tensor:
    """A square patch of a random crop with random colours, often at mouth or eyes: float (3, size, size).

    Some are masked as in MuseTalk: rows of the crop from MASK_TOP on are -1.
    """
    index = rng.integers(len(images))
    masked = rng.random() < config.masked_share
    region, furthest = rng.random(), IMAGE_SIZE - size
    left, top = rng.integers(0, furthest + 1, 2)
    if masked and furthest:
        top = MASK_TOP - rng.integers(size // 5, size - size // 5)  # the mask starts within the patch
    elif region < MOUTH_SHARE + EYES_SHARE:
        middle = points[index][MOUTH if region < MOUTH_SHARE else EYES].mean(0) + rng.uniform(-32, 32, 2)
        left, top = np.clip(middle - size / 2, 0, furthest).astype(int)
    square = images[index, top : top + size, left : left + size]
    patch = recolour((to_tensor(square[None])[0] + 1) / 2, rng) * 2 - 1
    if masked:
        patch[:, MASK_TOP - top :] = -1
    return patch


def recolour(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Flips half of the images and augments the colours of most: RGB (3, H, W) in [0, 1].

    Channel permutation, hue rotation about the grey axis, saturation, white balance, brightness, gamma.
    """
    if rng.random() < 0.5:
        image = image.flip(2)
    if rng.random() < 0.25:
        return image
    if rng.random() < 0.25:
        image = image[rng.permutation(3).tolist()]
    angle, saturation = rng.normal(0, 0.35), rng.uniform(0.5, 1.5)
    grey = np.full((3, 3), 1 / 3)
    rotation = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = grey + saturation * (math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * rotation)
    gains = rng.uniform(0.8, 1.2, 3) * rng.uniform(0.75, 1.2)
    matrix = torch.from_numpy((gains[:, None] * matrix).astype(np.float32))
    image = (matrix @ image.flatten(1)).view_as(image).clamp(0, 1)
    return image ** math.exp(rng.normal(0, 0.3))


def save_vae(vae: AutoencoderKL, images: np.ndarray, config: Config) -> Path:
    """Writes weights in fp16 and config of the VAE with normalised latents. Returns the folder.

    images: BGR uint8 (N, 256, 256, 3), the training crops; every other one is MuseTalk's crop.
    """
    saved = copy.deepcopy(vae)
    normalise_latents(saved, images[:: 2 * max(1, len(images) // 100)])
    saved.register_to_config(scaling_factor=SCALING_FACTOR)
    folder = config.models_dir / "sd-vae-ft-mse"
    saved.half().save_pretrained(folder)
    return folder


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Normalises each latent channel over images (N, 256, 256, 3) to mean 0 and standard deviation 1 / SCALING_FACTOR.

    Exact, because the convolutions around the latents are 1 x 1. All channels are then equally important to a UNet.
    """
    latents = torch.cat([vae.encode(to_tensor(image[None])).latent_dist.mode() for image in images])
    mean, gain = latents.mean((0, 2, 3)), 1 / (SCALING_FACTOR * latents.std((0, 2, 3)))
    conv_in, conv_out = vae.quant_conv, vae.post_quant_conv
    conv_in.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    conv_in.bias[:LATENT_CHANNELS] = (conv_in.bias[:LATENT_CHANNELS] - mean) * gain
    conv_in.bias[LATENT_CHANNELS:] += 2 * gain.log()  # log variance
    conv_out.bias += conv_out.weight[:, :, 0, 0] @ mean
    conv_out.weight /= gain[None, :, None, None]


# ---- Figures ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: np.ndarray, points: np.ndarray) -> dict[str, float]:
    """Mean metrics over crops uint8 (N, 256, 256, 3) with landmarks (N, 68, 2).

    psnr_*: dB, of the whole crop, the mouth box, the upper half, and the upper half of the masked crop. *_bilinear: of
    the crop downsampled 8 times by area and upsampled. colour_*: mean absolute error of 8 x 8 averages, in [0, 1].
    """
    target = to_tensor(images)
    pred = torch.cat([reconstruct(vae, target[k : k + 1]) for k in range(len(target))])
    masked = torch.cat([reconstruct(vae, mask_lower_half(target[k : k + 1])) for k in range(len(target))])
    bilinear = to_tensor(np.stack([shrink_and_enlarge(image) for image in images]))
    upper = np.s_[:, :MASK_TOP]
    records = []
    for k, landmarks in enumerate(points):
        mouth = mouth_box(landmarks)
        error = functional.avg_pool2d(pred[k] - target[k], VAE_FACTOR).abs().mean(0) / 2
        records.append(
            {
                "psnr": psnr(pred[k], target[k]),
                "psnr_bilinear": psnr(bilinear[k], target[k]),
                "psnr_mouth": psnr(pred[k][mouth], target[k][mouth]),
                "psnr_mouth_bilinear": psnr(bilinear[k][mouth], target[k][mouth]),
                "psnr_upper": psnr(pred[k][upper], target[k][upper]),
                "psnr_upper_masked": psnr(masked[k][upper], target[k][upper]),
                "colour": error.mean().item(),
            }
            | {
                f"colour_{name}": ((error * region).sum() / region.sum()).item()
                for name, region in regions(landmarks).items()
            }
        )
    return {name: float(np.nanmean([record[name] for record in records])) for name in records[0]}


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encodes and decodes images (B, 3, 256, 256) in [-1, 1]."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


def shrink_and_enlarge(image: np.ndarray) -> np.ndarray:
    """Downsamples an image uint8 (256, 256, 3) to 32 x 32 by area and upsamples it bilinearly."""
    small = cv2.resize(image, None, fx=1 / VAE_FACTOR, fy=1 / VAE_FACTOR, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def psnr(pred: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1]."""
    return 10 * math.log10(4 / functional.mse_loss(pred, target).item())


def mouth_box(landmarks: np.ndarray) -> tuple[slice, slice, slice]:
    """Index of the mouth and its border in an image (3, 256, 256)."""
    mouth = landmarks[MOUTH]
    x1, y1 = np.clip(mouth.min(0) - MOUTH_BORDER, 0, IMAGE_SIZE).astype(int)
    x2, y2 = np.clip(mouth.max(0) + MOUTH_BORDER, 0, IMAGE_SIZE).astype(int)
    return np.s_[:, y1:y2, x1:x2]


def regions(landmarks: np.ndarray) -> dict[str, torch.Tensor]:
    """Coverage of each 8 x 8 block by lips, eyes and background (outside all landmarks): float (32, 32)."""

    def hulls(*landmark_groups: slice) -> torch.Tensor:
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for group in landmark_groups:
            cv2.fillConvexPoly(mask, cv2.convexHull(landmarks[group].round().astype(np.int32)), 1.0)
        return functional.avg_pool2d(torch.from_numpy(mask)[None], VAE_FACTOR)[0]

    return {
        "lips": hulls(MOUTH),
        "eyes": hulls(slice(36, 42), slice(42, 48)),
        "background": 1 - hulls(slice(0, 68)),
    }


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
