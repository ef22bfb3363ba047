"""Images and captions to ids and back. See `image.py` and `text/`."""
