"""Scenes: posed images of an object, whatever they were read from.

`lightfield.scenes.scene` is the common form. A loader (`blender`, `llff`) describes a folder as a
`capture`; `assembly` decodes its images, finds its background and its bounds, and moves its poses to
normalized coordinates. `bricks` is the embedded scene.
"""
