"""`selective`: attention whose queries mask keys for later queries."""
