"""The names of a run's stages, in the order in which they run."""

STAGES = (
    "scene", "teacher", "pseudo", "student", "prune", "export", "lens", "bench", "report",
)  # fmt: skip
