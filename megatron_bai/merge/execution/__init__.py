"""Execute a planned merge: read, combine, write and verify in bounded memory."""
