"""Makes the small set in models/mini: material, then vae and audio_encoder, then unet; measure tests it on new people.

models/mini/README.md has the commands.
"""
