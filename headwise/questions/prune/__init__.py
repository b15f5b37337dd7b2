"""Remove heads by a measure, and see whether the measure tells which heads are needed."""
