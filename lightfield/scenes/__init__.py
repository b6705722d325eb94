"""Scenes: posed pictures of an object, whatever they were read from.

`lightfield.scenes.scene` is the common form; the modules beside it (`blender`, `llff`, `bricks`) each
return one, already in the project's world frame.
"""
