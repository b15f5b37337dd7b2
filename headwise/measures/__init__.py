"""Measures of heads: from what a layer offers to the head table."""
