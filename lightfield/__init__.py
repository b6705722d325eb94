"""What a light field is: cameras, rays, scenes, the student network and its measures."""
