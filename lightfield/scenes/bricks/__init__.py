"""The embedded scene: a toy truck of studded bricks, rendered by exact ray casting.

`model` lists the solids of the truck, `solids` defines them and their surface normals,
`ray_casting` intersects rays with them, `light` shades them, and `scene` renders the views of a
scene.
"""

from lightfield.scenes.bricks.scene import bricks_scene, one_ray_reference_db

__all__ = ["bricks_scene", "one_ray_reference_db"]
