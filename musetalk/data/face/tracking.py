"""Tracks one person through the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from musetalk.contract import VIDEO_FPS
from musetalk.data.face.face import Face, area, overlap

FaceT = TypeVar("FaceT", bound=Face)

SAME_PERSON_IOU = 0.3  # minimum overlap of a person's boxes in consecutive frames
MAX_GAP = 2 * VIDEO_FPS  # frames without detection after which a track ends


def people(faces: Sequence[Sequence[FaceT]]) -> list[FaceT]:
    """Returns the faces of the first frame that shows the most, from left to right. faces: those of each frame."""
    most: Sequence[FaceT] = max(faces, key=len, default=[])
    return sorted(most, key=lambda face: face.box[0] + face.box[2])


def follow_person(faces: Sequence[Sequence[FaceT]], chosen: FaceT | None = None) -> list[FaceT | None]:
    """Returns the face of one person in each of T frames, None where it is not detected.

    Faces that overlap from frame to frame form a track. chosen: one of the faces, whose track is returned. By default
    that of the main person: the track with the largest sum of box areas, which excludes passers-by and people shown
    only before a cut.
    """
    tracks: list[dict[int, FaceT]] = []
    for index, candidates in enumerate(faces):
        active = [track for track in tracks if index - next(reversed(track)) <= MAX_GAP]
        pairs = [
            (overlap(track[next(reversed(track))].box, face.box), t, f)
            for t, track in enumerate(active)
            for f, face in enumerate(candidates)
        ]
        free_tracks, free_faces = set(range(len(active))), set(range(len(candidates)))
        for iou, t, f in sorted(pairs, reverse=True):  # best pair first
            if iou >= SAME_PERSON_IOU and t in free_tracks and f in free_faces:
                active[t][index] = candidates[f]
                free_tracks.remove(t)
                free_faces.remove(f)
        tracks += [{index: candidates[f]} for f in sorted(free_faces)]
    if chosen is None:
        person = max(tracks, key=lambda track: sum(area(face.box) for face in track.values()), default={})
    else:
        person = next(track for track in tracks if any(face is chosen for face in track.values()))
    return [person.get(index) for index in range(len(faces))]
