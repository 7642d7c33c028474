"""Raw video and audio in, lip-synced video out; the modules in the order of the data:

video, face, crop, models (vae, audio_encoder), audio, cache, dataset, models (unet), checkpoint, blend, pipeline.
"""

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"OpenCV cannot be loaded ({error}); it needs the system libraries libGL and GLib: "
        "apt-get install libgl1 libglib2.0-0"
    ) from error
