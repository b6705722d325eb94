"""Pictures to teacher, teacher to pseudo pictures, pseudo pictures to student."""
