"""Run folders: written, found and read without a server or a registry."""
