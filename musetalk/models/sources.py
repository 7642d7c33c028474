"""The registry of published weight files: where each belongs in a models folder and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The origin of a weight file."""

    url: str  # of the file or, with `look_for`, of a web page
    sha256: str = ""  # "" if unknown
    size: int = 0  # bytes, 0 if unknown
    look_for: str = ""  # what to look for on that page; such a file has to be downloaded by hand
    repo: str = ""  # on Hugging Face, "" for other sites
    filename: str = ""  # in the repository

    def __str__(self) -> str:
        return f"{self.url} ({self.look_for})" if self.look_for else self.url


def hub(repo: str, filename: str, sha256: str = "", size: int = 0) -> Source:
    """Returns the source of a file on Hugging Face."""
    url = f"https://huggingface.co/{repo}/resolve/main/{filename}"
    return Source(url, sha256, size, repo=repo, filename=filename)


# Path in a models folder -> source.
SOURCES = {
    "musetalk/musetalk.json": hub("TMElyralab/MuseTalk", "musetalk/musetalk.json"),
    "musetalk/pytorch_model.bin": hub(
        "TMElyralab/MuseTalk",
        "musetalk/pytorch_model.bin",
        "0ee7d5ea03ea75d8dca50ea7a76df791e90633687a135c4a69393abfc0475ffe",
        3_400_076_549,
    ),
    "musetalk/cunet.bin": Source(
        "https://drive.google.com/drive/folders/1USuHLbs1ff3mFJ5QtJMAZxm_yWLwqYai",
        look_for="cunet.bin, MuseTalkTrainer's UNet",
    ),
    "musetalkV15/musetalk.json": hub(
        "TMElyralab/MuseTalk",
        "musetalkV15/musetalk.json",
        "5b6923aee04d71692e0e9846c471e0a4ea07a4f686d39545e472bd4ba17e1b47",
        748,
    ),
    "musetalkV15/unet.pth": hub(
        "TMElyralab/MuseTalk",
        "musetalkV15/unet.pth",
        "7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007",
        3_400_074_924,
    ),
    "sd-vae-ft-mse/config.json": hub("stabilityai/sd-vae-ft-mse", "config.json"),
    "sd-vae-ft-mse/diffusion_pytorch_model.safetensors": hub(
        "stabilityai/sd-vae-ft-mse",
        "diffusion_pytorch_model.safetensors",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        334_643_276,
    ),
    "sd-vae-ft-mse/diffusion_pytorch_model.bin": hub(
        "stabilityai/sd-vae-ft-mse",
        "diffusion_pytorch_model.bin",
        "1b4889b6b1d4ce7ae320a02dedaeff1780ad77d415ea0d744b476155c6377ddc",
        334_707_217,
    ),
    "whisper/tiny.pt": Source(
        "https://openaipublic.azureedge.net/main/whisper/models/"
        "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9/tiny.pt",
        "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9",
        75_572_083,
    ),
    "dwpose/dw-ll_ucoco_384.pth": hub(
        "yzd-v/DWPose",
        "dw-ll_ucoco_384.pth",
        "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07",
        406_878_486,
    ),
    # A copy: Wav2Lip's README no longer links the file, and its folder now contains TorchScript programs. Two public
    # download scripts give this sum, one for this copy and one for the authors' link of 2020.
    "syncnet/lipsync_expert.pth": hub(
        "camenduru/Wav2Lip",
        "checkpoints/lipsync_expert.pth",
        "9b9936c721696446eeed353032cab242a8cf0eed8c46cde540366f6ae5493be5",
    ),
    "syncnet/latentsync_syncnet.pt": hub(
        "ByteDance/LatentSync",
        "latentsync_syncnet.pt",
        "38fa63bad3ed2332f647c40a5dc616cb0e233db8579f698f62af4c41965c4da5",
        1_488_019_828,
    ),
    "syncnet/stable_syncnet.pt": hub(
        "ByteDance/LatentSync-1.5",
        "stable_syncnet.pt",
        "dccc464554b85ed939ae5cf63000e5803d4b21d8c7dae2260544a10aeb1ac483",
        1_605_324_224,
    ),
    # A copy: its authors, zllrunning/face-parsing.PyTorch, host the same file on Google Drive.
    "face-parse-bisent/79999_iter.pth": hub(
        "ManyOtherFunctions/face-parse-bisent",
        "79999_iter.pth",
        "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        53_289_463,
    ),
    "sface/face_recognition_sface_2021dec_int8bq.onnx": hub(
        "opencv/face_recognition_sface",
        "face_recognition_sface_2021dec_int8bq.onnx",
        "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
        10_667_852,
    ),
    "vgg/vgg16-397923af.pth": Source(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
    ),
    "vgg/lpips.pth": Source(
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        7_289,
    ),
    "syncnet/syncnet_v2.model": Source(
        "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
        54_573_114,
    ),
    "inception/pt_inception-2015-12-05-6726825d.pth": Source(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
    ),
}
