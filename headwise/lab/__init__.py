"""The laboratory: runs, studies and where they execute."""
