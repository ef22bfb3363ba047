"""Networks that see images: features to compare sets of images by, and classes."""
