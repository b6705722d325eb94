"""Images to teacher, teacher to pseudo images, pseudo images to student."""
