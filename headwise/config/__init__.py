"""The configuration of a run: typed dataclasses, filled from YAML and dotted overrides."""
