"""MuseTalk lip sync: `data` prepares videos, `models` has the networks, `training` trains, `inference` lip-syncs."""

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"OpenCV cannot be loaded ({error}); install the system libraries libGL and GLib: "
        "apt-get install libgl1 libglib2.0-0"
    ) from error
