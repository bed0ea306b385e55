"""The sync engine: one door in, one door out, and the rules between them. It is handed providers and imports none."""
