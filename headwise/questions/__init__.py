"""Questions about heads, one folder each: how to measure, the numbers, and the page."""
