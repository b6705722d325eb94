"""Scenes: posed images of an object or a place, loaded from folders or rendered.

A loader (`transforms_json`, `llff`) reads a folder's poses and image headers into a
`capture.Capture`. `assembly` decodes the images, finds background and bounds, and normalizes the
coordinates; the result is a `scene.Scene`. `formats` picks the loader. `bricks` renders the
embedded scene.
"""
