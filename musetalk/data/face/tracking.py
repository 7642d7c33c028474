"""Follows one person through the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence

from musetalk.contract import VIDEO_FPS
from musetalk.data.face.face import Face, area, overlap

SAME_PERSON_IOU = 0.3  # overlap of a person's boxes from one frame to the next
MAX_GAP = 2 * VIDEO_FPS  # frames that a person may be unseen before a face there counts as somebody else


def follow_person(faces: Sequence[Sequence[Face]]) -> list[Face | None]:
    """The face of one person in each of T frames, None where it is not seen.

    Faces that overlap from frame to frame make a track; the person is the track with the largest sum of box
    areas, so somebody passing behind, or seen only before a cut, is left out.
    """
    tracks: list[dict[int, Face]] = []
    for index, candidates in enumerate(faces):
        alive = [track for track in tracks if index - next(reversed(track)) <= MAX_GAP]
        pairs = [
            (overlap(track[next(reversed(track))].box, face.box), t, f)
            for t, track in enumerate(alive)
            for f, face in enumerate(candidates)
        ]
        free_tracks, free_faces = set(range(len(alive))), set(range(len(candidates)))
        for iou, t, f in sorted(pairs, reverse=True):  # the best pair first
            if iou >= SAME_PERSON_IOU and t in free_tracks and f in free_faces:
                alive[t][index] = candidates[f]
                free_tracks.remove(t)
                free_faces.remove(f)
        tracks += [{index: candidates[f]} for f in sorted(free_faces)]
    person = max(tracks, key=lambda track: sum(area(face.box) for face in track.values()), default={})
    return [person.get(index) for index in range(len(faces))]
