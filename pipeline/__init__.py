"""The top floor: the only place that wires the stages together."""
