"""Attention Mesh, MediaPipe's face landmark network: 468 points, those of lips and eyes refined.

Grishchenko et al. 2020, https://arxiv.org/abs/2006.10962; the layers are those of MediaPipe's published network
(Apache-2.0, https://github.com/google-ai-edge/mediapipe, mediapipe/modules/face_landmark), without the branches for
the irises, which are not among the 68 points.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from musetalk.data.face.blazeface import BlazeBlock, blaze_blocks, cell_centres, same_padding

SIZE = 192  # pixels, width and height of the input
POINTS = 468
REGION_SIZE = 16  # cells, width and height of a region
POINT_RANGE = 64  # of the coordinates of a region's points
REGION_SCALE = 1.5  # of a region, relative to the bounding box of its points
# The points of each region, in the order of its outputs, and the two whose connection is horizontal in it.
REGIONS = {
    "lips": (
        (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409)
        + (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415)
        + (76, 77, 90, 180, 85, 16, 315, 404, 320, 307, 306, 184, 74, 73, 72, 11, 302, 303, 304, 408)
        + (62, 96, 89, 179, 86, 15, 316, 403, 319, 325, 292, 183, 42, 41, 38, 12, 268, 271, 272, 407),
        (61, 291),
    ),
    "left_eye": (
        (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173, 130, 25, 110, 24, 23, 22, 26, 112)
        + (243, 247, 30, 29, 27, 28, 56, 190, 226, 31, 228, 229, 230, 231, 232, 233, 244, 113, 225, 224, 223, 222, 221)
        + (189, 35, 124, 46, 53, 52, 65, 143, 111, 117, 118, 119, 120, 121, 128, 245, 156, 70, 63, 105, 66, 107, 55)
        + (193,),
        (33, 133),
    ),
    "right_eye": (
        (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398, 359, 255, 339, 254, 253, 252)
        + (256, 341, 463, 467, 260, 259, 257, 258, 286, 414, 446, 261, 448, 449, 450, 451, 452, 453, 464, 342, 445, 444)
        + (443, 442, 441, 413, 265, 353, 276, 283, 282, 295, 372, 340, 346, 347, 348, 349, 350, 357, 465, 383, 300, 293)
        + (334, 296, 336, 285, 417),
        (362, 263),
    ),
}


def narrow() -> nn.Sequential:
    """The last layers before the points: 128 channels to 32."""
    return nn.Sequential(nn.Conv2d(128, 32, 1), nn.PReLU(32), BlazeBlock(32, 32, nn.PReLU(32)))


class Region(nn.Module):
    """Refines the points of a region from features cut about it."""

    points: torch.Tensor

    def __init__(self, points: tuple[int, ...], ends: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("points", torch.tensor(points), persistent=False)
        self.ends = ends
        self.body = blaze_blocks(32, (32, 32, -64, 64, 64, -128, 128, 128, -128, 128, 128), nn.PReLU)
        self.narrow = narrow()
        self.head = nn.Conv2d(32, 2 * len(points), 2)

    def forward(self, features: torch.Tensor, mesh: torch.Tensor) -> torch.Tensor:
        """Features (B, 32, 48, 48), mesh (B, 468, 2) in pixels of the input -> points of the region (B, N, 2)."""
        centre, axes = self.frame(mesh)
        cells = cell_centres(REGION_SIZE).to(mesh) - 0.5
        grid = (centre[:, None] + cells @ axes).view(-1, REGION_SIZE, REGION_SIZE, 2) * (2 / SIZE) - 1
        cut = functional.grid_sample(features, grid, align_corners=False)
        # MediaPipe's zero padding starts at the centres of the outermost cells.
        inside = (grid.abs() <= 1 - 1 / features.shape[-1]).all(dim=-1)
        cut = cut * inside[:, None]
        points = self.head(self.narrow(self.body(cut))).view(len(mesh), -1, 2)
        return centre[:, None] + (points / POINT_RANGE - 0.5) @ axes

    def frame(self, mesh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centre (B, 2) and sides (B, 2, 2) of the region: its points' bounding box, rotated with its ends, enlarged.

        sides: the vectors along its width and its height, in pixels of the input.
        """
        right = functional.normalize(mesh[:, self.ends[1]] - mesh[:, self.ends[0]], dim=-1)
        rotation = torch.stack([right, torch.stack([-right[:, 1], right[:, 0]], dim=-1)], dim=1)  # rows: right, down
        rotated = mesh[:, self.points] @ rotation.transpose(1, 2)
        low, high = rotated.amin(dim=1), rotated.amax(dim=1)
        centre = ((low + high) / 2)[:, None] @ rotation
        return centre.squeeze(1), (REGION_SCALE * (high - low))[:, :, None] * rotation


class AttentionMesh(nn.Module):
    """Finds 468 points of a face in an upright square view of it: 192 x 192 pixels, 1.0 million parameters."""

    size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_activation = nn.Conv2d(3, 16, 3, 2), nn.PReLU(16)
        self.early = blaze_blocks(16, (16, 16, -32), nn.PReLU)
        self.late = blaze_blocks(32, (32, 32, -64, 64, 64, -128, 128, 128, -128, 128, 128, -128, 128, 128), nn.PReLU)
        self.narrow = narrow()
        self.mesh = nn.Conv2d(32, 3 * POINTS, 3)
        self.presence = nn.Conv2d(32, 1, 3)
        self.regions = nn.ModuleDict({name: Region(*region) for name, region in REGIONS.items()})

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, 192, 192), RGB in [0, 1] -> points (B, 468, 2) relative to the input, score of a face (B,)."""
        features = self.early(self.stem_activation(self.stem(same_padding(images, 3))))
        x = self.narrow(self.late(features))
        mesh = self.mesh(x).view(len(images), POINTS, 3)[..., :2]
        points = mesh.clone()
        for region in self.regions.values():
            points[:, region.points] = region(features, mesh)
        return points / self.size, self.presence(x).flatten().sigmoid()
