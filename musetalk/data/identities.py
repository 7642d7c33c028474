"""Finds out by their faces which videos of a cache show one person, and proposes identities.json.

Training and held-out clips never share an identity, but one person under two names can still be on both sides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from tqdm import tqdm

from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.cache_format import json_bytes, video_key
from musetalk.data.dataset import split_clips
from musetalk.data.sources import read_identities
from musetalk.errors import UserError
from musetalk.files import atomic_write_bytes
from musetalk.models.face_embedding import FaceEmbedder, load_face_embedder

PROPOSAL = "identities.proposed.json"  # beside identities.json
FRAMES = 3  # of a clip, evenly spaced
# Mean cosine of videos from which on they show one person. Of 89 people, videos of one have at least 0.65, of two at
# most 0.40 (generated people 0.50).
SAME_FACE = 0.5


@dataclass(frozen=True)
class Proposal:
    """The identities of the videos of a cache after those that show one person are joined."""

    identities: dict[str, str]  # path of a video without its suffix -> name, as in identities.json
    joined: list[list[str]]  # groups of present names that show one person, sorted
    faces: dict[str, int]  # present name -> number of different faces in its videos


def compare_faces(cache_dir: Path, videos: Path, models_dir: Path, share: float) -> None:
    """Prints which identities of a cache show one person; if any do, writes `PROPOSAL` into the folder of the videos.

    share: of identities that training holds out. Raises UserError if the folder has none of the videos of the cache,
    CacheError, WeightsError.
    """
    cache, present = Cache(cache_dir), read_identities(videos)
    if not any((videos / clip.metadata["source"]).exists() for clip in cache.clips.values()):
        raise UserError(f"{videos} has none of the videos in {cache_dir}; set hdtf_dir to the folder they are from")
    proposal = propose_identities(cache, load_face_embedder(models_dir))
    print("\n".join(findings(proposal, cache, share)))
    if proposal.joined:
        path = videos / PROPOSAL
        atomic_write_bytes(path, json_bytes(present | proposal.identities))
        print(f"proposal: {path}; rename it to identities.json and run the script again without --identities")


def propose_identities(cache: Cache, embedder: FaceEmbedder) -> Proposal:
    """Joins the identities of a cache whose faces are one, under the name with the most videos.

    Names are only joined, never split: a person in disguise would end up on both sides of the split.
    Memory and time grow with the square of the number of videos: 10,000 take about 1 GB and 10 s. Raises CacheError if
    no frame of the cache is usable.
    """
    vectors = embed_videos(cache, embedder)
    labels = cluster_faces(np.stack(list(vectors.values())))
    names = {clip.metadata["source"]: clip.identity for clip in cache.clips.values()}
    embedded = [names[source] for source in vectors]
    joined = join_names(embedded, labels)
    counts = Counter(names.values())
    chosen = {name: max(group, key=lambda name: counts[name]) for group in joined for name in group}
    return Proposal(
        {video_key(PurePath(source)): chosen.get(name, name) for source, name in names.items()},
        joined,
        Counter(name for name, _ in set(zip(embedded, labels.tolist(), strict=True))),
    )


def embed_videos(cache: Cache, embedder: FaceEmbedder) -> dict[str, np.ndarray]:
    """Averages the embeddings of some frames of each video: {source: unit vector, float32 (128,)}.

    A video without a usable frame has none. Raises CacheError if that is true of all.
    """
    faces: dict[str, list[np.ndarray]] = defaultdict(list)
    for clip in tqdm(cache.clips.values(), "faces", unit="clip"):
        if clip.usable.any():
            faces[clip.metadata["source"]].append(_embed_clip(clip, embedder))
    if not faces:
        raise CacheError(f"{cache.folder}: no clip has a usable frame")
    means = {source: np.concatenate(vectors).mean(axis=0) for source, vectors in faces.items()}
    return {source: mean / np.linalg.norm(mean) for source, mean in means.items()}


def _embed_clip(clip: Clip, embedder: FaceEmbedder) -> np.ndarray:
    """Embeds `FRAMES` faces of a clip: unit vectors, float32 (FRAMES, 128)."""
    usable = np.flatnonzero(clip.usable)
    frames = usable[np.linspace(0, len(usable) - 1, FRAMES + 2).astype(int)[1:-1]]
    crops = np.stack([clip.image(frame) for frame in frames])
    return embedder.embed_crops(crops, clip.tensor("boxes")[frames, 0], clip.tensor("landmarks")[frames])


def cluster_faces(vectors: np.ndarray) -> np.ndarray:
    """Groups unit vectors (N, D) by average linkage, down to a mean cosine of `SAME_FACE`. Returns int labels (N,)."""
    if len(vectors) == 1:
        return np.zeros(1, int)
    return fcluster(linkage(vectors, "average", "cosine"), 1 - SAME_FACE, "distance")


def join_names(names: Sequence[str], labels: np.ndarray) -> list[list[str]]:
    """Groups names that have a label in common, directly or through other names; only groups of several, sorted.

    names: N identities. labels: int (N,), see `cluster_faces`.
    """
    members = defaultdict(set)
    for name, label in zip(names, labels.tolist(), strict=True):
        members[label].add(name)
    groups: list[set[str]] = []
    for group in members.values():
        touching = [other for other in groups if other & group]
        groups = [other for other in groups if not other & group] + [group.union(*touching)]
    return sorted(sorted(group) for group in groups if len(group) > 1)


def findings(proposal: Proposal, cache: Cache, share: float) -> Iterator[str]:
    """Yields lines for the user: the numbers, the joined names, those on both sides of the split, names of several.

    share: of identities that training holds out, see `split_clips`.
    """
    after = len(set(proposal.identities.values()))
    before = after + sum(len(group) - 1 for group in proposal.joined)
    yield f"videos: {len(proposal.identities)}, identities: {before}, after joining those with one face: {after}"
    held_out = {cache.clips[name].identity for name in split_clips(cache, share)[1]}
    for group in proposal.joined:
        yield f"one face: {', '.join(group)}"
        held, trained = [n for n in group if n in held_out], [n for n in group if n not in held_out]
        if held and trained:
            yield f"  warning: it is in training ({', '.join(trained)}) and held out ({', '.join(held)})"
    for name, count in sorted(proposal.faces.items()):
        if count > 1:
            yield f"{count} faces in one identity, which is kept: {name}"
